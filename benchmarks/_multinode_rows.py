"""What benchmarks/multinode.py replays, predicts and reports: arrays in, rows of results out."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_locality.placement import PlacementPlan, evaluate
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace

DIRECTIONS = 4
"""dispatch, combine and the gradients of both: as many rows between nodes each time"""


def closed_form(experts: int, top_k: int, nodes: int) -> float:
    """Rows between nodes of every pick by itself over those of a token once per node.

    Uniform routing without repeats: a pick is on another node with probability (M - 1) / M, a
    remote node has none of the k picks with probability C(E - E/M, k) / C(E, k).
    """
    none = math.comb(experts - experts // nodes, top_k) / math.comb(experts, top_k)
    return (top_k / nodes) / (1 - none)


def uniform_batches(ranks: int, tokens: int, experts: int, top_k: int, seed: int = 0) -> np.ndarray:
    """[1, 1, G, T, K] routes: every set of k different experts as likely as any other."""
    scores = np.random.default_rng(seed).random((1, 1, ranks, tokens, experts))
    return scores.argsort(axis=-1)[..., :top_k].astype(np.int16)


def replayed_batches(
    trace: RoutingTrace, homes: Mapping[int, int], *, ranks: int, tokens: int, steps: int, skip: int
) -> np.ndarray:
    """[S, L, G, T, K] routes of the tokens of each rank's requests, S = ``steps``.

    As when decoding: all requests of a rank advance together, one token each. The first ``skip``
    tokens of a request are left out (homes are predicted from them). Where a rank's tokens end, it
    starts again.
    """
    assert trace.expert_ids is not None
    assert trace.request_id is not None
    assert trace.position is not None
    home = np.array([homes[int(request)] for request in trace.request_id])
    since = trace.position.astype(np.int64) - _first_positions(trace)
    order = np.lexsort((trace.request_id, since))
    order = order[since[order] >= skip]
    layers, top_k = trace.expert_ids.shape[1:]
    batches = np.empty((steps, layers, ranks, tokens, top_k), np.int16)
    for rank in range(ranks):
        ids = trace.expert_ids[order[home[order] == rank]]
        if not len(ids):
            raise ValueError(f"rank {rank} is home to no token: replay more requests")
        cut = np.resize(ids, (steps, tokens, layers, top_k))
        batches[:, :, rank] = cut.transpose(0, 2, 1, 3)
    return batches


def _first_positions(trace: RoutingTrace) -> np.ndarray:
    assert trace.request_id is not None
    assert trace.position is not None
    _, request = np.unique(trace.request_id, return_inverse=True)
    first = np.full(request.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, request, trace.position.astype(np.int64))
    return first[request]


def predicted_rows(
    batches: np.ndarray, plan: PlacementPlan, topology: ClusterTopology
) -> dict[str, np.ndarray]:
    """Rows between nodes of one dispatch, ``[S, L]``, as ``evaluate`` predicts them: ``flat``
    (picks) and ``hierarchical`` (copies). ``plan`` has the L layers of ``batches [S, L, G, T, K]``.
    """
    steps, layers, ranks, tokens, _ = batches.shape
    found = {name: np.empty((steps, layers), np.int64) for name in ("flat", "hierarchical")}
    request = np.repeat(np.arange(ranks), tokens)
    for step in range(steps):
        ids = batches[step].transpose(1, 2, 0, 3).reshape(ranks * tokens, layers, -1)
        trace = RoutingTrace(
            model="replayed",
            num_experts=plan.num_experts,
            layer_ids=np.asarray(plan.layer_ids, np.int32),
            domain=("none",),
            expert_ids=ids,
            request_id=request,
            position=np.tile(np.arange(tokens, dtype=np.int32), ranks),
            stage=np.zeros(len(ids), np.uint8),
            domain_id=np.zeros(len(ids), np.int32),
        )
        costs = evaluate(trace, plan, topology, {rank: rank for rank in range(ranks)})
        for name, per_token in (("flat", "picks"), ("hierarchical", "copies")):
            found[name][step] = np.rint(costs.per_layer[per_token] * len(ids))
    return found


def gathered(everyone: Sequence[Mapping[str, Any]], case: int) -> dict[str, np.ndarray]:
    """One case from what all ranks measured: arrays over the R steps.

    ``seconds [R]`` until the slowest rank was done, ``cpu_s [R]`` of all ranks, ``sent [R, M]`` and
    ``received [R, M]`` bytes of every node's link, ``rows [R]`` and ``counted [R]`` (rows and bytes
    between nodes by our counters); ``dispatch_sent``, ``dispatch_rows`` and ``dispatch_counted``
    where that was watched.
    """
    steps = [rank["cases"][case] for rank in everyone]
    first_of_node = {rank["node"]: i for i, rank in reversed(list(enumerate(everyone)))}
    firsts = sorted(first_of_node.values())
    found = {
        "seconds": np.array([step["seconds"] for step in steps[0]]),
        "cpu_s": np.array([[step["cpu_s"] for step in mine] for mine in steps]).sum(axis=0),
    }
    for mark, prefix in (("step", ""), ("dispatch", "dispatch_")):
        if mark not in steps[0][0]:
            continue
        links = np.array([[step[mark]["link"] for step in steps[rank]] for rank in firsts])
        counts = np.array([[step[mark]["counted"] for step in mine] for mine in steps])
        found[f"{prefix}sent"] = links[..., 0].T
        found[f"{prefix}received"] = links[..., 1].T
        found[f"{prefix}rows"] = counts[..., 0].sum(axis=0)
        found[f"{prefix}counted"] = counts[..., 1].sum(axis=0)
    return found


def check_rows(name: str, counted: np.ndarray, predicted: np.ndarray) -> None:
    """Raise unless every step's counted rows are those that ``evaluate`` predicts."""
    if counted.tolist() != predicted.tolist():
        raise RuntimeError(
            f"{name}: counted {counted.tolist()} rows between nodes, predicted {predicted.tolist()}"
        )


