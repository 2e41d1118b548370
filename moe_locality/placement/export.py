"""Plans in the formats that serving engines and DeepSpeed read, and plans from engine maps.

What each engine takes:

* ``sglang``: ``{"physical_to_logical_map": rows}``, one row per *transformer* layer, dense or not:
  ``--init-expert-location FILE.json`` (srt/eplb/expert_location.py of SGLang 0.5.23). Only that
  key: SGLang passes every key on as an argument. With replicas too.
* ``trtllm``: the YAML of TensorRT-LLM's ``moe_config.load_balancer``, a static assignment: rows by
  *transformer* layer (examples/wide_ep/ep_load_balancer). With replicas too.
* ``vllm-ascend``: the experts of every device of every *MoE* layer: ``eplb_config.expert_map_path``
  (vllm_ascend/eplb/core/eplb_utils.py of vllm-ascend 0.23.0.post1, which takes the devices in the
  order of the file). With replicas too.
* ``vllm``: a list of rows, slot → logical expert, one row per *MoE* layer: ``eplb_config.
  initial_expert_map_path`` of vllm-project/vllm PR 49572. No released vLLM (up to 0.33.0) reads it.
* ``vllm-ranks``: ``{"expert_to_ep_rank": [E]}``, the rank of every expert: ``--expert-placement-
  file`` of vllm-project/vllm PR 34811 (issue 34297). One list for all layers, no replicas; a rank
  holds its experts in rising order. No released vLLM reads it either.
* ``autoep``: layer id → the placement descriptor of DeepSpeed's AutoEP checkpoints
  (deepspeed/checkpoint/autoep_affine.py, 0.19.8). With replicas too.
"""

import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.files import write_text
from moe_locality.placement.plan import PlacementPlan, check_equal_slots
from moe_locality.trace.schema import MAX_LAYERS

AUTOEP_DESCRIPTOR_VERSION = 1


def to_vllm_map(plan: PlacementPlan) -> list[list[int]]:
    """[L][P]: the logical expert in every slot of every MoE layer, the first layer first."""
    return plan.physical_to_logical_map[np.argsort(plan.layer_ids)].tolist()


def to_vllm_ranks(plan: PlacementPlan) -> dict[str, list[int]]:
    """``{"expert_to_ep_rank": [E]}``; raises PlacementError where the plan has replicas, or its
    layers differ.
    """
    if not plan.is_permutation:
        raise PlacementError(
            f"found {plan.num_redundant_experts} replicas per layer, expected none: vLLM's "
            "placement file names one rank per expert; export with --to vllm"
        )
    rank_of = np.argsort(plan.physical_to_logical_map, axis=1) // plan.slots_per_rank  # [L, E]
    differing = np.flatnonzero((rank_of != rank_of[0]).any(axis=1))
    if len(differing):
        raise PlacementError(
            f"found another placement in layer {plan.layer_ids[differing[0]]} than in layer "
            f"{plan.layer_ids[0]}, expected the same in all: vLLM's placement file has one list "
            "for all layers; export with --to vllm"
        )
    return {"expert_to_ep_rank": rank_of[0].tolist()}


def to_sglang_map(plan: PlacementPlan, num_hidden_layers: int | None) -> dict[str, Any]:
    """``{"physical_to_logical_map": [rows][P]}`` with a row for each *transformer* layer; the
    layers without experts get the linear row. Raises PlacementError where ``num_hidden_layers`` is
    not given, which a plan cannot know, or a layer of the plan is not below it.
    """
    check_equal_slots(plan, "an engine, which has one number of slots")
    if num_hidden_layers is None:
        raise PlacementError(
            f"found a plan of the MoE layers {list(plan.layer_ids)[:4]} ... and no number of "
            "transformer layers, expected it, for SGLang reads a row for each, dense ones too: "
            "give num_hidden_layers=, as the model's config has it"
        )
    if max(plan.layer_ids) >= num_hidden_layers or min(plan.layer_ids) < 0:
        raise PlacementError(
            f"found layer ids up to {max(plan.layer_ids)} in the plan, expected them below "
            f"num_hidden_layers = {num_hidden_layers}: give the number of layers of the model"
        )
    if num_hidden_layers > MAX_LAYERS:  # a row for each
        most = f"at most {MAX_LAYERS:,}, more than a model has: lower it"
        raise PlacementError(f"num_hidden_layers: found {num_hidden_layers}, expected {most}")
    filler = [slot % plan.num_experts for slot in range(plan.num_slots)]
    of_layer = dict(zip(plan.layer_ids, plan.physical_to_logical_map.tolist(), strict=True))
    return {"physical_to_logical_map": [of_layer.get(i, filler) for i in range(num_hidden_layers)]}


