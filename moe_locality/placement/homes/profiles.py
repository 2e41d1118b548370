"""``home_profiles`` of a plan: what the homes of new requests are predicted with.

Plain JSON inside the plan:

* ``objective``: "copies" or "picks", the cost that homes are to lower;
* ``domain_rank_share``, ``group_rank_share``: domain (coarse group) → [G] score of each rank: minus
  the expected cost per token and layer at home there, plus a little for picks on the rank itself;
* ``any_rank_share``: the same over all requests, for what is unknown;
* ``predictors``: "prefill" or "first:32" → ``Predictor``;
* ``token_price``: [M] worth of a token of room on each node, for requests that arrive one by one;
* ``node_expert_picks``: [L][M][E] picks by the requests at home on the node, to see drift later;
* ``requests``: how many requests all this was learned from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moe_locality.placement.frame import Frame, make_frame
from moe_locality.placement.homes import predictor as prediction
from moe_locality.placement.homes.predictor import Basis, Predictor
from moe_locality.placement.homes.requests import Requests, known_tokens
from moe_locality.placement.plan import PlacementPlan
from moe_locality.trace.schema import RoutingTrace

RANK_SHARE = 0.01
"""Worth of a pick on the rank itself, in remote copies: it decides among the ranks of a node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Where picks are served, as the counts of request_costs.py take it."""

    served_node: np.ndarray  # [L, H, E]
    holders: np.ndarray  # [L, E, C] ranks
    node_of_rank: np.ndarray  # [G]
    by_pick: bool

    @property
    def num_nodes(self) -> int:
        return int(self.node_of_rank.max()) + 1

    def costs(self, ids: np.ndarray, request: np.ndarray, num_requests: int) -> np.ndarray:
        """[R, M] cost of the tokens of each request at home on each node, per layer."""
        from moe_locality.placement.homes.request_costs import remote_by_home

        total = remote_by_home(
            ids, request, num_requests, self.served_node, self.num_nodes, self.by_pick
        )
        return total / max(ids.shape[1], 1)

    def own_share(self, ids: np.ndarray, request: np.ndarray, num_requests: int) -> np.ndarray:
        """[R, G] share of the picks of each request whose expert is on the rank."""
        from moe_locality.placement.homes.request_costs import picks_on_rank

        count = picks_on_rank(ids, request, num_requests, self.holders, len(self.node_of_rank))
        picks = np.bincount(request, weights=(ids >= 0).sum(axis=(1, 2)), minlength=num_requests)
        return count / np.maximum(picks, 1)[:, None]


def serving_of(frame: Frame, plan: PlacementPlan, objective: str) -> Serving:
    """Where ``plan`` serves the layers of the trace in ``frame``."""
    return serving_of_plan(plan, objective, frame.plan_rows)


def serving_of_plan(plan: PlacementPlan, objective: str, rows: np.ndarray | None = None) -> Serving:
    """Where ``plan`` serves the picks of its layers, or of these ``rows`` of it."""
    node = plan.node_of_rank
    rows = np.arange(plan.num_layers) if rows is None else rows
    first = np.array([np.flatnonzero(node == n)[0] for n in range(plan.num_nodes)])
    # one rank of each node stands for all
    served = node[plan.rank_of_slot[plan.serving_slot()[rows][:, first]]]
    slots = plan.logical_to_physical_map[rows]
    holders = np.where(slots >= 0, plan.rank_of_slot[np.maximum(slots, 0)], -1)
    return Serving(
        served_node=np.ascontiguousarray(served[:, :1] if plan.is_permutation else served),
        holders=np.ascontiguousarray(holders),
        node_of_rank=node,
        by_pick=objective == "picks",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """The tokens that a prediction may look at, and the regression basis of their requests.

    ``fitted`` [F]: the requests that the basis has, all or an even choice of them.
    """

    ids: np.ndarray  # [N, L, K]
    request: np.ndarray  # [N]
    count: np.ndarray  # [R]
    fitted: np.ndarray
    basis: Basis


def known_of(trace: RoutingTrace, requests: Requests, predict: str) -> Known:
    """What ``predict`` may look at in the requests that a plan is made from."""
    from moe_locality.placement.homes.request_costs import expert_counts

    rows, total = known_tokens(trace, requests, predict), len(requests.tokens)
    ids, request = np.ascontiguousarray(trace.expert_ids[rows]), requests.index[rows]  # type: ignore[index]
    count = np.bincount(request, minlength=total)
    fitted = np.unique(np.linspace(0, total - 1, min(total, prediction.MAX_FITTED)).astype(int))
    place = np.full(total, -1)
    place[fitted] = np.arange(len(fitted))
    counts = expert_counts(ids, place[request], len(fitted), trace.num_experts)
    basis = prediction.make_basis(counts, count[fitted], requests.tokens[fitted])
    return Known(ids=ids, request=request, count=count, fitted=fitted, basis=basis)


def fit(known: Known, serving: Serving, full: np.ndarray) -> tuple[Predictor, np.ndarray]:
    """The predictor, and what it says [R, M] of each request without having seen it.

    ``full`` [R, M]: mean cost of all tokens of each request, per token and layer.
    """
    from moe_locality.placement.homes.request_costs import weighted_picks

    total = len(known.count)
    cost = serving.costs(known.ids, known.request, total)
    found, left_out = prediction.fit_predictor(known.basis, cost[known.fitted], full[known.fitted])
    if len(known.fitted) == total:
        return found, left_out
    weighted = weighted_picks(known.ids, known.request, total, found.weights)
    said = found.predict(cost, weighted, known.count)
    said[known.fitted] = left_out
    return found, said


def home_profiles(
    trace: RoutingTrace,
    plan: PlacementPlan,
    homes: dict[int, int],
    *,
    objective: str,
    predictors: dict[str, Predictor],
    token_price: np.ndarray,
) -> dict[str, object]:
    """What the plan should keep of the requests that it was made from, see the top of the file."""
    frame = make_frame(trace, plan, None, homes)
    serving = serving_of(replace(frame, home_rank=None), plan, objective)
    groups = list(dict.fromkeys(trace.groups))
    group_of = np.array([groups.index(g) for g in trace.groups] + [-1])
    by_rank = frame.picks_by_home()  # [L, G, E]
    by_node = np.zeros((frame.num_layers, frame.num_nodes, frame.num_experts), dtype=np.int64)
    for rank, node in enumerate(frame.node_of_rank):
        by_node[:, node] += by_rank[:, rank]
    assert trace.domain_id is not None
    anyone = np.zeros(trace.num_rows, dtype=np.int64)
    return {
        "objective": objective,
        "domain_rank_share": _shares(trace, serving, trace.domain_id, trace.domain),
        "group_rank_share": _shares(trace, serving, group_of[trace.domain_id], groups),
        "any_rank_share": _shares(trace, serving, anyone, ["any"])["any"],
        "predictors": {kind: some.to_dict() for kind, some in predictors.items()},
        "token_price": [round(float(price), 6) for price in token_price],
        "node_expert_picks": by_node.tolist(),
        "requests": len(homes),
    }


def _shares(trace, serving: Serving, label: np.ndarray, names) -> dict[str, list[float]]:
    """Name → [G] score of each rank, of the names that have tokens (label -1 has no name)."""
    rows = np.flatnonzero(label >= 0)
    ids, of = np.ascontiguousarray(trace.expert_ids[rows]), label[rows].astype(np.int64)
    tokens = np.bincount(of, minlength=len(names))
    cost = serving.costs(ids, of, len(names)) / np.maximum(tokens, 1)[:, None]
    score = -cost[:, serving.node_of_rank] + RANK_SHARE * serving.own_share(ids, of, len(names))
    return {
        name: [round(float(x), 6) for x in score[row]]
        for row, name in enumerate(names)
        if tokens[row]
    }
