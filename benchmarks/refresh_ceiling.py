"""The largest share of a re-solve's gain that any few swaps can bring, with hindsight.

Both sides are pairs of experts of one token that share a node, counted on the judged tokens. The
best one or two swaps of every layer are found by trying all, whatever they do to the balance, and a
knapsack shares the budget among the layers. The gain of moving everything is that of the best
placement known that is no less level than the plan. The first is never too small and the second
never too large, so the true share is no larger than what is returned.
"""

import numpy as np

from moe_locality.placement import PlacementPlan, evaluate, solve
from moe_locality.placement.counting import count_coactivation
from moe_locality.placement.refresh.improve import refresh
from moe_locality.placement.refresh.state import RefreshState
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace

CAPS = (1.0, 1.05, 1.1, 1.15, 1.2)
LEVEL_SLACK = 0.002


def most_share(
    judged: RoutingTrace, plan: PlacementPlan, topology: ClusterTopology, budgets: tuple[float, ...]
) -> dict[float, float]:
    """Share of the gain for every budget that pays for at most one swap per layer on average.

    A layer gets two swaps at most: third swaps, which gain less, are left out.
    """
    pairs = count_coactivation(judged).pairs.astype(np.float64)
    before = nodes_of(plan)
    start = inside(pairs, before).sum()
    state = RefreshState.from_trace(judged)
    most = evaluate(judged, plan).node_imbalance + LEVEL_SLACK
    whole = 0.0
    for cap in CAPS:
        for other in (
            refresh(plan, state, topology, move_budget=1.0, max_imbalance=cap).plan,
            solve(judged, topology, max_imbalance=cap),
        ):
            if evaluate(judged, other).node_imbalance <= most:
                whole = max(whole, float(inside(pairs, nodes_of(other)).sum() - start))
    gains = np.array([best_gains(p, b) for p, b in zip(pairs, before, strict=True)])
    found = {}
    for budget in budgets:
        swaps = int(budget * before.size + 1e-9) // 2
        if swaps <= len(gains):
            found[budget] = knapsack(gains, swaps) / max(whole, 1e-300)
    return found


def nodes_of(plan: PlacementPlan) -> np.ndarray:
    """[L, E] node of each expert of a plan without replicas."""
    table = plan.physical_to_logical_map.astype(np.int64)
    found = np.empty_like(table)
    node_of_slot = plan.node_of_rank.astype(np.int64)[plan.rank_of_slot]
    np.put_along_axis(found, table, np.broadcast_to(node_of_slot, table.shape), axis=1)
    return found


def inside(pairs: np.ndarray, node_of: np.ndarray) -> np.ndarray:
    """[L] pairs of picks on one node."""
    return (pairs * (node_of[:, :, None] == node_of[:, None, :])).sum(axis=(1, 2)) / 2


def swap_gains(pairs: np.ndarray, node_of: np.ndarray) -> np.ndarray:
    """[E, E] pairs that come onto one node when two experts change places; 0 on the same node."""
    near = pairs @ (node_of[:, None] == np.arange(node_of.max() + 1))
    to = near[:, node_of]  # [i, j]: pairs of i on the node of j
    own = np.diagonal(to)
    gain = to + to.T - own[:, None] - own[None, :] - 2 * pairs
    return np.where(node_of[:, None] == node_of[None, :], 0.0, gain)


def best_gains(pairs: np.ndarray, node_of: np.ndarray) -> tuple[float, float, float]:
    """The most pairs gained by no, one and two swaps of one layer: all of them are tried."""
    pairs = pairs.copy()
    np.fill_diagonal(pairs, 0)
    first = swap_gains(pairs, node_of)
    one, two = max(float(first.max()), 0.0), 0.0
    for i, j in zip(*np.nonzero(node_of[:, None] < node_of[None, :]), strict=True):
        after = node_of.copy()
        after[i], after[j] = node_of[j], node_of[i]
        two = max(two, float(first[i, j] + swap_gains(pairs, after).max()))
    return 0.0, one, max(one, two)


def knapsack(gains: np.ndarray, swaps: int) -> float:
    """The most that so many swaps gain, up to two of them in a layer; gains [L, 3]."""
    best = np.zeros(swaps + 1)
    for layer in gains:
        after = best.copy()
        for used in (1, 2):
            if used <= swaps:
                after[used:] = np.maximum(after[used:], best[: swaps + 1 - used] + layer[used])
        best = after
    return float(best[-1])
