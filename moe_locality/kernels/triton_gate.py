"""Triton kernels of the gate: scores, group limits and top-k in one pass, and the derivative.

Experts are compared by one int64: the bits of the key, made to sort like the number, above the
reversed id. So ties go to the lower id, nothing is picked twice, and NaN cannot lead outside.
"""

import triton
import triton.language as tl

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
