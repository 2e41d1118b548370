"""How far the routing of one trace is from that of another, beside what sampling alone would show.

Divergences of loads come with a noise floor: two random halves of n requests each differ by about
c / n + c / n in Jensen-Shannon divergence (bits), two samples of n and m requests without drift by
c / n + c / m. So a quarter of the sum of the split-half divergences of both traces, each 4 c / n,
is what would be found without drift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_locality.analysis.stats import cosine, jensen_shannon_bits, split_half_js_bits
from moe_locality.errors import TraceError
from moe_locality.placement.counting import count_coactivation
from moe_locality.placement.plan import PlacementPlan
from moe_locality.trace.merge import settings
from moe_locality.trace.schema import RoutingTrace

TOP_PAIRS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Differences between an old and a new trace; arrays are [L]. nan: not known.

    js_bits, noise_floor_bits: divergence of the loads, and what it would be without drift (nan with
    fewer than two requests or steps on a side). pairs_...: the same for the pairs that tokens pick
    together. top_pairs_kept: share of the most frequent 5 % of the old pairs that are still so.
    """

    layer_ids: tuple[int, ...]
    old_tokens: int
    new_tokens: int
    js_bits: np.ndarray
    noise_floor_bits: np.ndarray
    load_cosine: np.ndarray
    pairs_js_bits: np.ndarray
    pairs_noise_floor_bits: np.ndarray
    top_pairs_kept: np.ndarray

    @property
    def drifted(self) -> np.ndarray:
        """[L] bool: the divergence of the loads is more than twice its noise floor."""
        return self.js_bits > 2 * self.noise_floor_bits


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanDrift:
    """What a plan costs on the old and on the new trace, and what a refresh would bring on the new.

    saving: share of the copies of the linear layout that the plan saves (None where that does not
    exist). imbalance: max / mean of the rank loads, mean over layers. refreshed_copies: of a
    refresh made from all requests of the new trace: in-sample.
    """

    copies_old: float
    copies_new: float
    saving_old: float | None
    saving_new: float | None
    imbalance_old: float
    imbalance_new: float
    refreshed_copies: float
    refresh_saving: float
    refresh_saving_error: float
    refresh_moved_share: float
    refresh_worth_it: bool | None
    refresh_reason: str


def compare(old: RoutingTrace, new: RoutingTrace, *, num_splits: int = 8, seed: int = 0) -> Drift:
    """Compare the loads and the co-activation of two traces of a model, layer by layer.

    Raises:
        TraceError: they are of different models or layers, or one is empty.
    """
    _check(old, new)
    first, second = old.load(), new.load()
    floors = [_split_half(trace, num_splits, seed) for trace in (old, new)]
    nothing = np.full(old.num_layers, np.nan)
    pairs, pairs_floor, kept = nothing, nothing, nothing
    if old.kind == "tokens" and new.kind == "tokens" and old.top_k > 1:
        both = [_upper(count_coactivation(trace).pairs) for trace in (old, new)]
        pairs = jensen_shannon_bits(*both)
        pairs_floor = (_split_half_pairs(old, seed) + _split_half_pairs(new, seed)) / 4
        count = max(int(both[0].shape[1] * TOP_PAIRS), 1)
        tops = (np.argsort(-counts, axis=1, kind="stable")[:, :count] for counts in both)
        kept = np.array([len(np.intersect1d(a, b)) / count for a, b in zip(*tops, strict=True)])
    return Drift(
        layer_ids=tuple(int(i) for i in old.layer_ids),
        old_tokens=old.num_tokens,
        new_tokens=new.num_tokens,
        js_bits=jensen_shannon_bits(first, second),
        noise_floor_bits=(floors[0] + floors[1]) / 4,
        load_cosine=cosine(first, second),
        pairs_js_bits=pairs,
        pairs_noise_floor_bits=pairs_floor,
        top_pairs_kept=kept,
    )


def load_drift(load: np.ndarray, new: RoutingTrace) -> tuple[float, float]:
    """Divergence in bits of the loads of a trace from ``load [L, E]``, mean over the layers, and
    what two samples as small as the trace would show without drift (nan with one request).
    """
    now = new.load()
    known = (load.sum(axis=1) > 0) & (now.sum(axis=1) > 0)
    if not known.any():
        return float("nan"), float("nan")
    found = jensen_shannon_bits(load[known], now[known])
    return float(found.mean()), float(_split_half(new, 8, 0)[known].mean() / 2)


