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

NO_LIMIT = 2**31 - 1
ONE_BLOCK_ROUTES = 2048
"""Routes (with their holes) up to which one block makes the whole map: a decode step."""


def why_unavailable() -> str | None:
    """Return why no kernel of this backend can run here, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    if torch.cuda.is_available() or interpreted():
        return None
    return "torch sees no GPU here"


def interpreted() -> bool:
    """Whether Triton runs kernels as Python on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def row_map(slot_ids: Tensor, num_slots: int, capacity: int, num_rows: int) -> tuple[Tensor, ...]:
    num_tokens, top_k = slot_ids.shape
    size = num_rows if num_rows >= 0 else num_tokens * top_k
    shape = map_shape(num_tokens, top_k, num_slots)
    blocks = shape.pop("blocks")
    out = _new_map(slot_ids, num_slots, size)
    row_route, row_token, _, _, offsets, *_ = out
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
    if num_rows < 0:
        used = int(offsets[-1])  # the one wait for the device
        return row_route[:used], row_token[:used], *out[2:]
    return out


def _new_map(ids: Tensor, num_slots: int, num_rows: int) -> tuple[Tensor, ...]:
    """Return the tensors of a map, in the order of the kernel's arguments (``ops.MAP_FIELDS``)."""

    def make(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return ids.new_empty(shape, dtype=dtype)

    counts = (make(num_slots, dtype=torch.int64), make(num_slots + 1), make(num_slots), make(1))
    return make(num_rows), make(num_rows), make(*ids.shape), *counts


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
    kernels = _kernels()
    x = x.contiguous()
    num_rows, width = row_token.shape[0], x.shape[1]
    rows = x.new_empty(num_rows, width)
    if not rows.numel():
        return rows
    tile, columns, warps = _tile(len(x), width)
    padding = _padding(slot_offsets, num_rows, columns)
    token_blocks = _blocks(len(x), tile)
    grid = (token_blocks + padding["blocks"], _blocks(width, columns))
    kernels.permute_kernel[grid](
        *(x, positions, row_token, slot_offsets, rows),
        *(len(x), token_blocks, padding["slots"]),
        D=width,
        K=positions.shape[1],
        BT=tile,
        BD=columns,
        BR=padding["rows"],
        PADDED=slot_offsets is not None,
        num_warps=warps,
    )
    return rows


def combine(rows: Tensor, positions: Tensor, weights: Tensor | None) -> Tensor:
    kernels = _kernels()
    rows = rows.contiguous()
    num_tokens, top_k = positions.shape
    out = rows.new_empty(num_tokens, rows.shape[1])
    if out.numel():
        tile, width, warps = _tile(num_tokens, rows.shape[1])
        grid = (_blocks(num_tokens, tile), _blocks(rows.shape[1], width))
        kernels.combine_kernel[grid](
            *(rows, positions, _contiguous(weights), out, num_tokens),
            D=rows.shape[1],
            K=top_k,
            BT=tile,
            BD=width,
            ACC=_accumulator(rows, weights),
            HAS_WEIGHTS=weights is not None,
            num_warps=warps,
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
    kernels = _kernels()
    (num_tokens, top_k), width, num_rows = positions.shape, grad.shape[1], row_token.shape[0]
    grad_rows = grad.new_empty(num_rows, width) if need_rows else None
    grad_weights = None if rows is None else weights.new_empty(weights.shape)
    if not num_tokens:
        return None if grad_rows is None else grad_rows.zero_(), grad_weights
    tile, columns, warps = _tile(num_tokens, width, whole_rows=True)
    padding = _padding(slot_offsets if need_rows else None, num_rows, columns)
    token_blocks = _blocks(num_tokens, tile)
    kernels.combine_backward_kernel[(token_blocks + padding["blocks"],)](
        *(grad.contiguous(), _contiguous(rows), positions, row_token, slot_offsets),
        *(weights.contiguous(), grad_rows, grad_weights),
        *(num_tokens, token_blocks, padding["slots"]),
        D=width,
        K=top_k,
        K2=_power_of_two(top_k),
        BT=tile,
        BD=columns,
        TILES=_blocks(width, columns),
        BR=padding["rows"],
        ACC=_accumulator(grad, weights),
        NEED_ROWS=need_rows,
        NEED_WEIGHTS=rows is not None,
        PADDED=slot_offsets is not None and need_rows,
        num_warps=warps,
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


def _padding(slot_offsets: Tensor | None, num_rows: int, columns: int) -> dict[str, int]:
    """Return how many programs look for padding rows, and how many rows each looks at."""
    rows = max(1, 4096 // columns) if not interpreted() else 64
    if slot_offsets is None:
        return {"blocks": 0, "slots": 0, "rows": rows}
    slots = slot_offsets.shape[0] - 1
    return {"blocks": _blocks(num_rows, rows), "slots": slots, "rows": rows}


def _accumulator(rows: Tensor, weights: Tensor | None) -> Any:
    import triton.language as tl

    dtypes = {rows.dtype} | (set() if weights is None else {weights.dtype})
    return tl.float64 if torch.float64 in dtypes else tl.float32


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
