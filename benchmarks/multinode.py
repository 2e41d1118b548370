"""MoE layers on nodes with slow links: DeepSpeed's layer, its AutoEP and ours; bytes and times.

The nodes are network namespaces of this machine (docs/multinode.md). Parts:

bytes    forward and backward with uniform routing, E = 256, k = 8, width 7168, bfloat16, 8 ranks on
         2, 4 and 8 nodes: every pick by itself against once per node. Counted by our counters,
         predicted by ``evaluate`` (must be equal), and seen by the kernel on the links, which here
         carry jumbo frames of 9000 bytes, and count them as a network card would.
payload  bytes of the dispatch in MXFP8 and MXFP4 against bfloat16, on 2 nodes, alike.
steps    milliseconds of forward and backward on 4 nodes with links of 200 Mbit/s. Routing of
         gpt-oss-20b is replayed: requests that neither plan nor homes were made from, one home for
         all layers, all requests of a rank in step as when decoding, layers in turn. ``random``
         homes are drawn per request, ``predicted`` ones follow from its first tokens and the plan;
         those tokens are not replayed. All cases take turns in one run.
frontends  the same replay through transformers' expert parallelism, with its own exchange and with
         ours: forward and backward, and forward alone of few tokens, as when decoding.
generate  decoding steps of transformers' ``model.generate`` with both exchanges: a model of as many
         MoE layers as are replayed, whose tokens go where the recorded ones went. Nothing is timed
         apart: attention, sampling and what keeps the ranks in step are in it.
page     write the tables of docs/multinode.md and its pictures from the newest rows of --csv.

Every case computes the same function, which is checked in the run. The times say what bytes cost
where links decide, and nothing about a real network.

    MOE_LOCALITY_DATA=... python benchmarks/multinode.py [--parts ...] [--csv ... --page ...]
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import _multinode_rows as rows_of
import numpy as np
from _multinode_page import write_page
from _nodes import Nodes, why_not
from _results import append_rows, table_path

from moe_locality.placement import PlacementPlan, assign_homes, solve
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace

PROGRAM = Path(__file__).with_name("_multinode_program.py")
PACKAGES = ("torch", "deepspeed", "transformers")
TRACE, LAYERS = "gpt_oss_20b_benchmarks", (0, 6, 12, 18, 23)
PREDICT = 32
FRAME_BYTES = 9000
STOCK, AUTO_EP, FLAT = "DeepSpeed MoE, dropless", "DeepSpeed AutoEP", "ours, every pick"
LINEAR = "ours, once per node, linear plan, random homes"
PLACED = "ours, once per node, our plan, predicted homes"
THEIRS = "transformers, all_to_all, random homes"
HF_LINEAR = "transformers, ours, once per node, linear plan, random homes"
HF_PLACED = "transformers, ours, once per node, our plan, predicted homes"
HF_COMPARED = ((THEIRS, HF_LINEAR), (THEIRS, HF_PLACED), (HF_LINEAR, HF_PLACED))
AUTO_EP_LINEAR = "DeepSpeed AutoEP, ours, once per node, linear plan, random homes"
AUTO_EP_PLACED = "DeepSpeed AutoEP, ours, once per node, our plan, predicted homes"
AUTO_EP_COMPARED = (
    (AUTO_EP, AUTO_EP_LINEAR),
    (AUTO_EP, AUTO_EP_PLACED),
    (AUTO_EP_LINEAR, AUTO_EP_PLACED),
)
COMPARED = (
    (STOCK, LINEAR),
    (STOCK, PLACED),
    (AUTO_EP, LINEAR),
    (AUTO_EP, PLACED),
    (AUTO_EP, FLAT),
    (LINEAR, PLACED),
)
UNIFORM = {"experts": 256, "top_k": 8, "width": 7168, "hidden": 16, "layers": 1}
EXACT, LOSSY = {"float32": 1e-4, "bfloat16": 0.02}, {"mxfp8": 0.1, "mxfp4": 0.4}
"""how far a case's output and gradient may be from those of one process"""


