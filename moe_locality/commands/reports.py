"""Commands that put things side by side: compare, report, demo."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

import moe_locality
from moe_locality.commands import inputs
from moe_locality.commands.output import Result, progress, published, table
from moe_locality.errors import ConfigError, PlacementError

if TYPE_CHECKING:
    from moe_locality import RoutingTrace
    from moe_locality.compare import Comparison, SplitFrom
    from moe_locality.config import TrackingConfig

Wandb = Annotated[str | None, Option(help="Also log to this wandb project.")]
WandbDir = Annotated[str | None, Option(help="Where wandb keeps its files.")]


def compare(
    first: Annotated[Path, Argument(help="Trace, or the directory of the baseline run.")],
    second: Annotated[Path | None, Argument(help="Directory of the other run.")] = None,
    plan: inputs.Plans = None,
    baseline: Annotated[str, Option(help="linear, or a plan to compare with.")] = "linear",
    homes: inputs.Homes = None,
    nodes: inputs.Nodes = None,
    held_out: inputs.HeldOut = 0.0,
    report: inputs.Report = None,
    seed: inputs.Seed = 0,
    wandb: Wandb = None,
    wandb_mode: inputs.WandbMode = "offline",
    wandb_dir: WandbDir = None,
    group: Annotated[str | None, Option(help="wandb group (the experiment).")] = None,
) -> Result:
    """Compare two runs, or plans on a trace: baseline, ours, ratio."""
    from moe_locality.report import comparison_report, write_report

    plans = plan or []
    inputs.check_writable(report, "report", first, *plans, homes)
    if (second is None) == (not plans):
        what = "neither a second run nor a plan" if second is None else "both runs and plans"
        raise ConfigError(
            f"found {what}, expected `compare RUN_A RUN_B` or `compare TRACE --plan plan.json`"
        )
    if nodes is not None and second is None:
        raise ConfigError(
            "found --nodes with plans, expected it with two runs: a plan names its cluster"
        )
    settings = tracking_settings(wandb, wandb_mode, wandb_dir, group)
    with progress("comparing"):
        if second is not None:
            found, words = _runs(first, second, nodes), str(second)
        else:
            trace, _, origin = inputs.read_judged(first, held_out, seed)
            found = _plans(trace, plans, baseline, homes, seed, split_from=origin)
            words = " ".join(f"--plan {path}" for path in plans)
        if report is not None:
            command = f"moe-locality compare {first} {words}"
            write_report(comparison_report(found, command=command), report)
    payload = {"command": "compare", **found.to_dict(), "report": report, "wandb": None}
    files = plans if report is None else [*plans, report]

    def show(console: Any) -> None:
        rows = found.table()
        console.print(table(rows.title, rows.columns, rows.rows))
        for note in found.notes:
            console.print(f"Note: {note}")
        if report is not None:
            console.print(f"report: {report}", soft_wrap=True)

    def then() -> Result:
        return published(payload, lambda: {"wandb": _track(settings, found, files)})

    return Result(payload=payload, show=show, then=None if settings is None else then)


def tracking_settings(
    project: str | None, mode: str, folder: str | None, group: str | None, job: str = "compare"
) -> TrackingConfig | None:
    """Return the settings of the wandb run, or None where no project was named. ConfigError: the
    mode is unknown; BackendUnavailable: wandb is not installed."""
    mode = inputs.known_wandb_mode(mode)
    if project is None:
        return None
    from moe_locality.config import TrackingConfig
    from moe_locality.tracking import require_wandb

    require_wandb()  # now, not when the work is done
    return TrackingConfig(project=project, group=group, job_type=job, dir=folder, mode=mode)


def _track(settings: TrackingConfig | None, found: Comparison, files: list[Path]) -> Path | None:
    from moe_locality.compare import track_comparison
    from moe_locality.tracking import start_tracking

    known = {name: source.get("commit") for name, source in found.sources.items()}
    commits = {name: commit for name, commit in known.items() if commit} or None
    config = {"comparison": dict(found.facts), "compared": found.sources, "commit": commits}
    with start_tracking(settings, run_config=config) as tracker:
        track_comparison(tracker, found, files=files)
        return tracker.directory


def _runs(first: Path, second: Path, nodes: int | None) -> Comparison:
    from moe_locality.compare import compare_runs, read_run

    pair = read_run(first), read_run(second)
    node_of_rank = None
    if nodes is not None:
        sizes = {len(run.traffic["ranks"]) for run in pair if run.traffic}
        ranks = max(sizes, default=0)
        if not ranks or ranks % nodes:
            raise ConfigError(
                f"--nodes: found {nodes} nodes for {ranks} ranks, expected a divisor of the ranks"
            )
        node_of_rank = tuple(rank // (ranks // nodes) for rank in range(ranks))
    return compare_runs(*pair, node_of_rank=node_of_rank)


def _plans(
    trace: RoutingTrace,
    paths: list[Path],
    baseline: str,
    homes: Path | None,
    seed: int,
    methods: Sequence[str] = (),
    split_from: SplitFrom | None = None,
) -> Comparison:
    """Compare the plans with the baseline, and with what ``methods`` give here under their cap."""
    from moe_locality.compare import Candidate, compare_plans

    plans = [(path.stem, inputs.read_fitting_plan(path, trace)) for path in paths]
    topology = plans[0][1].topology
    if baseline == "linear":
        first = inputs.linear_plan(trace, topology)
        if first is None:
            raise PlacementError(
                f"found no linear layout of {trace.num_experts} experts on "
                f"{topology.num_ranks} ranks, expected a multiple: give --baseline PLAN"
            )
    else:
        first = inputs.read_fitting_plan(Path(baseline), trace)
    candidates = [Candidate(name=Path(baseline).stem, plan=first)]
    cap = plans[0][1].provenance.get("max_imbalance", 1.05)
    for name in dict.fromkeys(m for m in methods if m != "linear"):
        made = moe_locality.solve(trace, topology, method=name, max_imbalance=cap, seed=seed)
        candidates.append(Candidate(name=f"{name} (solved here)", plan=made))
    taken = {candidates[0].name}
    for name, plan in plans:
        label = name if name not in taken else f"{name} ({len(taken) + 1})"
        taken.add(label)
        candidates.append(Candidate(name=label, plan=plan))
    if homes is not None:
        last = candidates[-1]
        ranks = inputs.homes_of(homes, last.plan)
        candidates.append(Candidate(name=last.name, plan=last.plan, homes=ranks))
    return compare_plans(trace, candidates, seed=seed, split_from=split_from)


def report(
    trace: inputs.Trace,
    out: Annotated[Path, Option("-o", "--out", help="HTML file to write.")],
    plan: inputs.Plans = None,
    method: Annotated[list[str] | None, Option(help="Also solve with it; may be repeated.")] = None,
    homes: inputs.Homes = None,
    held_out: inputs.HeldOut = 0.0,
    seed: inputs.Seed = 0,
) -> Result:
    """Write one HTML file: a trace, and the plans on it; or a run of serve --metrics."""
    from moe_locality.report import trace_report, write_report

    plans, methods, found = plan or [], method or [], None
    inputs.check_writable(out, "report", trace, *plans, homes)
    with progress(f"reporting {trace}"):
        if next(trace.glob("metrics-*.jsonl"), None) is not None:
            from moe_locality.serving.metrics import serving_report

            page = serving_report(trace, command=f"moe-locality report {trace} -o {out}")
        else:
            content, _, origin = inputs.read_judged(trace, held_out, seed)
            if plans:
                found = _plans(content, plans, "linear", homes, seed, methods, origin)
            elif methods or homes:
                raise ConfigError(
                    "found --method or --homes without --plan, expected a plan: it names the "
                    "cluster"
                )
            words = ["moe-locality report", str(trace), *(f"--plan {path}" for path in plans)]
            words += [f"--method {name}" for name in methods]
            words += [f"--homes {homes}"] if homes else []
            words.append(f"--held-out {held_out} -o {out} --seed {seed}")
            line = " ".join(words)
            page = trace_report(content, seed=seed, command=line, comparison=found)
        write_report(page, out)
    payload = {"command": "report", "report": out, "bytes": out.stat().st_size}
    payload["figures"] = [figure.title for figure in page.figures]
    payload["comparison"] = None if found is None else found.to_dict()
    return Result(payload=payload, text=(f"{out}: {len(page.figures)} figures",))


def demo(
    out: Annotated[Path, Option(help="Directory of the results.")],
    trace: Annotated[Path | None, Option(help="Use this recorded trace.")] = None,
    nodes: Annotated[int, Option(min=1, help="Nodes of the cluster.")] = 2,
    ranks_per_node: Annotated[int, Option(min=1, help="On each.")] = 2,
    wandb_mode: inputs.WandbMode = "offline",
    seed: inputs.Seed = 0,
) -> Result:
    """Record, place, run again and compare, on this machine; every plan under a cap of 1.05."""
    mode = inputs.known_wandb_mode(wandb_mode)
    inputs.check_writable(out / "report.html", "demo results")
    from moe_locality.demo import run_demo

    payload = run_demo(
        out=out,
        trace=trace,
        num_nodes=nodes,
        ranks_per_node=ranks_per_node,
        wandb_mode=mode,
        seed=seed,
    )
    return Result(payload={"command": "demo", **payload}, text=(str(payload["report"]),))
