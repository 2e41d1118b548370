"""Lower bounds on copies where nodes have more slots than their share of the experts.

Homes are uniform; who serves a pick is left open, so the bounds hold under every serving rule, and
for plans of any balance. One holder of each expert is called its primary, the R other slots are
replicas. Primaries and replica slots are E + R vertices in equal blocks: ``relaxation`` bounds the
blocks Y. Z_ej says that a replica of expert e is on the node of the primary of j, rho_e counts the
replicas of e. A node with b primaries has s - b replicas, so

    sum_e Z_ej <= sum of Y_rj over the replica slots r,  sum_j Z_ej <= (s - 1) rho_e,  sum rho = R.

If c is the least number of nodes that hold all picks of a token, and g nodes are in such a cover,
homes on those g make c - 1 copies and all others c: (c M - g) / (M - 1) nodes touched, as they are
counted in ``relaxation``. Without replicas c = g = the blocks of its primaries. A smaller cover
takes a replica of every pick of the blocks that it leaves out, beside a primary that it keeps
(which Z knows) or on a node without one; further nodes in a cover take further replicas
(``_cover``). With prices w on the pairs Y, z on Z and u on rho, multipliers of constraints, any w
and any z, u >= 0 prove

    touched >= sum over tokens of the least (touched + prices) over partitions and covers - <w, Y>
               - the most that any Z and rho can collect.

Shapes: as in ``relaxation``; E experts, s slots of a node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_locality.placement.bounds import relaxation
from moe_locality.placement.bounds.relaxation import ROUNDING, Prices, Relaxation, block_prices
from moe_locality.placement.count_kernels import compiled

_COOLING = 0.97  # faster than without replicas: rounds take longer
_NEAR, _EXTRA = 0.2, 0.4  # prices to begin with
_LEAST_SHARE = 0.02  # of the newest best replicas in their running mean


@dataclass(slots=True)
class ReplicaPrices:
    """The multipliers that replicas add, and the running mean of the replicas that are best."""

    near: list[np.ndarray]  # per group [P, k, k]: of a replica of pick i beside pick j; >= 0
    extra: list[np.ndarray]  # per group [P, k]: of each replica of pick i; >= 0
    crowd: np.ndarray  # [E] of the replica slots beside a primary; >= 0
    beside: np.ndarray  # [E, E] Z
    count: np.ndarray  # [E] rho


def touched_with_replicas(problem: Relaxation, experts: int, rounds: int) -> float:
    """No plan whose nodes have as many slots as the blocks of ``problem`` touches fewer nodes per
    token; its vertices above ``experts`` are the replica slots, and no pattern has them.
    """
    shape = [group.members.shape for group in problem.groups]
    prices = relaxation.start_prices(problem)
    more = ReplicaPrices(
        near=[np.full((count, k, k), _NEAR) for count, k in shape],
        extra=[np.full((count, k), _EXTRA) for count, k in shape],
        crowd=np.zeros(experts),
        beside=np.zeros((experts, experts)),
        count=np.full(experts, problem.num_vertices / experts - 1),
    )
    for some, smoothing in relaxation.cooled(rounds, cooling=_COOLING):
        _improve(problem, prices, more, some, smoothing)
    return max(0.0, _certify(problem, prices, more))


def _improve(
    problem: Relaxation, prices: Prices, more: ReplicaPrices, rounds: range, smoothing: float
) -> None:
    """Steps on all prices, in place."""
    step_up, step_down = relaxation.steps_of(problem, smoothing)
    share, experts = 1.0 / problem.num_tokens, len(more.count)
    for done in rounds:
        cost, near, extra = problem.cost.copy(), np.zeros((experts, experts)), np.zeros(experts)
        for group, w, z, u in zip(problem.groups, prices.pairs, more.near, more.extra, strict=True):
            part = np.zeros_like(cost)
            where = (*group.arrays, problem.num_nodes, prices.ahead, more.beside, more.count)
            _move(*where, w, z, u, smoothing, step_up, part, near, extra)
            cost -= 0.5 * share * part
        _, beside, count = _best_replicas(problem, near * share, extra * share, more.crowd)
        weight = max(2.0 / (done + 2), _LEAST_SHARE)
        more.beside += weight * (beside - more.beside)
        more.count += weight * (count - more.count)
        over = more.beside.sum(axis=0) - prices.ahead[experts:, :experts].sum(axis=0)
        more.crowd = np.maximum(more.crowd + 0.25 / step_down / problem.num_vertices * over, 0.0)
        _add_crowd(cost, more.crowd)
        relaxation.descend(problem, prices, cost, step_down)


def _certify(problem: Relaxation, prices: Prices, more: ReplicaPrices) -> float:
    """The bound that the prices prove, per token."""
    share, lowest, experts = 1.0 / problem.num_tokens, 0.0, len(more.count)
    cost, near, extra = problem.cost.copy(), np.zeros((experts, experts)), np.zeros(experts)
    for group, w, z, u in zip(problem.groups, prices.pairs, more.near, more.extra, strict=True):
        part = np.zeros_like(cost)
        lowest += _lowest(*group.arrays, problem.num_nodes, w, z, u, part, near, extra)
        cost -= 0.5 * share * part
    most, _, _ = _best_replicas(problem, near * share, extra * share, more.crowd)
    _add_crowd(cost, more.crowd)
    touched = lowest * share
    bound = relaxation.close(problem, prices, cost, touched - most)
    return bound - ROUNDING * (touched + most)


def _add_crowd(cost: np.ndarray, crowd: np.ndarray) -> None:
    experts = len(crowd)
    cost[experts:, :experts] -= 0.5 * crowd
    cost[:experts, experts:] -= 0.5 * crowd[:, None]


def _best_replicas(
    problem: Relaxation, near: np.ndarray, extra: np.ndarray, crowd: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """(most that replicas can collect, their Z [E, E], their rho [E]): the largest gains, for each
    further replica of an expert collects no more than the one before.
    """
    experts, nodes, others = len(extra), problem.num_nodes, problem.node_size - 1
    worth = np.maximum(near - crowd, 0.0)
    np.fill_diagonal(worth, 0.0)
    order = np.argsort(-worth, axis=1, kind="stable")
    gains = np.repeat(extra[:, None], nodes - 1, axis=1)
    for turn in range(nodes - 1):
        some = order[:, turn * others : (turn + 1) * others]
        gains[:, turn] += np.take_along_axis(worth, some, axis=1).sum(axis=1)
    chosen = np.argsort(-gains, axis=None, kind="stable")[: problem.num_vertices - experts]
    count = np.bincount(chosen // (nodes - 1), minlength=experts)
    beside = np.zeros((experts, experts))
    for e in np.flatnonzero(count):
        some = order[e, : count[e] * others]
        beside[e, some] = worth[e, some] > 0
    return float(gains.ravel()[chosen].sum()), beside, count.astype(np.float64)


@compiled
def _sum_near(z, k, reach):
    """reach [k, 2^k]: the price of a replica of pick i on a block."""
    for i in range(k):
        for top in range(k):
            for rest in range(1 << top):
                reach[i, rest | 1 << top] = reach[i, rest] + z[i, top]


@compiled
def _cover(blocks, first, last, k, u, reach, nodes):
    """The cheapest way to serve a token whose primaries are in the blocks of a partition: (touched
    + prices, blocks that are kept as bits, nodes without a primary that serve the rest, further
    nodes that are in some smallest cover).
    """
    count, least = last - first, u.min()
    own = least if nodes <= 4 else 0.0  # of a further node; of many, some need none
    everything = (1 << count) - 1
    best, kept, bare, more = float(count), everything, 0, 0
    price_of = np.zeros(count)
    for b in range(count):
        for i in range(k):
            if blocks[first + b] >> i & 1:
                price_of[b] += u[i]
    for g in range(1, nodes - count + 1):  # each of them has a replica of its own
        value = count - g / (nodes - 1) + price_of.min()
        value += (g - 1) * (least if count > 1 else price_of[0])
        if value < best:
            best, more = value, g
    for some in range(everything):
        apart, size, whole, most = 0.0, 0, np.inf, 0.0
        for b in range(count):
            if some >> b & 1:
                size, whole = size + 1, min(whole, price_of[b])
            else:
                apart, most = apart + price_of[b], max(most, price_of[b])
        if apart >= best:
            continue
        near = apart
        for b in range(first, last):
            for i in range(k):
                if blocks[b] >> i & 1 and not some >> (b - first) & 1:
                    near += reach[i, _nearest(blocks, first, last, some, i, reach)]
        for empty in range(min(nodes - count, count - size - 1) + 1):
            cover = size + empty
            if cover == 0:
                continue
            price = apart if empty else near
            for g in range(nodes - cover + 1):
                value = cover - g / (nodes - 1) + price
                if cover == 1:  # each of them has all picks
                    value += g * u.sum() - min(apart, g * most)
                elif g:
                    value += (least if empty else whole) + (g - 1) * own
                if value < best:
                    best, kept, bare, more = value, some, empty, g
    return best, kept, bare, more


@compiled
def _nearest(blocks, first, last, some, i, reach):
    """The block of ``some`` on which a replica of pick i is cheapest; 0: there is none."""
    best = 0
    for b in range(first, last):
        if some >> (b - first) & 1 and (best == 0 or reach[i, blocks[b]] < reach[i, best]):
            best = blocks[b]
    return best


@compiled
def _weigh(blocks, starts, k, w, z, u, nodes, price, pull, reach, totals, covers):
    """Fill totals [partitions] and covers [partitions, 3]; return the lowest total."""
    block_prices(w, k, price, pull)
    _sum_near(z, k, reach)
    lowest = np.inf
    for p in range(len(starts) - 1):
        first, last = starts[p], starts[p + 1]
        found = _cover(blocks, first, last, k, u, reach, nodes)
        totals[p] = found[0] - (last - first)
        covers[p, 0], covers[p, 1], covers[p, 2] = found[1], found[2], found[3]
        for b in range(first, last):
            totals[p] += price[blocks[b]]
        lowest = min(lowest, totals[p])
    return lowest


@compiled
def _lowest(members, tokens, blocks, starts, nodes, w, z, u, cost, near, extra):
    """Sum over tokens of the exact minimum; adds tokens x prices to cost, near and extra."""
    num, k = members.shape
    price, pull, reach = np.zeros(1 << k), np.zeros(1 << k), np.zeros((k, 1 << k))
    totals, covers = np.zeros(len(starts) - 1), np.zeros((len(starts) - 1, 3), np.int64)
    found = 0.0
    for t in range(num):
        best = _weigh(
            blocks, starts, k, w[t], z[t], u[t], nodes, price, pull, reach, totals, covers
        )
        found += tokens[t] * best
        _collect(members[t], tokens[t], w[t], z[t], u[t], cost, near, extra)
    cost += cost.T.copy()
    return found


@compiled
def _collect(picks, tokens, w, z, u, cost, near, extra):
    for i in range(len(picks)):
        e = picks[i]
        extra[e] += tokens * u[i]
        for j in range(len(picks)):
            if j < i:
                cost[e, picks[j]] += tokens * w[i * (i - 1) // 2 + j]
            if j != i:
                near[e, picks[j]] += tokens * z[i, j]


@compiled
def _count(blocks, first, last, k, weight, u, reach, nodes, cover, together, by, copies):
    """Add the pairs and the replicas of a partition and its ``_cover``."""
    kept, bare, more = cover
    size = 0
    for b in range(first, last):
        stays = kept >> (b - first) & 1
        size += stays
        for i in range(k):
            if not blocks[b] >> i & 1:
                continue
            for j in range(i):
                together[i, j] += weight * (blocks[b] >> j & 1)
            if stays:
                continue
            copies[i] += weight
            at = 0 if bare else _nearest(blocks, first, last, kept, i, reach)
            for j in range(k):
                by[i, j] += weight * (at >> j & 1)
    if more:
        _count_more(blocks, first, last, k, weight, u, kept, size + bare, bare, more, nodes, copies)


@compiled
def _count_more(blocks, first, last, k, weight, u, kept, cover, bare, more, nodes, copies):
    """Add the replicas that bring further nodes into a smallest cover."""
    best, chosen = -1.0, 0  # the block that replaces the cover, or that is replaced
    apart, dropped = 0.0, 0
    for b in range(first, last):
        price, stays = 0.0, kept >> (b - first) & 1
        for i in range(k):
            if blocks[b] >> i & 1:
                price += u[i]
        if not stays:
            apart, dropped = apart + price, dropped | blocks[b]
        fits = price > best if cover == 1 else best < 0 or price < best
        if fits and stays == (cover > 1):
            best, chosen = price, blocks[b]
    if cover == 1:
        spared, times = (chosen, more) if more * best <= apart else (dropped, 1)
        for i in range(k):
            copies[i] += weight * (more - times * (spared >> i & 1))
        return
    own = more - 1 if nodes <= 4 or dropped == 0 else 0
    copies[np.argmin(u)] += weight * (own + (bare > 0))
    for i in range(k):
        copies[i] += weight * (chosen >> i & 1 if bare == 0 else 0)


@compiled
def _move(
    members, tokens, blocks, starts, nodes, ahead, beside, count,
    w, z, u, smoothing, step, cost, near, extra,
):  # fmt: skip
    """``relaxation._move_prices`` with replicas; adds tokens x prices to cost, near and extra."""
    num, k = members.shape
    price, pull, reach = np.zeros(1 << k), np.zeros(1 << k), np.zeros((k, 1 << k))
    totals, covers = np.zeros(len(starts) - 1), np.zeros((len(starts) - 1, 3), np.int64)
    together, by, copies = np.zeros((k, k)), np.zeros((k, k)), np.zeros(k)
    for t in range(num):
        low = _weigh(blocks, starts, k, w[t], z[t], u[t], nodes, price, pull, reach, totals, covers)
        together[:], by[:], copies[:], whole = 0.0, 0.0, 0.0, 0.0
        for p in range(len(totals)):
            weight = np.exp((low - totals[p]) / smoothing)
            whole += weight
            if weight > 1e-4:
                part = (blocks, starts[p], starts[p + 1], k, weight, u[t], reach, nodes, covers[p])
                _count(*part, together, by, copies)
        for i in range(k):
            e = members[t, i]
            u[t, i] = max(u[t, i] + step * (copies[i] / whole - count[e]), 0.0)
            for j in range(k):
                f = members[t, j]
                if j < i:
                    w[t, i * (i - 1) // 2 + j] += step * (together[i, j] / whole - ahead[e, f])
                if j != i:
                    z[t, i, j] = max(z[t, i, j] + step * (by[i, j] / whole - beside[e, f]), 0.0)
        _collect(members[t], tokens[t], w[t], z[t], u[t], cost, near, extra)
    cost += cost.T.copy()
