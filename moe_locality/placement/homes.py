"""Home ranks of requests: each request where most of its expected picks are served, in balance.

A request has one home for all layers. What its later tokens will pick is predicted from what is
known when it must be placed: its prefill, its first n tokens, or its domain; "oracle" looks at all
of its tokens and is the ceiling of any prediction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.placement.frame import check_topology, make_frame
from moe_locality.placement.plan import PlacementPlan
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import PREFILL, RoutingTrace

MAX_TOKEN_IMBALANCE = 1.05
_MOST_EXACT = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """Requests in rising order of their id; R requests, D domains."""

    request_ids: np.ndarray  # [R]
    tokens: np.ndarray  # [R] tokens of each
    index: np.ndarray  # [T] request of each token
    domains: tuple[str | None, ...]  # [R] most frequent domain


def assign_homes(
    trace: RoutingTrace,
    plan: PlacementPlan,
    topology: ClusterTopology | None = None,
    *,
    predict: str = "prefill",
    max_imbalance: float = MAX_TOKEN_IMBALANCE,
    equal_requests: bool = False,
) -> dict[int, int]:
    """Request id → home rank, the same for the same arguments.

    Args:
        trace: has the requests to place. Only the tokens that ``predict`` names are looked at, and
            the number of tokens of each request (for the balance).
        predict: ``prefill``, ``first:N`` (the first N tokens of each request), ``domain`` (the
            profile of the request's domain in ``plan.home_profiles``) or ``oracle`` (all tokens).
            A request with nothing to predict from goes where there is room.
        max_imbalance: most max / mean of the tokens per rank; a request longer than that allows is
            placed on the emptiest rank.
        equal_requests: give every rank the same number of requests instead (up to one, where they
            do not divide evenly), as the batches of training need.

    Raises:
        PlacementError: an unknown ``predict``, a trace of counts, or a plan that does not fit.
    """
    check_topology(plan, topology)
    if not max_imbalance >= 1:
        raise PlacementError(f"max_imbalance: found {max_imbalance}, expected at least 1")
    requests = requests_of(trace)
    score = rank_scores(trace, plan, requests, predict)
    if equal_requests:
        rank_of = balance_requests(score, requests.tokens, plan.num_ranks)
    else:
        rank_of = balance_tokens(score, requests.tokens, plan.num_ranks, max_imbalance)
    return {int(q): int(r) for q, r in zip(requests.request_ids, rank_of, strict=True)}


def requests_of(trace: RoutingTrace) -> Requests:
    """The requests of a trace of tokens."""
    if trace.expert_ids is None or trace.request_id is None or trace.domain_id is None:
        raise PlacementError(
            "homes need a trace of tokens with request ids, found a trace of counts: record tokens"
        )
    if trace.num_rows == 0:
        raise PlacementError("found an empty trace, expected requests to place: record again")
    ids, index, tokens = np.unique(trace.request_id, return_inverse=True, return_counts=True)
    columns = len(trace.domain) + 1
    votes = np.bincount(index * columns + trace.domain_id + 1, minlength=len(ids) * columns)
    best = votes.reshape(len(ids), columns).argmax(axis=1) - 1
    names = tuple(trace.domain[d] if d >= 0 else None for d in best)
    return Requests(request_ids=ids, tokens=tokens, index=index, domains=names)


def rank_scores(
    trace: RoutingTrace, plan: PlacementPlan, requests: Requests, predict: str
) -> np.ndarray:
    """[R, G] share of the expected picks that a home on that rank would have on its own node.

    A hundredth of the share on the rank itself is added, so that among the ranks of a node the one
    with the experts wins. Rows are zero where nothing is known.
    """
    if predict == "domain":
        return _domain_scores(plan, requests)
    rows = _known_tokens(trace, requests, predict)
    part = trace.take(rows)
    counts = np.zeros((len(requests.tokens), plan.num_ranks))
    if part.num_rows:
        local = local_picks(part, plan)
        for rank in range(plan.num_ranks):
            counts[:, rank] = np.bincount(
                requests.index[rows], weights=local[:, rank], minlength=len(counts)
            )
        picks = (part.expert_ids >= 0).sum(axis=(1, 2))  # type: ignore[operator]
        total = np.bincount(requests.index[rows], weights=picks, minlength=len(counts))
        counts /= np.maximum(total, 1)[:, None]
    return counts


def local_picks(trace: RoutingTrace, plan: PlacementPlan) -> np.ndarray:
    """[T, G] picks of each token that rank g's node serves for a home on g (+ 1/100 of those on
    g).
    """
    frame = make_frame(trace, plan, None, None)
    assert frame.ids is not None
    node, served = frame.node_of_rank, frame.served_rank  # [G], [L, G, E]
    ranks = np.arange(frame.num_ranks)[None, :, None]
    worth = np.zeros((frame.num_layers, frame.num_experts + 1, frame.num_ranks), dtype=np.float32)
    near = (node[served] == node[ranks]) + (served == ranks) * 0.01
    worth[:, 1:] = near.transpose(0, 2, 1)
    local = np.zeros((len(frame.ids), frame.num_ranks))
    for layer in range(frame.num_layers):
        for pick in range(frame.ids.shape[2]):
            local += worth[layer][frame.ids[:, layer, pick].astype(np.int64) + 1]
    return local


def _known_tokens(trace: RoutingTrace, requests: Requests, predict: str) -> np.ndarray:
    """Indices of the tokens that ``predict`` may look at."""
    if predict == "oracle":
        return np.arange(trace.num_rows)
    if predict == "prefill":
        rows = np.flatnonzero(trace.stage == PREFILL)
        if not len(rows):
            raise PlacementError(
                "predict='prefill': found no prefill tokens in the trace: use 'first:32'"
            )
        return rows
    kind, _, count = predict.partition(":")
    if kind != "first" or not count.isdecimal() or int(count) < 1:
        raise PlacementError(
            f"predict: found {predict!r}, expected 'prefill', 'first:N', 'domain' or 'oracle'"
        )
    order = np.lexsort((np.asarray(trace.position), requests.index))
    starts = np.concatenate([[0], np.cumsum(requests.tokens)[:-1]])
    within = np.arange(len(order)) - starts[requests.index[order]]
    return np.sort(order[within < int(count)])


def _domain_scores(plan: PlacementPlan, requests: Requests) -> np.ndarray:
    table = (plan.home_profiles or {}).get("domain_rank_share")
    if not table:
        raise PlacementError(
            "predict='domain': found no domain profiles in the plan: solve with homes='joint' on a "
            "trace with domains, or use 'first:32'"
        )
    score = np.zeros((len(requests.tokens), plan.num_ranks))
    for row, name in enumerate(requests.domains):
        if name in table:
            score[row] = table[name]
    return score


def home_profiles(
    trace: RoutingTrace, plan: PlacementPlan, homes: dict[int, int]
) -> dict[str, object]:
    """What later needs of the requests the plan was made for.

    ``domain_rank_share``: domain → [G] share of its picks that a home on the rank would have on its
    node (plus 1/100 of those on the rank): the scores of ``predict="domain"``.
    ``node_expert_picks``: [L][M][E] picks by the requests whose home is on the node, to see later
    whether requests have drifted.
    """
    requests = requests_of(trace)
    local, share = local_picks(trace, plan), {}
    picks = (trace.expert_ids >= 0).sum(axis=(1, 2))  # type: ignore[operator]
    for number, name in enumerate(trace.domain):
        rows = trace.domain_id == number
        if rows.any():  # type: ignore[union-attr]
            means = local[rows].sum(axis=0) / max(picks[rows].sum(), 1)
            share[name] = [round(float(x), 6) for x in means]
    frame = make_frame(trace, plan, None, homes)
    by_rank = frame.picks_by_home()  # [L, G, E]
    by_node = np.zeros((frame.num_layers, frame.num_nodes, frame.num_experts), dtype=np.int64)
    for rank, node in enumerate(frame.node_of_rank):
        by_node[:, node] += by_rank[:, rank]
    return {
        "domain_rank_share": share,
        "node_expert_picks": by_node.tolist(),
        "requests": len(requests.tokens),
    }


def balance_tokens(
    score: np.ndarray, tokens: np.ndarray, num_ranks: int, max_imbalance: float
) -> np.ndarray:
    """[R] rank of each request: best score first under a cap on tokens per rank.

    Requests choose in falling order of what is at stake (tokens x (best - mean score)); a full rank
    is skipped. Where no rank has room the emptiest takes it. The cap is lowered while choosing so
    that the short requests, which come last, can fill the gaps.
    """
    capacity = tokens.sum() / num_ranks * max_imbalance
    stake = tokens * (score.max(axis=1) - score.mean(axis=1))
    order = np.lexsort((np.arange(len(tokens)), -tokens, -stake))
    rank_of = np.zeros(len(tokens), dtype=np.int64)
    filled = np.zeros(num_ranks, dtype=np.int64)
    for request in order:
        room = filled + tokens[request] <= capacity
        if room.any():
            ranked = np.lexsort((filled, -np.where(room, score[request], -np.inf)))
            rank = int(ranked[0])
        else:
            rank = int(np.argmin(filled))
        rank_of[request] = rank
        filled[rank] += tokens[request]
    return _level(rank_of, score, tokens, filled, capacity)


def _level(rank_of, score, tokens, filled, capacity) -> np.ndarray:
    """Bring ranks above the capacity down by moving or exchanging requests, cheapest per token
    first.
    """
    for _ in range(4 * len(tokens)):
        heavy = int(np.argmax(filled))
        if filled[heavy] <= capacity:
            break
        mine = np.flatnonzero(rank_of == heavy)
        light = int(np.argmin(filled))
        gap = filled[heavy] - filled[light]
        fits = mine[tokens[mine] < gap]
        if len(fits):
            loss = (score[fits, heavy] - score[fits, light]) * tokens[fits]
            helps = np.minimum(tokens[fits], filled[heavy] - capacity)
            request = fits[int(np.lexsort((fits, loss / np.maximum(helps, 1)))[0])]
            rank_of[request] = light
            filled[heavy] -= tokens[request]
            filled[light] += tokens[request]
            continue
        break  # one request alone is above the cap, or exchanging whole requests cannot help
    return rank_of


def balance_requests(score: np.ndarray, tokens: np.ndarray, num_ranks: int) -> np.ndarray:
    """[R] rank of each request, equally many on each (up to one), with much score x tokens.

    The exact assignment (Hungarian method) up to ``_MOST_EXACT`` requests, whose matrix is R x R;
    beyond, requests choose in falling order of what is at stake.
    """
    if len(tokens) > _MOST_EXACT:
        return _choose_in_turn(score, tokens, num_ranks)
    from scipy.optimize import linear_sum_assignment

    places = -(-len(tokens) // num_ranks)
    benefit = np.repeat(score * tokens[:, None], places, axis=1)
    if len(tokens) % num_ranks:  # the last place of every rank is taken only when it must be
        last = np.arange(places * num_ranks) % places == places - 1
        benefit[:, last] -= benefit.max() * len(tokens) + 1
    row, column = linear_sum_assignment(benefit, maximize=True)
    rank_of = np.zeros(len(tokens), dtype=np.int64)
    rank_of[row] = column // places
    return rank_of


def _choose_in_turn(score: np.ndarray, tokens: np.ndarray, num_ranks: int) -> np.ndarray:
    size, larger = divmod(len(tokens), num_ranks)
    count = np.zeros(num_ranks, dtype=np.int64)
    rank_of = np.zeros(len(tokens), dtype=np.int64)
    stake = tokens * (score.max(axis=1) - score.mean(axis=1))
    for request in np.lexsort((np.arange(len(tokens)), -stake)):
        limit = size + (1 if larger else 0)
        rank = int(np.argmax(np.where(count < limit, score[request], -np.inf)))
        rank_of[request] = rank
        count[rank] += 1
        if larger and count[rank] == size + 1:
            larger -= 1
    return rank_of
