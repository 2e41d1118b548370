"""The co-activation solver: experts to nodes by affinity, then to ranks by anti-affinity.

Across nodes, experts that are picked together belong together (fewer copies), as long as the nodes
stay level on requests that are not in the trace. Inside a node every rank is equally near, so there
experts that are picked together are kept apart: that levels the ranks, over the whole trace and in
each batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_locality.placement.baselines.loads import RankLists, pack_replicas, replicate
from moe_locality.placement.objective import BATCH_TOKENS
from moe_locality.placement.search import cap, nodes, replicas
from moe_locality.placement.search.anneal import anneal
from moe_locality.placement.search.nodes import lightest_first
from moe_locality.placement.threads import over_layers

if TYPE_CHECKING:
    from moe_locality.placement.problem import Problem

REPLICA_SHARE = 0.6
"""Share of the allowed imbalance that replicas may use on the trace itself: a cap met exactly there
is broken by new requests. Not the expectation of cap.py, which is about blocks that serve all picks
of their experts: which replica serves whom changes with every step of the search. Nor shared among
the layers as ``cap.allocate`` does: that takes several searches per layer."""

ROUNDS = 8
"""Prices of imbalance that are tried. Several short searches around the right one beat a long one:
the layers then differ in how far they go, and share what is allowed better. ``FEW_ROUNDS`` where
layers are large.
"""
FEW_ROUNDS = 5

FIRST_PRICE = 2.0
"""Copies per token that an imbalance higher by one is worth; ``STEP`` the factor to the next one
while the price is not known to lie between two.
"""
STEP = 4.0

LIMIT = 1.0
RANK_STEPS = 15
"""Swaps tried between the ranks of a node, per pair of its experts."""

_SCALE = 2.0**36  # weights are rounded to integers below this: sums of E^2 of them stay exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Layers placed: ``rows`` the experts of each rank (ranks in node order) per layer.

    expected: imbalance of the nodes to expect on unseen requests, before replicas, per layer.
    notes: by row of the layer, what is worth saying in provenance.
    load: [L, E] of all layers of the trace.
    """

    rows: list[RankLists]
    expected: list[float]
    notes: dict[int, dict[str, Any]]
    load: np.ndarray


def place_layers(
    problem: Problem,
    layers: Sequence[int] | None = None,
    *,
    tables: nodes.Tables | None = None,
    threads: int | None = None,
) -> Placed:
    """Place the experts of these layers (None: all), level in the mean over them.

    The number of threads changes no result. ``tables``: counts of the trace, where known.
    """
    ids, request_id = problem.trace.expert_ids, problem.trace.request_id
    assert ids is not None
    assert request_id is not None
    if tables is None:
        tables = nodes.count_tables(ids, request_id, problem.trace.num_experts, threads=threads)
    wanted = list(range(ids.shape[1])) if layers is None else list(layers)
    seeds = [_seed(problem, layer) for layer in wanted]
    seen: list[nodes.Layer] = [None] * len(wanted)  # type: ignore[list-item]

    def look(first: int, last: int) -> None:
        for place in range(first, last):
            seen[place] = nodes.make_layer(problem, tables, wanted[place])

    over_layers(look, len(wanted), threads=threads)
    found, allowed, _ = place_on_nodes(seen, problem.max_imbalance, seeds, threads=threads)
    rows: list[RankLists] = [[] for _ in wanted]

    def finish(first: int, last: int) -> None:
        for place in range(first, last):
            layer, seed = wanted[place], seeds[place]
            rows[place] = _finish(problem, tables, layer, found[place].node_of, seed)

    over_layers(finish, len(wanted), threads=threads)
    expected = [some.imbalance for some in found]
    notes = {
        place: _note(tables.load[layer], expected[place], allowed[place])
        for place, layer in enumerate(wanted)
        if allowed[place] > problem.max_imbalance or not tables.load[layer].any()
    }
    return Placed(rows=rows, expected=expected, notes=notes, load=tables.load)


