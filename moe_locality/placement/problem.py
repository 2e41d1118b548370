"""What every solver gets and gives: the checked problem, the solution, a plan made of rows."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.placement.align import Homes
from moe_locality.placement.plan import PlacementPlan
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import RoutingTrace

RankLists = list[list[int]]
"""The experts of each rank, for one layer."""

_logged: ContextVar[set[str] | None] = ContextVar("_logged", default=None)


@contextlib.contextmanager
def warnings_once() -> Iterator[None]:
    """Log warnings that differ in figures alone once, within the block or decorated function."""
    token = _logged.set(set() if _logged.get() is None else _logged.get())
    try:
        yield
    finally:
        _logged.reset(token)


def log_warning(log: logging.Logger, text: str, *figures: object) -> None:
    """Log a warning, see ``warnings_once``."""
    logged = _logged.get()
    if logged is None or text not in logged:
        log.warning(text, *figures)
    if logged is not None:
        logged.add(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What a solver gets: the checked arguments of ``solve``.

    unseen: whether ``max_imbalance`` is meant on requests that are not in the trace.
    """

    trace: RoutingTrace
    topology: ClusterTopology
    num_slots: int
    max_imbalance: float
    home_rank: np.ndarray | None
    group_of: np.ndarray | None
    seed: int
    objective: str = "copies"
    max_home_imbalance: float = 1.05
    unseen: bool = True

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
    def home_node(self) -> np.ndarray:
        """[T] int64 home node of each token; empty where homes are uniform."""
        if self.home_rank is None:
            return np.zeros(0, np.int64)
        return np.asarray(self.topology.rank_to_node, dtype=np.int64)[self.home_rank]

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What a method found: the plan, the homes to cost it with, and notes for its provenance."""

    plan: PlacementPlan
    homes: Homes = None
    notes: dict[str, Any] = field(default_factory=dict)


def make_plan(
    problem: Problem,
    rows: list[RankLists],
    *,
    by_node: bool = True,
    load: np.ndarray | None = None,
) -> PlacementPlan:
    """A plan from the experts of each rank, per layer.

    ``by_node``: the lists go through the ranks of node 0, then of node 1 and so on; else through
    the ranks as they are numbered. ``load``: [L, E] of the trace, where known.
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
        expert_load=problem.trace.load() if load is None else load,
        rank_to_node=problem.topology.rank_to_node,
    )


def check_slots(num_experts: int, topology: ClusterTopology, num_redundant_experts: int) -> int:
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
            f"expected a multiple of the {ranks} ranks: use "
            f"{num_redundant_experts + -slots % ranks} redundant experts or another number of ranks"
        )
    if slots // ranks > num_experts:
        raise PlacementError(
            f"found {slots // ranks} slots per rank for {num_experts} experts, expected no more "
            "slots than experts (a rank holds an expert once): use fewer redundant experts"
        )
    return slots


def check_objective(
    objective: str, joint: bool, num_redundant_experts: int, max_home_imbalance: float
) -> None:
    """Raise PlacementError unless the objective is known and something can be done about it."""
    if not max_home_imbalance >= 1:
        raise PlacementError(
            f"max_home_imbalance: found {max_home_imbalance}, expected at least 1 (it is max / "
            "mean of the tokens per home rank)"
        )
    if objective not in ("copies", "picks"):
        raise PlacementError(f"objective: found {objective!r}, expected 'copies' or 'picks'")
    if objective == "picks" and not joint:
        raise PlacementError(
            "objective='picks': found no joint homes; with requests anywhere every placement has "
            "the same picks: use homes='joint'"
        )
    if objective == "picks" and num_redundant_experts:
        raise PlacementError(
            "objective='picks': found redundant experts, expected none: replicas are chosen for "
            "copies only, use objective='copies'"
        )


def check_groups(num_experts: int, num_nodes: int, expert_groups) -> np.ndarray | None:
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
