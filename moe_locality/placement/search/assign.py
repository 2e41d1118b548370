"""Experts to nodes in one layer: several placements between the most level and the fewest copies.

``coactivation`` picks one per layer, so that the expected imbalance on unseen requests stays
within what was allowed. Shapes: T tokens, L layers, K picks, E experts, M nodes, U units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_locality.placement import counting
from moe_locality.placement.problem import Problem
from moe_locality.placement.search import load_noise, swaps
from moe_locality.placement.search.swaps import HOT, anneal, patterns, refine_exact
from moe_locality.placement.threads import over_layers

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
    """

    pairs: np.ndarray
    unit_load: np.ndarray
    load: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """What the search sees of one layer; its experts may be groups of experts that stay together.

    patterns: see ``refine_exact.patterns``, of every so many tokens.
    weight: [E, E] tokens that picked both; load: [E] picks; pin: [E, M] picks by home node.
    sizes: experts on each node.
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
class Candidate:
    """A placement of one layer: copies are visits per token (for the objective "picks": remote
    picks per pick), imbalance is the expected one.
    """

    node_of: np.ndarray
    copies: float
    imbalance: float


def count_tables(ids: np.ndarray, request_id: np.ndarray, num_experts: int) -> Tables:
    """Count pairs, loads and loads by request of ids [T, L, K]."""
    from moe_locality.placement.count_kernels import add_pairs

    layers = ids.shape[1]
    unit = load_noise.units_of(request_id)
    units = int(unit.max()) + 1 if len(unit) else 1
    pairs = np.zeros((layers, num_experts, num_experts), np.uint32)
    unit_load = np.zeros((layers, units, num_experts), np.uint32)
    over_layers(
        lambda first, last: add_pairs(ids, unit, first, last, pairs, unit_load),
        layers,
    )
    return Tables(pairs=pairs, unit_load=unit_load, load=unit_load.sum(axis=1, dtype=np.int64))


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
    weight = pair_weight(tables.pairs[layer])
    load, unit_load = tables.load[layer].astype(np.float64), tables.unit_load[layer]
    if problem.group_of is not None:
        onto = (problem.group_of == np.arange(problem.group_of.max() + 1)[:, None]).astype(float)
        ids = _group_ids(ids, problem.group_of)
        weight = pairs_of_layer(ids, len(onto))
        load, unit_load, pin = onto @ load, unit_load @ onto.T, onto @ pin
        experts = len(onto)
    if problem.objective == "picks":  # experts do not attract each other, only homes do
        weight = np.zeros_like(weight)
    if experts <= REFINE_EXPERTS:
        rows = patterns(ids, experts, home)
    else:
        rows = (ids, home, np.ones(len(ids)))
    return Layer(
        patterns=rows,
        weight=weight,
        load=load,
        pin=pin,
        noise=load_noise.noise_of(unit_load) if problem.unseen else load_noise.no_noise(experts),
        sizes=tuple(experts // nodes + (n < experts % nodes) for n in range(nodes)),
        grouped=problem.group_of is not None,
        by_pick=problem.objective == "picks",
    )


def pair_weight(pairs: np.ndarray) -> np.ndarray:
    """[E, E] float64 tokens that picked both, symmetric, from a table of ``Tables.pairs``."""
    weight = pairs.astype(np.float64)
    weight += weight.T
    np.fill_diagonal(weight, 0)
    return weight


def pairs_of_layer(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """[E, E] float64 tokens that pick both experts, symmetric with a zero diagonal, of ids
    [T, K].
    """
    return pair_weight(count_tables(ids[:, None], np.zeros(len(ids)), num_experts).pairs[0])


def _group_ids(ids: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    """Groups that each token of ids [T, K] picks, each once, -1 for the rest."""
    table = np.append(group_of, -1).astype(np.int16)
    groups = np.sort(table[ids], axis=1)
    groups[:, 1:][groups[:, 1:] == groups[:, :-1]] = -1
    return groups


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
        linear_copies: of the linear layout of this layer.
        price: copies per token (picks per pick) that an imbalance higher by one is worth.
        limit: imbalance that the layer should not exceed.
        start: [E] node of each expert; ``again``: it was found so, at another price.
    """
    worth = 1.0  # of a copy, or remote pick, in the search
    if not layer.by_pick:  # pairs and copies are taken for shares of all pairs and of linear's
        most = layer.weight.sum() / 2 + layer.pin.sum()
        worth = most / max(linear_copies * layer.patterns[2].sum(), 1.0)
    per_pick = _per_pick(layer, price) * worth
    most = limit * layer.load.sum() / len(layer.sizes)
    steps = min(STEPS * len(layer.load), MOST_STEPS)
    temperature = HOT
    if again:
        steps, temperature = steps // AGAIN, HOT * AGAIN_TEMPERATURE
    return anneal(
        layer.weight,
        layer.pin,
        layer.load,
        layer.noise,
        per_pick,
        most,
        start,
        steps,
        seed,
        temperature,
    )


def _per_pick(layer: Layer, price: float) -> float:
    """Copies (remote picks) in all that one pick on the busiest node is worth at a ``price``."""
    units = layer.load.sum() if layer.by_pick else layer.patterns[2].sum()
    return price * float(units) * len(layer.sizes) / max(float(layer.load.sum()), 1.0)


def refined(layer: Layer, start: Candidate, price: float, limit: float, seed: int) -> Candidate:
    """``start`` searched on the exact copies, where its layer is small enough."""
    experts, num_nodes = len(layer.load), len(layer.sizes)
    if not is_small(layer) or not searchable(layer) or layer.by_pick:
        return start
    node_of, _ = refine_exact(
        layer.patterns,
        layer.load,
        layer.noise,
        _per_pick(layer, price),
        limit * layer.load.sum() / num_nodes,
        start.node_of,
        num_nodes,
        int(REFINE_STEPS * experts**3),
        seed,
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
