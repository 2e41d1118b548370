"""The drop-in for DeepSpeed's MoE layer, and how a model gets it.

``moe`` is the layer, ``convert`` swaps it into a model and starts DeepSpeed around it, ``relabel``
bakes a placement into the weights, ``checkpoint`` keeps it in checkpoints, ``bake`` and
``state_dict`` put it into files, ``expert_store`` keeps experts in a low-bit format. Nothing is
loaded here.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_locality.layer.bake import bake_checkpoint
    from moe_locality.layer.checkpoint import wrap_checkpoints
    from moe_locality.layer.convert import apply, initialize
    from moe_locality.layer.expert_store import store_experts
    from moe_locality.layer.moe import LocalityMOELayer, LocalityTopKGate, MoE
    from moe_locality.layer.relabeling import relabel
    from moe_locality.layer.state import set_slot_to_logical
    from moe_locality.layer.state_dict import relabel_state_dict

_LAZY_IMPORTS = {
    "MoE": "moe_locality.layer.moe",
    "LocalityMOELayer": "moe_locality.layer.moe",
    "LocalityTopKGate": "moe_locality.layer.moe",
    "set_slot_to_logical": "moe_locality.layer.state",
    "apply": "moe_locality.layer.convert",
    "initialize": "moe_locality.layer.convert",
    "relabel": "moe_locality.layer.relabeling",
    "wrap_checkpoints": "moe_locality.layer.checkpoint",
    "store_experts": "moe_locality.layer.expert_store",
    "bake_checkpoint": "moe_locality.layer.bake",
    "relabel_state_dict": "moe_locality.layer.state_dict",
}

__all__ = [
    "LocalityMOELayer",
    "LocalityTopKGate",
    "MoE",
    "apply",
    "bake_checkpoint",
    "initialize",
    "relabel",
    "relabel_state_dict",
    "set_slot_to_logical",
    "store_experts",
    "wrap_checkpoints",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'moe_locality.layer' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY_IMPORTS[name]), name)
