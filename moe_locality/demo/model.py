"""The main job on the example model: train and record, place, run the same batches again, compare.
Or on a recorded trace (``run_trace``), where nothing is run: every cost is predicted, and says so.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.analysis import analyze
from moe_locality.compare import (
    Candidate,
    Comparison,
    Run,
    compare_plans,
    compare_runs,
    read_arrays,
    read_run,
    track_comparison,
)
from moe_locality.demo.checks import (
    Agreement,
    check_agreement,
    check_prediction,
    counted_imbalance,
    ranks_of_requests,
)
from moe_locality.demo.launch import DemoOptions, Progress, run_training
from moe_locality.errors import MoeLocalityError, TraceError
from moe_locality.placement import PlacementPlan, assign_homes, solve
from moe_locality.placement.homes.assign import write_homes
from moe_locality.placement.homes.predictor import default_prediction
from moe_locality.placement.problem import warnings_once
from moe_locality.placement.solve import COMPARED
from moe_locality.report import (
    Headline,
    ReportData,
    trace_facts,
    trace_figures,
    trace_report,
    trace_summary_table,
    trace_words,
    write_report,
)
from moe_locality.topology import ClusterTopology
from moe_locality.trace import PREFILL, RoutingTrace, read_trace
from moe_locality.tracking import Tracker, package_versions, start_tracking

CONTINUE_STEPS = 6
FIT_FRACTION = 0.7
"""The share of a recorded trace that is placed; the rest is judged."""
PREDICT_FROM = "first:32"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDemo:
    """What the stages found; ``predicted`` compares plans on the trace, ``measured`` the runs."""

    held_out: RoutingTrace
    analysis: dict[str, Any]
    plan: PlacementPlan
    topology: ClusterTopology
    runs: dict[str, Run]
    """"linear", "placed" and "once_per_node", in this order"""
    predicted: Comparison
    measured: Comparison
    agreements: dict[str, Agreement]
    """of "stock" (the recorded run), "placed" and "once_per_node" with the usual order"""
    bytes_checked: dict[str, Any]


def run_model(options: DemoOptions, progress: Progress) -> ModelDemo:
    """Run every stage; MoeLocalityError: a run failed, or two that must agree do not."""
    out = options.out
    _train(options, progress)
    seen, held_out = read_recorded(out / "record")
    analysis = analyze(held_out, seed=options.seed)
    if domains := analysis["domains"]:
        progress.say(
            f"routing differs between domains by {domains['mean_js_bits']:.4f} bits "
            "(Jensen-Shannon, mean over layers); two halves of one domain differ by "
            f"{domains['mean_noise_floor_bits']:.4f}"
        )
    topology = ClusterTopology.uniform(options.num_nodes, options.ranks_per_node)
    with progress.stage("place the experts (requests of the training text)"):
        cap, seed = options.max_imbalance, options.seed
        plan = solve(seen, topology, homes="joint", max_imbalance=cap, seed=seed)
        plan.write(out / "plan.json")
    homes = _homes(options, held_out, plan, topology)
    flat, placed = ["--exchange", "flat"], ["--plan", str(out / "plan.json")]
    placed += ["--homes", str(out / "homes.json")]
    arguments = {"linear": flat, "placed": [*placed, *flat]}
    arguments["once_per_node"] = [*placed, "--exchange", "hierarchical"]
    runs = {name: _run(options, name, extra, progress) for name, extra in arguments.items()}
    linear = runs["linear"]
    usual = solve(seen, topology, method="linear")
    candidates = [
        Candidate(name="linear", plan=usual, homes=ranks_of_requests(linear)),
        Candidate(name="placed", plan=plan, homes=homes),
    ]
    stock = read_run(out / "record", "stock")
    agreements = {"stock": check_agreement(stock, linear, training=False)}
    agreements |= {n: check_agreement(linear, runs[n]) for n in ("placed", "once_per_node")}
    checked = {}
    for name, run in runs.items():
        flips = agreements["stock"].flips + (agreements[name].flips if run is not linear else 0)
        cost = "copies" if name == "once_per_node" else "picks"
        of = usual if run is linear else plan
        checked[name] = check_prediction(run, held_out, of, topology, cost, flips=flips)
    return ModelDemo(
        held_out=held_out,
        analysis=analysis,
        plan=plan,
        topology=topology,
        runs=runs,
        predicted=compare_plans(held_out, candidates, topology, seed=options.seed),
        measured=compare_runs(linear, runs["placed"], node_of_rank=topology.rank_to_node),
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


def _train(options: DemoOptions, progress: Progress) -> None:
    folder = options.out / "record"
    arguments = ["--layer", "stock", "--trace", str(folder / "trace"), "--record-again"]
    arguments += ["--save-checkpoint", str(folder / "checkpoint")]
    arguments += [] if options.steps is None else ["--steps", str(options.steps)]
    _launch(options, "record", "train with stock DeepSpeed layers and record", arguments, progress)


def _run(options: DemoOptions, name: str, extra: list[str], progress: Progress) -> Run:
    """Run the held-out requests, then a few more training steps, from the recorded checkpoint."""
    checkpoint = str(options.out / "record" / "checkpoint")
    arguments = ["--layer", "locality", "--load-checkpoint", checkpoint, "--eval-only"]
    arguments += ["--continue-steps", str(CONTINUE_STEPS), *extra]
    title = f"same batches, our layer, {name.replace('_', ' ')}"
    _launch(options, name, title, arguments, progress)
    return read_run(options.out / name, name)


def _launch(
    options: DemoOptions, name: str, title: str, arguments: list[str], progress: Progress
) -> None:
    """Run the training script; its files go to the folder ``name``."""
    folder = options.out / name
    common = ["--preset", options.preset, "--seed", str(options.seed)]
    common += ["--num-nodes", str(options.num_nodes), "--out", str(folder)]
    common += ["--metrics", str(folder / "metrics.jsonl")]
    with progress.stage(title) as update:
        run_training(
            [*common, *arguments],
            num_ranks=options.num_ranks,
            log=folder / "log.txt",
            on_progress=update,
        )


def _homes(
    options: DemoOptions, held_out: RoutingTrace, plan: PlacementPlan, topology: ClusterTopology
) -> dict[int, int]:
    """Give every held-out request a home, batch by batch, from its first tokens only."""
    # requests of a global batch, as the run itself reported them
    summary = json.loads((options.out / "record" / "summary.json").read_text(encoding="utf-8"))
    size = int(summary["global_batch"])
    homes: dict[int, int] = {}
    for start in range(0, len(held_out.request_ids), size):
        batch = held_out.filter(requests=held_out.request_ids[start : start + size])
        homes |= assign_homes(batch, plan, topology, predict=PREDICT_FROM, equal_requests=True)
    write_homes(homes, options.out / "homes.json")
    return homes


def publish(options: DemoOptions, found: ModelDemo, progress: Progress) -> dict[str, Any]:
    """Print the outcome, write the report and the wandb runs, and return the figures."""
    facts = outcome(options, found)
    for line in outcome_lines(facts):
        progress.say(line)
    report = options.out / "report.html"
    with progress.stage("write report and wandb runs"):
        write_report(report_data(options, found, facts), report)
        directory = _track(options, found)
    if not facts["balance"]["kept"]:
        raise MoeLocalityError(
            f"{balance_line(facts)}: expected at most the cap, or what the usual order has; the "
            f"plan is less level than promised. Everything else held, see {report}"
        )
    return {**facts, "report": str(report), "wandb": directory}


def outcome(options: DemoOptions, found: ModelDemo) -> dict[str, Any]:
    """Return the figures of the demo as plain data; ``predicted`` ones say so in their name."""
    domains = found.analysis["domains"]
    bytes_of = {name: check["counted_bytes"] for name, check in found.bytes_checked.items()}
    balance = {
        name: counted_imbalance(found.runs[name], found.topology) for name in ("linear", "placed")
    }
    node = {name: measured["node"] for name, measured in balance.items()}
    copies = found.predicted.row("copies")
    placed = found.agreements["placed"]

    def worst(name: str) -> float:
        return max(getattr(found.agreements[run], name) for run in ("placed", "once_per_node"))

    return {
        "kind": "model",
        "cluster": f"{options.num_nodes} nodes x {options.ranks_per_node} ranks (emulated)",
        "held_out_requests": placed.requests,
        "held_out_tokens": found.held_out.num_tokens,
        "domain_js_bits": domains["mean_js_bits"] if domains else None,
        "domain_noise_floor_bits": domains["mean_noise_floor_bits"] if domains else None,
        "cross_node_dispatch_bytes": bytes_of,
        "cross_node_dispatch_saved": {
            name: 1 - size / bytes_of["linear"] for name, size in bytes_of.items()
        },
        "prediction_check": found.bytes_checked,
        "node_imbalance": node,
        "rank_imbalance": {name: measured["rank"] for name, measured in balance.items()},
        "predicted_copies": dict(zip(balance, copies.values, strict=True)) if copies else {},
        "balance": {
            "cap": options.max_imbalance,
            "expected": found.plan.provenance["expected_imbalance"],
            "counted": node["placed"],
            "usual_order": node["linear"],
            "kept": node["placed"] <= max(options.max_imbalance, node["linear"]),
        },
        "max_loss_difference": worst("max_loss_difference"),
        "max_logit_difference": worst("max_logit_difference"),
        "max_train_loss_difference": worst("max_train_loss_difference"),
        "placed_max_loss_difference": placed.max_loss_difference,
        "placed_max_train_loss_difference": placed.max_train_loss_difference,
        "train_steps_compared": placed.train_steps,
        "flips": {name: asdict(some) for name, some in found.agreements.items()},
        "plan_digest": found.plan.digest(),
    }


def outcome_lines(facts: dict[str, Any]) -> list[str]:
    """Return the outcome in a few lines."""
    sizes, saved = facts["cross_node_dispatch_bytes"], facts["cross_node_dispatch_saved"]
    pairs = [(c["predicted_rows"], c["counted_rows"]) for c in facts["prediction_check"].values()]
    # the same, but for picks that rounding flipped
    rows = [f"{told:,} {'=' if told == seen else 'against'} {seen:,}" for told, seen in pairs]
    return [
        f"held-out requests: {facts['held_out_requests']} ({facts['held_out_tokens']:,} tokens), "
        f"on {facts['cluster']}",
        f"dispatched bytes across nodes (counted): {sizes['linear']:,} linear, "
        f"{sizes['placed']:,} placed ({saved['placed']:.1%} saved), {sizes['once_per_node']:,} "
        f"placed and each token sent once per node ({saved['once_per_node']:.1%} saved)",
        f"rows across nodes, predicted from the trace and counted: {', '.join(rows)}",
        balance_line(facts),
        "largest difference of a request's loss from linear: "
        f"{facts['placed_max_loss_difference']:.1e} placed, "
        f"{facts['max_loss_difference']:.1e} once per node; of "
        f"{facts['train_steps_compared']} further training losses: "
        f"{facts['placed_max_train_loss_difference']:.1e} placed, "
        f"{facts['max_train_loss_difference']:.1e} once per node",
        flips_line(facts["flips"]),
    ]


def balance_line(facts: dict[str, Any]) -> str:
    """Return how level the nodes were, and whether the cap was kept."""
    found = facts["balance"]
    said = f"within the cap of {found['cap']:g}"
    if found["counted"] > found["cap"]:
        said = f"ABOVE the cap of {found['cap']:g}"
    return (
        f"busiest node / mean (counted): {found['usual_order']:.3f} linear, "
        f"{found['counted']:.3f} placed, {said} ({found['expected']:.3f} was expected)"
    )


def flips_line(flips: dict[str, dict[str, Any]]) -> str:
    """Return how many picks rounding has flipped, and what came of it."""
    flipped = {name: found for name, found in flips.items() if found["flips"]}
    if not flipped:
        pairs = max(found["pairs"] for found in flips.values())
        return f"picks that differ between the runs: none of {pairs:,} (token, layer) pairs"
    parts = []
    for name, found in flipped.items():
        part = (
            f"{name.replace('_', ' ')}: {found['flips']} of {found['pairs']:,} (token, layer) "
            f"pairs, {found['near_ties']} of them near-ties that rounding flipped (gap of router "
            f"logits at most {found['max_gap']:.1e}), the others follow from those"
        )
        if found["flipped_requests"]:
            part += (
                f"; losses of the {found['flipped_requests']} held-out requests concerned differ "
                f"by up to {found['max_loss_difference_after_flips']:.1e}"
            )
        if found["train_steps_after_flips"]:
            part += (
                f"; the {found['train_steps_after_flips']} training losses from a flip on differ "
                f"by up to {found['max_train_loss_difference_after_flips']:.1e}"
            )
        parts.append(part)
    return "picks that differ from the usual order: " + "; ".join(parts)


def report_data(options: DemoOptions, found: ModelDemo, facts: dict[str, Any]) -> ReportData:
    """Return the report: measured first, then predicted, then what the routing looks like."""
    trace = found.held_out
    return ReportData(
        title="moe_locality demo: the same batches with and without placement",
        summary=(
            "A small mixture-of-experts language model was trained by DeepSpeed on text of "
            f"{len(trace.domain)} domains and its routing recorded, with the trained weights: a "
            "router that still trains moves. Experts and requests were then placed, and the same "
            "held-out requests and further training steps run three times "
            "through moe_locality's layer: in the usual order, with the placement, and with the "
            "placement through the exchange that sends each token once per node.",
            *(f"{line[0].upper()}{line[1:]}." for line in outcome_lines(facts)),
            *found.predicted.notes,
            *trace_words(found.analysis),
        ),
        facts=(
            *trace_facts(trace),
            ("cluster", facts["cluster"]),
            ("plan", found.plan.digest()[:12]),
        ),
        versions=package_versions(),
        command=options.command,
        headlines=_headlines(facts),
        figures=(
            *found.measured.figures,
            *found.predicted.figures,
            *trace_figures(trace, found.analysis, seed=options.seed),
        ),
        tables=(
            found.measured.table(),
            found.predicted.table(),
            *found.measured.tables,
            *found.predicted.tables,
            trace_summary_table(found.analysis),
        ),
    )


def _headlines(facts: dict[str, Any]) -> tuple[Headline, ...]:
    """The figures in large type."""
    sizes, saved = facts["cross_node_dispatch_bytes"], facts["cross_node_dispatch_saved"]
    balance = facts["balance"]
    flipped = any(found["flips"] for found in facts["flips"].values())
    checks = facts["prediction_check"].values()
    off = any(check["predicted_rows"] != check["counted_rows"] for check in checks)
    return (
        *(
            Headline(
                label="bytes across nodes (measured, dispatch)",
                value=f"{-saved[name]:+.1%}",
                context=f"{words}: {sizes['linear']:,} → {sizes[name]:,}",
            )
            for name, words in (("placed", "placed"), ("once_per_node", "placed, once per node"))
        ),
        Headline(
            label="busiest node / mean (measured)",
            value=f"{balance['counted']:.3f}",
            context=f"{'ABOVE' if balance['counted'] > balance['cap'] else 'within'} the cap of "
            f"{balance['cap']:g}; linear {balance['usual_order']:.3f}",
        ),
        Headline(
            label="largest difference of a request's loss",
            value=f"{facts['placed_max_loss_difference']:.1e}",
            context="nats per token, placed against linear; once per node: "
            f"{facts['max_loss_difference']:.1e}"
            + ("; without requests with a flip" if flipped else ""),
        ),
        Headline(
            label="predicted rows = counted rows",
            value="exact",
            context="all three runs" + (", but for the picks that rounding flipped" if off else ""),
        ),
    )


def _track(options: DemoOptions, found: ModelDemo) -> str | None:
    """One wandb run per job of the experiment, in one group."""
    group = f"demo-seed{options.seed}-{found.plan.digest()[:8]}"
    out = options.out

    def run(job: str, name: str) -> Tracker:
        config = {"demo": {"seed": options.seed, "preset": options.preset}, "run": name}
        settings = options.tracking(group=group, job_type=job, name=name)
        return start_tracking(settings, run_config=config)

    for name, trained in found.runs.items():
        with run("train", name) as tracker:
            tokens = 0
            for step in trained.steps:
                tokens += int(step.get("tokens", 0))
                values = {"quality/loss": step["loss"], "time/step_us": step["step_s"] * 1e6}
                tracker.log(values, tokens=tokens)
            link = (trained.traffic or {})["by_link"]["dispatch"]
            traffic = {
                "traffic/cross_node_bytes": link["cross_node"],
                "traffic/cross_node_frac": link["cross_node"] / sum(link.values()),
                "load/node_imbalance": counted_imbalance(trained, found.topology)["node"],
            }
            tracker.log(traffic, tokens=tokens + found.held_out.num_tokens)
    with run("compare", "compare") as tracker:
        track_comparison(tracker, found.measured)
        files = [out / "plan.json", out / "homes.json", out / "report.html"]
        track_comparison(tracker, found.predicted, files=files)
        tracker.log_artifact("trace", "trace", [out / "record" / "trace"])
        return str(tracker.directory) if tracker.directory else None


# -- on a recorded trace


@warnings_once()
def run_trace(options: DemoOptions, progress: Progress) -> dict[str, Any]:
    """Run every stage; return the figures. MoeLocalityError: the trace does not do for it."""
    with progress.stage("read the trace"):
        trace = read_trace(options.trace)  # pyright: ignore[reportArgumentType]  checked by run_demo
        if trace.kind != "tokens":
            raise TraceError(
                f"{options.trace} holds counts only, expected the picks of every token: counts do "
                "not say which experts are picked together; use `moe-locality place` on them"
            )
        fit, held_out = trace.split(FIT_FRACTION, seed=options.seed)
    with progress.stage("analyze"):
        analysis = analyze(held_out, seed=options.seed)
    topology = ClusterTopology.uniform(options.num_nodes, options.ranks_per_node)
    candidates = _candidates(options, fit, held_out, topology, progress)
    with progress.stage("evaluate on the other requests"):
        found = compare_plans(held_out, candidates, topology, seed=options.seed)
    plan_path, report_path = options.out / "plan.json", options.out / "report.html"
    candidates[-1].plan.write(plan_path)
    with progress.stage("write report and wandb run"):
        page = trace_report(
            held_out,
            comparison=found,
            summary=analysis,
            seed=options.seed,
            command=options.command,
        )
        write_report(page, report_path)
        settings = options.tracking(group=trace.model or None, job_type="place")
        with start_tracking(settings, run_config={"options": options.command}) as tracker:
            track_comparison(tracker, found, files=[plan_path, report_path])
            wandb_dir = tracker.directory
    for row in found.rows:
        shown = "  ".join(f"{v:9.4f}" if v is not None else "        -" for v in row.values)
        progress.say(f"{row.metric:<15} {shown}  ({row.how})")
    progress.say(f"columns: {', '.join(found.names)}")
    for note in found.notes:
        progress.say(note)
    return {
        "kind": "trace",
        "model": trace.model,
        "fit_tokens": fit.num_tokens,
        "held_out_tokens": held_out.num_tokens,
        **found.to_dict(),
        "plan": str(plan_path),
        "report": str(report_path),
        "wandb": str(wandb_dir) if wandb_dir else None,
    }


def _candidates(
    options: DemoOptions,
    fit: RoutingTrace,
    held_out: RoutingTrace,
    topology: ClusterTopology,
    progress: Progress,
) -> list[Candidate]:
    """Every method with random homes, then the joint plan with homes predicted for new requests."""
    found, given = [], {"max_imbalance": options.max_imbalance, "seed": options.seed}
    with progress.stage("place on part of the requests") as update:
        for done, method in enumerate(COMPARED):
            update(done, len(COMPARED) + 1, method)
            plan = solve(fit, topology, method=method, **given)
            found.append(Candidate(name=method, plan=plan))
        update(len(COMPARED), len(COMPARED) + 1, "coactivation with homes")
        joint = solve(fit, topology, homes="joint", **given)
        predict = default_prediction(held_out)
        homes = assign_homes(held_out, joint, topology, predict=predict)
        found.append(Candidate(name=f"joint, {predict}", plan=joint, homes=homes))
    return found
