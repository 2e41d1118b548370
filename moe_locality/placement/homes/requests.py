"""The requests of a trace, which of their tokens a prediction may look at, clusters of requests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_locality.errors import PlacementError
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
    if predict in ("prefill", "domain", "oracle"):
        return
    if kind != "first" or not count.isdecimal() or int(count) < 1:
        raise PlacementError(
            f"predict: found {predict!r}, expected 'prefill', 'first:N', 'domain' or 'oracle'"
        )


def default_prediction(trace: RoutingTrace) -> str:
    """What homes of new requests are predicted from: the prefill where it was recorded."""
    has_prefill = trace.stage is not None and bool((trace.stage == PREFILL).any())
    return "prefill" if has_prefill else f"first:{FIRST_TOKENS}"


def known_tokens(trace: RoutingTrace, requests: Requests, predict: str) -> np.ndarray:
    """[N] rows of the tokens that ``predict`` may look at, rising; none for "domain".

    Raises:
        PlacementError: an unknown ``predict``, or no prefill where that is asked for.
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
