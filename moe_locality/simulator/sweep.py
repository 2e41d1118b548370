"""Where the gain ends: two plans simulated over batch sizes, bandwidths, picks or nodes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from moe_locality.errors import ConfigError
from moe_locality.placement.objective import Homes
from moe_locality.placement.plan import PlacementPlan
from moe_locality.simulator.model import StepModel
from moe_locality.simulator.simulate import Replay, Simulation, replay_steps, time_replay
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import RoutingTrace

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
        plans, homes: of the baseline and of the plan.
        values: None: defaults.

    Returns:
        A row per value: ``value``, ``baseline_us``, ``plan_us`` with ``_error``s, ``speedup``,
        ``speedup_error``, and ``across_share``: of the baseline's step, what the links across nodes
        take.

    Raises:
        ConfigError: the sweep is unknown, or a value makes no sense.
    """
    if what not in SWEEPS:
        raise ConfigError(f"sweep: found {what!r}, expected one of {', '.join(SWEEPS)}")
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
        else:
            links = _with_nodes(topology, _whole(value))
            kept = replay(trace, _plans(plans_of, links), batch_tokens, (None, None))
        first, second = (time_replay(one, model, links, groups=groups) for one in kept)
        rows.append({"value": value, **_compare(first, second)})
    return rows


def _plans(plans_of: Callable[[ClusterTopology], Pair] | None, topology: ClusterTopology) -> Pair:
    if plans_of is None:
        raise ConfigError("sweep over nodes: found no plans_of, expected a maker of plans")
    return plans_of(topology)


def _with_nodes(topology: ClusterTopology, nodes: int) -> ClusterTopology:
    return ClusterTopology.uniform(nodes, topology.ranks_per_node, **topology.tiers())


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
    if what == "batch":
        return list(BATCHES)
    if what == "bandwidth":
        return list(RATIOS)
    if what == "k":
        return [k for k in range(1, trace.top_k + 1) if trace.top_k <= 8 or not k & (k - 1)]
    per_node = topology.ranks_per_node
    return [m for m in NODES if trace.num_experts % (m * per_node) == 0]


def _whole(value: float) -> int:
    if value != int(value) or value < 1:
        raise ConfigError(f"sweep: found the value {value}, expected a whole number of at least 1")
    return int(value)


def _with_ratio(topology: ClusterTopology, ratio: float) -> ClusterTopology:
    if not ratio > 0:
        raise ConfigError(f"sweep: found the ratio {ratio}, expected a number above 0")
    return dataclasses.replace(topology, inter_node_gbps=topology.intra_node_gbps / ratio)


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
