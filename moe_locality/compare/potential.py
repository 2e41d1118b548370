"""What a report says about the potential of a trace on a cluster: table, trade-off, verdict."""

from dataclasses import replace

from moe_locality.analysis.potential import Potential
from moe_locality.compare.plans import is_synthetic
from moe_locality.figures import Basis, Table, TradeoffData, TradeoffPoint
from moe_locality.report import ReportData
from moe_locality.trace import RoutingTrace


def potential_table(found: Potential) -> Table:
    """Return one row per lever: what it saves of the copies, its interval, ceiling and balance."""
    rows = []
    for lever in found.levers:
        low, high = lever.interval or (None, None)
        rows.append(
            (
                lever.name,
                *(None if value is None else 100 * value for value in (lever.saving, low, high)),
                None if lever.ceiling is None else 100 * lever.ceiling,
                lever.node_imbalance,
                lever.rank_imbalance,
            )
        )
    head = (
        "lever",
        "saving %",
        "from %",
        "to %",
        "at most %",
        "busiest node / mean",
        "busiest rank / mean",
    )
    title = f"What could be saved on {found.num_nodes} nodes x {found.ranks_per_node} ranks"
    return Table(title=title, columns=head, rows=tuple(rows))


def potential_figure(
    trace: RoutingTrace, found: Potential, points: list[dict[str, float]], seed: int
) -> TradeoffData:
    """Return the curve of balance against locality, with the linear layout and every lever."""
    basis = Basis(
        how="simulated",
        count=found.judged_tokens,
        seed=seed,
        synthetic=is_synthetic(trace),
        note=f"Solved on {found.solved_tokens:,} tokens of other requests.",
    )
    shown = [
        TradeoffPoint(
            name=f"cap {point['max_imbalance']:g}",
            imbalance=point["node_imbalance"],
            copies=point["copies"],
        )
        for point in points
    ]
    shown += [
        TradeoffPoint(
            name=lever.name,
            imbalance=lever.node_imbalance,
            copies=(1 - lever.saving) * found.copies_linear,
        )
        for lever in found.levers
    ]
    linear = TradeoffPoint(
        name="linear",
        imbalance=found.linear_imbalance,
        copies=found.copies_linear,
        is_baseline=True,
    )
    return TradeoffData(points=(linear, *shown), basis=basis)


def add_potential(
    page: ReportData,
    trace: RoutingTrace,
    found: Potential,
    points: list[dict[str, float]],
    seed: int,
) -> ReportData:
    """Return a report with the verdict first, then its table and figure, then what was there."""
    return replace(
        page,
        summary=(found.verdict, *page.summary),
        tables=(potential_table(found), *page.tables),
        figures=(potential_figure(trace, found, points, seed), *page.figures),
    )