def to_trtllm(plan: PlacementPlan) -> dict[str, Any]:
    """The load balancer of TensorRT-LLM, static; its layers are transformer layers."""
    rows = zip(plan.layer_ids, plan.physical_to_logical_map.tolist(), strict=True)
    return {
        "num_slots": plan.num_slots,
        "layer_updates_per_iter": 0,
        "initial_global_assignments": dict(sorted(rows)),
    }


def with_layers(
    plan: PlacementPlan, layers: Sequence[int] | None, num_hidden_layers: int | None
) -> PlacementPlan:
    """The plan with these ``layer_ids``: the transformer layers of its rows, in rising order.
    Raises PlacementError where their number differs; or none are given and the plan's are 0, 1, 2,
    ... of a model with more layers: old traces and bare models count MoE layers only.
    """
    count, first = plan.num_layers, sorted(plan.layer_ids) == list(range(plan.num_layers))
    if layers is None:
        if num_hidden_layers is None or count >= num_hidden_layers or not first:
            return plan
        raise PlacementError(
            f"found a plan of the layers 0 to {count - 1} for a model with {num_hidden_layers}, "
            "expected to know which transformer layers they are: a recording may have counted MoE "
            f"layers only; give --layers, such as {num_hidden_layers - count}-"
            f"{num_hidden_layers - 1} (dense layers first) or 0-{count - 1} (dense layers last)"
        )
    if len(set(layers)) != count or len(layers) != count:
        raise PlacementError(
            f"found {len(layers)} layers in --layers, expected {count} different ones, one for "
            "each MoE layer of the plan: correct them"
        )
    new = dict(zip(sorted(plan.layer_ids), sorted(layers), strict=True))
    return replace(plan, layer_ids=tuple(new[layer] for layer in plan.layer_ids))


def to_autoep_descriptors(plan: PlacementPlan) -> dict[int, dict[str, Any]]:
    """Layer id → what ``deepspeed.checkpoint.autoep_affine.make_autoep_placement_descriptor(
    num_experts, experts_by_rank)`` returns (DeepSpeed 0.19.8), made without importing DeepSpeed.
    """
    by_rank = plan.physical_to_logical_map.reshape(plan.num_layers, plan.num_ranks, -1).tolist()
    return {
        layer: {
            "version": AUTOEP_DESCRIPTOR_VERSION,
            "num_experts": plan.num_experts,
            "ep_size": plan.num_ranks,
            "ranks": [{"rank": rank, "experts": held} for rank, held in enumerate(rows)],
        }
        for layer, rows in zip(plan.layer_ids, by_rank, strict=True)
    }


def to_vllm_ascend(plan: PlacementPlan) -> dict[str, Any]:
    """The map of vllm-ascend; its ``layer_id`` counts MoE layers."""
    layers = []
    for number, row in enumerate(to_vllm_map(plan)):
        held = np.reshape(row, (plan.num_ranks, -1)).tolist()
        devices = [{"device_id": rank, "device_expert": some} for rank, some in enumerate(held)]
        layers.append({"layer_id": number, "device_count": plan.num_ranks, "device_list": devices})
    return {"moe_layer_count": plan.num_layers, "layer_list": layers}


