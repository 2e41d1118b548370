"""solve(): the one front of the solvers. Trace and cluster in, a valid plan out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

import moe_locality
from moe_locality.errors import PlacementError
from moe_locality.placement import baselines
from moe_locality.placement.costs import evaluate
from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.problem import (
    AUTO,
    Homes,
    Problem,
    Solution,
    check_groups,
    check_objective,
    check_slots,
    make_plan,
    resolve_homes,
)
from moe_locality.placement.serving import MOST_NODES, RULES
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import RoutingTrace

AUTO_SLACK, AUTO_WORTH = 0.08, 0.6
"""The cap that is found: each layer may be this much less level than loads alone can make it, as
long as an imbalance higher by 0.01 saves this share of 1 % of the usual order's copies.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to find a plan: ``run``, and what it takes. ``needs_tokens``: a trace of counts is not
    enough. ``uses_homes``: it optimizes for given homes. ``uses_groups``: it keeps the groups of a
    group-limited router whole.
    """

    run: Callable[[Problem], Solution]
    needs_tokens: bool = False
    uses_homes: bool = False
    uses_groups: bool = False


def solve(
    trace: RoutingTrace,
    topology: ClusterTopology,
    *,
    method: str = "coactivation",
    num_redundant_experts: int = 0,
    redundant_per_layer: bool = False,
    max_imbalance: float | str = AUTO,
    homes: Homes = None,
    expert_groups: int | Sequence[int] | None = None,
    objective: str = "copies",
    max_home_imbalance: float = 1.05,
    seed: int = 0,
    start: PlacementPlan | None = None,
    move_budget: float = 0.02,
    one_layout: bool = False,
    sampling_unit: str | int | None = None,
    serving_rule: str | None = None,
) -> PlacementPlan:
    """Find where the experts of every layer should live. The same arguments give the same plan;
    those that do not fit each other a PlacementError that says what to change.

    Args:
        trace: what to optimize for, of tokens; counts are enough without ``coactivation``.
        method: ``coactivation`` (fewest copies), ``balance`` (level ranks), or of ``METHODS``.
        num_redundant_experts: slots beyond one per expert; redundant_per_layer: in the mean.
        max_imbalance: most max / mean of the node loads that ``coactivation`` expects on *unseen*
            requests, mean over the layers; sampling_unit: what those come in; see ``read_cap``.
        homes: None = requests live anywhere; a dict or array as in ``evaluate``: they live there;
            "joint": homes and placement are found together, and ``home_profiles`` is filled.
        expert_groups: number of consecutive groups, or that of each expert: whole on one node.
        objective: ``copies`` (a token is sent once per node), ``rank_copies`` (once per rank;
            ``max_imbalance`` is then of the ranks), with ``homes="joint"`` also ``picks`` (each).
        max_home_imbalance: most max / mean of the tokens per home rank, with ``homes="joint"``.
        seed: of every random choice. one_layout: the same places in all layers.
        start: improve this plan instead, moving at most ``move_budget`` of its slots (refresh/).
        serving_rule: of ``placement.serving``; None: "visited" where it is searched for.
    """
    method = _current_name(method)
    cap = read_cap(max_imbalance, sampling_unit, start)
    cap |= {"one_layout": one_layout, "per_layer": redundant_per_layer}
    cap |= {"objective": objective, "max_home_imbalance": max_home_imbalance}
    _check_arguments(trace, method, cap["max_imbalance"], homes, expert_groups)
    joint = isinstance(homes, str) and homes == "joint"
    check_objective(objective, joint, num_redundant_experts, max_home_imbalance)
    extra = num_redundant_experts if start is None else start.num_redundant_experts
    problem = Problem(
        trace=trace,
        topology=topology,
        num_slots=check_slots(trace.num_experts, topology, extra),
        home_rank=None if joint else resolve_homes(trace, topology.num_ranks, homes),
        group_of=check_groups(trace.num_experts, topology.num_nodes, expert_groups),
        seed=seed,
        **cap,
    )
    problem = _with_rule(problem, serving_rule, method, start)
    found = _run(problem, method, joint, start, move_budget)
    return _signed(problem, found, found.homes if joint else homes, method, joint, start is None)


def _current_name(method: str) -> str:
    if method in RENAMED:
        text = f"method {method!r} is now called {RENAMED[method]!r}: use that name"
        warnings.warn(text, DeprecationWarning, stacklevel=3)
    return RENAMED.get(method, method)


def _check_per_layer(problem: Problem, method: str, start: PlacementPlan | None) -> None:
    """Raise PlacementError where layers cannot have unlike numbers of slots."""
    whole = problem.one_layout or problem.group_of is not None
    extra = problem.num_slots - problem.trace.num_experts
    if method != "coactivation" or start is not None or whole or extra < problem.num_ranks:
        raise PlacementError(
            f"redundant_per_layer: found method {method!r} with {extra} redundant experts, "
            f"expected 'coactivation' with at least {problem.num_ranks} (one per rank, so that "
            "layers can have fewer), without start, expert_groups and one_layout"
        )
    per_rank, most = problem.num_slots // problem.num_ranks, problem.trace.num_experts - 1
    if per_rank > most:
        raise PlacementError(
            f"redundant_per_layer: found {per_rank} slots per rank for {most + 1} experts, "
            f"expected at most {most}, so that layers can have one more: ask for at most "
            f"{most * problem.num_ranks - problem.trace.num_experts} redundant experts"
        )


def read_cap(
    max_imbalance: float | str, sampling_unit: str | int | None, start: PlacementPlan | None
) -> dict[str, Any]:
    """Return what ``Problem`` has to know of the cap on imbalance; raises PlacementError for other
    values than these.

    Args:
        max_imbalance: a number: of all layers; those that packing by loads alone cannot make as
            level may be as unlevel as that. "auto": a cap for each layer, up to ``AUTO_SLACK``
            above what packing by loads alone is expected to reach there, as far as it saves enough
            copies, and never above the usual order's. "auto+0.1": with this slack, whatever it
            saves. With a start, "auto" is the cap that it was made for.
        sampling_unit: "request"; "domain"; a number of requests next to each other (a session, a
            document); "auto": as many as the trace shows to be alike. None: "auto" where the cap
            is, "request" for a cap that is a number.
    """
    cap, slack, worth = max_imbalance, None, 0.0
    if isinstance(cap, str):
        word, plus, more = cap.partition("+")
        try:
            cap = 1.05 if word == AUTO else float(cap)
            if word == AUTO:
                slack, worth = (float(more), 0.0) if plus else (AUTO_SLACK, AUTO_WORTH)
        except ValueError:
            slack = -1.0
        if slack is not None and not 0 <= slack < math.inf:
            raise PlacementError(
                f"max_imbalance: found {max_imbalance!r}, expected a number of at least 1, 'auto', "
                "or 'auto+' and how much more than loads alone can reach, such as 'auto+0.05'"
            )
    if slack is not None and start is not None:
        made_for = start.provenance.get("max_imbalance")
        slack, worth = None, 0.0
        cap = float(made_for) if isinstance(made_for, int | float) and made_for >= 1 else 1.05
    unit = sampling_unit
    if isinstance(unit, str) and unit.isdecimal():
        unit = int(unit)
    if unit is None:
        unit = "request" if slack is None else AUTO
    if unit not in (AUTO, "request", "domain") and not (isinstance(unit, int) and unit > 0):
        raise PlacementError(
            f"sampling_unit: found {unit!r}, expected 'auto', 'request', 'domain' or a number of "
            "requests next to each other"
        )
    return {"max_imbalance": cap, "slack": slack, "worth": worth, "sampling_unit": unit}


def _with_rule(
    problem: Problem, rule: str | None, method: str, start: PlacementPlan | None
) -> Problem:
    """The problem with the rule to search for; a start keeps its own."""
    if rule not in (None, *RULES):
        raise PlacementError(f"serving_rule: found {rule!r}, expected one of {', '.join(RULES)}")
    if start is not None:
        if rule not in (None, start.serving_rule):
            raise PlacementError(
                f"serving_rule: found {rule!r} and a plan to improve with {start.serving_rule!r}, "
                "which it keeps: leave the option out, or solve without a start"
            )
        return problem
    able = method == "coactivation" and problem.group_of is None and not problem.one_layout
    able = able and problem.objective == "copies" and problem.num_nodes <= MOST_NODES
    if rule == "visited" and not able:
        raise PlacementError(
            "serving_rule: found 'visited', expected 'home' or none: only method 'coactivation' "
            "for the objective 'copies', without expert_groups and one_layout, searches "
            f"for it, on at most {MOST_NODES} nodes"
        )
    return replace(problem, serving_rule=rule or ("visited" if able else "home"))


def _run(problem, method, joint, start, move_budget) -> Solution:
    if problem.per_layer:
        _check_per_layer(problem, method, start)
    if problem.one_layout:
        return _in_one_layout(problem, method, joint, start)
    if problem.objective == "rank_copies":
        return _by_rank(problem, method, start)
    if start is not None:
        from moe_locality.placement.refresh.improve import solve_from

        return solve_from(problem, start, move_budget, method, joint)
    if joint:
        from moe_locality.placement.homes.joint import solve_joint

        return solve_joint(problem)
    return METHODS[method].run(problem)


def _by_rank(problem: Problem, method: str, start: PlacementPlan | None) -> Solution:
    """Fewest ranks per token: the plan of a cluster in which every rank is a node."""
    if method != "coactivation" or start is not None or problem.group_of is not None:
        raise PlacementError(
            f"objective='rank_copies': found method {method!r}, a start or expert groups, "
            "expected method='coactivation' alone"
        )
    topology = problem.topology
    apart = ClusterTopology.uniform(topology.num_ranks, 1)
    found = _coactivation(replace(problem, topology=apart, objective="copies"))
    shape = {"num_nodes": topology.num_nodes, "ranks_per_node": topology.ranks_per_node}
    plan = replace(found.plan, **shape, rank_to_node=tuple(topology.rank_to_node))
    return replace(found, plan=plan, notes={**found.notes, "objective": "rank_copies"})


def _in_one_layout(
    problem: Problem, method: str, joint: bool, start: PlacementPlan | None
) -> Solution:
    """The same places in all layers: those of a layer that all tokens of all layers go through."""
    if joint or start is not None or problem.objective != "copies":
        raise PlacementError(
            "one_layout: found joint homes, a start or another objective than copies, expected "
            "none of them: leave it out"
        )
    trace, whole = problem.trace, _layers_as_one(problem, METHODS[method].needs_tokens)
    found = (
        _coactivation(whole, problem) if method == "coactivation" else METHODS[method].run(whole)
    )
    table = np.repeat(found.plan.physical_to_logical_map, trace.num_layers, axis=0)
    layers = {"layer_ids": tuple(int(i) for i in trace.layer_ids), "expert_load": trace.load()}
    plan = replace(found.plan, physical_to_logical_map=table, **layers)
    return replace(found, plan=plan, notes={**found.notes, "one_layout": True})


def _layers_as_one(problem: Problem, needs_tokens: bool) -> Problem:
    """The problem with one layer, which has the picks of all; without ``needs_tokens`` counts."""
    trace, ids, count = problem.trace, problem.trace.expert_ids, problem.trace.num_layers
    one: dict[str, Any] = {"model": trace.model, "num_experts": trace.num_experts}
    one["layer_ids"] = np.zeros(1, int)
    if not needs_tokens or ids is None or trace.request_id is None:
        load = trace.load().sum(axis=0)[None, None]
        return replace(problem, trace=RoutingTrace(**one, expert_load=load, load_top_k=trace.top_k))
    one["expert_ids"] = np.concatenate([ids[:, layer : layer + 1] for layer in range(count)])
    one |= {name: np.tile(getattr(trace, name), count) for name in ("request_id", "position")}
    home = None if problem.home_rank is None else np.tile(problem.home_rank, count)
    return replace(problem, trace=RoutingTrace(**one), home_rank=home)


def _signed(
    problem: Problem, found: Solution, homes: Homes, method: str, joint: bool, fresh: bool
) -> PlacementPlan:
    """The plan with its costs on the trace, and where it is from; ``fresh``: its loads are those
    of the trace.
    """
    with ThreadPoolExecutor(1) as pool:  # hashing needs no interpreter lock
        identity = pool.submit(problem.trace.content_hash)
        transport = "per_rank" if problem.objective == "rank_copies" else "once_per_node"
        options = {"transport": transport, "load": found.plan.expert_load if fresh else None}
        costs = evaluate(problem.trace, found.plan, problem.topology, homes, **options).to_dict()
    made_for = problem.trace.model_type or found.plan.provenance.get("model_type")
    provenance = {
        "method": method,
        "trace": identity.result(),
        "seed": problem.seed,
        **({"max_imbalance": problem.max_imbalance} if problem.slack is None else {}),
        "num_redundant_experts": problem.num_slots - problem.trace.num_experts,
        **({"model_type": made_for} if made_for else {}),
        **({"redundant_per_layer": True} if problem.per_layer else {}),
        "homes": "joint" if joint else ("uniform" if homes is None else "given"),
        "moe_locality": moe_locality.__version__,
        **found.notes,
    }
    left_out = ("per_layer", "layer_ids", "move")
    costs = {name: value for name, value in costs.items() if name not in left_out}
    return replace(found.plan, provenance=provenance, costs=costs)


def _coactivation(problem: Problem, apart: Problem | None = None) -> Solution:
    """``apart``: the problem whose layers the only layer of this one stands for."""
    from moe_locality.placement.search import coactivation, load_noise

    if apart is None:
        return coactivation.solve_coactivation(problem)
    tables = coactivation.count_tables(apart.trace, apart.sampling_unit)
    layers = [coactivation.make_layer(apart, tables, i) for i in range(apart.trace.num_layers)]
    loads = np.stack([layer.load for layer in layers])
    noise = load_noise.shared_noise([layer.noise for layer in layers], loads)
    whole = coactivation.count_tables(problem.trace, problem.sampling_unit)
    layer = replace(coactivation.make_layer(problem, whole, 0), noise=noise)
    return coactivation.solve_coactivation(problem, replace(whole, units=tables.units), [layer])


def _eplb(problem: Problem, nodes: int | None = None) -> Solution:
    """``nodes``: 1 = without regard to nodes; None: those of the problem."""
    nodes = nodes or problem.num_nodes
    shape = (nodes, problem.num_ranks // nodes, problem.num_slots, problem.group_of)
    rows = [baselines.eplb(load, *shape) for load in problem.trace.load()]
    return Solution(plan=make_plan(problem, rows))


def _same_rows(make: Callable[[int, int, int], baselines.RankLists], problem: Problem) -> Solution:
    rows = make(problem.trace.num_experts, problem.num_ranks, problem.num_slots)
    return Solution(plan=make_plan(problem, [rows] * problem.trace.num_layers, by_node=False))


def _balance(problem: Problem) -> Solution:
    from moe_locality.placement.balance import balance, most_level

    shape = (problem.num_nodes, problem.ranks_per_node, problem.num_slots, problem.group_of)
    plan = make_plan(problem, list(balance(problem.trace.load(), *shape)))
    if not plan.is_permutation:  # replicas do not share evenly: tokens are served nearby
        table = most_level(problem.trace, plan, _eplb(problem).plan)
        plan = replace(plan, physical_to_logical_map=table)
    return Solution(plan=plan)


METHODS: dict[str, Method] = {
    "balance": Method(run=_balance, uses_groups=True),
    "coactivation": Method(run=_coactivation, needs_tokens=True, uses_homes=True, uses_groups=True),
    "eplb": Method(run=_eplb, uses_groups=True),
    "eplb_global": Method(run=partial(_eplb, nodes=1)),
    "hottest": Method(run=baselines.solve_hottest),
    "linear": Method(run=partial(_same_rows, baselines.linear), uses_groups=True),
    "mtkahypar": Method(run=baselines.partition_mtkahypar, needs_tokens=True),
    "request_kmeans": Method(run=baselines.solve_request_kmeans, needs_tokens=True),
    "round_robin": Method(run=partial(_same_rows, baselines.round_robin)),
}
# names that a method had before; ``solve`` takes them for one more version
RENAMED = {"seed": "request_kmeans"}
# what ``moe-locality bench`` and the demo on a trace set side by side
COMPARED = ("linear", "round_robin", "eplb", "coactivation")


def _check_arguments(trace, method, max_imbalance, homes, expert_groups) -> None:
    if method not in METHODS:
        raise PlacementError(f"method: found {method!r}, expected one of {', '.join(METHODS)}")
    ids = trace.expert_ids
    picks = trace.load().any() if ids is None else ids.max(initial=-1) >= 0
    if trace.num_rows == 0 or trace.num_layers == 0 or not picks:
        raise PlacementError(
            "found an empty trace, expected picks in at least one layer: record again"
        )
    if not max_imbalance >= 1:
        raise PlacementError(
            f"max_imbalance: found {max_imbalance}, expected at least 1 (it is max / mean): "
            "1.05 lets the busiest node do 5 % more than the mean"
        )

    def able(fits: Callable[[Method], bool]) -> str:
        return ", ".join(repr(name) for name, some in METHODS.items() if fits(some))

    chosen = METHODS[method]
    if homes is not None and not chosen.uses_homes:
        raise PlacementError(
            f"found homes for method {method!r}, expected none: only "
            f"{able(lambda some: some.uses_homes)} uses homes"
        )
    if chosen.needs_tokens and trace.expert_ids is None:
        raise PlacementError(
            f"method {method!r} needs a trace of tokens, found a trace of counts: use "
            f"{able(lambda some: not some.needs_tokens)}, or record tokens"
        )
    if expert_groups is not None and not chosen.uses_groups:
        raise PlacementError(
            f"expert_groups: found groups for method {method!r}, which cannot keep groups whole: "
            f"use {able(lambda some: some.uses_groups)}"
        )
