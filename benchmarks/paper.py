"""The experiment of arXiv 2604.23150 on recorded routing, `moe-locality bench paper` on each trace.

    MOE_LOCALITY_DATA=DIR python benchmarks/paper.py [--csv FILE] [--traces NAME ...]

Counts over recorded routing, not a run on a cluster: their kind is "simulated".
"""

import argparse
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _results import append_rows, table_path

from moe_locality.demo.paper import paper_on_trace
from moe_locality.trace import RoutingTrace

TRACES = ("gpt_oss_20b_benchmarks", "llama4_maverick_mmlu", "deepseek_v2_lite_esft_tasks")
STEP_CHANGES = ("step_largest_copy_message", "step_largest_pick_message", "step_distinct")


def rows_of(name: str, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of one trace."""
    for one in found["replays"]:
        where = f"{name} {one['num_nodes']} nodes x {one['ranks_per_node']} ranks"
        note = (
            f"{one['judged_tokens']} decode tokens of {one['judged_requests']} held-out requests; "
            f"homes predicted from {one['predicted_from']}; default cap"
        )
        for case in one["conditions"]:
            label = f"{where}, {case['name']}"
            facts = f"{note}; node imbalance {case['node_imbalance']:.3f}"
            change, metrics = case["change"], ("step_distinct",)
            if "grouped" not in label:  # grouping changes who decodes together, not the totals
                yield row(label, "copies", case["copies"], "per token per layer", note=facts)
                yield row(label, "node_imbalance", case["node_imbalance"], "max/mean", note=note)
                metrics = ("copies", "picks", *STEP_CHANGES)
            for metric in metrics:
                base = "linear, random homes"
                yield row(label, f"{metric}_vs_linear", change[metric], "%", base, note=facts)
        for label, kept in one["kept"].items():
            for metric, share in kept.items():
                case = f"{where}, {label}, predicted homes"
                yield row(
                    case, f"kept_of_oracle_{metric}", 100 * share, "%", "oracle homes", note=note
                )
    for kind, one in found["domains"].items():
        note = (
            f"{len(one['domains'])} domains, {one['num_requests']} held-out requests; nearest "
            f"center {100 * one['nearest_center']:.1f} %, always the largest "
            f"{100 * one['largest_class']:.1f} %"
        )
        case = f"{name}, {kind} told from what homes are predicted from"
        yield row(case, "accuracy", 100 * one["ridge"], "%", note=note)
        case = f"{name}, {kind} told from the whole request, hindsight"
        yield row(case, "accuracy", 100 * one["whole_request"], "%", note=note)
    for metric, value in (found["prefill_decode_correlation"] or {}).items():
        if metric != "num_requests":
            yield row(f"{name}, prefill-decode correlation", metric, value, "Pearson r")


def row(
    case: str, metric: str, value: float, unit: str, baseline: str = "", note: str = ""
) -> dict[str, Any]:
    return {
        "benchmark": "paper",
        "case": case,
        "metric": metric,
        "value": f"{value:.4f}",
        "unit": unit,
        "kind": "simulated",
        "baseline": baseline,
        "note": note,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", nargs="+", default=TRACES)
    parser.add_argument("--csv", type=table_path, help="table to append the figures to")
    parser.add_argument("--data", type=Path, default=os.environ.get("MOE_LOCALITY_DATA"))
    options = parser.parse_args()
    if options.data is None:
        parser.error("MOE_LOCALITY_DATA is not set: it names the directory of real routing traces")
    logging.getLogger("moe_locality").setLevel(logging.ERROR)  # layers that no plan can level
    for name in options.traces:
        start = time.perf_counter()
        found = paper_on_trace(RoutingTrace.from_npz(options.data / f"{name}.npz"))
        rows = list(rows_of(name, found))
        for one in rows:
            print(one["case"], one["metric"], one["value"], one["unit"], one["note"], sep="; ")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        if options.csv:
            append_rows(options.csv, rows, packages=("numpy", "scipy", "numba"))


if __name__ == "__main__":
    main()
