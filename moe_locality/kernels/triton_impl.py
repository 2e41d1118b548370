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

from moe_locality.errors import ConfigError
from moe_locality.kernels.backends import GateSpec
from moe_locality.kernels.reference import TINY

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


def row_map(
    expert_ids: Tensor,
    num_slots: int,
    slot_of_expert: Tensor | None,
    keep: Tensor | None,
    capacity: int,
    alignment: int,
    num_rows: int,
    node_of_slot: Tensor | None,
    num_nodes: int,
) -> dict[str, Tensor | None]:
    num_tokens, top_k = expert_ids.shape
    num_nodes = num_nodes if node_of_slot is not None else 0
    size = num_rows if num_rows >= 0 else num_tokens * top_k + num_slots * (alignment - 1)
    unused = num_rows >= 0 or alignment > 1  # rows that no route is placed in
    shape = map_shape(num_tokens, top_k, num_slots)
    blocks = shape.pop("blocks")
    out = _new_map(expert_ids, num_slots, size, num_nodes)
    if unused and blocks > 1:
        out["row_route"].fill_(-1)
        out["row_token"].fill_(-1)
    node_counts = expert_ids.new_empty((blocks, num_nodes), dtype=torch.int64)
    keep = None if keep is None else keep.contiguous().view(torch.uint8)
    experts = num_slots if slot_of_expert is None else slot_of_expert.shape[0]
    flags = {"HAS_KEEP": keep is not None, "HAS_TABLE": slot_of_expert is not None}
    source = (expert_ids, *expert_ids.stride(), keep, slot_of_expert)
    sizes = (num_tokens, num_slots, experts)
    counts = expert_ids.new_empty((blocks, shape["P2"]), dtype=torch.int32)
    kernels = _kernels()
    if blocks > 1:
        count = {name: shape[name] for name in ("K", "K2", "TB", "P2")}
        kernels.count_kernel[(blocks,)](*source, counts, *sizes, **count, **flags, num_warps=8)
    kernels.place_kernel[(blocks,)](
        *(*source, counts, node_of_slot, *out.values(), node_counts, *sizes, blocks, size),
        NO_LIMIT if capacity < 0 else min(capacity, NO_LIMIT),
        **shape,
        **flags,
        ALIGN=alignment,
        M=num_nodes,
        FILL=unused and blocks == 1,
        ONE_BLOCK=blocks == 1,
        num_warps=8,
    )
    made: dict[str, Tensor | None] = {**out}
    made["tokens_per_node"] = node_counts.sum(dim=0) if num_nodes else None
    if num_rows < 0:
        used = int(out["slot_offsets"][-1])  # the one wait for the device
        made["row_route"], made["row_token"] = out["row_route"][:used], out["row_token"][:used]
    return made


def _new_map(ids: Tensor, num_slots: int, num_rows: int, num_nodes: int) -> dict[str, Tensor]:
    """The tensors of a map, in the order of the kernel's arguments."""
    num_tokens, top_k = ids.shape
    shapes = {
        "row_route": (num_rows,),
        "row_token": (num_rows,),
        "positions": (num_tokens, top_k),
        "tokens_per_slot": (num_slots,),
        "slot_offsets": (num_slots + 1,),
        "routed_per_slot": (num_slots,),
        "overflow": (1,),
        "node_mask": (num_tokens if num_nodes else 0,),
    }
    wide = {"tokens_per_slot", "node_mask"}
    return {
        name: ids.new_empty(shape, dtype=torch.int64 if name in wide else torch.int32)
        for name, shape in shapes.items()
    }


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


