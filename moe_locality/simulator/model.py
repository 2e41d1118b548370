"""Counts the rows that an exchange moves, and turns them into microseconds.

Rows are counted per layer and rank: exact integers, plain numpy. A row is one token on its way to
an expert (dispatch); combine moves as many back. The two exchanges are those of
``moe_locality.dispatch``, and the counts are those of its traffic counters:

* ``flat``: a row per pick, from the home rank to the rank of the slot.
* ``hierarchical``: first a row per (token, node with a pick), from the home rank to the rank of the
  same local index on that node (its *rail*; on the home node that is the home rank itself), then a
  row per pick from the rail to the rank of the slot.

Shapes: T tokens, L layers, K picks, G ranks, M nodes, P slots. docs/simulator.md has the formulas
of the time model. Units: 1 GB/s = 1000 bytes per microsecond.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.placement.problem import AlignedTrace
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

    hidden_size: D. ffn_size: width of an expert; None: D. payload: of the dispatch; combine is
    bf16. expert_us: time of a rank per distinct expert (tau 0); None: reading its bf16 weights at
    ``HBM_GBPS``. row_us: time per computed row (tau 1); None: its 6 D F operations at ``TFLOPS``.
    Both defaults are bounds from below: no kernel reaches them.

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
    """Microseconds of every layer, [..., L] from counts [..., L, G]: ``dispatch``, ``compute``,
    ``combine``, their sum ``total``, and the tiers ``inside`` and ``across`` (both directions;
    flat: they overlap, so they can add up to more than the exchange takes).
    """
    inside = np.maximum(counts.inside_sent, counts.inside_received)
    across = np.maximum(counts.across_sent, counts.across_received)
    tiers = {
        "inside": (inside, topology.intra_node_gbps, topology.intra_node_latency_us),
        "across": (across, topology.inter_node_gbps, topology.inter_node_latency_us),
    }
    times: dict[str, np.ndarray] = {}
    for name, size in (("dispatch", model.dispatch_bytes), ("combine", model.combine_bytes)):
        both = []
        for tier, (rows, gbps, latency) in tiers.items():
            # alpha + beta * bytes of each rank; nothing where it neither sends nor receives
            us = np.where(rows > 0, latency, 0.0) + rows * (size / (gbps * 1e3))
            times[tier] = times.get(tier, 0.0) + us.max(axis=-1)
            both.append(us)
        if model.exchange == "flat":
            times[name] = np.maximum(*both).max(axis=-1)
        else:  # the second stage waits for the first
            times[name] = both[0].max(axis=-1) + both[1].max(axis=-1)
    expert_us, row_us = model.tau
    times["compute"] = (expert_us * counts.distinct + row_us * counts.computed).max(axis=-1)
    times["total"] = times["dispatch"] + times["compute"] + times["combine"]
    return times


def expected_maximum(values: np.ndarray, groups: int) -> float:
    """Mean of the largest of ``groups`` draws from the values, with replacement: what a step takes
    that waits for the slowest of as many independent groups. Never above the largest value seen.
    """
    if groups == 1:
        return float(np.mean(values))
    ordered = np.sort(np.asarray(values, dtype=float))
    edges = (np.arange(len(ordered) + 1) / len(ordered)) ** groups
    return float((ordered * np.diff(edges)).sum())


EXCHANGES = ("flat", "hierarchical")
_CHUNK_PICKS = 1 << 20
MATRIX_ENTRIES = 1 << 18
"""Up to so many (layer, rank, rank) the pairs of ranks are counted, beyond that each rank alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """int64 [..., L, G] rows of one direction, and what the experts of a rank compute.

    local: from a rank to itself. inside: between ranks of a node. across: between nodes.
    computed: rows that arrive at experts. distinct: slots with any row.
    """

    local: np.ndarray
    inside_sent: np.ndarray
    inside_received: np.ndarray
    across_sent: np.ndarray
    across_received: np.ndarray
    computed: np.ndarray
    distinct: np.ndarray

    def rows_by_link(self) -> dict[str, int]:
        """Rows of all layers and ranks by what they cross, named as the traffic counters do."""
        return {
            "same_rank": int(self.local.sum()),
            "same_node": int(self.inside_sent.sum()),
            "cross_node": int(self.across_sent.sum()),
        }


def combined(counts: list[RowCounts], how: Callable[[list[np.ndarray]], np.ndarray]) -> RowCounts:
    """One of several: ``how`` joins the arrays of each field."""
    return RowCounts(**{n: how([getattr(one, n) for one in counts]) for n in RowCounts.__slots__})


