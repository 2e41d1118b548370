"""Encoded rows by the CUDA extension of ``csrc/``: the twins of ``rows``, with the same bits.

Use it where ``moe_locality.kernels.cuda_impl.why_unavailable()`` is None. As in ``mx_triton``, a
token is read and quantized once, and MBS-D, which is for weights, has no kernel.
"""

from typing import Any

import torch
from torch import Tensor

from moe_locality.errors import ConfigError
from moe_locality.kernels import cuda_impl
from moe_locality.quantization import elements as el
from moe_locality.quantization.mx_formats import row_layout, section_bytes
from moe_locality.quantization.rows import (
    check_activations,
    check_buffer,
    check_row_format,
    inverse_positions,
)

SCALE_RULES = {"floor": 0, "oas": 1, "fp32": 2}
"""The numbers of ``ScaleRule`` in csrc/kernels.h."""


def encode_rows(x: Tensor, format: str) -> Tensor:
    """Do what ``rows.encode_rows`` does; the same bytes."""
    return _encode(x, None, None, x.shape[0], format)


def permute_encode(
    x: Tensor, row_token: Tensor, format: str, *, positions: Tensor | None = None
) -> Tensor:
    """Do what ``rows.permute_encode`` does; the same bytes.

    ``positions [T, K]``: see ``mx_triton.permute_encode``.
    """
    inverse = inverse_positions(row_token, x.shape[0]) if positions is None else positions
    return _encode(x, _indices(inverse), _indices(row_token), row_token.shape[0], format)


def decode_rows(
    buffer: Tensor, format: str, width: int, dtype: torch.dtype, *, index: Tensor | None = None
) -> Tensor:
    """Do what ``rows.decode_rows`` does; the same floats."""
    check_row_format(format)
    check_buffer(buffer, format, width)
    count = buffer.shape[0] if index is None else index.shape[0]
    out = torch.empty((count, width), dtype=dtype, device=buffer.device)
    if out.numel():
        order = None if index is None else _indices(index)
        _operators().decode(buffer.contiguous(), order, out, *row_format(format, width))
    return out


def row_format(format: str, width: int) -> tuple[int, int, int, bool, int, int]:
    """The numbers by which a kernel knows a format, in the order of its operator."""
    fmt = check_row_format(format)
    codes, _, _ = section_bytes(fmt, width)
    _, scale_start, _ = row_layout(fmt, width)
    rule = SCALE_RULES[fmt.scale_rule]
    mbs = fmt.factor_rule is not None
    return el.MANTISSA_BITS[fmt.element], fmt.block, rule, mbs, codes, scale_start


def _encode(
    x: Tensor, positions: Tensor | None, row_token: Tensor | None, count: int, format: str
) -> Tensor:
    fmt = check_row_format(format)
    check_activations(x)
    if fmt.factor_rule == "dynamic":
        raise ConfigError(
            f"found format {format!r} for a CUDA kernel, expected another: MBS-D is searched for "
            "weights, on the reference path"
        )
    total = row_layout(fmt, x.shape[1])[2]
    rows = torch.empty((count, total), dtype=torch.uint8, device=x.device)
    if rows.numel():
        x = x if x.stride(1) == 1 else x.contiguous()
        _operators().encode(x, positions, row_token, rows, *row_format(format, x.shape[1]))
    return rows


def _indices(index: Tensor) -> Tensor:
    return index.to(torch.int32).contiguous()


def _operators() -> Any:
    cuda_impl.load_library()
    return torch.ops.moe_locality_cuda
