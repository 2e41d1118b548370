"""The co-activation solver: experts to nodes by affinity, then to ranks by anti-affinity.

Across nodes, experts that are picked together belong together (fewer copies), as long as the nodes
stay level on requests that are not in the trace. Steps of a call follow one another, so what
imbalance costs adds up over the layers: all layers are searched for the fewest copies plus one
price times the expected imbalance, which makes them share the allowed imbalance best (Everett,
Operations Research 11, 1963). The price is found by trying. Inside a node every rank is equally
near, so there experts that are picked together are kept apart: that levels the ranks, over the
whole trace and in each batch. Each layer has several placements between the most level and the
fewest copies, of which one is chosen.

Shapes: T tokens, L layers, K picks, E experts, M nodes, U units.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_locality.placement import counting
from moe_locality.placement.baselines import pack_replicas
from moe_locality.placement.costs import BATCH_TOKENS
from moe_locality.placement.counting import map_layers
from moe_locality.placement.problem import Problem, RankLists, Solution, log_warning, make_plan
from moe_locality.placement.search import load_noise, replicas, swaps, visited
from moe_locality.placement.search.load_noise import Cap, Units, search_lagrangian
from moe_locality.placement.search.swaps import HOT, anneal, patterns, refine_exact
from moe_locality.trace.schema import RoutingTrace

_log = logging.getLogger(__name__)

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

FAR_LOWER = (0.1, 0.03)
"""The same with replicas where the usual order is level, and by that the cap."""

REPLICA_ROUNDS = 4
VISITED_ROUNDS = 3
CHEAPER = 0.45
"""What imbalance is worth with replicas, as a share of that without: about, to begin with."""

RANK_STEPS = 15
"""Swaps tried between the ranks of a node, per pair of its experts."""

_SCALE = 2.0**36  # weights are rounded to integers below this: sums of E^2 of them stay exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Layers placed: ``rows`` the experts of each rank (ranks in node order) per layer.

    expected: imbalance of the nodes expected on unseen requests, per layer; caps: what was allowed.
    notes: by row of the layer, for provenance. load: [L, E] of all layers of the trace.
    serving_nodes: [L, M, E, X] who serves whom, with replicas under the rule "visited".
    """

    rows: list[RankLists]
    expected: list[float]
    caps: list[Cap]
    sampling_unit: str | int
    notes: dict[int, dict[str, Any]]
    load: np.ndarray
    serving_nodes: np.ndarray | None = None


def solve_coactivation(
    problem: Problem, tables: Tables | None = None, layers: Sequence[Layer] | None = None
) -> Solution:
    """Fewest copies, with the nodes as level as allowed on unseen requests. ``tables``: counts of
    the trace, where known; ``layers``: what the search is to see of its layers.
    """
    placed = place_layers(problem, tables=tables, layers=layers)
    expected = sum(placed.expected) / len(placed.expected)
    found: dict[str, Any] = {"expected_imbalance": round(expected, 6)}
    if problem.slack is not None:
        allowed = float(np.mean([cap.allowed for cap in placed.caps]))
        found |= {"max_imbalance": round(allowed, 6), "imbalance_slack": problem.slack}
    if problem.sampling_unit != "request":
        found["sampling_unit"] = placed.sampling_unit
    if placed.notes:
        ids = problem.trace.layer_ids
        found["layer_notes"] = {str(int(ids[row])): note for row, note in placed.notes.items()}
        log_warning(
            _log,
            "%d of %d layers cannot be as level as the cap of %g on unseen requests, see "
            "layer_notes in the plan's provenance; first: layer %s: %s",
            *(len(placed.notes), len(placed.rows), problem.max_imbalance),
            *next((key, note["reason"]) for key, note in found["layer_notes"].items()),
        )
    plan = make_plan(problem, placed.rows, load=placed.load, serving_nodes=placed.serving_nodes)
    return Solution(plan=plan, notes=found)


