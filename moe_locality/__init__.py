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
    "MoE": "moe_locality.layer.moe",
    "apply": "moe_locality.integrations",
    "init_inference": "moe_locality.layer.convert",
    "initialize": "moe_locality.layer.convert",
    "register": "moe_locality.integrations.transformers_ep",
    "relabel": "moe_locality.layer.relabeling",
    "bake_checkpoint": "moe_locality.layer.bake",
    "relabel_state_dict": "moe_locality.layer.state_dict",
    "store_experts": "moe_locality.layer.expert_store",
    "annotate": "moe_locality.trace.recorder",
    "RoutingRecorder": "moe_locality.trace.recorder",
    "attach": "moe_locality.trace.recorder",
    "RoutingTrace": "moe_locality.trace",
    "import_trace": "moe_locality.trace",
    "read_trace": "moe_locality.trace",
    "write_trace": "moe_locality.trace",
    "ClusterTopology": "moe_locality.topology",
    "PlacementPlan": "moe_locality.placement",
    "assign_homes": "moe_locality.placement",
    "evaluate": "moe_locality.placement",
    "solve": "moe_locality.placement",
}

__all__ = [
    "ClusterTopology",
    "MoE",
    "PlacementPlan",
    "RoutingRecorder",
    "RoutingTrace",
    "__version__",
    "annotate",
    "apply",
    "assign_homes",
    "attach",
    "bake_checkpoint",
    "evaluate",
    "import_trace",
    "init_inference",
    "initialize",
    "read_trace",
    "register",
    "relabel",
    "relabel_state_dict",
    "solve",
    "store_experts",
    "write_trace",
]

# their functions are called by their full name, with no import of their own
_ROOMS = {"batching", "compat", "dispatch", "layer", "placement", "serving", "topology", "trace"}


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"moe_locality.{name}")
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'moe_locality' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY_IMPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
