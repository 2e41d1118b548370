"""Which nodes hold which experts when there are more slots than experts, on the true copies.

Starting from one node per expert, replicas are added greedily, then experts and replicas change
places (``replica_search``). Both cost a placement by the copies and the loads that it has under the
serving rule of ``PlacementPlan.serving_slot``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_locality.placement import counting
from moe_locality.placement.search import replica_moves as replica_search

MAX_TOKENS = 1 << 14
"""Copies are counted on a sample of so many tokens, where there are more. Loads are exact."""

MAX_STEPS = 40_000
MAX_VISITS = 1 << 29
"""Token visits that the steps of one layer may take, about."""

HOT, COLD = 0.005, 3e-4
"""First and last heat, as shares of the copies of the greedy placement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePlacement:
    """The experts of each node of one layer, no expert twice on a node.

    nodes: M lists of experts in rising order.
    served_load: [M, E] picks of the trace that each node serves (expected, where homes are
        uniform).
    excess: picks above the cap, over all nodes.
    """

    nodes: list[list[int]]
    served_load: np.ndarray
    excess: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIndex:
    """The tokens of each expert as sets of experts; W words, N picks, H homes told apart.

    words: [W, N] uint32 or uint64, the picks of a token as bits. weight: [N] int32 tokens with
    these picks. first: [H, E + 1] int64, where the tokens of an expert (by home) start. bit: [E, W]
    the bits of each expert.
    """

    words: np.ndarray
    weight: np.ndarray
    first: np.ndarray
    bit: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.words, self.weight, self.first, self.bit


def place_with_replicas(
    ids: np.ndarray,
    block_of: np.ndarray,
    load: np.ndarray,
    home_node: np.ndarray,
    slots_per_node: int,
    cap: float,
    seed: int,
) -> NodePlacement:
    """Fill all slots of all nodes, starting from one node per expert.

    Args:
        ids: [T, K] picks of the layer, -1 = none.
        block_of: [E] the node to start each expert from.
        load: [E] picks of each expert in the trace, as in the plan.
        home_node: [T], or empty: uniform homes.
        slots_per_node: a node that could hold every expert holds every expert.
        cap: most picks that a node should serve. What cannot be held below stays as low as found.
    """
    num_nodes, experts = int(block_of.max()) + 1, len(load)
    held = block_of == np.arange(num_nodes)[:, None]
    whole = np.maximum(load.astype(np.int64), 0)
    if not whole.any():
        whole += 1  # as in the serving rule
    order = np.argsort(-whole, kind="stable")
    if home_node.size:
        picks = counting.picks_by_home(ids[:, None], experts, home_node, num_nodes)[0].astype(float)
        homes = 1
    else:
        picks, homes = np.tile(load.astype(float), (num_nodes, 1)), num_nodes
    room = np.maximum(min(slots_per_node, experts) - held.sum(axis=1), 0)
    if room.any():
        held = _search(ids, home_node, held, room, whole, order, picks, cap * homes, seed)
    served = np.empty((num_nodes, experts), dtype=np.int64)
    replica_search.serve(held, whole, order, served)
    served_load = np.zeros((num_nodes, experts))
    for home in range(num_nodes):
        served_load[served[home], np.arange(experts)] += picks[home] / homes
    return NodePlacement(
        nodes=[np.flatnonzero(row).tolist() for row in held],
        served_load=served_load,
        excess=float(replica_search.load_above(served, picks, cap * homes)) / homes,
    )


def _search(ids, home_node, held, room, load, order, picks, cap, seed) -> np.ndarray:
    """held [M, E] with all room filled."""
    num_nodes, experts = held.shape
    rows = np.arange(len(ids))
    if len(ids) > MAX_TOKENS:
        rows = np.random.default_rng(seed).choice(len(ids), MAX_TOKENS, replace=False)
        rows.sort()
    part = home_node[rows] if home_node.size else home_node
    index = index_tokens(ids[rows], part, experts, num_nodes)
    share = len(rows) / max(len(ids), 1)
    held = held.copy()
    served, sets, _, copies = replica_search.add_greedily(
        *index.arrays, load, order, picks, cap, held, room.copy()
    )
    visits = 4 * num_nodes * index.words.size / (experts * index.first.shape[0])
    steps = int(min(MAX_STEPS, MAX_VISITS / max(visits, 1)))
    if copies == 0 or steps == 0:
        return held
    start = held.copy()
    before = replica_search.load_above(served, picks, cap)
    best, excess, change = replica_search.anneal(
        *index.arrays, load, order, picks, cap, held, served, sets, steps,
        HOT * copies, COLD * copies, share, seed,
    )  # fmt: skip
    return best if (excess, change) < (before, 0) else start


def index_tokens(
    ids: np.ndarray, home_node: np.ndarray, num_experts: int, num_nodes: int
) -> TokenIndex:
    """Group tokens with the same picks (and home node) and list them by expert."""
    size, dtype = (32, np.uint32) if num_experts <= 32 else (64, np.uint64)
    expert = np.arange(num_experts)
    count_words = -(-num_experts // size)
    if 1 < count_words < 4:
        count_words = 4  # the search has a fast loop for one word and for four
    bit = np.zeros((num_experts, count_words), dtype=dtype)
    bit[expert, expert // size] = dtype(1) << (expert % size).astype(dtype)
    bits = np.concatenate([bit, np.zeros((1, bit.shape[1]), dtype=dtype)])  # -1: no pick
    masks = np.bitwise_or.reduce(bits[ids], axis=1)  # [T, W]
    homes = num_nodes if home_node.size else 1
    key = np.zeros((len(ids), bit.shape[1] + 1), dtype=np.uint64)
    key[:, 1:] = masks
    if home_node.size:
        key[:, 0] = home_node
    order = np.lexsort(key.T)
    new = np.ones(len(ids), dtype=bool)
    new[1:] = (key[order][1:] != key[order][:-1]).any(axis=1)
    count = np.bincount(np.cumsum(new) - 1) if len(ids) else np.zeros(0, dtype=np.int64)
    chosen = order[new]
    pattern, place = np.nonzero(ids[chosen] >= 0)
    row = key[chosen, 0].astype(np.int64)[pattern] * num_experts + ids[chosen][pattern, place]
    by_row = np.argsort(row, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=homes * num_experts))])
    span = np.arange(homes)[:, None] * num_experts + np.arange(num_experts + 1)
    return TokenIndex(
        words=np.ascontiguousarray(masks[chosen][pattern[by_row]].T),
        weight=count[pattern[by_row]].astype(np.int32),
        first=starts[span].astype(np.int64),
        bit=bit,
    )
