"""What a request will cost at home on each node, predicted from the tokens known when it arrives.

The known tokens have a cost themselves; it is a noisy and a biased sample of the rest (a prompt is
not an answer). Both are repaired with the requests that the plan was made from: short windows are
drawn to the mean over all requests, and a ridge regression of what the known tokens get wrong, on
the shares of the experts in them, is added. The strength of the ridge is the one with the least
leave-one-out error, "no correction" included.

The prediction is a sum over picks, so that it can be kept up token by token and stored as one
weight per (node, layer, expert).
Shapes: R requests, L layers, E experts, M nodes, F = L E.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_locality.errors import PlacementError

PRIOR_TOKENS = 5.0
"""Tokens that the mean over all requests counts for, beside the known ones."""

MAX_FITTED = 2000
"""Requests that the regression looks at: its work grows with their square."""

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
        """[R, M] expected cost per token and layer.

        Args:
            cost: [R, M] cost of the known tokens, per layer; weighted: [R, M] sum of the weights of
                their picks; known: [R] how many they are. All may be zero.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """What the regression needs of the requests, whatever the placement; F = L E."""

    shape: tuple[int, int]  # L, E
    known: np.ndarray  # [R]
    weight: np.ndarray  # [R] tokens / mean tokens
    share: np.ndarray  # [R, F] float32 picks per known token
    center: np.ndarray  # [F] their mean
    scaled: np.ndarray  # [R, F] float32 (share - center) x root of the weight
    values: np.ndarray  # [R] eigenvalues of scaled scaled'
    vectors: np.ndarray  # [R, R]


def make_basis(counts: np.ndarray, known: np.ndarray, tokens: np.ndarray) -> Basis:
    """The basis of requests.

    Args:
        counts: [R, L, E] picks of the known tokens; known: [R] how many tokens are known.
        tokens: [R] all tokens of the request.
    """
    requests, layers, experts = counts.shape
    weight = tokens / tokens.mean()
    share = counts.reshape(requests, -1) / np.maximum(known, 1)[:, None].astype(np.float32)
    some = known > 0
    center = np.average(share, axis=0, weights=weight * some + 1e-12)
    scaled = (share - center.astype(np.float32)) * some[:, None]
    scaled *= np.sqrt(weight)[:, None].astype(np.float32)
    values, vectors = np.linalg.eigh((scaled @ scaled.T).astype(float))
    return Basis(
        shape=(layers, experts),
        known=known,
        weight=weight,
        share=share,
        center=center,
        scaled=scaled,
        values=np.maximum(values, 0),
        vectors=vectors,
    )


def fit_predictor(basis: Basis, cost: np.ndarray, full: np.ndarray) -> tuple[Predictor, np.ndarray]:
    """The predictor, and its leave-one-out predictions [R, M] of the requests of the basis.

    Args:
        cost: [R, M] cost of the known tokens, per layer.
        full: [R, M] mean cost of all tokens of the request, per token and layer.
    """
    n = basis.known[:, None].astype(float)
    mean = np.average(full, axis=0, weights=basis.weight)
    drawn = (cost + PRIOR_TOKENS * mean) / (n + PRIOR_TOKENS)
    miss = np.where(n > 0, full - drawn, 0)
    some = basis.weight * (basis.known > 0)
    shift = (miss * some[:, None]).sum(axis=0) / max(some.sum(), 1e-12)
    slope, left_out = _ridge(basis, np.where(n > 0, miss - shift, 0))
    predictor = Predictor(
        mean=mean,
        shift=shift,
        offset=basis.center @ slope,
        weights=slope.T.reshape(-1, *basis.shape),
    )
    return predictor, np.where(n > 0, drawn + shift + left_out, drawn)


def _ridge(basis: Basis, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted ridge regression in its dual form: (slope [F, M], leave-one-out fit [R, M])."""
    root = np.sqrt(basis.weight)[:, None]
    goal, values, vectors = target * root, basis.values, basis.vectors
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
    return basis.scaled.T.astype(float) @ best[1], best[2] / root
