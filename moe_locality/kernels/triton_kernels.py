"""The Triton kernels: row map, moves of rows (permute, gather, combine and its backward).

Import only through ``triton_impl``. Values are cast to the accumulator right after each load, since
Triton's interpreter computes on the raw bits of bfloat16.

Row map: block histograms, then one pass that places every route. A block holds whole tokens, TB of
them with K2 >= K places each. Inside a block the routes are sorted by (slot, route); the rank of a
route in its slot is its place in that order, less the place where its slot begins, plus what
earlier blocks have of the slot. No atomic decides an order, so the map is the same on every run.
One block needs no first pass (decode).

Moves: tiles are BT tokens x BD columns, offsets of rows are int64; a row that a position does not
name is never read.
"""
# kernels are Triton, not Python: constexpr is a number there, static_range a loop
# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def _slots_of(ids, stride_t, stride_k, token, k, num_tokens, num_slots, K: tl.constexpr):
    """The slot of each route, ``num_slots`` where it is dropped."""
    real = (token < num_tokens) & (k < K)
    slot = tl.load(ids + token * stride_t + k * stride_k, mask=real, other=-1).to(tl.int32)
    return tl.where((slot >= 0) & (slot < num_slots), slot, num_slots)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(do_not_specialize=["num_tokens", "num_home"])
