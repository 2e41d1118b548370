"""PlacementPlan: which slot holds which expert, on which rank; a file that people can diff.

Words: a *logical* expert is what the router names; a *slot* is the place of one physical expert on
a rank; the slots of a rank are consecutive, so slot p is on rank ``p // (P / num_ranks)``. More
slots than experts means that some experts have *replicas*. Shapes: L MoE layers, E experts,
P slots, G ranks, X most replicas of one expert.

Not here: how a plan is found (``solve``) and what it costs (``evaluate``).
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.files import replace_text
from moe_locality.placement.plan.checks import (
    FORMAT_VERSION,
    check_header,
    check_rows,
    frozen_ints,
    ints,
    positive,
)
from moe_locality.placement.plan.serving import choose_serving_slots
from moe_locality.placement.plan.text import dump_rows, to_plain

logger = logging.getLogger(__name__)

_REQUIRED = (
    "format_version",
    "layer_ids",
    "num_experts",
    "num_nodes",
    "physical_to_logical_map",
    "ranks_per_node",
)
_OPTIONAL = ("costs", "expert_load", "home_profiles", "model", "provenance", "rank_to_node")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementPlan:
    """One placement of the experts of every MoE layer; immutable and checked when made.

    Args:
        model: name of the model, empty = any.
        layer_ids: [L] transformer layer index of each MoE layer.
        num_experts: E, logical experts per layer.
        num_nodes, ranks_per_node: shape of the cluster, M nodes of equal size.
        physical_to_logical_map: [L, P] int32, the expert in each slot.
        home_profiles: what ``assign_homes`` needs for new requests, or None.
        provenance: how the plan was found (trace hash, solver, seed, options, version).
        costs: the costs predicted when the plan was found.
        expert_load: [L, E] int64 tokens per expert that the plan was made for; decides which
            replica serves whom.
        rank_to_node: [G] node of each rank; None = rank r is on node ``r // ranks_per_node``.

    Raises:
        PlacementError: names the layer and the expert or slot that is wrong.
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
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        put = object.__setattr__  # the dataclass is frozen; this is its constructor
        put(self, "layer_ids", ints("layer_ids", self.layer_ids))
        for name in ("num_experts", "num_nodes", "ranks_per_node"):
            put(self, name, positive(name, getattr(self, name)))
        put(
            self,
            "physical_to_logical_map",
            frozen_ints("physical_to_logical_map", self.physical_to_logical_map, np.int32),
        )
        if self.expert_load is not None:
            put(self, "expert_load", frozen_ints("expert_load", self.expert_load, np.int64))
        if self.rank_to_node is None:
            nodes: Iterable[int] = (r // self.ranks_per_node for r in range(self.num_ranks))
        else:
            nodes = self.rank_to_node
        put(self, "rank_to_node", ints("rank_to_node", nodes))
        put(self, "provenance", to_plain(self.provenance, "provenance"))
        put(self, "costs", to_plain(self.costs, "costs"))
        if self.home_profiles is not None:
            put(self, "home_profiles", to_plain(self.home_profiles, "home_profiles"))
        self.validate()

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
    def is_permutation(self) -> bool:
        """True when every expert has exactly one slot: the placement is a relabelling of the
        experts.
        """
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
    def logical_replica_count(self) -> np.ndarray:
        """[L, E] int32, how many slots hold each expert."""
        flat = self.physical_to_logical_map + self.num_experts * np.arange(self.num_layers)[:, None]
        counts = np.bincount(flat.ravel(), minlength=self.num_layers * self.num_experts)
        return counts.reshape(self.num_layers, self.num_experts).astype(np.int32)

    @property
    def logical_to_physical_map(self) -> np.ndarray:
        """[L, E, X] int32, the slots of each expert in rising order, padded with -1."""
        counts = self.logical_replica_count
        table = np.full((*counts.shape, int(counts.max())), -1, dtype=np.int32)
        # stable: slots of the same expert stay in rising order
        order = np.argsort(self.physical_to_logical_map, axis=1, kind="stable")
        expert = np.take_along_axis(self.physical_to_logical_map, order, axis=1)
        first = np.cumsum(counts, axis=1) - counts
        replica = np.arange(self.num_slots)[None] - np.take_along_axis(first, expert, axis=1)
        table[np.arange(self.num_layers)[:, None], expert, replica] = order
        return table

    def serving_slot(self) -> np.ndarray:
        """[L, G, E] int32: the slot that serves expert e for a token whose home is rank g.

        The replica on the same rank, else one on the same node, else the least loaded one. All
        ranks of a node name the same slot for an expert that their node lacks, so that a token can
        be sent once per node. A pure function of the plan: every rank computes the same table
        without talking.
        """
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
    ) -> "PlacementPlan":
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
    def from_dict(cls, content: Mapping[str, Any]) -> "PlacementPlan":
        """Build a plan from the parsed JSON; unknown or missing keys and other versions are
        refused.
        """
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
        missing = [key for key in _REQUIRED if key not in content]
        unknown = sorted(set(content) - set(_REQUIRED) - set(_OPTIONAL))
        if missing or unknown:
            raise PlacementError(
                f"found unknown keys {unknown} and missing keys {missing}, expected "
                f"{sorted((*_REQUIRED, *_OPTIONAL))}: correct the file or make the plan again"
            )
        try:
            return cls(**dict(content))
        except TypeError as error:
            raise PlacementError(
                f"a value has the wrong type: {error}: correct the file or make the plan again"
            ) from error

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "PlacementPlan":
        """Read a plan file.

        Raises:
            PlacementError: the file is missing, damaged, or not a valid plan; the message names the
                file.
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
        """Plain JSON types only; ``rank_to_node`` only where nodes do not hold consecutive
        ranks.
        """
        content: dict[str, Any] = {
            "format_version": self.format_version,
            "model": self.model,
            "layer_ids": list(self.layer_ids),
            "num_experts": self.num_experts,
            "num_nodes": self.num_nodes,
            "ranks_per_node": self.ranks_per_node,
            "physical_to_logical_map": self.physical_to_logical_map.tolist(),
            "provenance": to_plain(self.provenance, "provenance"),  # copies: a plan is immutable
            "costs": to_plain(self.costs, "costs"),
            "home_profiles": to_plain(self.home_profiles, "home_profiles"),
            "expert_load": None if self.expert_load is None else self.expert_load.tolist(),
        }
        if any(node != r // self.ranks_per_node for r, node in enumerate(self.rank_to_node or ())):
            content["rank_to_node"] = list(self.rank_to_node or ())
        return content

    def to_json(self) -> str:
        """Sorted keys, one line per layer, so that ``diff`` shows which layers changed."""
        return dump_rows(self.to_dict()) + "\n"

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan whole or not at all: a temporary file in the same folder, fsync,
        rename.
        """
        return replace_text(path, self.to_json())

    def digest(self) -> str:
        """SHA-256 (hex) of everything that decides where tokens go: all but ``provenance`` and
        ``costs``.
        """
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
        """Raise PlacementError unless the plan is complete and consistent (called by the
        constructor).
        """
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
    ) -> None:
        """Raise PlacementError unless the plan fits what is given; what is None (or an empty model)
        is not checked.
        """
        layers = None if layer_ids is None else tuple(int(i) for i in layer_ids)
        rows = [
            ("experts per layer", self.num_experts, num_experts),
            ("MoE layers", self.num_layers, layer_count),
            ("layer ids", self.layer_ids, layers),
            ("expert-parallel ranks", self.num_ranks, num_ranks),
            ("model", self.model, model if self.model and model else None),
        ]
        for what, found, expected in rows:
            if expected is not None and found != expected:
                raise PlacementError(
                    f"the plan does not fit: {what}: found {found!r} in the plan, "
                    f"expected {expected!r}: make a plan for this model and cluster with "
                    "`moe-locality place`"
                )

    def rows_for(self, layer_ids: Sequence[int] | None, layer_count: int) -> list[int]:
        """Return the row of each MoE layer of a model, given its transformer layer indices.

        A plan with layers 0, 1, 2, ... is also taken in order: its trace may have counted MoE
        layers only. So is any plan by a model whose indices are unknown (None).

        Raises:
            PlacementError: the plan has another number of layers, or other ones.
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
