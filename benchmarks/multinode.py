"""Forward and backward of one MoE layer on nodes with slow links: DeepSpeed's layer and ours.

The nodes are network namespaces of this machine, joined by links of a given rate
(docs/multinode.md): the figures say what bytes cost where links decide, and nothing about a real
network. Recorded routing of gpt-oss-20b (one layer, held-out requests) is replayed; all cases take
turns in one run. ``random`` homes are drawn per request; ``predicted`` ones follow from the first
tokens of the request and the plan, which was made from other requests.

    MOE_LOCALITY_DATA=... python benchmarks/multinode.py [--nodes 4] [--csv benchmarks/results.csv]
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from _nodes import Nodes, why_not
from _results import append_rows

from moe_locality.placement import PlacementPlan, assign_homes, solve
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace

PROGRAM = Path(__file__).with_name("_multinode_program.py")
TRACE = "gpt_oss_20b_benchmarks"
PREDICT = "first:32"
STOCK = "DeepSpeed's layer"
LINEAR, PLACED = "hierarchical, linear, random homes", "hierarchical, plan, predicted homes"


def batches_of(
    trace: RoutingTrace, homes: dict[int, int], ranks: int, tokens: int, steps: int
) -> np.ndarray:
    """[S, G, T, K] routes: rank g's requests one after another, and from the start again."""
    assert trace.expert_ids is not None
    assert trace.request_id is not None
    home = np.array([homes[int(request)] for request in trace.request_id])
    per_rank = []
    for rank in range(ranks):
        ids = trace.expert_ids[home == rank, 0]
        per_rank.append(np.resize(ids, (steps, tokens, ids.shape[1])))
    return np.stack(per_rank, axis=1)


def prepare(folder: Path, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Write plan, batches and cases; return the cases."""
    data = Path(os.environ["MOE_LOCALITY_DATA"])
    trace = RoutingTrace.from_npz(data / f"{TRACE}.npz").select_layers([chosen.layer])
    train, test = trace.split(0.7, seed=0)
    topology = ClusterTopology.uniform(chosen.nodes, chosen.slots)
    plan: PlacementPlan = solve(train, topology, homes="joint", seed=0)
    plan.write(folder / "plan.json")
    ranks = topology.num_ranks
    rng = np.random.default_rng(0)
    homes = {
        "random": {int(request): int(rng.integers(ranks)) for request in test.request_ids},
        "predicted": assign_homes(test, plan, topology, predict=PREDICT),
    }
    steps = chosen.warmup + chosen.rounds
    made = {k: batches_of(test, h, ranks, chosen.tokens, steps) for k, h in homes.items()}
    np.savez(folder / "batches.npz", **made)
    cases = [
        {"name": STOCK, "exchange": "stock", "plan": None, "homes": "random"},
        {"name": "flat, linear, random homes", "exchange": "flat", "plan": None, "homes": "random"},
        {"name": LINEAR, "exchange": "hierarchical", "plan": None, "homes": "random"},
        {
            "name": PLACED,
            "exchange": "hierarchical",
            "plan": str(folder / "plan.json"),
            "homes": "predicted",
        },
    ]
    top_k = made["random"].shape[-1]
    sizes = {"experts": trace.num_experts, "top_k": top_k, "width": chosen.width, "hidden": 64}
    given = {"cases": cases, "sizes": sizes, "warmup": chosen.warmup, "rounds": chosen.rounds}
    (folder / "cases.json").write_text(json.dumps(given))
    return cases


def rows_of(cases: list[dict[str, Any]], seconds: list[list[float]], where: str) -> list[dict]:
    found = dict(zip([case["name"] for case in cases], seconds, strict=True))
    common = {"benchmark": "multinode", "kind": "measured", "note": "emulated links, one machine"}
    rows = []
    for name, took in found.items():
        ms = [1000 * value for value in took]
        row = {"case": f"{where}, {name}", "metric": "step, median", "unit": "ms"}
        span = f"range {min(ms):.0f}-{max(ms):.0f} of {len(ms)} rounds in turns; {common['note']}"
        rows.append({**common, **row, "value": round(statistics.median(ms), 1), "note": span})
    for base, name in ((STOCK, LINEAR), (STOCK, PLACED), (LINEAR, PLACED)):
        ratios = [a / b for a, b in zip(found[base], found[name], strict=True)]
        row = {"case": f"{where}, {name}", "metric": "speed, median of rounds", "unit": "x"}
        rows.append(
            {**common, **row, "value": round(statistics.median(ratios), 2), "baseline": base}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--slots", type=int, default=1, help="ranks per node")
    parser.add_argument("--mbit", type=float, default=200, help="rate of a node's link")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per rank and step")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layer", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--csv", type=Path)
    chosen = parser.parse_args()
    if "MOE_LOCALITY_DATA" not in os.environ:
        sys.exit("MOE_LOCALITY_DATA is not set: it names the directory of real routing traces")
    reason = why_not()
    if reason is not None:
        sys.exit(f"no nodes on this machine: {reason}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = prepare(folder, chosen)
        files = [str(folder / file) for file in ("cases.json", "batches.npz", "seconds.json")]
        with Nodes(chosen.nodes, slots=chosen.slots, mbit_per_s=chosen.mbit) as nodes:
            done = nodes.finish(nodes.start(PROGRAM, files), limit_s=1800)
        if done.code != 0:
            sys.exit(done.output[-6000:])
        seconds = json.loads(Path(files[-1]).read_text())
    where = f"{chosen.nodes} nodes x {chosen.slots}, {chosen.mbit:g} Mbit/s, gpt-oss layer"
    rows = rows_of(cases, seconds, f"{where} {chosen.layer}, T={chosen.tokens} D={chosen.width}")
    for row in rows:
        print(f"{row['case']}: {row['metric']} {row['value']} {row['unit']} ({row['note']})")
    if chosen.csv is not None:
        append_rows(chosen.csv, rows, packages=("torch", "deepspeed"))


if __name__ == "__main__":
    main()
