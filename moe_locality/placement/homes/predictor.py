"""What a request will cost at home on each node, predicted from the tokens known when it arrives.

The known tokens have a cost themselves; it is a noisy and a biased sample of the rest (a prompt is
not an answer). Both are repaired with the requests that the plan was made from: short windows are
drawn to the mean over all requests, and a ridge regression of what the known tokens get wrong, on
the shares of the experts in them, is added. The strength of the ridge is the one with the least
leave-one-out error, "no correction" included.

The prediction is a sum over picks, so that it can be kept up token by token and stored as one
weight per (node, layer, expert). ``home_profiles`` of a plan keeps it as plain JSON:

* ``objective``: "copies" or "picks", the cost that homes are to lower;
* ``domain_rank_share``, ``group_rank_share``: domain (coarse group) → [G] score of each rank: minus
  the expected cost per token and layer at home there, plus a little for picks on the rank itself;
* ``any_rank_share``: the same over all requests, for what is unknown;
* ``predictors``: "prefill" or "first:32" → ``Predictor``;
* ``token_price``: [M] worth of a token of room on each node, for requests that arrive one by one;
* ``node_expert_picks``: [L][M][E] picks by the requests at home on the node, to see drift later;
* ``requests``: how many requests all this was learned from.

Shapes: R requests, L layers, E experts, M nodes, F = L E.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.placement.counting import picks_by_home
from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.problem import align_trace
from moe_locality.trace.schema import PREFILL, RoutingTrace

FIRST_TOKENS = 32
KMEANS_ROUNDS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """Requests in rising order of their id; R requests, D domains."""

    request_ids: np.ndarray  # [R]
    tokens: np.ndarray  # [R] tokens of each
    index: np.ndarray  # [T] request of each token
    domains: tuple[str | None, ...]  # [R] most frequent domain


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
    pairs, votes = np.unique(index * columns + trace.domain_id + 1, return_counts=True)
    # the most frequent domain of each request, the lowest id where several are as frequent
    order = np.lexsort((pairs % columns, -votes, pairs // columns))
    _, first = np.unique(pairs[order] // columns, return_index=True)
    best = pairs[order][first] % columns - 1
    names = tuple(trace.domain[d] if d >= 0 else None for d in best)
    return Requests(request_ids=ids, tokens=tokens, index=index, domains=names)


def check_prediction(predict: str) -> None:
    """Raise PlacementError unless ``predict`` is one of the four kinds."""
    kind, _, count = predict.partition(":")
    first = kind == "first" and count.isdecimal() and int(count) > 0
    if not first and predict not in ("prefill", "domain", "oracle"):
        raise PlacementError(
            f"predict: found {predict!r}, expected 'prefill', 'first:N', 'domain' or 'oracle'"
        )


def default_prediction(trace: RoutingTrace) -> str:
    """What homes of new requests are predicted from: the prefill where it was recorded."""
    has_prefill = trace.stage is not None and bool((trace.stage == PREFILL).any())
    return "prefill" if has_prefill else f"first:{FIRST_TOKENS}"


def known_tokens(trace: RoutingTrace, requests: Requests, predict: str) -> np.ndarray:
    """[N] rows of the tokens that ``predict`` may look at, rising; none for "domain". Raises
    PlacementError for an unknown ``predict``, or no prefill where that is asked for.
    """
    check_prediction(predict)
    if predict == "oracle":
        return np.arange(trace.num_rows)
    if predict == "domain":
        return np.zeros(0, dtype=np.int64)
    if predict == "prefill":
        rows = np.flatnonzero(trace.stage == PREFILL)
        if not len(rows):
            raise PlacementError(
                f"predict='prefill': found no prefill tokens in the trace: use "
                f"'first:{FIRST_TOKENS}'"
            )
        return rows
    order = np.lexsort((np.asarray(trace.position), requests.index))
    starts = np.concatenate([[0], np.cumsum(requests.tokens)[:-1]])
    within = np.arange(len(order)) - starts[requests.index[order]]
    return np.sort(order[within < int(predict.partition(":")[2])])


def k_means(
    points: np.ndarray, clusters: int, rng: np.random.Generator, *, spherical: bool = False
) -> np.ndarray:
    """[C, F] centers of unit points [R, F]: Lloyd's algorithm from the k-means++ start (Arthur and
    Vassilvitskii 2007).

    spherical: centers are unit vectors too, compared by cosine, and changes below 1e-5 end it.
    """
    chosen = [int(rng.integers(len(points)))]
    for _ in range(clusters - 1):
        far = np.maximum(1 - (points @ points[chosen].T).max(axis=1), 0).astype(np.float64)
        far[chosen] = 0.0
        total = far.sum()
        chosen.append(int(rng.choice(len(points), p=far / total if total > 0 else None)))
    centers, least = points[chosen], 1e-5 if spherical else 0.0
    for _ in range(KMEANS_ROUNDS):
        if spherical:
            nearest = (points @ centers.T).argmax(axis=1)
        else:
            nearest = nearest_center(points, centers)
        new = centers.copy()
        for cluster in np.unique(nearest):
            new[cluster] = points[nearest == cluster].mean(axis=0)
            if spherical:
                new[cluster] /= max(float(np.linalg.norm(new[cluster])), 1e-12)
        if np.allclose(new, centers, rtol=least, atol=least):
            break
        centers = new
    return centers


def nearest_center(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """[R] the nearest center of each point."""
    return ((centers**2).sum(axis=1) - 2 * points @ centers.T).argmin(axis=1)


PRIOR_TOKENS = 5.0  # that the mean over all requests counts for, beside the known ones
MAX_FITTED = 2000  # requests that the regression looks at: its work grows with their square
_RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
_LARGEST = 9999  # weights are written as whole numbers up to this


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictor:
    """cost[node] = (n c + P mean) / (n + P) + shift + w - offset, for n > 0 known tokens of mean
    cost c and mean weight w, and P = ``PRIOR_TOKENS``; costs are per token and layer.
    """

    mean: np.ndarray  # [M]
    shift: np.ndarray  # [M]
    offset: np.ndarray  # [M]
    weights: np.ndarray  # [M, L, E], per pick and token

    def predict(self, cost: np.ndarray, weighted: np.ndarray, known: np.ndarray) -> np.ndarray:
        """[R, M] expected cost per token and layer, from the ``cost`` [R, M] of the known tokens,
        per layer, the sum ``weighted`` [R, M] of the weights of their picks, and how many they are
        (``known`` [R]). All may be zero.
        """
        n = known[:, None].astype(float)
        drawn = (cost + PRIOR_TOKENS * self.mean) / (n + PRIOR_TOKENS)
        correction = self.shift + weighted / np.maximum(n, 1) - self.offset
        return drawn + np.where(n > 0, correction, 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: weights as whole numbers times ``unit``."""
        unit = float(np.abs(self.weights).max()) / _LARGEST or 1.0
        unit = float(f"{unit:.3g}")
        return {
            "mean": [round(float(x), 6) for x in self.mean],
            "shift": [round(float(x), 6) for x in self.shift],
            "offset": [round(float(x), 6) for x in self.offset],
            "unit": unit,
            "weights": np.rint(self.weights / unit).astype(int).tolist(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], shape: tuple[int, int, int]) -> Predictor:
        """Raises PlacementError where the table is not for [M, L, E] = ``shape``."""
        try:
            arrays = {
                name: np.asarray(content[name], float) for name in ("mean", "shift", "offset")
            }
            weights = np.asarray(content["weights"], dtype=float) * float(content["unit"])
        except (KeyError, TypeError, ValueError) as error:
            raise PlacementError(
                f"the home profiles of the plan are damaged ({error}), expected a predictor: make "
                "the plan again"
            ) from error
        if weights.shape != shape or any(a.shape != shape[:1] for a in arrays.values()):
            raise PlacementError(
                f"found a predictor of shape {weights.shape} in the home profiles, expected "
                f"{shape}: make the plan again"
            )
        return cls(weights=weights, **arrays)


