"""solve(): the one front of the solvers. Trace and cluster in, a valid plan out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import moe_locality
from moe_locality.errors import PlacementError
from moe_locality.placement import baselines
from moe_locality.placement.frame import resolve_homes
from moe_locality.placement.objective import Homes, evaluate
from moe_locality.placement.plan import PlacementPlan
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import RoutingTrace

METHODS = ("coactivation", "eplb", "linear", "round_robin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a solver gets: the checked arguments of ``solve``."""

    trace: RoutingTrace
    topology: ClusterTopology
    num_slots: int
    max_imbalance: float
    home_rank: np.ndarray | None
    group_of: np.ndarray | None
    seed: int

    @property
    def num_nodes(self) -> int:
        return self.topology.num_nodes

    @property
    def ranks_per_node(self) -> int:
        return self.topology.ranks_per_node

    @property
    def num_ranks(self) -> int:
        return self.topology.num_ranks

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks


def solve(
    trace: RoutingTrace,
    topology: ClusterTopology,
    *,
    method: str = "coactivation",
    num_redundant_experts: int = 0,
    max_imbalance: float = 1.05,
    homes: Homes = None,
    expert_groups: int | Sequence[int] | None = None,
    seed: int = 0,
) -> PlacementPlan:
    """Find where the experts of every layer should live. The same arguments give the same plan.

    Args:
        trace: what to optimize for; ``coactivation`` needs a trace of tokens, the others take
            counts.
        method: ``coactivation`` (fewest copies under the cap), ``eplb`` (balance from loads alone),
            ``linear`` or ``round_robin``.
        num_redundant_experts: slots beyond one per expert.
        max_imbalance: most max / mean of the node loads that ``coactivation`` aims at on *new*
            requests; on the trace itself it stays below, see ``IN_SAMPLE_SHARE`` in spread.py.
        homes: None = requests live anywhere; a dict or array as in ``evaluate``: they live there;
            "joint": homes and placement are found together, and ``home_profiles`` is filled.
        expert_groups: number of equal consecutive groups, or the group of each expert; a group
            stays on one node (group-limited routers). ``eplb`` only, for now.
        seed: of every random choice.

    Raises:
        PlacementError: the arguments do not fit each other; the message says what to change.
    """
    _check_arguments(trace, method, max_imbalance, homes, expert_groups)
    num_slots = _check_slots(trace.num_experts, topology, num_redundant_experts)
    joint = isinstance(homes, str) and homes == "joint"
    problem = Problem(
        trace=trace,
        topology=topology,
        num_slots=num_slots,
        max_imbalance=max_imbalance,
        home_rank=None if joint else resolve_homes(trace, topology.num_ranks, homes),
        group_of=_groups(trace.num_experts, topology.num_nodes, expert_groups),
        seed=seed,
    )
    plan, used_homes, notes = _solve(problem, method, homes)
    costs = evaluate(trace, plan, topology, used_homes).to_dict()
    provenance = {
        "method": method,
        "trace": trace.content_hash(),
        "seed": seed,
        "max_imbalance": max_imbalance,
        "num_redundant_experts": num_redundant_experts,
        "homes": "joint" if joint else ("uniform" if homes is None else "given"),
        "moe_locality": moe_locality.__version__,
        **notes,
    }
    left_out = ("per_layer", "layer_ids", "move")
    costs = {name: value for name, value in costs.items() if name not in left_out}
    return replace(plan, provenance=provenance, costs=costs)


def _solve(
    problem: Problem, method: str, homes: Homes
) -> tuple[PlacementPlan, Homes, dict[str, Any]]:
    """(plan, homes to evaluate it with, notes)."""
    if method != "coactivation":
        rows = _baseline_rows(problem, method)
        return make_plan(problem, rows, by_node=method == "eplb"), homes, {}
    if isinstance(homes, str) and homes == "joint":
        from moe_locality.placement.joint import solve_joint

        return solve_joint(problem)
    plan, notes = solve_coactivation(problem)
    return plan, homes, notes


def make_plan(
    problem: Problem, rows: list[baselines.RankLists], *, by_node: bool = True
) -> PlacementPlan:
    """A plan from the experts of each rank, per layer.

    ``by_node``: the lists go through the ranks of node 0, then of node 1 and so on; else through
    the ranks as they are numbered.
    """
    order = list(range(problem.num_ranks))
    if by_node:
        order = [r for node in range(problem.num_nodes) for r in problem.topology.ranks_of(node)]
    table = np.empty((len(rows), problem.num_ranks, problem.slots_per_rank), dtype=np.int32)
    for row, held in enumerate(rows):
        table[row, order] = np.array([sorted(experts) for experts in held])
    return PlacementPlan(
        model=problem.trace.model,
        layer_ids=tuple(int(i) for i in problem.trace.layer_ids),
        num_experts=problem.trace.num_experts,
        num_nodes=problem.num_nodes,
        ranks_per_node=problem.ranks_per_node,
        physical_to_logical_map=table.reshape(len(rows), -1),
        expert_load=problem.trace.load(),
        rank_to_node=problem.topology.rank_to_node,
    )