def place_layers(
    problem: Problem,
    *,
    tables: Tables | None = None,
    layers: Sequence[Layer] | None = None,
    replica_rounds: int = REPLICA_ROUNDS,
) -> Placed:
    """Place the experts of all layers, level in the mean over them.

    The number of threads changes no result. ``tables``, ``layers``: as in ``solve_coactivation``.
    ``replica_rounds``: prices of imbalance that are tried with replicas.
    """
    if tables is None:
        tables = count_tables(problem.trace, problem.sampling_unit)
    num_layers = problem.trace.num_layers
    seeds = [seed_of(problem, layer) for layer in range(num_layers)]
    seen = layers or map_layers(lambda layer: make_layer(problem, tables, layer), num_layers)
    found, caps, price = place_on_nodes(problem, seen, seeds)
    node_of = [expand_groups(problem, some.node_of) for some in found]
    replicated: list[replicas.Candidate] = []
    slots = [problem.num_slots] * num_layers
    if problem.num_slots > problem.trace.num_experts and problem.group_of is None:
        search = _Replicas(problem, seen, caps, seeds, _least_copies(problem, seen))
        replicated, slots = search.slots_by_layer(node_of, price, replica_rounds)

    def finish(layer: int) -> tuple[RankLists, list[int]]:
        members = [np.flatnonzero(node_of[layer] == n) for n in range(problem.num_nodes)]
        served = np.tile(tables.load[layer].astype(np.float64), (problem.num_nodes, 1))
        if replicated:
            members = [np.flatnonzero(held) for held in replicated[layer].held]
            served = replicated[layer].served_load
        weight = counting.pair_weight(tables.pairs[layer])
        mine = replace(problem, num_slots=slots[layer])
        return _finish(mine, weight, served, members, seeds[layer])

    finished = map_layers(finish, num_layers)
    lists = [some.choices for some in replicated if some.choices is not None]
    orders = [order for _, order in finished]
    expected = [some.imbalance for some in replicated or found]
    notes = {
        layer: _note(tables.load[layer], expected[layer], caps[layer].allowed)
        for layer in range(num_layers)
        if (problem.slack is None and caps[layer].allowed > problem.max_imbalance)
        or not tables.load[layer].any()
    }
    return Placed(
        rows=[held for held, _ in finished],
        expected=expected,
        caps=caps,
        sampling_unit=tables.units.of,
        notes=notes,
        load=tables.load,
        serving_nodes=visited.renamed(lists, orders) if lists else None,
    )


def place_on_nodes(
    problem: Problem, layers: Sequence[Layer], seeds: Sequence[int]
) -> tuple[list[Candidate], list[Cap], float]:
    """Experts to nodes, level in the mean over the layers: the fewest copies that this allows; with
    the caps of the layers, and what an imbalance higher by one is worth.
    """
    tried = map_layers(lambda place: fixed_candidates(layers[place]), len(layers))
    ends = [(found[0].imbalance, found[-1].imbalance) for found in tried]
    caps = [load_noise.cap_of(*some, problem.max_imbalance, problem.slack) for some in ends]
    # copies of a layer that an imbalance higher by one has to save
    least = problem.worth * float(np.mean([found[0].copies for found in tried]))

    def search(place: int, price: float, turn: int, most: float | None = None) -> float:
        layer, found = layers[place], tried[place]
        if searchable(layer):
            limit = caps[place].most if most is None else most
            found.append(searched(layer, found, price, limit, seeds[place] + turn))
        return found[-1].imbalance

    def search_lower(place: int) -> None:
        for turn, share in enumerate(LOWER):
            search(place, share * price, ROUNDS + turn, caps[place].allowed)

    def refine_exact(place: int) -> None:
        layer, start = layers[place], tried[place][chosen[place]]
        tried[place].append(refined(layer, start, price, caps[place].most, seeds[place]))

    def choose() -> list[int]:
        for place, layer in enumerate(layers):
            if layer.grouped:  # a group-limited router is made for its linear layout: never above
                most = tried[place][0].copies
                tried[place] = [c for c in tried[place] if c.copies <= most]
        return load_noise.allocate(tried, caps, least)

    allowed = [cap.allowed for cap in caps]
    rounds = ROUNDS if all(map(is_small, layers)) else FEW_ROUNDS
    price = search_lagrangian(search, allowed, rounds, least=least)
    if len(layers) < FEW_LAYERS:
        map_layers(search_lower, len(layers))
    chosen = choose()
    map_layers(refine_exact, len(layers))
    chosen = choose()
    return [some[i] for some, i in zip(tried, chosen, strict=True)], caps, price


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
    problem: Problem, weight: np.ndarray, served: np.ndarray, members: list[np.ndarray], seed: int
) -> tuple[RankLists, list[int]]:
    """(ranks, which of the nodes comes first, second, ...); groups of experts get replicas inside
    their node.
    """
    order = list(range(problem.num_nodes))
    if problem.home_rank is None:  # nodes are alike: name them so that few experts move
        lists = [some.tolist() for some in members]
        order = order_like_linear(lists, problem.trace.num_experts / problem.num_nodes)
    per_node = problem.num_slots // problem.num_nodes
    held: RankLists = []
    for node in order:
        some = members[node].tolist()
        held += place_on_ranks(weight, served[node], some, problem.ranks_per_node, per_node, seed)
    return held, order


