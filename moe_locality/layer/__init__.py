"""The drop-in for DeepSpeed's MoE layer, and how a model gets it.

``moe`` is the layer, ``convert`` swaps it into a model and starts DeepSpeed around it, ``relabel``
bakes a placement into the weights, ``checkpoint`` keeps it in checkpoints, ``bake`` and
``state_dict`` put it into files, ``expert_store`` keeps experts in a low-bit format. Nothing is
loaded here.
"""

import importlib
from typing import Any

_HOME_OF = {
    "MoE": "moe_locality.layer.moe",
    "LocalityMOELayer": "moe_locality.layer.moe",
    "LocalityTopKGate": "moe_locality.layer.moe",
    "set_slot_to_logical": "moe_locality.layer.moe",
    "apply": "moe_locality.layer.convert",
    "initialize": "moe_locality.layer.convert",
    "relabel": "moe_locality.layer.relabel",
    "wrap_checkpoints": "moe_locality.layer.checkpoint",
    "store_experts": "moe_locality.layer.expert_store",
    "bake_checkpoint": "moe_locality.layer.bake",
    "relabel_state_dict": "moe_locality.layer.state_dict",
}

__all__ = list(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moe_locality.layer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
