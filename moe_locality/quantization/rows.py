"""Rows of activations as bytes: what a low-bit dispatch sends, one row per token.

An encoded row is ``[codes | factors | scales | zeros]`` (``mx_formats.row_layout``): rows can be
gathered, exchanged and decoded one by one, and a row's bytes do not depend on the rows beside it.
NVFP4, whose scale spans a tensor, has no such rows.
"""

import torch
from torch import Tensor

from moe_locality.errors import ConfigError
from moe_locality.quantization.mx import FLOAT_DTYPES, QuantizedTensor, dequantize, quantize
from moe_locality.quantization.mx_formats import (
    FORMATS,
    Format,
    get_format,
    row_bytes,
    row_layout,
    section_bytes,
)

ROW_FORMATS = tuple(name for name, fmt in FORMATS.items() if fmt.scale_rule != "e4m3")
"""Formats that a row can be encoded in."""


def check_row_format(format: str) -> Format:
    """Return the format if its rows stand alone.

    Raises:
        ConfigError: it is unknown, or its scale spans the tensor.
    """
    if format in FORMATS and format not in ROW_FORMATS:
        raise ConfigError(
            f"found format {format!r} for rows, expected one of {', '.join(ROW_FORMATS)}: its "
            "scale spans the whole tensor, so a row cannot be decoded alone"
        )
    return get_format(format)


def check_activations(x: Tensor) -> None:
    """Raise unless x is a matrix of floats that formats take."""
    if x.dim() != 2 or x.dtype not in FLOAT_DTYPES:
        raise ConfigError(
            f"found rows of shape {tuple(x.shape)} in {x.dtype}, expected [N, D] in float32, "
            "bfloat16 or float16: reshape or cast them"
        )


def check_buffer(buffer: Tensor, format: str, width: int) -> None:
    """Raise unless the buffer has the shape of encoded rows."""
    if buffer.dtype != torch.uint8 or buffer.shape[1:] != (row_bytes(format, width),):
        raise ConfigError(
            f"found a {buffer.dtype} buffer of shape {tuple(buffer.shape)}, expected uint8 "
            f"[N, {row_bytes(format, width)}] for rows of {width} in {format}"
        )


def encode_rows(x: Tensor, format: str) -> Tensor:
    """Encode activations ``x [N, D]`` as bytes ``[N, row_bytes(format, D)]`` uint8, contiguous.

    MBS-H chooses factors as for activations.

    Raises:
        ConfigError: a format without rows of their own, or x is not a matrix of floats.
    """
    fmt = check_row_format(format)
    check_activations(x)
    q = quantize(x, format, role="activation")
    buffer = x.new_zeros((x.shape[0], row_bytes(format, x.shape[1])), dtype=torch.uint8)
    for part, (start, stop) in zip(
        (q.codes, q.factors, q.scales), _sections(fmt, x.shape[1]), strict=True
    ):
        if part is not None and part.numel():
            buffer[:, start:stop] = part.flatten().view(torch.uint8).view(-1, stop - start)
    return buffer


def decode_rows(
    buffer: Tensor, format: str, width: int, dtype: torch.dtype, *, index: Tensor | None = None
) -> Tensor:
    """Return the floats ``[N, width]`` of encoded rows ``[N, row_bytes(format, width)]``.

    ``index [M]`` asks for these rows in this order, ``[M, width]``: zeros where it is -1.

    Raises:
        ConfigError: the buffer is not what rows of that format and width look like.
    """
    fmt = check_row_format(format)
    check_buffer(buffer, format, width)
    if index is not None:
        buffer = _rows_of(buffer, index)
    codes, factors, scales = (
        buffer[:, start:stop].contiguous() for start, stop in _sections(fmt, width)
    )
    q = QuantizedTensor(
        codes=codes,
        scales=_as_float32(scales) if fmt.scale_rule == "fp32" else scales,
        factors=factors if fmt.factor_rule is not None else None,
        tensor_scale=None,
        shape=torch.Size((buffer.shape[0], width)),
        format=format,
        dtype=dtype,
    )
    return dequantize(q)


def permute_encode(x: Tensor, row_token: Tensor, format: str) -> Tensor:
    """Encode each token ``x [T, D]`` once and return the rows ``[R, row_bytes]`` of ``row_token
    [R]``; a row of token -1 (padding) is zeros, which decode to zeros.
    """
    return _rows_of(encode_rows(x, format), row_token)


def inverse_positions(row_token: Tensor, num_tokens: int) -> Tensor:
    """Return ``[T, K] int64``: the rows of each token in rising order, -1 where it has fewer than
    K, the largest number of rows of a token.
    """
    rows = torch.arange(row_token.shape[0], device=row_token.device)
    owned = row_token >= 0
    token, order = torch.sort(row_token[owned].long(), stable=True)
    counts = torch.bincount(token, minlength=num_tokens)
    most = int(counts.max()) if counts.numel() else 0
    nth = torch.arange(token.shape[0], device=token.device) - (counts.cumsum(0) - counts)[token]
    positions = torch.full((num_tokens, most), -1, dtype=torch.int64, device=row_token.device)
    positions[token, nth] = rows[owned][order]
    return positions


def _rows_of(encoded: Tensor, index: Tensor) -> Tensor:
    """``encoded[index]``, zeros where it is -1: they decode to zeros."""
    if not index.numel() or not encoded.shape[0]:
        return encoded.new_zeros((index.shape[0], encoded.shape[1]))
    rows = encoded.index_select(0, index.clamp(min=0).long())
    return rows.masked_fill_((index < 0)[:, None], 0)


def _as_float32(raw: Tensor) -> Tensor:
    flat = raw.flatten().view(torch.float32)  # rows of one number keep strides that view refuses
    return flat.view(raw.shape[0], raw.shape[1] // 4)


def _sections(fmt: Format, width: int) -> tuple[tuple[int, int], ...]:
    """Return (start, stop) of codes, factors and scales in a row, in bytes."""
    codes, factors, scales = section_bytes(fmt, width)
    factor_start, scale_start, _ = row_layout(fmt, width)
    return (
        (0, codes),
        (factor_start, factor_start + factors),
        (scale_start, scale_start + scales),
    )