def _least_copies(problem: Problem, layers: Sequence[Layer]) -> float:
    """Copies per token below which an imbalance that is allowed is not worth having."""
    visits = float(np.mean([linear_layout(layer).copies for layer in layers]))
    anywhere = 1.0 if problem.home_rank is not None else 1 - 1 / problem.num_nodes
    return problem.worth * visits * anywhere


@dataclass(frozen=True, slots=True)
class _Replicas:
    """The search with replicas in all slots; level in the mean over layers.

    least: copies that an imbalance higher by one has to save.
    """

    problem: Problem
    layers: Sequence[Layer]
    caps: Sequence[Cap]
    seeds: Sequence[int]
    least: float

    def slots_by_layer(
        self, node_of: Sequence[np.ndarray], price: float, rounds: int
    ) -> tuple[list[replicas.Candidate], list[int]]:
        """What is found from one node per expert, and the slots of each layer: equally many, or in
        the mean over the layers.
        """
        middle, step = self.problem.num_slots, self.problem.num_ranks
        if not self.problem.per_layer:
            return self.search(middle, node_of, price, rounds), [middle] * len(self.caps)
        some = (middle - step, middle, middle + step)
        found = [self.search(slots, node_of, price, rounds) for slots in some]
        allowed = sum(cap.allowed for cap in self.caps)
        chosen = replicas.share_slots(found, self.least, allowed)
        best = [found[option][layer] for layer, option in enumerate(chosen)]
        return best, [some[option] for option in chosen]

    def search(
        self, slots: int, node_of: Sequence[np.ndarray], price: float, rounds: int
    ) -> list[replicas.Candidate]:
        """Which nodes hold which experts, with so many slots in every layer."""
        problem, caps, seeds = self.problem, self.caps, self.seeds
        ids, home_node = problem.trace.expert_ids, problem.home_node
        assert ids is not None
        per_node = slots // problem.num_nodes

        def begin(place: int) -> replicas.Start:
            layer, most = self.layers[place], caps[place].most
            mine, nodes = np.ascontiguousarray(ids[:, place]), node_of[place]
            goal = (per_node, layer.noise, most, seeds[place])
            return replicas.begin(mine, nodes, layer.load, home_node, *goal)

        starts = map_layers(begin, len(caps))
        begun = [replicas.candidate(start, start.held) for start in starts]

        def search(place: int, price: float, turn: int) -> replicas.Candidate:
            return replicas.searched(starts[place], price, seeds[place] + turn)

        allowed, slack = float(np.mean([cap.allowed for cap in caps])), problem.slack
        # the usual order leaves less than the slack: it is level
        lower = FAR_LOWER if slack is not None and allowed < 1 + slack else ()
        found, price = self.best_of_prices(begun, search, rounds, CHEAPER * price, lower)
        if problem.serving_rule == "home":
            return found
        return self.serve_visited(found, price, min(rounds, VISITED_ROUNDS))

    def serve_visited(
        self, found: Sequence[replicas.Candidate], price: float, rounds: int
    ) -> list[replicas.Candidate]:
        """Go on from what was ``found`` for the rule "home" under the rule "visited"."""
        ids, home_node = self.problem.trace.expert_ids, self.problem.home_node
        assert ids is not None
        experts, seeds = self.problem.trace.num_experts, self.seeds

        def sample(most: int) -> list[visited.Tokens]:
            return map_layers(
                lambda i: visited.distinct_tokens(ids[:, i], home_node, experts, seeds[i], most),
                len(found),
            )

        whole, few = sample(visited.MAX_TOKENS), sample(visited.FEW_TOKENS)
        each = zip(whole, self.layers, strict=True)
        seen = [(tokens, layer.load, layer.noise) for tokens, layer in each]
        begun = map_layers(lambda i: visited.begun(*seen[i], found[i].held), len(found))

        def search(place: int, price: float, turn: int) -> replicas.Candidate:
            goal = (price, self.caps[place].most, seeds[place] + turn)
            return visited.searched_visited(*seen[place], few[place], begun[place], *goal)

        first = max(price, load_noise.LEAST_PRICE)
        return self.best_of_prices(begun, search, rounds, first)[0]

    def best_of_prices(
        self,
        begun: Sequence[replicas.Candidate],
        search: Callable[[int, float, int], replicas.Candidate],
        rounds: int,
        first: float,
        lower: Sequence[float] = (),
    ) -> tuple[list[replicas.Candidate], float]:
        """(what is best for each layer of what was ``begun`` and found at prices of imbalance, the
        next price); ``search`` and ``first`` as in ``search_lagrangian``. ``lower``: shares of the
        last price to try too, for ``least`` may keep a walk from passing what is less level to what
        is better.
        """
        tried = [[some] for some in begun]

        def kept(place: int, price: float, turn: int) -> float:
            tried[place].append(search(place, price, turn))
            return tried[place][-1].imbalance

        allowed = [cap.allowed for cap in self.caps]
        price = search_lagrangian(kept, allowed, rounds, first, self.least)
        for turn, share in enumerate(lower):
            at = (share * price, rounds + turn)
            map_layers(lambda place, at=at: kept(place, *at), len(tried))
        chosen = load_noise.allocate(tried, self.caps, self.least)
        return [some[i] for some, i in zip(tried, chosen, strict=True)], price


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
        packed = pack_replicas(loads, num_ranks, num_slots)
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
    """The node to put first, second, ... so that many experts stay as in linear (greedy)."""
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


