"""Replays a trace under a plan: bytes of all tokens exactly, times of a sample of steps; sweeps.

A step is a batch of every rank: requests at given homes, or at homes drawn at random. ``sweep``
simulates two plans over batch sizes, bandwidths, picks or nodes: where the gain ends.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.problem import Homes, align_trace
from moe_locality.simulator.model import (
    RowCounts,
    StepModel,
    combined,
    count_all,
    count_rows,
    expected_maximum,
    step_times,
)
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import RoutingTrace

PARTS = ("dispatch", "compute", "combine")
TIERS = ("inside", "across")
MOST_BATCH = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """A simulated run; times in microseconds of the MoE part of one step, all layers, forward.

    step_us, step_us_error: mean over the steps, and its standard error (nan for one step).
    parts_us: of it dispatch, compute, combine. tiers_us: time of the links inside and across nodes.
    group_step_us: mean step of ``groups`` expert-parallel groups that wait for the slowest.
    share: step_us / (step_us + compute_us), where compute_us is the rest of the step.
    per_layer_us: [L] mean.
    bytes: {dispatch, combine: {same_rank, same_node, cross_node}} of *all* tokens of the trace, in
        one group; exact.
    bytes_per_token: cross-node bytes, both directions, per token, all layers.
    busiest_link: the node whose traffic across nodes is largest in one direction, dispatch: node,
        direction, bytes of all tokens, and ``share`` of all that crosses nodes.
    """

    step_us: float
    step_us_error: float
    parts_us: dict[str, float]
    tiers_us: dict[str, float]
    group_step_us: float
    groups: int
    share: float | None
    per_layer_us: np.ndarray
    bytes: dict[str, dict[str, int]]
    bytes_per_token: float
    busiest_link: dict[str, Any]
    num_tokens: int
    num_steps: int
    batch_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self) | {"per_layer_us": self.per_layer_us.tolist()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The counts of a simulation, for several time models: ``steps`` [S, L, G], ``all`` [L, G]."""

    steps: RowCounts
    all: RowCounts
    node_of_rank: np.ndarray
    num_tokens: int
    batch_tokens: int


def simulate(
    trace: RoutingTrace,
    plan: PlacementPlan,
    topology: ClusterTopology | None = None,
    homes: Homes = None,
    *,
    model: StepModel | None = None,
    batch_tokens: int = 512,
    groups: int = 1,
    compute_us: float | None = None,
    max_steps: int = 64,
    seed: int = 0,
) -> Simulation:
    """Simulate steps of ``batch_tokens`` tokens on every rank.

    Args:
        topology: figures of the links; its ranks must be the plan's. None: the defaults.
        homes: as for ``evaluate``; None: requests at random ranks, drawn with ``seed``.
        groups: expert-parallel groups that step together (data parallelism), for clusters of
            ``groups`` x the ranks of the plan.
        compute_us: time of the rest of a step, for ``share``.
        max_steps: steps that are timed; the standard error says what the sample leaves open.

    Raises:
        PlacementError, ConfigError: something does not fit or cannot be.
    """
    model = model or StepModel()
    steps = {"batch_tokens": batch_tokens, "max_steps": max_steps, "seed": seed}
    replay = replay_steps(trace, plan, homes, exchange=model.exchange, topology=topology, **steps)
    links = topology or plan.topology
    return time_replay(replay, model, links, groups=groups, compute_us=compute_us)


def replay_steps(
    trace: RoutingTrace,
    plan: PlacementPlan,
    homes: Homes = None,
    *,
    exchange: str,
    batch_tokens: int,
    max_steps: int = 64,
    seed: int = 0,
    topology: ClusterTopology | None = None,
) -> Replay:
    """Count the rows of all tokens, and of each of a sample of steps."""
    if trace.expert_ids is None:
        raise PlacementError(
            "found a trace of counts, expected one of tokens: a simulation replays the picks of "
            "every token; record or import a per-token trace"
        )
    homes = random_homes(trace, plan.num_ranks, seed) if homes is None else homes
    aligned = align_trace(trace, plan, topology, homes)
    assert aligned.home_rank is not None
    steps = draw_steps(aligned.home_rank, aligned.num_ranks, batch_tokens, max_steps, seed)
    return Replay(
        steps=combined([count_rows(aligned, tokens, exchange) for tokens in steps], np.stack),
        all=count_all(aligned, exchange),
        node_of_rank=aligned.node_of_rank,
        num_tokens=trace.num_tokens,
        batch_tokens=batch_tokens,
    )


