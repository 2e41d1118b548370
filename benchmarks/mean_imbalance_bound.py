"""The fewest copies of plans whose node imbalance is capped in the mean over the layers.

``lower_bounds`` caps every layer by itself. A plan that is judged by its mean imbalance may make
one layer less level and another one more, so its bound has to leave open how the allowance is
shared. For fixed multipliers the relaxation of a layer is a falling line in the cap c of that layer
(the multipliers of the load cap times c are taken off), and the line holds for *every* c. With the
lines of each layer as f_l(c) = max of its lines, and a price p on imbalance,

    sum_l f_l(c_l) >= sum_l min_c (f_l(c) + p c) - p L C    where mean c_l <= C,

again for any price: the Lagrangian dual (Everett, Operations Research 11, 1963).
"""

from __future__ import annotations

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.placement.bounds.lower import (
    FEWEST_ROUNDS,
    MOST_ROUNDS,
    STEPS_PER_SECOND,
    LayerTokens,
    cool,
)
from moe_locality.placement.bounds.relaxation import Prices, Relaxation, certify, start_prices
from moe_locality.placement.counting import map_layers
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import RoutingTrace

_SAFETY = 1e-9  # copies per token taken off a line: its two numbers are differences of larger ones
_PRICE_STEPS = 200


def bound_for_mean_imbalance(
    trace: RoutingTrace,
    topology: ClusterTopology,
    *,
    max_imbalance: float,
    seconds: float = 20.0,
) -> float:
    """No plan without replicas whose ``node_imbalance`` is at most ``max_imbalance`` (mean over the
    layers, as ``evaluate`` gives it) has fewer ``copies`` on this trace, homes uniform.

    seconds: effort for all layers together, about, on one core, as in ``lower_bounds``; a layer
    gets at least ``FEWEST_ROUNDS`` rounds.

    Raises:
        PlacementError: a trace of counts, a layer without picks, experts that do not divide among
            the nodes, or a cap below 1.
    """
    nodes, experts, layers = topology.num_nodes, trace.num_experts, trace.num_layers
    ids = trace.tokens_only("bounds").expert_ids
    if not trace.load().any(axis=1).all():
        raise PlacementError(
            "found a layer without picks, expected picks in all: its imbalance is not defined; "
            "leave it out with trace.filter(layers=...)"
        )
    if experts % nodes or not max_imbalance >= 1:
        raise PlacementError(
            f"found {experts} experts on {nodes} nodes and max_imbalance {max_imbalance}, expected "
            "a multiple of the nodes and at least 1"
        )
    budget = seconds * STEPS_PER_SECOND / max(layers, 1)

    def one(row: int) -> np.ndarray:
        layer = LayerTokens.of(ids[:, row], experts, nodes, None)
        return lines_of(layer, max_imbalance, budget)

    lines = map_layers(one, layers)
    return mean_bound(lines, max_imbalance, float(nodes))


def lines_of(layer: LayerTokens, max_imbalance: float, budget: float) -> np.ndarray:
    """[N, 2] (a, b): no placement with node loads up to c has fewer than a - b c copies per token.

    The last one is flat: it holds for any balance. budget: elementary steps.
    """
    capped = layer.relaxation(max_imbalance)
    rounds = int(np.clip(budget / 2 / capped.work_per_round, FEWEST_ROUNDS, MOST_ROUNDS))
    found = [(layer.as_copies(layer.fewest_blocks()), 0.0)]
    for problem in (capped, layer.relaxation(np.inf)):
        prices = start_prices(problem)
        cool(problem, prices, rounds)
        found.append(_line(layer, problem, prices, max_imbalance))
    return np.array(found)


def _line(
    layer: LayerTokens, problem: Relaxation, prices: Prices, cap: float
) -> tuple[float, float]:
    """What the prices prove, in copies per token, as a line in the cap on the node loads."""
    slope = 0.0
    if np.isfinite(problem.most_load):
        slope = float(np.maximum(prices.load, 0.0).sum()) * problem.node_size
    at_cap = certify(problem, prices)
    # affine: the copies of no blocks are 0, those of one block are the factor between the two
    factor = layer.as_copies(1.0)
    return factor * (at_cap + slope * cap) - _SAFETY, factor * slope


def mean_bound(lines: list[np.ndarray], most: float, largest: float) -> float:
    """The least mean of f_l(c_l) over c_l in [1, largest] with mean at most ``most``, from below.

    lines: [N, 2] (a, b) of each layer, f_l(c) = max (a - b c).
    """
    corners = [_corners(some, largest) for some in lines]
    prices = np.linspace(0, max(float(some[:, 1].max()) for some in lines), _PRICE_STEPS)
    total = np.zeros(len(prices))
    for some, points in zip(lines, corners, strict=True):
        values = (some[:, :1] - some[:, 1:] * points).max(axis=0)
        total += (values + prices[:, None] * points).min(axis=1)
    return float((total / len(lines) - prices * most).max())


def _corners(lines: np.ndarray, largest: float) -> np.ndarray:
    """[C] the caps where a convex f(c) + p c can be least: the ends, and where lines cross."""
    points = [1.0, largest]
    for i, (a, b) in enumerate(lines):
        for other_a, other_b in lines[:i]:
            if b != other_b:
                points.append((a - other_a) / (b - other_b))
    found = np.array(points)
    return found[(found >= 1) & (found <= largest)]