def place_on_nodes(
    layers: Sequence[nodes.Layer],
    max_imbalance: float,
    seeds: Sequence[int],
    *,
    threads: int | None = None,
) -> tuple[list[nodes.Candidate], list[float], float]:
    """Experts to nodes, level in the mean over the layers: the fewest copies that this allows.

    The layers are searched under one price of imbalance, which is what makes them share the
    allowed imbalance best (Everett, Operations Research 11, 1963); the price is found by trying.

    Returns:
        (placements, imbalance allowed in each layer, the last price).
    """
    allowed = [0.0] * len(layers)
    tried: list[list[nodes.Candidate]] = [[] for _ in layers]
    limit = [np.inf] * len(layers)
    price, known = FIRST_PRICE, []

    def begin(first: int, last: int) -> None:
        for place in range(first, last):
            allowed[place] = nodes.allowed_imbalance(layers[place], max_imbalance)
            limit[place] = allowed[place] + LIMIT * (max_imbalance - 1)
            tried[place] = nodes.fixed_candidates(layers[place])

    def search(first: int, last: int) -> None:
        for place in range(first, last):
            layer = layers[place]
            if nodes.searchable(layer):
                seed = seeds[place] + len(known)
                tried[place].append(nodes.searched(layer, tried[place], price, limit[place], seed))

    def polish(first: int, last: int) -> None:
        for place in range(first, last):
            start = tried[place][chosen[place]]
            found = nodes.polished(layers[place], start, price, limit[place], seeds[place])
            tried[place].append(found)

    def choose() -> list[int]:
        return cap.allocate(
            [[c.copies for c in some] for some in tried],
            [[c.imbalance for c in some] for some in tried],
            sum(allowed),
            limit,
        )

    over_layers(begin, len(layers), threads=threads)
    small = all(nodes.is_small(layer) for layer in layers)
    for _ in range(ROUNDS if small else FEW_ROUNDS):
        over_layers(search, len(layers), threads=threads)
        known.append((price, float(np.mean([some[-1].imbalance for some in tried])) - 1))
        price = next_price(known, float(np.mean(allowed)) - 1)
    for place, layer in enumerate(layers):
        if layer.grouped:  # a group-limited router is made for its linear layout: never above it
            tried[place] = [c for c in tried[place] if c.copies <= tried[place][0].copies]
    chosen = choose()
    over_layers(polish, len(layers), threads=threads)
    chosen = choose()
    return [some[i] for some, i in zip(tried, chosen, strict=True)], allowed, price


def next_price(known: Sequence[tuple[float, float]], target: float) -> float:
    """The price to try next for an imbalance of 1 + ``target``.

    ``known``: (price, imbalance less one) so far; between two prices that the target lies between,
    both are taken for powers of each other.
    """
    low = [(price, level) for price, level in known if level > target]
    high = [(price, level) for price, level in known if level <= target]
    if not low:
        price, level = min(high)
        return 0.0 if level * STEP < target else price / STEP
    if not high:
        return max(low)[0] * STEP
    (p, x), (q, y) = max(low), min(high)
    if p <= 0 or y <= 0 or target <= 0 or p >= q:
        return (p + q) / 2
    share = np.log(x / target) / np.log(x / y)
    return float(p * (q / p) ** min(max(share, 0.1), 0.9))


def _seed(problem: Problem, layer: int) -> int:
    return (problem.seed * 1_000_003 + layer) & 0x7FFFFFFF


def _note(load: np.ndarray, expected: float, allowed: float) -> dict[str, Any]:
    if not load.any():
        return {"imbalance": 1.0, "reason": "no picks in the trace: its experts stay as they are"}
    return {
        "imbalance": round(expected, 6),
        "reason": f"packing by loads alone is expected to reach {allowed:.3f} on unseen requests; "
        f"the busiest expert has {float(load.max() / load.sum()):.3f} of the picks",
    }


