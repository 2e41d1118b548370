"""Plans on one trace: predicted costs, an interval for their ratio, figures."""

import dataclasses
from typing import Any

import numpy as np

from moe_locality.compare.rows import Comparison, Row, known
from moe_locality.errors import PlacementError
from moe_locality.figures import (
    Basis,
    FigureData,
    LayersData,
    Table,
    TradeoffData,
    TradeoffPoint,
    TrafficData,
)
from moe_locality.placement import Costs, PlacementPlan, evaluate
from moe_locality.placement.align import align_trace
from moe_locality.placement.costs import copies_of_blocks, ratio_interval, request_blocks
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace import RoutingTrace

METRICS = (
    ("copies", "remote nodes per token and layer"),
    ("picks", "remote (token, expert) pairs per token and layer"),
    ("link", "rows of the busiest node, per layer"),
    ("node_imbalance", "busiest node / mean"),
    ("rank_imbalance", "busiest rank / mean"),
    ("straggler", "busiest rank / mean, per batch"),
    ("distinct", "experts per rank and batch"),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan with the homes that its requests have: None = anywhere, else request id -> rank."""

    name: str
    plan: PlacementPlan
    homes: dict[int, int] | None = None

    @property
    def label(self) -> str:
        """The name, with what the homes are where they were assigned."""
        return self.name if self.homes is None else f"{self.name}, homes assigned"


def is_synthetic(trace: RoutingTrace) -> bool:
    """Whether the trace says that it is synthetic, in the name of its model."""
    return "synthetic" in trace.model.lower()


def compare_plans(
    trace: RoutingTrace,
    candidates: list[Candidate],
    topology: ClusterTopology | None = None,
    *,
    seed: int = 0,
) -> Comparison:
    """Evaluate the candidates (the first is the baseline) on a trace and put them side by side.

    The interval of the copies' ratio is a jackknife over blocks of whole requests, so it says how
    far the ratio depends on which requests were recorded.

    Raises:
        PlacementError: no candidate, two of one name, or a plan does not fit the trace.
    """
    labels = tuple(candidate.label for candidate in candidates)
    if not labels or len(set(labels)) != len(labels):
        raise PlacementError(
            f"found the plans {list(labels)}, expected one or more with different names: rename one"
        )
    costs = [evaluate(trace, c.plan, topology, c.homes) for c in candidates]
    interval = None
    if len(candidates) > 1:
        blocks = request_blocks(trace, seed)
        interval = ratio_interval(
            *(
                copies_of_blocks(trace, c.plan, topology, c.homes, blocks)
                for c in (candidates[0], candidates[-1])
            )
        )
    rows = tuple(
        Row(
            metric=name,
            unit=unit,
            how="simulated",
            values=tuple(known(getattr(cost, name)) for cost in costs),
            interval=interval if name == "copies" else None,
        )
        for name, unit in METRICS
    )
    first = candidates[0].plan
    cluster = f"{first.num_nodes} nodes x {first.ranks_per_node} ranks"
    facts = (
        ("model", trace.model or "not named"),
        ("trace", f"{trace.content_hash()[:12]} ({trace.num_tokens:,} tokens)"),
        ("cluster", cluster if topology is None else topology.describe()),
        *((f"plan {c.label}", c.plan.digest()[:12]) for c in candidates),
    )
    return Comparison(
        names=labels,
        rows=rows,
        facts=facts,
        figures=tuple(_figures(trace, candidates, costs, topology, seed)),
        tables=(_layer_table(candidates, costs),),
        notes=(*_notes(trace, candidates), *_above_the_cap(candidates, costs)),
        synthetic=is_synthetic(trace),
        sources={c.label: _source(c.plan) for c in candidates},
    )


def _source(plan: PlacementPlan) -> dict[str, Any]:
    return {"model": plan.model, "plan": plan.digest(), **plan.provenance}


def _notes(trace: RoutingTrace, candidates: list[Candidate]) -> tuple[str, ...]:
    own = _in_sample(trace, candidates)
    if not own:
        return ()
    note = (
        f"Made from these same requests: {', '.join(own)}. In-sample figures flatter a plan: judge "
        "it on requests that its solver did not see (--held-out)."
    )
    return (note,)


def _above_the_cap(candidates: list[Candidate], costs: list[Costs]) -> list[str]:
    """A sentence for each plan that is less level here than its solver was told to expect."""
    found = []
    for candidate, cost in zip(candidates, costs, strict=True):
        made = candidate.plan.provenance
        expected, cap = made.get("expected_imbalance"), made.get("max_imbalance")
        if expected is not None and cost.node_imbalance > max(expected, cap):
            found.append(
                f"{candidate.label} is above its cap: the busiest node has "
                f"{cost.node_imbalance:.3f} of the mean load on these requests; the cap is "
                f"{cap:g}, {expected:.3f} was expected, {candidates[0].label} has "
                f"{costs[0].node_imbalance:.3f}."
            )
    return found


def _in_sample(trace: RoutingTrace, candidates: list[Candidate]) -> list[str]:
    return [c.label for c in candidates if made_from(c.plan, trace)]


def made_from(plan: PlacementPlan, trace: RoutingTrace) -> bool:
    """Whether the plan was solved on this trace, or on a part of it (``place --held-out``)."""
    sources = (plan.provenance.get("trace"), plan.provenance.get("drawn_from"))
    learned = plan.provenance.get("method") not in ("linear", "round_robin", None)
    return learned and trace.content_hash() in sources


def _figures(
    trace: RoutingTrace,
    candidates: list[Candidate],
    costs: list[Costs],
    topology: ClusterTopology | None,
    seed: int,
) -> list[FigureData]:
    if trace.expert_ids is None:
        return []
    own = _in_sample(trace, candidates)
    basis = Basis(
        how="simulated",
        count=trace.num_tokens,
        num_requests=len(trace.request_ids),
        seed=seed,
        synthetic=is_synthetic(trace),
        note=f"In-sample: {', '.join(own)}." if own else "",
    )
    figures: list[FigureData] = []
    first, last = candidates[0], candidates[-1]
    if len(candidates) > 1:
        before, after = (
            np.asarray(
                align_trace(trace, c.plan, topology, c.homes).node_visits().sum(axis=0), float
            )
            for c in (first, last)
        )
        figures.append(
            TrafficData(
                before=before,
                after=after,
                node_of=tuple(range(len(before))),
                names=(first.label, last.label),
                unit="copies",
                per=trace.num_tokens * trace.num_layers,
                per_name=" per token and layer",
                basis=basis,
            )
        )
        cap = last.plan.provenance.get("max_imbalance")
        points = tuple(
            TradeoffPoint(
                name=c.label,
                imbalance=cost.node_imbalance,
                copies=cost.copies,
                is_baseline=c is first,
            )
            for c, cost in zip(candidates, costs, strict=True)
        )
        figures.append(
            TradeoffData(points=points, basis=basis, cap=cap if isinstance(cap, float) else None)
        )
    values = {c.label: cost.per_layer["copies"] for c, cost in zip(candidates, costs, strict=True)}
    figures.append(
        LayersData(
            layer_ids=costs[0].layer_ids, values=values, unit="copies per token", basis=basis
        )
    )
    return figures


def _layer_table(candidates: list[Candidate], costs: list[Costs]) -> Table:
    """Copies, picks and balance of every layer under every plan."""
    names = ("copies", "picks", "node_imbalance", "rank_imbalance")
    rows = [
        (candidate.label, layer, *(known(cost.per_layer[name][row]) for name in names))
        for candidate, cost in zip(candidates, costs, strict=True)
        for row, layer in enumerate(cost.layer_ids)
    ]
    return Table(title="Layer by layer", columns=("plan", "layer", *names), rows=tuple(rows))
