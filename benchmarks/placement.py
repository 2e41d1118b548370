"""What placements cost on recorded traces, on requests that the solver has not seen.

    MOE_LOCALITY_DATA=DIR python benchmarks/placement.py [--nodes 2 4 8] [--csv FILE]

Every .npz trace of tokens in DIR with more than one pick per token is split by request (seed 0,
70 / 30); plans are made from the first part for 8 ranks on 2, 4 and 8 nodes and costed on the
second with ``moe_locality.placement.evaluate``. Copies and imbalances are counts over recorded
routing, not a run on a cluster: their kind is "simulated". Seconds are measured on this machine.
"""

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

from _results import append_rows

from moe_locality.placement import assign_homes, evaluate, solve
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace import RoutingTrace

RANKS = 8
METHODS = ("linear", "round_robin", "eplb", "coactivation")
UNITS = {
    "copies": "per token per layer",
    "copies_vs_linear": "%",
    "picks_vs_linear": "%",
    "node_imbalance": "max/mean",
    "rank_imbalance": "max/mean",
    "straggler": "max/mean",
    "solve": "s",
}


def costed(train: RoutingTrace, test: RoutingTrace, nodes: int) -> Iterator[tuple[str, dict]]:
    """Yield (name of the plan, its figures on ``test``) for every method, then for more levers."""
    topology = ClusterTopology.uniform(nodes, RANKS // nodes)
    linear = None
    options: list[tuple[str, dict]] = [(name, {"method": name}) for name in METHODS]
    options.append(("coactivation+8 replicas", {"num_redundant_experts": 8}))
    options.append(("joint homes from first 32", {"homes": "joint"}))
    for name, arguments in options:
        start = time.perf_counter()
        plan = solve(train, topology, **arguments)
        seconds = time.perf_counter() - start
        homes = None
        if "homes" in arguments:
            homes = assign_homes(test, plan, topology, predict="first:32")
        costs = evaluate(test, plan, topology, homes)
        linear = linear or costs
        yield (
            name,
            {
                "copies": costs.copies,
                "copies_vs_linear": 100 * (costs.copies / linear.copies - 1),
                "picks_vs_linear": 100 * (costs.picks / linear.picks - 1),
                "node_imbalance": costs.node_imbalance,
                "rank_imbalance": costs.rank_imbalance,
                "straggler": costs.straggler,
                "solve": seconds,
            },
        )


def rows(case: str, figures: dict[str, float], train: RoutingTrace, test: RoutingTrace):
    """Yield one line of the table per figure."""
    note = (
        f"trace split by request 70/30 seed 0: {train.num_tokens} tokens to solve on, "
        f"{test.num_tokens} to cost; solver seed 0, max_imbalance 1.05"
    )
    for metric, value in figures.items():
        measured = metric == "solve"
        yield {
            "benchmark": "placement",
            "case": case,
            "metric": metric,
            "value": f"{value:.4f}",
            "unit": UNITS[metric],
            "kind": "measured" if measured else "simulated",
            "baseline": "linear" if metric.endswith("_vs_linear") else "",
            "note": note + (f"; load average {os.getloadavg()[0]:.1f}" if measured else ""),
        }


def traces(folder: Path) -> Iterator[tuple[str, RoutingTrace]]:
    """Yield the traces in which a token has several picks (else no two experts go together)."""
    for path in sorted(folder.glob("*.npz")):
        trace = RoutingTrace.from_npz(path)
        if trace.kind == "tokens" and trace.top_k > 1 and len(trace.request_ids) >= 20:
            yield path.stem, trace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--csv", type=Path, help="table to append the figures to")
    parser.add_argument("--data", type=Path, default=os.environ.get("MOE_LOCALITY_DATA"))
    options = parser.parse_args()
    if options.data is None:
        parser.error("MOE_LOCALITY_DATA is not set: it names the directory of real routing traces")
    for trace_name, trace in traces(Path(options.data)):
        train, test = trace.split(0.7, seed=0)
        for nodes in options.nodes:
            for name, figures in costed(train, test, nodes):
                case = f"{trace_name} {nodes} nodes x {RANKS // nodes} ranks, {name}"
                shown = ", ".join(f"{key} {value:.3f}" for key, value in figures.items())
                print(f"{case}: {shown}", flush=True)
                if options.csv:
                    lines = rows(case, figures, train, test)
                    append_rows(options.csv, lines, packages=("numpy", "scipy", "numba"))


if __name__ == "__main__":
    main()
