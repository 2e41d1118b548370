"""The co-activation solver: experts to nodes by affinity, then to ranks by anti-affinity.

Across nodes, experts that are picked together belong together (fewer copies), as long as the nodes
stay level on requests that are not in the trace. Steps of a call follow one another, so what
imbalance costs adds up over the layers: all layers are searched for the fewest copies plus one
price times the expected imbalance, which makes them share the allowed imbalance best (Everett,
Operations Research 11, 1963). The price is found by trying. Inside a node every rank is equally
near, so there experts that are picked together are kept apart: that levels the ranks, over the
whole trace and in each batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_locality.placement.baselines import pack_replicas, replicate
from moe_locality.placement.costs import BATCH_TOKENS
from moe_locality.placement.problem import Problem, RankLists, Solution, log_warning, make_plan
from moe_locality.placement.search import assign, load_noise, replicas
from moe_locality.placement.search.assign import lightest_first
from moe_locality.placement.search.load_noise import limit_of
from moe_locality.placement.search.swaps import anneal
from moe_locality.placement.threads import map_layers

_log = logging.getLogger(__name__)

FIRST_MULTIPLIER = 2.0
"""Copies per token that an imbalance higher by one is worth; ``STEP`` the factor to the next one
while the price is not known to lie between two.
"""
STEP = 4.0
_LEAST = 0.01  # from where to go up after no price at all


def search_lagrangian(
    search: Callable[[int, float, int], float],
    allowed: Sequence[float],
    rounds: int,
    first: float = FIRST_MULTIPLIER,
) -> float:
    """Search all layers at prices that come nearer to the mean imbalance allowed.

    Args:
        search: called with (place of a layer, price, round), by several threads; returns the
            expected imbalance of what it found.
        allowed: imbalance of each layer.

    Returns:
        the price that would come next.
    """
    target, price = float(np.mean(allowed)) - 1, first
    known: list[tuple[float, float]] = []

    def one(place: int) -> float:
        return search(place, price, len(known))

    for _ in range(rounds):
        levels = map_layers(one, len(allowed))
        known.append((price, float(np.mean(levels)) - 1))
        price = next_multiplier(known, target)
    return price


def next_multiplier(known: Sequence[tuple[float, float]], target: float) -> float:
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
        return max(max(low)[0], _LEAST) * STEP
    (p, x), (q, y) = max(low), min(high)
    if p <= 0 or y <= 0 or target <= 0 or p >= q:
        return (p + q) / 2
    share = np.log(x / target) / np.log(x / y)
    return float(p * (q / p) ** min(max(share, 0.1), 0.9))


ROUNDS = 8
"""Prices of imbalance that are tried. Several short searches around the right one beat a long one:
the layers then differ in how far they go, and share what is allowed better. ``FEW_ROUNDS`` where
layers are large.
"""
FEW_ROUNDS = 5

FEW_LAYERS = 8
"""Layers below which one price leaves much of the allowed imbalance unused: a layer's best
placements by copies and imbalance need not lie on a convex line, and few layers cannot mix. Each is
then searched at lower prices too, up to the imbalance that it is allowed itself.
"""
LOWER = (0.4, 0.1)

REPLICA_ROUNDS = 4
CHEAPER = 0.45
"""What imbalance is worth with replicas, as a share of that without: about, to begin with."""

RANK_STEPS = 15
"""Swaps tried between the ranks of a node, per pair of its experts."""

_SCALE = 2.0**36  # weights are rounded to integers below this: sums of E^2 of them stay exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Layers placed: ``rows`` the experts of each rank (ranks in node order) per layer.

    expected: imbalance of the nodes expected on unseen requests, per layer.
    notes: by row of the layer, what is worth saying in provenance.
    load: [L, E] of all layers of the trace.
    """

    rows: list[RankLists]
    expected: list[float]
    notes: dict[int, dict[str, Any]]
    load: np.ndarray