def time_replay(
    replay: Replay,
    model: StepModel,
    topology: ClusterTopology,
    *,
    groups: int = 1,
    compute_us: float | None = None,
) -> Simulation:
    """Put times to counts; the counts must be of the exchange of ``model``."""
    if groups < 1:
        raise PlacementError(f"groups: found {groups}, expected at least 1: correct it")
    if compute_us is not None and not compute_us >= 0:
        raise PlacementError(f"compute_us: found {compute_us}, expected a time of at least 0")
    times = step_times(replay.steps, model, topology)
    step = times["total"].sum(axis=1)  # [S]
    error = float(step.std(ddof=1) / len(step) ** 0.5) if len(step) > 1 else float("nan")
    rows = replay.all.rows_by_link()
    sizes = {"dispatch": model.dispatch_bytes, "combine": model.combine_bytes}
    moved = {kind: {link: n * size for link, n in rows.items()} for kind, size in sizes.items()}
    across = sum(kind["cross_node"] for kind in moved.values())
    group_step = expected_maximum(step, groups)
    return Simulation(
        step_us=float(step.mean()),
        step_us_error=error,
        parts_us={name: float(times[name].sum(axis=1).mean()) for name in PARTS},
        tiers_us={name: float(times[name].sum(axis=1).mean()) for name in TIERS},
        group_step_us=group_step,
        groups=groups,
        share=None if compute_us is None else group_step / max(group_step + compute_us, 1e-300),
        per_layer_us=times["total"].mean(axis=0),
        bytes=moved,
        bytes_per_token=across / replay.num_tokens,
        busiest_link=_busiest_link(replay, model.dispatch_bytes),
        num_tokens=replay.num_tokens,
        num_steps=len(step),
        batch_tokens=replay.batch_tokens,
    )


def _busiest_link(replay: Replay, size: int) -> dict[str, Any]:
    rows = (replay.all.across_sent, replay.all.across_received)
    both = np.stack([np.bincount(replay.node_of_rank, weights=n.sum(axis=0)) for n in rows])
    direction, node = np.unravel_index(int(both.argmax()), both.shape)
    total = float(both[0].sum())
    return {
        "node": int(node),
        "direction": ("out", "in")[int(direction)],
        "bytes": int(both.max()) * size,
        "share": float(both.max()) / total if total else 0.0,
    }


def random_homes(trace: RoutingTrace, num_ranks: int, seed: int) -> dict[int, int]:
    """Request → rank: requests in random order, each to the rank with the fewest tokens so far."""
    requests, tokens = np.unique(trace.tokens_only("a simulation").request_id, return_counts=True)
    rng = np.random.default_rng(seed)
    ranks = [(0, place, rank) for place, rank in enumerate(rng.permutation(num_ranks).tolist())]
    heapq.heapify(ranks)
    homes: dict[int, int] = {}
    for index in rng.permutation(len(requests)):
        load, place, rank = heapq.heappop(ranks)
        homes[int(requests[index])] = rank
        heapq.heappush(ranks, (load + int(tokens[index]), place, rank))
    return homes