class KnownTokens:
    """What ``predict`` may look at in the requests that a plan is made from: picks ``ids``
    [N, L, K] of tokens, their ``request`` [N], how many each request has (``count`` [R]); and what
    the regression needs of the requests ``fitted`` [B], all or an even choice of them, whatever
    the placement.
    """

    def __init__(self, trace: RoutingTrace, requests: Requests, predict: str) -> None:
        rows, total = known_tokens(trace, requests, predict), len(requests.tokens)
        self.ids = np.ascontiguousarray(trace.expert_ids[rows])  # type: ignore[index]
        self.request = requests.index[rows]
        self.count = np.bincount(self.request, minlength=total)
        fitted = np.unique(np.linspace(0, total - 1, min(total, MAX_FITTED)).astype(int))
        place = np.full(total, len(fitted))  # the others: one row more
        place[fitted] = np.arange(len(fitted))
        row = place[self.request]
        picks = picks_by_home(self.ids, trace.num_experts, row, len(fitted) + 1, repeated=True)
        counts = picks[:, :-1].transpose(1, 0, 2).astype(np.float32, order="C")  # [B, L, E]
        self.fitted, self.shape, known = fitted, counts.shape[1:], self.count[fitted]
        self.weight = requests.tokens[fitted] / requests.tokens[fitted].mean()  # [B]
        self.some = known > 0
        count = np.maximum(known, 1)[:, None].astype(np.float32)
        self.share = counts.reshape(len(counts), -1) / count  # [B, F] float32 picks per known token
        self.center = np.average(self.share, axis=0, weights=self.weight * self.some + 1e-12)  # [F]
        # [B, F] float32 (share - center) x root of the weight
        self.scaled = (self.share - self.center.astype(np.float32)) * self.some[:, None]
        self.scaled *= np.sqrt(self.weight)[:, None].astype(np.float32)
        # eigenvalues [B] and eigenvectors [B, B] of scaled scaled'
        values, self.vectors = np.linalg.eigh((self.scaled @ self.scaled.T).astype(float))
        self.values = np.maximum(values, 0)


