"""Whether plans are as level on unseen requests as they promise, over many splits of a trace.

What is unseen is drawn in three ways: request by request, domain by domain, and in blocks of
requests next to each other in number. The plan is told which (``sampling_unit``), except for
requests, where it has to find out. A promise is the mean over possible requests: about half of the
splits should be above it.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from placement_cases import CHAT, COLLAPSED, GPT, LLAMA, cluster
from placement_rows import Row

from moe_locality.placement import evaluate, solve
from moe_locality.trace import RoutingTrace

SPLITS = 24
SHARE = 0.7
EVERY = 3
"""Every third layer: layers of a trace are level or not together, so more tell little more."""

BLOCK = 16
CALIBRATED = tuple(
    (name, nodes, by)
    for name, nodes, ways in (
        (GPT, 4, ("request", "domain", "block")),
        (GPT, 8, ("request", "domain", "block")),
        (CHAT, 4, ("request", "block")),
        (LLAMA, 4, ("request",)),
    )
    for by in ways
)
BIAS, ABOVE = 0.005, 0.55


def units_of(trace: RoutingTrace, by: str) -> tuple[np.ndarray, np.ndarray]:
    """([R] unit of each request, [T] number of the request of each token)."""
    requests, first, index = np.unique(trace.request_id, return_index=True, return_inverse=True)
    if by == "domain":
        assert trace.domain_id is not None
        return trace.domain_id[first], index
    return np.arange(len(requests)) // (BLOCK if by == "block" else 1), index


def split_units(trace: RoutingTrace, by: str, seed: int) -> tuple[RoutingTrace, RoutingTrace]:
    """Split whole units at random; the first part has at least ``SHARE`` of the requests."""
    unit, index = units_of(trace, by)
    drawn = np.random.default_rng(seed).permutation(np.unique(unit))
    sizes = np.cumsum([(unit == some).sum() for some in drawn])
    count = min(int(np.searchsorted(sizes, SHARE * len(unit))) + 1, len(drawn) - 1)
    first = np.isin(unit, drawn[:count])[index]
    return trace.take(first), trace.take(~first)


def calibration_rows(folder: Path, name: str, nodes: int, by: str) -> list[Row]:
    """Mean of held-out less promised imbalance, and the share of the splits above the promise."""
    trace = RoutingTrace.from_npz(folder / f"{name}.npz")
    layers = [int(i) for i in trace.layer_ids if int(i) != COLLAPSED.get(name, -1)]
    trace = trace.filter(layers=layers[::EVERY])
    topology = cluster(nodes, trace.num_experts)
    assert topology is not None
    unit = {"request": "auto", "domain": "domain", "block": BLOCK}[by]
    found, promised = [], []
    for seed in range(SPLITS):
        train, test = split_units(trace, by, seed)
        plan = solve(train, topology, sampling_unit=unit)
        promised.append(plan.provenance["expected_imbalance"])
        found.append(evaluate(test, plan, topology).node_imbalance)
    less = np.array(found) - np.array(promised)
    error = float(less.std(ddof=1) / np.sqrt(SPLITS))
    case = f"calibration: {name} {nodes} nodes, split by {by}"
    note = (
        f"{SPLITS} splits, every {EVERY}rd layer, default cap, sampling_unit {unit}; found "
        f"{np.mean(found):.4f}, promised {np.mean(promised):.4f}, standard error {error:.4f}"
    )
    bias = Row(
        case=case,
        metric="bias_of_promised_imbalance",
        value=float(less.mean()),
        unit="max/mean",
        note=f"within {BIAS}: {'yes' if abs(less.mean()) <= BIAS else 'no'}; {note}",
    )
    above = Row(
        case=case,
        metric="share_above_promise",
        value=float((less > 0).mean()),
        target=ABOVE,
        note=note,
    )
    return [bias, above]


def pooled(rows: list[Row]) -> list[Row]:
    """The means over all cases."""
    found: list[Row] = []
    for metric in ("bias_of_promised_imbalance", "share_above_promise"):
        each = [row.value for row in rows if row.metric == metric]
        value, note = float(np.mean(each)), f"mean of {len(each)} cases x {SPLITS} splits"
        row = Row(case="calibration: all cases", metric=metric, value=value, note=note)
        if metric == "share_above_promise":
            row = replace(row, target=ABOVE)
        else:
            inside = "yes" if abs(value) <= BIAS else "no"
            row = replace(row, unit="max/mean", note=f"within {BIAS}: {inside}; {note}")
        found.append(row)
    return found
