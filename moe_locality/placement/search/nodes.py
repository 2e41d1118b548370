"""Experts to nodes in one layer: several placements between the most level and the fewest copies.

``spread`` picks one of them per layer, so that the imbalance to expect on unseen requests stays
within what was allowed. Shapes: T tokens, L layers, K picks, E experts, M nodes, U units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moe_locality.placement import counting
from moe_locality.placement.search import cap
from moe_locality.placement.search import swaps as search
from moe_locality.placement.search.polish import patterns, polish
from moe_locality.placement.threads import over_layers

if TYPE_CHECKING:
    from moe_locality.placement.problem import Problem

RUNGS = (3.0, 2.0, 1.6, 1.4, 1.3, 1.2, 1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Caps to try, as multiples of the imbalance allowed, from loose to tight. The finer they are, the
better the layers can share what is allowed: 14 instead of 8 saved 0.1 to 0.2 points of the copies
of gpt-oss-20b, and made its nodes more level, at half the kicks each."""

RANDOM_STARTS = 2
EFFORT = 1250
"""Kicks of a search times experts: a search costs the same for every number of experts."""

POLISH_EXPERTS = 64
"""Most experts for the exact search: with more, its sample of tokens is fitted, not the traffic."""

POLISH_KICKS = 3

MARGIN_SHARE = 0.7
"""Share of the expected rise of the busiest of M equal nodes that the search holds back on every
node. The expected imbalance decides in the end; on the traces tried (gpt-oss-20b, DeepSeek-V2-Lite;
4 and 8 nodes) 0.7 saved most copies at a given one, 0.5 and 1.0 up to 0.3 points less, none
(a cap on loads alone) could not reach 1.05 on gpt-oss-20b with 4 nodes."""

