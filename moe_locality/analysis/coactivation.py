"""Which experts are picked together: in one layer by one token, and from one layer to the next."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from moe_locality.trace.schema import RoutingTrace

_CHUNK_TOKENS = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Coactivation:
    """What a placement needs to know of a trace: how often experts are picked, alone and together.

    pairs: int64 [L, E, E], tokens that picked both experts; symmetric, zero on the diagonal.
    load: int64 [L, E], tokens that picked the expert.
    layer_ids: transformer layer index of each row. num_tokens: rows counted (a token whose layers
    lie in the shards of several pipeline stages counts once per shard). model: of the trace.
    """

    pairs: np.ndarray
    load: np.ndarray
    layer_ids: tuple[int, ...]
    num_tokens: int
    model: str = ""

    @property
    def num_experts(self) -> int:
        return int(self.load.shape[1])


def count_coactivation(
    trace: RoutingTrace | str | os.PathLike[str],
    *,
    threads: int | None = None,
    max_bytes: int = 128 << 20,
    progress: Callable[[int, int, str], None] | None = None,
) -> Coactivation:
    """Count picks and pairs of picks of every layer in one pass.

    The result does not depend on the number of threads, nor on how a trace is cut into shards.

    Args:
        trace: a trace in memory, or the path of one. A directory of Parquet shards is read piece by
            piece and may be larger than memory; an .npz file is read whole.
        threads: None: one per processor that this process may use.
        max_bytes: about what the expert ids of a piece of a shard may take, read and decoded.
        progress: called with (pieces done, pieces in all, text) when reading a directory.

    Raises:
        TraceError: the trace has counts only, or its files are damaged or do not fit each other.
    """
    if not isinstance(trace, RoutingTrace):
        from moe_locality.trace.pieces import read_pieces

        pieces = read_pieces(trace, max_bytes=max_bytes, progress=progress)
        return _sum(pieces, threads, sort=True)
    return _sum(iter([trace]), threads, sort=False)


def _sum(parts: Iterator[RoutingTrace], threads: int | None, *, sort: bool) -> Coactivation:
    """Add up parts of one trace, of whatever rows and layers; layers by number, or as they come."""
    rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    seen: dict[int, int] = {}
    model = ""
    num = 0
    for part in parts:
        ids = part.tokens_only("count_coactivation").expert_ids
        model, num = part.model, part.num_experts
        pairs, load = _count_layers(ids, num, threads)
        for place, layer in enumerate(int(i) for i in part.layer_ids):
            seen[layer] = seen.get(layer, 0) + len(ids)
            if layer not in rows:
                rows[layer] = (np.zeros((num, num), np.int64), np.zeros(num, np.int64))
            both, alone = rows[layer]
            both += pairs[place]
            both += pairs[place].T
            alone += load[place]
    layers = sorted(rows) if sort else list(rows)
    result = Coactivation(
        pairs=np.zeros((len(layers), num, num), np.int64),
        load=np.zeros((len(layers), num), np.int64),
        layer_ids=tuple(layers),
        num_tokens=max(seen.values(), default=0),
        model=model,
    )
    for place, layer in enumerate(layers):
        result.pairs[place], result.load[place] = rows.pop(layer)
        np.fill_diagonal(result.pairs[place], 0)
    return result


def _count_layers(
    ids: np.ndarray, num_experts: int, threads: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 [L, E, E] pairs in the order of the picks, int64 [L, E] picks) of ids [T, L, K].

    Threads take different layers, so they share nothing that is written.
    """
    from moe_locality.analysis.pair_kernels import add_pairs
    from moe_locality.placement.threads import over_layers

    layers = ids.shape[1]
    pairs = np.zeros((layers, num_experts, num_experts), np.uint32)
    load = np.zeros((layers, 1, num_experts), np.int64)
    unit = np.zeros(len(ids), np.int64)
    over_layers(
        lambda first, last: add_pairs(ids, unit, first, last, pairs, load), layers, threads=threads
    )
    return pairs, load[:, 0]


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
