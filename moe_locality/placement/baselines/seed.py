"""Cluster the requests, then place by use: arXiv 2604.23150, sections 4.1 and 4.2, our own code.

Requests are clustered by k-means on their L2-normalized counts of tokens per expert, one cluster
for each node (the paper's device group); a new request goes to the cluster that its prefill is
nearest to. ``use`` [M, E] is how often the requests of a node pick an expert; stage 1 places every
expert once, in falling order of ``use`` and as far as nodes have room; stage 2 fills redundant
slots in the same order. Nothing in it levels the loads.

The paper leaves open the number of clusters, the iterations, ties, whether layers are clustered
apart, and the ranks inside a group. Here: as many clusters as nodes; at most ``ITERATIONS``; the
lowest number first; one clustering over all layers, because a request has only one home; inside a
node, ranks are packed by load.
"""

from __future__ import annotations

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.placement.baselines.loads import RankLists, pack_node
from moe_locality.placement.counting import picks_by_home
from moe_locality.placement.homes.requests import known_tokens, requests_of
from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.problem import Problem, Solution, make_plan
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import DECODE, RoutingTrace

ITERATIONS = 50
_DECIMALS = 6


def solve_seed(problem: Problem) -> Solution:
    """The plan; ``home_profiles["cluster_centers"]`` [M][L][E] is what ``cluster_homes`` needs.

    The clusters come from the decode tokens of the trace, or from all where none are marked.
    """
    trace = problem.trace
    requests = requests_of(trace)
    rows = np.flatnonzero(trace.stage == DECODE)
    points = _signatures(trace, requests.index, rows if len(rows) else np.arange(trace.num_rows))
    centers = _k_means(points, problem.num_nodes, np.random.default_rng(problem.seed))
    node_of = _nearest(points, centers)
    assert trace.expert_ids is not None
    use = picks_by_home(
        trace.expert_ids, trace.num_experts, node_of[requests.index], problem.num_nodes
    )  # [L, M, E]
    per_node = problem.num_slots // problem.num_nodes
    plans: list[RankLists] = []
    for used, load in zip(use, trace.load(), strict=True):
        held: RankLists = []
        for members in _place_by_use(used, per_node):
            held += pack_node(load, members, problem.ranks_per_node, per_node)
        plans.append(held)
    shape = (problem.num_nodes, trace.num_layers, trace.num_experts)
    profiles = {"cluster_centers": np.round(centers, _DECIMALS).reshape(shape).tolist()}
    plan = make_plan(problem, plans)
    return Solution(
        plan=PlacementPlan.from_dict({**plan.to_dict(), "home_profiles": profiles}),
        notes={"requests_per_cluster": np.bincount(node_of, minlength=problem.num_nodes).tolist()},
    )


def cluster_homes(
    trace: RoutingTrace, plan: PlacementPlan, topology: ClusterTopology, *, predict: str
) -> dict[int, int]:
    """Request id → rank: on the node of the nearest cluster, its rank with the fewest tokens.

    predict: the tokens to look at, ``prefill``, ``first:N`` or ``oracle``. As published, nothing
    levels the nodes.
    """
    table = (plan.home_profiles or {}).get("cluster_centers")
    if table is None:
        raise PlacementError(
            "found a plan without cluster centers, expected one of method 'seed': make it with "
            "that method"
        )
    requests = requests_of(trace)
    points = _signatures(trace, requests.index, known_tokens(trace, requests, predict))
    node_of = _nearest(points, np.asarray(table, dtype=np.float64).reshape(len(table), -1))
    filled = np.zeros(topology.num_ranks)
    homes = {}
    for request, node, tokens in zip(requests.request_ids, node_of, requests.tokens, strict=True):
        ranks = topology.ranks_of(int(node))
        rank = min(ranks, key=lambda r: (filled[r], r))
        filled[rank] += tokens
        homes[int(request)] = int(rank)
    return homes


def _signatures(trace: RoutingTrace, index: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[R, L E] unit vectors: tokens of each request per layer and expert, over ``rows``."""
    assert trace.expert_ids is not None
    count = int(index.max()) + 1
    picks = picks_by_home(trace.expert_ids[rows], trace.num_experts, index[rows], count)
    points = picks.transpose(1, 0, 2).reshape(count, -1).astype(np.float64)
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)


def _nearest(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """[R] the nearest center of each point."""
    return ((centers**2).sum(axis=1) - 2 * points @ centers.T).argmin(axis=1)


def _k_means(points: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """[C, F] centers: Lloyd's algorithm from the k-means++ start (Arthur and Vassilvitskii)."""
    chosen = [int(rng.integers(len(points)))]
    for _ in range(clusters - 1):
        far = np.maximum(2 - 2 * (points @ points[chosen].T).max(axis=1), 0.0)
        far[chosen] = 0.0
        total = far.sum()
        chosen.append(int(rng.choice(len(points), p=far / total if total > 0 else None)))
    centers = points[chosen]
    assigned = np.full(len(points), -1)
    for _ in range(ITERATIONS):
        nearest = _nearest(points, centers)
        if (nearest == assigned).all():
            break
        assigned = nearest
        for cluster in np.unique(assigned):
            centers[cluster] = points[assigned == cluster].mean(axis=0)
    return centers


def _place_by_use(use: np.ndarray, slots_per_node: int) -> list[list[int]]:
    """The experts of each node: every expert once (stage 1), then redundant ones (stage 2)."""
    nodes, experts = use.shape
    order = np.argsort(-use, axis=None, kind="stable")
    held: list[list[int]] = [[] for _ in range(nodes)]
    own = -(-experts // nodes)
    placed: set[int] = set()
    for node, expert in zip(*np.unravel_index(order, use.shape), strict=True):
        if int(expert) not in placed and len(held[node]) < min(own, slots_per_node):
            placed.add(int(expert))
            held[node].append(int(expert))
    for node, expert in zip(*np.unravel_index(order, use.shape), strict=True):
        if len(held[node]) < slots_per_node and int(expert) not in held[node]:
            held[node].append(int(expert))
    return held
