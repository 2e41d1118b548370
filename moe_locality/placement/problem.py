"""A trace and a plan aligned by layer id, with the homes resolved; and what every solver gets and
gives: the checked problem, the solution, a plan made of rows.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.placement import counting
from moe_locality.placement.export import ENGINE_RULES, engine_serving_slots
from moe_locality.placement.plan import EMPTY, PlacementPlan
from moe_locality.placement.serving import slots_on_nodes
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import RoutingTrace

Homes = Mapping[int, int] | np.ndarray | str | None
"""Home ranks: request id → rank, [T] ranks, "trace" (as recorded), or None: anywhere alike."""


class AlignedTrace:
    """Aligned arrays, made by ``align_trace``; the layer axis follows the trace.

    ``home_rank`` [T]: None = uniform homes. ``rows`` [L]: of the plan, for each layer of the trace.
    ``load`` [L, E]: picks, where they are known already.
    """

    def __init__(
        self,
        trace: RoutingTrace,
        plan: PlacementPlan,
        rows: np.ndarray,
        home_rank: np.ndarray | None,
        rule: str | None,
        load: np.ndarray | None,
    ) -> None:
        self.layer_ids, self.plan_rows = tuple(int(i) for i in trace.layer_ids), rows
        self.num_layers, self.num_ranks, self.num_nodes = len(rows), plan.num_ranks, plan.num_nodes
        self.ids = trace.expert_ids  # [T, L, K], None for a trace of counts
        self.load_rows = trace.expert_load  # [S, L, E] for a trace of counts
        self.num_experts, self.num_slots = plan.num_experts, plan.num_slots
        self.slots_per_rank = plan.slots_per_rank
        self.home_rank, self.node_of_rank = home_rank, plan.node_of_rank
        self.table = plan.physical_to_logical_map[rows]  # [L, P] expert of each slot, -1: empty
        engine = engine_serving_slots(plan, rule) if rule in ENGINE_RULES else None
        # [L, G, E], under the rule "home"
        self.served_slot = (plan.serving_slot() if engine is None else engine)[rows]
        self.served_rank = self.served_slot // plan.slots_per_rank
        self.has_replicas = not plan.is_permutation
        by_picks = rule is None and plan.serving_rule == "visited" and self.has_replicas
        by_picks &= self.ids is not None  # counts do not say what goes together: rule "home"
        # [L, M, E, X], where the picks of a token decide (rule "visited")
        self.choices = plan.node_choices()[rows] if by_picks else None
        self.load = load

    def picks_by_home(self) -> np.ndarray:
        """[L, G, E] int64 picks by home rank, or [L, 1, E] without homes."""
        if self.ids is None:
            assert self.load_rows is not None
            return self.load_rows.sum(axis=0, dtype=np.int64)[:, None]
        home, homes = self.home_rank, self.num_ranks
        if home is None:
            if self.load is not None:
                return self.load[:, None]
            home, homes = np.zeros(len(self.ids), dtype=np.int64), 1
        return counting.picks_by_home(self.ids, self.num_experts, home, homes)

    def slots_of(self, ids: np.ndarray, home: np.ndarray, first: int) -> np.ndarray:
        """[T, l, K] int64 slot that serves each pick of the layers from ``first`` on; anything for
        no pick. ``ids`` [T, l, K], ``home`` [T] ranks.
        """
        expert = np.maximum(ids, 0).astype(np.int64)
        place = np.arange(ids.shape[1])[None, :, None]
        if self.choices is None:
            slots = self.served_slot[first : first + ids.shape[1]]
            return slots[place, home[:, None, None] if self.has_replicas else 0, expert]
        found = np.empty(ids.shape, dtype=np.int64)
        for layer in range(ids.shape[1]):
            nodes = self.serve(ids[:, layer], self.node_of_rank[home], first + layer)
            table = self.slots_on_nodes(first + layer)
            found[:, layer] = table[home[:, None], nodes, expert[:, layer]]
        return found

    def serve(self, ids: np.ndarray, home_node: np.ndarray, layer: int) -> np.ndarray:
        """[T, K] int64 node that serves each pick of ids [T, K], -1 for none, by the picks."""
        from moe_locality.placement.count_kernels import serve_tokens

        assert self.choices is not None
        found = np.empty(ids.shape, dtype=np.int64)
        serve_tokens(ids, home_node.astype(np.int64), self.choices[layer], found)
        return found

    def slots_on_nodes(self, layer: int) -> np.ndarray:
        """[G, M, E], see ``serving.slots_on_nodes``."""
        node_of_slot = np.repeat(self.node_of_rank, self.slots_per_rank)
        return slots_on_nodes(
            self.table[layer], self.served_slot[layer], node_of_slot, self.node_of_rank
        )

    @functools.cached_property  # several costs are taken from one count
    def served_by_token(self) -> tuple[np.ndarray, np.ndarray]:
        """([L, M, M] tokens of home node m on node n, m included; [L, G, P] picks by home rank and
        slot) where the picks decide, int64. Without homes every token counts once for each home.
        """
        visits, slots = zip(*counting.map_layers(self._served, self.num_layers), strict=True)
        return np.stack(visits), np.stack(slots)

    def _served(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """``served_by_token`` of one layer."""
        nodes, ranks, experts = self.num_nodes, self.num_ranks, self.num_experts
        visits = np.zeros((nodes, nodes), dtype=np.int64)
        table = self.slots_on_nodes(layer)
        by_rank = self.home_rank is not None
        counts = np.zeros((ranks if by_rank else nodes, nodes * experts), dtype=np.int64)
        for ids, home in self._tokens_at_home(layer, nodes):
            node = self.node_of_rank[home] if by_rank else home
            served = self.serve(ids, node, layer)
            there = served >= 0
            key = (home[:, None] * nodes + served) * experts + ids
            counts += np.bincount(key[there], minlength=counts.size).reshape(counts.shape)
            bits = np.where(there, np.int64(1) << np.maximum(served, 0), 0)
            mask = np.bitwise_or.reduce(bits, axis=1)
            for place in range(nodes):
                visits[:, place] += np.bincount(node[mask >> place & 1 > 0], minlength=nodes)
        slots = np.zeros((ranks, self.num_slots), dtype=np.int64)
        for rank in range(ranks):
            mine = counts[rank if by_rank else self.node_of_rank[rank]]
            held = table[rank].ravel() >= 0
            np.add.at(slots[rank], table[rank].ravel()[held], mine[held])
        return visits, slots

    def node_visits(self) -> np.ndarray:
        """[L, M, M] tokens of home node m on node n: int64; without homes expected floats."""
        if self.choices is not None:
            visits, _ = self.served_by_token
            return visits if self.home_rank is not None else visits / self.num_nodes
        first_rank = np.unique(self.node_of_rank, return_index=True)[1]
        served = self.node_of_rank[self.served_rank]  # [L, G, E]
        nearest = served[:, first_rank]  # [L, M, E]
        if (served == nearest[:, self.node_of_rank]).all():  # one rank of a node stands for all
            return self._visits(nearest, self.node_of_rank, self.num_nodes)
        by_rank = self._visits(served, np.arange(self.num_ranks), self.num_nodes)
        visits = np.zeros((self.num_layers, self.num_nodes, self.num_nodes), by_rank.dtype)
        np.add.at(visits.swapaxes(0, 1), self.node_of_rank, by_rank.swapaxes(0, 1))
        return visits

    def rank_visits(self) -> np.ndarray:
        """[L, G, G] tokens at home on rank g with a pick served on rank r: as ``node_visits``."""
        if self.choices is not None:
            visits = np.stack(counting.map_layers(self._rank_visits_by_token, self.num_layers))
            return visits if self.home_rank is not None else visits / self.num_ranks
        return self._visits(self.served_rank, np.arange(self.num_ranks), self.num_ranks)

    def _rank_visits_by_token(self, layer: int) -> np.ndarray:
        """[G, G] int64 of a layer where the picks decide; without homes a token counts at each."""
        assert self.ids is not None
        ranks, visits = self.num_ranks, np.zeros(self.num_ranks**2, dtype=np.int64)
        for ids, home in self._tokens_at_home(layer, ranks):
            slots = self.slots_of(ids[:, None], home, layer)[:, 0]
            at = np.where(ids >= 0, slots // self.slots_per_rank, -1)
            at.sort(axis=1)
            new = at >= 0
            new[:, 1:] &= at[:, 1:] != at[:, :-1]
            visits += np.bincount((home[:, None] * ranks + at)[new], minlength=ranks**2)
        return visits.reshape(ranks, ranks)

    def _tokens_at_home(self, layer: int, homes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (ids [T, K] of a layer, home [T]) of pieces of the trace: home ranks; without
        homes every piece once for each of ``homes``.
        """
        assert self.ids is not None
        step = max(counting.CHUNK_PICKS // self.ids.shape[2], 1)
        for start in range(0, len(self.ids), step):
            ids = np.ascontiguousarray(self.ids[start : start + step, layer])
            if self.home_rank is not None:
                yield ids, self.home_rank[start : start + step]
                continue
            for home in range(homes):
                yield ids, np.full(len(ids), home)

    def _visits(self, served: np.ndarray, home_of_rank: np.ndarray, places: int) -> np.ndarray:
        """[L, H, N] tokens of each home with a pick in each place, ``served`` [L, H, E] the place
        of an expert; without homes expected floats, all homes alike.
        """
        assert self.ids is not None
        homes = served.shape[1]
        if not self.has_replicas:
            served = served[:, :1]
        if self.home_rank is not None:
            home = home_of_rank[self.home_rank].astype(np.int64)
            return counting.node_visits(self.ids, served, home, places, homes)
        anywhere = np.zeros(len(self.ids), dtype=np.int64)
        visits = [
            counting.node_visits(self.ids, served[:, home : home + 1], anywhere, places, 1)
            for home in range(served.shape[1])
        ]
        alike = homes // len(visits)  # without replicas all homes are served as the first one
        return np.repeat(np.concatenate(visits, axis=1), alike, axis=1) / homes

    def rank_batches(self, batch_tokens: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Yield ([B, L, G] picks per rank, slots of the rank that they use, probability that it has
        none) of batches, expected values where homes decide and are not given.
        """
        ranks, per_rank = self.num_ranks, self.slots_per_rank
        certain = self.home_rank is not None or not self.has_replicas
        certain &= self.choices is None
        if certain and self.ids is not None and self.ids.size >= counting.COMPILED_PICKS:
            served, home = self.served_slot, self.home_rank
            if home is None or not self.has_replicas:
                served, home = served[:, :1], np.zeros(len(self.ids), dtype=np.int64)
            found = counting.rank_batches(self.ids, batch_tokens, served, home, (ranks, per_rank))
            yield from ((picks, used, picks == 0) for picks, used in found)
            return
        for picks, used in self._slot_batches(batch_tokens):
            shape = (len(picks), self.num_layers, ranks, per_rank)
            used = used.reshape(shape)
            yield picks.reshape(shape).sum(axis=3), used.sum(axis=3), np.prod(1 - used, axis=3)

    def _slot_batches(self, batch_tokens: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield ([B, L, P] picks per slot, [B, L, P] probability that the slot is used) of batches.

        With homes (or without replicas) both are certain. Else a pick of expert e reaches a slot
        with the share of homes that the slot serves, and n picks use it with probability 1 - (1 -
        share)^n.
        """
        ids, homes = self.ids, self.home_rank
        if ids is not None and homes is not None and self.has_replicas:

            def slots(rows: slice) -> np.ndarray:
                return self.slots_of(ids[rows], homes[rows], 0)

            for counts in counting.picks_by_batch(ids, self.num_slots, batch_tokens, slots):
                # where the picks decide one by one: costs are added in the order of the batches
                step = len(counts) if self.choices is None else 1
                parts = (counts[row : row + step] for row in range(0, len(counts), step))
                yield from ((part, part > 0) for part in parts)
            return
        share, by_expert = self._share_of_homes(), [self.load_rows]
        if ids is not None:
            by_expert = counting.picks_by_batch(ids, self.num_experts, batch_tokens)
        for counts in by_expert:
            picks = np.take_along_axis(counts, self.table[None], axis=2)
            if not self.has_replicas:
                yield picks, picks > 0
            else:
                yield picks * share, 1 - (1 - share) ** picks

    def _share_of_homes(self) -> np.ndarray:
        """[L, P] share of its expert's picks that a slot serves, over all homes (and tokens, where
        the picks decide).
        """
        serves = np.zeros((self.num_layers, self.num_slots))
        for layer, expert in enumerate(np.maximum(self.table, 0)):  # empty slots serve nothing
            if self.choices is None:
                served = self.served_slot[layer].ravel()
                serves[layer] = np.bincount(served, minlength=self.num_slots)
            else:
                slots = self.served_by_token[1][layer].sum(axis=0)
                whole = np.bincount(expert, weights=slots, minlength=self.num_experts)
                serves[layer] = slots * self.num_ranks / np.maximum(whole, 1)[expert]
        return serves / self.num_ranks


def align_trace(
    trace: RoutingTrace,
    plan: PlacementPlan,
    topology: ClusterTopology | None,
    homes: Homes,
    rule: str | None = None,
    load: np.ndarray | None = None,
) -> AlignedTrace:
    """Check that trace, plan, cluster and homes belong together and align them; raises
    PlacementError that says what does not fit.

    ``rule``: who serves a pick; None: as the plan says; "home": by the table of that rule
    (``placement.serving``); of ``ENGINE_RULES``: see ``engine_serving_slots``. ``load``: [L, E]
    ``trace.load()``, where known.
    """
    check_topology(plan, topology)
    if rule not in (None, "home", *ENGINE_RULES):
        raise PlacementError(
            f"rule: found {rule!r}, expected 'home', 'sglang' or 'in_turn', or none: the plan's own"
        )
    if trace.num_experts != plan.num_experts:
        raise PlacementError(
            f"found a trace with {trace.num_experts} experts per layer and a plan with "
            f"{plan.num_experts}: evaluate a plan on a trace of the same model"
        )
    if trace.num_rows == 0 or trace.num_layers == 0:
        raise PlacementError(
            "found an empty trace, expected tokens in at least one layer: record again"
        )
    row_of = {layer: row for row, layer in enumerate(plan.layer_ids)}
    absent = [int(i) for i in trace.layer_ids if int(i) not in row_of]
    if absent:
        raise PlacementError(
            f"found layers {absent[:5]} in the trace that the plan lacks (it has layers "
            f"{list(plan.layer_ids)[:5]} ...): evaluate a plan on a trace of the same model"
        )
    rows = np.array([row_of[int(i)] for i in trace.layer_ids])
    home_rank = resolve_homes(trace, plan.num_ranks, homes)
    return AlignedTrace(trace, plan, rows, home_rank, rule, load)


def check_topology(
    plan: PlacementPlan,
    topology: ClusterTopology | None,
    advice: str = "make a plan for this cluster",
) -> None:
    """Raise PlacementError unless the cluster has the plan's ranks on the plan's nodes."""
    if topology is not None and tuple(topology.rank_to_node) != plan.rank_to_node:
        raise PlacementError(
            f"found a plan for {plan.num_nodes} nodes x {plan.ranks_per_node} ranks (rank to node "
            f"{list(plan.rank_to_node or ())}), expected one for the cluster "
            f"{list(topology.rank_to_node)}: {advice}"
        )


def resolve_homes(trace: RoutingTrace, num_ranks: int, homes: Homes) -> np.ndarray | None:
    """[T] int64 home rank of every token, or None for uniform homes."""
    if homes is None:
        return None
    if trace.request_id is None or trace.expert_ids is None:
        raise PlacementError(
            "found homes for a trace of counts, expected a trace of tokens: leave homes out"
        )
    if isinstance(homes, str):
        if homes != "trace":
            raise PlacementError(f"homes: found {homes!r}, expected 'trace', a dict or an array")
        if trace.rank is None:
            raise PlacementError(
                "homes='trace': found no ranks in the trace: record with ranks or pass homes"
            )
        ranks = np.asarray(trace.rank)
    elif isinstance(homes, Mapping):
        present, index = np.unique(trace.request_id, return_inverse=True)
        absent = [int(q) for q in present if int(q) not in homes]
        if absent:
            raise PlacementError(
                f"homes: found none for {len(absent)} requests (first: {absent[:5]}), expected a "
                "rank for every request of the trace: assign homes on this trace"
            )
        ranks = np.array([homes[int(q)] for q in present], dtype=np.int64)[index]
    else:
        ranks = np.asarray(homes)
    if ranks.shape != (trace.num_rows,) or ranks.dtype.kind not in "iu":
        raise PlacementError(
            f"homes: found {ranks.dtype} of shape {ranks.shape}, expected integers of shape "
            f"({trace.num_rows},): give one rank per token"
        )
    if ranks.size and (ranks.min() < 0 or ranks.max() >= num_ranks):
        raise PlacementError(
            f"homes: found rank {ranks.min() if ranks.min() < 0 else ranks.max()}, expected 0 to "
            f"{num_ranks - 1}: assign homes for this cluster"
        )
    return ranks.astype(np.int64)


AUTO = "auto"  # a cap (or what requests come in) that is to be found from the trace
RankLists = list[list[int]]  # the experts of each rank, for one layer
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

    slack: each layer has a cap of its own, this much above what it can reach (``AUTO``); then
        ``max_imbalance`` has no meaning. None: ``max_imbalance`` holds.
    worth: least share of the usual order's copies that an imbalance higher by one must save.
    sampling_unit: what requests come in, see ``load_noise.sampling_units``.
    unseen: whether the cap is meant on requests that are not in the trace.
    serving_rule: see ``placement.serving``.
    per_layer: ``num_slots`` is the mean: layers that gain more have more.
    """

    trace: RoutingTrace
    topology: ClusterTopology
    num_slots: int
    max_imbalance: float
    home_rank: np.ndarray | None
    group_of: np.ndarray | None
    seed: int
    objective: str = "copies"
    one_layout: bool = False
    max_home_imbalance: float = 1.05
    slack: float | None = None
    worth: float = 0.0
    sampling_unit: str | int = "request"
    unseen: bool = True
    serving_rule: str = "home"
    per_layer: bool = False

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
    serving_nodes: np.ndarray | None = None,
) -> PlacementPlan:
    """A plan from the experts of each rank, per layer.

    ``by_node``: the lists go through the ranks of node 0, then of node 1 and so on; else through
    the ranks as they are numbered. ``load``: [L, E] of the trace, where known. ``serving_nodes``:
    [L, M, E, X] of a plan for the rule "visited".
    """
    order = list(range(problem.num_ranks))
    if by_node:
        order = [r for node in range(problem.num_nodes) for r in problem.topology.ranks_of(node)]
    most = max(len(held[0]) for held in rows)
    table = np.full((len(rows), problem.num_ranks, most), EMPTY, dtype=np.int32)
    for row, held in enumerate(rows):
        table[row, order, : len(held[0])] = np.array([sorted(experts) for experts in held])
    return PlacementPlan(
        model=problem.trace.model,
        layer_ids=tuple(int(i) for i in problem.trace.layer_ids),
        num_experts=problem.trace.num_experts,
        num_nodes=problem.num_nodes,
        ranks_per_node=problem.ranks_per_node,
        physical_to_logical_map=table.reshape(len(rows), -1),
        expert_load=problem.trace.load() if load is None else load,
        rank_to_node=problem.topology.rank_to_node,
        serving_rule="home" if serving_nodes is None else "visited",
        serving_nodes=serving_nodes,
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
    if objective not in ("copies", "picks", "rank_copies"):
        raise PlacementError(
            f"objective: found {objective!r}, expected 'copies', 'picks' or 'rank_copies'"
        )
    if objective == "rank_copies" and (joint or num_redundant_experts):
        raise PlacementError(
            "objective='rank_copies': found joint homes or redundant experts, expected neither: "
            "use objective='copies', and look at evaluate's transport 'per_rank'"
        )
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
