"""How level the nodes will be on requests that the solver has not seen, and what that allows.

A request brings its own loads: the experts of code, of law, of a long answer. Loads counted on one
set of requests are therefore a sample, and a cap met exactly on it is broken on the next set. With
requests drawn independently, the picks c_r of request r and the share p of each expert in the
trace, the deviations d_r = c_r - |c_r| p have the covariance C = sum d_r d_r' (the ratio estimator,
Cochran, Sampling Techniques, 3rd ed., 1977, section 6.3). Against the loads of the trace, the load
of a node on an unseen sample ``UNSEEN_SHARE`` as large as the trace varies with
(1 + 1 / UNSEEN_SHARE) 1_b' C 1_b, in picks of the trace, b the experts of the node. The maximum
over the nodes of such normal loads, on average, is the expected imbalance.

Shapes: T tokens, L layers, K picks, E experts (or groups of them), U units, M nodes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numba
import numpy as np

UNSEEN_SHARE = 3 / 7
"""Size of the unseen sample that an imbalance is expected for, as a share of the trace: what a
70 / 30 split holds out. A larger sample is more level, a smaller one less."""

MAX_UNITS = 512
"""Requests beyond this number are bundled, which leaves the expected covariance what it is."""

MIN_REQUESTS = 8
"""With fewer requests, stretches of consecutive tokens stand for requests."""

_DRAWS = 1024
_FEW = 32
_LARGEST = 2.0**20  # deviations are rounded to whole numbers below this: sums of squares stay exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """How the loads of one layer vary from sample to sample.

    covariance: [E, E] whole numbers in float64, of the deviations times ``scale``.
    deviation: factor from the root of a block's covariance to the standard deviation of its load
        on an unseen sample, in picks of the trace.
    """

    covariance: np.ndarray
    deviation: float


def units_of(request_id: np.ndarray) -> np.ndarray:
    """[T] int64 unit of each token: its request, bundled to at most ``MAX_UNITS``.

    Neighbors in number go to different bundles, for they may come from one source.
    """
    requests, unit = np.unique(request_id, return_inverse=True)
    if len(requests) >= MIN_REQUESTS:
        return unit.astype(np.int64) % MAX_UNITS
    tokens = len(request_id)
    return np.arange(tokens) * min(64, max(tokens, 1)) // max(tokens, 1)


def noise_of(unit_load: np.ndarray) -> Noise:
    """The noise of a layer from the loads [U, E] of its units."""
    counts = unit_load[unit_load.sum(axis=1) > 0].astype(np.float64)
    experts = unit_load.shape[1]
    if len(counts) < 2:
        return no_noise(experts)
    load = counts.sum(axis=0)
    rest = counts - counts.sum(axis=1, keepdims=True) * (load / load.sum())
    scale = _LARGEST / max(float(np.abs(rest).max()), 1.0)
    whole = np.rint(rest * scale)
    spread = (1 + 1 / UNSEEN_SHARE) * len(counts) / (len(counts) - 1)
    return Noise(covariance=whole.T @ whole, deviation=float(np.sqrt(spread)) / scale)


def no_noise(experts: int) -> Noise:
    """For a plan that has to be level on the trace itself."""
    return Noise(covariance=np.zeros((experts, experts)), deviation=0.0)


def shared_noise(noises: Sequence[Noise], loads: np.ndarray) -> Noise:
    """The noise of one layer that stands for several with the same placement.

    Its load is the sum of ``loads`` [L, E]; the imbalance to expect of it is about the mean of
    theirs: a node's share varies from layer to layer, and in each from sample to sample.
    """
    layers, total = len(loads), loads.sum()
    apart = loads - loads.sum(axis=1, keepdims=True) * (loads.sum(axis=0) / max(total, 1))
    covariance = apart.T @ apart
    for some in noises:
        covariance += some.covariance * some.deviation**2
    covariance *= layers
    scale = _LARGEST / max(float(np.sqrt(np.abs(covariance).max())), 1.0)
    return Noise(covariance=np.rint(covariance * scale**2), deviation=1 / scale)


def expected_imbalance(block_of: np.ndarray, load: np.ndarray, noise: Noise, blocks: int) -> float:
    """Mean of max / mean of the block loads over unseen samples; 1 for a layer without picks.

    Args:
        block_of: [E] block of each expert. load: [E] picks.
    """
    block_of = np.asarray(block_of, dtype=np.int64)
    covariance = _block_covariance(noise.covariance, block_of, blocks)
    return _expected(np.bincount(block_of, weights=load, minlength=blocks), covariance, noise)


def expected_shared_imbalance(share: np.ndarray, load: np.ndarray, noise: Noise) -> float:
    """``expected_imbalance`` where block b serves the share [B, E] of the picks of each expert."""
    return _expected(share @ load, share @ noise.covariance @ share.T, noise)


def _expected(block_load: np.ndarray, covariance: np.ndarray, noise: Noise) -> float:
    """Of block loads [M] and the covariance [M, M] in the scale of the noise."""
    blocks, total = len(block_load), float(block_load.sum())
    if total == 0 or blocks == 1:
        return 1.0
    unit = noise.deviation * blocks / total
    values, vectors = np.linalg.eigh(covariance * unit**2)
    root = vectors * np.sqrt(np.maximum(values, 0))
    share = block_load * (blocks / total)
    return float((share[:, None] + root @ _draws(blocks)).max(axis=0).mean())


@numba.njit(nogil=True, cache=True)
def _block_covariance(covariance, block_of, blocks):
    """[M, M] sums of covariance [E, E] over pairs of blocks."""
    sums = np.zeros((blocks, blocks))
    for e in range(len(block_of)):
        for f in range(len(block_of)):
            sums[block_of[e], block_of[f]] += covariance[e, f]
    return sums


@functools.lru_cache(maxsize=8)
def _draws(blocks: int) -> np.ndarray:
    """[M, S] standard normal draws, each with its opposite; always the same ones."""
    half = np.random.default_rng(0).standard_normal((blocks, _DRAWS // 2))
    return np.concatenate([half, -half], axis=1)


@functools.lru_cache(maxsize=64)
def few_draws(blocks: int) -> np.ndarray:
    """[M, S] draws for searches that ask at every step and take loads for independent.

    The loads of blocks sum up to all picks, so they are negatively correlated and differ by more
    than independent ones: by sqrt(M / (M - 1)) where they vary alike, as the draws are scaled.
    """
    half = _draws(blocks)[:, : _FEW // 2]
    return np.concatenate([half, -half], axis=1) * np.sqrt(blocks / max(blocks - 1, 1))


def samples_of(noise: Noise | None, blocks: int) -> tuple[np.ndarray, float, np.ndarray]:
    """(covariance, deviation, draws) for a search; without noise no covariance and one draw."""
    if noise is None or noise.deviation == 0:
        return np.zeros((0, 0)), 0.0, np.zeros((blocks, 1))
    return noise.covariance, noise.deviation, few_draws(blocks)


class Candidate(Protocol):
    """A placement of one layer: its cost and its expected imbalance."""

    @property
    def copies(self) -> float: ...
    @property
    def imbalance(self) -> float: ...


def limit_of(allowed: float, max_imbalance: float) -> float:
    """Most imbalance that one layer may have, where ``allowed`` is what it has in the mean."""
    return allowed + max_imbalance - 1


def allocate(
    tried: Sequence[Sequence[Candidate]], allowed: Sequence[float], max_imbalance: float
) -> list[int]:
    """Choose one candidate per layer: fewest copies in all, with the mean imbalance as allowed.

    Steps of a call follow one another, so what imbalance costs adds up over the layers: it is
    spent where it saves most copies. A multiple-choice knapsack, solved greedily along the lower
    convex hulls of the layers (Sinha and Zoltners, Operations Research 27, 1979).

    Args:
        tried: candidates of each layer.
        allowed: imbalance of each layer; only their sum counts, but no layer gets more than
            ``limit_of``. Where no candidate keeps to that, the most level is taken.

    Returns:
        the index of the candidate chosen in each layer.
    """
    copies = [[some.copies for some in layer] for layer in tried]
    imbalance = [[some.imbalance for some in layer] for layer in tried]
    limit = [limit_of(most, max_imbalance) for most in allowed]
    budget = sum(allowed)
    hulls = [_hull(c, i, most) for c, i, most in zip(copies, imbalance, limit, strict=True)]
    chosen = [hull[0] for hull in hulls]
    spent = sum(imbalance[layer][place] for layer, place in enumerate(chosen))
    steps = []
    for layer, hull in enumerate(hulls):
        for rank, (here, there) in enumerate(itertools.pairwise(hull)):
            cost = imbalance[layer][there] - imbalance[layer][here]
            gain = copies[layer][here] - copies[layer][there]
            steps.append((-gain / max(cost, 1e-12), layer, rank, cost, there))
    blocked = set()
    for _, layer, _, cost, there in sorted(steps):
        if layer in blocked or spent + cost > budget:
            blocked.add(layer)
            continue
        chosen[layer] = there
        spent += cost
    return chosen


def _hull(copies: Sequence[float], imbalance: Sequence[float], most: float) -> list[int]:
    """Candidates on the lower convex hull, from the most level to the fewest copies."""
    places = sorted(range(len(copies)), key=lambda i: (imbalance[i], copies[i], i))
    fine = [i for i in places if imbalance[i] <= most] or places[:1]
    hull: list[int] = []
    for place in fine:
        if hull and copies[place] >= copies[hull[-1]]:
            continue
        while len(hull) > 1:
            before, last = hull[-2], hull[-1]
            left = (copies[before] - copies[last]) * (imbalance[place] - imbalance[before])
            right = (copies[before] - copies[place]) * (imbalance[last] - imbalance[before])
            if left > right:
                break
            hull.pop()
        hull.append(place)
    return hull
