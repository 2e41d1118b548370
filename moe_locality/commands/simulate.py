"""The command that simulates steps of a cluster."""

import dataclasses
from pathlib import Path
from typing import Any

from moe_locality.commands.inputs import check_writable, read_fitting_plan, read_homes, split
from moe_locality.commands.output import Result, progress, table
from moe_locality.commands.plans import linear_plan, topology_of
from moe_locality.compare.plans import made_from
from moe_locality.errors import PlacementError, TopologyError
from moe_locality.placement import PlacementPlan
from moe_locality.simulator import SWEEPS, Simulation, StepModel, gain_ends
from moe_locality.simulator import simulate as simulate_steps
from moe_locality.simulator import sweep as simulate_sweep
from moe_locality.simulator.simulate import GAIN
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace, read_trace

Homes = dict[int, int] | None


def simulate(
    trace: Path,
    plan: Path,
    homes: Path | None,
    cluster: Path | None,
    batch_tokens: int,
    hidden: int,
    ffn: int | None,
    payload: str,
    exchange: str,
    compute_us: float | None,
    expert_us: float | None,
    row_us: float | None,
    groups: int | None,
    sweep: str | None,
    figure: Path | None,
    held_out: float,
    seed: int,
) -> Result:
    """Simulate the plan, and the linear layout beside it."""
    if figure is not None:
        if sweep is None:
            raise PlacementError("found --figure without --sweep, expected both: name a sweep")
        check_writable(figure, "figure", trace, plan)
    with progress(f"simulating {plan}"):
        train, test = split(read_trace(trace), held_out, seed)
        content = train if test is None else test
        placed = read_fitting_plan(plan, content)
        ranks = None if homes is None else read_homes(homes, placed)
        topology, groups = _cluster(placed, cluster, groups)
        sizes = {"hidden_size": hidden, "ffn_size": ffn, "payload": payload, "exchange": exchange}
        model = StepModel(**sizes, expert_us=expert_us, row_us=row_us)
        base = linear_plan(content, topology)
        options: dict[str, Any] = {"model": model, "batch_tokens": batch_tokens, "seed": seed}
        timing = {**options, "groups": groups, "compute_us": compute_us}
        found = simulate_steps(content, placed, topology, ranks, **timing)
        linear = None if base is None else simulate_steps(content, base, topology, **timing)
        rows = None
        if sweep is not None:
            pair = (_needed(base), placed)
            rows = _sweep(sweep, content, train, pair, topology, ranks, groups, options)
    if figure is not None and rows is not None:
        _write_figure(figure, rows, sweep or "", content)
    answer = {
        "command": "simulate",
        "how": "simulated",
        "trace": trace,
        "plan": plan,
        "digest": placed.digest(),
        "homes": homes,
        "in_sample": made_from(placed, content),
        "held_out": held_out,
        "cluster": topology.to_dict(),
        **_figures(model, found, linear),
        "sweep": None if rows is None else {"over": sweep, "rows": rows, "gain": gain_ends(rows)},
        "figure": figure,
    }
    return Result(payload=answer, show=lambda console: _show(console, answer, model))


def _figures(model: StepModel, found: Simulation, linear: Simulation | None) -> dict[str, Any]:
    speedup = None
    if linear is not None and found.group_step_us:
        speedup = linear.group_step_us / found.group_step_us
    return {
        "exchange": model.exchange,
        "payload": model.payload,
        "tau_us": model.tau,
        **found.to_dict(),
        "linear": None if linear is None else linear.to_dict(),
        "speedup": speedup,
    }


def _cluster(
    plan: PlacementPlan, cluster: Path | None, groups: int | None
) -> tuple[ClusterTopology, int]:
    """The nodes of one expert-parallel group with the links of the cluster, and how many groups."""
    own = topology_of(plan)
    if cluster is None:
        return own, groups or 1
    given = ClusterTopology.from_yaml(cluster)
    times = given.num_ranks // own.num_ranks
    if given.num_ranks % own.num_ranks or not times:
        raise TopologyError(
            f"found {given.describe()} in {cluster} for a plan of {own.describe()}, expected the "
            "plan's ranks or a multiple of them: make a plan for this cluster"
        )
    return dataclasses.replace(own, **given.tiers()), groups or times


