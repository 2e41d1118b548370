"""Placements to compare with: linear, round robin, EPLB, hot replicas, mt-KaHyPar, k-means.

EPLB here is our own code of the published description (DeepSeek-V3, arXiv 2412.19437, section 3.4,
and the README of deepseek-ai/EPLB): experts are packed onto nodes by load, the busiest get
replicas inside their node, and the replicas are packed onto the ranks. The functions of one layer
return the experts of each rank: ``list[list[int]]`` with equal lengths and no expert twice on a
rank.

The request k-means recipe is arXiv 2604.23150, sections 4.1 and 4.2, our own code. k-means clusters
the requests by their L2-normalized counts of tokens per expert, one cluster for each node (the
paper's device group); a new request goes to the cluster that its prefill is nearest to.
``use`` [M, E] is how often the requests of a node pick an expert; stage 1 places every expert once,
in falling order of ``use`` and as far as nodes have room; stage 2 fills redundant slots in the same
order. Nothing in it levels the loads. The paper leaves open the number of clusters, the
iterations, ties, whether layers are clustered apart, and the ranks inside a group. Here: as many
clusters as nodes; at most ``KMEANS_ROUNDS``; the lowest number first; one clustering over all
layers, because a request has only one home; inside a node, ranks are packed by load.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from moe_locality.errors import BackendUnavailable, PlacementError
from moe_locality.placement.counting import picks_by_home
from moe_locality.placement.homes.predictor import (
    k_means,
    known_tokens,
    nearest_center,
    requests_of,
)
from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.problem import Problem, RankLists, Solution, make_plan
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import DECODE, RoutingTrace


def linear(num_experts: int, num_ranks: int, num_slots: int) -> RankLists:
    """Slot p holds expert p, then from the first expert again."""
    return (np.arange(num_slots) % num_experts).reshape(num_ranks, -1).tolist()


def round_robin(num_experts: int, num_ranks: int, num_slots: int) -> RankLists:
    """Expert e on rank e mod G; replicas go on in that order, past ranks that hold the expert."""
    held: RankLists = [list(range(rank, num_experts, num_ranks)) for rank in range(num_ranks)]
    for index in range(num_slots - num_experts):
        emptiest, expert = min(held, key=len), index % num_experts
        while expert in emptiest:
            expert = (expert + 1) % num_experts
        emptiest.append(expert)
    return held


def pack_replicas(load: np.ndarray, num_ranks: int, num_slots: int) -> RankLists:
    """The global policy of EPLB: the busiest experts get replicas, on any rank of any node;
    ``load`` [E], slots a multiple of the ranks and at least one per expert.
    """
    from moe_locality.placement.balance import pack_experts

    held = np.empty((num_ranks, num_slots // num_ranks), dtype=np.int32)
    pack_experts(np.asarray(load, dtype=np.float64), held, False)
    return held.tolist()


def eplb(
    load: np.ndarray,
    nodes: int,
    ranks_per_node: int,
    num_slots: int,
    group_of: np.ndarray | None = None,
) -> RankLists:
    """Balance by loads [E]: hierarchical where groups divide evenly over the nodes, else global;
    the ranks of a node are consecutive. ``group_of`` [E]: groups that stay on one node; None: every
    expert alone.
    """
    from moe_locality.placement.balance import pack_nodes

    experts, ranks = len(load), nodes * ranks_per_node
    groups = np.arange(experts) if group_of is None else np.asarray(group_of)
    per_node = num_slots // nodes
    size = per_node // ranks_per_node
    if (int(groups.max()) + 1) % nodes or size > experts // nodes:
        return pack_replicas(load, ranks, num_slots)
    held = np.empty((ranks, size), dtype=np.int32)
    pack_nodes(np.asarray(load, dtype=np.float64), nodes, groups, held, False, False)
    return held.tolist()


def add_hottest(nodes: list[list[int]], load: np.ndarray, slots_per_node: int) -> list[list[int]]:
    """Fill every node's open slots with the most loaded experts that it lacks."""
    order = np.argsort(-load, kind="stable").tolist()
    full = []
    for members in nodes:
        lacking = [e for e in order if e not in members]
        full.append([*members, *lacking[: slots_per_node - len(members)]])
    return full


def _on_nodes(problem: Problem, nodes_of_layer: list[list[list[int]]]) -> Solution:
    """A plan from the experts of each node, per layer: on its ranks level by load; slots that are
    left get more replicas.
    """
    per_node = problem.num_slots // problem.num_nodes
    rows: list[RankLists] = [[] for _ in nodes_of_layer]
    for row, load, nodes in zip(rows, problem.trace.load(), nodes_of_layer, strict=True):
        for members in map(np.array, map(sorted, nodes)):
            packed = pack_replicas(load[members], problem.ranks_per_node, per_node)
            row += members[np.array(packed)].tolist()
    return Solution(plan=make_plan(problem, rows))


