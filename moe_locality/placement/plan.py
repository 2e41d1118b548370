"""PlacementPlan: which slot holds which expert, on which rank; its checks and its file.

Words: a *logical* expert is what the router names; a *slot* is the place of one physical expert on
a rank; the slots of a rank are consecutive, so slot p is on rank ``p // (P / num_ranks)``. More
slots than experts means that some experts have *replicas*. Every error names the layer and the
expert or slot that is wrong. Shapes: L MoE layers, E experts, P slots, G ranks, X most replicas of
one expert.

Which replica serves a pick is a pure function of the plan, the home and the token's picks
(``serving.py``), so all ranks agree without communication.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.files import dump_rows, write_text
from moe_locality.placement.serving import (
    MOST_NODES,
    RULES,
    check_choices,
    choose_serving_slots,
    count_on_nodes,
    order_nodes,
    pack_choices,
    slots_on_nodes,
    unpack_choices,
)
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import MAX_EXPERTS

FORMAT_VERSION = 1
EMPTY = -1  # instead of an expert: a slot that a layer with fewer slots than others has not


def positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise PlacementError(f"{name}: found {value!r}, expected a positive integer: correct it")
    return int(value)


def ints(name: str, values: Any) -> tuple[int, ...]:
    """A tuple of integers; fractions and strings are refused, not rounded."""
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError as error:
        raise PlacementError(f"{name}: found {values!r}, expected a list of integers") from error


def frozen_ints(name: str, values: Any, dtype: type) -> np.ndarray:
    """A read-only [L, n] copy in ``dtype``; rows of unequal length and fractions are refused."""
    try:
        array = np.array(values)
    except ValueError as error:
        raise PlacementError(
            f"{name}: found rows of unequal length, expected one row of equal length per layer"
        ) from error
    if array.dtype.kind not in "iu" or array.ndim != 2:
        raise PlacementError(
            f"{name}: found an array of {array.dtype} with {array.ndim} dimensions, "
            "expected integers [L, n]: give one row of integers per layer"
        )
    info = np.iinfo(dtype)
    if array.size and (array.min() < info.min or array.max() > info.max):
        raise PlacementError(f"{name}: found values outside {np.dtype(dtype)}: correct them")
    array = np.ascontiguousarray(array, dtype=dtype)
    array.setflags(write=False)
    return array


def check_header(plan: PlacementPlan) -> None:
    if plan.format_version != FORMAT_VERSION:
        raise PlacementError(
            f"found format_version {plan.format_version!r}, expected {FORMAT_VERSION}: leave it out"
        )
    if not isinstance(plan.model, str):
        raise PlacementError(f"model: found {plan.model!r}, expected a string: give its name")
    for name in ("provenance", "costs", "home_profiles"):
        value = getattr(plan, name)
        if not isinstance(value, dict) and (value is not None or name != "home_profiles"):
            raise PlacementError(f"{name}: found {value!r}, expected an object: correct it")
    _check_profiles(plan, plan.home_profiles or {})
    if not plan.layer_ids or len(set(plan.layer_ids)) != len(plan.layer_ids):
        raise PlacementError(
            f"layer_ids: found {list(plan.layer_ids)}, expected one or more different layers"
        )
    nodes = plan.rank_to_node or ()
    if sorted(nodes) != [r // plan.ranks_per_node for r in range(plan.num_ranks)]:
        raise PlacementError(
            f"rank_to_node: found {list(nodes)}, expected {plan.ranks_per_node} ranks on each of "
            f"{plan.num_nodes} nodes: placement needs nodes of equal size"
        )
    rows = len(plan.physical_to_logical_map)
    if rows != plan.num_layers:
        raise PlacementError(
            f"physical_to_logical_map: found {rows} rows, expected one for each of the "
            f"{plan.num_layers} layers"
        )
    if plan.serving_rule not in RULES or (
        plan.serving_rule == "visited" and plan.num_nodes > MOST_NODES
    ):
        raise PlacementError(
            f"serving_rule: found {plan.serving_rule!r} for {plan.num_nodes} nodes, expected one "
            f"of {RULES}, and at most {MOST_NODES} nodes for 'visited': correct it"
        )
    if plan.serving_nodes is not None and plan.serving_rule != "visited":
        raise PlacementError(
            f"serving_nodes: found some with serving_rule {plan.serving_rule!r}, expected "
            "'visited': leave them out"
        )
    load = plan.expert_load
    if load is not None and (load.shape != (rows, plan.num_experts) or load.min() < 0):
        raise PlacementError(
            f"expert_load: found shape {load.shape}, expected ({rows}, {plan.num_experts}) "
            "without negative counts"
        )


def _check_profiles(plan: PlacementPlan, profiles: dict[str, Any]) -> None:
    """Tables have a number for each rank or node; predictors are read by their own class."""
    name = "predictors"
    try:
        dict(profiles.get(name) or {})
        for name in ("domain_rank_share", "group_rank_share"):
            for row in dict(profiles.get(name) or {}).values():
                _check_numbers(row, plan.num_ranks)
        for name, count in (("any_rank_share", plan.num_ranks), ("token_price", plan.num_nodes)):
            if profiles.get(name):
                _check_numbers(profiles[name], count)
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise PlacementError(
            f"home_profiles: found a damaged {name} ({error}), expected numbers for the ranks, "
            "nodes or experts: make the plan again"
        ) from error


def _check_numbers(row: Any, count: int) -> None:
    if (found := np.asarray(row, float).shape) != (count,):
        raise ValueError(f"shape {found}, not ({count},)")


def check_rows(plan: PlacementPlan) -> None:
    table, num_experts = plan.physical_to_logical_map, plan.num_experts
    outside = np.argwhere((table < EMPTY) | (table >= num_experts))
    if len(outside):
        row, slot = outside[0]
        raise PlacementError(
            f"layer {plan.layer_ids[row]}: slot {slot} holds expert {table[row, slot]}; "
            f"expected ids from 0 to {num_experts - 1}, or {EMPTY} for none: correct the map"
        )
    by_rank = table.reshape(plan.num_layers, plan.num_ranks, -1)
    full = np.arange(by_rank.shape[2]) < (by_rank[:, :1] >= 0).sum(axis=2, keepdims=True)
    gaps = np.flatnonzero(((by_rank >= 0) != full).any(axis=(1, 2)))
    if len(gaps):
        raise PlacementError(
            f"layer {plan.layer_ids[gaps[0]]}: found empty slots ({EMPTY}) between others or on "
            "some ranks only, expected them last and as many on every rank: correct the map"
        )
    missing = np.argwhere(plan.logical_replica_count == 0)
    if len(missing):
        row, expert = missing[0]
        raise PlacementError(
            f"layer {plan.layer_ids[row]}: expert {expert} has no slot; "
            "every expert needs at least one: correct the map or give the plan more slots"
        )
    by_rank = np.sort(by_rank, axis=2)
    twice = np.argwhere((by_rank[:, :, 1:] == by_rank[:, :, :-1]) & (by_rank[:, :, 1:] >= 0))
    if len(twice):
        row, rank, place = twice[0]
        raise PlacementError(
            f"layer {plan.layer_ids[row]}: expert {by_rank[row, rank, place]} is on rank {rank} "
            "twice; replicas help only on different ranks: give the second slot another expert"
        )


def to_plain(value: Any, where: str) -> Any:
    """A deep copy in plain JSON types: arrays and tuples become lists, numpy numbers Python
    numbers, nan None. Raises PlacementError for what has no JSON form; ``where`` is its path.
    """
    if isinstance(value, np.ndarray):
        return value.tolist() if value.dtype.kind in "iu" else to_plain(value.tolist(), where)
    if isinstance(value, np.generic):
        return to_plain(value.item(), where)
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise PlacementError(f"{where}: found the key {key!r}, expected a string key")
        return {key: to_plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no nan or infinity
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise PlacementError(
        f"{where}: found a {type(value).__name__}, expected numbers, strings, lists and dicts"
    )


logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementPlan:
    """One placement of the experts of every MoE layer; immutable, and checked when made: a
    PlacementError names the layer and the expert or slot that is wrong.

    Args:
        model: name of the model, empty = any.
        layer_ids: [L] transformer layer index of each MoE layer.
        num_experts: E, logical experts per layer.
        num_nodes, ranks_per_node: shape of the cluster, M nodes of equal size.
        physical_to_logical_map: [L, P] int32, the expert in each slot; the last slots of every rank
            are ``EMPTY`` in a layer that has fewer than others.
        home_profiles: what ``assign_homes`` needs for new requests, or None.
        provenance: how the plan was found (trace hash, solver, seed, options, version).
        costs: the costs predicted when the plan was found.
        expert_load: [L, E] int64 tokens per expert that the plan was made for; decides which
            replica serves which home.
        rank_to_node: [G] node of each rank; None = rank r is on node ``r // ranks_per_node``.
        serving_rule: which copy serves a pick, see ``serving.py``: "home" or "visited".
        serving_nodes: [L, M, E, X] nodes that may serve an expert under "visited", see
            ``node_choices``; None = all that hold it, the least loaded one preferred.
    """

    layer_ids: tuple[int, ...]
    num_experts: int
    num_nodes: int
    ranks_per_node: int
    physical_to_logical_map: np.ndarray
    model: str = ""
    home_profiles: dict[str, Any] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)
    expert_load: np.ndarray | None = None
    rank_to_node: tuple[int, ...] | None = None
    serving_rule: str = "home"
    serving_nodes: np.ndarray | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        put = object.__setattr__  # the dataclass is frozen; this is its constructor
        put(self, "layer_ids", ints("layer_ids", self.layer_ids))
        for name in ("num_experts", "num_nodes", "ranks_per_node"):
            put(self, name, positive(name, getattr(self, name)))
        name = "physical_to_logical_map"
        put(self, name, frozen_ints(name, self.physical_to_logical_map, np.int32))
        slots, ranks = self.num_slots, self.num_ranks
        if not slots or slots % ranks:  # before a list of ranks is made
            raise PlacementError(
                f"found {slots} slots per layer, expected a multiple of the {ranks} ranks "
                f"({self.num_nodes} nodes x {self.ranks_per_node}): every rank holds as many "
                f"slots; add {-slots % ranks} redundant experts or change the number of ranks"
            )
        if self.num_experts > MAX_EXPERTS:  # before they are counted
            most = f"at most {MAX_EXPERTS}, as in traces: correct it"
            raise PlacementError(f"num_experts: found {self.num_experts}, expected {most}")
        if self.expert_load is not None:
            put(self, "expert_load", frozen_ints("expert_load", self.expert_load, np.int64))
        nodes: Any = self.rank_to_node
        if nodes is None:
            nodes = (r // self.ranks_per_node for r in range(self.num_ranks))
        put(self, "rank_to_node", ints("rank_to_node", nodes))
        for name in ("provenance", "costs", "home_profiles"):
            put(self, name, to_plain(getattr(self, name), name))
        self.validate()
        if self.serving_nodes is not None:
            nodes = np.array(self.serving_nodes, dtype=np.int64)
            check_choices(nodes, self.held_by_node)
            nodes = nodes[..., : max(int((nodes >= 0).any(axis=(0, 1, 2)).sum()), 1)]  # no padding
            nodes.setflags(write=False)
            put(self, "serving_nodes", nodes)

    @property
    def num_layers(self) -> int:
        return len(self.layer_ids)

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def num_slots(self) -> int:
        return int(self.physical_to_logical_map.shape[1])

    @property
    def slots_per_rank(self) -> int:
        return self.num_slots // self.num_ranks

    @property
    def num_redundant_experts(self) -> int:
        return self.num_slots - self.num_experts

    @property
    def slots_of_layers(self) -> np.ndarray:
        """[L] slots of each layer, without empty ones."""
        return (self.physical_to_logical_map >= 0).sum(axis=1)

    def experts_of_slots(self, row: int) -> np.ndarray:
        """[slots of a layer] int64, the expert in each; without empty slots."""
        some = self.physical_to_logical_map[row].astype(np.int64)
        return some[some >= 0]

    @property
    def is_permutation(self) -> bool:
        """Whether every expert has exactly one slot: the placement is a relabelling."""
        return self.num_slots == self.num_experts

    @property
    def rank_of_slot(self) -> np.ndarray:
        """[P] int32, the rank of each slot."""
        return (np.arange(self.num_slots) // self.slots_per_rank).astype(np.int32)

    @property
    def node_of_rank(self) -> np.ndarray:
        """[G] int32, the node of each rank."""
        return np.asarray(self.rank_to_node, dtype=np.int32)

    @property
    def topology(self) -> ClusterTopology:
        """The cluster that the plan is for, with the default figures of links."""
        return ClusterTopology(rank_to_node=self.rank_to_node or ())

    @property
    def logical_replica_count(self) -> np.ndarray:
        """[L, E] int32, how many slots hold each expert."""
        rows = [row[row >= 0] for row in self.physical_to_logical_map]
        return np.array([np.bincount(row, minlength=self.num_experts) for row in rows], np.int32)

    @property
    def logical_to_physical_map(self) -> np.ndarray:
        """[L, E, X] int32, the slots of each expert in rising order, padded with -1."""
        counts = self.logical_replica_count
        table = np.full((*counts.shape, int(counts.max())), -1, dtype=np.int32)
        row, slot = np.nonzero(self.physical_to_logical_map >= 0)
        order = np.lexsort((slot, self.physical_to_logical_map[row, slot], row))
        table[np.arange(counts.max()) < counts[..., None]] = slot[order]
        return table

    @property
    def held_by_node(self) -> np.ndarray:
        """[L, E, M] bool, the nodes that hold each expert."""
        node_of_slot = self.node_of_rank[self.rank_of_slot]
        return count_on_nodes(self.physical_to_logical_map, node_of_slot, self.num_experts) > 0

    def node_choices(self) -> np.ndarray:
        """[L, M, E, X] nodes that may serve expert e for homes on node m, padded with -1: the first
        one that the token visits anyway does, else the first one. Under the rule "home" X is 1.
        """
        if self.serving_nodes is not None:
            return self.serving_nodes
        firsts = [list(self.rank_to_node or ()).index(node) for node in range(self.num_nodes)]
        served = self.node_of_rank[self.rank_of_slot[self.serving_slot()[:, firsts]]]
        if self.serving_rule == "home":
            return served[..., None].astype(np.int64)
        return order_nodes(self.held_by_node, served)

    def slot_choices(self, rank: int) -> np.ndarray:
        """[L, E, X] int32: ``node_choices`` as slots, for tokens whose home is ``rank``; a pure
        function of the plan, so every rank computes its own without talking.
        """
        nodes = self.node_choices()[:, self.node_of_rank[rank]]  # [L, E, X]
        served = self.serving_slot()
        if self.serving_rule == "home":
            return served[:, rank, :, None]
        expert = np.arange(self.num_experts)[:, None]
        node_of_slot = self.node_of_rank[self.rank_of_slot]
        rows = []
        for table, some, own in zip(self.physical_to_logical_map, nodes, served, strict=True):
            slots = slots_on_nodes(table, own, node_of_slot, self.node_of_rank)[rank]
            rows.append(np.where(some >= 0, slots[some, expert], -1))
        return np.stack(rows).astype(np.int32)

    def serving_slot(self) -> np.ndarray:
        """[L, G, E] int32: the slot that serves expert e for a token whose home is rank g, under
        the rule "home", see ``choose_serving_slots``. All ranks of a node name the same slot for an
        expert that their node lacks, so that a token can be sent once per node.
        """
        if self.is_permutation:
            only = np.argsort(self.physical_to_logical_map, axis=1).astype(np.int32)
            return np.repeat(only[:, None], self.num_ranks, axis=1)
        return choose_serving_slots(
            self.logical_to_physical_map, self.rank_of_slot, self.node_of_rank, self.expert_load
        )

    @classmethod
    def linear(
        cls,
        num_experts: int,
        layer_ids: Iterable[int],
        num_nodes: int,
        ranks_per_node: int,
        model: str = "",
        rank_to_node: tuple[int, ...] | None = None,
    ) -> PlacementPlan:
        """The layout that DeepSpeed, vLLM and Hugging Face assume: expert e in slot e."""
        layers = tuple(int(i) for i in layer_ids)
        rows = np.tile(np.arange(num_experts, dtype=np.int32), (len(layers), 1))
        return cls(
            model=model,
            layer_ids=layers,
            num_experts=num_experts,
            num_nodes=num_nodes,
            ranks_per_node=ranks_per_node,
            physical_to_logical_map=rows,
            rank_to_node=rank_to_node,
            provenance={"method": "linear"},
        )

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> PlacementPlan:
        """Build a plan from parsed JSON; refuses unknown or missing keys and other versions."""
        if not isinstance(content, Mapping):
            raise PlacementError(
                f"found a {type(content).__name__}, expected an object: a plan starts with '{{'"
            )
        version = content.get("format_version")
        if version != FORMAT_VERSION:
            raise PlacementError(
                f"found format_version {version!r}, expected {FORMAT_VERSION}: "
                "make the plan again with this version of moe_locality"
            )
        known = sorted(item.name for item in fields(cls))
        required = {f.name for f in fields(cls) if f.default is f.default_factory is MISSING}
        missing = sorted(required - set(content))
        unknown = sorted(set(content) - set(known))
        if missing or unknown:
            raise PlacementError(
                f"found unknown keys {unknown} and missing keys {missing}, expected {known}: "
                "correct the file or make the plan again"
            )
        values = dict(content)
        packed = values.pop("serving_nodes", None)
        try:
            found = cls(**values)
            if packed is None:
                return found
            nodes = unpack_choices(packed, found.held_by_node)
            return replace(found, serving_nodes=nodes)
        except TypeError as error:
            raise PlacementError(
                f"a value has the wrong type: {error}: correct the file or make the plan again"
            ) from error

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> PlacementPlan:
        """Read a plan file; raises PlacementError, which names the file, where it is missing,
        damaged, or not a valid plan.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlacementError(
                f"cannot read the plan {path}: {error.strerror}: check the path"
            ) from error
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
            raise PlacementError(
                f"the plan {path} is damaged, expected JSON: {error}: make the plan again"
            ) from error
        try:
            return cls.from_dict(content)
        except PlacementError as error:
            raise PlacementError(f"the plan {path} is not valid: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; ``rank_to_node`` only where nodes do not hold consecutive ranks,
        ``serving_rule`` and ``serving_nodes`` only for the rule "visited".
        """
        nodes = self.rank_to_node or ()
        left_out = {"serving_nodes"}
        if all(node == r // self.ranks_per_node for r, node in enumerate(nodes)):
            left_out.add("rank_to_node")
        if self.serving_rule == "home":
            left_out.add("serving_rule")
        names = (item.name for item in fields(self) if item.name not in left_out)
        # copies: a plan is immutable
        content = {name: to_plain(getattr(self, name), name) for name in names}
        if self.serving_nodes is not None:
            content["serving_nodes"] = pack_choices(self.serving_nodes, self.held_by_node)
        return content

    def to_json(self) -> str:
        """Sorted keys, one line per layer, so that ``diff`` shows which layers changed."""
        return dump_rows(self.to_dict()) + "\n"

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan whole or not at all, see ``files.write_text``."""
        return write_text(path, self.to_json(), what="plan")

    def digest(self) -> str:
        """SHA-256 (hex) of what decides where tokens go: all but ``provenance`` and ``costs``."""
        content = self.to_dict()
        del content["provenance"], content["costs"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PlacementPlan):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.digest())

    def validate(self) -> None:
        """Raise PlacementError unless the plan is complete and consistent."""
        check_header(self)
        check_rows(self)

    def check_fits(
        self,
        *,
        num_experts: int | None = None,
        layer_count: int | None = None,
        layer_ids: Iterable[int] | None = None,
        num_ranks: int | None = None,
        model: str | None = None,
        model_type: str = "",
    ) -> None:
        """Raise PlacementError unless the plan fits.

        None and empty names are not checked. A plan has the ``model_type`` of transformers in its
        provenance where the recorder saw it.
        """
        made_for = self.provenance.get("model_type")
        layers = None if layer_ids is None else tuple(int(i) for i in layer_ids)
        rows = [
            ("experts per layer", self.num_experts, num_experts),
            ("MoE layers", self.num_layers, layer_count),
            ("layer ids", self.layer_ids, layers),
            ("expert-parallel ranks", self.num_ranks, num_ranks),
            ("model", self.model, model if self.model and model else None),
            ("model_type", made_for, model_type if made_for and model_type else None),
        ]
        for what, found, expected in rows:
            if expected is not None and found != expected:
                raise PlacementError(
                    f"the plan does not fit: {what}: found {found!r} in the plan, "
                    f"expected {expected!r}: make a plan for this model and cluster with "
                    "`moe-locality place`"
                )

    def rows_for(self, layer_ids: Sequence[int] | None, layer_count: int) -> list[int]:
        """Return the row of each MoE layer of a model, given its transformer layer indices; raises
        PlacementError where the plan has another number of layers, or other ones.

        A plan with layers 0, 1, 2, ... is also taken in order: its trace may have counted MoE
        layers only. So is any plan by a model whose indices are unknown (None).
        """
        self.check_fits(layer_count=layer_count)
        row_of = {layer: row for row, layer in enumerate(self.layer_ids)}
        rows = [row_of[layer] for layer in sorted(row_of)]
        if layer_ids is None:
            return rows
        if set(layer_ids) == row_of.keys():
            return [row_of[layer] for layer in layer_ids]
        if sorted(row_of) != list(range(layer_count)):
            raise PlacementError(
                f"the plan does not fit: layer ids: found {self.layer_ids} in the plan, "
                f"expected {tuple(layer_ids)}, the transformer layers of the model that have "
                "experts: make a plan for this model with `moe-locality place`"
            )
        logger.warning(
            "the plan numbers its layers 0 to %d; they are taken in order for the MoE layers %s",
            layer_count - 1,
            list(layer_ids),
        )
        return rows


