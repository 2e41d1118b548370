"""The command place: a plan from a trace, or from a plan and a newer trace."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_locality.commands.certificate import certificate_of, certificate_words
from moe_locality.commands.inputs import check_writable, read_cluster, split
from moe_locality.commands.output import Result, progress
from moe_locality.commands.plans import brief, costs_table, linear_plan, topology_of
from moe_locality.errors import PlacementError
from moe_locality.placement import Costs, PlacementPlan
from moe_locality.placement import evaluate as costs_of
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace, read_trace

MOVE_BUDGET = 0.02


def place(
    trace: Path,
    out: Path,
    nodes: int | None,
    ranks_per_node: int | None,
    cluster: Path | None,
    hostfile: Path | None,
    method: str,
    redundant_experts: int,
    max_imbalance: float,
    homes: str | None,
    max_home_imbalance: float,
    objective: str,
    expert_groups: int | None,
    start: Path | None,
    move_budget: float | None,
    held_out: float,
    bound_seconds: float,
    prove: bool,
    seed: int,
) -> Result:
    """Solve and write the plan; with ``held_out`` also evaluate it on requests not seen."""
    from moe_locality.placement.solve import solve

    _check_options(homes, start, move_budget)
    check_writable(out, "plan", trace)
    old, topology = _start_on(start, (nodes, ranks_per_node, cluster, hostfile))
    options: dict[str, Any] = {
        "method": method,
        "num_redundant_experts": redundant_experts,
        "max_imbalance": max_imbalance,
        "homes": homes,
        "max_home_imbalance": max_home_imbalance,
        "objective": objective,
        "expert_groups": expert_groups,
        "seed": seed,
        "start": old,
        "move_budget": MOVE_BUDGET if move_budget is None else move_budget,
    }
    with progress(f"placing {trace}"):
        content = read_trace(trace)
        train, test = split(content, held_out, seed)
        if old is not None:
            _check_start(old, start, content, redundant_experts)
        begun = time.perf_counter()
        plan = solve(train, topology, **options)
        seconds = time.perf_counter() - begun
        judged = _judge(plan, train, test, topology, old)
        found = certificate_of(plan, train, topology, max_imbalance, bound_seconds, prove)
    plan = _signed(plan, content, held_out, found)
    plan.write(out)
    payload = {"command": "place", "plan": out, "method": method, "seconds": seconds}
    payload |= {"digest": plan.digest(), "cluster": topology.to_dict()}
    payload |= {"trace": train.content_hash(), "costs": plan.costs, "certificate": found}
    payload |= judged
    return Result(payload=payload, show=_shown(topology.describe(), held_out, payload))


def _check_options(homes: str | None, start: Path | None, move_budget: float | None) -> None:
    """Raise PlacementError for options that mean nothing, before the trace is read."""
    if homes not in (None, "joint"):
        raise PlacementError(f"--homes: found {homes!r}, expected 'joint', or leave the option out")
    if move_budget is not None and start is None:
        raise PlacementError(
            "found --move-budget without --start, expected both or none: name the plan to improve"
        )


def _start_on(
    start: Path | None, cluster_options: tuple[Any, ...]
) -> tuple[PlacementPlan | None, ClusterTopology]:
    """Return (plan to improve, cluster): that of the plan where the options name none."""
    old = None if start is None else PlacementPlan.read(start)
    if old is not None and all(option is None for option in cluster_options):
        return old, topology_of(old)
    return old, read_cluster(*cluster_options)


def _check_start(
    plan: PlacementPlan, path: Path | None, trace: RoutingTrace, redundant_experts: int
) -> None:
    """Raise PlacementError where the plan to improve does not fit the trace, or where
    ``redundant_experts`` asks for other replicas than it has.
    """
    try:
        plan.check_fits(num_experts=trace.num_experts, model=trace.model or None)
    except PlacementError as error:
        raise PlacementError(f"{path} does not fit the trace: {error}") from error
    if redundant_experts not in (0, plan.num_redundant_experts):
        raise PlacementError(
            f"--redundant-experts: found {redundant_experts} for a plan with "
            f"{plan.num_redundant_experts}, expected the same: a plan that is improved keeps its "
            "replicas; leave the option out, or solve without --start"
        )


def _signed(
    plan: PlacementPlan, trace: RoutingTrace, held_out: float, certificate: dict[str, Any] | None
) -> PlacementPlan:
    """Return the plan with what it was drawn from and its certificate in the provenance."""
    source: dict[str, Any] = {}
    if held_out:
        source = {"drawn_from": trace.content_hash(), "held_out": held_out}
    if certificate is not None:
        source["certificate"] = certificate
    return dataclasses.replace(plan, provenance={**plan.provenance, **source})


def _shown(cluster: str, held_out: float, payload: dict[str, Any]) -> Callable[[Any], None]:
    """Return what prints a new plan: its costs beside linear's, and its certificate."""
    where = f"on {held_out:.0%} held-out requests" if held_out else "on its own trace"
    head = f"{payload['plan']}: {payload['method']}, {cluster}, {payload['seconds']:.2f} s"
    found = {"linear": payload["linear"]}
    start = payload["start"]
    if start is not None:
        found["start"] = start["costs"]
    found[payload["method"]] = payload["held_out"] or payload["costs"]

    def show(console: Any) -> None:
        console.print(head, soft_wrap=True)
        if start is not None:
            words = f"{start['moved_slots']} slots moved, {start['moved_share']:.1%} of all"
            console.print(words)
        console.print(costs_table(f"Predicted {where}", found))
        if payload["certificate"] is not None:
            console.print(certificate_words(payload["certificate"]), soft_wrap=True)

    return show


def _judge(
    plan: PlacementPlan,
    train: RoutingTrace,
    test: RoutingTrace | None,
    topology: ClusterTopology,
    old: PlacementPlan | None,
) -> dict[str, Any]:
    """Return the costs on held-out requests, and those of linear and of the start on the same ones.

    A plan that was found together with homes gets homes there too, predicted as for new requests.
    """
    from moe_locality.placement.homes.assign import assign_homes
    from moe_locality.placement.homes.requests import default_prediction

    base = linear_plan(train, topology)
    trace = train if test is None else test
    predict = default_prediction(trace) if plan.home_profiles is not None and test else None

    def cost(some: PlacementPlan, before: PlacementPlan | None = None) -> Costs:
        homes = assign_homes(trace, some, predict=predict) if predict else None
        return costs_of(trace, some, topology, homes, baseline=before)

    judged: dict[str, Any] = {"held_out": None, "held_out_homes": predict, "start": None}
    judged["linear"] = None if base is None else brief(costs_of(trace, base, topology))
    after = cost(plan, old) if test is not None or old is not None else None
    if test is not None and after is not None:
        judged["held_out"] = brief(after)
    if old is not None and after is not None:
        slots = plan.physical_to_logical_map.size
        judged["start"] = {
            "digest": old.digest(),
            "costs": brief(cost(old)),
            "moved_slots": round((after.move or 0.0) * slots),
            "moved_share": after.move or 0.0,
        }
    return judged
