"""Sums of rows on the CPU without a copy of the rows: ``embedding_bag`` reads each row once.

It wants weights in the dtype of the rows. A float32 weight is the exact sum of three bfloat16
numbers (3 x 8 bits of significand), so bfloat16 rows are taken three times with a third of the
weight each; the products are exact in float32 and the sum is rounded to bfloat16 once.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

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
        weights = _thirds(weights)
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


def _thirds(weights: Tensor) -> Tensor:
    parts = []
    rest = weights
    for _ in range(3):
        part = rest.to(torch.bfloat16)
        parts.append(part)
        rest = rest - part.to(torch.float32)
    return torch.cat(parts, dim=1)