TARGETS = {
    "sglang": to_sglang_map,
    "trtllm": lambda plan, _: to_trtllm(plan),
    "vllm-ascend": lambda plan, _: to_vllm_ascend(plan),
    "vllm": lambda plan, _: to_vllm_map(plan),
    "vllm-ranks": lambda plan, _: to_vllm_ranks(plan),
    "autoep": lambda plan, _: to_autoep_descriptors(plan),
}
"""Name of each target → function of (plan, num_hidden_layers or None) that returns JSON types."""

ENGINE_RULES = ("sglang", "in_turn")  # see ``engine_serving_slots``

BY_TRANSFORMER_LAYER = ("sglang", "trtllm")


def write_export(
    plan: PlacementPlan,
    path: str | os.PathLike[str],
    target: str,
    num_hidden_layers: int | None = None,
    layers: Sequence[int] | None = None,
) -> Path:
    """Write a plan for one of ``TARGETS``, whole or not at all: as JSON, for ``trtllm`` as YAML;
    ``layers``: see ``with_layers``. Raises PlacementError where the target is unknown or cannot
    hold this plan, or the file would not be read under this name; ConfigError where it cannot be
    written.
    """
    if target not in TARGETS:
        raise PlacementError(f"found target {target!r}, expected one of: {', '.join(TARGETS)}")
    if target in ("sglang", "vllm-ascend") and not Path(path).name.endswith(".json"):
        raise PlacementError(
            f"found the name {Path(path).name} for a map of {target}, which takes a file only by "
            "the end .json: give such a name"
        )
    check_equal_slots(plan, "an engine, which has one number of slots")
    known = num_hidden_layers if target in BY_TRANSFORMER_LAYER else None
    content = TARGETS[target](with_layers(plan, layers, known), num_hidden_layers)
    text = json.dumps(content) + "\n"
    if target == "trtllm":  # a line for each key, and for each layer
        import yaml

        text = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=math.inf)
    return write_text(path, text, what="map")


def launch_lines(
    plan: PlacementPlan, target: str, path: str | os.PathLike[str], plan_path: str = "PLAN"
) -> tuple[str, ...]:
    """What starts the engine of a target with the file, and what it does with the plan."""
    ranks, copies = plan.num_ranks, plan.num_redundant_experts
    in_turn = (
        f"takes the {copies} copies in turn, near or far: see moe-locality evaluate --rule in_turn"
    )
    if target == "sglang":
        redundant = f" --ep-num-redundant-experts {copies}" if copies else ""
        return (
            f"start with: --init-expert-location {path}{redundant} --tp-size {ranks} --ep-size "
            f"{ranks} --attn-dp-size {ranks} --nnodes {plan.num_nodes} --moe-a2a-backend deepep",
            "without an a2a backend every rank computes all tokens, and the map saves nothing",
            "the home of a request: header X-Data-Parallel-Rank, or routed_dp_rank in its body",
            *(("which copies it serves: moe-locality evaluate --rule sglang",) if copies else ()),
        )
    if target == "trtllm":
        return (
            f"start with: trtllm-serve MODEL --tp_size {ranks} --ep_size {ranks} "
            "--extra_llm_api_options OPTIONS.yaml, where OPTIONS.yaml has",
            "  enable_attention_dp: true",
            f"  moe_config: {{backend: WIDEEP, load_balancer: {path}}}",
            "without attention DP, EP over several ranks and WIDEEP it is left out silently",
            *((f"TensorRT-LLM {in_turn}",) if copies else ()),
        )
    if target == "vllm-ascend":
        config = json.dumps({"eplb_config": {"expert_map_path": str(path)}})
        return (
            f"start with: --enable-expert-parallel --additional-config '{config}', tensor parallel "
            f"x data parallel size {ranks}",
            "the home of a request: header X-data-parallel-rank",
            *((f"vllm-ascend {in_turn}",) if copies else ()),
        )
    if target == "autoep":
        return ("no released DeepSpeed (up to 0.19.8) reads it: use moe_locality.initialize",)
    baked = f"moe-locality bake MODEL --plan {plan_path} --out BAKED"
    return (
        "no released vLLM (up to 0.33.0) reads a map: this file is for an open pull request",
        "stock vLLM runs a plan without replicas as a model in its order: " + baked,
        f"then start with: vllm serve BAKED --enable-expert-parallel --data-parallel-size {ranks} "
        "--all2all-backend deepep_high_throughput; home of a request: header X-data-parallel-rank",
    )


