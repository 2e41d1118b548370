"""The experiment of arXiv 2604.23150 in a running decoder, on nodes with slow links.

    python benchmarks/paper_decoder.py [--out DIR] [--csv FILE] [--nodes 2 4] [--mbit 3]

A small Qwen3-MoE (8 layers, 32 experts, top-4) is trained on text of four domains (kept in DIR),
serves requests whose prefill and decode are recorded, and decodes others under several plans and
homes with ``moe_locality.serving`` on 4 ranks as 2 and 4 nodes. Nodes are network namespaces,
which need root; without root the same runs on one machine: bytes, no times of links.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _nodes import Nodes, why_not
from _paper_model import train
from _results import append_rows
from lm.data import Requests, build_requests

import moe_locality
from moe_locality.analysis.decoding import classify_domains, decode_tokens
from moe_locality.analysis.stats import prefill_decode_correlation
from moe_locality.demo.launch import launch_command, launch_environment
from moe_locality.demo.paper import REPLICA_SHARE
from moe_locality.placement import PlacementPlan, assign_homes, evaluate, solve
from moe_locality.placement.baselines import cluster_homes
from moe_locality.serving import Engine, Limits, SamplingParams
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace

PROGRAM = Path(__file__).with_name("_paper_program.py")
RANKS = 4
PROMPT, NEW_TOKENS = 48, 32
RECORDED_TOKENS = 48
MAX_NUM_SEQS = 24
MAX_IMBALANCE = 1.06
BASE = "linear, random homes"


def main() -> None:
    chosen = parse()
    chosen.out.mkdir(parents=True, exist_ok=True)
    train(chosen.out / "model", chosen.steps)
    earlier, served = build_requests(
        seq_len=PROMPT,
        train_per_domain=chosen.earlier // 4,
        held_out_per_domain=chosen.served // 4,
        seed=1,
    )
    trace = record(chosen.out, [earlier, served], chosen.steps)
    known = trace.filter(requests=earlier.request_id)
    asked = trace.filter(requests=served.request_id)
    told = classify_domains(known, asked)
    pairs = prefill_decode_correlation(asked)
    rows = [
        row("routing", "accuracy of domains from prefill", 100 * told.ridge, "%", "measured"),
        row("routing", "prefill-decode, same request", pairs.same_request, "Pearson r", "measured"),
        row("routing", "prefill-decode, aggregate", pairs.aggregate, "Pearson r", "measured"),
    ]
    for nodes in chosen.nodes:
        rows += on_nodes(nodes, known, asked, served, chosen)
    for one in rows:
        print(one["case"], one["metric"], one["value"], one["unit"], one["note"], sep="; ")
    if chosen.csv is not None:
        append_rows(chosen.csv, rows, packages=("torch", "transformers", "numpy"))


def record(out: Path, parts: list[Requests], steps: int) -> RoutingTrace:
    """Serve all requests on one rank, and return the routing of prefill and decode."""
    path = out / f"trace-{steps}-{'-'.join(str(len(part)) for part in parts)}"
    if not path.exists():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
        making = path.with_name(f"{path.name}.part")
        shutil.rmtree(making, ignore_errors=True)
        recorder = moe_locality.attach(model, making)
        limits = Limits(max_num_seqs=64, max_num_batched_tokens=64 * PROMPT)
        engine = Engine(model, limits=limits)
        params = SamplingParams(temperature=0, max_tokens=RECORDED_TOKENS, ignore_eos=True)
        asked = [one for part in parts for one in requests_of(part)]
        print(f"recording: {len(asked)} requests", flush=True)
        for one in engine.generate(asked, params):
            if one.error is not None:
                sys.exit(f"request {one.request_id}: {one.error}")
        recorder.close()
        making.rename(path)
    return moe_locality.read_trace(path)


def requests_of(part: Requests) -> list[dict[str, Any]]:
    names = part.domain_names()
    return [
        {"request_id": int(request), "prompt_token_ids": tokens[:-1].tolist(), "domain": name}
        for request, tokens, name in zip(part.request_id, part.tokens, names, strict=True)
    ]


def cases_of(
    known: RoutingTrace, asked: RoutingTrace, topology: ClusterTopology, folder: Path
) -> list[dict[str, Any]]:
    """The conditions: a plan, from the known requests alone, and where each request is decoded."""
    shuffled = np.random.default_rng(0).permutation(asked.request_ids)
    dealt = {int(request): at % RANKS for at, request in enumerate(shuffled)}
    plans = {method: solve(known, topology, method=method) for method in ("linear", "eplb")}
    plans["recipe"] = solve(known, topology, method="request_kmeans")
    extra = round(known.num_experts * REPLICA_SHARE)
    for name, replicas in (("ours", 0), ("replicas", extra)):
        plans[name] = solve(
            known,
            topology,
            homes="joint",
            num_redundant_experts=replicas,
            max_imbalance=MAX_IMBALANCE,
        )
    recipe = cluster_homes(asked, plans["recipe"], topology, predict="prefill")
    replicas = f"ours, {REPLICA_SHARE:.1%} replicas"
    cases = [
        (BASE, "linear", "arrival", dealt),
        ("EPLB, random homes", "eplb", "arrival", dealt),
        ("the paper's recipe", "recipe", "arrival", recipe),
        ("ours, predicted homes", "ours", "predicted", dealt),
        (f"{replicas}, predicted homes", "replicas", "predicted", dealt),
    ]
    for name, plan in plans.items():
        plan.write(folder / f"{name}.json")
    return [
        {"name": name, "plan": str(folder / f"{plan}.json"), "homes": homes, "rank_of": rank_of}
        for name, plan, homes, rank_of in cases
    ]


def on_nodes(
    num_nodes: int, known: RoutingTrace, asked: RoutingTrace, served: Requests, chosen: Any
) -> list[dict[str, Any]]:
    """Decode under every condition; return the rows."""
    topology = ClusterTopology.uniform(num_nodes, RANKS // num_nodes)
    folder = chosen.out.absolute() / f"{num_nodes}-nodes"
    folder.mkdir(exist_ok=True)
    cases = cases_of(known, asked, topology, folder)
    given = {
        "model": str(chosen.out.absolute() / "model"),
        "requests": requests_of(served),
        "limits": {"max_num_seqs": MAX_NUM_SEQS, "max_num_batched_tokens": MAX_NUM_SEQS * PROMPT},
        "max_tokens": NEW_TOKENS,
    }
    reason = "--no-links" if chosen.no_links else why_not()
    if reason is not None:
        print(f"no nodes with slow links: {reason}; ranks of one machine, bytes but no link times")
    found = []
    for case in cases:  # a launch each: none inherits what another one left in the model
        found.append(launch(num_nodes, given | {"cases": [case]}, folder, chosen.mbit, reason))
        print(f"{case['name']}: {found[-1][0][0]['seconds']:.1f} s", flush=True)
    everyone = [[one[rank][0] for one in found] for rank in range(RANKS)]
    links = f", {chosen.mbit:g} Mbit/s" if reason is None else ", no links"
    where = f"decoder, {num_nodes} nodes x {RANKS // num_nodes}{links}"
    return rows_of(where, cases, everyone, asked, topology, reason is None)


def launch(
    num_nodes: int, given: dict[str, Any], folder: Path, mbit: float, reason: str | None
) -> list[list[dict[str, Any]]]:
    """Run the program on all ranks; return what each counted of every case."""
    files = [str(folder / "cases.json"), str(folder / "out.json")]
    Path(files[0]).write_text(json.dumps(given))
    if reason is None:
        with Nodes(num_nodes, slots=RANKS // num_nodes, mbit_per_s=mbit) as nodes:
            done = nodes.finish(nodes.start(PROGRAM, files), limit_s=600)
        code, output = done.code, done.output
    else:
        emulated = {"MOE_LOCALITY_RANKS_PER_NODE": str(RANKS // num_nodes), "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(
            launch_command(RANKS, PROGRAM, files),
            env={**launch_environment(), **emulated, "PYTHONPATH": str(PROGRAM.parents[1])},
            capture_output=True,
            text=True,
            check=False,
        )
        code, output = ran.returncode, ran.stdout + ran.stderr
    (folder / "ranks.log").write_text(output)
    if code != 0:
        sys.exit(f"the ranks ended with {code}, see {folder}/ranks.log:\n{output[-2000:]}")
    return json.loads(Path(files[1]).read_text())


def rows_of(
    where: str,
    cases: list[dict[str, Any]],
    everyone: list[list[dict[str, Any]]],
    asked: RoutingTrace,
    topology: ClusterTopology,
    timed: bool,
) -> list[dict[str, Any]]:
    """Rows of results.csv from what all ranks counted."""
    judged, made, found = decode_tokens(asked), [], {}
    assert judged.position is not None  # recorded with more new tokens than are decoded here
    judged = judged.take(np.flatnonzero(judged.position < PROMPT + NEW_TOKENS - 1))
    first = tokens_of(everyone, 0)
    for index, case in enumerate(cases):
        ranks = [some[index] for some in everyone]
        homes = {int(request): home for one in ranks for request, home in one["homes"].items()}
        costs = evaluate(judged, PlacementPlan.read(case["plan"]), topology, homes)
        other = tokens_of(everyone, index)
        flips = sum(first[request] != tokens for request, tokens in other.items())
        facts = {**counted(ranks), "node_imbalance": costs.node_imbalance}
        facts["predicted rows per token"] = 2 * costs.copies * judged.num_layers  # there and back
        found[case["name"]] = facts
        note = (
            f"{len(homes)} requests, {NEW_TOKENS} tokens each, {MAX_NUM_SEQS} a rank; node "
            f"imbalance {costs.node_imbalance:.3f}; {flips} texts differ from {BASE}; "
            f"{ranks[0]['steps'][-1]['moved']} requests of rank 0 moved"
        )
        name = f"{where}: {case['name']}"
        made += [
            row(name, metric, value, UNITS[metric], note=note)
            for metric, value in facts.items()
            if timed or metric not in TIMES
        ]
        base = found[BASE]
        for metric in COMPARED if timed else COMPARED[:2]:
            change = 100 * (facts[metric] / base[metric] - 1)
            made.append(row(name, f"{metric}, change", change, "%", baseline=BASE, note=note))
    name = "ours, predicted homes"
    (ours,) = (PlacementPlan.read(case["plan"]) for case in cases if case["name"] == name)
    oracle = assign_homes(judged, ours, topology, predict="oracle")
    best = evaluate(judged, ours, topology, oracle).copies * 2 * judged.num_layers
    rows = {label: found[label]["predicted rows per token"] for label in (BASE, name)}
    kept = 100 * (rows[BASE] - rows[name]) / (rows[BASE] - best)
    note = "rows of the recorded routing; oracle: homes from all decode tokens under the same cap"
    made.append(row(f"{where}: {name}", "kept of the oracle's gain", kept, "%", note=note))
    return made


UNITS = {
    "decode bytes across nodes per token": "bytes",
    "largest sent by a rank": "bytes, mean over steps",
    "decode rows across nodes per token": "rows",
    "predicted rows per token": "rows",
    "node_imbalance": "max/mean",
    "decode step, median": "ms",
    "all steps": "s",
}
BYTES = "decode bytes across nodes per token"
COMPARED = (BYTES, "largest sent by a rank", "decode step, median", "all steps")
TIMES = ("decode step, median", "all steps")


def counted(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """What steps took in which all ranks decode, and bytes of those where none reads a prompt."""
    together = list(zip(*(one["steps"] for one in ranks), strict=True))
    decoding = [some for some in together if all(s["kind"] == "decode" for s in some)]
    only = [some for some in together if all(s["kind"] != "prefill" for s in some)]
    tokens = sum(s["tokens"] for some in only for s in some)
    sent = [[across(s["bytes"]) for s in some] for some in only]
    rows = sum(
        s["rows"][kind][2] for some in only for s in some for kind in ("dispatch", "combine")
    )
    return {
        BYTES: sum(map(sum, sent)) / tokens,
        "largest sent by a rank": float(np.mean([max(some) for some in sent])),
        "decode rows across nodes per token": rows / tokens,
        "decode step, median": 1e3
        * float(np.median([max(s["seconds"] for s in some) for some in decoding])),
        "all steps": max(one["seconds"] for one in ranks),
    }


def across(links: dict[str, list[int]]) -> int:
    """Of {kind: [same rank, same node, across nodes]}, the last, of all kinds."""
    return sum(sums[2] for sums in links.values())


def tokens_of(everyone: list[list[dict[str, Any]]], index: int) -> dict[str, list[int]]:
    return {request: t for some in everyone for request, t in some[index]["tokens"].items()}


def row(
    case: str,
    metric: str,
    value: float,
    unit: str,
    kind: str = "measured",
    *,
    baseline: str = "",
    note: str = "",
) -> dict[str, Any]:
    return {
        "benchmark": "paper_decoder",
        "case": case,
        "metric": metric,
        "value": f"{value:.4f}",
        "unit": unit,
        "kind": kind,
        "baseline": baseline,
        "note": note,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/paper"), help="model, trace and plans are kept here")
    add("--steps", type=int, default=400, help="of training")
    add("--earlier", type=int, default=400, help="requests that plans are made from")
    add("--served", type=int, default=64, help="requests to decode")
    add("--no-links", action="store_true", help="on one machine even where nodes can be made")
    add("--nodes", type=int, nargs="+", choices=(2, 4), default=(2, 4))
    add("--mbit", type=float, default=3.0, help="rate of a node's link")
    add("--csv", type=Path, help="table to append the figures to")
    return parser.parse_args()


if __name__ == "__main__":
    main()
