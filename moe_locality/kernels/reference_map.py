"""The row map in plain torch: a stable sort by slot, capacity, padding, node counts.

See ``moe_locality.kernels.ops.row_map``.
"""

import torch
from torch import Tensor

from moe_locality.errors import ConfigError


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
    flat = slots_of_routes(expert_ids, slot_of_expert, keep, num_slots)
    largest = int(flat.max()) if flat.numel() and not flat.is_cuda else 0
    if largest > num_slots:
        raise ConfigError(
            f"found slot {largest} in the routes, expected at most {num_slots - 1}: pass the "
            "number of slots that the ids are numbered in"
        )
    # a dropped route sorts behind every slot
    routed = torch.bincount(flat, minlength=num_slots + 1)[:num_slots]
    order = torch.argsort(flat, stable=True)
    kept = routed if capacity < 0 else routed.clamp_max(capacity)
    offsets = torch.zeros(num_slots + 1, dtype=torch.int64, device=flat.device)
    torch.cumsum((kept + alignment - 1) // alignment * alignment, 0, out=offsets[1:])
    simple = capacity < 0 and alignment == 1 and num_rows < 0
    sorted_slots = flat.index_select(0, order)
    if simple:
        order = order[: int(offsets[-1])]
        rows = torch.arange(order.numel(), device=flat.device)
        row_route = order
        overflow = torch.zeros(1, dtype=torch.int32, device=flat.device)
    else:
        size = num_rows if num_rows >= 0 else int(offsets[-1])
        order, rows, overflow = _rows_with_limits(order, sorted_slots, routed, kept, offsets, size)
        row_route = torch.full((size,), -1, dtype=torch.int64, device=flat.device)
        row_route.index_copy_(0, rows, order)
        kept = (
            torch.minimum(offsets[:-1] + kept, offsets.new_tensor(size)) - offsets[:-1]
        ).clamp_min(0)
        offsets.clamp_max_(size)
    positions = torch.full((num_tokens * top_k,), -1, dtype=torch.int32, device=flat.device)
    positions.index_copy_(0, order, rows.to(torch.int32))
    positions = positions.view(num_tokens, top_k)
    node_mask = tokens_per_node = None
    if node_of_slot is not None:
        slots = flat.view(num_tokens, top_k).masked_fill(positions < 0, num_slots)
        node_mask, tokens_per_node = nodes_of_tokens(slots, node_of_slot, num_nodes)
    return {
        "row_route": row_route.to(torch.int32),
        "row_token": torch.div(row_route, top_k, rounding_mode="floor").to(torch.int32),
        "positions": positions,
        "tokens_per_slot": kept,
        "slot_offsets": offsets.to(torch.int32),
        "routed_per_slot": routed.to(torch.int32),
        "overflow": overflow,
        "node_mask": node_mask,
        "tokens_per_node": tokens_per_node,
    }


def slots_of_routes(
    expert_ids: Tensor, slot_of_expert: Tensor | None, keep: Tensor | None, num_slots: int
) -> Tensor:
    """Return the slot of every flat route ``[T * K] int64``; P where it is dropped."""
    flat = expert_ids.reshape(-1).to(torch.int64)
    dropped = flat < 0
    if keep is not None:
        dropped = dropped | ~keep.reshape(-1).to(torch.bool)
    if slot_of_expert is not None:
        flat = slot_of_expert.to(torch.int64).index_select(0, flat.clamp_min(0))
        dropped = dropped | (flat < 0)
    return flat.masked_fill(dropped, num_slots)


def nodes_of_tokens(slots: Tensor, node_of_slot: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Return the bitmask ``[T] int64`` of the nodes of each token's slots, and the tokens per node.

    ``slots [T, K]``: P where a route is dropped.
    """
    padded = torch.cat([node_of_slot.to(torch.int64), node_of_slot.new_full((1,), -1)])
    nodes = padded[slots]
    hits = torch.zeros(len(slots), num_nodes + 1, dtype=torch.bool, device=slots.device)
    hits = hits.scatter(1, nodes.remainder(num_nodes + 1), True)[:, :num_nodes]
    bits = torch.ones(1, dtype=torch.int64, device=slots.device) << torch.arange(
        num_nodes, device=slots.device
    )
    return (hits * bits).sum(dim=1), hits.sum(dim=0)


def _rows_with_limits(
    order: Tensor, sorted_slots: Tensor, routed: Tensor, kept: Tensor, offsets: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the routes that keep a row, their rows, and how many found none in ``size`` rows."""
    count = int(routed.sum())
    order, slots = order[:count], sorted_slots[:count]
    first = torch.cumsum(routed, 0) - routed
    rank = torch.arange(count, device=order.device) - first.index_select(0, slots)
    rows = offsets.index_select(0, slots) + rank
    in_capacity = rank < kept.index_select(0, slots)
    fits = in_capacity & (rows < size)
    overflow = (in_capacity.sum() - fits.sum()).to(torch.int32).view(1)
    return order[fits], rows[fits], overflow
