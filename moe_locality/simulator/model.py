"""The time model: bytes and counts in, microseconds out. docs/simulator.md has the formulas.

Units: 1 GB/s = 1000 bytes per microsecond.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moe_locality.errors import ConfigError
from moe_locality.simulator.counting import EXCHANGES, RowCounts
from moe_locality.topology.cluster import ClusterTopology

HBM_GBPS = 3350.0
"""Memory bandwidth of an H100 SXM (NVIDIA data sheet): an expert's weights are read once a step."""
TFLOPS = 989.0
"""Dense bf16 rate of an H100 SXM (NVIDIA data sheet)."""
_WEIGHT_BYTES = 2  # bf16
_MATRICES = 3  # gate, up and down projection

PAYLOADS = {
    "bf16": lambda d: 2 * d,
    "fp8": lambda d: d + 4 * math.ceil(d / 128),  # an fp32 scale per 128 values, as DeepEP sends
    "mxfp8": lambda d: d + math.ceil(d / 32),  # OCP MX: a scale byte per 32 values
    "mxfp4": lambda d: math.ceil(d / 2) + math.ceil(d / 32),
}
"""Name of a payload → bytes of a row of d values, scales included."""


def row_bytes(payload: str, hidden_size: int) -> int:
    """Bytes of one token on the wire.

    Raises:
        ConfigError: the payload is unknown, or the width is not positive.
    """
    if payload not in PAYLOADS:
        raise ConfigError(f"payload: found {payload!r}, expected one of {', '.join(PAYLOADS)}")
    if hidden_size < 1:
        raise ConfigError(f"hidden_size: found {hidden_size}, expected at least 1: correct it")
    return PAYLOADS[payload](hidden_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepModel:
    """What a step costs besides the counts.

    hidden_size: D. ffn_size: width of an expert; None: D. payload: dispatch payload; combine is
    bf16. exchange: flat or hierarchical. expert_us: time of a rank per distinct expert (tau 0);
    None: reading its bf16 weights at ``HBM_GBPS``. row_us: time per computed row (tau 1); None: its
    6 D F operations at ``TFLOPS``. Both defaults are bounds from below: no kernel reaches them.

    Raises:
        ConfigError: a figure that cannot be.
    """

    hidden_size: int = 4096
    ffn_size: int | None = None
    payload: str = "bf16"
    exchange: str = "flat"
    expert_us: float | None = None
    row_us: float | None = None

    def __post_init__(self) -> None:
        row_bytes(self.payload, self.hidden_size)
        if self.exchange not in EXCHANGES:
            raise ConfigError(
                f"exchange: found {self.exchange!r}, expected one of {', '.join(EXCHANGES)}"
            )
        if self.ffn_size is not None and self.ffn_size < 1:
            raise ConfigError(f"ffn_size: found {self.ffn_size}, expected at least 1: correct it")
        for name in ("expert_us", "row_us"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name}: found {value}, expected a time of at least 0")

    @property
    def dispatch_bytes(self) -> int:
        """Bytes of a row to the experts."""
        return row_bytes(self.payload, self.hidden_size)

    @property
    def combine_bytes(self) -> int:
        """Bytes of a row back."""
        return row_bytes("bf16", self.hidden_size)

    @property
    def tau(self) -> tuple[float, float]:
        """(microseconds per distinct expert, per row)."""
        values = _MATRICES * self.hidden_size * (self.ffn_size or self.hidden_size)
        expert = values * _WEIGHT_BYTES / (HBM_GBPS * 1e3)
        row = 2 * values / (TFLOPS * 1e6)
        return (
            expert if self.expert_us is None else self.expert_us,
            row if self.row_us is None else self.row_us,
        )


def step_times(
    counts: RowCounts, model: StepModel, topology: ClusterTopology
) -> dict[str, np.ndarray]:
    """Microseconds of every layer: ``dispatch``, ``compute``, ``combine``, their sum ``total``, and
    the tiers ``inside`` and ``across`` (both directions; flat: they overlap, so they can add up to
    more than the exchange takes).

    Args:
        counts: [..., L, G].

    Returns:
        float64 [..., L] each.
    """
    inside_most = np.maximum(counts.inside_sent, counts.inside_received)
    across_most = np.maximum(counts.across_sent, counts.across_received)
    times: dict[str, np.ndarray] = {}
    tiers = {"inside": np.zeros(()), "across": np.zeros(())}
    for name, size in (("dispatch", model.dispatch_bytes), ("combine", model.combine_bytes)):
        inside = _tier_us(
            inside_most, size, topology.intra_node_gbps, topology.intra_node_latency_us
        )
        across = _tier_us(
            across_most, size, topology.inter_node_gbps, topology.inter_node_latency_us
        )
        tiers["inside"] = tiers["inside"] + inside.max(axis=-1)
        tiers["across"] = tiers["across"] + across.max(axis=-1)
        if model.exchange == "flat":
            times[name] = np.maximum(inside, across).max(axis=-1)
        else:  # the second stage waits for the first
            times[name] = inside.max(axis=-1) + across.max(axis=-1)
    expert_us, row_us = model.tau
    times["compute"] = (expert_us * counts.distinct + row_us * counts.computed).max(axis=-1)
    times["total"] = times["dispatch"] + times["compute"] + times["combine"]
    return times | tiers


def _tier_us(rows: np.ndarray, size: int, gbps: float, latency_us: float) -> np.ndarray:
    """alpha + beta * bytes of each rank; nothing where it neither sends nor receives."""
    return np.where(rows > 0, latency_us, 0.0) + rows * (size / (gbps * 1e3))


def expected_maximum(values: np.ndarray, groups: int) -> float:
    """Mean of the largest of ``groups`` draws from the values, with replacement: what a step takes
    that waits for the slowest of as many independent groups. Never above the largest value seen.
    """
    if groups == 1:
        return float(np.mean(values))
    ordered = np.sort(np.asarray(values, dtype=float))
    edges = (np.arange(len(ordered) + 1) / len(ordered)) ** groups
    return float((ordered * np.diff(edges)).sum())
