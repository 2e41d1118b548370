"""The demo on a recorded trace: analyze, place on part of the requests, evaluate on the others.

Nothing is trained or run here, so every cost is predicted, and says so.
"""

from typing import Any

from moe_locality.analysis import analyze
from moe_locality.compare import Candidate, compare_plans, track_comparison
from moe_locality.demo.launch import DemoOptions, Progress
from moe_locality.errors import TraceError
from moe_locality.placement import assign_homes, solve
from moe_locality.placement.homes.predictor import default_prediction
from moe_locality.placement.problem import warnings_once
from moe_locality.placement.solve import COMPARED
from moe_locality.report import trace_report, write_report
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace, read_trace
from moe_locality.tracking import start_tracking

FIT_FRACTION = 0.7


@warnings_once()
def run_trace(options: DemoOptions, progress: Progress) -> dict[str, Any]:
    """Run every stage and return the figures (plain data).

    Raises:
        MoeLocalityError: the trace cannot be read, or does not fit the cluster.
    """
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
        told: dict[str, Any] = {"comparison": found, "summary": analysis}
        page = trace_report(held_out, seed=options.seed, command=options.command, **told)
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
