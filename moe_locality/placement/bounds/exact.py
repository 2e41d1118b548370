"""Branch and bound: a proof that a placement is the best one, or a better bound.

A node of the tree knows of some pairs of vertices whether they are on one node; ``relaxation``
bounds what the placements that agree with it cost. The tree is cut where that is no better than
the placement that is known. Costs are whole numbers of (token, node) visits, so a bound is rounded
up. Best first; effort is counted in elementary steps, so the outcome does not depend on the clock.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_locality.placement.bounds.lower import LayerTokens, cool
from moe_locality.placement.bounds.relaxation import Relaxation, certify, start_prices

MOST_EXPERTS = 32
MOST_NODES = 4
ROOT_ROUNDS = 200
CHILD_ROUNDS = 40
MOST_OPEN = 400  # nodes that are kept: each holds the prices of all patterns
_CHILD_SMOOTHING = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What the search knows when it ends.

    bound: no placement has fewer visits. visits: of the best placement met, or of the known one.
    proved: the known placement is a best one. nodes: of the tree.
    """

    bound: int
    visits: int
    proved: bool
    nodes: int


def prove_layer(
    layer: LayerTokens, known_visits: int, max_imbalance: float, budget: float
) -> Proof:
    """Search for placements with fewer than ``known_visits`` visits within the load cap.

    Args:
        layer: the tokens; visits are tokens x nodes touched (the home among them, if given).
        budget: elementary steps.
    """
    problem = layer.relaxation(max_imbalance)
    prices = start_prices(problem)
    cool(problem, prices, ROOT_ROUNDS)
    spent = ROOT_ROUNDS * problem.work_per_round
    tree = [(_visits(problem, prices), 0, layer.fixed_pairs(), prices)]
    best, count, made = known_visits, 1, 1
    while tree and tree[0][0] < best and spent < budget and len(tree) < MOST_OPEN:
        _, _, fixed, prices = heapq.heappop(tree)
        pair = _pair_to_branch(problem, prices, fixed)
        for value in (1.0, 0.0):
            child = _fix(fixed, pair, value, problem)
            if child is None:
                continue
            if not np.isnan(child).any():
                best = min(best, _count(problem, child))
                continue
            part = layer.relaxation(max_imbalance, fixed=child)
            moved = prices.copy()
            cool(part, moved, CHILD_ROUNDS, smoothing=_CHILD_SMOOTHING)
            spent += CHILD_ROUNDS * part.work_per_round
            count += 1
            bound = _visits(part, moved)
            if bound < best:
                made += 1
                heapq.heappush(tree, (bound, made, child, moved))
    bound = min(best, tree[0][0]) if tree else best
    return Proof(bound=bound, visits=best, proved=bound >= best == known_visits, nodes=count)


def _visits(problem: Relaxation, prices: Any) -> int:
    """The bound in whole visits."""
    return int(np.ceil(certify(problem, prices) * problem.num_tokens - 1e-6))


def _pair_to_branch(problem: Relaxation, prices: Any, fixed: np.ndarray) -> tuple[int, int]:
    """The open pair that the relaxation is least sure of, weighed by the tokens that pick both."""
    n = problem.num_vertices
    weight = np.full((n, n), 1e-9)
    for group in problem.groups:
        for i in range(group.members.shape[1]):
            for j in range(i):
                np.add.at(weight, (group.members[:, j], group.members[:, i]), group.tokens)
    y = np.clip(prices.primal, 0.0, 1.0)
    unsure = weight * (0.01 + np.minimum(y, 1 - y))
    unsure[~np.isnan(fixed) | np.tril(np.ones((n, n), dtype=bool))] = -1.0
    i, j = np.unravel_index(int(np.argmax(unsure)), unsure.shape)
    return int(i), int(j)


def _fix(
    fixed: np.ndarray, pair: tuple[int, int], value: float, problem: Relaxation
) -> np.ndarray | None:
    """``fixed`` with one more pair and all that follows from it; None: no placement agrees.

    Follows: together is transitive, apart is shared by all of a set, sets that are full or too
    heavy to join are apart, and a vertex apart from all others but one set belongs to it only if
    it must, which is left to the relaxation.
    """
    fixed = fixed.copy()
    n, size = problem.num_vertices, problem.node_size
    i, j = pair
    if value == 1.0:
        together = (fixed[i] == 1) | (fixed[j] == 1)
        apart = (fixed[i] == 0) | (fixed[j] == 0)
        if (together & apart).any():
            return None
        fixed[np.ix_(together, together)] = 1.0
        fixed[np.ix_(together, apart)] = 0.0
        fixed[np.ix_(apart, together)] = 0.0
    else:
        first, second = fixed[i] == 1, fixed[j] == 1
        fixed[np.ix_(first, second)] = 0.0
        fixed[np.ix_(second, first)] = 0.0
    sets = np.unique((fixed == 1).argmax(axis=1))  # the lowest member stands for its set
    members = {int(s): fixed[s] == 1 for s in sets}
    for s, own in members.items():
        if own.sum() > size or problem.load[own].sum() > problem.most_load * (1 + 1e-12):
            return None
        if int((fixed[s] == 0).sum()) > n - size:
            return None
        for t, other in members.items():
            crowded = own.sum() + other.sum() > size
            heavy = problem.load[own].sum() + problem.load[other].sum() > problem.most_load * (
                1 + 1e-12
            )
            if s < t and np.isnan(fixed[s, t]) and (crowded or heavy):
                fixed[np.ix_(own, other)] = 0.0
                fixed[np.ix_(other, own)] = 0.0
    return fixed


def _count(problem: Relaxation, fixed: np.ndarray) -> int:
    """Visits of a placement that is known in full; beyond all counts if its nodes are uneven."""
    node_of = (fixed == 1).argmax(axis=1)
    _, sizes = np.unique(node_of, return_counts=True)
    if len(sizes) != problem.num_nodes or (sizes != problem.node_size).any():
        return np.iinfo(np.int64).max
    total = 0.0
    for group in problem.groups:
        touched = np.sort(node_of[group.members], axis=1)
        blocks = 1 + (touched[:, 1:] != touched[:, :-1]).sum(axis=1)
        total += float((blocks * group.tokens).sum())
    return round(total)
