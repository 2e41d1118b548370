"""The main job on the example model: train and record, place, run the same batches again, compare.

The stages and what each writes below ``out``:

    record/      stock DeepSpeed layers: training, checkpoint, trace: the last steps, and, with the
                 trained weights, the requests of those steps again and the held-out requests
    plan.json    placement, from the requests of those steps with the trained weights
    homes.json   home rank of each held-out request, from its first tokens
    linear/      our layer, experts in their usual order, requests dealt in turn
    placed/      our layer, the same checkpoint and requests, with the plan and the homes
    once_per_node/  the same as placed, through the exchange that sends a token once per node
    report.html  what came of it
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_locality.analysis import analyze
from moe_locality.commands.inputs import write_homes
from moe_locality.compare import Candidate, Run, compare_plans, compare_runs, read_run
from moe_locality.compare.rows import Comparison
from moe_locality.compare.runs import read_arrays
from moe_locality.demo.checks import (
    Agreement,
    check_agreement,
    check_prediction,
    ranks_of_requests,
)
from moe_locality.demo.launch import run_training
from moe_locality.demo.options import DemoOptions
from moe_locality.demo.progress import Progress
from moe_locality.placement import PlacementPlan, assign_homes, solve
from moe_locality.topology import ClusterTopology
from moe_locality.trace import PREFILL, RoutingTrace, read_trace

CONTINUE_STEPS = 6
PREDICT_FROM = "first:32"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDemo:
    """What the stages found; ``predicted`` compares plans on the trace, ``measured`` the runs."""

    held_out: RoutingTrace
    analysis: dict[str, Any]
    plan: PlacementPlan
    topology: ClusterTopology
    linear: Run
    placed: Run
    once_per_node: Run
    predicted: Comparison
    measured: Comparison
    agreements: dict[str, Agreement]
    """of "stock" (the recorded run), "placed" and "once_per_node" with the usual order"""
    bytes_checked: dict[str, Any]


def run_model(options: DemoOptions, progress: Progress) -> ModelDemo:
    """Run every stage.

    Raises:
        MoeLocalityError: a run failed, or two runs that must agree do not.
    """
    out = options.out
    _train(options, progress)
    seen, held_out = read_recorded(out / "record")
    analysis = analyze(held_out, seed=options.seed)
    _say_specialization(analysis, progress)
    topology = ClusterTopology.uniform(options.num_nodes, options.ranks_per_node)
    plan = _place(options, seen, topology, progress)
    homes = _homes(options, held_out, plan, topology)
    flat = ["--exchange", "flat"]
    linear = _run(options, "linear", flat, progress)
    placed_arguments = ["--plan", str(out / "plan.json"), "--homes", str(out / "homes.json")]
    placed = _run(options, "placed", [*placed_arguments, *flat], progress)
    hierarchical = [*placed_arguments, "--exchange", "hierarchical"]
    once_per_node = _run(options, "once_per_node", hierarchical, progress)
    dealt = ranks_of_requests(linear)
    candidates = [
        Candidate(name="linear", plan=solve(seen, topology, method="linear"), homes=dealt),
        Candidate(name="placed", plan=plan, homes=homes),
    ]
    agreements = {
        "stock": check_agreement(read_run(out / "record", "stock"), linear, training=False),
        "placed": check_agreement(linear, placed),
        "once_per_node": check_agreement(linear, once_per_node),
    }
    recorded = agreements["stock"].flips

    def check(run: Run, of: PlacementPlan, cost: Literal["picks", "copies"]) -> dict[str, Any]:
        flips = recorded + (agreements[run.name].flips if run is not linear else 0)
        return check_prediction(run, held_out, of, topology, cost, flips=flips)

    usual = candidates[0].plan
    checked = {
        "linear": check(linear, usual, "picks"),
        "placed": check(placed, plan, "picks"),
        "once_per_node": check(once_per_node, plan, "copies"),
    }
    return ModelDemo(
        held_out=held_out,
        analysis=analysis,
        plan=plan,
        topology=topology,
        linear=linear,
        placed=placed,
        once_per_node=once_per_node,
        predicted=compare_plans(held_out, candidates, topology, seed=options.seed),
        measured=compare_runs(linear, placed, node_of_rank=topology.rank_to_node),
        agreements=agreements,
        bytes_checked=checked,
    )


def read_recorded(folder: Path) -> tuple[RoutingTrace, RoutingTrace]:
    """Read the routing of (requests of the training text, held-out requests), both with the trained
    weights: training steps show a router that still moves, and its loads with it.
    """
    held_out = read_arrays(folder / "evaluation.npz")["request_id"]
    trace = read_trace(folder / "trace").filter(stages=[PREFILL])
    seen = np.setdiff1d(trace.request_ids, held_out)
    return trace.filter(requests=seen), trace.filter(requests=held_out)


def _common(options: DemoOptions, name: str) -> list[str]:
    folder = options.out / name
    return [
        *("--preset", options.preset, "--seed", str(options.seed)),
        *("--num-nodes", str(options.num_nodes), "--out", str(folder)),
        *("--metrics", str(folder / "metrics.jsonl")),
    ]


def _train(options: DemoOptions, progress: Progress) -> None:
    folder = options.out / "record"
    arguments = [
        *_common(options, "record"),
        *("--layer", "stock", "--trace", str(folder / "trace"), "--record-again"),
        *("--save-checkpoint", str(folder / "checkpoint")),
        *(() if options.steps is None else ("--steps", str(options.steps))),
    ]
    title = "train with stock DeepSpeed layers and record"
    with progress.stage(title) as update:
        run_training(
            arguments, num_ranks=options.num_ranks, log=folder / "log.txt", on_progress=update
        )


def _run(options: DemoOptions, name: str, extra: list[str], progress: Progress) -> Run:
    """Run the held-out requests, then a few more training steps, from the recorded checkpoint."""
    folder = options.out / name
    arguments = [
        *_common(options, name),
        *("--layer", "locality", "--load-checkpoint", str(options.out / "record" / "checkpoint")),
        *("--eval-only", "--continue-steps", str(CONTINUE_STEPS), *extra),
    ]
    title = f"same batches, our layer, {name.replace('_', ' ')}"
    with progress.stage(title) as update:
        run_training(
            arguments, num_ranks=options.num_ranks, log=folder / "log.txt", on_progress=update
        )
    return read_run(folder, name)


def _place(
    options: DemoOptions, seen: RoutingTrace, topology: ClusterTopology, progress: Progress
) -> PlacementPlan:
    with progress.stage("place the experts (requests of the training text)"):
        plan = solve(
            seen,
            topology,
            homes="joint",
            max_imbalance=options.max_imbalance,
            seed=options.seed,
        )
        plan.write(options.out / "plan.json")
    return plan


def _homes(
    options: DemoOptions, held_out: RoutingTrace, plan: PlacementPlan, topology: ClusterTopology
) -> dict[int, int]:
    """Give every held-out request a home, batch by batch, from its first tokens only."""
    size = _batch_requests(options)
    homes: dict[int, int] = {}
    for start in range(0, len(held_out.request_ids), size):
        batch = held_out.filter(requests=held_out.request_ids[start : start + size])
        homes |= assign_homes(batch, plan, topology, predict=PREDICT_FROM, equal_requests=True)
    write_homes(homes, options.out / "homes.json")
    return homes


def _batch_requests(options: DemoOptions) -> int:
    """Requests of a global batch, as the run itself reported them."""
    summary = json.loads((options.out / "record" / "summary.json").read_text(encoding="utf-8"))
    return int(summary["global_batch"])


def _say_specialization(analysis: dict[str, Any], progress: Progress) -> None:
    domains = analysis["domains"]
    if domains:
        progress.say(
            f"routing differs between domains by {domains['mean_js_bits']:.4f} bits "
            "(Jensen-Shannon, mean over layers); two halves of one domain differ by "
            f"{domains['mean_noise_floor_bits']:.4f}"
        )
