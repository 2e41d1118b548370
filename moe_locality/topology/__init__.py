"""The cluster (``ClusterTopology``) and its groups. What needs torch is loaded on first use."""

import importlib
from typing import TYPE_CHECKING, Any

from moe_locality.topology.cluster import ClusterTopology, GroupLayout, layout_groups

if TYPE_CHECKING:
    from moe_locality.topology.groups import (
        ExpertParallelGroups,
        build_groups,
        discover_topology,
        exchange_objects,
        prepare_groups,
        register_with_deepspeed,
    )

__all__ = [
    "ClusterTopology",
    "ExpertParallelGroups",
    "GroupLayout",
    "build_groups",
    "discover_topology",
    "exchange_objects",
    "layout_groups",
    "prepare_groups",
    "register_with_deepspeed",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'moe_locality.topology' has no attribute {name!r}")
    return getattr(importlib.import_module("moe_locality.topology.groups"), name)
