"""The figures of ``moe-locality demo``: the example model on 4 local ranks that stand for 2 nodes.

    python benchmarks/main_job.py [--out runs/main_job] [--csv benchmarks/results.csv] [--seed 1]

A seed other than 0 makes other data and another model: its rows say how level held-out requests are
and whether the cap was kept.

Bytes, losses and times are counted in real runs over gloo (measured); copies (nodes a token is sent
to besides its own, were it sent once to each) are predicted from the recorded trace (simulated).
"""

import argparse
from pathlib import Path
from typing import Any

from _results import RESULTS, append_rows, table_path

from moe_locality.demo import run_demo
from moe_locality.errors import MoeLocalityError

CASE = "example model, 2 emulated nodes x 2 ranks, held-out requests"


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table for one run of the demo."""
    sizes, saved = found["cross_node_dispatch_bytes"], found["cross_node_dispatch_saved"]
    balance, copies = found["node_imbalance"], found["predicted_copies"]
    figures = [
        ("cross_node_dispatch_bytes linear", sizes["linear"], "bytes", "measured"),
        ("cross_node_dispatch_bytes placed", sizes["placed"], "bytes", "measured"),
        ("cross_node_dispatch_bytes once_per_node", sizes["once_per_node"], "bytes", "measured"),
        ("cross_node_dispatch_saved", 100 * saved["placed"], "%", "measured"),
        ("cross_node_dispatch_saved once_per_node", 100 * saved["once_per_node"], "%", "measured"),
        ("node_imbalance linear", balance["linear"], "max/mean", "measured"),
        ("node_imbalance placed", balance["placed"], "max/mean", "measured"),
        ("copies linear", copies["linear"], "per token per layer", "simulated"),
        ("copies placed", copies["placed"], "per token per layer", "simulated"),
        ("max_loss_difference placed", found["placed_max_loss_difference"], "nats", "measured"),
        (
            "max_train_loss_difference placed",
            found["placed_max_train_loss_difference"],
            "nats",
            "measured",
        ),
        ("max_loss_difference", found["max_loss_difference"], "nats", "measured"),
        ("max_train_loss_difference", found["max_train_loss_difference"], "nats", "measured"),
        ("domain_js_bits", found["domain_js_bits"], "bits", "measured"),
        ("domain_noise_floor_bits", found["domain_noise_floor_bits"], "bits", "measured"),
        ("seconds", found["seconds"], "s", "measured"),
    ]
    common = {"benchmark": "main_job", "case": CASE, "baseline": "linear"}
    return [
        {**common, "metric": metric, "value": value, "unit": unit, "kind": kind}
        for metric, value, unit, kind in figures
    ]


def level_rows(seed: int, found: dict[str, Any] | None, broken: str) -> list[dict[str, Any]]:
    """Rows of the imbalance with the data of a seed; ``broken``: why the demo failed its check."""
    kept = {"metric": "cap_kept", "value": int(found is not None), "unit": "0 or 1", "note": broken}
    figures = [kept]
    if found is not None:
        level = found["balance"]
        note = f"cap {level['cap']:g}, expected {level['expected']:.4f}"
        for name, value in (("placed", level["counted"]), ("linear", level["usual_order"])):
            row = {"metric": f"held_out_imbalance {name}", "value": value, "unit": "max/mean"}
            figures.append(row | {"note": note})
    common = {"benchmark": "main_job", "case": f"{CASE}, data seed {seed}", "kind": "measured"}
    return [{**common, **figure} for figure in figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/main_job"))
    parser.add_argument("--csv", type=table_path, default=RESULTS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found, broken = None, ""
    try:
        found = run_demo(out=options.out, seed=options.seed)
    except MoeLocalityError as error:
        broken = str(error)
    figures = level_rows(options.seed, found, broken)
    if found is not None and options.seed == 0:
        figures = rows(found) + figures
    for row in figures:
        print(f"{row['metric']}: {row['value']} {row['unit']} ({row['kind']})")
    append_rows(options.csv, figures, packages=("numpy", "torch", "deepspeed"))
    if broken:
        raise SystemExit(broken)


if __name__ == "__main__":
    main()
