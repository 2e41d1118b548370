"""Which nodes hold which experts when there are more slots than experts, on the true copies.

Starting from one node per expert, replicas are added greedily, then experts and replicas change
places (``replica_moves``). Both cost a placement by the copies and the loads that it has under the
serving rule of ``PlacementPlan.serving_slot``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_locality.placement import counting
from moe_locality.placement.search import load_noise, replica_moves
from moe_locality.placement.search.load_noise import Noise, expected_shared_imbalance, few_draws
from moe_locality.placement.search.replica_moves import serve
from moe_locality.placement.search.swaps import distinct_rows, rows_by_value

MAX_TOKENS = 1 << 14
"""Copies are counted on a sample of so many tokens, where there are more. Loads are exact."""

STEPS = 50_000
"""Changes tried for one placement of a layer, if they visit no more tokens than ``MAX_VISITS``."""

MAX_VISITS = 1 << 27

HOT, COLD = 0.01, 0.001
"""First and last temperature, as shares of the copies of the greedy placement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenIndex:
    """The tokens of each expert as sets of experts; W words, N picks, H home groups.

    words: [W, N] uint32 or uint64, the picks of a token as bits; bit: [E, W] those of each expert.
    weight: [N] int32 tokens with these picks. first: [H, E + 1] int64, where the tokens of an
    expert (by home) start.
    """

    words: np.ndarray
    weight: np.ndarray
    first: np.ndarray
    bit: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.words, self.weight, self.first, self.bit


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A layer with all slots filled greedily, to search from.

    index: the tokens. load: [E] picks as in the serving rule; order: [E] by falling load.
    picks: [M, E] of homes on each node (expected ones, where homes are uniform).
    held: [M, E] which node holds which expert; served: [M, E] which node serves homes on each node;
    sets: [M, M, W] the experts that each node serves for each home, bits.
    copies: of the sample of tokens, summed over the home groups. tokens: in that sample, once
    for each of those homes.
    noise: of the loads of the experts. most: picks that a node should have.
    """

    index: TokenIndex
    load: np.ndarray
    order: np.ndarray
    picks: np.ndarray
    held: np.ndarray
    served: np.ndarray
    sets: np.ndarray
    copies: int
    tokens: int
    noise: Noise
    most: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate(load_noise.Candidate):
    """held: [M, E] which node holds which expert. served_load: [M, E] picks that each node serves.

    choices: [M, E, X] nodes that may serve an expert for homes on a node, under the rule "visited".
    """

    held: np.ndarray
    served_load: np.ndarray
    choices: np.ndarray | None = None


def begin(
    ids: np.ndarray,
    block_of: np.ndarray,
    load: np.ndarray,
    home_node: np.ndarray,
    slots_per_node: int,
    noise: Noise,
    limit: float,
    seed: int,
) -> Start:
    """Fill all slots of all nodes greedily, starting from one node per expert.

    Args:
        ids: [T, K] picks of the layer, -1 = none. home_node: [T], or empty: uniform homes.
        block_of: [E] the node to start each expert from. load: [E] picks of it, as in the plan.
        slots_per_node: a node that could hold every expert holds every expert.
        limit: most imbalance that the layer should have.
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
        picks, homes = np.tile(load / num_nodes, (num_nodes, 1)), num_nodes
    rows = sample(len(ids), MAX_TOKENS, seed)
    part = home_node[rows] if home_node.size else home_node
    index = index_tokens(ids[rows], part, experts, num_nodes)
    most = limit * float(load.sum()) / num_nodes
    room = np.maximum(min(slots_per_node, experts) - held.sum(axis=1), 0)
    served, sets, _, copies = replica_moves.add_greedily(
        *index.arrays, whole, order, picks, most, held, room
    )
    return Start(
        index=index,
        load=whole,
        order=order,
        picks=picks,
        held=held,
        served=served,
        sets=sets,
        copies=int(copies),
        tokens=len(rows) * homes,
        noise=noise,
        most=most,
    )