def solve_coactivation(problem: Problem) -> tuple[PlacementPlan, dict[str, Any]]:
    """The plan, and what provenance should say about it."""
    from moe_locality.placement.spread import place_layer

    rows, notes = [], {}
    for layer in range(problem.trace.num_layers):
        held, note = place_layer(problem, layer)
        rows.append(held)
        if note:
            notes[str(int(problem.trace.layer_ids[layer]))] = note
    found: dict[str, Any] = {"layer_notes": notes} if notes else {}
    return make_plan(problem, rows), found


def _baseline_rows(problem: Problem, method: str) -> list[baselines.RankLists]:
    experts, layers = problem.trace.num_experts, problem.trace.num_layers
    if method == "eplb":
        return [
            baselines.eplb(
                load, problem.num_nodes, problem.ranks_per_node, problem.num_slots, problem.group_of
            )
            for load in problem.trace.load()
        ]
    make = baselines.linear if method == "linear" else baselines.round_robin
    return [make(experts, problem.num_ranks, problem.num_slots)] * layers


def _check_arguments(trace, method, max_imbalance, homes, expert_groups) -> None:
    if method not in METHODS:
        raise PlacementError(f"method: found {method!r}, expected one of {', '.join(METHODS)}")
    if trace.num_rows == 0 or trace.num_layers == 0 or not trace.load().any():
        raise PlacementError(
            "found an empty trace, expected picks in at least one layer: record again"
        )
    if not max_imbalance >= 1:
        raise PlacementError(
            f"max_imbalance: found {max_imbalance}, expected at least 1 (it is max / mean): "
            "1.05 lets the busiest node do 5 % more than the mean"
        )
    if method != "coactivation" and homes is not None:
        raise PlacementError(
            f"found homes for method {method!r}, expected none: only 'coactivation' uses homes"
        )
    if method == "coactivation":
        if trace.expert_ids is None:
            raise PlacementError(
                "method 'coactivation' needs a trace of tokens, found a trace of counts: "
                "use method 'eplb' or record tokens"
            )
        if expert_groups is not None:
            raise PlacementError(
                "expert_groups: found groups for method 'coactivation', which cannot keep groups "
                "whole yet: use method 'eplb'"
            )


def _check_slots(num_experts: int, topology: ClusterTopology, num_redundant_experts: int) -> int:
    nodes, ranks = topology.num_nodes, topology.num_nodes * topology.ranks_per_node
    if num_redundant_experts < 0:
        raise PlacementError(
            f"num_redundant_experts: found {num_redundant_experts}, expected 0 or more"
        )
    if nodes > num_experts:
        raise PlacementError(
            f"found {nodes} nodes for {num_experts} experts per layer, expected no more nodes than "
            "experts: spread this model over fewer nodes"
        )
    slots = num_experts + num_redundant_experts
    if slots % ranks:
        raise PlacementError(
            f"found {num_experts} experts + {num_redundant_experts} redundant = {slots} slots, "
            f"expected a multiple of the {ranks} ranks: use num_redundant_experts="
            f"{num_redundant_experts + -slots % ranks} or another number of ranks"
        )
    if slots // ranks > num_experts:
        raise PlacementError(
            f"found {slots // ranks} slots per rank for {num_experts} experts, expected no more "
            "slots than experts (a rank holds an expert once): use fewer redundant experts"
        )
    return slots


def _groups(num_experts: int, num_nodes: int, expert_groups) -> np.ndarray | None:
    if expert_groups is None:
        return None
    if isinstance(expert_groups, (int, np.integer)):
        count = int(expert_groups)
        if count < 1 or num_experts % count:
            raise PlacementError(
                f"expert_groups: found {count}, expected a divisor of the {num_experts} experts"
            )
        group_of = np.arange(num_experts) // (num_experts // count)
    else:
        group_of = np.asarray(expert_groups)
        if group_of.shape != (num_experts,) or group_of.dtype.kind not in "iu":
            raise PlacementError(
                f"expert_groups: found shape {group_of.shape}, expected one group for each of the "
                f"{num_experts} experts"
            )
    sizes = np.unique(np.bincount(group_of))
    if len(sizes) != 1 or (int(group_of.max()) + 1) % num_nodes:
        raise PlacementError(
            f"expert_groups: found {int(group_of.max()) + 1} groups of sizes {sizes.tolist()}, "
            f"expected equal groups, as many on each of the {num_nodes} nodes"
        )
    return group_of
