"""Triton kernels of the row map: block histograms, then one pass that places every route.

A block holds whole tokens, TB of them with K2 >= K places each. Inside a block the routes are
sorted by (slot, route); the rank of a route in its slot is its place in that order, less the place
where its slot begins, plus what earlier blocks have of the slot. No atomic decides an order, so the
map is the same on every run. One block needs no first pass (decode).
"""

import triton
import triton.language as tl


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _slots_of(
    ids, stride_t, stride_k, keep, table, token, k, num_tokens, num_slots, num_experts,
    K: tl.constexpr, HAS_KEEP: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """The slot of each route, ``num_slots`` where it is dropped."""
    real = (token < num_tokens) & (k < K)
    slot = tl.load(ids + token * stride_t + k * stride_k, mask=real, other=-1).to(tl.int32)
    if HAS_KEEP:
        kept = tl.load(keep + token * K + k, mask=real, other=0)
        slot = tl.where(kept != 0, slot, -1)
    if HAS_TABLE:
        known = (slot >= 0) & (slot < num_experts)
        slot = tl.load(table + slot, mask=known, other=-1).to(tl.int32)
    return tl.where((slot >= 0) & (slot < num_slots), slot, num_slots)


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "num_experts"])
def count_kernel(
    ids, stride_t, stride_k, keep, table, counts, num_tokens, num_slots, num_experts,
    K: tl.constexpr, K2: tl.constexpr, TB: tl.constexpr, P2: tl.constexpr,
    HAS_KEEP: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """counts[block, slot]: routes of each block to each slot."""
    block = tl.program_id(0)
    place = tl.arange(0, TB * K2)
    slot = _slots_of(
        ids, stride_t, stride_k, keep, table, block * TB + place // K2, place % K2,
        num_tokens, num_slots, num_experts, K, HAS_KEEP, HAS_TABLE,
    )  # fmt: skip
    tl.store(counts + block * P2 + tl.arange(0, P2), tl.histogram(slot, P2))


@triton.jit
def _totals(counts, own, block, num_blocks, P2: tl.constexpr, CHUNK: tl.constexpr):
    """Routes of each slot in all blocks, and in the blocks before this one."""
    slots = tl.arange(0, P2)
    total = tl.zeros_like(own)
    before = tl.zeros_like(own)
    first = 0
    while first < num_blocks:
        blocks = first + tl.arange(0, CHUNK)
        where = blocks[:, None] * P2 + slots[None, :]
        part = tl.load(counts + where, mask=(blocks < num_blocks)[:, None], other=0)
        total += tl.sum(part, axis=0)
        before += tl.sum(tl.where((blocks < block)[:, None], part, 0), axis=0)
        first += CHUNK
    return total, before


@triton.jit
def _fill(row_route, row_token, num_rows, B: tl.constexpr):
    """Say of every row that it has no route."""
    first = 0
    while first < num_rows:
        row = first + tl.arange(0, B)
        nothing = tl.full((B,), -1, tl.int32)
        tl.store(row_route + row, nothing, mask=row < num_rows)
        tl.store(row_token + row, nothing, mask=row < num_rows)
        first += B


@triton.jit(
    do_not_specialize=[
        "num_tokens", "num_slots", "num_experts", "num_blocks", "num_rows", "capacity",
    ]
)  # fmt: skip
def place_kernel(
    ids, stride_t, stride_k, keep, table, counts, node_of_slot,
    row_route, row_token, positions, tokens_per_slot, slot_offsets, routed_per_slot, overflow,
    node_mask, node_counts,
    num_tokens, num_slots, num_experts, num_blocks, num_rows, capacity,
    K: tl.constexpr, K2: tl.constexpr, TB: tl.constexpr, P2: tl.constexpr, CHUNK: tl.constexpr,
    ALIGN: tl.constexpr, M: tl.constexpr, FILL: tl.constexpr,
    HAS_KEEP: tl.constexpr, HAS_TABLE: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Place the routes of one block; block 0 also writes what concerns the slots."""
    block = tl.program_id(0)
    B: tl.constexpr = TB * K2
    place = tl.arange(0, B)
    slots = tl.arange(0, P2)
    if FILL:  # one block only: several would need to wait for each other
        _fill(row_route, row_token, num_rows, B)
        tl.debug_barrier()
    slot = _slots_of(
        ids, stride_t, stride_k, keep, table, block * TB + place // K2, place % K2,
        num_tokens, num_slots, num_experts, K, HAS_KEEP, HAS_TABLE,
    )  # fmt: skip
    own = tl.histogram(slot, P2)
    if ONE_BLOCK:
        total = own
        before = tl.zeros_like(own)
    else:
        total, before = _totals(counts, own, block, num_blocks, P2, CHUNK)
    total = tl.where(slots < num_slots, total, 0)
    kept = tl.minimum(total, capacity)
    room = (kept + ALIGN - 1) // ALIGN * ALIGN
    start = tl.cumsum(room, 0) - room
    end = tl.minimum(start + kept, num_rows)
    shift = start + before - (tl.cumsum(own, 0) - own)
    order = tl.sort(slot * B + place)
    slot = order // B
    local = order % B
    row = tl.gather(shift, slot, 0) + place
    fits = (slot < num_slots) & (row < tl.gather(end, slot, 0))
    token = block * TB + local // K2
    k = local % K2
    route = token * K + k
    tl.store(positions + route, tl.where(fits, row, -1), mask=(token < num_tokens) & (k < K))
    tl.store(row_route + row, route, mask=fits)
    tl.store(row_token + row, token, mask=fits)
    if block == 0:
        found = tl.maximum(end - start, 0)
        tl.store(tokens_per_slot + slots, found.to(tl.int64), mask=slots < num_slots)
        tl.store(slot_offsets + slots, tl.minimum(start, num_rows), mask=slots <= num_slots)
        tl.store(routed_per_slot + slots, total, mask=slots < num_slots)
        tl.store(overflow, tl.sum(kept - found, axis=0))
    if M > 0:
        tl.debug_barrier()  # the positions of this block's tokens are read in another layout
        _name_nodes(
            ids, stride_t, stride_k, keep, table, node_of_slot, positions, node_mask, node_counts,
            block, num_tokens, num_slots, num_experts, K, K2, TB, M, HAS_KEEP, HAS_TABLE,
        )  # fmt: skip


@triton.jit
def _name_nodes(
    ids, stride_t, stride_k, keep, table, node_of_slot, positions, node_mask, node_counts,
    block, num_tokens, num_slots, num_experts,
    K: tl.constexpr, K2: tl.constexpr, TB: tl.constexpr, M: tl.constexpr,
    HAS_KEEP: tl.constexpr, HAS_TABLE: tl.constexpr,
):  # fmt: skip
    """The bitmask of each token's nodes, and how many of this block's tokens go to each node."""
    token = block * TB + tl.arange(0, TB)
    k = tl.arange(0, K2)
    tokens = token[:, None] + tl.zeros((TB, K2), tl.int32)
    ks = k[None, :] + tl.zeros((TB, K2), tl.int32)
    slot = _slots_of(
        ids, stride_t, stride_k, keep, table, tokens, ks, num_tokens, num_slots, num_experts,
        K, HAS_KEEP, HAS_TABLE,
    )  # fmt: skip
    real = (tokens < num_tokens) & (ks < K)
    row = tl.load(positions + tokens * K + ks, mask=real, other=-1)
    node = tl.load(node_of_slot + slot, mask=row >= 0, other=0).to(tl.int64)
    bit = tl.where(row >= 0, tl.full((TB, K2), 1, tl.int64) << node, 0)
    mask = tl.reduce(bit, 1, _or)
    tl.store(node_mask + token, mask, mask=token < num_tokens)
    for m in tl.static_range(M):
        hits = ((mask >> m) & 1).to(tl.int32)
        tl.store(node_counts + block * M + m, tl.sum(hits, axis=0).to(tl.int64))