def first_slots(slot_to_logical: np.ndarray) -> np.ndarray:
    """Return [E] the lowest slot that holds each of the experts 0..E-1."""
    experts, slots = np.unique(slot_to_logical, return_index=True)
    assert (experts == np.arange(len(experts))).all(), "an expert has no slot"
    return slots


def source_slots(current: np.ndarray, target: np.ndarray, num_ranks: int = 1) -> np.ndarray:
    """Return [P] the slot of ``current [S]`` that each slot of ``target [P]`` is copied from: one
    on the same rank where there is one, else the lowest. For two permutations:
    ``target[s] = current[sources[s]]``.
    """
    sources = first_slots(current)[target]
    per_rank, new_per_rank = len(current) // num_ranks, len(target) // num_ranks
    for slot, expert in enumerate(target if num_ranks > 1 else ()):
        first = slot // new_per_rank * per_rank
        here = np.flatnonzero(current[first : first + per_rank] == expert)
        if len(here):
            sources[slot] = first + here[0]
    return sources


def count_moves(sources: Sequence[np.ndarray], slots_per_rank: int) -> dict[str, list[int]]:
    """Per layer, how many experts change their slot, and how many their rank; ``sources`` of each
    layer as in ``source_slots``.
    """
    slots = np.arange(len(sources[0]) if sources else 0)
    return {
        "experts_moved_per_layer": [int((s != slots).sum()) for s in sources],
        "experts_changing_rank_per_layer": [count_moved(s, slots_per_rank) for s in sources],
    }