def ours(name: str, exchange: str, sizes: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A case with our layer; ``more``: ``payload``, ``plan``, ``batches``."""
    payload = more.pop("payload", "none")
    return {
        "name": name,
        "layer": "ours",
        "dispatch": {"exchange": exchange, "payload": payload},
        "plan": None,
        "batches": "uniform",
        "tolerance": LOSSY.get(payload, EXACT[sizes["dtype"]]),
        **more,
    }


def launch(
    nodes: Nodes, cases: list[dict], batches: dict[str, np.ndarray], **given: Any
) -> list[dict[str, np.ndarray]]:
    """Run the cases on all nodes; return what was measured of each."""
    files = [str(nodes.folder / name) for name in ("cases.json", "batches.npz", "out.json")]
    Path(files[0]).write_text(json.dumps({"cases": cases, "backward": True, **given}))
    np.savez(files[1], **batches)  # pyright: ignore[reportArgumentType]
    done = nodes.finish(nodes.start(PROGRAM, files), limit_s=1200)
    if done.code != 0:
        sys.exit(f"the ranks ended with {done.code}:\n{done.output[-6000:]}")
    everyone = json.loads(Path(files[2]).read_text())
    return [rows_of.gathered(everyone, index) for index in range(len(cases))]


def uniform_part(num_nodes: int, tokens: int, payloads: tuple[str, ...]) -> list[dict[str, Any]]:
    """Bytes on ``num_nodes`` nodes of 8 ranks in all; with payloads, also those of a dispatch."""
    sizes = {**UNIFORM, "dtype": "bfloat16"}
    topology = ClusterTopology.uniform(num_nodes, 8 // num_nodes)
    plan = PlacementPlan.linear(sizes["experts"], [0], num_nodes, 8 // num_nodes)
    batches = rows_of.uniform_batches(8, tokens, sizes["experts"], sizes["top_k"])
    cases = [ours(exchange, exchange, sizes) for exchange in ("flat", "hierarchical")]
    cases += [ours(name, "hierarchical", sizes, payload=name) for name in payloads]
    with Nodes(num_nodes, slots=8 // num_nodes, frame_bytes=FRAME_BYTES) as nodes:
        measured = launch(
            nodes, cases, {"uniform": batches}, sizes=sizes, rounds=1, watch=bool(payloads)
        )
    found = {case["name"]: each for case, each in zip(cases, measured, strict=True)}
    predicted = rows_of.predicted_rows(batches, plan, topology)
    for name, each in found.items():
        rows = predicted["flat" if name == "flat" else "hierarchical"].ravel()
        rows_of.check_rows(name, each["rows"], rows_of.DIRECTIONS * rows)
    e, k = sizes["experts"], sizes["top_k"]
    where = f"{num_nodes} nodes x {8 // num_nodes}, uniform, E={e} k={k} D={sizes['width']} bf16"
    note = (
        f"forward and backward of {tokens} tokens a rank; counted rows equal those that evaluate "
        f"predicts; frames of {FRAME_BYTES} bytes; emulated nodes, one machine"
    )
    made = rows_of.bytes_rows(where, found, rows_of.closed_form(e, k, num_nodes), note)
    if payloads:
        coded = {"none": found["hierarchical"], **{name: found[name] for name in payloads}}
        made += rows_of.payload_rows(f"{where}, once per node", coded, note)
    return made


def why_no_auto_ep() -> str | None:
    """Return what keeps DeepSpeed's AutoEP from running here, or None."""
    try:
        found = version("transformers")
    except PackageNotFoundError:
        found = "none"
    if found != "none" and int(found.split(".")[0]) >= 5:
        return None
    return f"found transformers {found}, AutoEP of DeepSpeed 0.19.8 needs 5.0 or newer"


def step_cases(sizes: dict[str, Any], plan_path: str) -> list[dict[str, Any]]:
    exact = {"tolerance": EXACT[sizes["dtype"]], "batches": "random"}
    theirs = [{"name": STOCK, "layer": "deepspeed", **exact}]
    reason = why_no_auto_ep()
    if reason is None:
        theirs.append({"name": AUTO_EP, "layer": "autoep", **exact})
    else:
        print(f"left out {AUTO_EP}: {reason}")
    return [
        *theirs,
        ours(FLAT, "flat", sizes, batches="random"),
        ours(LINEAR, "hierarchical", sizes, batches="random"),
        ours(PLACED, "hierarchical", sizes, batches="predicted", plan=plan_path),
    ]


def transformers_cases(
    sizes: dict[str, Any], plan_path: str, batches: str = "random"
) -> list[dict[str, Any]]:
    common = {
        "layer": "transformers",
        "checkpoint": str(Path(plan_path).with_name("qwen3_moe")),
        "plan": None,
        "batches": batches,
        "tolerance": EXACT[sizes["dtype"]],
    }
    once = {"exchange": "hierarchical"}
    mine = {**common, "ep_implementation": "moe_locality", "dispatch": once}
    return [
        {**common, "name": THEIRS, "ep_implementation": "all_to_all"},
        {**mine, "name": HF_LINEAR},
        {**mine, "name": HF_PLACED, "plan": plan_path, "batches": "predicted"},
    ]


def auto_ep_cases(sizes: dict[str, Any], plan_path: str) -> list[dict[str, Any]]:
    common = {"layer": "autoep", "plan": None, "tolerance": EXACT[sizes["dtype"]]}
    mine = {**common, "dispatch": {"exchange": "hierarchical"}}
    return [
        {**common, "name": AUTO_EP, "batches": "random"},
        {**mine, "name": AUTO_EP_LINEAR, "batches": "random"},
        {**mine, "name": AUTO_EP_PLACED, "plan": plan_path, "batches": "predicted"},
    ]


def auto_ep_part(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of AutoEP with its own exchange and with ours, in training."""
    return replay(chosen, auto_ep_cases, AUTO_EP_COMPARED, f"{layers_where(chosen)}, AutoEP")


def frontends_part(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of transformers' exchange and ours, in training and in decoding."""
    made = replay(chosen, transformers_cases, HF_COMPARED, f"{layers_where(chosen)}, transformers")
    decode = argparse.Namespace(**{**vars(chosen), "tokens": chosen.decode_tokens})
    where = f"{layers_where(decode)}, transformers, forward only"
    return made + replay(decode, transformers_cases, HF_COMPARED, where, backward=False)


def generate_part(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of a decoding step of ``generate`` with transformers' exchange and with ours."""
    decode = argparse.Namespace(**{**vars(chosen), "tokens": chosen.decode_tokens})
    where = f"{layers_where(decode, len(LAYERS))}, transformers, generate"
    return replay(decode, transformers_cases, HF_COMPARED, where, False, chosen.decode_steps)


def steps_part(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Times of DeepSpeed's layers and ours on nodes with slow links."""
    return replay(chosen, step_cases, COMPARED, steps_where(chosen))


def replay(
    chosen: argparse.Namespace,
    cases_of: Callable[[dict[str, Any], str], list[dict[str, Any]]],
    compare: Sequence[tuple[str, str]],
    where: str,
    backward: bool = True,
    decode_steps: int = 0,
) -> list[dict[str, Any]]:
    """Replay recorded routes through all cases on nodes with slow links; return the rows.

    A step is one layer, or with ``decode_steps`` one step of ``generate``, so many at a time.
    """
    data = Path(os.environ["MOE_LOCALITY_DATA"])
    trace = RoutingTrace.from_npz(data / f"{TRACE}.npz").select_layers(LAYERS)
    train, test = trace.split(0.7, seed=0)
    topology = ClusterTopology.uniform(chosen.nodes, chosen.slots)
    plan = solve(train, topology, homes="joint", seed=0)
    ranks, rng = topology.num_ranks, np.random.default_rng(0)
    homes = {
        "random": {int(request): int(rng.integers(ranks)) for request in test.request_ids},
        "predicted": assign_homes(test, plan, topology, predict=f"first:{PREDICT}"),
    }
    groups = chosen.rounds * decode_steps or -(-chosen.rounds // len(LAYERS))
    cut = {"ranks": ranks, "tokens": chosen.tokens, "steps": groups, "skip": PREDICT}
    batches = {name: rows_of.replayed_batches(test, home, **cut) for name, home in homes.items()}
    sizes = {
        "experts": trace.num_experts,
        "top_k": batches["random"].shape[-1],
        "width": chosen.width,
        "hidden": chosen.hidden,
        "layers": len(LAYERS),
        "dtype": "float32",
    }
    with Nodes(chosen.nodes, slots=chosen.slots, mbit_per_s=chosen.mbit) as nodes:
        plan.write(nodes.folder / "plan.json")
        cases = cases_of(sizes, str(nodes.folder / "plan.json"))
        given = {"sizes": sizes, "rounds": chosen.rounds, "watch": False, "backward": backward}
        given["generate"] = bool(decode_steps)
        rounds = {
            f"generate {name}": routes.reshape(chosen.rounds, decode_steps, *routes.shape[1:])
            for name, routes in (batches.items() if decode_steps else ())
        }
        measured = launch(nodes, cases, batches | rounds, **given)
    linear = PlacementPlan.linear(sizes["experts"], LAYERS, chosen.nodes, chosen.slots)
    for case, each in zip(cases, measured, strict=True):
        if "dispatch" in case:
            used = plan if case["plan"] else linear
            rows = rows_of.predicted_rows(batches[case["batches"]], used, topology)
            rows = rows[case["dispatch"]["exchange"]]
            expected = rows.sum(1) if decode_steps else rows.ravel()[: chosen.rounds]
            directions = rows_of.DIRECTIONS if backward else rows_of.DIRECTIONS // 2
            rows_of.check_rows(case["name"], each["rows"], directions * expected)
    found = {case["name"]: each for case, each in zip(cases, measured, strict=True)}
    compared = [(base, name) for base, name in compare if base in found]
    return rows_of.step_rows(where, found, compared, chosen.mbit * 1e6 / 8)


def steps_where(chosen: argparse.Namespace) -> str:
    links = f"{chosen.nodes} nodes x {chosen.slots}, {chosen.mbit:g} Mbit/s"
    return f"{links}, gpt-oss-20b, T={chosen.tokens} D={chosen.width} fp32"


def layers_where(chosen: argparse.Namespace, number: int = 1) -> str:
    """Begin of the cases of front ends, whose steps send no dense gradients."""
    layers = f"{number} MoE layer{'s' if number > 1 else ''}"
    return f"{steps_where(chosen)}, {layers}, experts {chosen.hidden} wide, no dense gradients"


def main() -> None:
    chosen = parse()
    reason = why_not()
    if reason is not None and chosen.parts != ["page"]:
        sys.exit(f"no nodes on this machine: {reason}")
    made: list[dict[str, Any]] = []
    for num_nodes in (2, 4, 8) if {"bytes", "payload"} & {*chosen.parts} else ():
        payloads = ("mxfp8", "mxfp4") if num_nodes == 2 and "payload" in chosen.parts else ()
        if payloads or "bytes" in chosen.parts:
            made += uniform_part(num_nodes, chosen.uniform_tokens, payloads)
    if "steps" in chosen.parts:
        made += steps_part(chosen)
    if "frontends" in chosen.parts:
        made += frontends_part(chosen)
    if "generate" in chosen.parts:
        made += generate_part(chosen)
    if "autoep" in chosen.parts:
        made += auto_ep_part(chosen)
    for each in made:
        print(f"{each['case']}: {each['metric']} {each['value']} {each['unit']} ({each['note']})")
    if chosen.csv is not None:
        append_rows(chosen.csv, made, packages=PACKAGES)
        if chosen.page is not None and "page" in chosen.parts:
            write_page(chosen.page, chosen.csv, steps_where(chosen))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    add = parser.add_argument
    parts = ("bytes", "payload", "steps", "frontends", "generate", "autoep", "page")
    add("--parts", default=",".join(parts), help=f"any of {', '.join(parts)}")
    add("--nodes", type=int, default=4)
    add("--slots", type=int, default=1, help="ranks per node")
    add("--mbit", type=float, default=200, help="rate of a node's link")
    add("--tokens", type=int, default=256, help="tokens per rank and step")
    add("--decode-tokens", type=int, default=32, help="tokens per rank of a decoding step")
    add("--decode-steps", type=int, default=8, help="steps of a call of generate")
    add("--width", type=int, default=1440, help="float32: as wide as gpt-oss's 2880 in bfloat16")
    add("--hidden", type=int, default=16, help="narrow experts: the links decide")
    add("--rounds", type=int, default=15)
    add("--uniform-tokens", type=int, default=128, help="tokens per rank of the parts about bytes")
    add("--csv", type=table_path)
    add("--page", type=Path, help="page whose tables are written anew; pictures beside it")
    chosen = parser.parse_args()
    chosen.parts = chosen.parts.split(",")
    unknown = {*chosen.parts} - {*parts}
    if unknown:
        parser.error(f"unknown parts {sorted(unknown)}, expected any of {', '.join(parts)}")
    if "page" in chosen.parts and chosen.page is not None and chosen.csv is None:
        parser.error("--page needs --csv, whose rows it shows")
    if {"steps", "frontends", "generate", "autoep"} & {
        *chosen.parts
    } and "MOE_LOCALITY_DATA" not in os.environ:
        sys.exit("MOE_LOCALITY_DATA is not set: it names the directory of real routing traces")
    return chosen


if __name__ == "__main__":
    main()
