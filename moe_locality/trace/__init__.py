"""Routing traces: which experts real tokens pick. The recorder needs torch: loaded on use."""

import importlib
from typing import TYPE_CHECKING, Any

from moe_locality.trace.importers import import_trace
from moe_locality.trace.io import ShardWriter, read_trace, read_trace_report, write_trace
from moe_locality.trace.schema import DECODE, PREFILL, STAGE_NAMES, TRAIN, UNKNOWN, RoutingTrace

if TYPE_CHECKING:
    from moe_locality.trace.recorder import RoutingRecorder, annotate, attach

_RECORDER = ("RoutingRecorder", "annotate", "attach")

__all__ = [
    "DECODE",
    "PREFILL",
    "STAGE_NAMES",
    "TRAIN",
    "UNKNOWN",
    "RoutingRecorder",
    "RoutingTrace",
    "ShardWriter",
    "annotate",
    "attach",
    "import_trace",
    "read_trace",
    "read_trace_report",
    "write_trace",
]


def __getattr__(name: str) -> Any:
    if name not in _RECORDER:
        raise AttributeError(f"module 'moe_locality.trace' has no attribute {name!r}")
    return getattr(importlib.import_module("moe_locality.trace.recorder"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
