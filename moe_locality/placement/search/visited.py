"""Which nodes hold which experts, and who serves whom, under the rule "visited".

Under that rule the picks of a token decide together which nodes it visits (``placement.serving``),
so a change of one expert changes tokens whole: every step counts the tokens of the experts that it
touches again, in compiled loops over the distinct token patterns. Steps exchange experts and
replicas as in ``replica_moves``, or draw another list of the nodes that may serve one expert for
homes on one node: leaving a node out of a list, or putting another one first, gives up a few copies
to level the nodes.

Shapes: N distinct patterns of a layer, K picks, E experts, M nodes, S samples of the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_locality.placement.count_kernels import choose_node, compiled, serve_token
from moe_locality.placement.search.load_noise import Noise, expected_shared_imbalance, few_draws
from moe_locality.placement.search.replica_moves import propose, put
from moe_locality.placement.search.replicas import Candidate, sample
from moe_locality.placement.search.swaps import (
    distinct_rows,
    metropolis_loss,
    next_random,
    priced_highest,
    rows_by_value,
)
from moe_locality.placement.serving import choose_serving_nodes, order_nodes

MAX_TOKENS, FEW_TOKENS = 1 << 16, 1 << 14
"""Costs are counted on a sample of so many tokens, where there are more; the steps of the search
see the smaller one: more steps find more than more tokens.
"""

STEPS, VISITS = 16_000, 1 << 26
"""Changes tried for one placement of a layer, if they count no more patterns again than that."""

HOT, COLD = 3e-3, 1e-4
"""First and last temperature, as shares of the copies of the start."""

LIST_SHARE = 0.1
"""Share of the steps that change a list, the others change places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """The distinct tokens of a layer.

    ids: int16 [N, K] rising picks, -1 = none. weight: [N] tokens with them. home: [N] their home
    node, -1: homes are uniform. first [E + 1], index: the patterns of each expert.
    """

    ids: np.ndarray
    weight: np.ndarray
    home: np.ndarray
    first: np.ndarray
    index: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.ids, self.weight, self.home, self.first, self.index

    @property
    def count(self) -> int:
        return int(self.weight.sum())


def distinct_tokens(
    ids: np.ndarray, home_node: np.ndarray, num_experts: int, seed: int, most: int = MAX_TOKENS
) -> Tokens:
    """Join those of at most ``most`` tokens ids [T, K] with the same picks and home node ([T], or
    empty: uniform).
    """
    home = home_node if home_node.size else np.full(len(ids), -1)
    rows = sample(len(ids), most, seed)
    ids, home = ids[rows], home[rows]
    key = np.concatenate([home[:, None], np.sort(ids, axis=1)], axis=1).astype(np.int16)
    chosen, weight = distinct_rows(key)
    picks = np.ascontiguousarray(key[chosen, 1:])
    first, index = rows_by_value(picks, num_experts)
    return Tokens(
        ids=picks, weight=weight, home=key[chosen, 0].astype(np.int64), first=first, index=index
    )


def served_visited(
    tokens: Tokens, load: np.ndarray, noise: Noise, held: np.ndarray, choices: np.ndarray
) -> Candidate:
    """A placement with what it costs under the rule; ``load`` [E]: picks in the whole trace;
    ``held`` and ``choices``: as in ``Candidate``.
    """
    nodes = len(held)
    copies, served = count_served(tokens.ids, tokens.weight, tokens.home, choices, nodes)
    units = tokens.count * (1 if (tokens.home >= 0).any() else nodes)
    share = served / np.maximum(served.sum(axis=0), 1)
    return Candidate(
        held=held,
        served_load=share * load,
        copies=float(copies) / max(units, 1),
        imbalance=expected_shared_imbalance(share, load.astype(np.float64), noise),
        choices=choices,
    )


def all_holders(held: np.ndarray, first: np.ndarray) -> np.ndarray:
    """[M, E, M] every node that holds an expert may serve it, the node ``first`` [M, E] preferred;
    M columns, so that lists may grow.
    """
    found = order_nodes(held.T[None], first[None])[0]
    more = len(held) - found.shape[2]
    return np.pad(found, ((0, 0), (0, 0), (0, more)), constant_values=-1)


def begun(tokens: Tokens, load: np.ndarray, noise: Noise, held: np.ndarray) -> Candidate:
    """The places of the rule "home": its node is preferred, every other one that holds the expert
    may serve.
    """
    first = choose_serving_nodes(held.T[None], load[None].astype(np.int64))[0]
    return served_visited(tokens, load, noise, held, all_holders(held, first))


