"""Distinct experts that a batch of requests wakes up, requests at random or of one home; and what
crosses nodes under the transports of other engines.

A step of decoding computes one token of each request of a batch. Every expert that any of them
picks must be read from memory once, so fewer distinct experts per step are less memory traffic
(micro-batch grouping of arXiv:2604.23150, section 4.1).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from placement_cases import GPT, Parts, parts
from placement_rows import Row, against

from moe_locality.placement import PlacementPlan, assign_homes, evaluate, solve
from moe_locality.placement.export import ENGINE_RULES
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace import RoutingTrace

BATCH_REQUESTS = 16
SHUFFLES = 5
SKIPPED = {"first:16": 16, "first:32": 32, "prefill": 0}  # what homes were predicted from

BATCH_TOKENS = 64
TRANSPORT_CASES = ((GPT, 4, 2), ("deepseek_v2_lite_esft_tasks", 4, 4))
PLANS: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear"},
    "eplb": {"method": "eplb"},
    "copies, cap 1.05": {"max_imbalance": 1.05},
    "rank_copies, cap 1.1": {"objective": "rank_copies", "max_imbalance": 1.1},
    "one layout, cap 1.05": {"one_layout": True, "max_imbalance": 1.05},
}


def grouping_rows(folder: Path) -> Iterator[Row]:
    """Held-out requests in batches of ``BATCH_REQUESTS``, with homes predicted and at random."""
    for name in (GPT,):  # of the traces the one with long decoding
        data = parts(folder, name)
        topology = ClusterTopology.uniform(4, 2)
        plan = solve(data.train, topology, homes="joint")
        homes = assign_homes(data.test, plan, topology, predict=data.predict)
        steps = steps_of(data.test, SKIPPED[data.predict])
        rng = np.random.default_rng(0)
        found = {"homes at random": [], "predicted homes": []}
        for _ in range(SHUFFLES):
            order = rng.permutation(sorted(steps))
            found["homes at random"].append(distinct(data.test, steps, [list(order)]))
            by_home = [[r for r in order if homes[int(r)] == rank] for rank in range(8)]
            found["predicted homes"].append(distinct(data.test, steps, by_home))
        base = float(np.mean(found["homes at random"]))
        for label, values in found.items():
            yield Row(
                case=f"batches of {BATCH_REQUESTS} requests: {name} 4 nodes x 2 ranks, {label}",
                metric="distinct",
                value=float(np.mean(values)),
                unit="experts per layer and step",
                note=f"of {data.test.num_experts}; {100 * (np.mean(values) / base - 1):+.1f} % "
                f"against homes at random; mean of {SHUFFLES} orders of {len(steps)} held-out "
                f"requests, steps after the tokens that homes were predicted from",
            )


def transport_rows(folder: Path, name: str, nodes: int, per_node: int) -> list[Row]:
    """Rows across nodes under two transports and the imbalance, against linear; homes at random."""
    data, topology = parts(folder, name), ClusterTopology.uniform(nodes, per_node)
    plans = {label: solve(data.train, topology, **options) for label, options in PLANS.items()}
    rows = []
    for transport in ("once_per_node", "per_rank"):
        costs = {
            label: evaluate(data.test, plan, transport=transport, batch_tokens=BATCH_TOKENS)
            for label, plan in plans.items()
        }
        base = costs["linear"].crossing
        for label, cost in costs.items():
            case = f"transports: {name} {nodes} nodes x {per_node}, {label}"
            value = 100 * (cost.crossing / base - 1)
            note = f"{cost.crossing:.4f} rows per token and layer; {data.words}"
            rows.append(Row(case=case, metric=f"crossing_{transport}", value=value, note=note))
            if transport == "per_rank":
                for metric in ("node_imbalance", "rank_imbalance", "straggler", "idle"):
                    note = f"batches of {BATCH_TOKENS} tokens" * (metric in ("straggler", "idle"))
                    rows.append(
                        Row(case=case, metric=metric, value=getattr(cost, metric), note=note)
                    )
    return rows + rule_rows(data, topology, plans["linear"])


def rule_rows(data: Parts, topology: ClusterTopology, linear: PlacementPlan) -> list[Row]:
    """A plan with 25 % replicas, its copies served as planned and as other engines serve them."""
    redundant, rows = data.train.num_experts // 4, []
    plan = solve(data.train, topology, num_redundant_experts=redundant, max_imbalance=1.05)
    base, shape = evaluate(data.test, linear), f"{topology.num_nodes} nodes x"
    for rule in (None, *ENGINE_RULES):
        cost = evaluate(data.test, plan, rule=rule)
        words = f"{redundant} replicas, cap 1.05, served {rule or 'as planned'}"
        case = f"engines: {data.name} {shape} {topology.ranks_per_node}, {words}"
        for metric, value in against(cost, base).items():
            rows.append(Row(case=case, metric=metric, value=value, note=data.words))
    return rows


def steps_of(trace: RoutingTrace, skipped: int) -> dict[int, np.ndarray]:
    """The rows of the trace of each request in order of position, without the first ``skipped``."""
    assert trace.request_id is not None
    assert trace.position is not None
    order = np.lexsort((trace.position, trace.request_id))
    requests, first = np.unique(trace.request_id[order], return_index=True)
    rows = np.split(order, first[1:])
    return {
        int(request): own[skipped:]
        for request, own in zip(requests, rows, strict=True)
        if len(own) > skipped
    }


def distinct(trace: RoutingTrace, steps: dict[int, np.ndarray], queues: list[list[int]]) -> float:
    """Mean over full steps and layers of the distinct experts of a batch.

    Consecutive requests of a queue are a batch, what is left of it is in none; the steps of a batch
    last until its first request ends.
    """
    assert trace.expert_ids is not None
    total, count = 0, 0
    batches = [
        queue[start : start + BATCH_REQUESTS]
        for queue in queues
        for start in range(0, len(queue) - BATCH_REQUESTS + 1, BATCH_REQUESTS)
    ]
    for batch in batches:
        rows = [steps[int(request)] for request in batch]
        length = min(map(len, rows))
        ids = trace.expert_ids[np.stack([own[:length] for own in rows])]  # [B, S, L, K]
        ids = ids.transpose(1, 2, 0, 3).reshape(length * trace.num_layers, -1).astype(np.int64)
        used = np.zeros((len(ids), trace.num_experts + 1), dtype=bool)
        used[np.arange(len(ids))[:, None], ids] = True  # -1 (no pick) is the last column
        total += int(used[:, :-1].sum())
        count += len(ids)
    return total / max(count, 1)
