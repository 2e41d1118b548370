"""How few copies any placement can have: certified lower bounds, and how far a plan is from them.

The bounds hold for placements with the same number of experts on every node, or of slots where some
experts have replicas, on the very tokens that they are computed from. ``relaxation`` has the
mathematics, ``replicated`` that of replicas. ``prove_layer`` raises a bound by branch and bound: a
node of its tree fixes for some pairs of vertices whether they are on one node, ``relaxation``
bounds the placements that agree, and branches that cannot be better than the known placement are
cut, best first. Costs are whole numbers of (token, node) visits, so a bound is rounded up. Effort
(``budget``) is counted in elementary steps, not taken from a clock, so that the same call gives the
same numbers.
"""

from __future__ import annotations

import copy
import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.placement.bounds import relaxation
from moe_locality.placement.bounds.relaxation import Patterns, Relaxation, certify, start_prices
from moe_locality.placement.bounds.replicated import touched_with_replicas
from moe_locality.placement.costs import evaluate
from moe_locality.placement.counting import map_layers
from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.problem import Homes, resolve_homes
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import RoutingTrace

STEPS_PER_SECOND = 4e8
"""What one core of 2020 does, about: turns ``seconds`` into a number of steps."""

MOST_ROUNDS = 400
FEWEST_ROUNDS = 20  # below that the coarse bound is as good
COARSE_ROUNDS = MOST_REPLICA_ROUNDS = 150
MOST_PICKS = 9  # set partitions of more picks are too many to list


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """No placement has fewer ``copies`` [L] per token, in the unit of ``evaluate``: with uniform
    homes (M - 1) / M of the nodes touched.

    max_imbalance: [L] cap on the node loads (max / mean on this trace) that the bound supposes;
    inf: it holds for placements of any balance. rounds: [L] of the tight relaxation; 0: the bound
    is the coarse one, from pairs alone.
    """

    layer_ids: tuple[int, ...]
    copies: np.ndarray
    max_imbalance: np.ndarray
    rounds: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What a plan costs, what no plan can go below, and the gap (found - bound) / found."""

    layer_ids: tuple[int, ...]
    found: np.ndarray  # [L] copies per token
    bound: np.ndarray  # [L]
    max_imbalance: np.ndarray  # [L]
    proved: np.ndarray  # [L] bool: no placement in the cap has fewer copies (bound == found)

    @property
    def gap_per_layer(self) -> np.ndarray:
        return np.where(self.found > 0, 1 - self.bound / np.where(self.found > 0, self.found, 1), 0)

    @property
    def gap(self) -> float:
        """Of the sums over the layers: what part of all copies could still be saved at most."""
        total = float(self.found.sum())
        return 1 - float(self.bound.sum()) / total if total > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: means over the layers, and the layer with the widest gap."""
        worst = int(np.argmax(self.gap_per_layer))
        capped = self.max_imbalance[np.isfinite(self.max_imbalance)]
        return {
            "found": round(float(self.found.mean()), 6),
            "bound": round(float(self.bound.mean()), 6),
            "gap": round(self.gap, 6),
            "worst_gap": round(float(self.gap_per_layer[worst]), 6),
            "worst_layer": self.layer_ids[worst],
            "max_imbalance": round(float(capped.max()), 6) if len(capped) else None,
            "proved_layers": int(self.proved.sum()),
            "layers": len(self.proved),
        }