def draw_steps(
    home_rank: np.ndarray, num_ranks: int, batch_tokens: int, max_steps: int, seed: int
) -> list[np.ndarray]:
    """Indices of the tokens of each step: ``batch_tokens`` consecutive ones of every rank that has
    any; a rank with fewer goes through them again.

    As many steps as the tokens fill on average, at most ``max_steps`` of them, drawn at random.
    """
    if batch_tokens < 1 or max_steps < 1:
        raise PlacementError(
            f"found batch_tokens {batch_tokens} and max_steps {max_steps}, expected at least 1"
        )
    if batch_tokens > MOST_BATCH:
        most = f"at most {MOST_BATCH:,}, more than a rank takes in a step"
        raise PlacementError(f"batch_tokens: found {batch_tokens:,}, expected {most}: lower it")
    order = np.argsort(home_rank, kind="stable")
    counts = np.bincount(home_rank, minlength=num_ranks)
    first = np.cumsum(counts) - counts
    steps = max(len(home_rank) // (num_ranks * batch_tokens), 1)
    chosen = np.arange(steps)
    if steps > max_steps:
        chosen = np.sort(np.random.default_rng(seed).permutation(steps)[:max_steps])
    first, counts = first[counts > 0, None], counts[counts > 0, None]
    places = (step * batch_tokens + np.arange(batch_tokens) for step in chosen)
    return [order[(first + place % counts).ravel()] for place in places]


SWEEPS = {
    "batch": "tokens per rank",
    "bandwidth": "bandwidth inside / across nodes",
    "k": "picks per token",
    "nodes": "nodes",
}
"""Name of a sweep → what its values are."""

BATCHES = (8, 32, 128, 512, 2048)
RATIOS = (1.0, 2.0, 4.0, 9.0, 18.0, 36.0, 72.0)
NODES = (1, 2, 4, 8, 16, 32, 64)
GAIN = 1.02
"""A speed-up below this is no gain: it is within what a plan of another seed differs by."""

Pair = tuple[PlacementPlan, PlacementPlan]


def sweep(
    what: str,
    trace: RoutingTrace,
    plans: Pair,
    topology: ClusterTopology,
    homes: tuple[Homes, Homes] = (None, None),
    *,
    model: StepModel | None = None,
    batch_tokens: int = 512,
    values: Sequence[float] | None = None,
    plans_of: Callable[[ClusterTopology], Pair] | None = None,
    max_steps: int = 32,
    seed: int = 0,
    groups: int = 1,
) -> list[dict[str, Any]]:
    """Simulate a baseline and a plan for each value of one thing, all else as given.

    Args:
        what: a name in ``SWEEPS``. ``bandwidth`` changes the speed across nodes only; ``k`` keeps
            the first picks of each token; ``nodes`` needs ``plans_of``, which makes both plans for
            a cluster, and takes the numbers of nodes that the experts divide among.
        plans, homes: of the baseline and of the plan. values: None: defaults.

    Returns:
        A row per value: ``value``, ``baseline_us``, ``plan_us`` with ``_error``s, ``speedup``,
        ``speedup_error``, and ``across_share``: of the baseline's step, that of the links.

    Raises:
        ConfigError: the sweep is unknown, or a value makes no sense.
    """
    if what not in SWEEPS:
        raise ConfigError(f"sweep: found {what!r}, expected one of {', '.join(SWEEPS)}")
    if what == "nodes" and plans_of is None:
        raise ConfigError("sweep over nodes: found no plans_of, expected a maker of plans")
    model = model or StepModel()
    options = {"exchange": model.exchange, "max_steps": max_steps, "seed": seed}

    def replay(traced: RoutingTrace, pair: Pair, batch: int, at: Any = homes) -> list[Replay]:
        return [
            replay_steps(traced, plan, home, batch_tokens=batch, **options)
            for plan, home in zip(pair, at, strict=True)
        ]

    kept = replay(trace, plans, batch_tokens) if what == "bandwidth" else []
    rows = []
    for value in values or _values(what, trace, topology):
        links = topology
        if what == "batch":
            kept = replay(trace, plans, _whole(value))
        elif what == "bandwidth":
            links = _with_ratio(topology, float(value))
        elif what == "k":
            kept = replay(_first_picks(trace, _whole(value)), plans, batch_tokens)
        elif plans_of is not None:
            shape = (_whole(value), topology.ranks_per_node)
            links = ClusterTopology.uniform(*shape, **topology.tiers())
            kept = replay(trace, plans_of(links), batch_tokens, (None, None))
        first, second = (time_replay(one, model, links, groups=groups) for one in kept)
        rows.append({"value": value, **_compare(first, second)})
    return rows


def _compare(first: Simulation, second: Simulation) -> dict[str, float]:
    base, plan = first.group_step_us, second.group_step_us
    ratio = base / plan if plan else float("nan")
    errors = [one.step_us_error / one.step_us if one.step_us else 0.0 for one in (first, second)]
    return {
        "baseline_us": base,
        "baseline_us_error": first.step_us_error,
        "plan_us": plan,
        "plan_us_error": second.step_us_error,
        "speedup": ratio,
        "speedup_error": ratio * math.hypot(*errors),
        "across_share": first.tiers_us["across"] / first.step_us if first.step_us else 0.0,
    }


def gain_ends(rows: Sequence[dict[str, Any]], gain: float = GAIN) -> list[Any]:
    """The values at which the plan is faster by at least ``gain``; empty: nowhere."""
    return [row["value"] for row in rows if row["speedup"] >= gain]


def _values(what: str, trace: RoutingTrace, topology: ClusterTopology) -> list[float]:
    if what == "k":
        return [k for k in range(1, trace.top_k + 1) if trace.top_k <= 8 or not k & (k - 1)]
    if what == "nodes":
        return [m for m in NODES if trace.num_experts % (m * topology.ranks_per_node) == 0]
    return list(BATCHES if what == "batch" else RATIOS)


def _whole(value: float) -> int:
    if value != int(value) or value < 1:
        raise ConfigError(f"sweep: found the value {value}, expected a whole number of at least 1")
    return int(value)


def _with_ratio(topology: ClusterTopology, ratio: float) -> ClusterTopology:
    if not ratio > 0:
        raise ConfigError(f"sweep: found the ratio {ratio}, expected a number above 0")
    return replace(topology, inter_node_gbps=topology.intra_node_gbps / ratio)


def _first_picks(trace: RoutingTrace, count: int) -> RoutingTrace:
    """The trace with the first ``count`` picks of every token."""
    ids = trace.tokens_only("a sweep over k").expert_ids
    if count > ids.shape[2]:
        raise ConfigError(f"sweep: found k = {count}, expected at most {ids.shape[2]}")
    weights = trace.expert_weights
    return trace.evolve(
        expert_ids=ids[:, :, :count],
        expert_weights=None if weights is None else weights[:, :, :count],
    )