def _needed(plan: PlacementPlan | None) -> PlacementPlan:
    if plan is None:
        raise PlacementError(
            "found experts that do not divide among the ranks, expected a linear layout to compare "
            "the sweep with: leave --sweep out"
        )
    return plan


def _sweep(
    what: str,
    content: RoutingTrace,
    train: RoutingTrace,
    pair: tuple[PlacementPlan, PlacementPlan],
    topology: ClusterTopology,
    homes: Homes,
    groups: int,
    options: dict[str, Any],
) -> list[dict[str, Any]]:
    from moe_locality.placement.solve import solve

    def plans_of(other: ClusterTopology) -> tuple[PlacementPlan, PlacementPlan]:
        return _needed(linear_plan(train, other)), solve(train, other, seed=options["seed"])

    return simulate_sweep(
        what,
        content,
        pair,
        topology,
        (None, homes),
        plans_of=plans_of,
        groups=groups,
        **options,
    )


def _write_figure(path: Path, rows: list[dict[str, Any]], what: str, content: RoutingTrace) -> None:
    from moe_locality.figures.sweep import draw_sweep, write_figure

    title = f"{content.model or 'trace'}: speed-up of the MoE part of a step (simulated)"
    write_figure(draw_sweep(rows, SWEEPS[what], title), path)


def _show(console: Any, found: dict[str, Any], model: StepModel) -> None:
    linear = found["linear"]
    words = "homes at random" if found["homes"] is None else f"homes of {found['homes']}"
    if found["in_sample"]:
        words += "; in-sample: the plan was made from these requests"
    console.print(f"{found['plan']} on {found['trace']}: {words}", soft_wrap=True)
    console.print(
        f"Simulated: {found['num_steps']} steps of {found['batch_tokens']:,} tokens per rank, "
        f"{found['groups']} group(s), {found['exchange']} exchange, {found['payload']} dispatch of "
        f"width {model.hidden_size:,}, bf16 combine; forward, MoE part, all layers",
        soft_wrap=True,
    )
    columns = [one for one in (linear, found) if one is not None]
    names = ("linear", "plan") if linear is not None else ("plan",)
    rows = [
        (label, *values, round(values[0] / values[-1], 3) if len(values) > 1 and values[-1] else "")
        for label, values in _lines(columns)
    ]
    console.print(table("", ("simulated", *names, "speed-up"), rows))
    link = found["busiest_link"]
    console.print(
        f"Busiest link: node {link['node']}, {link['direction']}, {link['share']:.1%} of what "
        "crosses nodes in dispatch"
    )
    if found["sweep"] is not None:
        _show_sweep(console, found["sweep"])
    if found["figure"] is not None:
        console.print(f"figure: {found['figure']}", soft_wrap=True)


def _lines(columns: list[dict[str, Any]]) -> list[tuple[str, list[Any]]]:
    """(label, value of each column) of the table."""
    lines = [("step, us", [c["group_step_us"] for c in columns])]
    lines.append(("mean step of a group, us", [c["step_us"] for c in columns]))
    for name, label in (("dispatch", "dispatch"), ("compute", "experts"), ("combine", "combine")):
        lines.append((f"  {label}, us", [c["parts_us"][name] for c in columns]))
    lines += [
        (f"links {name} nodes, us", [c["tiers_us"][name] for c in columns])
        for name in ("across", "inside")
    ]
    for link in ("cross_node", "same_node", "same_rank"):
        both = [(c["bytes"]["dispatch"][link], c["bytes"]["combine"][link]) for c in columns]
        label = f"{link.replace('_', ' ')}, bytes per token"
        lines.append(
            (label, [sum(b) / c["num_tokens"] for b, c in zip(both, columns, strict=True)])
        )
    if columns[0]["share"] is not None:
        lines.append(("share of the whole step", [c["share"] for c in columns]))
    return lines


def _show_sweep(console: Any, sweep: dict[str, Any]) -> None:
    head = (SWEEPS[sweep["over"]], "linear, us", "plan, us", "speed-up", "+-", "across, share")
    rows = [
        (
            row["value"],
            row["baseline_us"],
            row["plan_us"],
            row["speedup"],
            row["speedup_error"],
            row["across_share"],
        )
        for row in sweep["rows"]
    ]
    console.print(table("Simulated sweep", head, rows))
    gain = ", ".join(f"{value:g}" for value in sweep["gain"]) or "none of them"
    console.print(f"At least {GAIN - 1:.0%} faster at: {gain}")
