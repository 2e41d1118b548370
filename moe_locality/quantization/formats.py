"""Low-bit formats: the table, the bytes of an encoded row, and elements and scales as bits.

The second half (E2M1, E4M3, E5M2, E8M0) works on float32 and int32/uint8 tensors of any shape, on
any device.

Sources: OCP Microscaling Formats (MX) Specification v1.0 for ``mxfp4`` and ``mxfp8*``; arXiv
2603.08713 for ``mxfp4-16`` (section 4.1), OAS (4.2) and MBS (4.3, Eq. 1-6); NVIDIA's description of
NVFP4 (E2M1 elements, E4M3 scale per 16, one fp32 scale per tensor); arXiv 2412.19437 (DeepSeek-V3)
for ``fp8``, E4M3 with one fp32 scale per 128.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moe_locality.errors import ConfigError

ROW_ALIGNMENT_BYTES = 16
"""Encoded rows are as long as a multiple of this: a GPU copies them with 16-byte accesses."""

MACRO_BLOCK = 128
"""Elements that share one MBS factor: eight local blocks of 16."""

E8M0_NAN = 255
E8M0_BIAS = 127
E4M3_NAN = 0x7F

ELEMENT_EMAX = {"e2m1": 2, "e4m3": 8, "e5m2": 15}
"""Exponent of the largest normal number (OCP MX v1.0, table 1: emax_elem)."""

ELEMENT_MAX = {"e2m1": 6.0, "e4m3": 448.0, "e5m2": 57344.0}
"""The largest finite number."""

MANTISSA_BITS = {"e2m1": 1, "e4m3": 3, "e5m2": 2}
EXPONENT_BIAS = {"e2m1": 1, "e4m3": 7, "e5m2": 15}

_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_TINY_SHIFT = 24
SMALLEST_NORMAL = 2.0**-126

Role = Literal["weight", "activation"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """``x = element * scale / factor``, for NVFP4 times the tensor's scale. ``scale_rule`` says how
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


_ALL = (
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
FORMATS = {fmt.name: fmt for fmt in _ALL}
"""All formats by name. ``mxfp4`` and ``mxfp8`` (E4M3) are the OCP ones, with blocks of 32."""


def get_format(name: str) -> Format:
    """Return a format by name; ConfigError where there is none of that name."""
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


class RowLayout(NamedTuple):
    """Where the parts of an encoded row ``[codes | factors | gap | scales | zeros]`` lie, in bytes.

    The gap puts fp32 scales at a multiple of four.
    """

    codes_end: int
    factors_end: int
    scales_start: int
    scales_end: int
    row_bytes: int


def row_layout(fmt: Format, width: int) -> RowLayout:
    codes = _ceil(width, fmt.codes_per_byte)
    factors = codes + (0 if fmt.factor_rule is None else _ceil(width, MACRO_BLOCK))
    start = _ceil(factors, fmt.scale_bytes) * fmt.scale_bytes
    end = start + _ceil(width, fmt.block) * fmt.scale_bytes
    total = _ceil(end, ROW_ALIGNMENT_BYTES) * ROW_ALIGNMENT_BYTES
    return RowLayout(codes, factors, start, end, total)


def bytes_per_row(name: str, width: int) -> int:
    """Return the bytes of a row that ``quantize`` stores, without NVFP4's scale per tensor (4)."""
    _, factors_end, scales_start, scales_end, _ = row_layout(get_format(name), width)
    return factors_end + scales_end - scales_start


def row_bytes(name: str, width: int) -> int:
    """Return the bytes of an encoded row: :func:`bytes_per_row`, rounded up to a multiple of 16."""
    return row_layout(get_format(name), width).row_bytes


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


# -- elements and scales as bits ---------------------------------------------------------------


def exponent_and_mantissa(a: Tensor) -> tuple[Tensor, Tensor]:
    """Split finite ``a >= 0`` into ``floor(log2 a)`` and the 23 mantissa bits, both int32.

    Subnormals are normalized first. Zero gives an exponent below that of every other number.
    """
    tiny = a < SMALLEST_NORMAL
    bits = torch.where(tiny, a * 2.0**_TINY_SHIFT, a).view(torch.int32)
    exponent = (bits >> 23) - 127 - _TINY_SHIFT * tiny.to(torch.int32)
    return exponent, bits & 0x7FFFFF


def power_of_two(exponent: Tensor) -> Tensor:
    """Return ``2 ** exponent`` for int32 exponents in the normal range, -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)


def times_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """Return ``x * 2 ** exponent``, exponents -252 to 252, by two factors: exact where normal."""
    half = exponent >> 1
    return x * power_of_two(half) * power_of_two(exponent - half)


def scale_of_e8m0(scales: Tensor) -> Tensor:
    """Return the float32 of E8M0 scales (OCP MX v1.0, 5.4.1): ``2 ** (s - 127)``, 255 is NaN."""
    wide = scales.to(torch.int32)
    bits = torch.where(wide == 0, 0x00400000, wide << 23)  # 2^-127 is subnormal in float32
    return torch.where(wide == E8M0_NAN, 0x7FC00000, bits).view(torch.float32)


def encode_elements(y: Tensor, element: str) -> Tensor:
    """Round scaled values to the grid of the element, uint8 codes of the same shape.

    Round to nearest, ties to even; what exceeds the largest number becomes it, with its sign (OCP
    MX v1.0, 6.3). E2M1 codes are 0 to 15: sign, two bits of exponent, one of mantissa.
    """
    largest = ELEMENT_MAX[element]
    if element != "e2m1":
        clamped = y.clamp(-largest, largest)  # the conversion alone gives NaN beyond it
        return clamped.to(_DTYPES[element]).view(torch.uint8)
    a = y.abs().clamp(max=largest)
    # steps of the grid: 0.5 below 2, 1 below 4, 2 up to 6; torch.round takes ties to even
    inverse = torch.where(a < 2, 2.0, torch.where(a < 4, 1.0, 0.5))
    steps = torch.round(a * inverse)
    first = torch.where(a < 2, 0.0, torch.where(a < 4, 2.0, 4.0))
    return (steps + first).to(torch.uint8) | (torch.signbit(y).to(torch.uint8) << 3)


def round_e2m1(y: Tensor) -> Tensor:
    """Return the E2M1 numbers that scaled values are rounded to: ``decode(encode(y))``, quicker."""
    a = y.abs().clamp_(max=6.0)
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    return torch.copysign(torch.round(a / step).mul_(step), y)


def decode_elements(codes: Tensor, element: str) -> Tensor:
    """Return the float32 values of uint8 codes."""
    if element != "e2m1":
        return codes.view(_DTYPES[element]).to(torch.float32)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=codes.device)
    return torch.cat([grid, -grid])[codes.to(torch.int32)]


def pack_pairs(codes: Tensor) -> Tensor:
    """Pack 4-bit codes [..., W] into bytes [..., ceil(W / 2)], the first in the low half."""
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_pairs(packed: Tensor, width: int) -> Tensor:
    """Return the 4-bit codes [..., width] of bytes [..., ceil(width / 2)]."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)[..., :width]
