"""Move tokens to their experts and back.

::

    x [T, D] --row_map, permute--> rows by slot [N, D] --all-to-all--> rows by source [R, D]
             --reorder--> rows by local expert [R, D] --experts--> [R, D]
             --reorder--> by source --all-to-all--> by slot [N, D] --combine--> [T, D]

Backward runs the same pipeline in reverse, with the splits reversed: gradients of rows travel, and
the gate gets the dot product of each row and the gradient of its token.

A layer calls ``dispatcher.run_moe``. The transports are ``flat`` (above, also with a fixed
capacity), ``hierarchical`` (each token once per node) and ``deepep``. ``transport`` has their
interface and what they share: collectives, low-bit rows, counters. ``desync`` finds ranks that are
out of step, ``traffic`` reports what was sent and the time it took.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_locality.dispatch.desync import DesyncError
    from moe_locality.dispatch.dispatcher import DispatchOutput, SlotMap, TokenDispatcher, run_moe
    from moe_locality.dispatch.flat import check_overflow, lost_routes
    from moe_locality.dispatch.traffic import reset_traffic, traffic_report
    from moe_locality.dispatch.transport import TrafficCounter, Transport

_LAZY_IMPORTS = {
    "desync": ("DesyncError",),
    "dispatcher": ("DispatchOutput", "SlotMap", "TokenDispatcher", "run_moe"),
    "flat": ("check_overflow", "lost_routes"),
    "traffic": ("reset_traffic", "traffic_report"),
    "transport": ("TrafficCounter", "Transport"),
}

__all__ = ["DispatchOutput", "SlotMap", "TokenDispatcher", "Transport", "run_moe"]
__all__ += ["TrafficCounter", "reset_traffic", "traffic_report"]
__all__ += ["DesyncError", "check_overflow", "lost_routes"]


def __getattr__(name: str) -> Any:
    for module, names in _LAZY_IMPORTS.items():
        if name in names:
            return getattr(importlib.import_module(f"moe_locality.dispatch.{module}"), name)
    raise AttributeError(f"module 'moe_locality.dispatch' has no attribute {name!r}")
