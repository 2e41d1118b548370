"""The simulator: a trace replayed under a plan, with times from a model of the links.

Everything here is *simulated*: rows and bytes are counted exactly, times are computed from
bandwidths, latencies and two figures of the experts (docs/simulator.md).
"""

from moe_locality.simulator.model import PAYLOADS, StepModel, row_bytes
from moe_locality.simulator.simulate import SWEEPS, Simulation, gain_ends, simulate, sweep

__all__ = [
    "PAYLOADS",
    "SWEEPS",
    "Simulation",
    "StepModel",
    "gain_ends",
    "row_bytes",
    "simulate",
    "sweep",
]