def engine_serving_slots(plan: PlacementPlan, rule: str) -> np.ndarray:
    """[L, G, E] int32: the slot that serves expert e for tokens of data-parallel rank g.

    ``rule``: "sglang", see ``sglang_serving_slots``; "in_turn": of n copies, rank g takes number g
    modulo n, wherever it is. So does vllm-ascend (0.23.0.post1, without tensor parallelism);
    TensorRT-LLM takes them in turn token by token: as many picks for each.
    """
    if rule == "sglang":
        return sglang_serving_slots(plan)
    turn = np.arange(plan.num_ranks)[:, None] % plan.logical_replica_count[:, None]  # [L, G, E]
    slots = plan.logical_to_physical_map[:, None]  # [L, 1, E, X]
    return np.take_along_axis(slots, turn[..., None], axis=3)[..., 0]


def sglang_serving_slots(plan: PlacementPlan) -> np.ndarray:
    """[L, G, E] int32: the slot that SGLang (0.5.23, dispatch ``static``) serves expert e with for
    tokens of data-parallel rank g.

    The first slot on the same rank; else, where not all slots are on one node, the first one on the
    same node; else one by lot, which deals the slots evenly to the ranks that are left. Every rank
    draws from its own generator, seeded with 42, for what it cannot serve near, layer after layer.
    """
    rows = to_sglang_map(plan, max(plan.layer_ids) + 1)["physical_to_logical_map"]
    table = np.empty((len(rows), plan.num_ranks, plan.num_experts), dtype=np.int32)
    lots = [random.Random(42) for _ in range(plan.num_ranks)]
    for layer, row in enumerate(rows):
        held: list[list[int]] = [[] for _ in range(plan.num_experts)]
        for slot, expert in enumerate(row):
            held[expert].append(slot)
        for expert, slots in enumerate(held):
            near = [_near_slot(slots, rank, plan) for rank in range(plan.num_ranks)]
            far = [rank for rank, slot in enumerate(near) if slot < 0]
            times, rest = divmod(len(far), len(slots))
            for place, rank in enumerate(far):
                # each slot as often as any other or once more, in random order
                dealt = slots * times + lots[rank].sample(slots, rest)
                lots[rank].shuffle(dealt)
                near[rank] = dealt[place]
            table[layer, :, expert] = near
    return table[list(plan.layer_ids)]


