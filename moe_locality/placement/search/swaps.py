"""Experts of one layer to blocks by simulated annealing over swaps, and what such searches share.

The number of nodes that a token visits is the connectivity (km1) of a hypergraph whose vertices are
experts and whose edges are tokens. ``anneal`` uses its pair form, the co-activation matrix. It
maximizes the weight inside blocks less a price on the expected load of the busiest block
(``load_noise``). A price asks for level where it is cheap; a cap on every block forbids a swap that
fills one block while the others have room. Annealing after Kirkpatrick, Gelatt, Vecchi (1983), with
O(1) gains; block sizes stay as they are in the start.

``refine_exact`` keeps the exact count up to date, for layers whose token patterns are few enough:
for every pattern of picks how many lie in each block, for every expert in how many tokens it is
alone in its block (leaving saves them) and how many tokens have nothing in another block (joining
costs them). A swap is weighed in O(1) and done in the tokens that it touches (Fiduccia and
Mattheyses, 1982, for hyperedges of tokens).

Counts are integers held in float64, so sums are exact and a seed gives the same result for any
number of threads. Shapes: T tokens, N patterns, K picks, E experts, B blocks (nodes, or ranks of
one node), S samples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moe_locality.placement.count_kernels import compiled
from moe_locality.placement.search.load_noise import Noise, samples_of

STEEP = 8.0
"""Imbalance beyond the limit of a layer costs this many times its price in addition."""

CHUNK = 64
"""Steps of one temperature."""


class PatternCounts(NamedTuple):
    """What the exact search keeps: the patterns, and which of their tokens touch which block."""

    ids: np.ndarray  # [N, K] picks of each pattern
    count: np.ndarray  # [N] its tokens
    offset: np.ndarray  # [E + 1] where the patterns of each expert begin in ``holds``
    holds: np.ndarray  # [picks] the patterns with each expert
    inside: np.ndarray  # [N, B] picks (and home) of each pattern in each block
    alone: np.ndarray  # [E] tokens whose only tie to the block of the expert is the expert
    absent: np.ndarray  # [E, B] tokens of the expert without a tie to the block
    pair_alone: np.ndarray  # [E, E] those of ``alone`` of the first that also pick the second


_LOSSES = -np.log((np.arange(1024) + 0.5) / 1024)


@compiled
def count_pattern_visits(ids, home_block, count, block_of, num_blocks):
    """Blocks that tokens visit besides their home, summed; float64.

    ids [N, K]: patterns of picks, -1 = no pick, that occur ``count`` [N] times. ``home_block`` [N],
    or empty: every block touched counts (then the expectation over uniform homes is (M - 1) / M of
    it).
    """
    seen = np.full(num_blocks + 1, -1, dtype=np.int64)
    block = np.full(len(block_of) + 1, num_blocks, dtype=np.int64)  # the last: of no pick, -1
    block[:-1] = block_of
    total = 0.0
    for row in range(ids.shape[0]):
        seen[num_blocks] = row
        if home_block.size:
            seen[home_block[row]] = row
        visits = 0
        for pick in range(ids.shape[1]):
            b = block[ids[row, pick]]
            visits += seen[b] != row
            seen[b] = row
        total += visits * count[row]
    return total


@compiled
def pack(load, order, room):
    """[E] block of each expert: in this order, into the lightest with room [B] (used up)."""
    block_of, sums = np.zeros(len(load), np.int64), np.zeros(len(room))
    for e in order:
        best = -1
        for b in range(len(room)):
            if room[b] > 0 and (best < 0 or sums[b] < sums[best]):
                best = b
        block_of[e] = best
        room[best] -= 1
        sums[best] += load[e]
    return block_of


@compiled
def next_random(state):
    """splitmix64 (Steele, Lea, Flood 2014): state [1] uint64 in, 31 random bits out."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((z ^ (z >> np.uint64(31))) >> np.uint64(33))


@compiled
def metropolis_loss(state):
    """-log of a uniform number; times the temperature, the loss that a step of annealing may bring
    (Metropolis et al. 1953).
    """
    return _LOSSES[next_random(state) & 1023]


