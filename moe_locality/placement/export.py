"""Plans in the formats that serving engines and DeepSpeed read."""

import json
import os
from pathlib import Path
from typing import Any

from moe_locality.errors import PlacementError
from moe_locality.placement.plan import PlacementPlan

AUTOEP_DESCRIPTOR_VERSION = 1


def to_engine_dict(plan: PlacementPlan, num_hidden_layers: int | None = None) -> dict[str, Any]:
    """``{"physical_to_logical_map": [rows][P]}``, what SGLang's ``--init-expert-location`` and
    vLLM's maps hold.

    Only that key: SGLang passes every key on as an argument and fails on others. SGLang wants one
    row for each *transformer* layer: with ``num_hidden_layers`` the layers without experts get the
    linear row.
    """
    rows = plan.physical_to_logical_map.tolist()
    if num_hidden_layers is None:
        return {"physical_to_logical_map": rows}
    if max(plan.layer_ids) >= num_hidden_layers or min(plan.layer_ids) < 0:
        raise PlacementError(
            f"found layer ids up to {max(plan.layer_ids)} in the plan, expected them below "
            f"num_hidden_layers = {num_hidden_layers}: give the number of layers of the model"
        )
    filler = [slot % plan.num_experts for slot in range(plan.num_slots)]
    of_layer = dict(zip(plan.layer_ids, rows, strict=True))
    return {"physical_to_logical_map": [of_layer.get(i, filler) for i in range(num_hidden_layers)]}


def write_engine_map(
    plan: PlacementPlan, path: str | os.PathLike[str], num_hidden_layers: int | None = None
) -> Path:
    """Write the map for vLLM or SGLang as JSON."""
    target = Path(path)
    target.write_text(json.dumps(to_engine_dict(plan, num_hidden_layers)), encoding="utf-8")
    return target


def to_autoep_descriptors(plan: PlacementPlan) -> dict[int, dict[str, Any]]:
    """Layer id → the placement descriptor of DeepSpeed's AutoEP checkpoints.

    The same dict that
    ``deepspeed.checkpoint.autoep_affine.make_autoep_placement_descriptor(num_experts,
    experts_by_rank)`` returns (DeepSpeed 0.19.8), made without importing DeepSpeed.
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