def certify_plan(
    trace: RoutingTrace,
    plan: PlacementPlan,
    topology: ClusterTopology | None = None,
    homes: Homes = None,
    *,
    max_imbalance: float | None = None,
    seconds: float = 20.0,
    prove: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Certificate:
    """How far a plan is from the fewest copies that any plan with as many slots has on this trace.

    Args:
        trace, plan, topology, homes: as in ``evaluate``.
        max_imbalance: compare with placements whose node loads on this trace are at most this
            (max / mean), or as uneven as the plan's own in layers where that is more. None, and
            with replicas: with placements of any balance.
        seconds: effort, about, on one core; see ``lower_bounds``.
        prove: as much effort again on branch and bound, for models of at most 32 experts on at most
            4 nodes: raises the bound, up to the proof that a layer cannot be placed better.
        progress: called with (layers done, layers, words) after every layer, in any thread.

    Raises:
        PlacementError: the plan does not fit the trace, or has replicas and homes are given.
    """
    costs = evaluate(trace, plan, topology, homes)
    caps = None
    redundant = plan.num_slots - plan.num_experts
    if max_imbalance is not None and not redundant:
        own = np.nan_to_num(costs.per_layer["node_imbalance"], nan=1.0)
        caps = np.maximum(own * (1 + 1e-9), max_imbalance)
    cluster = topology or plan.topology
    options = {"seconds": seconds, "num_redundant_experts": redundant, "progress": progress}
    bounds = lower_bounds(trace, cluster, homes, max_imbalance=caps, **options)
    found, bound = costs.per_layer["copies"], bounds.copies
    if prove and not redundant:
        proved = _proved_bounds(trace, cluster, homes, bounds, found, seconds, progress)
        bound = np.maximum(bound, proved)
    return Certificate(
        layer_ids=costs.layer_ids,
        found=found,
        bound=bound,
        max_imbalance=bounds.max_imbalance,
        proved=bound >= found - 1e-9,
    )


def _proved_bounds(
    trace: RoutingTrace,
    topology: ClusterTopology,
    homes: Homes,
    bounds: Bounds,
    found: np.ndarray,
    seconds: float,
    progress: Callable[[int, int, str], None],
) -> np.ndarray:
    """[L] copies from branch and bound; 0 where the model or the cluster is too large for it."""
    nodes, experts, layers = topology.num_nodes, trace.num_experts, trace.num_layers
    if experts > MOST_EXPERTS or not 1 < nodes <= MOST_NODES:
        return np.zeros(layers)
    home_node = _home_node(trace, topology, homes)

    def prove(row: int) -> float:
        layer = LayerTokens.of(trace.expert_ids[:, row], experts, nodes, home_node)  # type: ignore[index]
        known = round(layer.blocks_of(float(found[row])) * layer.num_tokens)
        budget = seconds * STEPS_PER_SECOND / layers
        proof = prove_layer(layer, known, float(bounds.max_imbalance[row]), budget)
        progress(next(done), layers, "proving layers")
        return layer.as_copies(proof.bound / layer.num_tokens)

    done = itertools.count(1)
    return np.array(map_layers(prove, layers))


def _home_node(trace: RoutingTrace, topology: ClusterTopology, homes: Homes) -> np.ndarray | None:
    rank = resolve_homes(trace, topology.num_ranks, homes)
    return None if rank is None else np.asarray(topology.rank_to_node)[rank]


def lower_bounds(
    trace: RoutingTrace,
    topology: ClusterTopology,
    homes: Homes = None,
    *,
    max_imbalance: float | np.ndarray | None = None,
    seconds: float = 20.0,
    num_redundant_experts: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Bounds:
    """The fewest copies of any placement with equal experts (slots) per node, layer by layer.

    Args:
        homes: as in ``evaluate``.
        max_imbalance: one cap on the node loads (max / mean), one per layer, or None.
        seconds: effort for all layers together, about, on one core. A layer whose share of it is
            too small for ``FEWEST_ROUNDS`` gets the coarse bound, which looks at pairs of experts.
        num_redundant_experts: slots beyond one per expert, uniform homes. Then the bound is for any
            balance and any serving rule, and 0 where the effort is too small.
        progress: as in ``certify_plan``.

    Raises:
        PlacementError: a trace of counts, experts (slots) that do not divide among the nodes, or
            replicas with homes.
    """
    _check_bounds(trace, topology, num_redundant_experts, homes is None and max_imbalance is None)
    nodes, experts = topology.num_nodes, trace.num_experts
    slots = experts + num_redundant_experts
    home_node = _home_node(trace, topology, homes)
    layers = trace.num_layers
    caps = np.full(layers, np.inf)
    if max_imbalance is not None:
        caps = np.broadcast_to(np.asarray(max_imbalance, dtype=np.float64), layers).copy()
    copies, rounds = np.zeros(layers), np.zeros(layers, dtype=np.int64)
    budget = seconds * STEPS_PER_SECOND / max(layers, 1)

    def bound(layer: int) -> None:
        ids = trace.expert_ids[:, layer]  # type: ignore[index]
        if num_redundant_experts:
            found = bound_with_replicas(ids, experts, nodes, slots, budget)
        else:
            found = bound_layer(ids, experts, nodes, home_node, caps[layer], budget)
        copies[layer], rounds[layer] = found
        progress(next(done), layers, "bounding layers")

    done = itertools.count(1)
    if nodes > 1:
        map_layers(bound, layers)
    layer_ids = tuple(int(i) for i in trace.layer_ids)
    return Bounds(layer_ids=layer_ids, copies=copies, max_imbalance=caps, rounds=rounds)


def _check_bounds(
    trace: RoutingTrace, topology: ClusterTopology, redundant: int, free: bool
) -> None:
    """Raise PlacementError where there is no bound; ``free``: of homes and of a cap."""
    if trace.expert_ids is None:
        raise PlacementError(
            "bounds need a trace of tokens, found a trace of counts: copies depend on which "
            "experts a token picks together; record tokens"
        )
    slots, nodes = trace.num_experts + redundant, topology.num_nodes
    if slots % nodes:
        raise PlacementError(
            f"found {slots} slots for {nodes} nodes, expected a multiple: bounds are for "
            "placements with the same number of experts on every node"
        )
    if redundant and not free:
        raise PlacementError(
            "found homes or a cap beside redundant experts, expected neither: with replicas the "
            "bound is for requests anywhere and plans of any balance"
        )


def bound_layer(
    ids: np.ndarray,
    num_experts: int,
    num_nodes: int,
    home_node: np.ndarray | None,
    max_imbalance: float,
    budget: float,
) -> tuple[float, int]:
    """(fewest copies per token, tight rounds) of one layer; home_node [T], None: uniform homes."""
    shape = (num_experts, num_nodes, home_node)
    picks = ids.shape[1] + (home_node is not None)
    work = np.inf
    if picks <= MOST_PICKS:  # patterns repeat: take it that every one stands for eight tokens
        work = len(ids) / 8 * relaxation.set_partitions(picks, min(num_nodes, picks), picks).work
    if budget < FEWEST_ROUNDS * work:
        return coarse_bound(ids, *shape, max_imbalance, budget), 0
    layer = LayerTokens.of(ids, *shape)
    problem = layer.relaxation(max_imbalance)
    rounds = min(int(budget / problem.work_per_round), MOST_ROUNDS)
    if rounds < FEWEST_ROUNDS:
        return coarse_bound(ids, *shape, max_imbalance, budget), 0
    prices = start_prices(problem)
    cool(problem, prices, rounds)
    best = max(layer.fewest_blocks(), certify(problem, prices))
    return layer.as_copies(best), rounds


def bound_with_replicas(
    ids: np.ndarray, num_experts: int, num_nodes: int, num_slots: int, budget: float
) -> tuple[float, int]:
    """``bound_layer`` for more slots than experts; (0, 0) where the budget is too small."""
    layer = LayerTokens.of(ids, num_experts, num_nodes, None)
    if not layer.members or ids.shape[1] > MOST_PICKS:
        return 0.0, 0
    problem = layer.relaxation(np.inf, vertices=num_slots)
    covers = 2 ** (min(num_nodes, ids.shape[1]) - 1)  # of a partition: as many times the work
    rounds = int(budget / (covers * problem.work_per_round))
    if rounds < FEWEST_ROUNDS:
        return 0.0, 0
    rounds = min(rounds, MOST_REPLICA_ROUNDS)
    return layer.as_copies(touched_with_replicas(problem, num_experts, rounds)), rounds


def cool(problem: Any, prices: Any, rounds: int, smoothing: float = relaxation.SMOOTHING) -> None:
    """Improve the prices for so many rounds while the smoothing falls."""
    for some, at in relaxation.cooled(rounds, smoothing):
        relaxation.improve(problem, prices, len(some), smoothing=at)


def coarse_bound(
    ids: np.ndarray,
    num_experts: int,
    num_nodes: int,
    home_node: np.ndarray | None,
    max_imbalance: float,
    budget: float,
) -> float:
    """The fewest copies per token that follow from the most co-located pairs alone.

    With S co-located pairs per token on average at most, and blocks >= a_k(c) - c x pairs for every
    partition of k vertices, nodes touched >= mean a_k(c) - c S for every slope c.
    """
    layer = LayerTokens.of(ids, num_experts, num_nodes, home_node)
    n, tokens, sizes = layer.num_vertices, layer.num_tokens, {}  # tokens by number of vertices
    pairs = np.zeros((n, n))
    for members, count in zip(layer.members, layer.tokens, strict=True):
        relaxation.add_pairs(pairs, members, count)
        sizes[members.shape[1]] = float(count.sum())
    problem = layer.relaxation(max_imbalance, cost=-(pairs + pairs.T) / (2 * tokens))
    prices = start_prices(problem)
    cool(problem, prices, min(int(budget / problem.work_per_round), COARSE_ROUNDS))
    most_pairs = -certify(problem, prices)
    points = {k: relaxation.partition_counts(k, num_nodes, layer.node_size) for k in sizes}
    best = layer.fewest_blocks()
    for slope in np.unique([0.0, *(c for p in points.values() for c in relaxation.hull_slopes(p))]):
        total = -slope * most_pairs
        for k, count in sizes.items():
            together, blocks = points[k].T
            total += float((blocks + slope * together).min() * count) / tokens
        best = max(best, total)
    return layer.as_copies(best)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTokens:
    """Tokens as patterns of vertices, by their number: experts, and pins E + m (home on node m)."""

    num_experts: int
    num_nodes: int
    num_tokens: int
    has_homes: bool
    members: list[np.ndarray]
    tokens: list[np.ndarray]
    load: np.ndarray  # [n], 0 for pins
    visits: float  # share of the tokens that touch any node

    @staticmethod
    def of(
        ids: np.ndarray, num_experts: int, num_nodes: int, home_node: np.ndarray | None
    ) -> LayerTokens:
        picks = np.sort(np.asarray(ids, dtype=np.int64), axis=1)
        load = np.bincount(picks[picks >= 0], minlength=num_experts).astype(np.float64)
        picks[:, 1:][picks[:, 1:] == picks[:, :-1]] = -1  # an expert picked twice is one vertex
        if home_node is not None:
            pin = np.where((picks >= 0).any(axis=1), num_experts + home_node, -1)
            picks = np.concatenate([picks, pin[:, None]], axis=1)
            load = np.concatenate([load, np.zeros(num_nodes)])
        picks = np.sort(picks, axis=1)  # -1 first
        size = (picks >= 0).sum(axis=1)
        members, tokens = [], []
        for count in np.unique(size[size > 0]):
            rows, counts = _unique_rows(picks[size == count][:, -int(count) :])
            members.append(rows)
            tokens.append(counts.astype(np.float64))
        return LayerTokens(
            num_experts=num_experts,
            num_nodes=num_nodes,
            num_tokens=max(len(picks), 1),
            has_homes=home_node is not None,
            members=members,
            tokens=tokens,
            load=load,
            visits=np.count_nonzero(size) / max(len(picks), 1),
        )

    @property
    def num_vertices(self) -> int:
        return self.num_experts + (self.num_nodes if self.has_homes else 0)

    @property
    def node_size(self) -> int:
        return self.num_vertices // self.num_nodes

    def as_copies(self, blocks: float) -> float:
        """Copies per token from nodes touched per token (the home among them, if given)."""
        if not self.has_homes:
            return blocks * (self.num_nodes - 1) / self.num_nodes
        return max(blocks - self.visits, 0.0)

    def blocks_of(self, copies: float) -> float:
        """Nodes touched per token (the home among them, if given) from copies per token."""
        if not self.has_homes:
            return copies * self.num_nodes / (self.num_nodes - 1)
        return copies + self.visits

    def fewest_blocks(self) -> float:
        """Nodes touched per token if every token's vertices were packed as tightly as nodes are."""
        sizes = [-(-rows.shape[1] // self.node_size) for rows in self.members]
        total = sum(s * float(t.sum()) for s, t in zip(sizes, self.tokens, strict=True))
        return total / self.num_tokens

    def fixed_pairs(self, vertices: int | None = None) -> np.ndarray:
        """[n, n]: pins are on different nodes; the rest is open (nan)."""
        n = vertices or self.num_vertices
        fixed = np.full((n, n), np.nan)
        if self.has_homes:
            fixed[self.num_experts :, self.num_experts :] = 0.0
        np.fill_diagonal(fixed, 1.0)
        return fixed

    def relaxation(
        self,
        max_imbalance: float,
        fixed: np.ndarray | None = None,
        cost: np.ndarray | None = None,
        vertices: int | None = None,
    ) -> Relaxation:
        """The relaxation; ``vertices``: with those of replicas; ``cost``: instead of patterns."""
        n, load, most = vertices or self.num_vertices, self.load, np.inf
        size = n // self.num_nodes
        if np.isfinite(max_imbalance) and load.sum() > 0:
            load, most = load * (n / load.sum()), max_imbalance * size
        groups, each = [], zip(self.members, self.tokens, strict=True)
        for members, tokens in each if cost is None else ():
            k = members.shape[1]
            partitions = relaxation.set_partitions(k, min(self.num_nodes, k), size)
            rows = np.ascontiguousarray(members, dtype=np.int64)
            groups.append(Patterns(members=rows, tokens=tokens, partitions=partitions))
        return Relaxation(
            num_vertices=n,
            num_nodes=self.num_nodes,
            groups=tuple(groups),
            num_tokens=self.num_tokens,
            cost=np.zeros((n, n)) if cost is None else cost,
            fixed=self.fixed_pairs(n) if fixed is None else fixed,
            load=load,
            most_load=most,
        )


def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different rows of rising vertex numbers, and how often each occurs."""
    base, width = int(rows.max()) + 1, rows.shape[1]
    if width * np.log2(base + 1) >= 63:
        return np.unique(rows, axis=0, return_counts=True)
    powers = base ** np.arange(width, dtype=np.int64)[::-1]
    keys, counts = np.unique(rows @ powers, return_counts=True)
    return keys[:, None] // powers % base, counts


MOST_EXPERTS = 32
MOST_NODES = 4
ROOT_ROUNDS = 200
CHILD_ROUNDS = 40
MOST_OPEN = 400  # nodes that are kept: each holds the prices of all patterns
_CHILD_SMOOTHING = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """bound: no placement has fewer visits. visits: of the best placement met, or of the known one.
    proved: the known placement is a best one. nodes: of the tree.
    """

    bound: int
    visits: int
    proved: bool
    nodes: int


def prove_layer(
    layer: LayerTokens, known_visits: int, max_imbalance: float, budget: float
) -> Proof:
    """Search in the load cap for fewer visits: tokens x nodes touched, given homes among them."""
    problem = layer.relaxation(max_imbalance)
    prices = start_prices(problem)
    cool(problem, prices, ROOT_ROUNDS)
    spent = ROOT_ROUNDS * problem.work_per_round
    tree = [(_visits(problem, prices), 0, layer.fixed_pairs(), prices)]
    best, count, made = known_visits, 1, 1
    while tree and tree[0][0] < best and spent < budget and len(tree) < MOST_OPEN:
        _, _, fixed, prices = heapq.heappop(tree)
        pair = _pair_to_branch(problem, prices, fixed)
        for value in (1.0, 0.0):
            child = _fix(fixed, pair, value, problem)
            if child is None:
                continue
            if not np.isnan(child).any():
                best = min(best, _count(problem, child))
                continue
            part = layer.relaxation(max_imbalance, fixed=child)
            moved = copy.deepcopy(prices)
            cool(part, moved, CHILD_ROUNDS, smoothing=_CHILD_SMOOTHING)
            spent += CHILD_ROUNDS * part.work_per_round
            count += 1
            bound = _visits(part, moved)
            if bound < best:
                made += 1
                heapq.heappush(tree, (bound, made, child, moved))
    bound = min(best, tree[0][0]) if tree else best
    return Proof(bound=bound, visits=best, proved=bound >= best == known_visits, nodes=count)


def _visits(problem: Relaxation, prices: Any) -> int:
    """The bound in whole visits."""
    return int(np.ceil(certify(problem, prices) * problem.num_tokens - 1e-6))


def _pair_to_branch(problem: Relaxation, prices: Any, fixed: np.ndarray) -> tuple[int, int]:
    """The open pair that the relaxation is least sure of, weighed by the tokens that pick both."""
    n = problem.num_vertices
    weight = np.full((n, n), 1e-9)
    for group in problem.groups:
        relaxation.add_pairs(weight, group.members, group.tokens)
    y = np.clip(prices.primal, 0.0, 1.0)
    unsure = weight * (0.01 + np.minimum(y, 1 - y))
    unsure[~np.isnan(fixed) | np.tril(np.ones((n, n), dtype=bool))] = -1.0
    i, j = np.unravel_index(int(np.argmax(unsure)), unsure.shape)
    return int(i), int(j)


def _fix(
    fixed: np.ndarray, pair: tuple[int, int], value: float, problem: Relaxation
) -> np.ndarray | None:
    """``fixed`` with one more pair and all that follows from it; None: no placement agrees. Sets
    stay apart as a whole, and those too full or too heavy to join are apart.
    """
    fixed = fixed.copy()
    n, size = problem.num_vertices, problem.node_size
    i, j = pair
    if value == 1.0:
        together = (fixed[i] == 1) | (fixed[j] == 1)
        apart = (fixed[i] == 0) | (fixed[j] == 0)
        if (together & apart).any():
            return None
        fixed[np.ix_(together, together)] = 1.0
        _set_apart(fixed, together, apart)
    else:
        _set_apart(fixed, fixed[i] == 1, fixed[j] == 1)
    sets = np.unique((fixed == 1).argmax(axis=1))  # the lowest member stands for its set
    members = {int(s): fixed[s] == 1 for s in sets}
    load, most = problem.load, problem.most_load * (1 + 1e-12)
    for s, own in members.items():
        if own.sum() > size or load[own].sum() > most or (fixed[s] == 0).sum() > n - size:
            return None
        for t, other in members.items():
            crowded = own.sum() + other.sum() > size
            heavy = load[own].sum() + load[other].sum() > most
            if s < t and np.isnan(fixed[s, t]) and (crowded or heavy):
                _set_apart(fixed, own, other)
    return fixed


def _set_apart(fixed: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    fixed[np.ix_(first, second)] = 0.0
    fixed[np.ix_(second, first)] = 0.0


def _count(problem: Relaxation, fixed: np.ndarray) -> int:
    """Visits of a placement that is known in full; beyond all counts if its nodes are uneven."""
    node_of = (fixed == 1).argmax(axis=1)
    _, sizes = np.unique(node_of, return_counts=True)
    if len(sizes) != problem.num_nodes or (sizes != problem.node_size).any():
        return np.iinfo(np.int64).max
    total = 0.0
    for group in problem.groups:
        touched = np.sort(node_of[group.members], axis=1)
        blocks = 1 + (touched[:, 1:] != touched[:, :-1]).sum(axis=1)
        total += float((blocks * group.tokens).sum())
    return round(total)
