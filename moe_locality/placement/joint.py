"""Homes of requests and places of experts, found together.

Given homes the layers decouple; given places the requests do. So the two are improved in turns, and
the best pair by exact copies on the trace is kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moe_locality.placement.frame import resolve_homes
from moe_locality.placement.homes import assign_homes, home_profiles
from moe_locality.placement.objective import evaluate
from moe_locality.placement.plan import PlacementPlan

if TYPE_CHECKING:
    from moe_locality.placement.solve import Problem

MAX_ROUNDS = 4


def solve_joint(problem: Problem) -> tuple[PlacementPlan, dict[int, int], dict[str, Any]]:
    """(plan with ``home_profiles``, homes of the trace's requests, notes for provenance)."""
    from moe_locality.placement.solve import solve_coactivation

    trace = problem.trace
    plan, notes = solve_coactivation(problem)
    homes = assign_homes(trace, plan, predict="oracle")
    copies = evaluate(trace, plan, homes=homes).total_copies
    history = [copies]
    for _ in range(MAX_ROUNDS):
        pinned = replace(problem, home_rank=resolve_homes(trace, problem.num_ranks, homes))
        next_plan, next_notes = solve_coactivation(pinned)
        next_homes = assign_homes(trace, next_plan, predict="oracle")
        next_copies = evaluate(trace, next_plan, homes=next_homes).total_copies
        history.append(next_copies)
        if next_copies >= copies:  # type: ignore[operator]
            break
        plan, homes, copies, notes = next_plan, next_homes, next_copies, next_notes
    notes = {**notes, "joint_copies": history}
    return replace(plan, home_profiles=home_profiles(trace, plan, homes)), homes, notes
