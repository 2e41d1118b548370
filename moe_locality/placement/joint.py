"""Homes of requests and places of experts, found together.

Given homes the layers decouple; given places the requests do. So the two are improved in turns, and
the best pair by exact copies on the trace is kept.
"""

from __future__ import annotations

from dataclasses import replace

from moe_locality.placement.frame import resolve_homes
from moe_locality.placement.homes import assign_homes, home_profiles
from moe_locality.placement.objective import evaluate
from moe_locality.placement.problem import Problem, Solution

MAX_ROUNDS = 4


def solve_joint(problem: Problem) -> Solution:
    """A plan with ``home_profiles``, and the homes of the trace's requests."""
    from moe_locality.placement.solve import solve_coactivation

    trace = problem.trace
    found = solve_coactivation(problem)
    plan, notes = found.plan, found.notes
    homes = assign_homes(trace, plan, predict="oracle")
    copies = evaluate(trace, plan, homes=homes).total_copies
    history = [copies]
    for _ in range(MAX_ROUNDS):
        pinned = replace(problem, home_rank=resolve_homes(trace, problem.num_ranks, homes))
        found = solve_coactivation(pinned)
        next_plan, next_notes = found.plan, found.notes
        next_homes = assign_homes(trace, next_plan, predict="oracle")
        next_copies = evaluate(trace, next_plan, homes=next_homes).total_copies
        history.append(next_copies)
        if next_copies >= copies:  # type: ignore[operator]
            break
        plan, homes, copies, notes = next_plan, next_homes, next_copies, next_notes
    notes = {**notes, "joint_copies": history}
    plan = replace(plan, home_profiles=home_profiles(trace, plan, homes))
    return Solution(plan=plan, homes=homes, notes=notes)
