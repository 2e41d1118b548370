"""The experiment of arXiv 2604.23150 in a running decoder, on nodes with slow links.

    python benchmarks/paper_decoder.py [--out DIR] [--csv FILE] [--nodes 2 4] [--mbit 200] [-- ...]

``examples/paper_decoder.py`` on 4 ranks as 2 and 4 nodes; what follows ``--`` goes to it, such as
``--trace TRACE.npz``. Nodes are network namespaces, which need root; without root, or with
``--no-links``, the ranks are on one machine: bytes, no times of links.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _nodes import ROOT, Nodes, why_not
from _results import append_rows, table_path

from moe_locality.demo.launch import launch_command, launch_environment

sys.path.insert(0, str(ROOT))
from examples.paper_decoder import BASE, UNITS

PROGRAM = ROOT / "examples" / "paper_decoder.py"
RANKS = 4


def launch(num_nodes: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """Run the program on all ranks; return what it found."""
    out = chosen.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    words = ["--out", str(out), "--wandb", "disabled", *chosen.words]
    reason = "--no-links" if chosen.no_links else why_not()
    if reason is None:
        with Nodes(num_nodes, slots=RANKS // num_nodes, mbit_per_s=chosen.mbit) as nodes:
            done = nodes.finish(nodes.start(PROGRAM, words), limit_s=chosen.limit)
        code, output = done.code, done.output
    else:
        print(f"no nodes with slow links: {reason}; ranks of one machine, bytes but no link times")
        ran = subprocess.run(
            launch_command(RANKS, PROGRAM, [*words, "--num-nodes", str(num_nodes)]),
            env={**launch_environment(), "PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=False,
        )
        code, output = ran.returncode, ran.stdout + ran.stderr
    (out / f"ranks-{num_nodes}.log").write_text(output)
    if code != 0:
        sys.exit(f"the ranks ended with {code}, see {out}/ranks-{num_nodes}.log:\n{output[-2000:]}")
    return json.loads((out / "paper.json").read_text())


def rows_of(found: dict[str, Any], chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of results.csv of one number of nodes."""
    links = f"{chosen.mbit:g} Mbit/s" if found["timed"] else "no links"
    where = f"{found['nodes']} nodes x {found['ranks_per_node']}, {links}, {found['model']}"
    sizes = f"{found['requests']} requests x {found['new_tokens']} tokens, {found['layers']} layers"
    for name, facts in found["conditions"].items():
        note = f"{sizes}; node imbalance {facts['node_imbalance']:.3f}; {facts['moved']} moved"
        note += f"; {facts['full']} steps of {found['requests']} tokens timed, in turns"
        for metric, unit in UNITS.items():
            if metric in facts:
                yield row(f"{where}: {name}", metric, facts[metric], unit, note=note)
        for metric, change in facts["changes"].items() if name != BASE else ():
            case = f"{where}: {name}"
            yield row(case, f"{metric}, change", change, "%", baseline=BASE, note=note)
    for name, value in found["told"].items():
        yield row(where, name, value, "%" if name.endswith("%") else "Pearson r", note=sizes)


def row(
    case: str, metric: str, value: float, unit: str, baseline: str = "", note: str = ""
) -> dict[str, Any]:
    return {
        "benchmark": "paper_decoder",
        "case": case,
        "metric": metric,
        "value": f"{value:.4f}",
        "unit": unit,
        "kind": "measured",
        "baseline": baseline,
        "note": note,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/paper"), help="model, trace and plans are kept here")
    add("--no-links", action="store_true", help="on one machine even where nodes can be made")
    add("--nodes", type=int, nargs="+", choices=(2, 4), default=(2, 4))
    add("--mbit", type=float, default=200, help="rate of a node's link")
    add("--limit", type=float, default=1800, help="seconds")
    add("--csv", type=table_path, help="table to append the figures to")
    add("words", nargs="*", help="after --: for examples/paper_decoder.py")
    chosen = parser.parse_args()
    for num_nodes in chosen.nodes:
        rows = list(rows_of(launch(num_nodes, chosen), chosen))
        for one in rows:
            print(one["case"], one["metric"], one["value"], one["unit"], one["note"], sep="; ")
        if chosen.csv is not None:
            append_rows(chosen.csv, rows, packages=("torch", "transformers", "numpy"))


if __name__ == "__main__":
    main()
