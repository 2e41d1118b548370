"""Triton kernels that move rows: permute, gather, combine and the backward of combine.

Import only through ``triton_impl``. Values are cast to the accumulator right after each load, since
Triton's interpreter computes on the raw bits of bfloat16. Offsets of rows are int64; a row that a
position does not name is never read. Tiles are BT tokens x BD columns.
"""

import triton
import triton.language as tl


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
