"""The table of low-bit formats, and the bytes that each needs.

Sources: OCP Microscaling Formats (MX) Specification v1.0 for ``mxfp4`` and ``mxfp8*``; arXiv
2603.08713 for ``mxfp4-16`` (section 4.1), OAS (4.2) and MBS (4.3, Eq. 1-6); NVIDIA's description of
NVFP4 (E2M1 elements, E4M3 scale per 16, one fp32 scale per tensor); arXiv 2412.19437 (DeepSeek-V3)
for ``fp8``, E4M3 with one fp32 scale per 128.
"""

from dataclasses import dataclass
from typing import Literal

from moe_locality.errors import ConfigError

ROW_ALIGNMENT_BYTES = 16
"""Encoded rows are as long as a multiple of this: a GPU copies them with 16-byte accesses."""

MACRO_BLOCK = 128
"""Elements that share one MBS factor: eight local blocks of 16."""

Role = Literal["weight", "activation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One format.

    ``x = element * scale / factor`` (times the tensor's scale for NVFP4). ``scale_rule`` says how
    the scale of a block with largest magnitude a is chosen; ``factor_rule`` is None without MBS.
    """

    name: str
    element: Literal["e2m1", "e4m3", "e5m2"]
    block: int
    """elements that share one scale"""
    scale_rule: Literal["floor", "oas", "e4m3", "fp32"]
    factor_rule: Literal["static", "dynamic", "hybrid"] | None = None

    @property
    def codes_per_byte(self) -> int:
        return 2 if self.element == "e2m1" else 1

    @property
    def scale_bytes(self) -> int:
        return 4 if self.scale_rule == "fp32" else 1


def _table(*formats: Format) -> dict[str, Format]:
    return {fmt.name: fmt for fmt in formats}


FORMATS: dict[str, Format] = _table(
    Format(name="mxfp4", element="e2m1", block=32, scale_rule="floor"),
    Format(name="mxfp4-16", element="e2m1", block=16, scale_rule="floor"),
    Format(name="mxfp4-16-oas", element="e2m1", block=16, scale_rule="oas"),
    Format(name="mxfp4-mbs-s", element="e2m1", block=16, scale_rule="oas", factor_rule="static"),
    Format(name="mxfp4-mbs-d", element="e2m1", block=16, scale_rule="oas", factor_rule="dynamic"),
    Format(name="mxfp4-mbs-h", element="e2m1", block=16, scale_rule="oas", factor_rule="hybrid"),
    Format(name="nvfp4", element="e2m1", block=16, scale_rule="e4m3"),
    Format(name="mxfp8", element="e4m3", block=32, scale_rule="floor"),
    Format(name="mxfp8-e5m2", element="e5m2", block=32, scale_rule="floor"),
    Format(name="fp8", element="e4m3", block=128, scale_rule="fp32"),
)
"""All formats by name. ``mxfp4`` and ``mxfp8`` (E4M3) are the OCP ones, with blocks of 32."""


def get_format(name: str) -> Format:
    """Return a format by name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in FORMATS:
        raise ConfigError(f"found format {name!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[name]


def resolve_factor_rule(fmt: Format, role: Role | None) -> Literal["static", "dynamic"] | None:
    """Return how MBS factors are chosen; MBS-H takes D for weights and S for activations.

    Raises:
        ConfigError: MBS-H without a role, or a role that does not exist.
    """
    if role not in (None, "weight", "activation"):
        raise ConfigError(f"found role {role!r}, expected 'weight' or 'activation'")
    if fmt.factor_rule != "hybrid":
        return fmt.factor_rule
    if role is None:
        raise ConfigError(
            "mxfp4-mbs-h quantizes weights and activations differently (MBS-D and MBS-S): "
            "give role='weight' or role='activation'"
        )
    return "dynamic" if role == "weight" else "static"


def section_bytes(fmt: Format, width: int) -> tuple[int, int, int]:
    """Return the bytes of (codes, factors, scales) of one row of ``width`` elements."""
    codes = _ceil(width, fmt.codes_per_byte)
    factors = 0 if fmt.factor_rule is None else _ceil(width, MACRO_BLOCK)
    return codes, factors, _ceil(width, fmt.block) * fmt.scale_bytes


def bytes_per_row(name: str, width: int) -> int:
    """Return the bytes that :func:`~moe_locality.quantization.mx.quantize` stores for a row.

    NVFP4's scale per tensor (4 bytes) is not counted.
    """
    return sum(section_bytes(get_format(name), width))


def row_layout(fmt: Format, width: int) -> tuple[int, int, int]:
    """Return where (factors, scales) begin in an encoded row, and its length, in bytes.

    A row is ``[codes | factors | scales | zeros]``; fp32 scales begin at a multiple of four.
    """
    codes, factors, scales = section_bytes(fmt, width)
    scale_start = codes + factors
    if fmt.scale_bytes == 4:
        scale_start = _ceil(scale_start, 4) * 4
    total = _ceil(scale_start + scales, ROW_ALIGNMENT_BYTES) * ROW_ALIGNMENT_BYTES
    return codes, scale_start, total


def row_bytes(name: str, width: int) -> int:
    """Return the bytes of one row that :func:`~moe_locality.quantization.rows.encode_rows` makes:
    :func:`bytes_per_row`, rounded up to a multiple of 16.
    """
    return row_layout(get_format(name), width)[2]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
