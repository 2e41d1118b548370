"""Pair swaps on the exact count of node visits, for layers whose token patterns are few enough.

The pair form of ``search`` stands in for the true cost, the connectivity (km1) of the hypergraph of
tokens. Here the cost itself is kept up to date: for every pattern of picks how many lie in each
block, for every expert in how many tokens it is alone in its block (leaving saves them) and how
many tokens have nothing in another block (joining costs them). So a swap is weighed in O(1) and
done in the tokens that it touches (Fiduccia and Mattheyses, 1982, for hyperedges of tokens).

Shapes: N patterns, K picks, E experts, B blocks.
"""

from __future__ import annotations

import numba
import numpy as np

from moe_locality.placement.search.swaps import (
    block_sums,
    change_of_excess,
    next_random,
    shuffle,
    total_excess,
)

_SWEEPS = 100
_FEW_KEYS = 1 << 22  # up to here a table of counts is faster than sorting


def patterns(
    ids: np.ndarray, num_experts: int, home: np.ndarray, num_homes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join tokens with the same picks and the same home.

    Args:
        ids: [T, K], -1 = no pick. home: [T] below ``num_homes``, or empty.

    Returns:
        ([N, K] picks in ascending order, [N] home, empty when ``home`` is, [N] float64 tokens of
        each).
    """
    base = num_experts + 1
    possible = base ** ids.shape[1] * max(num_homes, 1)
    if possible > 2**62:
        return np.sort(ids, axis=1), home.astype(np.int64), np.ones(len(ids))
    key = _keys(ids, home.astype(np.int64), base)
    if possible <= _FEW_KEYS:
        count = np.bincount(key)
        key = np.flatnonzero(count)
        count = count[key]
    else:
        key, count = np.unique(key, return_counts=True)
    found = np.empty((len(key), ids.shape[1]), dtype=ids.dtype)
    for pick in reversed(range(ids.shape[1])):  # the key read back digit by digit
        found[:, pick] = key % base - 1
        key //= base
    return found, key if home.size else np.zeros(0, np.int64), count.astype(np.float64)


@numba.njit(nogil=True, cache=True)
def _keys(ids, home, base):
    """[T] the home and the picks of each token in ascending order, as digits of one number."""
    keys = np.empty(ids.shape[0], np.int64)
    picks = np.empty(ids.shape[1], np.int64)
    for token in range(ids.shape[0]):
        key = home[token] if home.size else 0
        for count in range(ids.shape[1]):
            new, place = np.int64(ids[token, count]), count
            while place > 0 and picks[place - 1] > new:
                picks[place] = picks[place - 1]
                place -= 1
            picks[place] = new
        for pick in picks:
            key = key * base + pick + 1
        keys[token] = key
    return keys


def polish(
    found: tuple[np.ndarray, np.ndarray, np.ndarray],
    load: np.ndarray,
    cap: float,
    start: np.ndarray,
    num_blocks: int,
    kicks: int,
    seed: int,
    covariance: np.ndarray,
    deviations: float,
) -> tuple[np.ndarray, float, float]:
    """Improve ``start`` by swaps that lower the exact number of blocks visited; see ``search``.

    Args:
        found: what ``patterns`` returns. The other arguments are those of ``search``.

    Returns:
        [E] blocks, load above the cap, blocks visited besides the home, summed over tokens.
    """
    ids, home, count = found
    covariance = covariance if deviations else np.zeros((0, 0))
    start = np.ascontiguousarray(start, dtype=np.int64)
    return _polish(
        ids, home, count, covariance, load, float(cap), float(deviations), start, num_blocks,
        kicks, seed,
    )  # fmt: skip


@numba.njit(nogil=True, cache=True)
def _patterns_of(ids, num_experts):
    """(offsets [E + 1], patterns that hold each expert)."""
    offset = np.zeros(num_experts + 1, np.int64)
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            if ids[t, k] >= 0:
                offset[ids[t, k] + 1] += 1
    offset = offset.cumsum()
    place = offset[:-1].copy()
    holds = np.empty(offset[-1], np.int32)
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            e = ids[t, k]
            if e >= 0:
                holds[place[e]] = t
                place[e] += 1
    return offset, holds


@numba.njit(nogil=True, cache=True)
def _count(ids, home, count, block_of, num_blocks):
    """State of the search: inside [N, B] picks (and home) of each pattern in each block, alone [E],
    absent [E, B], pair_alone [E, E], and the visits.

    alone[e]: tokens whose only tie to the block of e is e. absent[e, b]: tokens of e without a tie
    to b. pair_alone[e, f]: those of alone[e] that also pick f.
    """
    n = len(block_of)
    inside = np.zeros((len(ids), num_blocks), np.int16)
    alone, absent = np.zeros(n), np.zeros((n, num_blocks))
    pair_alone = np.zeros((n, n))
    visits = 0.0
    for t in range(len(ids)):
        w = count[t]
        if home.size:
            inside[t, home[t]] += 1
            visits -= w
        for e in ids[t]:
            if e >= 0:
                inside[t, block_of[e]] += 1
        for b in range(num_blocks):
            if inside[t, b] > 0:
                visits += w
        for e in ids[t]:
            if e < 0:
                continue
            for b in range(num_blocks):
                if inside[t, b] == 0:
                    absent[e, b] += w
            if inside[t, block_of[e]] == 1:
                _mark_alone(ids[t], e, w, alone, pair_alone)
    return inside, alone, absent, pair_alone, visits


@numba.njit(nogil=True, cache=True)
def _mark_alone(picks, e, w, alone, pair_alone):
    """Expert e becomes (w > 0) or is no longer (w < 0) the only tie of w tokens to its block."""
    alone[e] += w
    for f in picks:
        if f >= 0 and f != e:
            pair_alone[e, f] += w


@numba.njit(nogil=True, cache=True)
def _leave(ids, count, inside, holds, e, partner, a, b, block_of, alone, absent, pair_alone):
    """Move e from block a to b in the patterns ``holds``, but where ``partner`` is picked too."""
    for t in holds:
        picks = ids[t]
        both = False
        for f in picks:
            both = both or f == partner
        if both:
            continue
        w = count[t]
        if inside[t, a] == 1:
            _mark_alone(picks, e, -w, alone, pair_alone)
            for f in picks:
                if f >= 0:
                    absent[f, a] += w
        elif inside[t, a] == 2:
            for f in picks:
                if f >= 0 and f != e and block_of[f] == a:
                    _mark_alone(picks, f, w, alone, pair_alone)
        if inside[t, b] == 0:
            _mark_alone(picks, e, w, alone, pair_alone)
            for f in picks:
                if f >= 0:
                    absent[f, b] -= w
        elif inside[t, b] == 1:
            for f in picks:
                if f >= 0 and f != e and block_of[f] == b:
                    _mark_alone(picks, f, -w, alone, pair_alone)
        inside[t, a] -= 1
        inside[t, b] += 1


@numba.njit(nogil=True, cache=True)
def _exchange(ids, count, offset, holds, e, f, block_of, inside, alone, absent, pair_alone):
    """Swap e and f; returns the visits saved."""
    a, b = block_of[e], block_of[f]
    saved = alone[e] - absent[e, b] + alone[f] - absent[f, a] - pair_alone[e, f] - pair_alone[f, e]
    of_e = holds[offset[e] : offset[e + 1]]
    of_f = holds[offset[f] : offset[f + 1]]
    _leave(ids, count, inside, of_e, e, f, a, b, block_of, alone, absent, pair_alone)
    block_of[e] = b
    _leave(ids, count, inside, of_f, f, e, b, a, block_of, alone, absent, pair_alone)
    block_of[f] = a
    for t in of_e:  # tokens of both: the counts stay, but the other one is alone now
        for g in ids[t]:
            if g == f and (inside[t, a] == 1) != (inside[t, b] == 1):
                w = count[t] if inside[t, a] == 1 else -count[t]
                _mark_alone(ids[t], e, -w, alone, pair_alone)
                _mark_alone(ids[t], f, w, alone, pair_alone)
    return saved


@numba.njit(nogil=True, cache=True)
def _polish(ids, home, count, cov, load, cap, deviations, start, num_blocks, kicks, seed):
    n = len(load)
    offset, holds = _patterns_of(ids, n)
    block_of = start.copy()
    inside, alone, absent, pair_alone, visits = _count(ids, home, count, block_of, num_blocks)
    near_cov, block_load, block_var = block_sums(cov, load, block_of, num_blocks)
    state = np.array([np.uint64(seed)])
    order = np.arange(n)
    best, best_visits, best_excess = start.copy(), np.inf, np.inf
    for kick in range(kicks + 1):
        if kick:
            for _ in range(2 + next_random(state) % 2):
                e, f = next_random(state) % n, next_random(state) % n
                if block_of[e] != block_of[f]:
                    visits -= _exchange(
                        ids, count, offset, holds, e, f, block_of, inside, alone, absent, pair_alone
                    )
            near_cov, block_load, block_var = block_sums(cov, load, block_of, num_blocks)
        for _ in range(_SWEEPS):
            improved = False
            shuffle(order, state)
            for e in order:
                a = block_of[e]
                best_f, less, most = -1, 0.0, 0.0
                for f in range(n):
                    b = block_of[f]
                    if a == b:
                        continue
                    gain = alone[e] - absent[e, b] + alone[f] - absent[f, a]
                    gain -= pair_alone[e, f] + pair_alone[f, e]
                    excess = change_of_excess(
                        cov, load, cap, deviations, near_cov, block_load, block_var, a, b, e, f
                    )
                    if excess < less or (excess == less and gain > most):
                        best_f, less, most = f, excess, gain
                if best_f >= 0:
                    visits -= _exchange(
                        ids, count, offset, holds, e, best_f, block_of, inside, alone, absent,
                        pair_alone,
                    )  # fmt: skip
                    near_cov, block_load, block_var = block_sums(cov, load, block_of, num_blocks)
                    improved = True
            if not improved:
                break
        excess = total_excess(block_load, block_var, deviations, cap)
        if excess < best_excess or (excess == best_excess and visits <= best_visits):
            best[:], best_visits, best_excess = block_of, visits, excess
        elif kick < kicks:  # back to the best by swaps
            for e in range(n):
                f = e
                while block_of[e] != best[e]:
                    f += 1
                    if block_of[f] == best[e] and best[f] != block_of[f]:
                        visits -= _exchange(
                            ids, count, offset, holds, e, f, block_of, inside, alone, absent,
                            pair_alone,
                        )  # fmt: skip
    return best, best_excess, best_visits
