"""Commands about traces: import, analyze (with drift), record."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

import moe_locality
from moe_locality.commands import inputs
from moe_locality.commands.output import Result, progress, table
from moe_locality.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from moe_locality import RoutingTrace

MEASURES = (
    ("loads differ by, bits", "js_bits"),
    ("without drift, bits", "noise_floor_bits"),
    ("cosine of the loads", "load_cosine"),
    ("pairs differ by, bits", "pairs_js_bits"),
    ("without drift, bits", "pairs_noise_floor_bits"),
    ("top 5 % of pairs kept", "top_pairs_kept"),
)


def import_(
    files: Annotated[
        list[Path],
        Argument(help="Routing record of another tool, several, or a directory of them."),
    ],
    out: Annotated[Path, Option(help="Directory of the trace.")],
    overwrite: Annotated[bool, Option("--overwrite", help="Replace another trace.")] = False,
    format: Annotated[
        str | None,
        Option(
            help="npz, json, csv, megatron, vllm, sglang, sglang-dump, slime or llamacpp. "
            "Default: found from the content."
        ),
    ] = None,
    model: Annotated[str | None, Option(help="Name, where F has none.")] = None,
    num_experts: Annotated[int | None, Option(min=1, help="Experts, where F does not say.")] = None,
    top_k: Annotated[
        int | None, Option(min=1, help="Picks per token, where F does not say.")
    ] = None,
    num_layers: Annotated[
        int | None, Option(min=1, help="Transformer layers of the model, where F does not say.")
    ] = None,
    layers: Annotated[
        str | None, Option(help="Layers to take, as 1,3,5-9. Default: all that hold picks.")
    ] = None,
    table: Annotated[
        Path | None, Option(help="CSV or JSON: name of a request, its request_id and domain.")
    ] = None,
) -> Result:
    """Turn another tool's routing record into a trace."""
    from moe_locality.trace.importers import find_format, import_to

    given = files[0] if len(files) == 1 else files
    with progress(f"importing {files[0]}") as update:
        found = find_format(given) if format is None else format
        summary = import_to(
            given,
            out,
            format=format,
            model=model,
            num_experts=num_experts,
            top_k=top_k,
            num_layers=num_layers,
            layers=inputs.layer_numbers(layers),
            table=table,
            overwrite=overwrite,
            report=lambda done, total: update(done, total, ""),
        )
    payload = {"command": "import", "trace": out, "format": found, **summary}
    words = (
        f"{out}: {summary['tokens']:,} tokens of {summary['requests']:,} requests, "
        f"{summary['layers']} MoE layers of {summary['num_experts']} experts, "
        f"top {summary['top_k']}, {len(summary['domains'])} domains; "
        f"model {summary['model'] or 'not named'}"
    )
    if summary["left_out"]:
        words += f"; {len(summary['left_out'])} of the requests or files left out, see the warnings"
    return Result(payload=payload, text=(words,))


def analyze(
    trace: inputs.Trace,
    report: inputs.Report = None,
    nodes: inputs.Nodes = None,
    ranks_per_node: inputs.RanksPerNode = None,
    cluster: inputs.Cluster = None,
    hostfile: inputs.Hostfile = None,
    against: Annotated[Path | None, Option(help="Newer trace: say how far it drifted.")] = None,
    windows: Annotated[int | None, Option(help="Say how far windows of the trace drifted.")] = None,
    plan: Annotated[Path | None, Option(help="With drift: what this plan loses by it.")] = None,
    seed: inputs.Seed = 0,
) -> Result:
    """Show what a trace holds: balance, domains, co-activation; with a cluster, what it could
    save, all kinds of plan under the same cap of 1.05 so that they can be compared."""
    from moe_locality import report as reports
    from moe_locality.analysis import analyze as describe
    from moe_locality.analysis.potential import potential, tradeoff
    from moe_locality.placement.problem import warnings_once

    inputs.check_writable(report, "report", trace, plan, against, cluster, hostfile)
    named = (nodes, ranks_per_node, cluster, hostfile)
    topology = inputs.read_cluster(*named) if any(value is not None for value in named) else None
    found_potential, points = None, []
    with progress(f"analyzing {trace}") as update, warnings_once():
        content = moe_locality.read_trace(trace)
        summary = describe(content, seed)
        payload: dict[str, Any] = {"command": "analyze", "path": trace, **summary}
        payload |= (drift := drift_payload(content, against, windows, plan, seed))
        if topology is not None:
            names: Any = {"trace_name": str(trace), "progress": update}
            found_potential = potential(content, topology, seed=seed, **names)
            points = tradeoff(content, topology, seed=seed)
            payload["potential"] = {**found_potential.to_dict(), "tradeoff": points}
        if report is not None:
            line = f"moe-locality analyze {trace} --report {report} --seed {seed}"
            page = reports.trace_report(content, seed=seed, command=line, summary=summary)
            if found_potential is not None:
                page = reports.add_potential(page, content, found_potential, points, seed)
            reports.write_report(page, report)
            payload["report"] = report
    found = reports.trace_summary_table(summary)

    def show(console: Any) -> None:
        console.print(f"[bold]{content.model or 'trace'}[/bold]  {trace}", soft_wrap=True)
        for line in reports.trace_words(summary):
            console.print(line)
        console.print(table("", found.columns, found.rows))
        show_drift(console, drift)
        if found_potential is not None:
            levers = reports.potential_table(found_potential)
            console.print(table(levers.title, levers.columns, levers.rows))
            console.print(found_potential.verdict, soft_wrap=True)
        if report is not None:
            console.print(f"report: {report}", soft_wrap=True)

    return Result(payload=payload, show=show)