STEPS, MOST_STEPS = 400, 80_000
"""Swaps tried for a placement of a layer: per expert, and at most."""

AGAIN, AGAIN_TEMPERATURE = 5, 0.03
"""A large layer that goes on from what was found at another price: with so many times fewer swaps,
and this share of the first temperature."""

REFINE_STEPS = 0.1
"""Swaps tried on the exact copies, per cube of the number of experts."""

REFINE_EXPERTS = 64
"""Most experts for the exact search: with more, its sample of tokens is fitted, not the traffic."""

_SAMPLE_PICKS = 1 << 17
_EXACT_PICKS = 1 << 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Tables:
    """Counts of all layers of a trace, made in one pass over it.

    pairs: uint32 [L, E, E], tokens that picked both, in pairs[e, f] or pairs[f, e].
    unit_load: uint32 [L, U, E], picks by unit (request); load: int64 [L, E].
    units: what the units are.
    """

    pairs: np.ndarray
    unit_load: np.ndarray
    load: np.ndarray
    units: Units


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What the search sees of one layer; its experts may be groups of experts that stay together.

    patterns: see ``swaps.patterns``, of every so many tokens. weight: [E, E] tokens that picked
    both; load: [E] picks; pin: [E, M] picks by home node. sizes: experts on each node.
    """

    patterns: tuple[np.ndarray, np.ndarray, np.ndarray]
    weight: np.ndarray
    load: np.ndarray
    pin: np.ndarray
    noise: load_noise.Noise
    sizes: tuple[int, ...]
    grouped: bool = False
    by_pick: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate(load_noise.Candidate):
    """With the node of each expert [E]; copies are visits per token (for the objective "picks":
    remote picks per pick).
    """

    node_of: np.ndarray


def count_tables(trace: RoutingTrace, sampling_unit: str | int = "request") -> Tables:
    """Count pairs, loads and loads by sampling unit of a trace of tokens."""
    assert trace.expert_ids is not None
    units = load_noise.sampling_units(trace, sampling_unit)
    pairs, unit_load = counting.count_pairs(trace.expert_ids, trace.num_experts, units.unit)
    load = unit_load.sum(axis=1, dtype=np.int64)
    return Tables(pairs=pairs, unit_load=unit_load, load=load, units=units)


def make_layer(problem: Problem, tables: Tables, layer: int) -> Layer:
    """The search's view of a layer; with groups, whole groups are its experts."""
    whole = problem.trace.expert_ids
    assert whole is not None
    experts, nodes = problem.trace.num_experts, problem.num_nodes
    most = _EXACT_PICKS if experts <= REFINE_EXPERTS else _SAMPLE_PICKS
    stride = max(-(-whole.shape[0] * whole.shape[2] // most), 1)
    ids = np.ascontiguousarray(whole[::stride, layer])
    home, pin = problem.home_node, np.zeros((experts, nodes))
    if problem.home_rank is not None:
        part = whole[:, layer : layer + 1]
        pin = counting.picks_by_home(part, experts, home, nodes)[0].T.astype(np.float64)
        home = home[::stride]
    weight = counting.pair_weight(tables.pairs[layer])
    load, unit_load = tables.load[layer].astype(np.float64), tables.unit_load[layer]
    if problem.group_of is not None:
        onto = (problem.group_of == np.arange(problem.group_of.max() + 1)[:, None]).astype(float)
        ids = np.sort(np.append(problem.group_of, -1).astype(np.int16)[ids], axis=1)
        ids[:, 1:][ids[:, 1:] == ids[:, :-1]] = -1  # each group once
        weight = counting.pairs_of_layer(ids, len(onto))
        load, unit_load, pin = onto @ load, unit_load @ onto.T, onto @ pin
        experts = len(onto)
    if problem.objective == "picks":  # experts do not attract each other, only homes do
        weight = np.zeros_like(weight)
    noise = load_noise.no_noise(experts)
    if problem.unseen:
        own_error = 1.0 if problem.slack is None else load_noise.OWN_ERROR
        noise = load_noise.noise_of(unit_load, tables.units, own_error)
    return Layer(
        patterns=patterns(ids, experts, home),
        weight=weight,
        load=load,
        pin=pin,
        noise=noise,
        sizes=tuple(experts // nodes + (n < experts % nodes) for n in range(nodes)),
        grouped=problem.group_of is not None,
        by_pick=problem.objective == "picks",
    )


def lightest_first(load: np.ndarray, sizes: tuple[int, ...] | list[int]) -> np.ndarray:
    """[E] block of each expert: heaviest first, into the lightest block with room."""
    order = np.argsort(-load, kind="stable")
    return swaps.pack(load.astype(np.float64), order, np.array(sizes, dtype=np.int64))


def fixed_candidates(layer: Layer) -> list[Candidate]:
    """The linear layout, and experts packed by loads alone."""
    found = [linear_layout(layer)]
    if searchable(layer):
        found.append(_candidate(layer, lightest_first(layer.load, layer.sizes)))
    return found


def linear_layout(layer: Layer) -> Candidate:
    """Consecutive experts on each node."""
    return _candidate(layer, np.repeat(np.arange(len(layer.sizes)), layer.sizes))


def is_small(layer: Layer) -> bool:
    """Whether exact copies are searched too."""
    return len(layer.load) <= REFINE_EXPERTS


def searchable(layer: Layer) -> bool:
    """Whether placements of the layer differ."""
    return len(layer.sizes) > 1 and bool(layer.load.any())


def searched(
    layer: Layer, found: list[Candidate], price: float, limit: float, seed: int
) -> Candidate:
    """What ``place`` finds for a layer after ``fixed_candidates`` and the others in ``found``.

    A large layer goes on from the last one, a small one begins anew: so the layers differ in how
    far they go, and share what is allowed better.
    """
    linear, packed, last = found[0].copies, found[1].node_of, found[-1].node_of
    if len(found) == 2 or is_small(layer):
        return _candidate(layer, place(layer, linear, price, limit, seed, packed))
    return _candidate(layer, place(layer, linear, price, limit, seed, last, again=True))


def place(
    layer: Layer,
    linear_copies: float,
    price: float,
    limit: float,
    seed: int,
    start: np.ndarray,
    *,
    again: bool = False,
) -> np.ndarray:
    """[E] node of each expert, with few copies plus ``price`` times the expected imbalance.

    Args:
        linear_copies: of the linear layout. limit: imbalance that the layer should not exceed.
        price: copies per token (picks per pick) that an imbalance higher by one is worth.
        start: [E] node of each expert; ``again``: it was found so, at another price.
    """
    worth = 1.0  # of a copy, or remote pick, in the search
    if not layer.by_pick:  # pairs and copies are taken for shares of all pairs and of linear's
        most = layer.weight.sum() / 2 + layer.pin.sum()
        worth = most / max(linear_copies * layer.patterns[2].sum(), 1.0)
    per_pick = _per_pick(layer, price) * worth
    most = limit * layer.load.sum() / len(layer.sizes)
    steps, hot = min(STEPS * len(layer.load), MOST_STEPS), HOT
    if again:
        steps, hot = steps // AGAIN, HOT * AGAIN_TEMPERATURE
    return anneal(
        layer.weight, layer.pin, layer.load, layer.noise, per_pick, most, start, steps, seed, hot
    )


def _per_pick(layer: Layer, price: float) -> float:
    """Copies (remote picks) in all that one pick on the busiest node is worth at a ``price``."""
    units = layer.load.sum() if layer.by_pick else layer.patterns[2].sum()
    return price * float(units) * len(layer.sizes) / max(float(layer.load.sum()), 1.0)


def refined(layer: Layer, start: Candidate, price: float, limit: float, seed: int) -> Candidate:
    """``start`` searched on the exact copies, where its layer is small enough."""
    if not is_small(layer) or not searchable(layer) or layer.by_pick:
        return start
    load, nodes = layer.load, len(layer.sizes)
    goal = (_per_pick(layer, price), limit * load.sum() / nodes)
    steps = int(REFINE_STEPS * len(load) ** 3)
    node_of, _ = refine_exact(
        layer.patterns, load, layer.noise, *goal, start.node_of, nodes, steps, seed
    )
    return _candidate(layer, node_of)


def _candidate(layer: Layer, node_of: np.ndarray) -> Candidate:
    if layer.by_pick:
        away = layer.load.sum() - layer.pin[np.arange(len(node_of)), node_of].sum()
        copies = float(away) / max(float(layer.load.sum()), 1.0)
    else:
        ids, home, count = layer.patterns
        visits = swaps.count_pattern_visits(ids, home, count, node_of, len(layer.sizes))
        copies = visits / max(float(count.sum()), 1.0)
    return Candidate(
        node_of=node_of,
        copies=copies,
        imbalance=load_noise.expected_imbalance(node_of, layer.load, layer.noise, len(layer.sizes)),
    )
