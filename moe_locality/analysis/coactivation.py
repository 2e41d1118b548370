"""Which experts are picked together: in one layer by one token, and from one layer to the next."""

from __future__ import annotations

import numpy as np

from moe_locality.placement.counting import count_coactivation
from moe_locality.trace.schema import RoutingTrace

_CHUNK_TOKENS = 65_536


def pair_counts(trace: RoutingTrace) -> np.ndarray:
    """int64 [L, E, E], tokens that picked both experts of a pair; symmetric, zero on the
    diagonal.
    """
    return count_coactivation(trace).pairs


def transition_counts(trace: RoutingTrace) -> np.ndarray:
    """int64 [L - 1, E, E], how often a token picked expert i in a layer and expert j in the next
    MoE layer.

    Every pick of a token is paired with every pick of the next layer: K * K pairs per token.
    """
    ids = trace.tokens_only("transition_counts").expert_ids
    num, top_k = trace.num_experts, trace.top_k
    counts = np.zeros((max(trace.num_layers - 1, 0), num, num), np.int64)
    for layer in range(len(counts)):
        for start in range(0, len(ids), _CHUNK_TOKENS):
            rows = slice(start, start + _CHUNK_TOKENS)
            here = np.repeat(ids[rows, layer], top_k, axis=1)
            there = np.tile(ids[rows, layer + 1], (1, top_k))
            counts[layer] += _count(here, there, num)
    return counts


def _count(first: np.ndarray, second: np.ndarray, num: int) -> np.ndarray:
    """int64 [E, E], occurrences of (first, second); missing picks (-1) fall into an extra row or
    column.
    """
    bins = num + 1
    index = (first.astype(np.int64) + 1) * bins + (second + 1)
    return np.bincount(index.ravel(), minlength=bins * bins).reshape(bins, bins)[1:, 1:]


def top_pair_share(counts: np.ndarray, fraction: float = 0.05) -> np.ndarray:
    """Share of all co-selections that the most frequent ``fraction`` of pairs holds, [...].

    Args:
        counts: [..., E, E] symmetric counts or weights of pairs; the diagonal is not looked at. nan
            without any pair.
    """
    upper = counts[(..., *np.triu_indices(counts.shape[-1], 1))].astype(np.float64)
    num = max(int(upper.shape[-1] * fraction), 1)
    total = upper.sum(axis=-1)
    top = np.sort(upper, axis=-1)[..., -num:].sum(axis=-1)
    return np.divide(top, total, out=np.full(total.shape, np.nan), where=total > 0)


def independent_pairs(load: np.ndarray) -> np.ndarray:
    """float64 [..., E, E], weights of pairs if experts were picked independently with these loads:
    p_i * p_j.

    It agrees with shuffling the picks between tokens. (Odds p / (1 - p) instead of p, as in some
    reports, overstate the reference when an expert takes a large share of the tokens.)
    """
    weight = load.astype(np.float64)
    return weight[..., :, None] * weight[..., None, :]


def transition_mutual_information_bits(counts: np.ndarray) -> np.ndarray:
    """Mutual information between the experts of neighboring layers, in bits, [...]; 0 =
    independent.

    Args:
        counts: [..., E, E] as from ``transition_counts``. nan without any count.
    """
    total = counts.sum(axis=(-2, -1), keepdims=True).astype(np.float64)
    joint = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    product = joint.sum(axis=-1, keepdims=True) * joint.sum(axis=-2, keepdims=True)
    ratio = np.divide(joint, product, out=np.ones_like(joint), where=joint > 0)
    bits = (joint * np.log2(ratio)).sum(axis=(-2, -1))
    return np.where(total[..., 0, 0] > 0, bits, np.nan)