def renamed(choices: Sequence[np.ndarray], orders: Sequence[list[int]]) -> np.ndarray:
    """[L, M, E, M] lists of nodes, where ``orders`` say which of the searched nodes comes first,
    second, ...
    """
    names = [np.append(np.argsort(order), -1) for order in orders]  # -1 stays
    each = zip(names, choices, orders, strict=True)
    return np.stack([name[some][order] for name, some, order in each])


def searched_visited(
    whole: Tokens,
    load: np.ndarray,
    noise: Noise,
    tokens: Tokens,
    start: Candidate,
    price: float,
    limit: float,
    seed: int,
) -> Candidate:
    """Places and lists with few copies plus ``price`` times the imbalance to expect.

    Costs are counted on ``whole``, the search sees ``tokens``. ``start`` has lists of M columns.
    ``price``: copies per token that an imbalance higher by one is worth. ``limit``: imbalance that
    the layer should not exceed.
    """
    nodes, experts = start.held.shape
    assert start.choices is not None
    homes = 1 if (tokens.home >= 0).any() else nodes
    visits = (2 - LIST_SHARE) * len(tokens.index) / experts * homes / nodes
    steps = int(min(STEPS, VISITS / max(visits, 1)))
    picks = float(tokens.weight[tokens.index].sum()) * homes
    if start.copies == 0 or steps == 0 or start.held.all() or picks == 0:
        return start
    share = start.served_load / np.maximum(load, 1)
    variance = np.einsum("me,ef,mf->m", share, noise.covariance, share)
    deviation = noise.deviation * np.sqrt(np.maximum(variance, 0)) * picks / load.sum()
    units = tokens.count * homes
    held, choices = anneal_visited(
        *tokens.arrays, start.held.copy(), start.choices.copy(), steps,
        HOT * start.copies * units, COLD * start.copies * units,
        price * units * nodes / picks, limit * picks / nodes,
        deviation, few_draws(nodes), LIST_SHARE, seed,
    )  # fmt: skip
    return served_visited(whole, load, noise, held, choices)


@compiled
def count_served(ids, weight, home, choices, nodes):
    """(copies summed over the tokens and their homes, [M, E] picks that each node serves)."""
    served = np.zeros((nodes, choices.shape[1]), np.int64)
    copies = np.int64(0)
    found, later = np.empty(ids.shape[1], np.int64), np.empty(ids.shape[1], np.int64)
    for i in range(len(ids)):
        for h in range(nodes):
            if home[i] >= 0 and home[i] != h:
                continue
            mask = serve_token(ids[i], h, choices[h], found, later)
            copies += (_bits(mask) - 1) * weight[i]
            for k in range(len(found)):
                if found[k] >= 0:
                    served[found[k], ids[i, k]] += weight[i]
    return copies, served


@compiled
def _bits(mask):
    count = 0
    while mask:
        mask &= mask - 1
        count += 1
    return count


@compiled
def _visit(row, home, alone, choices, later, loads):
    """Copies of a token (of all homes where ``home`` is -1); fill loads [M] with its picks.

    ``alone`` [E]: the node of experts that one node holds, -1 of others.
    """
    nodes, one = len(loads), np.int64(1)
    sure, count = np.int64(0), 0
    loads[:] = 0
    for e in row:
        if e < 0:
            continue
        node = alone[e]
        if node >= 0:
            sure |= one << node
            loads[node] += nodes if home < 0 else 1
        else:
            later[count] = e
            count += 1
    if count == 0 and home < 0:
        return (nodes - 1) * _bits(sure)
    copies = 0
    for h in range(nodes) if home < 0 else range(home, home + 1):
        mask = sure | one << h
        for e in later[:count]:
            if choices[h, e, 1] < 0:
                mask |= one << choices[h, e, 0]
        for e in later[:count]:
            node = choose_node(choices[h, e], mask)
            mask |= one << node
            loads[node] += 1
        copies += _bits(mask) - 1
    return copies


@compiled
def _list_holders(held, e, alone, choices, node_load):
    """Every node that holds e may serve it, the one with least load preferred."""
    nodes = len(held)
    holders = np.flatnonzero(held[:, e])
    holders = holders[np.argsort(node_load[holders], kind="mergesort")]
    alone[e] = holders[0] if len(holders) == 1 else -1
    for h in range(nodes):
        choices[h, e] = -1
        if held[h, e]:
            choices[h, e, 0] = h
        else:
            choices[h, e, : len(holders)] = holders


