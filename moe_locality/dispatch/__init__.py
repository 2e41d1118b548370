"""Move tokens to their experts and back.

::

    x [T, D] --row_map, permute--> rows by slot [N, D] --all-to-all--> rows by source [R, D]
             --reorder--> rows by local expert [R, D] --experts--> [R, D]
             --reorder--> by source --all-to-all--> by slot [N, D] --combine--> [T, D]

Backward runs the same pipeline in reverse, with the splits reversed: gradients of rows travel, and
the gate gets the dot product of each row and the gradient of its token.

``dispatcher`` is the object a layer talks to. The ways across the ranks: ``flat`` (above, also with
buffers of a fixed size), ``hierarchical`` (a token once per node) and ``deepep``. ``exchange`` has
the collectives, ``codec`` the low-bit rows. ``traffic`` counts what was sent and what it took.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_locality.dispatch.dispatcher import DispatchOutput, TokenDispatcher
    from moe_locality.dispatch.flat import check_overflow, lost_routes
    from moe_locality.dispatch.traffic import TrafficCounter, reset_traffic, traffic_report

_LAZY_IMPORTS = {
    "TokenDispatcher": "moe_locality.dispatch.dispatcher",
    "DispatchOutput": "moe_locality.dispatch.dispatcher",
    "TrafficCounter": "moe_locality.dispatch.traffic",
    "traffic_report": "moe_locality.dispatch.traffic",
    "reset_traffic": "moe_locality.dispatch.traffic",
    "check_overflow": "moe_locality.dispatch.flat",
    "lost_routes": "moe_locality.dispatch.flat",
}

__all__ = [
    "DispatchOutput",
    "TokenDispatcher",
    "TrafficCounter",
    "check_overflow",
    "lost_routes",
    "reset_traffic",
    "traffic_report",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY_IMPORTS:
        raise AttributeError(f"module 'moe_locality.dispatch' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY_IMPORTS[name]), name)
