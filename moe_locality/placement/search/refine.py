"""Swaps on the exact count of node visits, for layers whose token patterns are few enough.

The pair form of ``anneal`` stands in for the true cost, the connectivity (km1) of the hypergraph of
tokens. Here the cost itself is kept up to date: for every pattern of picks how many lie in each
block, for every expert in how many tokens it is alone in its block (leaving saves them) and how
many tokens have nothing in another block (joining costs them). So a swap is weighed in O(1) and
done in the tokens that it touches (Fiduccia and Mattheyses, 1982, for hyperedges of tokens).

Shapes: N patterns, K picks, E experts, B blocks.
"""

from __future__ import annotations

import numba
import numpy as np

from moe_locality.placement.search import swaps
from moe_locality.placement.search.load_noise import Noise, samples_of

HOT, COLD = 0.05, 0.003
"""First and last temperature, in picks per expert: low, because ``anneal`` made the start."""


def patterns(
    ids: np.ndarray, num_experts: int, home: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join tokens with the same picks and the same home (with up to 64 experts).

    Args:
        ids: [T, K], -1 = no pick. home: [T], or empty.

    Returns:
        ([N, K] picks as in the first such token, [N] home, empty when ``home`` is, [N] float64
        tokens of each).
    """
    home = home.astype(np.int64)
    if num_experts > 64:
        return ids, home, np.ones(len(ids))
    first, count = _join(ids, home)
    return ids[first], home[first] if home.size else home, count


@numba.njit(nogil=True, cache=True)
def _join(ids, home):
    """([N] first token of each pattern, [N] tokens of it), by a table with open addresses."""
    tokens = len(ids)
    size = 1 << 12
    table = np.full(size, -1, np.int32)  # patterns by place
    keys = np.empty(tokens, np.uint64)  # the picks of each pattern as bits
    first, count = np.empty(tokens, np.int64), np.zeros(tokens)
    found = 0
    for token in range(tokens):
        key = np.uint64(0)
        for pick in ids[token]:
            if pick >= 0:
                key |= np.uint64(1) << np.uint64(pick)
        own = home[token] if home.size else 0
        place = _place(key, own, size)
        while True:
            pattern = table[place]
            if pattern < 0 or (
                keys[pattern] == key and (not home.size or home[first[pattern]] == own)
            ):
                break
            place = (place + 1) & (size - 1)
        if pattern < 0:
            pattern = table[place] = found
            keys[found], first[found] = key, token
            found += 1
        count[pattern] += 1
        if 2 * found > size:
            size *= 4
            table = np.full(size, -1, np.int32)
            for pattern in range(found):
                own = home[first[pattern]] if home.size else 0
                place = _place(keys[pattern], own, size)
                while table[place] >= 0:
                    place = (place + 1) & (size - 1)
                table[place] = pattern
    return first[:found].copy(), count[:found].copy()


@numba.njit(nogil=True, cache=True)
def _place(key, home, size):
    mixed = (key ^ (key >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64(home) * np.uint64(0xBF58476D1CE4E5B9)
    return np.int64(mixed >> np.uint64(32)) & (size - 1)


def refine_exact(
    found: tuple[np.ndarray, np.ndarray, np.ndarray],
    load: np.ndarray,
    noise: Noise | None,
    price: float,
    limit: float,
    start: np.ndarray,
    num_blocks: int,
    steps: int,
    seed: int,
) -> tuple[np.ndarray, float]:
    """Lower the exact number of blocks visited, and the expected load of the busiest block.

    Args:
        found: what ``patterns`` returns.
        price: visits that one expected pick less on the busiest block is worth.
        The other arguments are those of ``anneal``.

    Returns:
        [E] blocks; blocks visited besides the home, summed over tokens.
    """
    ids, home, count = found
    covariance, unit, draws = samples_of(noise, num_blocks)
    scale = count.sum() * ids.shape[1] / max(len(load), 1)
    start = np.ascontiguousarray(start, dtype=np.int64)
    return _refine(
        ids, home, count, load, covariance, unit, draws, float(price), float(limit), start,
        num_blocks, steps, max(HOT * scale, 1e-9), max(COLD * scale, 1e-9), seed,
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
def _refine(
    ids, home, count, load, cov, unit, draws, price, limit, start, blocks, steps, hot, cold, seed
):  # fmt: skip
    n = len(load)
    offset, holds = _patterns_of(ids, n)
    block_of, best = start.copy(), start.copy()
    inside, alone, absent, pair_alone, visits = _count(ids, home, count, block_of, blocks)
    sums, level = swaps.start_levels(load, cov, unit, draws, limit, block_of)
    mean = load.sum() / len(draws)
    score, highest, best_visits = 0.0, 0.0, visits
    state = np.array([np.uint64(seed)])
    temperature, ratio = hot, swaps.cooling(hot, cold, steps)
    for step in range(steps):
        if step % swaps.CHUNK == 0 and step:
            temperature = max(temperature * ratio, cold)
        e, f = swaps.next_pair(state, n)
        a, b = block_of[e], block_of[f]
        if a == b:
            continue
        gain = alone[e] - absent[e, b] + alone[f] - absent[f, a]
        gain -= pair_alone[e, f] + pair_alone[f, e]
        allowed = gain + temperature * swaps.metropolis_loss(state)
        if price > 0:
            new = swaps.try_swap(
                load, cov, unit, draws, limit, sums, mean, level + allowed / price, a, b, e, f
            )
            if new == np.inf:
                continue
            gain -= price * (new - level)
            level = new
        elif allowed < 0:
            continue
        visits -= _exchange(
            ids, count, offset, holds, e, f, block_of, inside, alone, absent, pair_alone
        )
        score += gain
        if score > highest:
            highest, best_visits = score, visits
            best[:] = block_of
    return best, best_visits
