"""Encoded rows on a GPU: the Triton twins of ``rows``, with the same bits.

Import this module only where Triton is installed. One program encodes one token: it reads the row
once, quantizes it once and writes K encoded rows (``permute_encode``) or one (``encode_rows``).
The kernels are in ``triton_codec``.

Formats: ``fp8``, ``mxfp8``, ``mxfp8-e5m2``, ``mxfp4`` and its kin, MBS with static factors. MBS-D
is for weights, which are encoded once: it has no kernel.
"""

from typing import Any

import torch
from torch import Tensor

from moe_locality.errors import ConfigError
from moe_locality.quantization import elements as el
from moe_locality.quantization import triton_codec
from moe_locality.quantization.mx_formats import MACRO_BLOCK, Format, row_layout, section_bytes
from moe_locality.quantization.rows import (
    check_activations,
    check_buffer,
    check_row_format,
    inverse_positions,
)

_kernels: Any = triton_codec  # a launch, kernel[grid](...), is beyond type checkers
_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CHUNK = 1024
_PADDING_ROWS = 32


def encode_rows(x: Tensor, format: str) -> Tensor:
    """Do what ``rows.encode_rows`` does; the same bytes."""
    out = _new_rows(x, x.shape[0], format)
    if out.numel():
        _launch_encode(x, None, out, format)
    return out


def permute_encode(
    x: Tensor, row_token: Tensor, format: str, *, positions: Tensor | None = None
) -> Tensor:
    """Do what ``rows.permute_encode`` does; the same bytes.

    ``positions [T, K]`` integer is the inverse of ``row_token [R]``: the rows of each token, -1 for
    none. Without it, it is computed (one sort; needs the largest number of rows of a token on the
    host).
    """
    out = _new_rows(x, row_token.shape[0], format)
    if not out.numel():
        return out
    inverse = inverse_positions(row_token, x.shape[0]) if positions is None else positions
    if inverse.numel():
        _launch_encode(x, inverse.contiguous(), out, format)
    grid = (-(-row_token.shape[0] // _PADDING_ROWS),)
    _kernels.zero_padding_kernel[grid](
        row_token, out, row_token.shape[0], ROW_BYTES=out.shape[1], ROWS=_PADDING_ROWS
    )
    return out


def decode_rows(
    buffer: Tensor, format: str, width: int, dtype: torch.dtype, *, index: Tensor | None = None
) -> Tensor:
    """Do what ``rows.decode_rows`` does; the same floats."""
    fmt = check_row_format(format)
    check_buffer(buffer, format, width)
    count = buffer.shape[0] if index is None else index.shape[0]
    out = torch.empty((count, width), dtype=dtype, device=buffer.device)
    if out.numel():
        _kernels.decode_kernel[(count,)](
            buffer.contiguous(),
            buffer if index is None else index.contiguous(),
            out.view(torch.int16) if dtype == torch.bfloat16 else out,
            IN_ORDER=index is not None,
            OUT=_FLOATS[dtype],
            LARGEST=torch.finfo(dtype).max,
            **_decode_constants(fmt, width),
            enable_fp_fusion=False,
        )
    return out


def _new_rows(x: Tensor, count: int, format: str) -> Tensor:
    fmt = check_row_format(format)
    check_activations(x)
    if fmt.factor_rule == "dynamic":
        raise ConfigError(
            f"found format {format!r} for a Triton kernel, expected another: MBS-D is searched "
            "for weights, on the reference path"
        )
    total = row_layout(fmt, x.shape[1])[2]
    return torch.empty((count, total), dtype=torch.uint8, device=x.device)


def _launch_encode(x: Tensor, positions: Tensor | None, out: Tensor, format: str) -> None:
    fmt = check_row_format(format)
    if x.stride(1) != 1:
        x = x.contiguous()
    is_bf16 = x.dtype == torch.bfloat16
    _kernels.encode_kernel[(x.shape[0],)](
        x.view(torch.int16) if is_bf16 else x,
        x if positions is None else positions,
        out,
        x.stride(0),
        K=1 if positions is None else positions.shape[1],
        PERMUTE=positions is not None,
        BF16=is_bf16,
        **_encode_constants(fmt, x.shape[1]),
        enable_fp_fusion=False,
    )


def _decode_constants(fmt: Format, width: int) -> dict[str, Any]:
    """The compile-time constants that both kernels take."""
    _, scale_start, total = row_layout(fmt, width)
    return {
        "WIDTH": width,
        "CHUNK": min(_CHUNK, max(MACRO_BLOCK, 1 << (width - 1).bit_length())),
        "BLOCK": fmt.block,
        "MBITS": el.MANTISSA_BITS[fmt.element],
        "EBIAS": el.EXPONENT_BIAS[fmt.element],
        "MBS": fmt.factor_rule is not None,
        "FP32_SCALE": fmt.scale_rule == "fp32",
        "CODE_BYTES": section_bytes(fmt, width)[0],
        "SCALE_START": scale_start,
        "ROW_BYTES": total,
    }


def _encode_constants(fmt: Format, width: int) -> dict[str, Any]:
    codes, factors, scales = section_bytes(fmt, width)
    _, scale_start, _ = row_layout(fmt, width)
    return {
        **_decode_constants(fmt, width),
        "EMAX": el.EMAX[fmt.element],
        "MAX": el.MAX[fmt.element],
        "OAS": fmt.scale_rule == "oas",
        "FACTOR_END": codes + factors,
        "SCALE_END": scale_start + scales,
    }
