"""The Triton backend: tile sizes, allocation and launches of the kernels in ``triton_kernels.py``.

That file imports Triton, so it is imported at the first launch. With ``TRITON_INTERPRET=1`` in
the environment before Triton is first imported, the kernels run on the CPU, slowly, for tests.
No launch waits for the device, but that of a row map without static ``num_rows``.
"""

import importlib
import os
from typing import Any

import torch
from torch import Tensor

from moe_locality.kernels.reference import accumulator, new_map, without_end

NO_LIMIT = 2**31 - 1
ONE_BLOCK_ROUTES = 2048
"""Routes (with their holes) up to which one block makes the whole map: a decode step."""


def why_unavailable() -> str | None:
    """Return why no kernel of this backend can run here, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None if torch.cuda.is_available() or interpreted() else "torch sees no GPU here"


def interpreted() -> bool:
    """Whether Triton runs kernels as Python on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def row_map(slot_ids: Tensor, num_slots: int, capacity: int, num_rows: int) -> tuple[Tensor, ...]:
    num_tokens, top_k = slot_ids.shape
    size = num_rows if num_rows >= 0 else num_tokens * top_k
    shape = map_shape(num_tokens, top_k, num_slots)
    blocks = shape.pop("blocks")
    out = new_map(slot_ids, num_slots, size)
    row_route, row_token, *_ = out
    if num_rows >= 0 and blocks > 1:  # rows past the end have no route
        row_route.fill_(-1)
        row_token.fill_(-1)
    source = (slot_ids, *slot_ids.stride())
    sizes = (num_tokens, num_slots)
    counts = slot_ids.new_empty((blocks, shape["P2"]), dtype=torch.int32)
    kernels = _kernels()
    if blocks > 1:
        count = {name: shape[name] for name in ("K", "K2", "TB", "P2")}
        kernels.count_kernel[(blocks,)](*source, counts, *sizes, **count, num_warps=8)
    kernels.place_kernel[(blocks,)](
        *(*source, counts, *out, *sizes, blocks, size),
        NO_LIMIT if capacity < 0 else min(capacity, NO_LIMIT),
        **shape,
        FILL=num_rows >= 0 and blocks == 1,
        ONE_BLOCK=blocks == 1,
        num_warps=8,
    )
    return out if num_rows >= 0 else without_end(out)