def drift_payload(
    trace: RoutingTrace, against: Path | None, num_windows: int | None, plan: Path | None, seed: int
) -> dict[str, Any]:
    """What ``analyze`` adds about drift: {"drift": ...}; nothing where nothing was asked."""
    if against is not None and num_windows is not None:
        raise ConfigError(
            "found --against and --windows, expected one of them: compare two traces, or the "
            "windows of one"
        )
    if against is None and num_windows is None:
        if plan is not None:
            raise ConfigError(
                "found --plan alone, expected --against or --windows with it: a plan is costed on "
                "two traces, or use `moe-locality evaluate`"
            )
        return {}
    from moe_locality.analysis import drift as measures

    if against is not None:
        parts, names = [trace, moe_locality.read_trace(against)], [str(against)]
    else:
        parts = measures.windows(trace, num_windows or 0)
        names = [f"window {number + 1}" for number in range(1, len(parts))]
    first, *later = parts
    placed = None if plan is None else inputs.read_fitting_plan(plan, trace)
    rows = []
    for name, other in zip(names, later, strict=True):
        found = measures.compare(first, other, seed=seed)
        entry: dict[str, Any] = {"name": name, **dataclasses.asdict(found)}
        entry["layers_drifted"] = int(found.drifted.sum())
        if placed is not None:
            entry["plan"] = dataclasses.asdict(measures.compare_plan(first, other, placed))
        rows.append(entry)
    asked = {"against": against, "windows": num_windows, "plan": plan}
    return {"drift": {**asked, "compared": rows}}


def show_drift(console: Any, payload: dict[str, Any]) -> None:
    """Print what ``drift_payload`` found: means over the layers, and sentences about the plan."""
    if not payload:
        return
    found, rows, lines = payload["drift"], [], []
    for entry in found["compared"]:
        values = [_mean(entry[name]) for _, name in MEASURES]
        layers = f"{entry['layers_drifted']} of {len(entry['layer_ids'])}"
        rows.append((entry["name"], *values, layers))
        plan = entry.get("plan")
        if plan is None:
            continue
        words = f"{entry['name']}: {plan['copies_old']:.3f} copies become {plan['copies_new']:.3f}"
        if plan["saving_old"] is not None and plan["saving_new"] is not None:
            now = f"{plan['saving_new']:.1%} now"
            words += f" ({plan['saving_old']:.1%} less than linear before, {now})"
        lines.append(
            f"{words}, rank imbalance {plan['imbalance_old']:.3f} becomes "
            f"{plan['imbalance_new']:.3f}; a refresh of {plan['refresh_moved_share']:.1%} of the "
            f"slots: {plan['refresh_reason']}"
        )
    title = "Drift from this trace" if found["against"] else "Drift from the first window"
    console.print(table(title, ("", *(word for word, _ in MEASURES), "layers drifted"), rows))
    for line in lines:
        console.print(line)


def _mean(values: np.ndarray) -> float | str:
    import numpy as np

    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else "-"


def record(
    script: Annotated[str, Argument(help="Training script.")] = "train.py",
    trace: Annotated[str, Option(help="Directory of the trace.")] = "traces/run1",
    hostfile: inputs.Hostfile = None,
    deepspeed_config: Annotated[Path | None, Option(help="ds_config to check.")] = None,
) -> Result:
    """Print the launch line and the configuration that record a run."""
    from moe_locality.config import read_config
    from moe_locality.topology.sources import read_hostfile, select_slots

    section: dict[str, Any] = {"trace": {"path": trace}}
    found = None
    if deepspeed_config is not None:
        found = read_config(deepspeed_config).trace
        if found is not None:
            section["trace"] = found.model_dump()
    config_file = deepspeed_config or "ds_config.json"
    hosts, where, counts = "", [], {}
    if hostfile is not None:
        # DeepSpeed trains on this machine alone, and says so in a warning, where it finds no file
        slots = select_slots(read_hostfile(hostfile))
        counts = {host: len(numbers) for host, numbers in slots.items()}
        hosts = f"--hostfile {shlex.quote(str(hostfile))} "
        where = _described_hosts(counts)
    launch = f"deepspeed {hosts}{script} --deepspeed_config {config_file}"
    text = [
        f"1. {config_file} " + ("records already:" if found else "needs this section:"),
        '     "moe_locality": ' + json.dumps(section),
        "2. Call moe_locality.initialize(...) where the script calls deepspeed.initialize(...), or",
        f'   keep DeepSpeed\'s and call moe_locality.attach(model, "{section["trace"]["path"]}").',
        "   Label the tokens, so that domains and stages are known:",
        "     with moe_locality.annotate(request_ids=ids, domains=names, stage='train'): ...",
        f"3. Run: {launch}",
        *where,
        f"4. Look: moe-locality analyze {section['trace']['path']} --report report.html",
    ]
    payload = {"command": "record", "launch": launch, "section": {"moe_locality": section}}
    payload |= {"records_already": found is not None, "slots": counts}
    return Result(payload=payload, text=text)


def _described_hosts(counts: dict[str, int]) -> list[str]:
    """Return lines about hosts and their slots: ranks, idle hosts, uneven ones."""
    ranks = ", ".join(f"{host} {count}" for host, count in counts.items() if count)
    lines = [f"   on {sum(counts.values())} ranks: {ranks}"]
    idle = [host for host, count in counts.items() if not count]
    if idle:
        lines.append(f"   {', '.join(idle)}: 0 slots, so no rank runs there")
    if len({count for count in counts.values() if count}) > 1:
        lines.append(
            "   Hosts of different size: expert groups cannot follow the nodes, and no plan fits "
            "them; deepspeed's --include takes as many slots of every host"
        )
    return lines