def _finish(
    problem: Problem, tables: nodes.Tables, layer: int, node_of: np.ndarray, seed: int
) -> RankLists:
    """Replicas, names of the nodes, ranks."""
    experts, num_nodes = problem.trace.num_experts, problem.num_nodes
    if problem.group_of is not None:
        node_of = node_of[problem.group_of]
    load = tables.load[layer].astype(np.float64)
    per_node = problem.num_slots // num_nodes
    members = [np.flatnonzero(node_of == n).tolist() for n in range(num_nodes)]
    served = np.tile(load, (num_nodes, 1))
    if problem.num_slots > experts and problem.group_of is None:  # groups get replicas inside nodes
        found = _replicate(problem, layer, load, node_of, seed)
        members, served = found.nodes, found.served_load
    order = range(num_nodes)
    if problem.home_rank is None:  # nodes are alike: name them so that few experts move
        order = order_like_linear(members, experts / num_nodes)
    weight = nodes.pair_weight(tables.pairs[layer])
    held: RankLists = []
    for node in order:
        held += place_on_ranks(
            weight, served[node], members[node], problem.ranks_per_node, per_node, seed
        )
    return held


def _replicate(
    problem: Problem, layer: int, load: np.ndarray, node_of: np.ndarray, seed: int
) -> replicas.NodePlacement:
    """The experts of each node, with replicas in all slots."""
    ids = np.ascontiguousarray(problem.trace.expert_ids[:, layer])  # type: ignore[index]
    home_node = np.zeros(0, dtype=np.int64)
    if problem.home_rank is not None:
        node_of_rank = np.asarray(problem.topology.rank_to_node, dtype=np.int64)
        home_node = node_of_rank[problem.home_rank]
    most = load.sum() / problem.num_nodes * (1 + (problem.max_imbalance - 1) * REPLICA_SHARE)
    most = max(most, float(np.bincount(node_of, weights=load).max()))
    per_node = problem.num_slots // problem.num_nodes
    return replicas.place_with_replicas(ids, node_of, load, home_node, per_node, most, seed)


def place_on_ranks(
    weight: np.ndarray,
    load: np.ndarray,
    members: list[int],
    num_ranks: int,
    num_slots: int,
    seed: int,
) -> RankLists:
    """Spread the experts of a node over its ranks so that ranks are level in every batch.

    Slots beyond one per expert hold second replicas inside the node; then loads alone decide.

    The load of rank r in a batch of B of T tokens has the second moment
    B/T sum A_ef + B(B-1)/T^2 sum w_e w_f over e, f on r, with A the co-activation counts and w the
    loads; its sum over ranks is what the swaps make small.
    """
    if num_ranks == 1:
        return [sorted(members)]
    local = np.array(sorted(members))
    pairs, loads = weight[np.ix_(local, local)], load[local]
    if num_slots > len(local):
        counts = replicate(loads, num_slots, num_ranks)
        packed = pack_replicas(loads, counts, num_ranks)
        return sorted(sorted(int(local[i]) for i in rank) for rank in packed)
    tokens = max(loads.sum(), 1.0)
    together = pairs + (BATCH_TOKENS - 1) / tokens * np.outer(loads, loads)
    np.fill_diagonal(together, 0)
    together = np.rint(together * (_SCALE / (together.max() or 1.0)))
    sizes = [len(local) // num_ranks] * num_ranks
    start = lightest_first(loads, sizes)
    steps = RANK_STEPS * len(local) * (len(local) - 1) // 2
    apart = np.zeros((len(local), num_ranks))
    rank_of = anneal(
        -together, apart, loads, None, 0.0, np.inf, start, steps, seed
    )
    held = [local[rank_of == rank].tolist() for rank in range(num_ranks)]
    return sorted(held)  # ranks of a node are alike: the one with the lowest expert comes first


def order_like_linear(nodes: list[list[int]], size: float) -> list[int]:
    """The node to put first, second, ... so that many experts stay where the linear layout has them
    (greedy).
    """
    count = len(nodes)
    overlap = np.zeros((count, count), dtype=np.int64)
    for row, members in enumerate(nodes):
        for expert in members:
            overlap[row, min(int(expert / size), count - 1)] += 1
    order = [0] * count
    for _ in range(count):
        row, column = np.unravel_index(int(np.argmax(overlap)), overlap.shape)
        order[int(column)] = int(row)
        overlap[row, :] = overlap[:, column] = -1
    return order