@compiled
def block_sums(cov, load, block_of, num_blocks):
    """([E, B] covariance of an expert with a block, [B] loads, [B] covariances of the blocks)."""
    near_cov = near_blocks(cov, np.zeros((len(cov), num_blocks)), block_of[: len(cov)])
    block_load, block_var = np.zeros(num_blocks), np.zeros(num_blocks)
    for e in range(len(block_of)):
        block_load[block_of[e]] += load[e]
    for e in range(len(cov)):
        block_var[block_of[e]] += near_cov[e, block_of[e]]
    return near_cov, block_load, block_var


@compiled
def expected_highest(load, deviation, draws, highest):
    """Mean over the samples of the highest of the loads [B], each with so many of its standard
    ``deviation`` [B] added as ``draws`` [B, S] says; ``highest`` [S] is a work array.
    """
    size = len(highest)
    mean, spread, row = load[0], deviation[0], draws[0]
    for s in range(size):
        highest[s] = mean + spread * row[s]
    for b in range(1, len(load)):
        mean, spread, row = load[b], deviation[b], draws[b]
        for s in range(size):  # the higher of two, in a form that becomes vector instructions
            value = mean + spread * row[s]
            highest[s] = (value + highest[s] + abs(value - highest[s])) * 0.5
    total = 0.0
    for s in range(size):
        total += highest[s]
    return total / size


@compiled
def loads_after(load, cov, near_cov, block_load, block_var, a, b, e, f):
    """(loads of a and b, variances of a and b) once e of a and f of b are swapped."""
    shift = load[f] - load[e]
    var_a, var_b = block_var[a], block_var[b]
    if len(cov):
        own = cov[e, e] + cov[f, f] - 2 * cov[e, f]
        var_a += own - 2 * (near_cov[e, a] - near_cov[f, a])
        var_b += own - 2 * (near_cov[f, b] - near_cov[e, b])
    return block_load[a] + shift, block_load[b] - shift, var_a, var_b


@compiled
def priced_highest(load, deviation, draws, highest, limit):
    """``expected_highest``, plus ``STEEP`` times what is beyond the limit."""
    level = expected_highest(load, deviation, draws, highest)
    return level + STEEP * max(level - limit, 0.0)


@compiled
def start_levels(load, cov, unit, draws, limit, block_of):
    """([B] and [E, B] sums that ``try_swap`` keeps up to date, and its room; the priced level)."""
    near_cov, block_load, block_var = block_sums(cov, load, block_of, len(draws))
    deviation = unit * np.sqrt(np.maximum(block_var, 0.0))
    room = np.empty(draws.shape[1])
    level = priced_highest(block_load, deviation, draws, room, limit)
    sums = near_cov, block_load, block_var, deviation, block_load.copy(), deviation.copy(), room
    return sums, level


@compiled
def try_swap(load, cov, unit, draws, limit, sums, mean, most, a, b, e, f):
    """The priced level once e of a and f of b are swapped, and the sums brought up to date; if it
    is above ``most``, infinity, and nothing has changed. ``mean``: of the block loads.
    """
    near_cov, block_load, block_var, deviation, new_load, new_deviation, room = sums
    if most < mean:
        return np.inf
    load_a, load_b, var_a, var_b = loads_after(
        load, cov, near_cov, block_load, block_var, a, b, e, f
    )
    if max(load_a, load_b) > most:  # the expected load is never below the highest load
        return np.inf
    new_load[:], new_deviation[:] = block_load, deviation
    new_load[a], new_load[b] = load_a, load_b
    new_deviation[a] = unit * np.sqrt(max(var_a, 0.0))
    new_deviation[b] = unit * np.sqrt(max(var_b, 0.0))
    level = priced_highest(new_load, new_deviation, draws, room, limit)
    if level > most:
        return np.inf
    block_load[:], deviation[:] = new_load, new_deviation
    block_var[a], block_var[b] = var_a, var_b
    if len(cov):
        swap_near(near_cov, cov, a, b, e, f)
    return level


@compiled
def near_blocks(table, pin, block_of):
    """[E, B]: ``pin``, and the sums of ``table`` [E, E] with what is in each block."""
    near = pin.copy()
    for e in range(len(block_of)):
        for f in range(len(block_of)):
            near[e, block_of[f]] += table[e, f]
    return near


@compiled
def swap_near(near, table, a, b, e, f):
    """Swap e of block a with f of block b in near [E, B], the sums of ``table`` [E, E] by block.

    ``table`` is symmetric, and its rows lie together in memory.
    """
    for g in range(len(near)):
        change = table[f, g] - table[e, g]
        near[g, a] += change
        near[g, b] -= change


