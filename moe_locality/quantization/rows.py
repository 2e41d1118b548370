"""Rows of activations as bytes: what a low-bit dispatch sends, one row per token.

An encoded row (``formats.RowLayout``) can be gathered, exchanged and decoded alone: its bytes do
not depend on the rows beside it. NVFP4, whose scale spans a tensor, has no such rows.

Backends: ``reference`` is torch on any device; ``triton`` (``triton_codec``) and ``cuda`` (the
extension of ``csrc/``) give the same bytes and floats on a GPU. ``auto`` takes, for tensors on a
GPU and formats that have a kernel, CUDA where it was built, else Triton where it is installed.
"""

import importlib
import importlib.util
from typing import Any

import torch
from torch import Tensor

from moe_locality.errors import BackendUnavailable, ConfigError
from moe_locality.kernels import cuda_impl
from moe_locality.kernels.ops import HOW_TO_GET, Backend
from moe_locality.kernels.reference import pick_rows
from moe_locality.quantization.formats import (
    FORMATS,
    MANTISSA_BITS,
    Format,
    get_format,
    row_bytes,
    row_layout,
)
from moe_locality.quantization.mx import FLOAT_DTYPES, QuantizedTensor, dequantize, quantize

ROW_FORMATS = tuple(name for name, fmt in FORMATS.items() if fmt.scale_rule != "e4m3")
"""Formats that a row can be encoded in."""


def encode_rows(x: Tensor, format: str, *, backend: Backend = "auto") -> Tensor:
    """Encode activations ``x [N, D]`` as bytes ``[N, row_bytes(format, D)]`` uint8, contiguous.

    MBS-H chooses factors as for activations.

    Raises:
        ConfigError: a format without rows of their own, or x is not a matrix of floats.
        BackendUnavailable: the backend asked for by name is not usable here.
    """
    return permute_encode(x, None, format, backend=backend)


