"""Commands about traces: analyze, record."""

import shlex
from pathlib import Path
from typing import Any

from moe_locality.commands.inputs import check_writable, read_cluster
from moe_locality.commands.output import Result, progress, table
from moe_locality.config import read_config
from moe_locality.placement.problem import warnings_once
from moe_locality.topology.sources import read_hostfile, select_slots
from moe_locality.trace import read_trace


@warnings_once()
def analyze(
    trace: Path,
    report: Path | None,
    nodes: int | None,
    ranks_per_node: int | None,
    cluster: Path | None,
    hostfile: Path | None,
    against: Path | None,
    windows: int | None,
    plan: Path | None,
    seed: int,
) -> Result:
    """Describe a trace, with a cluster also what it could save; with ``report`` as a page too."""
    from moe_locality.analysis import analyze as describe
    from moe_locality.analysis.potential import potential, tradeoff
    from moe_locality.commands.drift import drift_payload, show_drift
    from moe_locality.compare.content import trace_report as make_report
    from moe_locality.compare.content import trace_summary_table, trace_words
    from moe_locality.compare.potential import add_potential, potential_table
    from moe_locality.report import write_report

    if report is not None:
        check_writable(report, "report", trace, plan)
    named = (nodes, ranks_per_node, cluster, hostfile)
    topology = read_cluster(*named) if any(value is not None for value in named) else None
    found_potential, points = None, []
    with progress(f"analyzing {trace}") as update:
        content = read_trace(trace)
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
            page = make_report(content, seed=seed, command=line, summary=summary)
            if found_potential is not None:
                page = add_potential(page, content, found_potential, points, seed)
            write_report(page, report)
            payload["report"] = report
    words = trace_words(content, summary)
    found = trace_summary_table(summary)

    def show(console: Any) -> None:
        console.print(f"[bold]{content.model or 'trace'}[/bold]  {trace}", soft_wrap=True)
        for line in words:
            console.print(line)
        console.print(table("", found.columns, found.rows))
        show_drift(console, drift)
        if found_potential is not None:
            levers = potential_table(found_potential)
            console.print(table(levers.title, levers.columns, levers.rows))
            console.print(found_potential.verdict, soft_wrap=True)
        if report is not None:
            console.print(f"report: {report}", soft_wrap=True)

    return Result(payload=payload, show=show)


def record(script: str, trace: str, hostfile: Path | None, deepspeed_config: Path | None) -> Result:
    """Say how to record: the launch line, and the section that the ds_config needs."""
    import json

    section: dict[str, Any] = {"trace": {"path": trace}}
    found = None
    if deepspeed_config is not None:
        found = read_config(deepspeed_config).trace
        if found is not None:
            section["trace"] = found.model_dump()
    config_file = deepspeed_config or "ds_config.json"
    hosts, where, slots = "", [], {}
    if hostfile is not None:
        # DeepSpeed trains on this machine alone, and says so in a warning, where it finds no file
        slots = select_slots(read_hostfile(hostfile))
        hosts = f"--hostfile {shlex.quote(str(hostfile))} "
        where = _described_hosts(slots)
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
    payload = {
        "command": "record",
        "launch": launch,
        "section": {"moe_locality": section},
        "records_already": found is not None,
        "slots": {host: len(numbers) for host, numbers in slots.items()},
    }
    return Result(payload=payload, text=text)


def _described_hosts(slots: dict[str, list[int]]) -> list[str]:
    """Return lines about the hosts of a hostfile: ranks, idle hosts, uneven ones."""
    counts = {host: len(numbers) for host, numbers in slots.items()}
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
