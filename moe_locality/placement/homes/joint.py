"""Homes of requests and places of experts, found together.

Given homes the layers decouple; given places the requests do, in a transport problem. So the two
are improved in turns, from several starts: places found without homes, and clusters of requests
(k-means on L2-normalized expert counts, weighted by inverse document frequency). New requests will
be placed by what is known when they arrive, so here too the homes follow a prediction, and one that
has not seen the request (leave-one-out); of all pairs the one with the least exact cost under such
homes is kept.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from moe_locality.placement.counting import map_layers, picks_by_home
from moe_locality.placement.homes import capacitated
from moe_locality.placement.homes.predictor import (
    KnownTokens,
    Predictor,
    Serving,
    default_prediction,
    fit,
    home_profiles,
    k_means,
    requests_of,
    scores_of_known,
    serving_of_plan,
)
from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.problem import Problem, Solution, align_trace, make_plan
from moe_locality.placement.search import coactivation

CLUSTER_STARTS = 3
FIRST_ROUNDS = 3
MORE_ROUNDS = 6
PATIENCE = 2
CHEAPER = 0.8  # share of the price of imbalance during the search for homes
_SLACK_SHARE = 0.9  # of the allowed imbalance of tokens that nodes use, so that ranks can meet it


class _Setup:
    """What does not change from round to round."""

    def __init__(self, problem: Problem) -> None:
        trace = problem.trace
        self.problem = problem
        self.requests, self.predict = requests_of(trace), default_prediction(trace)
        self.known = KnownTokens(trace, self.requests, self.predict)
        self.ids = np.ascontiguousarray(trace.expert_ids)  # [T, L, K]
        self.tables = tables = coactivation.count_tables(trace, problem.sampling_unit)
        self.layers = layers = map_layers(
            lambda layer: coactivation.make_layer(problem, tables, layer), trace.num_layers
        )
        seeds = [coactivation.seed_of(problem, layer) for layer in range(len(layers))]
        _, caps, price = coactivation.place_on_nodes(problem, layers, seeds)
        self.linear = [coactivation.linear_layout(layer).copies for layer in layers]  # [L]
        self.price = CHEAPER * price  # of imbalance, during the search for homes
        self.limit = [cap.most for cap in caps]  # [L] imbalance that no layer should exceed


class _Pair(NamedTuple):
    """Places and homes that were found together."""

    cost: float  # exact, in sum
    node_of: np.ndarray  # [L, E] node of each expert
    home_node: np.ndarray  # [R] node of each request


def solve_joint(problem: Problem) -> Solution:
    """A plan with ``home_profiles``, and homes of the requests as predicted for new ones."""
    data = _Setup(problem)
    history: list[float] = []  # the costs of all rounds
    starts = [None, *(_clusters(data, number) for number in range(CLUSTER_STARTS))]
    tried = [
        _rounds(data, start, None, FIRST_ROUNDS, number, history)
        for number, start in enumerate(starts)
    ]
    best = min(tried, key=operator.attrgetter("cost"))
    home_node = _rounds(data, best.home_node, best, MORE_ROUNDS, len(starts), history).home_node
    if problem.num_slots > problem.trace.num_experts:
        # a quick plan: where replicas serve their own node, other homes are the best
        alike = replace(_at_home(data, home_node), per_layer=False)
        placed = coactivation.place_layers(alike, tables=data.tables, replica_rounds=1)
        quick = make_plan(
            problem, placed.rows, load=placed.load, serving_nodes=placed.serving_nodes
        )
        _, home_node, _, _ = _homes(data, quick)
    found = coactivation.solve_coactivation(_at_home(data, home_node), tables=data.tables)
    chosen, _, cost, predictor = _homes(data, found.plan)
    homes = dict(zip(data.requests.request_ids.tolist(), chosen.rank_of.tolist(), strict=True))
    kept = home_profiles(
        problem.trace,
        found.plan,
        homes,
        objective=data.problem.objective,
        predictors={data.predict: predictor},
        token_price=chosen.token_price,
    )
    notes = {**found.notes, "objective": data.problem.objective, "predict": data.predict}
    notes[f"joint_{data.problem.objective}"] = [round(x) for x in (*history, cost)]
    return Solution(plan=replace(found.plan, home_profiles=kept), homes=homes, notes=notes)


def _rounds(
    data: _Setup,
    home_node: np.ndarray | None,
    best: _Pair | None,
    rounds: int,
    number: int,
    history: list[float],
) -> _Pair:
    """Alternate places and homes until ``PATIENCE`` rounds bring nothing."""
    since, node_of = 0, None if best is None else best.node_of
    for turn in range(rounds):
        node_of = _place_on_nodes(data, home_node, node_of, 100 * number + turn)
        full, expected, _ = _costs(data, _serving(data, node_of))
        home_node = _home_nodes(data, -expected)
        cost = float((full[np.arange(len(full)), home_node] * data.requests.tokens).sum())
        cost *= data.ids.shape[1]
        history.append(cost)
        if best is None or cost < best.cost:
            best, since = _Pair(cost, node_of, home_node), 0
        else:
            since += 1
        if since == PATIENCE:
            break
    assert best is not None
    return best


def _place_on_nodes(
    data: _Setup, home_node: np.ndarray | None, warm: np.ndarray | None, number: int
) -> np.ndarray:
    """[L, E] node of each expert, layer by layer, for given homes."""
    problem, group_of = data.problem, data.problem.group_of
    # [groups] some expert of each group of experts that stay together
    member = slice(None) if group_of is None else np.unique(group_of, return_index=True)[1]
    pins = None  # [L, E or groups, M] picks by the tokens at home on each node
    if home_node is not None:
        homes = home_node[data.requests.index]
        experts, nodes = problem.trace.num_experts, problem.num_nodes
        picks = picks_by_home(data.ids, experts, homes, nodes, repeated=True)
        pins = picks.transpose(0, 2, 1).astype(np.float64)
        if group_of is not None:
            pins = (group_of == np.arange(group_of.max() + 1)[:, None]).astype(float) @ pins

    def one(row: int) -> np.ndarray:
        layer = data.layers[row]
        if pins is not None:
            layer = replace(layer, pin=pins[row])
        if warm is None:
            start = coactivation.lightest_first(layer.load, layer.sizes)
        else:
            start = warm[row][member]
        node_of = coactivation.place(
            layer,
            data.linear[row],
            data.price,
            data.limit[row],
            coactivation.seed_of(problem, number * 4099 + row),
            start,
            again=warm is not None and not coactivation.is_small(layer),
        )
        return coactivation.expand_groups(problem, node_of)

    return np.stack(map_layers(one, len(data.layers)))


def _serving(data: _Setup, node_of: np.ndarray) -> Serving:
    """Serving of nodes alone: every node stands for one rank."""
    return Serving(
        choices=np.ascontiguousarray(node_of[:, None, :, None]),
        holders=np.ascontiguousarray(node_of[:, :, None]),
        node_of_rank=np.arange(data.problem.num_nodes),
        by_pick=data.problem.objective == "picks",
    )


def _costs(data: _Setup, serving: Serving) -> tuple[np.ndarray, np.ndarray, Predictor]:
    """([R, M] cost per token and layer, its leave-one-out prediction, the predictor)."""
    tokens = data.requests.tokens
    full = serving.costs(data.ids, data.requests.index, len(tokens)) / tokens[:, None]
    predictor, expected = fit(data.known, serving, full)
    return full, expected, predictor


def _home_nodes(data: _Setup, score: np.ndarray) -> np.ndarray:
    """[R] node of each request, tokens in balance."""
    count, tokens = score.shape[1], data.requests.tokens
    allowed = 1 + (data.problem.max_home_imbalance - 1) * _SLACK_SHARE
    caps = capacitated.Capacities(tokens=tokens.sum() / count * allowed)
    return capacitated.assign(score, tokens, np.arange(count), caps).rank_of


def _at_home(data: _Setup, home_node: np.ndarray) -> Problem:
    """The problem with the requests at home on nodes [R]."""
    problem = data.problem
    rank_of_node = np.array([problem.topology.ranks_of(n)[0] for n in range(problem.num_nodes)])
    return replace(problem, home_rank=rank_of_node[home_node[data.requests.index]])


def _homes(
    data: _Setup, plan: PlacementPlan
) -> tuple[capacitated.Assignment, np.ndarray, float, Predictor]:
    """(homes of the requests under a full plan, replicas too; their nodes [R]; their exact cost;
    what predicts those of new requests).
    """
    problem, tokens = data.problem, data.requests.tokens
    rows = align_trace(problem.trace, plan, None, None).plan_rows
    serving = serving_of_plan(plan, data.problem.objective, rows)
    full, expected, predictor = _costs(data, serving)
    score = scores_of_known(serving, expected, data.known.ids, data.known.request)
    caps = capacitated.Capacities(
        tokens=tokens.sum() / problem.num_ranks * problem.max_home_imbalance
    )
    assigned = capacitated.assign(score, tokens, serving.node_of_rank, caps)
    node = serving.node_of_rank[assigned.rank_of]
    cost = float((full[np.arange(len(full)), node] * tokens).sum()) * data.ids.shape[1]
    return assigned, node, cost, predictor


def _clusters(data: _Setup, number: int) -> np.ndarray:
    """[R] node of each request: clusters of like signatures, in balance."""
    count, share = data.problem.num_nodes, data.known.share
    rng = np.random.default_rng((data.problem.seed, number))
    # an expert that every request uses tells little (inverse document frequency, Spärck Jones 1972)
    used = (share > 0).sum(axis=0)
    weighted = share * np.log((len(share) + 1) / (used + 1)).astype(np.float32)
    signature = weighted / np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-12)
    centers = k_means(signature, count, rng, spherical=True)
    score = np.zeros((len(data.requests.tokens), count))
    score[data.known.fitted] = signature @ centers.T
    return _home_nodes(data, score)