def solve_hottest(problem: Problem) -> Solution:
    """The linear layout, and on every node the most loaded experts that it lacks."""
    linear_nodes = np.array_split(np.arange(problem.trace.num_experts), problem.num_nodes)
    nodes = [some.tolist() for some in linear_nodes]
    per_node = problem.num_slots // problem.num_nodes
    return _on_nodes(problem, [add_hottest(nodes, x, per_node) for x in problem.trace.load()])


PRESETS = ("default", "quality", "highest_quality", "deterministic", "deterministic_quality")
"""Presets of mt-KaHyPar."""


def partition_mtkahypar(problem: Problem, preset: str = "deterministic_quality") -> Solution:
    """Every layer's tokens as a hypergraph, cut into blocks of equal numbers of experts with the
    least connectivity (km1), without replicas.

    mt-KaHyPar balances one weight per vertex; slots are what must be equal, so node loads are not
    bounded. A partition that is off by a few experts all the same is repaired (``equalize``).
    Raises BackendUnavailable where the package ``mtkahypar`` is not installed, PlacementError for
    replicas or an unknown preset.
    """
    from moe_locality.placement.bounds.lower import LayerTokens
    from moe_locality.placement.counting import pairs_of_layer

    trace, nodes = problem.trace, problem.num_nodes
    if problem.num_slots != trace.num_experts:
        raise PlacementError(
            "found redundant experts for method 'mtkahypar', expected none: a partition holds "
            "every expert once; use num_redundant_experts=0"
        )
    if preset not in PRESETS:
        raise PlacementError(f"preset: found {preset!r}, expected one of {', '.join(PRESETS)}")
    assert trace.expert_ids is not None
    found = []
    for layer in range(trace.num_layers):
        ids = np.ascontiguousarray(trace.expert_ids[:, layer])
        tokens = LayerTokens.of(ids, trace.num_experts, nodes, None)
        block_of = np.zeros(trace.num_experts, dtype=np.int64)
        if nodes > 1:
            block_of = _cut(tokens, preset.upper(), problem.seed)
        block_of = equalize(block_of, pairs_of_layer(ids, trace.num_experts), nodes)
        found.append([np.flatnonzero(block_of == node).tolist() for node in range(nodes)])
    return replace(_on_nodes(problem, found), notes={"preset": preset})


def equalize(block_of: np.ndarray, weight: np.ndarray, num_blocks: int) -> np.ndarray:
    """Move experts out of blocks that have too many, each time the one that loses least weight."""
    block_of = block_of.copy()
    size = len(block_of) // num_blocks
    while True:
        counts = np.bincount(block_of, minlength=num_blocks)
        if (counts <= size).all():
            return block_of
        near = np.stack([weight[:, block_of == b].sum(axis=1) for b in range(num_blocks)], axis=1)
        loss = near[np.arange(len(block_of)), block_of][:, None] - near
        loss[counts[block_of] <= size] = np.inf
        loss[:, counts >= size] = np.inf
        expert, block = np.unravel_index(int(np.argmin(loss)), loss.shape)
        block_of[expert] = block


def _cut(tokens: Any, preset: str, seed: int) -> np.ndarray:
    """[E] block of each expert."""
    package, environment = _mtkahypar()
    package.set_seed(seed)
    context = environment.context_from_preset(getattr(package.PresetType, preset))
    context.set_partitioning_parameters(tokens.num_nodes, 0.001, package.Objective.KM1)
    context.logging = False
    edges, weights = [], []
    for members, counts in zip(tokens.members, tokens.tokens, strict=True):
        if members.shape[1] > 1:
            edges += members.tolist()
            weights += counts.astype(np.int64).tolist()
    ones = [1] * tokens.num_experts
    graph = environment.create_hypergraph(
        context, tokens.num_experts, len(edges), edges, ones, weights
    )
    return np.array(graph.partition(context).get_partition(), dtype=np.int64)


@lru_cache(maxsize=1)
def _mtkahypar() -> tuple[Any, Any]:
    """(mt-KaHyPar, it started with one thread); a process can start it only once."""
    try:
        import mtkahypar  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BackendUnavailable(
            "method 'mtkahypar' needs the package mtkahypar, which is not installed: "
            "pip install mtkahypar, or use method 'coactivation'"
        ) from error
    return mtkahypar, mtkahypar.initialize(1, False)