def permute_encode(
    x: Tensor,
    row_token: Tensor | None,
    format: str,
    *,
    positions: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Encode each token of ``x [T, D]`` once; return the rows ``[R, row_bytes]`` of ``row_token
    [R]`` (None: of each token). A row of token -1 (padding) is zeros, which decode to zeros.

    ``positions [T, K]`` is the inverse of ``row_token``: the rows of each token, -1 for none. It
    saves the GPU kernels a sort, and a wait for its largest number of rows per token.
    """
    fmt = _check_row_format(format)
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES:
        raise ConfigError(
            f"found rows of shape {tuple(x.shape)} in {x.dtype}, expected [N, D] in float32, "
            "bfloat16 or float16: reshape or cast them"
        )
    searched = fmt.factor_rule == "dynamic"
    kernels = None if backend == "auto" and searched else _kernels(x, backend)
    if kernels is None:
        rows = _encode(x, fmt)
        return rows if row_token is None else pick_rows(rows, row_token)
    if searched:
        raise ConfigError(
            f"found format {fmt.name!r} for the backend {backend}, expected another: MBS-D is "
            "searched for weights, on the reference path"
        )
    shape = (len(x if row_token is None else row_token), row_layout(fmt, x.shape[1]).row_bytes)
    rows = torch.empty(shape, dtype=torch.uint8, device=x.device)
    if rows.numel():
        if positions is None and row_token is not None:
            positions = inverse_positions(row_token, x.shape[0])
        x = x if x.stride(1) == 1 else x.contiguous()
        kernels.encode(x, positions, row_token, rows, fmt)
    return rows


def decode_rows(
    buffer: Tensor,
    format: str,
    width: int,
    dtype: torch.dtype,
    *,
    index: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return the floats ``[N, width]`` of encoded rows ``[N, row_bytes(format, width)]``.

    With ``index [M]``, ``[M, width]``: these rows in this order, zeros where it is -1. So received
    rows go straight into the order of the experts.

    Raises:
        ConfigError: the buffer is not what rows of that format and width look like.
    """
    fmt = _check_row_format(format)
    if buffer.dtype != torch.uint8 or buffer.shape[1:] != (row_bytes(format, width),):
        raise ConfigError(
            f"found a {buffer.dtype} buffer of shape {tuple(buffer.shape)}, expected uint8 "
            f"[N, {row_bytes(format, width)}] for rows of {width} in {format}"
        )
    kernels = _kernels(buffer, backend)
    if kernels is None:
        return _decode(buffer if index is None else pick_rows(buffer, index), fmt, width, dtype)
    count = buffer.shape[0] if index is None else index.shape[0]
    out = torch.empty((count, width), dtype=dtype, device=buffer.device)
    if out.numel():
        kernels.decode(buffer.contiguous(), index, out, fmt)
    return out


def inverse_positions(row_token: Tensor, num_tokens: int) -> Tensor:
    """Return ``[T, K] int64``: the rows of each token, rising, then -1; K: most of any token."""
    rows = torch.arange(row_token.shape[0], device=row_token.device)
    owned = row_token >= 0
    token, order = torch.sort(row_token[owned].long(), stable=True)
    counts = torch.bincount(token, minlength=num_tokens)
    most = int(counts.max()) if counts.numel() else 0
    nth = torch.arange(token.shape[0], device=token.device) - (counts.cumsum(0) - counts)[token]
    positions = torch.full((num_tokens, most), -1, dtype=torch.int64, device=row_token.device)
    positions[token, nth] = rows[owned][order]
    return positions


def _check_row_format(format: str) -> Format:
    if format in FORMATS and format not in ROW_FORMATS:
        raise ConfigError(
            f"found format {format!r} for rows, expected one of {', '.join(ROW_FORMATS)}: its "
            "scale spans the whole tensor, so a row cannot be decoded alone"
        )
    return get_format(format)


# -- backends --------------------------------------------------------------------------------------


def _kernels(x: Tensor, backend: str) -> Any:
    """Return what has ``encode`` and ``decode`` of a backend; None: the reference."""
    if backend not in ("auto", "reference", *HOW_TO_GET):
        raise ConfigError(f"found backend {backend!r}, expected auto, reference, triton, cuda")
    if backend == "auto":
        names = ("cuda", "triton") if x.is_cuda else ()
        backend = next((name for name in names if _why_not(name) is None), "reference")
    elif (why := _why_not(backend)) is not None:
        raise BackendUnavailable(
            f"found backend={backend!r}, but {why}: leave the choice to 'auto', or "
            f"{HOW_TO_GET[backend]}"
        )
    if backend == "triton":  # imported here: it needs Triton
        return importlib.import_module("moe_locality.quantization.triton_codec")
    return CudaCodec if backend == "cuda" else None


def _why_not(backend: str) -> str | None:
    if backend == "cuda":
        return cuda_impl.why_unavailable()
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


SCALE_RULES = {"floor": 0, "oas": 1, "fp32": 2}
"""The numbers of ``ScaleRule`` in csrc/kernels.h."""


class CudaCodec:
    """The codec of the CUDA extension, where that is usable; the functions of ``triton_codec``."""

    @staticmethod
    def encode(
        x: Tensor, positions: Tensor | None, row_token: Tensor | None, rows: Tensor, fmt: Format
    ) -> None:
        """Write the encoded rows of ``x [T, D]`` (unit column stride) into ``rows [R, bytes]``."""
        numbers = _format_numbers(fmt, x.shape[1])
        torch.ops.moe_locality_cuda.encode(x, _int32(positions), _int32(row_token), rows, *numbers)

    @staticmethod
    def decode(buffer: Tensor, index: Tensor | None, out: Tensor, fmt: Format) -> None:
        """Write the decoded rows of ``buffer``, in the order of ``index``, into ``out``."""
        torch.ops.moe_locality_cuda.decode(
            buffer, _int32(index), out, *_format_numbers(fmt, out.shape[1])
        )


def _format_numbers(fmt: Format, width: int) -> tuple[int, int, int, bool, int, int]:
    """The numbers by which a kernel knows a format, in the order of its operator."""
    layout = row_layout(fmt, width)
    rule, mbs = SCALE_RULES[fmt.scale_rule], fmt.factor_rule is not None
    mantissa_bits = MANTISSA_BITS[fmt.element]
    return mantissa_bits, fmt.block, rule, mbs, layout.codes_end, layout.scales_start


def _int32(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.to(torch.int32).contiguous()


# -- the reference ---------------------------------------------------------------------------------


def _encode(x: Tensor, fmt: Format) -> Tensor:
    q = quantize(x, fmt.name, role="activation")
    codes_end, factors_end, start, end, size = row_layout(fmt, x.shape[1])
    rows = x.new_zeros((x.shape[0], size), dtype=torch.uint8)
    places = ((q.codes, 0, codes_end), (q.factors, codes_end, factors_end), (q.scales, start, end))
    for part, first, last in places:
        if part is not None and part.numel():
            rows[:, first:last] = part.flatten().view(torch.uint8).view(-1, last - first)
    return rows


def _decode(rows: Tensor, fmt: Format, width: int, dtype: torch.dtype) -> Tensor:
    codes_end, factors_end, start, end, _ = row_layout(fmt, width)
    scales = rows[:, start:end].contiguous()
    if fmt.scale_rule == "fp32":  # flat first: rows of one number keep strides that view refuses
        scales = scales.flatten().view(torch.float32).view(rows.shape[0], (end - start) // 4)
    factors = rows[:, codes_end:factors_end].contiguous()
    q = QuantizedTensor(
        codes=rows[:, :codes_end].contiguous(),
        scales=scales,
        factors=factors if fmt.factor_rule is not None else None,
        tensor_scale=None,
        shape=torch.Size((rows.shape[0], width)),
        format=fmt.name,
        dtype=dtype,
    )
    return dequantize(q)
