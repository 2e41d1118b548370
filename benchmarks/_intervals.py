"""Medians, ratios and geometric means of repeated timings, with bootstrap intervals (numpy alone).

Samples of candidates that took turns share the index of their round, and rounds are drawn together:
what slows a whole round, slows both sides of a ratio. Intervals are percentile intervals (B. Efron,
"Bootstrap methods: another look at the jackknife", 1979) of 95 %.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure and its interval."""

    value: float
    low: float
    high: float


def median(samples: Sequence[float], *, seed: int = 0) -> Estimate:
    """Return the median of ``samples`` and its interval."""
    values = _rounds(samples)
    drawn = np.median(values[_draws(len(values), seed)], axis=1)
    return _estimate(float(np.median(values)), drawn)


def ratio(above: Sequence[float], below: Sequence[float], *, seed: int = 0) -> Estimate:
    """Return median(above) / median(below) of samples of the same rounds, and its interval."""
    value, drawn = _ratio_draws(above, below, seed)
    return _estimate(value, drawn)


def geometric_mean_ratio(
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]], *, seed: int = 0
) -> Estimate:
    """Return the geometric mean over cases of :func:`ratio`; each case is drawn on its own."""
    if not pairs:
        raise ValueError("found no cases, expected at least one pair of samples")
    parts = [_ratio_draws(*pair, seed + case) for case, pair in enumerate(pairs)]
    value = float(np.exp(np.mean(np.log([part[0] for part in parts]))))
    return _estimate(value, np.exp(np.mean(np.log([part[1] for part in parts]), axis=0)))


def summary(samples: Sequence[float]) -> Mapping[str, float]:
    """Return the median, its interval, the least value and the quartiles."""
    found = median(samples)
    quartiles = np.percentile(_rounds(samples), (25, 75))
    return {
        "median": found.value,
        "low": found.low,
        "high": found.high,
        "min": float(min(samples)),
        "quartile_1": float(quartiles[0]),
        "quartile_3": float(quartiles[1]),
    }


def _ratio_draws(
    above: Sequence[float], below: Sequence[float], seed: int
) -> tuple[float, np.ndarray]:
    top, bottom = _rounds(above), _rounds(below)
    if len(top) != len(bottom):
        raise ValueError(
            f"found {len(top)} and {len(bottom)} samples, expected one of each side per round"
        )
    draws = _draws(len(top), seed)
    drawn = np.median(top[draws], axis=1) / np.median(bottom[draws], axis=1)
    return float(np.median(top) / np.median(bottom)), drawn


def _rounds(samples: Sequence[float]) -> np.ndarray:
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not (values > 0).all():
        raise ValueError("found samples that are not a list of positive numbers: time them again")
    return values


def _draws(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(drawn, (tail, 100 - tail))
    return Estimate(value=value, low=float(low), high=float(high))