def solve_coactivation(problem: Problem, tables: assign.Tables | None = None) -> Solution:
    """Fewest copies, with the nodes as level as allowed on unseen requests. ``tables``: counts of
    the trace, where known.
    """
    placed = place_layers(problem, tables=tables)
    found: dict[str, Any] = {
        "expected_imbalance": round(sum(placed.expected) / len(placed.expected), 6)
    }
    if placed.notes:
        ids = problem.trace.layer_ids
        found["layer_notes"] = {str(int(ids[row])): note for row, note in placed.notes.items()}
        log_warning(
            _log,
            "%d of %d layers cannot be as level as the cap of %g on unseen requests, see "
            "layer_notes in the plan's provenance; first: layer %s: %s",
            len(placed.notes),
            len(placed.rows),
            problem.max_imbalance,
            *next((key, note["reason"]) for key, note in found["layer_notes"].items()),
        )
    return Solution(plan=make_plan(problem, placed.rows, load=placed.load), notes=found)


def place_layers(
    problem: Problem,
    *,
    tables: assign.Tables | None = None,
    replica_rounds: int = REPLICA_ROUNDS,
) -> Placed:
    """Place the experts of all layers, level in the mean over them.

    The number of threads changes no result. ``tables``: counts of the trace, where known.
    ``replica_rounds``: prices of imbalance that are tried with replicas.
    """
    ids, request_id = problem.trace.expert_ids, problem.trace.request_id
    assert ids is not None
    assert request_id is not None
    if tables is None:
        tables = assign.count_tables(ids, request_id, problem.trace.num_experts)
    num_layers = ids.shape[1]
    seeds = [seed_of(problem, layer) for layer in range(num_layers)]
    seen = map_layers(lambda layer: assign.make_layer(problem, tables, layer), num_layers)
    found, allowed, price = place_on_nodes(seen, problem.max_imbalance, seeds)
    node_of = [expand_groups(problem, some.node_of) for some in found]
    replicated: list[replicas.Candidate] = []
    if problem.num_slots > problem.trace.num_experts and problem.group_of is None:
        replicated = _replicate(problem, seen, node_of, allowed, seeds, price, replica_rounds)

    def finish(layer: int) -> RankLists:
        members = [np.flatnonzero(node_of[layer] == n) for n in range(problem.num_nodes)]
        served = np.tile(tables.load[layer].astype(np.float64), (problem.num_nodes, 1))
        if replicated:
            members = [np.flatnonzero(held) for held in replicated[layer].held]
            served = replicated[layer].served_load
        weight = assign.pair_weight(tables.pairs[layer])
        return _finish(problem, weight, served, members, seeds[layer])

    rows = map_layers(finish, num_layers)
    expected = [some.imbalance for some in replicated or found]
    notes = {
        layer: _note(tables.load[layer], expected[layer], allowed[layer])
        for layer in range(num_layers)
        if allowed[layer] > problem.max_imbalance or not tables.load[layer].any()
    }
    return Placed(rows=rows, expected=expected, notes=notes, load=tables.load)


def place_on_nodes(
    layers: Sequence[assign.Layer], max_imbalance: float, seeds: Sequence[int]
) -> tuple[list[assign.Candidate], list[float], float]:
    """Experts to nodes, level in the mean over the layers: the fewest copies that this allows.

    Returns:
        (placements, imbalance allowed in each layer, what an imbalance higher by one is worth).
    """
    tried = map_layers(lambda place: assign.fixed_candidates(layers[place]), len(layers))
    allowed = [max(max_imbalance, found[-1].imbalance) for found in tried]
    limits = [limit_of(most, max_imbalance) for most in allowed]

    def search(place: int, price: float, turn: int) -> float:
        return search_to(place, price, turn, limits[place])

    def search_to(place: int, price: float, turn: int, most: float) -> float:
        layer, found = layers[place], tried[place]
        if assign.searchable(layer):
            found.append(assign.searched(layer, found, price, most, seeds[place] + turn))
        return found[-1].imbalance

    def search_lower(place: int) -> None:
        for turn, share in enumerate(LOWER):
            search_to(place, share * price, ROUNDS + turn, allowed[place])

    def refine_exact(place: int) -> None:
        layer, start = layers[place], tried[place][chosen[place]]
        tried[place].append(assign.refined(layer, start, price, limits[place], seeds[place]))

    def choose() -> list[int]:
        for place, layer in enumerate(layers):
            if layer.grouped:  # a group-limited router is made for its linear layout: never above
                most = tried[place][0].copies
                tried[place] = [c for c in tried[place] if c.copies <= most]
        return load_noise.allocate(tried, allowed, max_imbalance)

    small = all(assign.is_small(layer) for layer in layers)
    price = search_lagrangian(search, allowed, ROUNDS if small else FEW_ROUNDS)
    if len(layers) < FEW_LAYERS:
        map_layers(search_lower, len(layers))
    chosen = choose()
    map_layers(refine_exact, len(layers))
    chosen = choose()
    return [some[i] for some, i in zip(tried, chosen, strict=True)], allowed, price


