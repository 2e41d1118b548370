"""Which of the ready requests takes a free row, so that a step touches few distinct experts.

A rank reads the weights of every expert that one of its tokens picks, and sends to every node that
has one. Requests that use the same experts therefore belong into the same steps. Each request is
known by how often the tokens of its prompt picked each expert (``RequestState.profile``).
"""

from collections.abc import Sequence as ListLike

import numpy as np

from moe_locality.analysis.decoding import added_experts, pick_chances
from moe_locality.errors import ConfigError
from moe_locality.serving.scheduler import Choose, RequestState, Sequence, first_come, request_age

BAND = 0.1
"""Candidates as similar as the best one up to this count as equal (arXiv 2607.00466)."""


def profile_of(picks: np.ndarray, num_experts: int) -> np.ndarray:
    """How often each expert was picked: ``[T, L, K]`` ids (-1: none) to int64 ``[L, E]``."""
    layers, columns = picks.shape[1], num_experts + 1
    places = picks + np.arange(1, layers * columns, columns)[:, None]  # column 0: no pick
    counts = np.bincount(places.ravel(), minlength=layers * columns)
    return counts.reshape(layers, columns)[:, 1:]


def chooser(grouping: str) -> Choose:
    """Return the rule of that name.

    ``fifo``: the one that came first. ``cosine``: of the ready ones whose profile is as similar to
    that of the batch as the best one's, up to :data:`BAND`, the one that came first (arXiv
    2604.23150 groups so, arXiv 2607.00466 names the band). ``experts``: the one that is expected to
    add fewest experts to a step (:func:`~moe_locality.analysis.decoding.added_experts`).
    """
    rules = {"fifo": None, "cosine": _most_similar, "experts": _fewest_added}
    if grouping not in rules:
        raise ConfigError(f"found grouping={grouping!r}, expected one of {sorted(rules)}")
    rule = rules[grouping]

    def choose(ready: ListLike[RequestState], running: ListLike[Sequence]) -> int:
        if rule is None or not running or any(state.profile is None for state in ready):
            return first_come(ready, running)
        best = np.flatnonzero(rule(ready, [sequence.request for sequence in running]))
        return min(best.tolist(), key=lambda i: request_age(ready[i]))

    return choose


def _most_similar(ready: ListLike[RequestState], running: ListLike[RequestState]) -> np.ndarray:
    batch = np.mean([_unit(state) for state in running], axis=0)
    similar = np.array([float(np.vdot(_unit(state), batch)) for state in ready])
    similar /= max(float(np.linalg.norm(batch)), 1e-12)
    return similar >= similar.max() - BAND


def _unit(state: RequestState) -> np.ndarray:
    assert state.profile is not None
    values = state.profile.reshape(-1).astype(np.float64)
    return values / max(float(np.linalg.norm(values)), 1e-12)


def _fewest_added(ready: ListLike[RequestState], running: ListLike[RequestState]) -> np.ndarray:
    states = [*ready, *running]
    counts = np.array([state.profile for state in states], dtype=np.float64)
    tokens = np.array([state.profiled for state in states], dtype=np.float64)
    overall = counts.sum(axis=0) / max(tokens.sum(), 1.0)
    chances = pick_chances(counts, tokens, overall)
    added = added_experts(chances[: len(ready)], chances[len(ready) :], overall)
    return added <= added.min() + 1e-12