_SAMPLE_PICKS = 1 << 18
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

    patterns: see ``polish.patterns``, of every so many tokens.
    weight: [E, E] tokens that picked both; load: [E] picks; pin: [E, M] picks by home node.
    sizes: experts on each node.
    """

    patterns: tuple[np.ndarray, np.ndarray, np.ndarray]
    weight: np.ndarray
    load: np.ndarray
    pin: np.ndarray
    noise: cap.Noise
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


def count_tables(
    ids: np.ndarray, request_id: np.ndarray, num_experts: int, *, threads: int | None = None
) -> Tables:
    """Count pairs, loads and loads by request of ids [T, L, K]."""
    from moe_locality.analysis.pair_kernels import add_pairs

    layers = ids.shape[1]
    unit = cap.units_of(request_id)
    units = int(unit.max()) + 1 if len(unit) else 1
    pairs = np.zeros((layers, num_experts, num_experts), np.uint32)
    unit_load = np.zeros((layers, units, num_experts), np.uint32)
    over_layers(
        lambda first, last: add_pairs(ids, unit, first, last, pairs, unit_load),
        layers,
        threads=threads,
    )
    return Tables(pairs=pairs, unit_load=unit_load, load=unit_load.sum(axis=1, dtype=np.int64))


def make_layer(problem: Problem, tables: Tables, layer: int) -> Layer:
    """The search's view of a layer; with groups, whole groups are its experts."""
    whole = problem.trace.expert_ids
    assert whole is not None
    experts, nodes = problem.trace.num_experts, problem.num_nodes
    most = _EXACT_PICKS if experts <= POLISH_EXPERTS else _SAMPLE_PICKS
    stride = max(-(-whole.shape[0] * whole.shape[2] // most), 1)
    ids = np.ascontiguousarray(whole[::stride, layer])
    home = np.zeros(0, np.int64)
    pin = np.zeros((experts, nodes))
    if problem.home_rank is not None:
        node_of_rank = np.asarray(problem.topology.rank_to_node, dtype=np.int64)
        of_token = node_of_rank[problem.home_rank]
        part = whole[:, layer : layer + 1]
        pin = counting.picks_by_home(part, experts, of_token, nodes)[0].T.astype(np.float64)
        home = of_token[::stride]
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
    if experts <= POLISH_EXPERTS:
        rows = patterns(ids, experts, home, nodes)
    else:
        rows = (ids, home, np.ones(len(ids)))
    return Layer(
        patterns=rows,
        weight=weight,
        load=load,
        pin=pin,
        noise=cap.noise_of(unit_load),
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


def linear_nodes(sizes: tuple[int, ...]) -> np.ndarray:
    """[E] node of each expert in the linear layout."""
    return np.repeat(np.arange(len(sizes)), sizes)


def lightest_first(load: np.ndarray, sizes: tuple[int, ...] | list[int]) -> np.ndarray:
    """[E] block of each expert: heaviest first, into the lightest block with room."""
    block_of = np.zeros(len(load), dtype=np.int64)
    room, sums = np.array(sizes), np.zeros(len(sizes))
    for expert in np.argsort(-load, kind="stable"):
        block = int(np.argmin(np.where(room > 0, sums, np.inf)))
        block_of[expert] = block
        room[block] -= 1
        sums[block] += load[expert]
    return block_of


def allowed_imbalance(layer: Layer, max_imbalance: float) -> float:
    """``max_imbalance``, or what packing by loads alone is expected to reach where that is more."""
    packed = lightest_first(layer.load, layer.sizes)
    least = cap.expected_imbalance(packed, layer.load, layer.noise, len(layer.sizes))
    return max(max_imbalance, least)


def candidates(layer: Layer, allowed: float, seed: int) -> list[Candidate]:
    """Placements with ever tighter caps, each found from the one before.

    A cap that the last placement keeps anyway is passed over; one that no swap could keep ends it.
    """
    experts, num_nodes = len(layer.load), len(layer.sizes)
    linear, packed = linear_nodes(layer.sizes), lightest_first(layer.load, layer.sizes)
    if num_nodes == 1 or not layer.load.any():
        return [_candidate(layer, linear)]
    rng = np.random.default_rng(seed)
    starts = [linear, packed] + [rng.permutation(linear) for _ in range(RANDOM_STARTS)]
    mean = float(layer.load.sum()) / num_nodes
    found = [_candidate(layer, packed), _candidate(layer, linear)]
    for rung in RUNGS:
        most = mean * (1 + (allowed - 1) * rung)
        if len(starts) == 1 and _level(layer, starts[0]) <= most:
            continue
        node_of = place_on_nodes(layer, most, starts, max(EFFORT // experts, 1), seed)
        found.append(_candidate(layer, node_of))
        starts = [node_of]
        if _level(layer, node_of) > most + search.SLACK:
            break
    if layer.grouped:  # a group-limited router is made for its linear layout: never above that
        found = [some for some in found if some.copies <= found[1].copies]
    return found


def polished(layer: Layer, start: Candidate, seed: int) -> Candidate:
    """Lower the exact copies of ``start``, where its layer is small enough; never less level."""
    experts, num_nodes = len(layer.load), len(layer.sizes)
    if experts > POLISH_EXPERTS or num_nodes == 1 or not layer.load.any() or layer.by_pick:
        return start
    node_of, _, _ = polish(
        layer.patterns,
        layer.load,
        _level(layer, start.node_of),
        start.node_of,
        num_nodes,
        POLISH_KICKS,
        seed,
        layer.noise.covariance,
        _deviations(layer),
    )
    found = _candidate(layer, node_of)
    return found if found.copies < start.copies else start


def place_on_nodes(
    layer: Layer, most: float, starts: list[np.ndarray], kicks: int, seed: int
) -> np.ndarray:
    """[E] node of each expert: the best of several searches under one cap, by the pair form."""
    found, excess, inside = search.search(
        layer.weight,
        layer.pin,
        layer.load,
        most,
        np.array(starts, dtype=np.int64),
        kicks,
        seed,
        layer.noise.covariance,
        _deviations(layer),
    )
    return found[np.lexsort((-inside, excess))[0]]


def _deviations(layer: Layer) -> float:
    """Roots of a node's covariance that the cap leaves room for."""
    return MARGIN_SHARE * cap.margin(len(layer.sizes)) * layer.noise.deviation


def _level(layer: Layer, node_of: np.ndarray) -> float:
    """The least cap that a placement keeps: the highest load of a node, with its margin."""
    _, loads, variances = search.block_sums(
        layer.noise.covariance, layer.load, node_of, len(layer.sizes)
    )
    return float((loads + _deviations(layer) * np.sqrt(np.maximum(variances, 0))).max())


def _candidate(layer: Layer, node_of: np.ndarray) -> Candidate:
    if layer.by_pick:
        away = layer.load.sum() - layer.pin[np.arange(len(node_of)), node_of].sum()
        copies = float(away) / max(float(layer.load.sum()), 1.0)
    else:
        ids, home, count = layer.patterns
        visits = search.count_pattern_visits(ids, home, count, node_of, len(layer.sizes))
        copies = visits / max(float(count.sum()), 1.0)
    return Candidate(
        node_of=node_of,
        copies=copies,
        imbalance=cap.expected_imbalance(node_of, layer.load, layer.noise, len(layer.sizes)),
    )
