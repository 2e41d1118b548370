"""How far a missed target is from what can be reached: plans made with hindsight, and bounds.

None of these rows is a result; their notes say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from placement_rows import Row, against

from moe_locality.placement import Costs, assign_homes, evaluate, solve
from moe_locality.placement.bounds.shared import bound_for_mean_imbalance
from moe_locality.placement.homes.assign import MAX_TOKEN_IMBALANCE
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace import RoutingTrace

if TYPE_CHECKING:
    from placement_cases import Goal, Parts

BOUND_SECONDS = {2: 30.0, 4: 60.0, 8: 60.0}
NO_CAP = 1e3
HALVINGS = 5
LOOSEST = 1.5  # a cap at which every plan is above its limit on the judged requests


def evidence_rows(
    data: Parts,
    topology: ClusterTopology,
    goal: Goal,
    most: float,
    extra: int,
    linear: Costs,
    case: str,
) -> list[Row]:
    """The rows beside a missed target."""
    options = {"num_redundant_experts": extra, **goal.options}

    def costs_of(cap: float) -> Costs:
        return with_hindsight(data.test, topology, max_imbalance=cap, **options)

    cap, costs = loosest(costs_of, goal, most)
    found = [
        ("made from the judged requests", costs, f"max_imbalance {cap:g}"),
        ("made from the judged requests, any balance", costs_of(NO_CAP), "no cap"),
    ]
    rows = [
        Row(
            case=f"{case}, {words}",
            metric=goal.metric,
            value=against(costs, linear)[goal.metric],
            unit="%",
            baseline="linear",
            note="not a result: what the same search reaches when it may see the requests (and "
            f"their homes, where they have some) that it is judged on; {how}, {goal.limit} "
            f"{getattr(costs, goal.limit):.4f}, limit {most:.4f}",
        )
        for words, costs, how in found
    ]
    if not extra and not goal.options and goal.limit == "node_imbalance":
        rows.append(bound_row(data.test, topology, goal, most, linear, case))
    return rows


def with_hindsight(trace: RoutingTrace, topology: ClusterTopology, **options: Any) -> Costs:
    """The costs of a plan on the trace that it was made from."""
    plan = solve(trace, topology, **options)
    homes = None
    if options.get("homes") == "joint":
        most = options.get("max_home_imbalance", MAX_TOKEN_IMBALANCE)
        homes = assign_homes(trace, plan, topology, predict="oracle", max_imbalance=most)
    return evaluate(trace, plan, topology, homes)


def loosest(costs_of: Callable[[float], Costs], goal: Goal, most: float) -> tuple[float, Costs]:
    """(cap, costs) of the loosest cap that keeps the limit, found by halving; the tightest where
    none does.
    """
    low, high = 1.0, LOOSEST
    best = (low, costs_of(low))
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        costs = costs_of(middle)
        if getattr(costs, goal.limit) <= most:
            low, best = middle, (middle, costs)
        else:
            high = middle
    return best


def bound_row(
    trace: RoutingTrace,
    topology: ClusterTopology,
    goal: Goal,
    most: float,
    linear: Costs,
    case: str,
) -> Row:
    """What no plan can go below on the judged requests, even made from them, at the same limit."""
    seconds = BOUND_SECONDS[goal.nodes]
    bound = bound_for_mean_imbalance(trace, topology, max_imbalance=most, seconds=seconds)
    value = 100 * (bound / linear.copies - 1)
    words = "forbids the target" if value > goal.target else "does not forbid the target"
    return Row(
        case=f"{case}, certified bound",
        metric=goal.metric,
        value=value,
        unit="%",
        baseline="linear",
        note=f"not a result: no plan without replicas whose node imbalance on the judged requests "
        f"(mean over the layers) is at most {most:.4f} saves more; {words}; effort {seconds:g} s",
    )
