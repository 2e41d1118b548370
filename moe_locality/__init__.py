"""moe_locality puts the experts of a mixture-of-experts model where their tokens are.

The public names are loaded on first use (PEP 562): importing this package imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_locality.integrations import apply
    from moe_locality.integrations.transformers_ep import register
    from moe_locality.layer.bake import bake_checkpoint
    from moe_locality.layer.convert import init_inference, initialize
    from moe_locality.layer.expert_store import store_experts
    from moe_locality.layer.moe import MoE
    from moe_locality.layer.relabeling import relabel
    from moe_locality.layer.state_dict import relabel_state_dict
    from moe_locality.placement import PlacementPlan, assign_homes, evaluate, solve
    from moe_locality.topology import ClusterTopology
    from moe_locality.trace import RoutingTrace, import_trace, read_trace, write_trace
    from moe_locality.trace.recorder import RoutingRecorder, annotate, attach

__version__ = "0.1.0"

_LAZY_IMPORTS = {
    "moe_locality.integrations": ("apply",),
    "moe_locality.integrations.transformers_ep": ("register",),
    "moe_locality.layer.bake": ("bake_checkpoint",),
    "moe_locality.layer.convert": ("init_inference", "initialize"),
    "moe_locality.layer.expert_store": ("store_experts",),
    "moe_locality.layer.moe": ("MoE",),
    "moe_locality.layer.relabeling": ("relabel",),
    "moe_locality.layer.state_dict": ("relabel_state_dict",),
    "moe_locality.placement": ("PlacementPlan", "assign_homes", "evaluate", "solve"),
    "moe_locality.topology": ("ClusterTopology",),
    "moe_locality.trace": ("RoutingTrace", "import_trace", "read_trace", "write_trace"),
    "moe_locality.trace.recorder": ("RoutingRecorder", "annotate", "attach"),
}

__all__ = ["__version__", "MoE", "apply", "init_inference", "initialize", "register", "relabel"]
__all__ += ["bake_checkpoint", "relabel_state_dict", "store_experts"]
__all__ += ["RoutingRecorder", "annotate", "attach"]
__all__ += ["RoutingTrace", "import_trace", "read_trace", "write_trace"]
__all__ += ["ClusterTopology", "PlacementPlan", "assign_homes", "evaluate", "solve"]

# their functions are called by their full name, with no import of their own
_ROOMS = {"batching", "compat", "dispatch", "layer", "placement", "serving", "topology", "trace"}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"moe_locality.{name}")
    for module, names in _LAZY_IMPORTS.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'moe_locality' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