def seed_of(problem: Problem, number: int) -> int:
    """The seed of a search of the problem, by number."""
    return (problem.seed * 1_000_003 + number) & 0x7FFFFFFF


def _note(load: np.ndarray, expected: float, allowed: float) -> dict[str, Any]:
    if not load.any():
        return {"imbalance": 1.0, "reason": "no picks in the trace: its experts stay as they are"}
    return {
        "imbalance": round(expected, 6),
        "reason": f"packing by loads alone is expected to reach {allowed:.3f} on unseen requests; "
        f"the busiest expert has {float(load.max() / load.sum()):.3f} of the picks",
    }


def expand_groups(problem: Problem, node_of: np.ndarray) -> np.ndarray:
    """[E] node of each expert, from the nodes of experts or of groups of them."""
    return node_of if problem.group_of is None else node_of[problem.group_of]


def _finish(
    problem: Problem,
    weight: np.ndarray,
    served: np.ndarray,
    members: list[np.ndarray],
    seed: int,
) -> RankLists:
    """Names of the nodes, and ranks; groups of experts get replicas inside their node."""
    order = range(problem.num_nodes)
    if problem.home_rank is None:  # nodes are alike: name them so that few experts move
        lists = [some.tolist() for some in members]
        order = order_like_linear(lists, problem.trace.num_experts / problem.num_nodes)
    per_node = problem.num_slots // problem.num_nodes
    held: RankLists = []
    for node in order:
        some = members[node].tolist()
        held += place_on_ranks(weight, served[node], some, problem.ranks_per_node, per_node, seed)
    return held


def _replicate(
    problem: Problem,
    layers: Sequence[assign.Layer],
    node_of: Sequence[np.ndarray],
    allowed: Sequence[float],
    seeds: Sequence[int],
    price: float,
    rounds: int,
) -> list[replicas.Candidate]:
    """Which nodes hold which experts, with replicas in all slots; level in the mean over layers."""
    ids, home_node = problem.trace.expert_ids, problem.home_node
    assert ids is not None
    per_node = problem.num_slots // problem.num_nodes

    def begin(place: int) -> replicas.Start:
        layer, most = layers[place], limit_of(allowed[place], problem.max_imbalance)
        mine = np.ascontiguousarray(ids[:, place])
        return replicas.begin(
            mine, node_of[place], layer.load, home_node, per_node, layer.noise, most, seeds[place]
        )

    starts = map_layers(begin, len(layers))
    tried = [[replicas.candidate(start, start.held)] for start in starts]

    def search(place: int, price: float, turn: int) -> float:
        found = replicas.searched(starts[place], price, seeds[place] + turn)
        tried[place].append(found)
        return found.imbalance

    search_lagrangian(search, allowed, rounds, first=CHEAPER * price)
    chosen = load_noise.allocate(tried, allowed, problem.max_imbalance)
    return [some[i] for some, i in zip(tried, chosen, strict=True)]


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
    rank_of = anneal(-together, apart, loads, None, 0.0, np.inf, start, steps, seed)
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
