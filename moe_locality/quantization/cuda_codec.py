"""Encoded rows by the CUDA extension of ``csrc/``: called by ``rows``, which checks and allocates.

A token is read and quantized once. Use it where ``kernels.cuda_impl.why_unavailable()`` is None.
"""

from typing import Any

import torch
from torch import Tensor

from moe_locality.kernels import cuda_impl
from moe_locality.quantization.formats import MANTISSA_BITS, Format, row_layout

SCALE_RULES = {"floor": 0, "oas": 1, "fp32": 2}
"""The numbers of ``ScaleRule`` in csrc/kernels.h."""


def encode(
    x: Tensor, positions: Tensor | None, row_token: Tensor | None, rows: Tensor, fmt: Format
) -> None:
    """Write the encoded rows of ``x [T, D]`` (unit column stride) into ``rows [R, row_bytes]``."""
    numbers = _format_numbers(fmt, x.shape[1])
    _operators().encode(x, _int32(positions), _int32(row_token), rows, *numbers)


def decode(buffer: Tensor, index: Tensor | None, out: Tensor, fmt: Format) -> None:
    """Write the decoded rows of ``buffer``, in the order of ``index``, into ``out``."""
    _operators().decode(buffer, _int32(index), out, *_format_numbers(fmt, out.shape[1]))


def _format_numbers(fmt: Format, width: int) -> tuple[int, int, int, bool, int, int]:
    """The numbers by which a kernel knows a format, in the order of its operator."""
    layout = row_layout(fmt, width)
    rule, mbs = SCALE_RULES[fmt.scale_rule], fmt.factor_rule is not None
    mantissa_bits = MANTISSA_BITS[fmt.element]
    return mantissa_bits, fmt.block, rule, mbs, layout.codes_end, layout.scales_start


def _int32(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.to(torch.int32).contiguous()


def _operators() -> Any:
    cuda_impl.load_library()
    return torch.ops.moe_locality_cuda