def permute(
    x: Tensor,
    row_token: Tensor,
    row_route: Tensor,
    positions: Tensor,
    weights: Tensor | None,
    slot_offsets: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    kernels = _kernels()

    x = x.contiguous()
    num_rows, width = row_token.shape[0], x.shape[1]
    rows = x.new_empty(num_rows, width)
    row_weights = None if weights is None else weights.new_empty(num_rows)
    if not rows.numel():
        return rows, row_weights
    tile, columns, warps = _tile(len(x), width)
    padding = _padding(slot_offsets, num_rows, columns)
    token_blocks = _blocks(len(x), tile)
    grid = (token_blocks + padding["blocks"], _blocks(width, columns))
    kernels.permute_kernel[grid](
        *(x, positions, row_token, slot_offsets, _contiguous(weights), rows, row_weights),
        *(len(x), token_blocks, padding["slots"]),
        D=width,
        K=positions.shape[1],
        BT=tile,
        BD=columns,
        BR=padding["rows"],
        HAS_WEIGHTS=weights is not None,
        PADDED=slot_offsets is not None,
        num_warps=warps,
    )
    return rows, row_weights


def combine(
    rows: Tensor, positions: Tensor, weights: Tensor | None, row_values: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    kernels = _kernels()

    rows = rows.contiguous()
    num_tokens, top_k = positions.shape
    out = rows.new_empty(num_tokens, rows.shape[1])
    values = None if row_values is None else row_values.new_empty(num_tokens, top_k)
    if out.numel():
        tile, width, warps = _tile(num_tokens, rows.shape[1])
        grid = (_blocks(num_tokens, tile), _blocks(rows.shape[1], width))
        kernels.combine_kernel[grid](
            *(rows, positions, _contiguous(weights), _contiguous(row_values), out, values),
            num_tokens,
            D=rows.shape[1],
            K=top_k,
            BT=tile,
            BD=width,
            ACC=_accumulator(rows, weights),
            HAS_WEIGHTS=weights is not None,
            HAS_VALUES=row_values is not None,
            num_warps=warps,
        )
    return out, values


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
        return _zero(grad_rows), grad_weights
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


def gate(logits: Tensor, bias: Tensor | None, spec: GateSpec) -> tuple[Tensor, Tensor]:
    kernels = _kernels()

    logits = _check_logits(logits)
    num_tokens, num_experts = logits.shape
    ids = logits.new_empty((num_tokens, spec.top_k), dtype=torch.int32)
    weights = logits.new_empty((num_tokens, spec.top_k), dtype=torch.float32)
    shape = gate_shape(num_experts, spec, bias is not None)
    if num_tokens:
        kernels.gate_kernel[(_blocks(num_tokens, shape["BT"]),)](
            *(logits, logits.stride(0), _contiguous(bias), ids, weights, num_tokens, spec.scale),
            **shape,
            num_warps=4,
        )
    return ids, weights


def gate_backward(grad_weights: Tensor, logits: Tensor, ids: Tensor, spec: GateSpec) -> Tensor:
    kernels = _kernels()

    logits = _check_logits(logits)
    num_tokens, num_experts = logits.shape
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if num_tokens:
        wide = _power_of_two(num_experts)
        tile = max(1, _gate_elements() // wide)
        kernels.gate_backward_kernel[(_blocks(num_tokens, tile),)](
            *(grad_weights.contiguous(), logits, logits.stride(0), ids.contiguous(), grad),
            *(num_tokens, spec.scale),
            E=num_experts,
            E2=wide,
            K=spec.top_k,
            BT=tile,
            SIGMOID=spec.score == "sigmoid",
            RENORMALIZE=spec.renormalize,
            TINY=TINY,
            num_warps=4,
        )
    return grad


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


def gate_shape(num_experts: int, spec: GateSpec, has_bias: bool) -> dict[str, Any]:
    """Return the constants of the gate's kernel."""
    size = num_experts // spec.num_groups
    groups, members = _power_of_two(spec.num_groups), _power_of_two(size)
    limited = spec.top_groups < spec.num_groups
    two = spec.group_score == "top2"
    return {
        "G": spec.num_groups,
        "G2": groups,
        "L": size,
        "L2": members,
        "K": spec.top_k,
        "K2": _power_of_two(spec.top_k),
        "TOP_GROUPS": spec.top_groups,
        "BT": max(1, _gate_elements() // (groups * members)),
        "SIGMOID": spec.score == "sigmoid",
        "BY_LOGIT": not has_bias and not (spec.num_groups > 1 and two),
        "HAS_BIAS": has_bias,
        "SUM_TWO": limited and two and size > 1,
        "RENORMALIZE": spec.renormalize,
        "TINY": TINY,
    }


def _kernels() -> Any:
    return importlib.import_module("moe_locality.kernels.triton_kernels")


def _gate_elements() -> int:
    """Scores that one program holds: 8 a thread on a GPU; few programs where each is Python."""
    return 8192 if interpreted() else 1024


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


def _check_logits(logits: Tensor) -> Tensor:
    if logits.dtype == torch.float64:
        raise ConfigError(
            "found float64 logits, expected float32, bfloat16 or float16 on the Triton backend: "
            "cast them, or use backend='reference'"
        )
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _zero(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.zero_()


def _blocks(count: int, size: int) -> int:
    return -(-count // size)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
