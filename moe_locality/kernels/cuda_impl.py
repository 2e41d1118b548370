"""The CUDA backend: the extension of ``csrc/``, used where it was built; allocation and dtypes.

Nothing is built here: the library is loaded if it lies in the package. Its operators write into
tensors that are made here, on torch's stream; only a row map without static ``num_rows`` waits for
the device.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_locality.errors import ConfigError
from moe_locality.kernels.reference import new_map, without_end

LIBRARY = "_C_cuda.abi3.so"
NO_LIMIT = 2**31 - 1
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@cache
def load_library() -> str | None:
    """Load the extension; return why that is not possible, or None."""
    path = Path(__file__).parents[1] / LIBRARY
    if not path.exists():
        return "this installation has no CUDA extension (it was installed without building it)"
    try:
        torch.ops.load_library(os.fspath(path))
    except OSError as error:
        return f"its library {path.name} cannot be loaded by torch {torch.__version__} ({error})"
    return None


def why_unavailable() -> str | None:
    """Return why no kernel of this backend can run here, or None."""
    return load_library() or (None if torch.cuda.is_available() else "torch sees no GPU here")


def row_map(slot_ids: Tensor, num_slots: int, capacity: int, num_rows: int) -> tuple[Tensor, ...]:
    slot_ids, run = _ids(slot_ids), torch.ops.moe_locality_cuda
    out = new_map(slot_ids, num_slots, num_rows if num_rows >= 0 else slot_ids.numel())
    counts = slot_ids.new_empty(run.row_map_blocks(*slot_ids.shape), num_slots, dtype=torch.int32)
    capacity = NO_LIMIT if capacity < 0 else min(capacity, NO_LIMIT)
    run.row_map(slot_ids, counts, *out, capacity, num_rows >= 0)
    return out if num_rows >= 0 else without_end(out)


def serve_visited(ids: Tensor, slots: Tensor, nodes: Tensor, home_node: int) -> Tensor:
    given = _ids(ids)
    found = torch.empty_like(given, memory_format=torch.contiguous_format)
    tables = (slots.contiguous(), nodes.contiguous())
    torch.ops.moe_locality_cuda.serve_visited(given, *tables, found, home_node)
    return found.to(ids.dtype)


def gather(x: Tensor, index: Tensor) -> Tensor:
    rows = x.new_empty(index.shape[0], x.shape[1])
    torch.ops.moe_locality_cuda.gather(x.contiguous(), index.contiguous(), rows)
    return rows


def permute(x: Tensor, row_token: Tensor, positions: Tensor, slot_offsets: Tensor | None) -> Tensor:
    rows = x.new_empty(row_token.shape[0], x.shape[1])
    torch.ops.moe_locality_cuda.permute(x.contiguous(), positions, row_token, slot_offsets, rows)
    return rows


def combine(rows: Tensor, positions: Tensor, weights: Tensor | None) -> Tensor:
    _check_dtype(rows)
    out = rows.new_empty(positions.shape[0], rows.shape[1])
    torch.ops.moe_locality_cuda.combine(rows.contiguous(), positions, _floats(weights), out)
    return out


def combine_backward(
    grad: Tensor,
    rows: Tensor | None,
    row_token: Tensor,
    row_route: Tensor,
    positions: Tensor,
    weights: Tensor,
    need_rows: bool,
    slot_offsets: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    _check_dtype(grad)
    wide = _floats(weights)
    grad_rows = grad.new_empty(row_token.shape[0], grad.shape[1]) if need_rows else None
    grad_weights = None if rows is None else torch.empty_like(wide)
    given = (grad.contiguous(), None if rows is None else rows.contiguous())
    where = (positions, row_token, slot_offsets)
    torch.ops.moe_locality_cuda.combine_backward(*given, *where, wide, grad_rows, grad_weights)
    return grad_rows, None if grad_weights is None else grad_weights.to(weights.dtype)


def _ids(ids: Tensor) -> Tensor:
    return ids if ids.dtype in (torch.int32, torch.int64) else ids.to(torch.int32)


def _check_dtype(tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ConfigError(
            f"found rows of {tensor.dtype}, expected float32, float16 or bfloat16 on the CUDA "
            "backend: cast them, or use backend='reference'"
        )


def _floats(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.to(torch.float32).contiguous()
