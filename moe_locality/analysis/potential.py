"""What placement, homes and replicas save on a trace, their ceilings, and whether it is worth it.

Every saving is found by solving on part of the requests and costing on the others, so it is a
prediction for new requests like these. A ceiling is a bound: nothing of that kind saves more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.placement.bounds.lower import lower_bounds
from moe_locality.placement.costs import (
    Costs,
    copies_of_blocks,
    evaluate,
    ratio_interval,
    request_blocks,
)
from moe_locality.placement.homes.assign import assign_homes
from moe_locality.placement.homes.predictor import default_prediction
from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.problem import align_trace, warnings_once
from moe_locality.placement.solve import solve
from moe_locality.simulator import StepModel, simulate
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import RoutingTrace

HELD_OUT = 0.3
MAX_IMBALANCE = 1.05
MIN_SAVING = 0.03
"""Below this share of the copies a placement is called not worth it: a plan has to be kept, loaded
and moved to, and the exchange is only part of a step."""
STEP_TOKENS, STEPS = 512, 32
"""Tokens per rank of a simulated step, and steps."""
CAPS = (1.01, 1.02, 1.05, 1.1, 1.2, 1.5)
REPLICA_SHARE = 0.125


@dataclass(frozen=True, slots=True, kw_only=True)
class Lever:
    """One kind of plan against the linear layout with requests anywhere, on unseen requests.

    saving: share of the copies that it saves; interval: its 95 % interval over requests (None: too
    few). ceiling: no plan of this kind saves more (None: no bound is known). extra_expert_weights:
    share that its replicas add. command: what makes such a plan (and then the homes).
    """

    name: str
    saving: float
    interval: tuple[float, float] | None
    node_imbalance: float
    rank_imbalance: float
    ceiling: float | None
    extra_expert_weights: float
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Potential:
    """What a cluster could save; ``verdict`` says it in a sentence. ``copies_linear``: remote nodes
    per token and layer in the linear layout with requests anywhere; ``linear_imbalance``: of nodes.
    """

    num_nodes: int
    ranks_per_node: int
    solved_tokens: int
    judged_tokens: int
    copies_linear: float
    linear_imbalance: float
    levers: tuple[Lever, ...]
    worth_it: bool
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@warnings_once()
def potential(
    trace: RoutingTrace,
    topology: ClusterTopology,
    *,
    max_imbalance: float = MAX_IMBALANCE,
    seed: int = 0,
    bound_seconds: float = 5.0,
    trace_name: str = "TRACE",
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Potential:
    """Solve on 70 % of the requests, judge on the others, and say what each lever saves.

    ``bound_seconds``: effort for the ceilings, see ``placement.bounds.lower_bounds``;
    ``trace_name``: what commands call the trace.

    Raises:
        TraceError: a trace of counts, or of a single request.
        PlacementError: the experts do not fit the cluster.
    """
    train, test = _parts(trace, seed)
    linear = solve(train, topology, method="linear")
    base = evaluate(test, linear, topology)
    result = partial(
        Potential,
        num_nodes=topology.num_nodes,
        ranks_per_node=topology.ranks_per_node,
        solved_tokens=train.num_tokens,
        judged_tokens=test.num_tokens,
        copies_linear=base.copies,
        linear_imbalance=base.node_imbalance,
    )
    if topology.num_nodes == 1 or base.copies == 0:
        verdict = "Nothing crosses nodes here: a placement has nothing to save."
        return result(levers=(), worth_it=False, verdict=verdict)
    blocks = request_blocks(test, seed)
    usual = copies_of_blocks(test, linear, topology, None, blocks)
    least = float(lower_bounds(test, topology, seconds=bound_seconds).copies.mean())
    judge = _Judge(test, topology, base, blocks, usual, least, trace_name)
    # about an eighth more slots, in whole slots per rank
    slots = trace.num_experts + max(round(trace.num_experts * REPLICA_SHARE), 1)
    extra = -(-slots // topology.num_ranks) * topology.num_ranks - trace.num_experts
    joint, replicas = {"homes": "joint"}, {"num_redundant_experts": extra}
    tried: dict[str, dict[str, Any]] = {
        "placement": {},
        "placement and homes": joint,
        f"placement and {extra} replicas": replicas,
        f"placement, homes and {extra} replicas": joint | replicas,
    }
    levers = [judge.lever("homes", linear, with_homes=True)]
    for done, (name, options) in enumerate(tried.items()):
        progress(done, len(tried), name)
        plan = solve(train, topology, max_imbalance=max_imbalance, seed=seed, **options)
        levers.append(judge.lever(name, plan, with_homes="homes" in options))
    worth_it, verdict = _verdict(levers)
    return result(levers=tuple(levers), worth_it=worth_it, verdict=verdict)


@warnings_once()
def tradeoff(
    trace: RoutingTrace,
    topology: ClusterTopology,
    *,
    caps: Sequence[float | str] = CAPS,
    seed: int = 0,
    **options: Any,
) -> list[dict[str, float]]:
    """Balance against locality: one plan per cap on the imbalance, judged on unseen requests.

    Rising ``caps``, each as ``max_imbalance`` of ``solve`` with its other ``options``, with
    "max_imbalance" (what was allowed), "node_imbalance" (what unseen requests see), "copies",
    "saving" against the linear layout and "step_us" (a step of the exchange that sends a token once
    per node, simulated with the figures of the cluster).
    """
    points = judged_caps(trace, topology, caps=caps, seed=seed, **options)
    return sorted(points, key=lambda point: point["max_imbalance"])


def usual_order(
    trace: RoutingTrace, topology: ClusterTopology, num_redundant_experts: int
) -> PlacementPlan:
    """The plan that engines assume without one; without replicas where that is possible."""
    extra = num_redundant_experts if trace.num_experts % topology.num_ranks else 0
    return solve(trace, topology, method="linear", num_redundant_experts=extra)


def judged_caps(
    trace: RoutingTrace,
    topology: ClusterTopology,
    *,
    caps: Sequence[float | str],
    seed: int = 0,
    **options: Any,
) -> list[dict[str, float]]:
    """As ``tradeoff``, in the order of the caps."""
    train, test = _parts(trace, seed)
    # a step has as many tokens as give at least four steps where there are
    tokens = min(STEP_TOKENS, max(test.num_tokens // (4 * topology.num_ranks), 1))
    model = StepModel(exchange="hierarchical")
    usual = usual_order(train, topology, options.get("num_redundant_experts", 0))
    base = evaluate(test, usual, topology).copies
    points = []
    for cap in caps:
        plan = solve(train, topology, max_imbalance=cap, seed=seed, **options)
        homes = None if plan.home_profiles is None else _homes(test, plan, topology)
        costs = evaluate(test, plan, topology, homes)
        times = simulate(
            test,
            plan,
            topology,
            homes,
            model=model,
            batch_tokens=tokens,
            max_steps=STEPS,
            seed=seed,
        )
        points.append(
            {
                "max_imbalance": plan.provenance["max_imbalance"],
                "node_imbalance": costs.node_imbalance,
                "copies": costs.copies,
                "saving": 1 - costs.copies / base if base else 0.0,
                "step_us": times.group_step_us,
            }
        )
    return points


def _homes(test: RoutingTrace, plan: PlacementPlan, topology: ClusterTopology) -> dict[int, int]:
    return assign_homes(test, plan, topology, predict=default_prediction(test))


def grouping_ceiling(trace: RoutingTrace, plan: PlacementPlan, topology: ClusterTopology) -> float:
    """Largest share of the copies that homes alone could save under ``plan``.

    A token whose home is the best of the D nodes that it needs still goes to D - 1 others; one
    whose home is drawn evenly from M nodes goes to D (M - 1) / M.
    """
    visits = align_trace(trace, plan, topology, None).node_visits()
    touched = visits.sum() / (trace.num_tokens * trace.num_layers)
    nodes = topology.num_nodes
    anywhere = touched * (nodes - 1) / nodes
    return float(1 - max(touched - 1, 0.0) / anywhere) if anywhere else 0.0


def _parts(trace: RoutingTrace, seed: int) -> tuple[RoutingTrace, RoutingTrace]:
    if trace.kind != "tokens":
        raise TraceError(
            "found a trace of counts, expected the picks of every token: counts do not say which "
            "experts a token picks together"
        )
    if len(trace.request_ids) < 2:
        raise TraceError(
            f"found {len(trace.request_ids)} request(s), expected at least 2: what a plan saves is "
            "judged on requests that its solver did not see"
        )
    return trace.split(1 - HELD_OUT, seed=seed)


@dataclass(frozen=True, slots=True)
class _Judge:
    """Costs plans on the held-out requests against the linear layout."""

    test: RoutingTrace
    topology: ClusterTopology
    base: Costs
    blocks: np.ndarray | None
    base_blocks: np.ndarray | None
    least_copies: float
    trace_name: str

    def lever(self, name: str, plan: PlacementPlan, *, with_homes: bool) -> Lever:
        homes = _homes(self.test, plan, self.topology) if with_homes else None
        costs = evaluate(self.test, plan, self.topology, homes)
        found = copies_of_blocks(self.test, plan, self.topology, homes, self.blocks)
        ratio = ratio_interval(self.base_blocks, found)
        return Lever(
            name=name,
            saving=1 - costs.copies / self.base.copies,
            interval=None if ratio is None else (1 - ratio[1], 1 - ratio[0]),
            node_imbalance=costs.node_imbalance,
            rank_imbalance=costs.rank_imbalance,
            ceiling=self._ceiling(name, plan),
            extra_expert_weights=plan.num_redundant_experts / plan.num_experts,
            command=self._command(plan, with_homes),
        )

    def _command(self, plan: PlacementPlan, with_homes: bool) -> str:
        """The command line for such a plan from the whole trace, and for its homes."""
        cluster = self.topology
        even = ClusterTopology.uniform(cluster.num_nodes, cluster.ranks_per_node)
        words = ["moe-locality place", self.trace_name]
        if even.rank_to_node == cluster.rank_to_node:
            words += [f"--nodes {cluster.num_nodes} --ranks-per-node {cluster.ranks_per_node}"]
        else:
            words += ["--cluster CLUSTER.yaml"]
        if plan.provenance["method"] == "linear":
            words += ["--method linear"]
        else:
            words += ["--homes joint"] if with_homes else []
            words += [f"--max-imbalance {plan.provenance['max_imbalance']:g}"]
        if plan.num_redundant_experts:
            words += [f"--redundant-experts {plan.num_redundant_experts}"]
        words += ["-o plan.json"]
        if with_homes:
            words += [f"&& moe-locality group {self.trace_name} --plan plan.json -o homes.json"]
        return " ".join(words)

    def _ceiling(self, name: str, plan: PlacementPlan) -> float | None:
        """What no plan of this kind can exceed on these requests; no bound knows replicas."""
        if name == "homes":
            return grouping_ceiling(self.test, plan, self.topology)
        least = self.least_copies
        if name == "placement and homes":  # the best home of a token is one of the nodes it needs
            nodes = self.topology.num_nodes
            least = max(least * nodes / (nodes - 1) - 1, 0.0)
        elif name != "placement":
            return None
        return 1 - least / self.base.copies


def _verdict(levers: list[Lever]) -> tuple[bool, str]:
    best = max(levers, key=lambda lever: lever.saving)
    sure, reach = best.saving, "too few requests for an interval"
    if best.interval is not None:
        sure, most = best.interval
        reach = f"95 % interval {100 * sure:.1f} to {100 * most:.1f}"
    found = (
        f"{best.name} saves {100 * best.saving:.1f} % of the copies that cross nodes ({reach}) "
        f"at a node imbalance of {best.node_imbalance:.3f}, on requests that the solver has not "
        "seen."
    )
    if sure < MIN_SAVING:
        return False, f"Not worth it here: at best, {found}"
    if best.extra_expert_weights:
        found += f" It takes {100 * best.extra_expert_weights:+.1f} % memory for expert weights."
    return True, f"Worth it: {found} Make it: {best.command}"
