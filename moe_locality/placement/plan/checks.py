"""What makes a placement plan valid; every message names the layer and the expert or slot that is
wrong.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_locality.errors import PlacementError

if TYPE_CHECKING:
    from moe_locality.placement.plan.schema import PlacementPlan

FORMAT_VERSION = 1


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
    rows, slots = plan.physical_to_logical_map.shape
    if rows != plan.num_layers:
        raise PlacementError(
            f"physical_to_logical_map: found {rows} rows, expected one for each of the "
            f"{plan.num_layers} layers"
        )
    if slots % plan.num_ranks:
        raise PlacementError(
            f"found {slots} slots per layer, expected a multiple of the {plan.num_ranks} ranks "
            f"({plan.num_nodes} nodes x {plan.ranks_per_node}): every rank holds as many slots; "
            f"add {-slots % plan.num_ranks} redundant experts or change the number of ranks"
        )
    load = plan.expert_load
    if load is not None and (load.shape != (rows, plan.num_experts) or load.min() < 0):
        raise PlacementError(
            f"expert_load: found shape {load.shape}, expected ({rows}, {plan.num_experts}) "
            "without negative counts"
        )


def check_rows(plan: PlacementPlan) -> None:
    table, num_experts = plan.physical_to_logical_map, plan.num_experts
    outside = np.argwhere((table < 0) | (table >= num_experts))
    if len(outside):
        row, slot = outside[0]
        raise PlacementError(
            f"layer {plan.layer_ids[row]}: slot {slot} holds expert {table[row, slot]}; "
            f"expected ids from 0 to {num_experts - 1}: correct the map"
        )
    missing = np.argwhere(plan.logical_replica_count == 0)
    if len(missing):
        row, expert = missing[0]
        raise PlacementError(
            f"layer {plan.layer_ids[row]}: expert {expert} has no slot; "
            "every expert needs at least one: correct the map or give the plan more slots"
        )
    by_rank = np.sort(table.reshape(plan.num_layers, plan.num_ranks, -1), axis=2)
    twice = np.argwhere(by_rank[:, :, 1:] == by_rank[:, :, :-1])
    if len(twice):
        row, rank, place = twice[0]
        raise PlacementError(
            f"layer {plan.layer_ids[row]}: expert {by_rank[row, rank, place]} is on rank {rank} "
            "twice; replicas help only on different ranks: give the second slot another expert"
        )