def compare_plan(
    old: RoutingTrace,
    new: RoutingTrace,
    plan: PlacementPlan,
    *,
    move_budget: float = 0.02,
    **figures: Any,
) -> PlanDrift:
    """What ``plan`` costs on both traces, and whether a refresh for the new one is worth it.

    ``figures``: expert_bytes, copy_bytes, tokens_per_step, steps, as for ``placement.refresh``.

    Raises:
        TraceError: a trace has counts only. PlacementError: the plan does not fit the traces.
    """
    from moe_locality.placement import evaluate
    from moe_locality.placement.refresh.improve import refresh
    from moe_locality.placement.refresh.state import RefreshState

    _check(old, new)
    for trace in (old, new):
        trace.tokens_only("the copies of a plan")
    costs = [evaluate(trace, plan) for trace in (old, new)]
    savings: list[float | None] = [None, None]
    if plan.num_experts % plan.num_ranks == 0:
        shape = (plan.num_experts, plan.layer_ids, plan.num_nodes, plan.ranks_per_node)
        linear = PlacementPlan.linear(*shape, model=plan.model, rank_to_node=plan.rank_to_node)
        bases = [evaluate(trace, linear).copies for trace in (old, new)]
        savings = [1 - c.copies / b if b else 0.0 for c, b in zip(costs, bases, strict=True)]
    state = RefreshState.from_trace(new, sample_tokens=max(new.num_tokens, 1))
    found = refresh(plan, state, move_budget=move_budget, **figures)
    return PlanDrift(
        copies_old=costs[0].copies,
        copies_new=costs[1].copies,
        saving_old=savings[0],
        saving_new=savings[1],
        imbalance_old=costs[0].rank_imbalance,
        imbalance_new=costs[1].rank_imbalance,
        refreshed_copies=found.copies_after,
        refresh_saving=found.saving,
        refresh_saving_error=found.saving_error,
        refresh_moved_share=found.moved_share,
        refresh_worth_it=found.worth_it,
        refresh_reason=found.reason,
    )


def windows(trace: RoutingTrace, count: int) -> list[RoutingTrace]:
    """Cut a trace into parts of about equally many rows: by step where steps are recorded, else by
    request number; no step or request is in two parts.

    Raises:
        TraceError: there are fewer steps (requests) than windows, or fewer than two windows.
    """
    unit = trace.step if trace.step is not None else trace.request_id
    if unit is None:
        unit = np.arange(trace.num_rows)
    values, rows = np.unique(unit, return_counts=True)
    if not 2 <= count <= len(values):
        raise TraceError(
            f"found {count} windows asked for in a trace of {len(values)} steps or requests, "
            "expected at least 2 and no more windows than those: ask for another number"
        )
    # the middle of each unit in rows decides its window; every window gets at least one unit
    middle = (np.cumsum(rows) - rows / 2) / rows.sum() * count
    window = np.minimum(middle.astype(int), count - 1)
    order = np.arange(len(values))
    window = np.clip(window, count - (len(values) - order), order)
    part = window[np.searchsorted(values, unit)]
    return [trace.take(part == number) for number in range(count)]


def _check(old: RoutingTrace, new: RoutingTrace) -> None:
    if settings(old) != settings(new) or old.layer_ids.tolist() != new.layer_ids.tolist():
        raise TraceError(
            f"found traces of (model, kind, experts, top_k) {settings(old)} with "
            f"{old.num_layers} layers and {settings(new)} with {new.num_layers} layers, expected "
            "the same model, kind and layers: compare traces of one model"
        )
    if not old.load().any() or not new.load().any():
        raise TraceError("found an empty trace, expected picks on both sides: record more")


def _split_half(trace: RoutingTrace, num_splits: int, seed: int) -> np.ndarray:
    """[L] divergence of the loads between two halves of the requests, mean over splits."""
    found = split_half_js_bits(trace, num_splits=num_splits, seed=seed)
    return np.ascontiguousarray(found.T).mean(axis=0)


def _split_half_pairs(trace: RoutingTrace, seed: int) -> np.ndarray:
    """[L] the same of the pairs, for one split."""
    ids, part = np.unique(trace.tokens_only("pairs").request_id, return_inverse=True)
    if len(ids) < 2:
        return np.full(trace.num_layers, np.nan)
    chosen = np.zeros(len(ids), bool)
    chosen[np.random.default_rng(seed).permutation(len(ids))[: len(ids) // 2]] = True
    halves = (trace.take(rows) for rows in (chosen[part], ~chosen[part]))
    return jensen_shannon_bits(*(_upper(count_coactivation(half).pairs) for half in halves))


def _upper(pairs: np.ndarray) -> np.ndarray:
    return pairs[(..., *np.triu_indices(pairs.shape[-1], 1))]