def solve_request_kmeans(problem: Problem) -> Solution:
    """The plan; ``home_profiles["cluster_centers"]`` [M][L][E] is what ``cluster_homes`` needs.

    The clusters come from the decode tokens of the trace, or from all where none are marked.
    """
    trace = problem.trace
    requests = requests_of(trace)
    rows = np.flatnonzero(trace.stage == DECODE)
    points = _signatures(trace, requests.index, rows if len(rows) else np.arange(trace.num_rows))
    centers = k_means(points, problem.num_nodes, np.random.default_rng(problem.seed))
    node_of = nearest_center(points, centers)
    assert trace.expert_ids is not None
    use = picks_by_home(
        trace.expert_ids, trace.num_experts, node_of[requests.index], problem.num_nodes
    )  # [L, M, E]
    per_node = problem.num_slots // problem.num_nodes
    shape = (problem.num_nodes, trace.num_layers, trace.num_experts)
    profiles = {"cluster_centers": np.round(centers, 6).reshape(shape).tolist()}
    plan = _on_nodes(problem, [_place_by_use(used, per_node) for used in use]).plan
    return Solution(
        plan=replace(plan, home_profiles=profiles),
        notes={"requests_per_cluster": np.bincount(node_of, minlength=problem.num_nodes).tolist()},
    )


def cluster_homes(
    trace: RoutingTrace,
    plan: PlacementPlan,
    topology: ClusterTopology,
    *,
    predict: str,
    band: float | None = None,
) -> dict[int, int]:
    """Request id → rank: on the node of the nearest cluster, its rank with the fewest tokens.

    predict: the tokens to look at, ``prefill``, ``first:N`` or ``oracle``. As published, nothing
    levels the nodes. With a ``band``, clusters whose cosine is within it of the best one's are as
    good, and of the ranks of their nodes the one with the fewest tokens is taken.
    """
    table = (plan.home_profiles or {}).get("cluster_centers")
    if not table:
        raise PlacementError(
            "found a plan without cluster centers, expected one of method 'request_kmeans': make "
            "it with that method"
        )
    requests = requests_of(trace)
    points = _signatures(trace, requests.index, known_tokens(trace, requests, predict))
    try:
        centers = np.asarray(table, dtype=np.float64).reshape(plan.num_nodes, points.shape[1])
    except (TypeError, ValueError) as error:
        raise PlacementError(
            f"found cluster centers of another kind ({error}), expected those of the trace's "
            "layers: make the plan from such a trace, without one_layout"
        ) from error
    if band is None:
        near = nearest_center(points, centers)[:, None] == np.arange(len(centers))
    else:
        cosine = points @ (centers / np.linalg.norm(centers, axis=1, keepdims=True)).T
        near = cosine >= cosine.max(axis=1, keepdims=True) - band
    filled = np.zeros(topology.num_ranks)
    homes = {}
    for request, nodes, tokens in zip(requests.request_ids, near, requests.tokens, strict=True):
        ranks = [r for node in np.flatnonzero(nodes) for r in topology.ranks_of(int(node))]
        rank = min(ranks, key=lambda r: (filled[r], r))
        filled[rank] += tokens
        homes[int(request)] = int(rank)
    return homes


def request_picks(trace: RoutingTrace, index: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[R, L E] int64 picks of each request per layer and expert, over ``rows``; ``index`` [T]: the
    request of each row of the trace.
    """
    assert trace.expert_ids is not None
    count = int(index.max()) + 1
    picks = picks_by_home(trace.expert_ids[rows], trace.num_experts, index[rows], count)
    return picks.transpose(1, 0, 2).reshape(count, -1)


def _signatures(trace: RoutingTrace, index: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[R, L E] unit vectors of ``request_picks``."""
    points = request_picks(trace, index, rows).astype(np.float64)
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)


def _place_by_use(use: np.ndarray, slots_per_node: int) -> list[list[int]]:
    """The experts of each node: every expert once (stage 1), then redundant ones (stage 2)."""
    nodes, experts = use.shape
    order = np.argsort(-use, axis=None, kind="stable").tolist()
    pairs = [divmod(place, experts) for place in order]
    held: list[list[int]] = [[] for _ in range(nodes)]
    own = min(-(-experts // nodes), slots_per_node)
    placed: set[int] = set()
    for node, expert in pairs:
        if expert not in placed and len(held[node]) < own:
            placed.add(expert)
            held[node].append(expert)
    for node, expert in pairs:
        if len(held[node]) < slots_per_node and expert not in held[node]:
            held[node].append(expert)
    return held
