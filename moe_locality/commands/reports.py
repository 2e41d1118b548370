"""Commands that put things side by side: compare, report."""

from pathlib import Path
from typing import Any

from moe_locality.commands.inputs import (
    check_writable,
    read_fitting_plan,
    read_homes,
    read_judged,
)
from moe_locality.commands.output import Result, progress, published, table
from moe_locality.commands.plans import linear_plan, topology_of
from moe_locality.compare import (
    Candidate,
    Comparison,
    compare_plans,
    compare_runs,
    comparison_report,
    read_run,
    trace_report,
    track_comparison,
)
from moe_locality.config import TrackingConfig
from moe_locality.errors import ConfigError, PlacementError
from moe_locality.report import write_report
from moe_locality.trace import RoutingTrace
from moe_locality.tracking import require_wandb, start_tracking


def compare(
    first: Path,
    second: Path | None,
    plan: list[Path] | None,
    baseline: str,
    homes: Path | None,
    nodes: int | None,
    held_out: float,
    report: Path | None,
    seed: int,
    wandb: str | None,
    wandb_mode: str,
    wandb_dir: str | None,
    group: str | None,
) -> Result:
    """Compare two run directories, or plans on a trace."""
    if report is not None:
        check_writable(report, "report", first, *(plan or []), homes)
    if (second is None) == (not plan):
        raise ConfigError(
            "found "
            + ("neither a second run nor a plan" if second is None else "both runs and plans")
            + ", expected `compare RUN_A RUN_B` or `compare TRACE --plan plan.json`"
        )
    if nodes is not None and second is None:
        raise ConfigError(
            "found --nodes with plans, expected it with two runs: a plan names its cluster"
        )
    settings = tracking_settings(wandb, wandb_mode, wandb_dir, group)
    with progress("comparing"):
        if second is not None:
            found = _runs(first, second, nodes)
            page = comparison_report(found, command=f"moe-locality compare {first} {second}")
        else:
            trace = read_judged(first, held_out, seed)
            found = _plans(trace, plan or [], baseline, homes, seed)
            words = " ".join(f"--plan {path}" for path in plan or [])
            page = comparison_report(found, command=f"moe-locality compare {first} {words}")
        if report is not None:
            write_report(page, report)
    payload = {
        "command": "compare",
        **found.to_dict(),
        "report": report,
        "wandb": None,
    }
    files = [*(plan or []), *([report] if report else [])]

    def then() -> Result:
        return published(payload, lambda: {"wandb": _track(settings, found, files)})

    return Result(
        payload=payload,
        show=lambda console: _show(console, found, report),
        then=None if settings is None else then,
    )


def tracking_settings(
    project: str | None, mode: str, folder: str | None, group: str | None
) -> TrackingConfig | None:
    """Return the settings of the wandb run, or None where no project was named.

    Raises:
        ConfigError: the mode is unknown.
        BackendUnavailable: wandb is not installed.
    """
    if mode not in ("offline", "online", "disabled"):
        raise ConfigError(f"--wandb-mode: found {mode!r}, expected offline, online or disabled")
    if project is None:
        return None
    require_wandb()  # now, not when the work is done
    return TrackingConfig(
        project=project,
        group=group,
        job_type="compare",
        dir=folder,
        mode=mode,  # pyright: ignore[reportArgumentType]  checked above
    )


def _track(settings: TrackingConfig | None, found: Comparison, files: list[Path]) -> Path | None:
    commits = {name: source.get("commit") for name, source in found.sources.items()}
    config = {
        "comparison": dict(found.facts),
        "compared": found.sources,
        "commit": {name: commit for name, commit in commits.items() if commit} or None,
    }
    with start_tracking(settings, run_config=config) as tracker:
        track_comparison(tracker, found, files=files)
        return tracker.directory


def _runs(first: Path, second: Path, nodes: int | None) -> Comparison:
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
    trace: RoutingTrace, paths: list[Path], baseline: str, homes: Path | None, seed: int
) -> Comparison:
    plans = [(path.stem, read_fitting_plan(path, trace)) for path in paths]
    if baseline == "linear":
        first = linear_plan(trace, topology_of(plans[0][1]))
        if first is None:
            raise PlacementError(
                f"found no linear layout of {trace.num_experts} experts on "
                f"{plans[0][1].num_ranks} ranks, expected a multiple: give --baseline PLAN"
            )
    else:
        first = read_fitting_plan(Path(baseline), trace)
    candidates = [Candidate(name=Path(baseline).stem, plan=first)]
    taken = {candidates[0].name}
    for name, plan in plans:
        label = name if name not in taken else f"{name} ({len(taken) + 1})"
        taken.add(label)
        candidates.append(Candidate(name=label, plan=plan))
    if homes is not None:
        last = candidates[-1]
        ranks = read_homes(homes, last.plan)
        candidates.append(Candidate(name=last.name, plan=last.plan, homes=ranks))
    return compare_plans(trace, candidates, seed=seed)


def _show(console: Any, found: Comparison, report: Path | None) -> None:
    rows = found.table()
    console.print(table(rows.title, rows.columns, rows.rows))
    for note in found.notes:
        console.print(f"Note: {note}")
    if report is not None:
        console.print(f"report: {report}", soft_wrap=True)


def report(
    trace: Path,
    out: Path,
    plan: list[Path] | None,
    method: list[str] | None,
    homes: Path | None,
    held_out: float,
    seed: int,
) -> Result:
    """Write the page of a trace, and of the plans on it."""
    check_writable(out, "report", trace, *(plan or []), homes)
    with progress(f"reporting {trace}"):
        content = read_judged(trace, held_out, seed)
        found = None
        if plan:
            found = _plans(content, plan, "linear", homes, seed)
            if method:
                found = _with_methods(content, plan, method, homes, seed)
        elif method or homes:
            raise ConfigError(
                "found --method or --homes without --plan, expected a plan: it names the cluster"
            )
        line = " ".join(
            ["moe-locality report", str(trace), *(f"--plan {p}" for p in plan or ())]
            + [f"--method {m}" for m in method or ()]
            + ([f"--homes {homes}"] if homes else [])
            + [f"--held-out {held_out} -o {out} --seed {seed}"]
        )
        page = trace_report(content, seed=seed, command=line, comparison=found)
        write_report(page, out)
    payload = {
        "command": "report",
        "report": out,
        "bytes": out.stat().st_size,
        "figures": [figure.title for figure in page.figures],
        "comparison": None if found is None else found.to_dict(),
    }
    return Result(payload=payload, text=(f"{out}: {len(page.figures)} figures",))


def _with_methods(
    trace: RoutingTrace, paths: list[Path], methods: list[str], homes: Path | None, seed: int
) -> Comparison:
    """Compare also with plans solved now, so that the balance-locality figure shows the choice."""
    from moe_locality.placement.solve import solve

    plans = [(path.stem, read_fitting_plan(path, trace)) for path in paths]
    topology = topology_of(plans[0][1])
    cap = plans[0][1].provenance.get("max_imbalance", 1.05)
    first = linear_plan(trace, topology)
    candidates = [] if first is None else [Candidate(name="linear", plan=first)]
    for name in dict.fromkeys(m for m in methods if m != "linear"):
        made = solve(trace, topology, method=name, max_imbalance=cap, seed=seed)
        candidates.append(Candidate(name=f"{name} (solved here)", plan=made))
    candidates += [Candidate(name=name, plan=made) for name, made in plans]
    if homes is not None:
        name, made = plans[-1]
        candidates.append(Candidate(name=name, plan=made, homes=read_homes(homes, made)))
    return compare_plans(trace, candidates, seed=seed)
