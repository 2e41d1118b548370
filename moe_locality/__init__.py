"""moe_locality puts the experts of a mixture-of-experts model where their tokens are.

The public names are loaded on first use (PEP 562): importing this package imports no torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME_OF = {
    "MoE": "moe_locality.layer.moe",
    "apply": "moe_locality.layer.convert",
    "initialize": "moe_locality.layer.convert",
    "relabel": "moe_locality.layer.relabel",
    "annotate": "moe_locality.trace.recorder",
    "RoutingRecorder": "moe_locality.trace.recorder",
    "attach": "moe_locality.trace.recorder",
    "RoutingTrace": "moe_locality.trace",
    "read_trace": "moe_locality.trace",
    "write_trace": "moe_locality.trace",
    "ClusterTopology": "moe_locality.topology",
    "PlacementPlan": "moe_locality.placement",
    "evaluate": "moe_locality.placement",
    "solve": "moe_locality.placement",
}

__all__ = [*_HOME_OF, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moe_locality' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
