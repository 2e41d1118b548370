"""Every kernel in plain torch: the reference that the other backends are tested against.

See ``moe_locality.kernels.ops`` for the meaning and the shapes. Everything is deterministic:
gathers and sums over k in order, no scatter-add.

On a CPU, sums of rows use ``embedding_bag``, which reads each row once. It wants weights in the
dtype of the rows. A float32 weight is the exact sum of three bfloat16 numbers (3 x 8 bits of
significand), so bfloat16 rows are taken three times with a third of the weight each; the products
are exact in float32 and the sum is rounded to bfloat16 once.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from moe_locality.errors import ConfigError

__all__ = ["combine", "combine_backward", "gather", "permute", "row_map", "serve_visited"]


def serve_visited(ids: Tensor, slots: Tensor, nodes: Tensor, home_node: int) -> Tensor:
    expert = ids.long()
    there = expert >= 0
    at = expert.clamp_min(0)
    one = torch.ones((), dtype=torch.int64, device=ids.device)
    mask = one.new_full((len(ids),), 1 << home_node)
    found = torch.where(there, slots[at, 0], -1)
    if slots.shape[1] == 1:
        return found.to(ids.dtype)
    later = there & (nodes[at, 1] >= 0)
    for k in range(ids.shape[1]):
        mask = mask | torch.where(there[:, k] & ~later[:, k], one << nodes[at[:, k], 0], 0)
    order = torch.where(later, expert, -1).argsort(dim=1)  # rising ids; like ids serve alike
    for place in order.t():
        picked = expert.gather(1, place[:, None])[:, 0]
        real = later.gather(1, place[:, None])[:, 0]
        choices = nodes[picked.clamp_min(0)]  # [T, X]
        visited = (choices >= 0) & ((mask[:, None] >> choices.clamp_min(0)) & 1 > 0)
        choice = visited.int().argmax(dim=1, keepdim=True)  # the first one, else the preferred one
        slot = slots[picked.clamp_min(0)].gather(1, choice)
        served = real[:, None] & (expert == picked[:, None])
        found = torch.where(served, slot, found)
        mask = mask | torch.where(real, one << choices.gather(1, choice)[:, 0], 0)
    return found.to(ids.dtype)


def gather(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)


def permute(x: Tensor, row_token: Tensor, positions: Tensor, slot_offsets: Tensor | None) -> Tensor:
    del positions  # the inverse of row_token, for kernels that read each token once
    return pick_rows(x, row_token) if slot_offsets is not None else x.index_select(0, row_token)


def combine(rows: Tensor, positions: Tensor, weights: Tensor | None) -> Tensor:
    if can_sum(rows, weights):
        return weighted_sums(rows, positions, weights)
    wide = accumulator(rows, weights)
    parts = (pick_rows(rows, column).to(wide) for column in positions.t())
    if weights is not None:
        factors = weights.t()[:, :, None]
        parts = (part.mul_(factor) for part, factor in zip(parts, factors, strict=True))
    return reduce(Tensor.add_, parts).to(rows.dtype)


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
    grad_rows = grad_weights = None
    fast = can_sum(grad, weights)
    wide = grad if fast else grad.to(accumulator(grad, weights))
    if need_rows:
        row_weight = pick_rows(weights.reshape(-1, 1), row_route)
        if fast:  # a sum of one
            grad_rows = weighted_sums(grad, row_token[:, None], row_weight)
        else:
            taken = permute(wide, row_token, positions, slot_offsets)
            grad_rows = (taken * row_weight).to(grad.dtype)
    if rows is not None and fast:
        grad_weights = row_products(rows, positions, grad)
    elif rows is not None:
        columns = [
            (pick_rows(rows, positions[:, k]) * wide).sum(dim=1) for k in range(positions.shape[1])
        ]
        grad_weights = torch.stack(columns, dim=1).to(weights.dtype)
    return grad_rows, grad_weights


def accumulator(rows: Tensor, weights: Tensor | None) -> torch.dtype:
    """Return the dtype of sums of rows: float32 or wider."""
    wide = torch.promote_types(torch.float32, rows.dtype)
    return wide if weights is None else torch.promote_types(wide, weights.dtype)


def pick_rows(rows: Tensor, positions: Tensor) -> Tensor:
    """Return ``rows[positions]``, zero where the position is -1 (never 0 * an infinite row)."""
    if rows.shape[0] == 0:
        return rows.new_zeros(positions.shape[0], rows.shape[1])
    picked = rows.index_select(0, positions.clamp_min(0))
    dropped = positions < 0
    if picked.device.type == "cpu" and not dropped.any():  # elsewhere, asking costs a wait
        return picked
    return picked.masked_fill_(dropped[:, None], 0)


BLOCK_TOKENS = 32
"""Tokens whose K rows are worked on at once: their float32 copies stay in the cache."""


def can_sum(rows: Tensor, weights: Tensor | None) -> bool:
    """Whether :func:`weighted_sums` may be used: CPU, float32 or bfloat16, float32 weights."""
    fits = rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.bfloat16)
    return fits and (weights is None or weights.dtype == torch.float32)


def weighted_sums(rows: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    """Return ``out[b] = sum_j weights[b, j] * rows[index[b, j]]``, without the -1 of ``index``.

    ``rows [N, D]``, ``index [B, J]``, ``weights [B, J]`` or None (all one) give ``[B, D]``. The sum
    is in float32, over j in order; it ends in the dtype of the rows.
    """
    if not len(rows) or not index.numel():
        return rows.new_zeros(index.shape[0], rows.shape[1])
    rows = rows.contiguous()
    if weights is not None and rows.dtype == torch.bfloat16:
        index = torch.cat([index] * 3, dim=1)
        parts, rest = [], weights
        for _ in range(3):
            parts.append(rest.to(torch.bfloat16))
            rest = rest - parts[-1].to(torch.float32)
        weights = torch.cat(parts, dim=1)
    kept = index >= 0
    if bool(kept.all()):
        index = index.contiguous()
        weights = None if weights is None else weights.contiguous()
        return embedding_bag(index, rows, per_sample_weights=weights, mode="sum")
    lengths = kept.sum(dim=1)
    index, weights = index[kept], None if weights is None else weights[kept]
    if not len(index):
        return rows.new_zeros(len(lengths), rows.shape[1])
    offsets = (torch.cumsum(lengths, 0) - lengths).to(index.dtype)
    return embedding_bag(index, rows, offsets, per_sample_weights=weights, mode="sum")


def row_products(rows: Tensor, positions: Tensor, grad: Tensor) -> Tensor:
    """Return ``out[t, k] = sum_d rows[positions[t, k], d] * grad[t, d]`` in float32, 0 for -1."""
    count, top_k = positions.shape
    width = rows.shape[1]
    out = torch.zeros(count, top_k)
    if not len(rows) or not count:
        return out
    size = min(BLOCK_TOKENS, count)
    narrow = rows.new_empty(size * top_k, width)
    wide, token = torch.empty(size * top_k, width), torch.empty(size, 1, width)
    for start in range(0, count, size):
        part = positions[start : start + size]
        n = len(part)
        taken = narrow[: n * top_k]
        torch.index_select(rows, 0, part.clamp_min(0).reshape(-1), out=taken)
        product = wide[: n * top_k].copy_(taken).view(n, top_k, width)
        product.mul_(token[:n].copy_(grad[start : start + n, None]))
        torch.sum(product, 2, out=out[start : start + n])
    return out.masked_fill_(positions < 0, 0)


def new_map(ids: Tensor, num_slots: int, num_rows: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a map, not filled, in the order of ``ops.MAP_FIELDS``."""

    def make(shape: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return ids.new_empty(shape, dtype=dtype)

    counts = (make(num_slots, torch.int64), make(num_slots + 1), make(num_slots), make(1))
    return make(num_rows), make(num_rows), make(ids.shape), *counts


def without_end(made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return a map without the rows past those in use; waits for the device, to know them."""
    row_route, row_token, positions, tokens_per_slot, offsets, *rest = made
    used = int(offsets[-1])
    return row_route[:used], row_token[:used], positions, tokens_per_slot, offsets, *rest


def row_map(slot_ids: Tensor, num_slots: int, capacity: int, num_rows: int) -> tuple[Tensor, ...]:
    num_tokens, top_k = slot_ids.shape
    flat = slot_ids.reshape(-1).to(torch.int64)
    flat = flat.masked_fill(flat < 0, num_slots)  # a dropped route sorts behind every slot
    largest = int(flat.max()) if flat.numel() and not flat.is_cuda else 0
    if largest > num_slots:
        raise ConfigError(
            f"found slot {largest} in the routes, expected at most {num_slots - 1}: pass the "
            "number of slots that the ids are numbered in"
        )
    routed = torch.bincount(flat, minlength=num_slots + 1)[:num_slots]
    order = torch.argsort(flat, stable=True)
    kept = routed if capacity < 0 else routed.clamp_max(capacity)
    offsets = torch.zeros(num_slots + 1, dtype=torch.int64, device=flat.device)
    torch.cumsum(kept, 0, out=offsets[1:])
    if capacity < 0 and num_rows < 0:
        order = order[: int(offsets[-1])]
        rows = torch.arange(order.numel(), device=flat.device)
        row_route = order
        overflow = torch.zeros(1, dtype=torch.int32, device=flat.device)
    else:
        size = num_rows if num_rows >= 0 else int(offsets[-1])
        order = order[: int(routed.sum())]
        slots = flat.index_select(0, order)
        rank = torch.arange(len(order), device=flat.device)
        rank -= (torch.cumsum(routed, 0) - routed).index_select(0, slots)
        rows = offsets.index_select(0, slots) + rank
        in_capacity = rank < kept.index_select(0, slots)
        fits = in_capacity & (rows < size)
        overflow = (in_capacity.sum() - fits.sum()).to(torch.int32).view(1)
        order, rows = order[fits], rows[fits]
        row_route = torch.full((size,), -1, dtype=torch.int64, device=flat.device)
        row_route.index_copy_(0, rows, order)
        offsets.clamp_max_(size)
        kept = offsets.diff()
    positions = torch.full((num_tokens * top_k,), -1, dtype=torch.int32, device=flat.device)
    positions.index_copy_(0, order, rows.to(torch.int32))
    return (
        row_route.to(torch.int32),
        torch.div(row_route, top_k, rounding_mode="floor").to(torch.int32),
        positions.view(num_tokens, top_k),
        kept,
        offsets.to(torch.int32),
        routed.to(torch.int32),
        overflow,
    )
