"""The Triton kernels: row map, moves of rows (permute, gather, combine and its backward), gate.

Import only through ``triton_impl``. Values are cast to the accumulator right after each load, since
Triton's interpreter computes on the raw bits of bfloat16.

Row map: block histograms, then one pass that places every route. A block holds whole tokens, TB of
them with K2 >= K places each. Inside a block the routes are sorted by (slot, route); the rank of a
route in its slot is its place in that order, less the place where its slot begins, plus what
earlier blocks have of the slot. No atomic decides an order, so the map is the same on every run.
One block needs no first pass (decode).

Moves: tiles are BT tokens x BD columns, offsets of rows are int64; a row that a position does not
name is never read.

Gate: scores, group limits and top-k in one pass, and the derivative. Experts are compared by one
int64: the bits of the key, made to sort like the number, above the reversed id. So ties go to the
lower id, nothing is picked twice, and NaN cannot lead outside.
"""
# kernels are Triton, not Python: constexpr is a number there, static_range a loop
# pyright: reportGeneralTypeIssues=false

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


@triton.jit
def _zero_padding(
    rows, row_values, row_token, slot_offsets, block, tile, num_slots,
    D: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr, HAS_VALUES: tl.constexpr,
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
    if HAS_VALUES:  # noqa: SIM102
        if tile == 0:
            nothing = tl.zeros((BR,), row_values.dtype.element_ty)
            tl.store(row_values + row, nothing, mask=empty)


@triton.jit(do_not_specialize=["num_tokens", "token_blocks", "num_slots"])
def permute_kernel(
    x, positions, row_token, slot_offsets, weights, rows, row_weights,
    num_tokens, token_blocks, num_slots,
    D: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, PADDED: tl.constexpr,
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
            if HAS_WEIGHTS:  # noqa: SIM102
                if tile == 0:
                    weight = tl.load(weights + token * K + k, mask=kept, other=0)
                    tl.store(row_weights + row, weight, mask=kept)
    elif PADDED:
        _zero_padding(
            rows, row_weights, row_token, slot_offsets, block - token_blocks, tile, num_slots,
            D, BR, BD, HAS_WEIGHTS,
        )  # fmt: skip


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
    rows, positions, weights, row_values, out, values, num_tokens,
    D: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, HAS_VALUES: tl.constexpr,
):  # fmt: skip
    """Weighted sum of each token's rows, over k in order; the values of its rows besides."""
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
        if HAS_VALUES:  # noqa: SIM102
            if tile == 0:
                taken = tl.load(row_values + row, mask=kept, other=0)
                tl.store(values + token * K + k, taken, mask=real)
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
            _zero_padding(
                grad_rows, grad_rows, row_token, slot_offsets, block - token_blocks, tile,
                num_slots, D, BR, BD, False,
            )  # fmt: skip


LOWEST = tl.constexpr(-(2**63))


@triton.jit
def _sortable(key, reversed_id):
    key = key + 0.0  # -0 and 0 are equal
    bits = key.to(tl.int32, bitcast=True)
    bits = tl.where(key != key, 0x7FC00000, bits)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | reversed_id.to(tl.int64)


@triton.jit
def _within_groups(
    packed, key, known,
    G: tl.constexpr, G2: tl.constexpr, TOP_GROUPS: tl.constexpr, BT: tl.constexpr,
    SUM_TWO: tl.constexpr,
):  # fmt: skip
    """LOWEST for the experts outside the best groups of each token."""
    is_first = packed == tl.max(packed, axis=2)[:, :, None]
    best = tl.sum(tl.where(is_first & known, key, 0.0), axis=2)
    if SUM_TWO:
        rest = tl.where(is_first, LOWEST, packed)
        is_second = rest == tl.max(rest, axis=2)[:, :, None]
        best += tl.sum(tl.where(is_second & known, key, 0.0), axis=2)
    groups = tl.arange(0, G2)[None, :]
    order = tl.where(groups < G, _sortable(best, G - 1 - groups), LOWEST)
    allowed = tl.zeros((BT, G2), tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        chosen = order == tl.max(order, axis=1)[:, None]
        allowed = tl.where(chosen, 1, allowed)
        order = tl.where(chosen, LOWEST, order)
    return tl.where(allowed[:, :, None] != 0, packed, LOWEST)


@triton.jit(do_not_specialize=["num_tokens"])
def gate_kernel(
    logits, stride, bias, ids, weights, num_tokens, scale,
    G: tl.constexpr, G2: tl.constexpr, L: tl.constexpr, L2: tl.constexpr,
    K: tl.constexpr, K2: tl.constexpr, TOP_GROUPS: tl.constexpr, BT: tl.constexpr,
    SIGMOID: tl.constexpr, BY_LOGIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    SUM_TWO: tl.constexpr, RENORMALIZE: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """BT tokens x G groups x L experts a group; G2, L2, K2 are the next powers of two."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    group = tl.arange(0, G2)[None, :, None]
    member = tl.arange(0, L2)[None, None, :]
    expert = group * L + member
    known = (group < G) & (member < L)
    real = (token < num_tokens)[:, None, None]
    from_ = token.to(tl.int64)[:, None, None] * stride + expert
    x = tl.load(logits + from_, mask=real & known, other=0).to(tl.float32)
    x = tl.where(known, x, float("-inf"))
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-x))
    else:
        top = tl.max(tl.max(x, axis=2), axis=1)
        score = tl.exp(x - top[:, None, None])
        score = score / tl.sum(tl.sum(score, axis=2), axis=1)[:, None, None]
    key = x
    if not BY_LOGIT:
        key = score
    if HAS_BIAS:
        key = key + tl.load(bias + expert, mask=known, other=0).to(tl.float32)
    packed = tl.where(known, _sortable(key, G * L - 1 - expert), LOWEST)
    if TOP_GROUPS < G:
        packed = _within_groups(packed, key, known, G, G2, TOP_GROUPS, BT, SUM_TWO)
    ks = tl.arange(0, K2)[None, :]
    picked_ids = tl.zeros((BT, K2), tl.int32)
    picked = tl.zeros((BT, K2), tl.float32)
    for k in tl.static_range(K):
        largest = tl.max(tl.max(packed, axis=2), axis=1)
        chosen = packed == largest[:, None, None]
        weight = tl.sum(tl.sum(tl.where(chosen & known, score, 0.0), axis=2), axis=1)
        chosen_id = (G * L - 1) - (largest & 0xFFFFFFFF).to(tl.int32)
        picked_ids = tl.where(ks == k, chosen_id[:, None], picked_ids)
        picked = tl.where(ks == k, weight[:, None], picked)
        packed = tl.where(chosen, LOWEST, packed)
    if RENORMALIZE:
        picked = picked / tl.maximum(tl.sum(picked, axis=1), TINY)[:, None]
    to = token[:, None] * K + ks
    mask = (token < num_tokens)[:, None] & (ks < K)
    tl.store(ids + to, picked_ids, mask=mask)
    tl.store(weights + to, picked * scale, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def gate_backward_kernel(
    grad_weights, logits, stride, ids, grad_logits, num_tokens, scale,
    E: tl.constexpr, E2: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
    SIGMOID: tl.constexpr, RENORMALIZE: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """The scores are computed again: K gradients and ids per token are all that is kept."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    real = token < num_tokens
    expert = tl.arange(0, E2)[None, :]
    known = expert < E
    from_ = token.to(tl.int64)[:, None] * stride + expert
    x = tl.load(logits + from_, mask=real[:, None] & known, other=0).to(tl.float32)
    x = tl.where(known, x, float("-inf"))
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-x))
    else:
        score = tl.exp(x - tl.max(x, axis=1)[:, None])
        score = score / tl.sum(score, axis=1)[:, None]
    grad = tl.zeros((BT, E2), tl.float32)
    was_picked = tl.zeros((BT, E2), tl.int32)
    for k in tl.static_range(K):
        chosen_id = tl.load(ids + token * K + k, mask=real, other=0)
        weight_grad = tl.load(grad_weights + token * K + k, mask=real, other=0).to(tl.float32)
        chosen = expert == chosen_id[:, None]
        grad = tl.where(chosen, weight_grad[:, None] * scale, grad)
        was_picked = tl.where(chosen, 1, was_picked)
    if RENORMALIZE:
        total = tl.sum(tl.where(was_picked != 0, score, 0.0), axis=1)[:, None]
        inner = tl.sum(grad * score, axis=1)[:, None]
        safe = tl.maximum(total, TINY)
        grad = tl.where(total > TINY, (grad - inner / safe) / safe, grad / TINY)
        grad = tl.where(was_picked != 0, grad, 0.0)
    if SIGMOID:
        grad = grad * score * (1.0 - score)
    else:
        grad = (grad - tl.sum(grad * score, axis=1)[:, None]) * score
    to = token.to(tl.int64)[:, None] * E + expert
    out = grad.to(grad_logits.dtype.element_ty)
    tl.store(grad_logits + to, out, mask=real[:, None] & known)
