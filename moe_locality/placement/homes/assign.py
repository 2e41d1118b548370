"""Home ranks of requests: each where its tokens are expected to cost least, in balance.

A request has one home for all layers. What its later tokens will cost is predicted from what is
known when it must be placed: its prefill, its first n tokens, or its domain; "oracle" looks at all
of its tokens and is the ceiling of any prediction.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.files import write_text
from moe_locality.placement.homes.predictor import (
    FIRST_TOKENS,
    PRIOR_TOKENS,
    Predictor,
    Requests,
    check_prediction,
    known_tokens,
    requests_of,
    scores_of_known,
    serving_of_plan,
)
from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.problem import align_trace, check_topology, log_warning
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import RoutingTrace

MAX_TOKEN_IMBALANCE = 1.05
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class HomeAssignment:
    """Homes, and how even they are.

    homes: request id → rank. tokens_per_rank, requests_per_rank: [G]. token_imbalance: max / mean
        of the former.
    unpredicted: requests with no known token (or domain), which went where there was room.
    unseen_domains: domains that the plan was not made from; with ``predict="domain"`` their
        requests follow their coarse group, or the mean over all requests.
    """

    homes: dict[int, int]
    tokens_per_rank: tuple[int, ...]
    requests_per_rank: tuple[int, ...]
    token_imbalance: float
    unpredicted: int
    unseen_domains: tuple[str, ...]


def assign_homes(
    trace: RoutingTrace,
    plan: PlacementPlan,
    topology: ClusterTopology | None = None,
    *,
    predict: str = "prefill",
    max_imbalance: float = MAX_TOKEN_IMBALANCE,
    equal_requests: bool = False,
) -> dict[int, int]:
    """Request id → home rank, see ``home_assignment``; what is odd about it is logged."""
    found = home_assignment(
        trace,
        plan,
        topology,
        predict=predict,
        max_imbalance=max_imbalance,
        equal_requests=equal_requests,
    )
    if found.unseen_domains and predict == "domain":
        log_warning(
            _log,
            "%d domains are unknown to the plan (first: %s): their requests follow their coarse "
            "group, or the mean over all requests",
            len(found.unseen_domains),
            ", ".join(found.unseen_domains[:3]),
        )
    if not equal_requests and found.token_imbalance > max_imbalance * 1.001:
        log_warning(
            _log,
            "homes reach a token imbalance of %.3f, not %.3f: whole requests do not fill the "
            "ranks more evenly",
            found.token_imbalance,
            max_imbalance,
        )
    return found.homes


def home_assignment(
    trace: RoutingTrace,
    plan: PlacementPlan,
    topology: ClusterTopology | None = None,
    *,
    predict: str = "prefill",
    max_imbalance: float = MAX_TOKEN_IMBALANCE,
    equal_requests: bool = False,
) -> HomeAssignment:
    """Homes of the requests of a trace, the same for the same arguments; raises PlacementError for
    an unknown ``predict``, a trace of counts, or a plan that does not fit.

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
    """
    from moe_locality.placement.homes.capacitated import Capacities, assign

    check_topology(plan, topology)
    if not max_imbalance >= 1:
        raise PlacementError(f"max_imbalance: found {max_imbalance}, expected at least 1")
    requests = requests_of(trace)
    score, predicted, unseen = rank_scores(trace, plan, requests, predict)
    cap = np.inf if equal_requests else requests.tokens.sum() / plan.num_ranks * max_imbalance
    caps = Capacities(tokens=cap, even=equal_requests)
    rank_of = assign(score, requests.tokens, plan.node_of_rank, caps).rank_of
    filled = np.bincount(rank_of, weights=requests.tokens, minlength=plan.num_ranks)
    return HomeAssignment(
        homes=dict(zip(requests.request_ids.tolist(), rank_of.tolist(), strict=True)),
        tokens_per_rank=tuple(int(n) for n in filled),
        requests_per_rank=tuple(np.bincount(rank_of, minlength=plan.num_ranks).tolist()),
        token_imbalance=float(filled.max() / filled.mean()),
        unpredicted=int((~predicted).sum()),
        unseen_domains=unseen,
    )


def rank_scores(
    trace: RoutingTrace, plan: PlacementPlan, requests: Requests, predict: str
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """([R, G] scores, [R] whether something was known of the request, domains unknown to the plan).

    A score is minus the expected cost per token and layer of a home on the rank, plus a little for
    picks on the rank itself, so that among the ranks of a node the one with the experts wins.
    """
    check_prediction(predict)
    profiles = plan.home_profiles or {}
    known_domains = profiles.get("domain_rank_share") or {}
    unseen = tuple(sorted({d for d in requests.domains if d is not None} - set(known_domains)))
    if predict == "domain":
        groups = dict(zip(trace.domain, trace.groups, strict=True))
        return *domain_scores(plan, requests.domains, groups), unseen
    aligned = align_trace(trace, plan, None, None)
    serving = serving_of_plan(plan, profiles.get("objective", "copies"), aligned.plan_rows)
    rows, total = known_tokens(trace, requests, predict), len(requests.tokens)
    assert aligned.ids is not None
    ids, request = np.ascontiguousarray(aligned.ids[rows]), requests.index[rows]
    known = np.bincount(request, minlength=total)
    cost = serving.costs(ids, request, total)
    if predict == "oracle":
        expected = cost / known[:, None]
    else:
        model = predictor_of(plan, predict)
        expected = expected_costs(model, aligned.plan_rows, ids, request, cost, known)
    return scores_of_known(serving, expected, ids, request), known > 0, unseen


def expected_costs(
    model: Predictor | None,
    plan_rows: np.ndarray,
    ids: np.ndarray,
    request: np.ndarray,
    cost: np.ndarray,
    known: np.ndarray,
) -> np.ndarray:
    """[R, M] expected cost per token and layer from the ``cost`` of ``known`` tokens.

    ``plan_rows`` [L]: row of the plan for each layer of ``ids``. Without a model, or where the
    trace lacks layers of the plan, short windows are drawn to the mean and nothing is corrected.
    """
    from moe_locality.placement.count_kernels import weighted_picks

    if model is not None and len(plan_rows) == model.weights.shape[1]:
        weights = np.ascontiguousarray(model.weights[:, plan_rows])
        weighted = weighted_picks(ids, request, len(known), weights)
        return model.predict(cost, weighted, known)
    mean = cost.sum(axis=0) / max(known.sum(), 1)
    return (cost + PRIOR_TOKENS * mean) / (known[:, None] + PRIOR_TOKENS)


def predictor_of(plan: PlacementPlan, predict: str) -> Predictor | None:
    """The predictor of the plan for this kind of window, None where it has none.

    The first N tokens of any N are read by the one of the first 32: it takes shares, and how much
    it trusts them grows with N.
    """
    stored: Mapping[str, Any] = (plan.home_profiles or {}).get("predictors") or {}
    kind = "prefill" if predict == "prefill" else f"first:{FIRST_TOKENS}"
    if kind not in stored:
        return None
    shape = (plan.num_nodes, plan.num_layers, plan.num_experts)
    return Predictor.from_dict(stored[kind], shape)


def domain_scores(
    plan: PlacementPlan, domains: tuple[str | None, ...] | list[str | None], groups: dict[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    """([R, G] score of each rank from the domain alone, [R] whether domain or group is known).

    ``groups``: domain → its coarse group. Raises PlacementError without domain profiles.
    """
    profiles = plan.home_profiles or {}
    table, coarse = profiles.get("domain_rank_share"), profiles.get("group_rank_share") or {}
    if not table:
        raise PlacementError(
            "found no domain profiles in the plan, expected those of joint homes on a trace "
            "with domains: place with joint homes, or use predict='first:32'"
        )
    anything = profiles.get("any_rank_share") or np.mean(list(table.values()), axis=0)
    rows = [table.get(name) or coarse.get(groups.get(name or "", "")) for name in domains]
    score = np.array([anything if row is None else row for row in rows], dtype=float)
    return score, np.array([row is not None for row in rows])


def read_homes(path: Path, plan: PlacementPlan | None = None) -> dict[int, int]:
    """Read a homes file: a JSON object, request id to rank; raises PlacementError where it cannot
    be read, is no such object, or names a rank that the plan lacks.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        homes = {int(request): rank for request, rank in content.items()}
        if not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in homes.values()):
            raise TypeError("a rank is not an integer")
    except OSError as error:
        raise PlacementError(
            f"cannot read the homes {path}: {error.strerror}: check the path, or make them with "
            "`moe-locality group TRACE --plan PLAN`"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise PlacementError(
            f"the homes {path} are damaged ({error}), expected a JSON object request id -> rank: "
            "make them again with `moe-locality group`"
        ) from error
    wrong = [r for r in homes.values() if r < 0 or (plan is not None and r >= plan.num_ranks)]
    if wrong:
        most = "" if plan is None else f" to {plan.num_ranks - 1}"
        raise PlacementError(
            f"the homes {path} name rank {wrong[0]}, expected ranks 0{most}: make homes for this "
            "plan"
        )
    return homes


def write_homes(homes: Mapping[int, int], path: Path) -> None:
    """Write a homes file, whole or not at all; one request per line, ascending."""
    lines = ",\n".join(f'"{request}": {rank}' for request, rank in sorted(homes.items()))
    write_text(path, f"{{\n{lines}\n}}\n", what="homes")