HOT, COLD = 0.3, 0.012
"""First and last temperature, in weight per expert."""


def anneal(
    weight: np.ndarray,
    pin: np.ndarray,
    load: np.ndarray,
    noise: Noise | None,
    price: float,
    limit: float,
    start: np.ndarray,
    steps: int,
    seed: int,
    hot: float = HOT,
) -> np.ndarray:
    """[E] blocks with much weight inside and a small expected load of the busiest one.

    Args:
        weight: [E, E] gain of having both experts in one block (symmetric, zero diagonal).
        pin: [E, B] gain of having the expert in that block. load: [E] picks.
        noise: how loads vary (None: not at all).
        price: gain that one expected pick less on the busiest block is worth.
        limit: expected picks there beyond which each costs ``STEEP`` times more.
        start: [E] block of each expert; returned where nothing better is found.
        steps: swaps tried. hot: the first temperature; a low one keeps most of the start.
    """
    scale = (np.abs(weight).sum() / 2 + pin.sum()) / max(len(load), 1)
    start = np.ascontiguousarray(start, dtype=np.int64)
    best, _ = _search(
        weight, near_blocks(weight, pin, start), None, load, *samples_of(noise, pin.shape[1]),
        float(price), float(limit), start, steps, max(hot * scale, 1e-9), max(COLD * scale, 1e-9),
        seed,
    )  # fmt: skip
    return best


@compiled
def _search(
    weight, near, exact, load, cov, unit, draws, price, limit, start, steps, hot, cold, seed
):
    """([E] best blocks, the weight or visits that they gain).

    The pair form has ``near`` [E, B], its sums by block, and None as ``exact``; the exact one has
    ``PatternCounts``, and two tables that are empty.
    """
    block_of, best = start.copy(), start.copy()
    sums, level = start_levels(load, cov, unit, draws, limit, block_of)
    n, mean = len(load), load.sum() / len(draws)
    score, highest, saved, best_saved = 0.0, 0.0, 0.0, 0.0
    state = np.array([np.uint64(seed)])
    temperature, cooling = hot, (cold / hot) ** (CHUNK / max(steps - CHUNK, 1))
    for step in range(steps):
        if step % CHUNK == 0 and step:
            temperature = max(temperature * cooling, cold)
        e, f = next_random(state) * n >> 31, next_random(state) * n >> 31
        a, b = block_of[e], block_of[f]
        if a == b:
            continue
        if exact is None:
            gain = near[e, b] - near[e, a] + near[f, a] - near[f, b] - 2 * weight[e, f]
        else:
            gain = _visits_saved(exact, e, f, a, b)
        allowed = gain + temperature * metropolis_loss(state)
        cost = 0.0
        if price > 0:
            new = try_swap(
                load, cov, unit, draws, limit, sums, mean, level + allowed / price, a, b, e, f
            )
            if new == np.inf:
                continue
            cost = price * (new - level)
            level = new
        elif allowed < 0:
            continue
        if exact is None:
            swap_near(near, weight, a, b, e, f)
        else:
            _exchange(exact, e, f, block_of)
        block_of[e], block_of[f] = b, a
        saved += gain
        score += gain - cost
        if score > highest:
            highest, best_saved = score, saved
            best[:] = block_of
    return best, best_saved


REFINE_HOT, REFINE_COLD = 0.05, 0.003
"""First and last temperature, in picks per expert: low, because ``anneal`` made the start."""