def serve_visited(ids: Tensor, slots: Tensor, nodes: Tensor, home_node: int) -> Tensor:
    found = torch.empty_like(ids, memory_format=torch.contiguous_format)
    num_tokens, top_k = ids.shape
    if found.numel() == 0:
        return found
    size = {"K": top_k, "K2": _power_of_two(top_k), "X": slots.shape[1], "BT": 64}
    tables = (slots.contiguous(), nodes.contiguous())
    grid = (-(-num_tokens // size["BT"]),)
    kernels = _kernels()
    kernels.serve_kernel[grid](ids, *ids.stride(), *tables, found, num_tokens, home_node, **size)
    return found


def gather(x: Tensor, index: Tensor) -> Tensor:
    kernels = _kernels()
    x, index = x.contiguous(), index.contiguous()
    rows = x.new_empty(index.shape[0], x.shape[1])
    if rows.numel():
        tile, width, warps = _tile(len(rows), x.shape[1])
        grid = (_blocks(len(rows), tile), _blocks(x.shape[1], width))
        sizes = {"D": x.shape[1], "BR": tile, "BD": width}
        kernels.gather_kernel[grid](x, index, rows, len(rows), **sizes, num_warps=warps)
    return rows


def permute(x: Tensor, row_token: Tensor, positions: Tensor, slot_offsets: Tensor | None) -> Tensor:
    x = x.contiguous()
    rows = x.new_empty(len(row_token), x.shape[1])
    if not rows.numel():
        return rows
    blocks, tiles, constants = _tiling(positions, x.shape[1])
    padding = _padding(slot_offsets, len(rows), constants["BD"])
    _kernels().permute_kernel[blocks + padding["blocks"], tiles](
        *(x, positions, row_token, slot_offsets, rows),
        *(len(x), blocks, padding["slots"]),
        **constants,
        BR=padding["rows"],
        PADDED=slot_offsets is not None,
    )
    return rows


def combine(rows: Tensor, positions: Tensor, weights: Tensor | None) -> Tensor:
    rows = rows.contiguous()
    out = rows.new_empty(len(positions), rows.shape[1])
    if out.numel():
        blocks, tiles, constants = _tiling(positions, rows.shape[1])
        _kernels().combine_kernel[blocks, tiles](
            *(rows, positions, _contiguous(weights), out, len(out)),
            **constants,
            ACC=_accumulator(rows, weights),
            HAS_WEIGHTS=weights is not None,
        )
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
    grad_rows = grad.new_empty(len(row_token), grad.shape[1]) if need_rows else None
    grad_weights = None if rows is None else weights.new_empty(weights.shape)
    if not len(positions):
        return None if grad_rows is None else grad_rows.zero_(), grad_weights
    blocks, tiles, constants = _tiling(positions, grad.shape[1], whole_rows=True)
    offsets = slot_offsets if need_rows else None
    padding = _padding(offsets, len(row_token), constants["BD"])
    _kernels().combine_backward_kernel[(blocks + padding["blocks"],)](
        *(grad.contiguous(), _contiguous(rows), positions, row_token, slot_offsets),
        *(weights.contiguous(), grad_rows, grad_weights),
        *(len(positions), blocks, padding["slots"]),
        **constants,
        K2=_power_of_two(positions.shape[1]),
        TILES=tiles,
        BR=padding["rows"],
        ACC=_accumulator(grad, weights),
        NEED_ROWS=need_rows,
        NEED_WEIGHTS=rows is not None,
        PADDED=offsets is not None,
    )
    return grad_rows, grad_weights


def map_shape(num_tokens: int, top_k: int, num_slots: int) -> dict[str, int]:
    """Return the constants of the map's kernels and its number of blocks."""
    places = _power_of_two(top_k)
    slots = _power_of_two(num_slots + 1)
    whole = _power_of_two(max(num_tokens, 1)) * places
    routes = max(16, whole if whole <= ONE_BLOCK_ROUTES else 1024, places)
    tokens = routes // places
    return {
        "blocks": max(1, _blocks(num_tokens, tokens)),
        "K": top_k,
        "K2": places,
        "TB": tokens,
        "P2": slots,
        "CHUNK": max(1, min(32, 8192 // slots)),
    }


def _kernels() -> Any:
    return importlib.import_module("moe_locality.kernels.triton_kernels")


def _tile(count: int, width: int, whole_rows: bool = False) -> tuple[int, int, int]:
    """Return rows and columns of a tile, and warps: 16 bytes and more a thread on a GPU."""
    elements = 2**18 if interpreted() else 2048
    columns = min(_power_of_two(width), 8192 if whole_rows else elements)
    rows = max(1, min(elements // columns, _power_of_two(count)))
    return rows, columns, 8 if rows * columns > 2048 else 4


def _tiling(
    positions: Tensor, width: int, whole_rows: bool = False
) -> tuple[int, int, dict[str, int]]:
    """Return the blocks of tokens, the tiles of a row, and what a kernel over both has to know."""
    count, top_k = positions.shape
    tile, columns, warps = _tile(count, width, whole_rows)
    constants = {"D": width, "K": top_k, "BT": tile, "BD": columns, "num_warps": warps}
    return _blocks(count, tile), _blocks(width, columns), constants


def _padding(slot_offsets: Tensor | None, num_rows: int, columns: int) -> dict[str, int]:
    """Return how many programs look for padding rows, and how many rows each looks at."""
    rows = max(1, 4096 // columns) if not interpreted() else 64
    if slot_offsets is None:
        return {"blocks": 0, "slots": 0, "rows": rows}
    return {"blocks": _blocks(num_rows, rows), "slots": len(slot_offsets) - 1, "rows": rows}


def _accumulator(rows: Tensor, weights: Tensor | None) -> Any:
    import triton.language as tl

    return tl.float64 if accumulator(rows, weights) == torch.float64 else tl.float32


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