def row(case: str, metric: str, value: float, unit: str, note: str, **more: str) -> dict[str, Any]:
    common = {"benchmark": "multinode", "case": case, "metric": metric, "kind": "measured"}
    return {**common, "value": f"{value:.5g}", "unit": unit, "note": note, **more}


def bytes_rows(
    where: str, found: Mapping[str, Mapping[str, np.ndarray]], form: float, note: str
) -> list[dict[str, Any]]:
    """Rows of one number of nodes: ``found`` has ``flat`` and ``hierarchical``.

    ``form``: what :func:`closed_form` says.
    """
    rows = []
    for exchange, name in (("flat", "every pick"), ("hierarchical", "once per node")):
        counted, wire = found[exchange]["counted"].mean(), found[exchange]["sent"].sum(1).mean()
        per_direction = found[exchange]["rows"].mean() / DIRECTIONS
        rows += [
            row(where, f"rows of a direction, {name}", per_direction, "rows", note),
            row(where, f"counted, {name}", counted / 1e6, "MB", note),
            row(where, f"on the wire, {name}", wire / 1e6, "MB", note),
            row(where, f"wire over counted, {name}", 100 * (wire / counted - 1), "%", note),
        ]
    flat, ours = found["flat"], found["hierarchical"]
    rows += [
        row(where, "fewer, counted rows", _ratio(flat, ours, "rows"), "x", note),
        row(where, "fewer, counted bytes", _ratio(flat, ours, "counted"), "x", note),
        row(where, "fewer, on the wire", _ratio(flat, ours, "sent"), "x", note),
        row(where, "fewer, closed form", form, "x", note, kind="simulated"),
    ]
    return rows


def payload_rows(
    where: str, found: Mapping[str, Mapping[str, np.ndarray]], note: str
) -> list[dict[str, Any]]:
    """Rows of the bytes of a dispatch in each payload against ``none``."""
    rows = []
    for payload, mine in found.items():
        case = f"{where}, payload {payload}"
        for metric, key in (("counted", "dispatch_counted"), ("on the wire", "dispatch_sent")):
            size = mine[key].sum() / len(mine["seconds"])
            rows.append(row(case, f"dispatch, {metric}", size / 1e6, "MB", note))
            if payload != "none":
                ratio = _ratio(found["none"], mine, key)
                more = {"baseline": "payload none"}
                rows.append(row(case, f"dispatch fewer, {metric}", ratio, "x", note, **more))
    return rows


def _ratio(base: Mapping[str, np.ndarray], ours: Mapping[str, np.ndarray], key: str) -> float:
    return float(base[key].sum() / ours[key].sum())


def wire_over_counted(mine: Mapping[str, np.ndarray]) -> float:
    """Percent that the links carried more than our counters say: headers and counts."""
    return float(100 * (mine["sent"].sum() / mine["counted"].sum() - 1))


def step_rows(
    where: str,
    found: Mapping[str, Mapping[str, np.ndarray]],
    compared: Sequence[tuple[str, str]],
    bytes_per_s: float,
) -> list[dict[str, Any]]:
    """Rows of the times: per case and per compared (baseline, case) of ``found``."""
    rows = []
    for name, mine in found.items():
        case, ms = f"{where}: {name}", 1e3 * mine["seconds"]
        busiest = np.maximum(mine["sent"], mine["received"]).max(axis=1)
        note = f"{len(ms)} rounds in turns; links of one machine"
        rows += [
            row(case, "step, median", float(np.median(ms)), "ms", note),
            row(case, "step, lowest", float(ms.min()), "ms", note),
            row(case, "step, highest", float(ms.max()), "ms", note),
            row(case, "sent by all nodes", mine["sent"].sum(1).mean() / 1e6, "MB/step", note),
            row(case, "busiest link", busiest.mean() / 1e6, "MB/step", note),
            row(
                case,
                "busiest link at its rate",
                1e3 * busiest.mean() / bytes_per_s,
                "ms",
                f"measured bytes over the rate of the link; {note}",
                kind="simulated",
            ),
            *(
                [row(case, "wire over counted", wire_over_counted(mine), "%", note)]
                if mine["counted"].all()
                else []
            ),
            row(case, "CPU of all ranks", 1e3 * float(np.median(mine["cpu_s"])), "ms", note),
        ]
    for base, name in compared:
        ratios = (found[base]["seconds"] / found[name]["seconds"]).tolist()
        note = f"rounds from {min(ratios):.2f} to {max(ratios):.2f}"
        speed = statistics.median(ratios)
        case = f"{where}: {name}"
        rows.append(row(case, "speed, median of rounds", speed, "x", note, baseline=base))
        change = 100 * (1 / speed - 1)
        rows.append(row(case, "time, median of rounds", change, "%", note, baseline=base))
    return rows