def serve_kernel(
    ids, stride_t, stride_k, slots, nodes, found, num_tokens, num_home,
    K: tl.constexpr, K2: tl.constexpr, X: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """found[t, k]: the slot that serves each pick of tokens at home on node ``num_home``.

    Picks that X nodes may serve follow those with one, in rising order of their ids.
    """
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    k = tl.arange(0, K2)
    real = (token < num_tokens)[:, None] & (k < K)[None, :]
    where = token[:, None].to(tl.int64) * stride_t + k[None, :] * stride_k
    expert = tl.load(ids + where, mask=real, other=-1).to(tl.int32)
    there = expert >= 0
    at = tl.where(there, expert, 0) * X
    served = tl.load(slots + at, mask=there, other=-1)
    if X > 1:
        one = tl.full((BT, K2), 1, tl.int64)
        first = tl.load(nodes + at, mask=there, other=0).to(tl.int64)
        later = there & (tl.load(nodes + at + 1, mask=there, other=-1) >= 0)
        bits = tl.where(there & (later == 0), one << first, 0)
        alone = tl.full((BT,), 1, tl.int64)
        visited = tl.reduce(bits, 1, _either) | (alone << num_home)
        last = tl.full((BT,), -1, tl.int32)
        for _ in tl.static_range(K):
            open = later & (expert > last[:, None])
            picked = tl.min(tl.where(open, expert, 2147483647), axis=1)
            some = picked < 2147483647
            row = tl.where(some, picked, 0) * X
            slot = tl.load(slots + row, mask=some, other=-1)
            node = tl.load(nodes + row, mask=some, other=0).to(tl.int64)
            for x in tl.static_range(X):  # from the last choice to the first: the first one stays
                other = tl.load(nodes + row + (X - 1 - x), mask=some, other=-1).to(tl.int64)
                bit = (visited >> tl.where(other >= 0, other, 0)) & 1
                met = (other >= 0) & (bit > 0)
                node = tl.where(met, other, node)
                named = tl.load(slots + row + (X - 1 - x), mask=some, other=-1)
                slot = tl.where(met, named, slot)
            visited = tl.where(some, visited | (alone << node), visited)
            served = tl.where(later & (expert == picked[:, None]), slot[:, None], served)
            last = tl.where(some, picked, last)
    tl.store(found + token[:, None] * K + k[None, :], served, mask=real)


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def count_kernel(
    ids, stride_t, stride_k, counts, num_tokens, num_slots,
    K: tl.constexpr, K2: tl.constexpr, TB: tl.constexpr, P2: tl.constexpr,
):  # fmt: skip
    """counts[block, slot]: routes of each block to each slot."""
    block = tl.program_id(0)
    place = tl.arange(0, TB * K2)
    token = block * TB + place // K2
    slot = _slots_of(ids, stride_t, stride_k, token, place % K2, num_tokens, num_slots, K)
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
    do_not_specialize=["num_tokens", "num_slots", "num_blocks", "num_rows", "capacity"]
)  # fmt: skip
def place_kernel(
    ids, stride_t, stride_k, counts,
    row_route, row_token, positions, tokens_per_slot, slot_offsets, routed_per_slot, overflow,
    num_tokens, num_slots, num_blocks, num_rows, capacity,
    K: tl.constexpr, K2: tl.constexpr, TB: tl.constexpr, P2: tl.constexpr, CHUNK: tl.constexpr,
    FILL: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Place the routes of one block; block 0 also writes what concerns the slots."""
    block = tl.program_id(0)
    B: tl.constexpr = TB * K2
    place = tl.arange(0, B)
    slots = tl.arange(0, P2)
    if FILL:  # one block only: several would need to wait for each other
        _fill(row_route, row_token, num_rows, B)
        tl.debug_barrier()
    from_ = block * TB + place // K2
    slot = _slots_of(ids, stride_t, stride_k, from_, place % K2, num_tokens, num_slots, K)
    own = tl.histogram(slot, P2)
    if ONE_BLOCK:
        total = own
        before = tl.zeros_like(own)
    else:
        total, before = _totals(counts, own, block, num_blocks, P2, CHUNK)
    total = tl.where(slots < num_slots, total, 0)
    kept = tl.minimum(total, capacity)
    start = tl.cumsum(kept, 0) - kept
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


@triton.jit
def _zero_padding(
    rows, row_token, slot_offsets, block, tile, num_slots,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Zero the rows of this block that lie inside the slots and have no token."""
    row = block * BR + tl.arange(0, BR)
    used = tl.load(slot_offsets + num_slots)
    inside = row < used
    token = tl.load(row_token + row, mask=inside, other=0)
    empty = inside & (token < 0)
    cols = tile * BD + tl.arange(0, BD)
    where = row.to(tl.int64)[:, None] * D + cols[None, :]
    zero = tl.zeros((BR, BD), rows.dtype.element_ty)
    tl.store(rows + where, zero, mask=empty[:, None] & (cols[None, :] < D))


@triton.jit(do_not_specialize=["num_tokens", "token_blocks", "num_slots"])
def permute_kernel(
    x, positions, row_token, slot_offsets, rows, num_tokens, token_blocks, num_slots,
    D: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Each token is read once, written to its K rows; blocks past the tokens zero the padding."""
    block = tl.program_id(0)
    tile = tl.program_id(1)
    if block < token_blocks:
        token = block * BT + tl.arange(0, BT)
        real = token < num_tokens
        cols = tile * BD + tl.arange(0, BD)
        in_row = cols[None, :] < D
        from_ = token.to(tl.int64)[:, None] * D + cols[None, :]
        value = tl.load(x + from_, mask=real[:, None] & in_row, other=0)
        for k in tl.static_range(K):
            row = tl.load(positions + token * K + k, mask=real, other=-1)
            kept = row >= 0
            to = row.to(tl.int64)[:, None] * D + cols[None, :]
            tl.store(rows + to, value, mask=kept[:, None] & in_row)
    elif PADDED:
        padding = block - token_blocks
        _zero_padding(rows, row_token, slot_offsets, padding, tile, num_slots, D, BR, BD)


@triton.jit(do_not_specialize=["num_rows"])
def gather_kernel(x, index, rows, num_rows, D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """``rows[n] = x[index[n]]``."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    real = row < num_rows
    cols = tl.program_id(1) * BD + tl.arange(0, BD)
    mask = real[:, None] & (cols[None, :] < D)
    source = tl.load(index + row, mask=real, other=0).to(tl.int64)
    value = tl.load(x + source[:, None] * D + cols[None, :], mask=mask, other=0)
    tl.store(rows + row.to(tl.int64)[:, None] * D + cols[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def combine_kernel(
    rows, positions, weights, out, num_tokens,
    D: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Weighted sum of each token's rows, over k in order."""
    tile = tl.program_id(1)
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    real = token < num_tokens
    cols = tile * BD + tl.arange(0, BD)
    in_row = cols[None, :] < D
    total = tl.zeros((BT, BD), ACC)
    for k in tl.static_range(K):
        row = tl.load(positions + token * K + k, mask=real, other=-1)
        kept = row >= 0
        where = row.to(tl.int64)[:, None] * D + cols[None, :]
        value = tl.load(rows + where, mask=kept[:, None] & in_row, other=0).to(ACC)
        if HAS_WEIGHTS:
            weight = tl.load(weights + token * K + k, mask=kept, other=0).to(ACC)
            value = value * weight[:, None]
        total += value
    to = token.to(tl.int64)[:, None] * D + cols[None, :]
    tl.store(out + to, total.to(out.dtype.element_ty), mask=real[:, None] & in_row)


@triton.jit(do_not_specialize=["num_tokens", "token_blocks", "num_slots"])
def combine_backward_kernel(
    grad, rows, positions, row_token, slot_offsets, weights, grad_rows, grad_weights,
    num_tokens, token_blocks, num_slots,
    D: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    TILES: tl.constexpr, BR: tl.constexpr, ACC: tl.constexpr,
    NEED_ROWS: tl.constexpr, NEED_WEIGHTS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The gradient of each token is read once; both gradients of its K routes come from it."""
    block = tl.program_id(0)
    if block < token_blocks:
        token = block * BT + tl.arange(0, BT)
        real = token < num_tokens
        ks = tl.arange(0, K2)
        products = tl.zeros((BT, K2), ACC)
        for tile in tl.static_range(TILES):
            cols = tile * BD + tl.arange(0, BD)
            in_row = cols[None, :] < D
            from_ = token.to(tl.int64)[:, None] * D + cols[None, :]
            wide = tl.load(grad + from_, mask=real[:, None] & in_row, other=0).to(ACC)
            for k in tl.static_range(K):
                row = tl.load(positions + token * K + k, mask=real, other=-1)
                kept = row >= 0
                where = row.to(tl.int64)[:, None] * D + cols[None, :]
                mask = kept[:, None] & in_row
                if NEED_WEIGHTS:
                    value = tl.load(rows + where, mask=mask, other=0).to(ACC)
                    product = tl.sum(value * wide, axis=1)
                    products += tl.where(ks[None, :] == k, product[:, None], 0.0)
                if NEED_ROWS:
                    weight = tl.load(weights + token * K + k, mask=kept, other=0).to(ACC)
                    scaled = (wide * weight[:, None]).to(grad_rows.dtype.element_ty)
                    tl.store(grad_rows + where, scaled, mask=mask)
        if NEED_WEIGHTS:
            to = token[:, None] * K + ks[None, :]
            done = products.to(grad_weights.dtype.element_ty)
            tl.store(grad_weights + to, done, mask=real[:, None] & (ks[None, :] < K))
    elif PADDED:
        for tile in tl.static_range(TILES):
            padding = block - token_blocks
            _zero_padding(grad_rows, row_token, slot_offsets, padding, tile, num_slots, D, BR, BD)
