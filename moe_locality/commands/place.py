"""The command place: a plan from a trace, or from a plan and a newer trace.

The plan is judged on requests that it was not made from: with --held-out on those; else a second
plan is made from part of the requests and judged on the others, and the plan that is written is
made from all. Where nothing is gained the usual order of the experts is written instead.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

import moe_locality
from moe_locality.commands import inputs
from moe_locality.commands.output import Result, brief, costs_table, progress, table
from moe_locality.errors import PlacementError

if TYPE_CHECKING:
    from moe_locality import ClusterTopology, PlacementPlan, RoutingTrace
    from moe_locality.placement import Costs

AUTO = "auto"
MOVE_BUDGET = 0.02
BOUND_SECONDS = 10.0
CURVE = (AUTO, "auto+0.01", "auto+0.05", "auto+0.15")
"""Caps that are shown beside each other where the cap is to be found; the first is the default."""
LEVELLERS = ("balance", "eplb", "eplb_global")
"""Methods for level ranks; the others are for fewer copies."""
OURS = ("coactivation", "balance")
"""Methods for which the usual order is kept where they gain nothing; a peer is written as asked."""

Method = Annotated[
    str,
    Option(
        help="coactivation, balance, or a peer: eplb, eplb_global, hottest, linear, mtkahypar, "
        "request_kmeans, round_robin."
    ),
]
RedundantExperts = Annotated[int, Option(min=0, help="Slots beyond the experts, per layer.")]
RedundantPerLayer = Annotated[
    bool,
    Option(
        "--redundant-per-layer",
        help="Redundant experts in the mean: layers that gain more have more. Not for engine maps.",
    ),
]
JointHomes = Annotated[str | None, Option(help="joint: place requests together with experts.")]
MaxHomeImbalance = Annotated[float, Option(help="With joint homes: cap on tokens per rank.")]
Objective = Annotated[
    str, Option(help="copies; rank_copies: sent once per rank; with joint homes: picks.")
]
OneLayout = Annotated[bool, Option("--one-layout", help="The same places in all layers.")]
ServingRule = Annotated[
    str | None, Option(help="Which replica serves: home or visited. Default: by method.")
]
ExpertGroups = Annotated[
    int | None, Option(min=1, help="Groups of a group-limited router, kept whole.")
]
SamplingUnit = Annotated[
    str | None,
    Option(help="What new requests come in: auto, request, domain, or how many neighbors."),
]
MoveBudget = Annotated[
    float | None, Option(help="With --start: share of the slots that may move; 0.02.")
]
Bound = Annotated[
    bool, Option("--bound", help="Then say what no plan can go below; Ctrl-C keeps the plan.")
]
BoundSeconds = Annotated[float | None, Option(min=0, help="Effort on the bound; 10. 0: no bound.")]
Prove = Annotated[
    bool, Option("--prove", help="With the bound, prove layers optimal: <= 32 experts, 4 nodes.")
]


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    """A plan from ``train`` with the ``options`` of ``solve``, judged on ``unseen`` requests: those
    held out, else others than those of ``fit``, which a second plan is made from. None: too few."""

    train: RoutingTrace
    fit: RoutingTrace
    unseen: RoutingTrace | None
    held_out: float
    topology: ClusterTopology
    options: dict[str, Any]

    @property
    def transport(self) -> str:
        """The transport that the objective is for."""
        return "per_rank" if self.options["objective"] == "rank_copies" else "once_per_node"


def place(
    trace: inputs.Trace,
    out: Annotated[Path, Option("-o", "--out", help="Plan to write (JSON).")],
    nodes: inputs.Nodes = None,
    ranks_per_node: inputs.RanksPerNode = None,
    cluster: inputs.Cluster = None,
    hostfile: inputs.Hostfile = None,
    method: Method = "coactivation",
    redundant_experts: RedundantExperts = 0,
    redundant_per_layer: RedundantPerLayer = False,
    max_imbalance: inputs.MaxImbalance = AUTO,
    homes: JointHomes = None,
    max_home_imbalance: MaxHomeImbalance = 1.05,
    objective: Objective = "copies",
    expert_groups: ExpertGroups = None,
    one_layout: OneLayout = False,
    serving_rule: ServingRule = None,
    start: Annotated[Path | None, Option(help="Improve this plan instead, with few moves.")] = None,
    move_budget: MoveBudget = None,
    held_out: inputs.HeldOut = 0.0,
    bound: Bound = False,
    bound_seconds: BoundSeconds = None,
    prove: Prove = False,
    sampling_unit: SamplingUnit = None,
    seed: inputs.Seed = 0,
) -> Result:
    """Compute where the experts should live, or improve a plan with few moves."""
    from moe_locality.analysis.potential import usual_order
    from moe_locality.placement.problem import warnings_once

    _check_options(homes, start, move_budget, bound_seconds)
    inputs.check_writable(out, "plan", trace, cluster, hostfile)
    old, topology = _start_on(start, redundant_experts, nodes, ranks_per_node, cluster, hostfile)
    options: dict[str, Any] = {"method": method, "num_redundant_experts": redundant_experts}
    options |= {"max_imbalance": max_imbalance, "max_home_imbalance": max_home_imbalance}
    options |= {"homes": homes, "objective": objective, "expert_groups": expert_groups}
    options |= {"move_budget": MOVE_BUDGET if move_budget is None else move_budget, "seed": seed}
    options |= {"start": old, "one_layout": one_layout, "serving_rule": serving_rule}
    options |= {"sampling_unit": sampling_unit, "redundant_per_layer": redundant_per_layer}
    with progress(f"placing {trace}"), warnings_once():
        content = moe_locality.read_trace(trace)
        job = _job(content, held_out, topology, options)
        if old is not None:
            inputs.check_plan_fits(old, start, content)
        curve = _curve(job, with_times=cluster is not None)
        begun = time.perf_counter()
        plan = moe_locality.solve(job.train, topology, **options)
        seconds = time.perf_counter() - begun
        judged = _judged(plan, job)
        if judged["kept"] == "linear":
            plan = usual_order(job.train, topology, redundant_experts)
    plan = _signed(plan, content, held_out, judged)
    plan.write(out)
    payload = {"command": "place", "plan": out, "method": method, "seconds": seconds}
    payload |= _facts(plan, job) | {"judged": judged, "curve": curve} | _costs(plan, job)
    then = None
    if (bound or prove or bound_seconds) and bound_seconds != 0:
        options = {"max_imbalance": _cap_of(plan), "prove": prove, "seconds": bound_seconds or 0}
        then = functools.partial(_bounded, plan, out, job, payload, options)
    return Result(payload=payload, show=_shown(job, payload), then=then)


def _job(
    content: RoutingTrace, held_out: float, topology: ClusterTopology, options: dict[str, Any]
) -> _Job:
    from moe_locality.analysis.potential import HELD_OUT

    train, unseen = inputs.split(content, held_out, options["seed"])
    fit = train
    if unseen is None and len(train.request_ids) > 1:
        fit, unseen = train.split(1 - HELD_OUT, options["seed"])
    return _Job(train, fit, unseen, held_out, topology, options)


def _facts(plan: PlacementPlan, job: _Job) -> dict[str, Any]:
    extra = float(plan.slots_of_layers.mean() / plan.num_experts - 1)
    facts = {"digest": plan.digest(), "cluster": job.topology.to_dict()}
    facts |= {"trace": job.train.content_hash(), "costs": plan.costs}
    return {**facts, "certificate": None, "extra_expert_weights": extra}


def _check_options(
    homes: str | None, start: Path | None, move_budget: float | None, bound_seconds: float | None
) -> None:
    """Raise PlacementError for options that mean nothing, before the trace is read."""
    if homes not in (None, "joint"):
        raise PlacementError(f"--homes: found {homes!r}, expected 'joint', or leave the option out")
    if move_budget is not None and start is None:
        raise PlacementError(
            "found --move-budget without --start, expected both or none: name the plan to improve"
        )
    if bound_seconds is not None and not bound_seconds <= 1e9:
        raise PlacementError(
            f"--bound-seconds: found {bound_seconds}, expected at most 1e9 seconds, such as 10"
        )


def _cap_of(plan: PlacementPlan) -> float:
    """Return the cap on node loads that a plan was made for; that of 1.05 where it had none."""
    found = plan.provenance.get("max_imbalance")
    return found if isinstance(found, float) else 1.05


def _curve(job: _Job, *, with_times: bool) -> list[dict[str, Any]] | None:
    """Return plans under several caps, made from part of the requests and judged on others (not on
    ``job.unseen``), with the one to take ``chosen``: that with the shortest simulated step where
    the bandwidths are known. Its cap goes into the options. None where no cap is to be found."""
    from moe_locality.analysis.potential import HELD_OUT, judged_caps
    from moe_locality.placement.costs import NUM_BLOCKS

    options = job.options
    fixed = options["method"] != "coactivation" or options["start"] is not None
    if options["max_imbalance"] != AUTO or fixed or job.fit.kind != "tokens":
        return None
    if len(job.fit.request_ids) * HELD_OUT < NUM_BLOCKS[0] or job.topology.num_nodes == 1:
        return None
    left_out = ("max_imbalance", "redundant_per_layer")  # which takes three times as long
    given = {name: part for name, part in options.items() if name not in left_out}
    judged = judged_caps(job.fit, job.topology, caps=CURVE, **given)
    points = [{"cap": name, **point} for name, point in zip(CURVE, judged, strict=True)]
    chosen = points[0]
    if with_times:  # a difference of half a per cent is no reason to be less level
        shortest = min(point["step_us"] for point in points)
        near = [point for point in points if point["step_us"] <= 1.005 * shortest]
        chosen = min(near, key=lambda point: point["node_imbalance"])
    options["max_imbalance"] = chosen["cap"]
    points.sort(key=lambda point: point["max_imbalance"])
    return [{**point, "chosen": point is chosen} for point in points]


def _start_on(
    start: Path | None, redundant_experts: int, *cluster: Any
) -> tuple[PlacementPlan | None, ClusterTopology]:
    """Return (plan to improve, cluster): that of the plan where the options name none. Raise
    PlacementError where ``redundant_experts`` asks for other replicas than the plan has."""
    if start is None:
        return None, inputs.read_cluster(*cluster)
    plan = moe_locality.PlacementPlan.read(start)
    if redundant_experts not in (0, plan.num_redundant_experts):
        raise PlacementError(
            f"--redundant-experts: found {redundant_experts} for a plan with "
            f"{plan.num_redundant_experts}, expected the same: a plan that is improved keeps its "
            "replicas; leave the option out, or solve without --start"
        )
    given = any(option is not None for option in cluster)
    return plan, inputs.read_cluster(*cluster) if given else plan.topology


def _judged(plan: PlacementPlan, job: _Job) -> dict[str, Any]:
    """Return what to expect of the plan on new requests, and what to write: ``kept``. ``gained``
    None: it cannot be said, for the ``reason``; then the plan is written as it is."""
    from moe_locality.analysis.potential import usual_order
    from moe_locality.placement.costs import NUM_BLOCKS, expected_change, request_blocks
    from moe_locality.placement.homes.predictor import default_prediction

    options, unseen, topology = job.options, job.unseen, job.topology
    old, method = options["start"], options["method"]
    against = "linear" if old is None else "start"
    found: dict[str, Any] = {"gained": None, "kept": "plan", "against": against}
    if method == "linear":
        return {**found, "reason": "the usual order was asked for"}
    if job.train.kind != "tokens":
        return {**found, "reason": "a trace of counts does not tell requests apart"}
    blocks = None if unseen is None else request_blocks(unseen, options["seed"])
    if unseen is None or blocks is None:
        count = 0 if unseen is None else len(unseen.request_ids)
        reason = f"found {count} requests to judge on, expected at least {NUM_BLOCKS[0]}: the plan "
        return {**found, "reason": f"{reason}may gain nothing; record more requests"}
    trial = plan if job.held_out else moe_locality.solve(job.fit, topology, **options)
    base = old or usual_order(job.train, topology, options["num_redundant_experts"])
    homes = base_homes = None
    if trial.home_profiles is not None:
        found["homes"] = default_prediction(unseen)
        homes = moe_locality.assign_homes(unseen, trial, topology, predict=found["homes"])
        if old is not None:  # has profiles too: the new plan has them from it
            base_homes = moe_locality.assign_homes(unseen, old, topology, predict=found["homes"])
    both = ((base, base_homes), (trial, homes))
    by_rank = job.transport == "per_rank"
    change = expected_change(unseen, *both, topology, blocks, by_rank=by_rank)
    before, after = (
        moe_locality.evaluate(unseen, some, topology, at, transport=job.transport)
        for some, at in both
    )
    goal = "rank_imbalance" if method in LEVELLERS else options["objective"]
    gained = _gains(change, goal, before.node_imbalance > _cap_of(trial))
    keep = "plan" if gained or old is not None or method not in OURS else "linear"
    found |= {"gained": gained, "kept": keep, "goal": goal, "reason": None, "cap": _cap_of(trial)}
    found["expected_imbalance"] = trial.provenance.get("expected_imbalance")
    found |= {"requests": len(unseen.request_ids), "fit_requests": len(job.fit.request_ids)}
    parts = {name: None if x is None else [round(y, 6) for y in x] for name, x in change.items()}
    found["change"] = {name: x and x[0] for name, x in parts.items()}
    found["interval"] = {name: x and x[1:] for name, x in parts.items()}
    return {**found, "before": brief(before), "after": brief(after)}


def _gains(
    change: dict[str, tuple[float, float, float] | None], goal: str, above_cap: bool
) -> bool:
    """Return whether a plan is surely (95 % interval) better at its goal, or more level and not
    surely worse. ``above_cap``: the order before is less level than allowed; more level nodes are a
    gain then, whatever they cost."""
    surely_less = {name for name, part in change.items() if part is not None and part[2] < 0}
    if goal in surely_less or goal == "rank_imbalance":
        return goal in surely_less
    part = change[goal]
    if part is not None and part[1] > 0:  # surely worse
        return above_cap and "node_imbalance" in surely_less
    return bool(surely_less & {"node_imbalance", "rank_imbalance"})


def _signed(
    plan: PlacementPlan, trace: RoutingTrace, held_out: float, judged: dict[str, Any]
) -> PlacementPlan:
    """Return the plan with what it was drawn from and how it was judged in the provenance."""
    source = {"drawn_from": trace.content_hash(), "held_out": held_out} if held_out else {}
    left_out = ("before", "after")
    told = {name: x for name, x in judged.items() if name not in left_out and x is not None}
    provenance = {**plan.provenance, **source, "judged": told}
    return dataclasses.replace(plan, provenance=provenance)


def _costs(plan: PlacementPlan, job: _Job) -> dict[str, Any]:
    """Return the costs on held-out requests, and those of linear and of the start on the same ones;
    with homes predicted as for new requests where the plan was found together with homes."""
    from moe_locality.placement.homes.predictor import default_prediction

    trace = job.unseen if job.held_out and job.unseen is not None else job.train
    base, old = inputs.linear_plan(job.train, job.topology), job.options["start"]
    predict = default_prediction(trace) if plan.home_profiles is not None and job.held_out else None

    def homes_of(some: PlacementPlan) -> dict[int, int] | None:
        return moe_locality.assign_homes(trace, some, predict=predict) if predict else None

    def cost(some: PlacementPlan, homes: Any = None, before: Any = None) -> Costs:
        return moe_locality.evaluate(
            trace, some, job.topology, homes, baseline=before, transport=job.transport
        )

    found: dict[str, Any] = {"held_out": None, "held_out_homes": predict, "start": None}
    found["linear"] = base and brief(cost(base))
    if not job.held_out and old is None:
        return found
    after = cost(plan, homes_of(plan), old)
    if job.held_out:
        found["held_out"] = brief(after)
    if old is not None:
        share = after.move or 0.0
        found["start"] = {
            "digest": old.digest(),
            "costs": brief(cost(old, homes_of(old))),
            "moved_slots": round(share * plan.physical_to_logical_map.size),
            "moved_share": share,
        }
    return found


def _shown(job: _Job, payload: dict[str, Any]) -> Callable[[Any], None]:
    """Return what prints a new plan: its costs beside those before, and what to expect of it."""
    start, judged, method = payload["start"], payload["judged"], payload["method"]
    cluster = job.topology.describe()
    head = f"{payload['plan']}: {method}, {cluster}, {payload['seconds']:.2f} s"
    if payload["extra_expert_weights"]:
        head += f"; replicas: {payload['extra_expert_weights']:+.1%} of the expert weights"
    if "after" in judged and not job.held_out:
        where = f"on {judged['requests']} requests not seen"
        found = {judged["against"]: judged["before"], method: judged["after"]}
    else:
        where = f"on {job.held_out:.0%} held-out requests" if job.held_out else "on its own trace"
        found = {"linear": payload["linear"]}
        if start is not None:
            found["start"] = start["costs"]
        found[method] = judged.get("after") or payload["held_out"] or payload["costs"]

    def show(console: Any) -> None:
        console.print(head, soft_wrap=True)
        if start is not None:
            share = f"{start['moved_share']:.1%} of all"
            console.print(f"{start['moved_slots']} slots moved, {share}")
        console.print(costs_table(f"Predicted {where}", found))
        if payload["curve"] is not None:
            names = ("cap", "max_imbalance", "copies", "node_imbalance")
            rows = [
                (*(p[name] for name in (*names, "step_us")), "chosen" if p["chosen"] else "")
                for p in payload["curve"]
            ]
            title = "Caps, from part of the requests, on others"
            console.print(table(title, (*names, "step us, simulated", ""), rows))
        for line in _judged_words(judged):
            console.print(line, soft_wrap=True)

    return show


def _judged_words(judged: dict[str, Any]) -> list[str]:
    """Return what is to be expected of new requests, in sentences."""
    if judged["gained"] is None:
        return [f"not judged on new requests: {judged['reason']}"]
    usual = "the usual order" if judged["against"] == "linear" else "the plan to improve"
    words = []
    for name in dict.fromkeys((judged["goal"], "copies", "node_imbalance", "rank_imbalance")):
        part = judged["change"][name]
        if part is not None:
            low, high = judged["interval"][name]
            words.append(f"{name} {part:+.1%} ({low:+.1%} to {high:+.1%})")
    at = f", with homes by {judged['homes']}" if "homes" in judged else ""
    level, cap = judged["after"]["node_imbalance"], judged["cap"]
    expected = judged["expected_imbalance"]
    lines = [
        f"expected on new requests{at}, against {usual}: {', '.join(words) or 'no change'} (95 % "
        f"interval; a plan from {judged['fit_requests']} requests, judged on "
        f"{judged['requests']} others)"
    ]
    if expected is not None and level > max(cap, expected):
        lines.append(
            f"node_imbalance was {level:.3f} on these {judged['requests']} requests, above the cap "
            f"of {cap:.3f} ({expected:.3f} was expected in the mean over possible requests, "
            f"{usual} has {judged['before']['node_imbalance']:.3f}): give a lower --max-imbalance, "
            "or record more requests"
        )
    if judged["kept"] == "linear":
        lines.append("nothing is gained for sure: wrote the usual order instead of the plan found")
    elif not judged["gained"]:
        lines.append(f"nothing is gained for sure: {usual} may be as good")
    return lines


def _bounded(
    plan: PlacementPlan, out: Path, job: _Job, payload: dict[str, Any], options: dict[str, Any]
) -> Result:
    """Write the plan once more with its certificate; interrupted, the plan stays as it is."""
    try:
        with progress("bounding layers") as update:
            options["seconds"] = options["seconds"] or BOUND_SECONDS
            found = _certificate(plan, job.train, job.topology, {**options, "progress": update})
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"interrupted: {out} is written, without a bound") from stop
    if found is None:
        text = (
            "no bound: there is none for replicas with homes, for a trace of counts and for one "
            "node; with replicas it needs effort, see --bound-seconds"
        )
        return Result(payload=payload, text=[text])
    dataclasses.replace(plan, provenance={**plan.provenance, "certificate": found}).write(out)
    return Result(payload=payload | {"certificate": found}, text=[_certificate_words(found)])


def _certificate(
    plan: PlacementPlan, trace: RoutingTrace, topology: ClusterTopology, options: dict[str, Any]
) -> dict[str, Any] | None:
    """Return what the plan costs, the bound and the gap; None where there is no bound. A plan with
    home profiles is certified for the homes that it gives the requests of the trace."""
    from moe_locality.placement.bounds.lower import certify_plan

    homes = None
    if plan.home_profiles is not None:
        homes = moe_locality.assign_homes(trace, plan, predict="oracle")
    replicated = not plan.is_permutation
    if trace.expert_ids is None or topology.num_nodes == 1 or (replicated and homes is not None):
        return None
    found = certify_plan(trace, plan, topology, homes, **options)
    if replicated and not found.bound.any():
        return None
    return {**found.to_dict(), "homes": "uniform" if homes is None else "given"}


def _certificate_words(found: dict[str, Any]) -> str:
    cap, proved = found["max_imbalance"], found["proved_layers"]
    best = f"; {proved} of {found['layers']} layers are proved to be best" if proved else ""
    what = "of as many slots" if cap is None else "without replicas"
    level = "whatever its balance" if cap is None else f"node loads up to {cap:.3f} x mean"
    return (
        f"copies {found['found']:.4f} on the trace it was made from; no placement {what} "
        f"has fewer than {found['bound']:.4f} ({level}): gap "
        f"{found['gap']:.1%}, at most {found['worst_gap']:.1%} (layer {found['worst_layer']})"
        f"{best}"
    )