def count_rows(aligned: AlignedTrace, tokens: np.ndarray | slice, exchange: str) -> RowCounts:
    """Rows of some tokens of an aligned trace with homes.

    Raises:
        PlacementError: hierarchical on nodes of unequal size.
    """
    assert aligned.ids is not None
    assert aligned.home_rank is not None
    home = aligned.home_rank[tokens]
    ids = aligned.ids[tokens]
    rails = None if exchange == "flat" else _rails(aligned.node_of_rank)
    step = max(_CHUNK_PICKS // max(ids.shape[0] * ids.shape[2], 1), 1)
    blocks = [
        _count_layers(aligned, ids[:, first : first + step], home, first, rails)
        for first in range(0, aligned.num_layers, step)
    ]
    return combined(blocks, np.concatenate)


def count_all(aligned: AlignedTrace, exchange: str) -> RowCounts:
    """Rows of all tokens of an aligned trace, added up in parts; ``distinct`` is meaningless."""
    assert aligned.ids is not None
    step = max(_CHUNK_PICKS // max(aligned.ids.shape[1] * aligned.ids.shape[2], 1), 1)
    starts = range(0, len(aligned.ids), step)
    parts = [count_rows(aligned, slice(first, first + step), exchange) for first in starts]
    return combined(parts, lambda arrays: np.sum(arrays, axis=0))


def _rails(node_of_rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(local index of each rank [G], rank at [node, local index])."""
    nodes = int(node_of_rank.max()) + 1
    members = [np.flatnonzero(node_of_rank == node) for node in range(nodes)]
    if len({len(found) for found in members}) != 1:
        raise PlacementError(
            f"found nodes of {[len(found) for found in members]} ranks, expected the same number "
            "on each for the hierarchical exchange: use the flat one"
        )
    table = np.stack(members)
    local = np.empty(len(node_of_rank), dtype=np.int64)
    local[table] = np.arange(table.shape[1])
    return local, table


def _count_layers(
    aligned: AlignedTrace, ids: np.ndarray, home: np.ndarray, first: int, rails
) -> RowCounts:
    """Rows of the layers ``first``, ``first + 1``, ... whose picks are ids [n, l, K]."""
    layers, ranks = ids.shape[1], aligned.num_ranks
    layer = np.arange(layers)[None, :, None]
    there = ids >= 0
    slot = aligned.slots_of(ids, home, first)
    home = home[:, None, None]
    server = (slot // (aligned.num_slots // ranks)).astype(np.int64)
    nodes = aligned.node_of_rank
    if rails is None:
        rows = _moved(nodes, there, home, server)
    else:
        local, table = rails
        rail = table[nodes[server].astype(np.int64), local[home]]
        visited = np.sort(np.where(there, rail, -1), axis=2)  # a rail of a token is a node
        visit = visited >= 0
        visit[:, :, 1:] &= visited[:, :, 1:] != visited[:, :, :-1]
        rows = _moved(nodes, there, rail, server)
        rows = {name: n + rows[name] for name, n in _moved(nodes, visit, home, visited).items()}
    used = slot + layer * aligned.num_slots
    used[~there] = layers * aligned.num_slots
    calls = np.bincount(used.ravel(), minlength=layers * aligned.num_slots + 1)[:-1]
    calls = calls.reshape(layers, ranks, -1)
    return RowCounts(**rows, computed=calls.sum(axis=2), distinct=(calls > 0).sum(axis=2))


def _moved(
    node_of_rank: np.ndarray, there: np.ndarray, source: np.ndarray, target: np.ndarray
) -> dict[str, np.ndarray]:
    """The rows [n, l, K] from rank to rank, where ``there``, by name in ``RowCounts``: [l, G]."""
    layers, ranks = there.shape[1], len(node_of_rank)
    layer = np.arange(layers)[None, :, None]
    if layers * ranks**2 <= MATRIX_ENTRIES:  # from one count of all pairs of ranks
        key = source * ranks + target
        key += layer * ranks**2
        key[~there] = layers * ranks**2
        pairs = np.bincount(key.ravel(), minlength=layers * ranks**2 + 1)[:-1]
        pairs = pairs.reshape(layers, ranks, ranks)
        on_rank = np.eye(ranks, dtype=bool)
        on_node = node_of_rank[:, None] == node_of_rank[None]
        found = {"local": pairs[:, on_rank]}
        for name, some in (("inside", on_node & ~on_rank), ("across", ~on_node)):
            part = pairs * some
            found |= {f"{name}_sent": part.sum(axis=2), f"{name}_received": part.sum(axis=1)}
        return found
    source = np.broadcast_to(source, there.shape)
    on_node = there & (node_of_rank[source] == node_of_rank[target])
    on_rank = there & (source == target)

    def per_rank(mask: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """[l, G] how often each rank occurs where ``mask``."""
        counts = np.bincount((rank + layer * ranks)[mask], minlength=layers * ranks)
        return counts.reshape(layers, ranks)

    found = {"local": per_rank(on_rank, source)}
    for name, mask in (("inside", on_node & ~on_rank), ("across", there & ~on_node)):
        found |= {f"{name}_sent": per_rank(mask, source)}
        found |= {f"{name}_received": per_rank(mask, target)}
    return found