def patterns(
    ids: np.ndarray, num_experts: int, home: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """([N, K] picks, [N] home or empty, [N] float64 tokens of each) of tokens ids [T, K], ``home``
    [T] or empty; with up to 64 experts, tokens with the same picks and home are joined.
    """
    home = home.astype(np.int64)
    if num_experts > 64:
        return ids, home, np.ones(len(ids))
    first, count = _join(ids, home)
    return ids[first], home[first] if home.size else home, count


@compiled
def _join(ids, home):
    """([N] first token of each pattern, [N] tokens of it), by a table with open addresses."""
    tokens, size, found = len(ids), 1, 0
    while size < 2 * tokens:
        size *= 2
    table = np.full(size, -1, np.int32)  # patterns by place
    keys = np.empty(tokens, np.uint64)  # the picks of each pattern as bits
    first, count = np.empty(tokens, np.int64), np.zeros(tokens)
    for token in range(tokens):
        key = np.uint64(0)
        for pick in ids[token]:
            if pick >= 0:
                key |= np.uint64(1) << np.uint64(pick)
        own = home[token] if home.size else 0
        mixed = (key ^ (key >> np.uint64(32))) * np.uint64(0x9E3779B97F4A7C15)
        mixed += np.uint64(own) * np.uint64(0xBF58476D1CE4E5B9)
        place = np.int64(mixed >> np.uint64(32)) & (size - 1)
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
    return first[:found].copy(), count[:found].copy()


def distinct_rows(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([N] first row of each kind in key [T, C], [N] rows of that kind), as ``lexsort`` orders."""
    order = np.lexsort(key.T)
    ordered, new = key[order], np.ones(len(key), dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order[new], np.bincount(np.cumsum(new) - 1)


def rows_by_value(ids: np.ndarray, num: int) -> tuple[np.ndarray, np.ndarray]:
    """(offsets [num + 1], rows of ids [N, K] that hold each value below ``num``, in order)."""
    row, place = np.nonzero(ids >= 0)
    value = ids[row, place]
    offset = np.concatenate([[0], np.cumsum(np.bincount(value, minlength=num))])
    return offset, row[np.argsort(value, kind="stable")]


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
    """([E] blocks, blocks visited besides the home, summed over tokens): a low exact number of
    these, and a low expected load of the busiest block.

    ``found``: what ``patterns`` returns. ``price``: visits that one expected pick less on the
    busiest block is worth. The other arguments are those of ``anneal``.
    """
    ids, home, count = found
    scale = count.sum() * ids.shape[1] / max(len(load), 1)
    start = np.ascontiguousarray(start, dtype=np.int64)
    counts, visits = _count(ids, home, count, *rows_by_value(ids, len(load)), start, num_blocks)
    empty = np.zeros((0, 0))
    best, saved = _search(
        empty, empty, counts, load, *samples_of(noise, num_blocks), float(price), float(limit),
        start, steps, max(REFINE_HOT * scale, 1e-9), max(REFINE_COLD * scale, 1e-9), seed,
    )  # fmt: skip
    return best, visits - saved


@compiled
def _count(ids, home, count, offset, holds, block_of, num_blocks):
    """(the ``PatternCounts`` of blocks [E], the visits that they make)."""
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
    return PatternCounts(ids, count, offset, holds, inside, alone, absent, pair_alone), visits


@compiled
def _mark_alone(picks, e, w, alone, pair_alone):
    """Expert e becomes (w > 0) or is no longer (w < 0) the only tie of w tokens to its block."""
    alone[e] += w
    for f in picks:
        if f >= 0 and f != e:
            pair_alone[e, f] += w


@compiled
def _leave(exact, holds, e, partner, a, b, block_of):
    """Move e from block a to b in the patterns ``holds``, but where ``partner`` is picked too."""
    ids, count, inside = exact.ids, exact.count, exact.inside
    alone, absent, pair_alone = exact.alone, exact.absent, exact.pair_alone
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


@compiled
def _visits_saved(exact, e, f, a, b):
    """By a swap of e in block a with f in block b."""
    saved = exact.alone[e] - exact.absent[e, b] + exact.alone[f] - exact.absent[f, a]
    return saved - exact.pair_alone[e, f] - exact.pair_alone[f, e]


@compiled
def _exchange(exact, e, f, block_of):
    """Swap e and f in all counts."""
    ids, count, inside = exact.ids, exact.count, exact.inside
    offset, holds = exact.offset, exact.holds
    a, b = block_of[e], block_of[f]
    of_e = holds[offset[e] : offset[e + 1]]
    _leave(exact, of_e, e, f, a, b, block_of)
    block_of[e] = b
    _leave(exact, holds[offset[f] : offset[f + 1]], f, e, b, a, block_of)
    for t in of_e:  # tokens of both: the counts stay, but the other one is alone now
        for g in ids[t]:
            if g == f and (inside[t, a] == 1) != (inside[t, b] == 1):
                w = count[t] if inside[t, a] == 1 else -count[t]
                _mark_alone(ids[t], e, -w, exact.alone, exact.pair_alone)
                _mark_alone(ids[t], f, w, exact.alone, exact.pair_alone)
