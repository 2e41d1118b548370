"""What must hold between the runs of the demo; a failed check ends it with the figures."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from moe_locality.compare import Run, read_arrays
from moe_locality.errors import MoeLocalityError
from moe_locality.placement import PlacementPlan, evaluate
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace

LOSS_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 1e-3
"""fp32 on a CPU: the runs differ in the order of sums inside matrix products only."""

GAP_TOLERANCE = 2e-5
"""Two router logits this near are a tie: rounding moved their gap by 1.8e-6 at most (3 seeds)."""

NEAR_TIE_SHARE = 5e-5
"""Most (token, layer) pairs that rounding may flip, as a share of all (one is always allowed)."""

AFTER_FLIP_TOLERANCE = 0.05
"""Nats. A flip in training changes weights by more than rounding: later losses agree roughly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How two runs of the same requests and of the same training steps differ.

    Another order of sums can flip a pick whose score is tied to the level of rounding; the later
    tokens and layers of that request then compute something else. Differences are the largest of
    requests (training steps) that no flip has touched; ``after_flips`` are those of the others.

    pairs: (token, layer) pairs compared. flips: those whose picks differ. near_ties: flips that no
        earlier flip explains. max_gap: largest gap of router logits that those crossed.
    """

    requests: int
    pairs: int
    flips: int
    near_ties: int
    max_gap: float
    flipped_requests: int
    max_loss_difference: float
    max_logit_difference: float
    max_loss_difference_after_flips: float
    train_steps: int = 0
    train_steps_after_flips: int = 0
    max_train_loss_difference: float = 0.0
    max_train_loss_difference_after_flips: float = 0.0


def check_agreement(first: Run, second: Run, *, training: bool = True) -> Agreement:
    """Compare picks, losses and logits request by request, and the training steps after them
    (``training=False``: one of the runs has not trained on). MoeLocalityError: the runs do not hold
    the same requests, or differ by more than rounding and the flips of near-ties that it makes.
    """
    found = _compare_rows(first, second, first.evaluation or {}, second.evaluation or {})
    if not training:
        return found
    steps_a, steps_b = first.loss_curve(), second.loss_curve()
    if steps_a is None or steps_b is None or not np.array_equal(steps_a[0], steps_b[0]):
        raise MoeLocalityError(
            f"runs {first.path} and {second.path} hold different training steps: remove the "
            "directories and run again"
        )
    rows = [read_arrays(run.path / "continued.npz") for run in (first, second)]
    for part in rows:
        part.pop("domains", None)  # the others have a row per request
    differences = np.abs(steps_a[1] - steps_b[1])
    untouched = 0  # steps that began with the same weights
    for step in steps_a[0]:
        pair = [
            {name: values[part["step"] == step] for name, values in part.items()} for part in rows
        ]
        of_step = _compare_rows(first, second, *pair)
        more = ("pairs", "flips", "near_ties")
        sums = {name: getattr(found, name) + getattr(of_step, name) for name in more}
        # requests and their differences stay those of the first
        found = replace(found, **sums, max_gap=max(found.max_gap, of_step.max_gap))
        if of_step.flips:
            break
        untouched += 1
    found = replace(
        found,
        train_steps=len(differences),
        train_steps_after_flips=len(differences) - untouched,
        max_train_loss_difference=float(differences[:untouched].max(initial=0)),
        max_train_loss_difference_after_flips=float(differences[untouched:].max(initial=0)),
    )
    if (
        found.max_train_loss_difference > LOSS_TOLERANCE
        or found.max_train_loss_difference_after_flips > AFTER_FLIP_TOLERANCE
    ):
        _refuse(first, second, found)
    return found


def _compare_rows(first: Run, second: Run, a: dict, b: dict) -> Agreement:
    """Rows of the same requests, computed with the same weights."""
    if not np.array_equal(a["request_id"], b["request_id"]):
        raise MoeLocalityError(
            f"runs {first.path} and {second.path} hold different requests: use the same seed"
        )
    flip = (a["picks"] != b["picks"]).any(axis=3)  # [N, S, L]
    # a flip reaches later layers of its token, and through attention those of later tokens
    in_earlier_layer = np.zeros_like(flip)
    in_earlier_layer[:, :, 1:] = np.logical_or.accumulate(flip, axis=2)[:, :, :-1]
    near_tie = flip & ~np.logical_or.accumulate(in_earlier_layer, axis=1)
    gap = (a["gap"] + b["gap"])[near_tie]  # the order of two experts turned: both gaps were crossed
    touched = np.logical_or.accumulate(flip.any(axis=2), axis=1)  # [N, S]
    whole = ~touched.any(axis=1)
    loss = np.abs(a["loss"] - b["loss"])
    logits = np.abs(a["last_logits"] - b["last_logits"]).max(axis=1)
    tokens = np.abs(a["token_loss"] - b["token_loss"])[~touched]
    found = Agreement(
        requests=whole.size,
        pairs=flip.size,
        flips=int(flip.sum()),
        near_ties=int(near_tie.sum()),
        max_gap=float(gap.max(initial=0)),
        flipped_requests=int((~whole).sum()),
        max_loss_difference=float(loss[whole].max(initial=0)),
        max_logit_difference=float(logits[whole].max(initial=0)),
        max_loss_difference_after_flips=float(loss[~whole].max(initial=0)),
    )
    if (
        found.max_loss_difference > LOSS_TOLERANCE
        or max(found.max_logit_difference, tokens.max(initial=0)) > LOGIT_TOLERANCE
        or found.max_gap > GAP_TOLERANCE
        or found.near_ties > max(1, NEAR_TIE_SHARE * found.pairs)
    ):
        _refuse(first, second, found)
    return found


def _refuse(first: Run, second: Run, found: Agreement) -> None:
    raise MoeLocalityError(
        f"a placement must not change what the model computes, but {first.name} and {second.name} "
        f"differ by more than rounding and the near-ties that it flips (gap of router logits up to "
        f"{GAP_TOLERANCE:g}, {NEAR_TIE_SHARE:g} of the pairs): {found}"
    )


def check_prediction(
    run: Run,
    trace: RoutingTrace,
    plan: PlacementPlan,
    topology: ClusterTopology,
    cost: Literal["picks", "copies"],
    *,
    flips: int = 0,
) -> dict[str, Any]:
    """Return the rows and bytes across nodes that the layers counted in the dispatch, beside the
    rows that ``evaluate`` predicts from the trace.

    ``cost``: what the exchange sends, a row for each remote pick (flat) or for each remote node of
    a token (hierarchical). ``flips``: (token, layer) pairs that rounding has flipped since the
    trace was recorded; for those the run's own picks are taken. MoeLocalityError: rows differ, or
    other picks than those flipped do.
    """
    traffic = run.traffic or {}
    rows, size = (traffic[key]["dispatch"]["cross_node"] for key in ("rows_by_link", "by_link"))
    requests = run.evaluation or {}
    row = np.searchsorted(requests["request_id"], np.asarray(trace.request_id))
    picked = requests["picks"][row, trace.position]  # [T, L, K], ascending
    recorded = np.sort(np.asarray(trace.expert_ids), axis=2)
    other = int((recorded != picked).any(axis=2).sum())
    again = trace.evolve(expert_ids=picked, expert_weights=None)

    costs = [evaluate(of, plan, topology, ranks_of_requests(run)) for of in (trace, again)]
    predicted, of_own_picks = (getattr(one, f"total_{cost}") for one in costs)
    if of_own_picks != rows or other > flips:
        raise MoeLocalityError(
            f"run {run.name}: the layers counted {rows} rows across nodes, the prediction from the "
            f"recorded trace is {predicted}, {other} picks differ from it (by "
            f"rounding {flips} may): the trace is not of this model, or a counter is wrong"
        )
    return {"predicted_rows": predicted, "counted_rows": rows, "counted_bytes": size}


def ranks_of_requests(run: Run) -> dict[int, int]:
    """Where each request really ran."""
    rows = run.evaluation or {}
    return dict(zip(rows["request_id"].tolist(), rows["rank"].tolist(), strict=True))


def counted_imbalance(run: Run, topology: ClusterTopology) -> dict[str, float]:
    """Max / mean of the rows that the experts of nodes and ranks worked on, mean over layers."""
    nodes, ranks = [], []
    for layer in (run.traffic or {})["per_layer"]:
        received = np.asarray(layer["load"])
        by_node = np.bincount(topology.rank_to_node, weights=received)
        nodes.append(by_node.max() / by_node.mean())
        ranks.append(received.max() / received.mean())
    return {"node": float(np.mean(nodes)), "rank": float(np.mean(ranks))}
