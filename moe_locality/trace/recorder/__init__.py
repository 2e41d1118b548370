"""Recording: hooks on MoE layers, a ring on the device, a writer thread, shards that appear whole.

    model's forward pass ── hooks ──> Assembler (one block per forward pass, rows of all layers)
        picks ──> Ring (device, copied without waiting) ──> WriterThread ──> ShardBuffer ──> shard

``attach(model, path)`` is all that most programs need; ``annotate`` labels tokens.
"""

from moe_locality.trace.recorder.core import (
    Handle,
    NullRecorder,
    RecorderReport,
    RoutingRecorder,
    attach,
)
from moe_locality.trace.recorder.labels import annotate

__all__ = ["Handle", "NullRecorder", "RecorderReport", "RoutingRecorder", "annotate", "attach"]