def fit(known: KnownTokens, serving: Serving, full: np.ndarray) -> tuple[Predictor, np.ndarray]:
    """The predictor, and its leave-one-out predictions [R, M] of the requests, from the mean cost
    ``full`` [R, M] of all tokens of each, per token and layer.
    """
    from moe_locality.placement.count_kernels import weighted_picks

    total, rows = len(known.count), known.fitted
    cost = serving.costs(known.ids, known.request, total)
    n = known.count[rows][:, None].astype(float)
    mean = np.average(full[rows], axis=0, weights=known.weight)
    drawn = (cost[rows] + PRIOR_TOKENS * mean) / (n + PRIOR_TOKENS)
    miss = np.where(n > 0, full[rows] - drawn, 0)
    some = known.weight * known.some
    shift = (miss * some[:, None]).sum(axis=0) / max(some.sum(), 1e-12)
    slope, left_out = _ridge(known, np.where(n > 0, miss - shift, 0))
    left_out = np.where(n > 0, drawn + shift + left_out, drawn)
    weights = slope.T.reshape(-1, *known.shape)
    found = Predictor(mean=mean, shift=shift, offset=known.center @ slope, weights=weights)
    if len(rows) == total:
        return found, left_out
    weighted = weighted_picks(known.ids, known.request, total, weights)
    expected = found.predict(cost, weighted, known.count)
    expected[rows] = left_out
    return found, expected


def _ridge(known: KnownTokens, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted ridge regression in its dual form: (slope [F, M], leave-one-out fit [B, M])."""
    root = np.sqrt(known.weight)[:, None]
    goal, values, vectors = target * root, known.values, known.vectors
    turned = vectors.T @ goal
    nothing = np.zeros_like(goal)
    best = (float((goal**2).sum()), nothing, nothing)  # no correction
    for ridge in _RIDGES if values.sum() > 0 else ():
        shrunk = 1 / (values + ridge * values.mean())
        dual = vectors @ (shrunk[:, None] * turned)
        left_out = goal - dual / np.maximum((vectors**2) @ shrunk, 1e-12)[:, None]
        error = float(((goal - left_out) ** 2).sum())
        if error < best[0]:
            best = (error, dual, left_out)
    return known.scaled.T.astype(float) @ best[1], best[2] / root


RANK_SHARE = 0.01
"""Worth of a pick on the rank itself, in remote copies: it decides among the ranks of a node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """Where picks are served, as the counts take it."""

    choices: np.ndarray  # [L, H, E, X] nodes that may serve, see PlacementPlan.node_choices
    holders: np.ndarray  # [L, E, C] ranks
    node_of_rank: np.ndarray  # [G]
    by_pick: bool

    def costs(self, ids: np.ndarray, request: np.ndarray, num_requests: int) -> np.ndarray:
        """[R, M] cost of the tokens of each request at home on each node, per layer."""
        from moe_locality.placement.count_kernels import remote_by_home

        nodes = int(self.node_of_rank.max()) + 1
        total = remote_by_home(ids, request, num_requests, self.choices, nodes, self.by_pick)
        return total / max(ids.shape[1], 1)


def scores_of_known(
    serving: Serving, expected: np.ndarray, ids: np.ndarray, request: np.ndarray
) -> np.ndarray:
    """[R, G] scores from predicted costs [R, M] and the known tokens: minus the cost at home on the
    rank, plus ``RANK_SHARE`` times the share of the picks whose expert is on the rank itself.
    """
    from moe_locality.placement.count_kernels import picks_on_rank

    total, node_of_rank = len(expected), serving.node_of_rank
    count = picks_on_rank(ids, request, total, serving.holders, len(node_of_rank))
    picks = np.bincount(request, weights=(ids >= 0).sum(axis=(1, 2)), minlength=total)
    return -expected[:, node_of_rank] + RANK_SHARE * (count / np.maximum(picks, 1)[:, None])


def serving_of_plan(
    plan: PlacementPlan, objective: str, rows: np.ndarray | slice = slice(None)
) -> Serving:
    """Where ``plan`` serves the picks of its layers, or of these ``rows`` of it."""
    choices = plan.node_choices()[rows]
    slots = plan.logical_to_physical_map[rows]
    holders = np.where(slots >= 0, plan.rank_of_slot[np.maximum(slots, 0)], -1)
    return Serving(
        choices=np.ascontiguousarray(choices[:, :1] if plan.is_permutation else choices),
        holders=np.ascontiguousarray(holders),
        node_of_rank=plan.node_of_rank,
        by_pick=objective == "picks",
    )


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
    aligned = align_trace(trace, plan, None, homes)
    serving = serving_of_plan(plan, objective, aligned.plan_rows)
    groups = list(dict.fromkeys(trace.groups))
    group_of = np.array([groups.index(g) for g in trace.groups] + [-1])
    assert trace.expert_ids is not None
    assert trace.domain_id is not None
    home_node = plan.node_of_rank[aligned.home_rank]
    by_node = picks_by_home(trace.expert_ids, trace.num_experts, home_node, plan.num_nodes)
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
    score = scores_of_known(serving, cost, ids, of)
    return {
        name: [round(float(x), 6) for x in score[row]]
        for row, name in enumerate(names)
        if tokens[row]
    }
