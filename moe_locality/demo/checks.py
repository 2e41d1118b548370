"""What must hold between the runs of the demo; a failed check ends it with the figures."""

from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from moe_locality.compare import Run
from moe_locality.errors import MoeLocalityError
from moe_locality.placement import PlacementPlan, evaluate
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace

LOSS_TOLERANCE = 1e-4
LOGIT_TOLERANCE = 1e-3
"""fp32 on a CPU: the runs differ in the order of sums inside matrix products only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Largest differences between two runs of the same requests and of the same training steps."""

    requests: int
    max_loss_difference: float
    max_logit_difference: float
    train_steps: int
    max_train_loss_difference: float

    def worse(self, other: "Agreement") -> "Agreement":
        """The largest differences of two comparisons of the same size."""
        return Agreement(
            **{name: max(getattr(self, name), getattr(other, name)) for name in FIELDS}
        )


FIELDS = tuple(field.name for field in fields(Agreement))


def check_agreement(first: Run, second: Run) -> Agreement:
    """Compare losses and logits request by request, and the losses of the training steps.

    Raises:
        MoeLocalityError: the runs do not hold the same requests, or differ by more than rounding.
    """
    a, b = first.evaluation or {}, second.evaluation or {}
    if not np.array_equal(a["request_id"], b["request_id"]):
        raise MoeLocalityError(
            f"runs {first.path} and {second.path} hold different requests: use the same seed"
        )
    steps_a, steps_b = first.loss_curve(), second.loss_curve()
    if steps_a is None or steps_b is None or not np.array_equal(steps_a[0], steps_b[0]):
        raise MoeLocalityError(
            f"runs {first.path} and {second.path} hold different training steps: remove the "
            "directories and run again"
        )
    found = Agreement(
        requests=len(a["request_id"]),
        max_loss_difference=float(np.abs(a["loss"] - b["loss"]).max()),
        max_logit_difference=float(np.abs(a["last_logits"] - b["last_logits"]).max()),
        train_steps=len(steps_a[0]),
        max_train_loss_difference=float(np.abs(steps_a[1] - steps_b[1]).max()),
    )
    losses = max(found.max_loss_difference, found.max_train_loss_difference)
    if losses > LOSS_TOLERANCE or found.max_logit_difference > LOGIT_TOLERANCE:
        raise MoeLocalityError(
            f"a placement must not change what the model computes, but {first.name} and "
            f"{second.name} differ: {found}"
        )
    return found


def check_prediction(
    run: Run,
    trace: RoutingTrace,
    plan: PlacementPlan,
    topology: ClusterTopology,
    cost: Literal["picks", "copies"],
) -> dict[str, Any]:
    """Compare the rows that the layers counted with what ``evaluate`` predicts from the trace.

    ``cost``: what the exchange sends, a row for each remote pick (flat) or for each remote node of
    a token (hierarchical).

    Returns predicted and counted cross-node rows and bytes of the dispatch.

    Raises:
        MoeLocalityError: they differ.
    """
    traffic = run.traffic or {}
    rows, size = (traffic[key]["dispatch"]["cross_node"] for key in ("rows_by_link", "by_link"))
    costs = evaluate(trace, plan, topology, ranks_of_requests(run))
    predicted = costs.total_picks if cost == "picks" else costs.total_copies
    result = {"predicted_rows": predicted, "counted_rows": rows, "counted_bytes": size}
    if predicted != rows:
        raise MoeLocalityError(
            f"run {run.name}: the layers counted {rows} rows across nodes, the prediction from the "
            f"recorded trace is {predicted}: the trace is not of this model, or a counter is wrong"
        )
    return result


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