def count_moved(sources: np.ndarray, slots_per_rank: int) -> int:
    """How many experts of one layer change their rank; ``sources`` as in ``source_slots``."""
    return int((sources // slots_per_rank != np.arange(len(sources)) // slots_per_rank).sum())


def check_is_permutation(plan: PlacementPlan) -> None:
    """Raise PlacementError where the plan has replicas."""
    if not isinstance(plan, PlacementPlan):
        raise PlacementError(
            f"found a {type(plan).__name__}, expected a PlacementPlan: read one with "
            "PlacementPlan.read(path)"
        )
    if not plan.is_permutation:
        raise PlacementError(
            f"found a plan with {plan.num_redundant_experts} replicas, expected one slot per "
            "expert: files, running engines and AutoEP hold every expert once. Make a plan with "
            "num_redundant_experts=0; or let moe_locality.initialize (DeepSpeed's MoE layers) or "
            "apply (transformers) make the replicas at the start, from the checkpoint as it is"
        )


def check_equal_slots(plan: PlacementPlan, what: str) -> None:
    """Raise PlacementError where layers have unlike numbers of slots; ``what`` needs them alike."""
    slots = plan.slots_of_layers
    if (slots != plan.num_slots).any():
        raise PlacementError(
            f"found a plan with {slots.min()} to {slots.max()} slots per layer, expected as many "
            f"in every layer for {what}: make a plan without redundant_per_layer"
        )


def check_nodes(
    plan: PlacementPlan, topology: ClusterTopology, ep_groups: Sequence[Sequence[int]]
) -> None:
    """Raise where no expert group lies on nodes as the plan's ranks do; warn where only some do.
    Every rank sees all groups, so all ranks decide alike.
    """

    def pattern(nodes: Iterable[int]) -> list[int]:
        seen: dict[int, int] = {}
        return [seen.setdefault(int(node), len(seen)) for node in nodes]

    wanted = pattern(plan.node_of_rank)
    found = [pattern(topology.node_of(rank) for rank in ranks) for ranks in ep_groups]
    if wanted not in found:
        raise PlacementError(
            f"found a plan whose ranks lie on nodes {wanted} (one number per rank), expected "
            f"{found[0]} as the ranks of this cluster do ({topology.describe()}): make a plan for "
            "it with `moe-locality place`, or correct the cluster section (on one machine, "
            "cluster: {num_nodes, ranks_per_node} lets ranks stand for nodes)"
        )
    others = sum(nodes != wanted for nodes in found)
    if others:
        logger.warning(
            "moe_locality: %d of %d expert groups lie on nodes in another way than the plan's "
            "ranks; there it saves less",
            others,
            len(found),
        )
