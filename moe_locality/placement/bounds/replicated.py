"""Lower bounds on copies where nodes have more slots than their share of the experts.

Homes are uniform; who serves a pick is left open, so the bounds hold under every serving rule, and
for plans of any balance. One holder of each expert is called its primary, the R other slots are
replicas. Primaries and replicas are E + R vertices in equal blocks: ``relaxation`` bounds the
blocks Y. Z_ej says that a replica of expert e is on the node of the primary of j, rho_e counts the
replicas of e. A node with b primaries has s - b replicas, so

    sum_e Z_ej <= sum of Y_rj over the replica slots r,  sum_j Z_ej <= (s - 1) rho_e,  sum rho = R.

The blocks of the primaries of a token's picks are what it touches without replicas. A block is
spared for all homes if every pick of it has a replica on another block, which Z knows, or for few
homes if one has them on nodes without a primary (at most ``gain`` per such replica; ``spare`` adds
up the homes). What is spared is never more than the sum over blocks of what each could be. So with
prices w on pairs Y, z on Z and u on rho, all multipliers of constraints, any z, u >= 0 prove

    touched >= sum_t min over partitions, spared blocks (blocks left + prices) - <w, Y> - most of
               the prices that any Z and rho can collect.

Shapes: as in ``relaxation``; E experts, s slots of a node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np

from moe_locality.placement.bounds.relaxation import (
    ROUNDING,
    Prices,
    Relaxation,
    block_prices,
    close,
    descend,
    start_prices,
    steps_of,
)

_SMOOTHING, _COOLING, _LEAST_SMOOTHING = 0.15, 0.97, 0.01
_AT_ONCE = 10
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
    prices, more = (
        start_prices(problem),
        ReplicaPrices(
            near=[np.full((count, k, k), _NEAR) for count, k in shape],
            extra=[np.full((count, k), _EXTRA) for count, k in shape],
            crowd=np.zeros(experts),
            beside=np.zeros((experts, experts)),
            count=np.full(experts, problem.num_vertices / experts - 1),
        ),
    )
    for done in range(0, rounds, _AT_ONCE):
        some = range(done, min(done + _AT_ONCE, rounds))
        smoothing = max(_SMOOTHING * _COOLING**done, _LEAST_SMOOTHING)
        _improve(problem, prices, more, some, smoothing)
    return max(0.0, _certify(problem, prices, more))


def _improve(
    problem: Relaxation, prices: Prices, more: ReplicaPrices, rounds: range, smoothing: float
) -> None:
    """Steps on all prices, in place."""
    step_up, step_down = steps_of(problem, smoothing)
    share, experts = 1.0 / problem.num_tokens, len(more.count)
    gain = empty_gain(problem.num_nodes)
    for done in rounds:
        cost, near, extra = _tables(problem, experts)
        for group, w, z, u in zip(problem.groups, prices.pairs, more.near, more.extra, strict=True):
            part = np.zeros_like(cost)
            where = (group.members, group.tokens, *group.partitions.arrays, gain)
            primal = (prices.ahead, more.beside, more.count)
            _move(*where, *primal, w, z, u, smoothing, step_up, part, near, extra)
            cost -= 0.5 * share * part
        _, beside, count = _best_replicas(problem, near * share, extra * share, more.crowd)
        weight = max(2.0 / (done + 2), _LEAST_SHARE)
        more.beside += weight * (beside - more.beside)
        more.count += weight * (count - more.count)
        over = more.beside.sum(axis=0) - prices.ahead[experts:, :experts].sum(axis=0)
        more.crowd = np.maximum(more.crowd + 0.25 / step_down / problem.num_vertices * over, 0.0)
        _add_crowd(cost, more.crowd)
        descend(problem, prices, cost, step_down)


def _certify(problem: Relaxation, prices: Prices, more: ReplicaPrices) -> float:
    """The bound that the prices prove, per token."""
    share, lowest, experts = 1.0 / problem.num_tokens, 0.0, len(more.count)
    cost, near, extra = _tables(problem, experts)
    gain = empty_gain(problem.num_nodes)
    for group, w, z, u in zip(problem.groups, prices.pairs, more.near, more.extra, strict=True):
        part = np.zeros_like(cost)
        where = (group.members, group.tokens, *group.partitions.arrays, gain)
        lowest += _lowest(*where, w, z, u, part, near, extra)
        cost -= 0.5 * share * part
    most, _, _ = _best_replicas(problem, near * share, extra * share, more.crowd)
    _add_crowd(cost, more.crowd)
    return close(problem, prices, cost, lowest * share - most) - ROUNDING * (lowest * share + most)


def _tables(problem: Relaxation, experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cost [n, n], sums of the prices by pair [E, E] and by expert [E]), to add to."""
    return problem.cost.copy(), np.zeros((experts, experts)), np.zeros(experts)


def _add_crowd(cost: np.ndarray, crowd: np.ndarray) -> None:
    experts = len(crowd)
    cost[experts:, :experts] -= 0.5 * crowd
    cost[:experts, experts:] -= 0.5 * crowd[:, None]


def empty_gain(nodes: int) -> np.ndarray:
    """[M + 1]: by the blocks of a token, what it touches less for a replica on a node without a
    primary of its picks, at most, as a share of the homes other than that of a block.

    Homes there visit no other node for the pick. c such picks on one node are worth going there
    too: for c homes c - 2 nodes are spared, for the M - 1 - c others c - 1.
    """
    gain = np.zeros(nodes + 1)
    for blocks in range(1, nodes):
        some = range(1, blocks + 1)
        more = [max(c * (c - 2) + (nodes - 1 - c) * (c - 1), 0) / c for c in some]
        gain[blocks] = (1 + max(more)) / (nodes - 1)
    return gain


