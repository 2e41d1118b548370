"""Other ways to place experts, for comparison: hot replicas everywhere, global EPLB, mt-KaHyPar."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from moe_locality.errors import BackendUnavailable, PlacementError
from moe_locality.placement.baselines import loads as baselines
from moe_locality.placement.baselines.loads import RankLists
from moe_locality.placement.problem import Problem, Solution, make_plan

PRESETS = {
    "default": "DEFAULT",
    "quality": "QUALITY",
    "highest_quality": "HIGHEST_QUALITY",
    "deterministic": "DETERMINISTIC",
    "deterministic_quality": "DETERMINISTIC_QUALITY",
}


def solve_eplb_global(problem: Problem) -> Solution:
    """EPLB without regard to nodes."""
    loads = problem.trace.load()
    rows = [baselines.eplb_global(x, problem.num_ranks, problem.num_slots) for x in loads]
    return Solution(plan=make_plan(problem, rows))


def solve_hottest(problem: Problem) -> Solution:
    """The linear layout, and on every node the most loaded experts that it lacks."""
    sizes = _node_sizes(problem.trace.num_experts, problem.num_nodes)
    node_of = np.repeat(np.arange(problem.num_nodes), sizes)
    return hottest_on(problem, np.tile(node_of, (problem.trace.num_layers, 1)))


def hottest_on(problem: Problem, node_of: np.ndarray) -> Solution:
    """The most loaded experts that a node lacks, on top of any placement [L, E] → node."""
    per_node = problem.num_slots // problem.num_nodes
    rows: list[RankLists] = []
    for load, blocks in zip(problem.trace.load(), node_of, strict=True):
        nodes = [np.flatnonzero(blocks == n).tolist() for n in range(problem.num_nodes)]
        held: RankLists = []
        for members in baselines.add_hottest(nodes, load, per_node):
            held += baselines.pack_node(load, members, problem.ranks_per_node, per_node)
        rows.append(held)
    return Solution(plan=make_plan(problem, rows))


def solve_seed(problem: Problem) -> Solution:
    """Clusters of requests, then use per cluster: arXiv 2604.23150, see ``baselines_seed``."""
    from moe_locality.placement.baselines import seed as baselines_seed

    return baselines_seed.solve_seed(problem)


def solve_mtkahypar(problem: Problem) -> Solution:
    """The connectivity (km1) partition of mt-KaHyPar, deterministic preset, without replicas."""
    return partition_mtkahypar(problem, "deterministic_quality")


def partition_mtkahypar(problem: Problem, preset: str) -> Solution:
    """Every layer's tokens as a hypergraph, cut into blocks of equal numbers of experts.

    mt-KaHyPar balances one weight per vertex; slots are what must be equal, so node loads are not
    bounded. A partition that is off by a few experts all the same is repaired (``equalize``).

    Raises:
        BackendUnavailable: the package ``mtkahypar`` is not installed.
        PlacementError: replicas, or an unknown preset.
    """
    from moe_locality.placement.bounds.lower import LayerTokens
    from moe_locality.placement.search.nodes import pairs_of_layer

    trace, nodes = problem.trace, problem.num_nodes
    if problem.num_slots != trace.num_experts:
        raise PlacementError(
            "found redundant experts for method 'mtkahypar', expected none: a partition holds "
            "every expert once; use num_redundant_experts=0"
        )
    if preset not in PRESETS:
        raise PlacementError(f"preset: found {preset!r}, expected one of {', '.join(PRESETS)}")
    assert trace.expert_ids is not None
    rows: list[RankLists] = []
    per_node = problem.num_slots // nodes
    for layer, load in enumerate(trace.load()):
        ids = np.ascontiguousarray(trace.expert_ids[:, layer])
        tokens = LayerTokens.of(ids, trace.num_experts, nodes, None)
        block_of = (
            _cut(tokens, PRESETS[preset], problem.seed)
            if nodes > 1
            else np.zeros(trace.num_experts, dtype=np.int64)
        )
        block_of = equalize(block_of, pairs_of_layer(ids, trace.num_experts), nodes)
        held: RankLists = []
        for node in range(nodes):
            members = np.flatnonzero(block_of == node).tolist()
            held += baselines.pack_node(load, members, problem.ranks_per_node, per_node)
        rows.append(held)
    return Solution(plan=make_plan(problem, rows), notes={"preset": preset})


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


def _node_sizes(experts: int, nodes: int) -> list[int]:
    return [experts // nodes + (n < experts % nodes) for n in range(nodes)]


def _cut(tokens: Any, preset: str, seed: int) -> np.ndarray:
    """[E] block of each expert."""
    package, environment = _mtkahypar(), _environment()
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


def _mtkahypar() -> Any:
    try:
        import mtkahypar  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BackendUnavailable(
            "method 'mtkahypar' needs the package mtkahypar, which is not installed: "
            "pip install mtkahypar, or use method 'coactivation'"
        ) from error
    return mtkahypar


@lru_cache(maxsize=1)
def _environment() -> Any:
    """mt-KaHyPar with one thread; a process can start it only once."""
    return _mtkahypar().initialize(1, False)