def _near_slot(slots: list[int], rank: int, plan: PlacementPlan) -> int:
    """The slot that SGLang finds near a rank, or -1; its nodes hold consecutive ranks."""
    per_rank, per_node = plan.slots_per_rank, plan.slots_per_rank * plan.ranks_per_node
    same_rank = [slot for slot in slots if slot // per_rank == rank]
    node = rank // plan.ranks_per_node
    same_node = [slot for slot in slots if slot // per_node == node]
    if len(slots) == 1 or same_rank:
        return (same_rank or slots)[0]
    return same_node[0] if 0 < len(same_node) < len(slots) else -1


def from_engine_map(
    content: Any,
    *,
    num_experts: int,
    layer_ids: Sequence[int],
    num_nodes: int,
    ranks_per_node: int,
    model: str = "",
) -> PlacementPlan:
    """The plan that a map of any of ``TARGETS`` but ``autoep`` describes, to judge or compare;
    raises PlacementError where it is no such map, or no plan for this cluster.

    ``content``: the parsed JSON or YAML. ``layer_ids`` [L]: MoE layers of the model; a map with as
    many rows has one for each, one with more has a row per transformer layer.
    """
    ranks = num_nodes * ranks_per_node
    rows = content
    if isinstance(content, Mapping) and "expert_to_ep_rank" in content:
        row = _slots_of_ranks(content["expert_to_ep_rank"], num_experts, ranks)
        rows = [row for _ in layer_ids]
    elif isinstance(content, Mapping) and "layer_list" in content:
        rows = [_slots_of_devices(layer, ranks) for layer in _list(content["layer_list"])]
    elif isinstance(content, Mapping) and "initial_global_assignments" in content:
        rows = _rows_by_layer(content["initial_global_assignments"], layer_ids)
    elif isinstance(content, Mapping):
        rows = content.get("physical_to_logical_map")
    if not isinstance(rows, list) or not rows or not layer_ids:
        raise PlacementError(
            "found no rows of experts, expected a list of them, physical_to_logical_map or "
            "expert_to_ep_rank: see docs/formats.md"
        )
    if not isinstance(rows[0], list):
        rows = [rows for _ in layer_ids]  # vLLM: one row shared by all layers
    if len(rows) != len(layer_ids):
        if max(layer_ids) >= len(rows):
            raise PlacementError(
                f"found {len(rows)} rows, expected one for each of {len(layer_ids)} MoE layers or "
                f"for every layer up to {max(layer_ids)}: give the map of this model"
            )
        rows = [rows[layer] for layer in layer_ids]
    try:
        return PlacementPlan(
            model=model,
            layer_ids=tuple(layer_ids),
            num_experts=num_experts,
            num_nodes=num_nodes,
            ranks_per_node=ranks_per_node,
            physical_to_logical_map=rows,  # type: ignore[arg-type]  # checked by the plan
            provenance={"method": "imported"},
        )
    except (TypeError, ValueError) as error:
        if isinstance(error, PlacementError):
            raise
        raise PlacementError(f"the map is no plan: {error}: check the file") from error


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _rows_by_layer(rows: Any, layer_ids: Sequence[int]) -> list[Any]:
    """The row of each layer of TensorRT-LLM's load balancer."""
    of_layer = {str(layer): row for layer, row in rows.items()} if isinstance(rows, Mapping) else {}
    absent = [layer for layer in layer_ids if str(layer) not in of_layer]
    if absent:
        raise PlacementError(
            f"found no row for the layers {absent[:5]} in initial_global_assignments (it has "
            f"{list(of_layer)[:5]} ...): give the map of this model"
        )
    return [of_layer[str(layer)] for layer in layer_ids]


def _slots_of_devices(layer: Any, num_ranks: int) -> list[Any]:
    """[P] experts by slot of a layer of vllm-ascend's map, device after device."""
    devices = _list(layer.get("device_list")) if isinstance(layer, Mapping) else []
    devices = [one for one in devices if isinstance(one, Mapping)]
    held = {str(one.get("device_id")): _list(one.get("device_expert")) for one in devices}
    names = [str(rank) for rank in range(num_ranks)]
    if set(held) != set(names) or len({len(one) for one in held.values()}) > 1:
        raise PlacementError(
            f"found the devices {sorted(held)} in a layer of the map, expected 0 to "
            f"{num_ranks - 1} with as many experts each: give the map of this cluster"
        )
    return [expert for name in names for expert in held[name]]


def _slots_of_ranks(ranks: Any, num_experts: int, num_ranks: int) -> list[int]:
    """[E] experts by slot: those of rank 0 in rising order, then those of rank 1, ..."""
    fine = isinstance(ranks, list) and len(ranks) == num_experts
    if not fine or not all(type(r) is int and 0 <= r < num_ranks for r in ranks):
        raise PlacementError(
            f"found no list of {num_experts} ranks below {num_ranks} in expert_to_ep_rank: give "
            "the map of this model and cluster"
        )
    counts = [ranks.count(rank) for rank in range(num_ranks)]
    if len(set(counts)) > 1:
        raise PlacementError(f"found {counts} experts on the ranks, expected the same on each")
    return sorted(range(num_experts), key=lambda expert: (ranks[expert], expert))
