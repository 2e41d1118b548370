"""How far a missed target is from what can be reached: plans made with hindsight, and bounds.

None of these rows is a result; their notes say so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mean_imbalance_bound import bound_for_mean_imbalance
from placement_rows import Row, against

from moe_locality.placement import Costs, assign_homes, evaluate
from moe_locality.placement.homes.assign import MAX_TOKEN_IMBALANCE
from moe_locality.placement.homes.joint import solve_joint
from moe_locality.placement.problem import Problem
from moe_locality.placement.search.coactivation import solve_coactivation
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace import RoutingTrace

if TYPE_CHECKING:
    from placement_cases import Goal, Parts

BOUND_SECONDS = {2: 30.0, 4: 30.0, 8: 10.0}
BOUND_EXPERTS = 32
"""With 64 experts the bound is far from every plan (minutes for -24 and -37 % on V2-Lite, 2 and 8
nodes) and leaves every target open."""

NO_CAP = 1e3
HINDSIGHT = (
    "not a result: what the same search reaches when it may see the requests (and their homes, "
    "where they have some) that it is judged on"
)


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
    found = [
        (words, with_hindsight(data.test, topology, goal, extra, cap), how)
        for words, cap, how in (
            ("made from the judged requests", most, f"max_imbalance {most:.4f} on them"),
            ("made from the judged requests, any balance", NO_CAP, "no cap"),
        )
    ]
    rows = [
        Row(
            case=f"{case}, {words}",
            metric=goal.metric,
            value=against(costs, linear)[goal.metric],
            unit="%",
            baseline="linear",
            note=f"{HINDSIGHT}; {how}, {goal.limit} {getattr(costs, goal.limit):.4f}, "
            f"limit {most:.4f}",
        )
        for words, costs, how in found
    ]
    bounded = data.test.num_experts <= BOUND_EXPERTS
    if bounded and not extra and not goal.options and goal.limit == "node_imbalance":
        rows.append(bound_row(data.test, topology, goal, most, linear, case))
    return rows


def with_hindsight(
    trace: RoutingTrace,
    topology: ClusterTopology,
    goal: Goal,
    extra: int,
    max_imbalance: float,
    seed: int = 0,
) -> Costs:
    """The costs of a plan on the trace that it was made from, and made level for."""
    problem = Problem(
        trace=trace,
        topology=topology,
        num_slots=trace.num_experts + extra,
        max_imbalance=max_imbalance,
        home_rank=None,
        group_of=None,
        seed=seed,
        serving_rule="visited" if extra else "home",
        objective=goal.options.get("objective", "copies"),
        max_home_imbalance=goal.options.get("max_home_imbalance", MAX_TOKEN_IMBALANCE),
        unseen=False,
    )
    if goal.options.get("homes") != "joint":
        return evaluate(trace, solve_coactivation(problem).plan, topology)
    plan = solve_joint(problem).plan
    homes = assign_homes(
        trace, plan, topology, predict="oracle", max_imbalance=problem.max_home_imbalance
    )
    return evaluate(trace, plan, topology, homes)


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
