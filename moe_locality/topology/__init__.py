"""The cluster (``ClusterTopology``, no torch) and the process groups that follow from it.

What needs torch is loaded on first use.
"""

import importlib
from typing import Any

from moe_locality.topology.cluster import ClusterTopology

_IN_GROUPS = (
    "ExpertParallelGroups",
    "GroupLayout",
    "build_groups",
    "discover_topology",
    "layout_groups",
    "register_with_deepspeed",
)

__all__ = ["ClusterTopology", *_IN_GROUPS]


def __getattr__(name: str) -> Any:
    if name not in _IN_GROUPS:
        raise AttributeError(f"module 'moe_locality.topology' has no attribute {name!r}")
    return getattr(importlib.import_module("moe_locality.topology.groups"), name)