def _best_replicas(
    problem: Relaxation, near: np.ndarray, extra: np.ndarray, crowd: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """(most that replicas can collect, their Z [E, E], their rho [E]).

    Each further replica of an expert collects no more than the one before, so the largest ones are
    the best choice.
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


@numba.njit(cache=True, nogil=True)
def _sum_near(z, k, reach):
    """reach [k, 2^k]: the price of a replica of pick i on a block."""
    for i in range(k):
        for top in range(k):
            for rest in range(1 << top):
                reach[i, rest | 1 << top] = reach[i, rest] + z[i, top]


@numba.njit(cache=True, nogil=True)
def _spare(blocks, first, last, place, k, u, reach, gain):
    """(blocks touched less + prices, kind) of the best way to spare a block of a partition: 0 none,
    1 replicas on other blocks, q + 1 replicas on q nodes without a block.
    """
    near, apart, least, block = 0.0, 0.0, np.inf, blocks[place]
    for i in range(k):
        if block >> i & 1:
            low = np.inf
            for other in range(first, last):
                if other != place:
                    low = min(low, reach[i, blocks[other]])
            near += u[i] + low
            apart += u[i]
            least = min(least, u[i])
    best, kind = 0.0, 0
    if near - 1.0 < best:
        best, kind = near - 1.0, 1
    for q in range(1, len(gain) - (last - first)):
        value = apart + (q - 1) * least - min(1.0, q * gain[last - first])
        if value < best:
            best, kind = value, q + 1
    return best, kind


@numba.njit(cache=True, nogil=True)
def _weigh(blocks, starts, k, w, z, u, gain, price, pull, reach, totals):
    """Fill totals [partitions]; return the lowest."""
    block_prices(w, k, price, pull)
    _sum_near(z, k, reach)
    lowest = np.inf
    for p in range(len(starts) - 1):
        totals[p] = 0.0
        for b in range(starts[p], starts[p + 1]):
            best, _ = _spare(blocks, starts[p], starts[p + 1], b, k, u, reach, gain)
            totals[p] += price[blocks[b]] + best
        lowest = min(lowest, totals[p])
    return lowest


@numba.njit(cache=True, nogil=True)
def _lowest(members, tokens, blocks, starts, gain, w, z, u, cost, near, extra):
    """Sum over tokens of the exact minimum; adds tokens x prices to cost, near and extra."""
    num, k = members.shape
    price, pull, reach = np.zeros(1 << k), np.zeros(1 << k), np.zeros((k, 1 << k))
    totals, found = np.zeros(len(starts) - 1), 0.0
    for t in range(num):
        best = _weigh(blocks, starts, k, w[t], z[t], u[t], gain, price, pull, reach, totals)
        found += tokens[t] * best
        _collect(members[t], tokens[t], w[t], z[t], u[t], cost, near, extra)
    cost += cost.T.copy()
    return found


@numba.njit(cache=True, nogil=True)
def _collect(picks, tokens, w, z, u, cost, near, extra):
    for i in range(len(picks)):
        e = picks[i]
        extra[e] += tokens * u[i]
        for j in range(len(picks)):
            if j < i:
                cost[e, picks[j]] += tokens * w[i * (i - 1) // 2 + j]
            if j != i:
                near[e, picks[j]] += tokens * z[i, j]


@numba.njit(cache=True, nogil=True)
def _count(blocks, first, last, k, weight, u, reach, gain, together, by, copies):
    """Add the pairs and replicas of a partition, and of how its blocks are spared best."""
    for b in range(first, last):
        _, kind = _spare(blocks, first, last, b, k, u, reach, gain)
        cheapest = -1
        for i in range(k):
            if not blocks[b] >> i & 1:
                continue
            for j in range(i):
                together[i, j] += weight * (blocks[b] >> j & 1)
            copies[i] += weight * (kind > 0)
            if cheapest < 0 or u[i] < u[cheapest]:
                cheapest = i
            if kind == 1:
                at = -1
                for c in range(first, last):
                    if c != b and (at < 0 or reach[i, blocks[c]] < reach[i, blocks[at]]):
                        at = c
                for j in range(k):
                    by[i, j] += weight * (blocks[at] >> j & 1)
        if kind > 2:
            copies[cheapest] += weight * (kind - 2)


@numba.njit(cache=True, nogil=True)
def _move(
    members, tokens, blocks, starts, gain, ahead, beside, count,
    w, z, u, smoothing, step, cost, near, extra,
):  # fmt: skip
    """One ascent step of every pattern's prices, see ``relaxation._move_prices``; adds tokens x
    prices to cost, near and extra.
    """
    num, k = members.shape
    price, pull, reach = np.zeros(1 << k), np.zeros(1 << k), np.zeros((k, 1 << k))
    totals = np.zeros(len(starts) - 1)
    together, by, copies = np.zeros((k, k)), np.zeros((k, k)), np.zeros(k)
    for t in range(num):
        low = _weigh(blocks, starts, k, w[t], z[t], u[t], gain, price, pull, reach, totals)
        together[:], by[:], copies[:], whole = 0.0, 0.0, 0.0, 0.0
        for p in range(len(totals)):
            weight = np.exp((low - totals[p]) / smoothing)
            whole += weight
            if weight > 1e-4:
                part = (blocks, starts[p], starts[p + 1], k, weight, u[t], reach, gain)
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