def sample(count: int, most: int, seed: int) -> np.ndarray:
    """Rising numbers of at most ``most`` of ``count`` tokens."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))


def candidate(start: Start, held: np.ndarray, change: int = 0) -> Candidate:
    """A placement with what it costs; ``change``: its copies less those of the start."""
    num_nodes, experts = held.shape
    served = np.empty((num_nodes, experts), dtype=np.int64)
    serve(held, start.load, start.order, served)
    served_load = np.zeros((num_nodes, experts))
    for home in range(num_nodes):
        served_load[served[home], np.arange(experts)] += start.picks[home]
    load = served_load.sum(axis=0)
    share = served_load / np.maximum(load, 1e-9)
    return Candidate(
        held=held,
        served_load=served_load,
        copies=(start.copies + change) / max(start.tokens, 1),
        imbalance=expected_shared_imbalance(share, load, start.noise),
    )


def searched(start: Start, price: float, seed: int) -> Candidate:
    """Experts and replicas in places that cost few copies plus ``price`` times the imbalance to
    expect; the price in copies per token.
    """
    num_nodes, experts = start.held.shape
    index = start.index
    visits = 4 * num_nodes * index.words.size / (experts * index.first.shape[0])
    steps = int(min(STEPS, MAX_VISITS / max(visits, 1)))
    if start.copies == 0 or steps == 0 or start.held.all():
        return candidate(start, start.held)
    per_pick = price * start.tokens * num_nodes / max(float(start.picks.sum()), 1.0)
    draws = few_draws(num_nodes)
    held, change = replica_moves.anneal(
        *index.arrays, start.load, start.order, start.picks, start.held.copy(),
        start.served.copy(), start.sets.copy(), steps, HOT * start.copies, COLD * start.copies,
        per_pick, start.most, start.noise.covariance, start.noise.deviation, draws, seed,
    )  # fmt: skip
    return candidate(start, held, int(change))


def share_slots(options: Sequence[Sequence[Candidate]], least: float, allowed: float) -> list[int]:
    """[L] which of three options (placements of all layers with fewer, as many and more slots) each
    layer takes: as many take the last as the first, so that copies and ``least`` times the
    imbalance are fewest in all. Where the imbalance adds up to more than ``allowed`` (and than that
    of the middle option), all take the middle one.
    """
    layers = len(options[0])
    cost = np.array([[c.copies + least * c.imbalance for c in some] for some in options])
    level = np.array([[c.imbalance for c in some] for some in options])
    best = np.full(2 * layers + 1, np.inf)  # by the options taken, added up
    best[0] = 0.0
    taken = np.zeros((layers, len(best)), dtype=np.int64)
    for layer in range(layers):
        tried = np.stack([np.roll(best, option) + cost[option, layer] for option in range(3)])
        taken[layer] = tried.argmin(axis=0)
        best = tried.min(axis=0)
    chosen, left = np.ones(layers, dtype=np.int64), layers
    for layer in reversed(range(layers)):
        chosen[layer] = taken[layer, left]
        left -= chosen[layer]
    if level[chosen, np.arange(layers)].sum() > max(allowed, level[1].sum()):
        chosen[:] = 1
    return chosen.tolist()


def index_tokens(
    ids: np.ndarray, home_node: np.ndarray, num_experts: int, num_nodes: int
) -> TokenIndex:
    """Group tokens with the same picks (and home node) and list them by expert."""
    size, dtype = (32, np.uint32) if num_experts <= 32 else (64, np.uint64)
    expert = np.arange(num_experts)
    # the search has a fast loop for one word and for four
    count_words = 1 if num_experts <= size else max(4, -(-num_experts // size))
    bit = np.zeros((num_experts, count_words), dtype=dtype)
    bit[expert, expert // size] = dtype(1) << (expert % size).astype(dtype)
    bits = np.concatenate([bit, np.zeros((1, bit.shape[1]), dtype=dtype)])  # -1: no pick
    masks = np.bitwise_or.reduce(bits[ids], axis=1)  # [T, W]
    homes = num_nodes if home_node.size else 1
    home = home_node if home_node.size else np.zeros(len(ids), dtype=np.int64)
    chosen, count = distinct_rows(np.column_stack([home.astype(np.uint64), masks]))
    by_home = home[chosen, None] * num_experts + ids[chosen]
    starts, place = rows_by_value(np.where(ids[chosen] >= 0, by_home, -1), homes * num_experts)
    return TokenIndex(
        words=np.ascontiguousarray(masks[chosen][place].T),
        weight=count[place].astype(np.int32),
        first=starts[np.arange(homes)[:, None] * num_experts + np.arange(num_experts + 1)],
        bit=bit,
    )