@compiled
def _draw_list(held, alone, choices, state):
    """Draw another list for homes on some node, in random order and length; return its expert, -1
    where none was found that several nodes hold.
    """
    nodes, experts = held.shape
    for _ in range(4 * experts):
        e, h = next_random(state) % experts, next_random(state) % nodes
        if alone[e] < 0 and not held[h, e]:
            holders = np.flatnonzero(held[:, e])
            size = 1 + next_random(state) % len(holders)
            choices[h, e] = -1
            for place in range(size):
                other = place + next_random(state) % (len(holders) - place)
                holders[place], holders[other] = holders[other], holders[place]
                choices[h, e, place] = holders[place]
            return e
    return -1


@compiled
def _count_again(tokens, some, alone, choices, tick, seen, known, new, found, load):
    """(How many patterns the experts ``some`` have, change of copies): fill found [N] with them and
    new (copies [N], loads [N, M]) with their costs; load [M] is brought up to date.
    """
    ids, weight, home, first, index = tokens
    later = np.empty(ids.shape[1], np.int64)
    count, change = 0, np.int64(0)
    for e in some:
        for place in range(first[e], first[e + 1]):
            i = index[place]
            if seen[i] == tick:
                continue
            seen[i] = tick
            new[0][count] = _visit(ids[i], home[i], alone, choices, later, new[1][count])
            change += (new[0][count] - known[0][i]) * weight[i]
            for node in range(len(load)):
                load[node] += (new[1][count, node] - known[1][i, node]) * weight[i]
            found[count] = i
            count += 1
    return count, change


@compiled
def _first_count(tokens, held, copies_of, choices, load):
    """(alone [E], known, new, found, seen, copies) of the start; load [M] is filled."""
    nodes, experts = held.shape
    size, alone = len(tokens[0]), np.full(experts, -1, np.int64)
    for e in range(experts):
        if copies_of[e] == 1:
            alone[e] = np.argmax(held[:, e])
    known = (np.zeros(size, np.int64), np.zeros((size, nodes), np.int64))
    new = (np.zeros(size, np.int64), np.zeros((size, nodes), np.int64))
    found, seen = np.empty(size, np.int64), np.full(size, -1, np.int64)
    count, copies = _count_again(
        tokens, np.arange(experts), alone, choices, -2, seen, known, new, found, load
    )
    _keep(known, new, found, count)
    return alone, known, new, found, seen, copies


@compiled
def anneal_visited(
    ids, weight, home, first, index, held, choices, steps, hot, cold, price, limit, deviation,
    draws, list_share, seed,
):  # fmt: skip
    """(held, choices) of the state of least cost that simulated annealing over places and lists
    meets; held [M, E] and choices [M, E, M] are changed.

    Cost = copies + price * expected load of the busiest node, whose standard deviations [M] stay
    those of the start; load above the ``limit`` counts more (``swaps.priced_highest``).
    """
    tokens = (ids, weight, home, first, index)
    copies_of, load = held.sum(axis=0), np.zeros(len(held))
    state, room = np.array([np.uint64(seed)]), np.empty(draws.shape[1])
    alone, known, new, found, seen, total = _first_count(tokens, held, copies_of, choices, load)
    level = priced_highest(load, deviation, draws, room, limit)
    best_held, best_choices, least = held.copy(), choices.copy(), total + price * level
    some, before, after = np.zeros(2, np.int64), choices.copy(), load.copy()
    for step in range(steps):
        temperature = hot * (cold / hot) ** (step / steps)
        a, e, b, f = propose(held, copies_of, state)
        lists = next_random(state) % 1024 < list_share * 1024
        if lists:
            e = _draw_list(held, alone, choices, state)
            f = e
        elif a >= 0:
            put(held, a, e, b, f)
            _list_holders(held, e, alone, choices, load)
            _list_holders(held, f, alone, choices, load)
        if e < 0 or (not lists and a < 0):
            continue
        some[0], some[1], after[:] = e, f, load
        count, change = _count_again(
            tokens, some, alone, choices, step, seen, known, new, found, after
        )
        now = priced_highest(after, deviation, draws, room, limit)
        if change + price * (now - level) <= temperature * metropolis_loss(state):
            _keep(known, new, found, count)
            load[:], total, level = after, total + change, now
            before[:, e], before[:, f] = choices[:, e], choices[:, f]
            if not lists and b < 0:
                copies_of[e] -= 1
                copies_of[f] += 1
            if total + price * level < least:
                best_held[:], best_choices[:], least = held, choices, total + price * level
            continue
        choices[:, e], choices[:, f] = before[:, e], before[:, f]
        if not lists:
            put(held, a, f, b, e)
            for x in some:
                alone[x] = np.argmax(held[:, x]) if copies_of[x] == 1 else -1
    return best_held, best_choices


@compiled
def _keep(known, new, found, count):
    for place in range(count):
        known[0][found[place]] = new[0][place]
        known[1][found[place]] = new[1][place]
