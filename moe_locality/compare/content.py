"""What a report says about a trace and about a comparison: figures, tables, words."""

from collections.abc import Sequence

import numpy as np

from moe_locality.analysis import analyze
from moe_locality.analysis.stats import load_by
from moe_locality.compare.plans import is_synthetic
from moe_locality.compare.rows import Comparison, Row
from moe_locality.figures import Basis, FigureData, LoadData, SimilarityData, Table
from moe_locality.report import Headline, ReportData
from moe_locality.trace import RoutingTrace
from moe_locality.tracking import package_versions

MAX_DOMAINS = 10
UNKNOWN = "(unknown)"
HEADLINES = (
    ("copies", "copies across nodes"),
    ("traffic/cross_node_bytes", "bytes across nodes"),
    ("node_imbalance", "busiest node / mean"),
    ("load/balancedness", "balancedness of ranks"),
    ("quality/eval_loss", "held-out loss"),
)


def trace_figures(trace: RoutingTrace, summary: dict, *, seed: int = 0) -> list[FigureData]:
    """Return load by domain, and the divergence of domains where there are two or more.

    ``summary`` is what ``analyze(trace, seed)`` returned.
    """
    basis = Basis(
        how="measured",
        count=trace.num_tokens,
        num_requests=len(trace.request_ids) or None,
        synthetic=is_synthetic(trace),
    )
    figures: list[FigureData] = [_load_figure(trace, basis)]
    domains = summary.get("domains")
    if domains:
        order = np.argsort(-np.array(domains["tokens"]), kind="stable")[:MAX_DOMAINS]
        matrix = np.array(domains["js_bits"], dtype=np.float64)
        floor = [np.nan if f is None else f for f in domains["noise_floor_bits"]]
        np.fill_diagonal(matrix, floor)
        figures.append(
            SimilarityData(
                matrix=matrix[np.ix_(order, order)],
                domains=tuple(domains["names"][i] for i in order),
                measure="Jensen-Shannon divergence of expert loads, bits",
                title="How far domains differ; on the diagonal what sampling alone gives",
                basis=Basis(
                    how="measured",
                    count=sum(domains["tokens"]),
                    seed=seed,
                    synthetic=basis.synthetic,
                    note=_left_out(len(domains["names"]), len(order)),
                ),
            )
        )
    return figures


def _left_out(found: int, shown: int) -> str:
    return f"The {shown} largest of {found} domains are shown." if found > shown else ""


def _load_figure(trace: RoutingTrace, basis: Basis) -> LoadData:
    names, loads = load_by(trace, "group")
    known = [i for i, name in enumerate(names) if name != UNKNOWN] or list(range(len(names)))
    size = loads.sum(axis=(1, 2))
    chosen = sorted(known, key=lambda i: (-int(size[i]), names[i]))[:MAX_DOMAINS]
    layers = sorted({0, trace.num_layers // 2, trace.num_layers - 1})
    words = {1: ("layer",), 2: ("early", "late"), 3: ("early", "middle", "late")}[len(layers)]
    part = loads[chosen][:, layers].astype(np.float64)  # [D, panels, E]
    mean = part.mean(axis=2, keepdims=True)
    ratio = np.divide(part, mean, out=np.full(part.shape, np.nan), where=mean > 0)
    return LoadData(
        ratio=ratio.transpose(1, 0, 2),
        domains=tuple(names[i] for i in chosen),
        panels=tuple(
            f"{word}: layer {int(trace.layer_ids[row])}"
            for word, row in zip(words, layers, strict=True)
        ),
        basis=Basis(
            how="measured",
            count=basis.count,
            num_requests=basis.num_requests,
            synthetic=basis.synthetic,
            note=_left_out(len(known), len(chosen)),
        ),
    )


def trace_facts(trace: RoutingTrace) -> tuple[tuple[str, str], ...]:
    """Return the header of a report about a trace."""
    return (
        ("model", trace.model or "not named"),
        ("trace", trace.content_hash()[:12]),
        ("tokens", f"{trace.num_tokens:,} of {len(trace.request_ids):,} requests"),
        ("MoE layers", f"{trace.num_layers} of {trace.num_experts} experts, top {trace.top_k}"),
    )


def trace_summary_table(summary: dict) -> Table:
    """Return what ``analyze`` found as a table of measures."""
    rows: list[tuple[object, ...]] = []
    for name, spread in summary["load"].items():
        if isinstance(spread, dict) and "mean" in spread and "per_layer" in spread:
            rows.append((f"load: {name}", spread["mean"], spread["min"], spread["max"]))
    for part in ("prefill_decode", "overlap"):
        for name, value in (summary.get(part) or {}).items():
            if isinstance(value, (int, float)):
                rows.append((f"{part}: {name}", value, None, None))
    for name, spread in (summary.get("coactivation") or {}).items():
        if isinstance(spread, dict) and "mean" in spread:
            rows.append((f"coactivation: {name}", spread["mean"], spread["min"], spread["max"]))
    domains = summary.get("domains") or {}
    means = ("mean_js_bits", "mean_noise_floor_bits", "mean_cosine")
    rows += [(f"domains: {name}", domains[name], None, None) for name in means if name in domains]
    head = ("measure", "value (mean over layers)", "least layer", "most layer")
    return Table(title="The trace in numbers", columns=head, rows=tuple(rows))


def trace_words(trace: RoutingTrace, summary: dict) -> tuple[str, ...]:
    """Return the trace in two or three sentences."""
    imbalance = summary["load"]["imbalance"]["mean"]
    line = f"Mean over the layers: the busiest expert gets {imbalance:.2f} times the mean load."
    text = [line]
    domains = summary.get("domains")
    if domains and domains["mean_js_bits"] is not None:
        line = f"Two domains differ by {domains['mean_js_bits']:.3f} bits"
        if domains["mean_noise_floor_bits"] is not None:
            line += f", sampling alone gives {domains['mean_noise_floor_bits']:.3f}"
        text.append(line + ".")
    overlap = summary.get("overlap")
    if overlap and overlap.get("adjacent") is not None:
        text.append(
            f"Neighboring tokens share {overlap['adjacent']:.0%} of their experts; with a uniform "
            f"router it would be {overlap['uniform']:.0%}."
        )
    missing = "; ".join(summary.get("left_out", {}).values())
    return (" ".join(text), *((f"Not in this report: {missing}.",) if missing else ()))


def trace_report(
    trace: RoutingTrace,
    *,
    seed: int = 0,
    command: str = "",
    comparison: Comparison | None = None,
    summary: dict | None = None,
) -> ReportData:
    """Return the report of a trace, with the plans of ``comparison`` on it where there are any.

    ``summary``: what ``analyze(trace, seed)`` returned, if it is there already.
    """
    summary = analyze(trace, seed) if summary is None else summary
    figures = trace_figures(trace, summary, seed=seed)
    tables: list[Table] = [trace_summary_table(summary)]
    words, facts = trace_words(trace, summary), trace_facts(trace)
    title, headlines = f"Routing of {trace.model or 'a model'}", ()
    if comparison is not None:
        title = f"Placement of {trace.model or 'a model'}"
        figures = [*comparison.figures, *figures]
        tables = [comparison.table(), *comparison.tables, *tables]
        words = (*comparison_words(comparison), *words)
        facts = (*facts, *(f for f in comparison.facts if f[0] not in ("model", "trace")))
        headlines = headlines_of(comparison)
    return ReportData(
        title=title,
        summary=words,
        facts=facts,
        versions=package_versions(),
        command=command,
        synthetic=is_synthetic(trace),
        headlines=headlines,
        figures=tuple(figures),
        tables=tuple(tables),
        next_steps=() if comparison else _place_next(),
    )


def _place_next() -> tuple[str, ...]:
    return (
        "moe-locality place TRACE --nodes 4 --ranks-per-node 8 --held-out 0.3 -o plan.json",
        "moe-locality report TRACE --plan plan.json -o report.html",
    )


def comparison_report(
    comparison: Comparison,
    *,
    command: str = "",
    title: str = "",
    extra_figures: Sequence[FigureData] = (),
) -> ReportData:
    """Return the report of a comparison alone."""
    return ReportData(
        title=title or f"{comparison.names[-1]} against {comparison.names[0]}",
        summary=comparison_words(comparison),
        facts=comparison.facts,
        versions=package_versions(),
        command=command,
        synthetic=comparison.synthetic,
        headlines=headlines_of(comparison),
        figures=(*comparison.figures, *extra_figures),
        tables=(comparison.table(), *comparison.tables),
    )


def comparison_words(comparison: Comparison) -> tuple[str, ...]:
    """Return the outcome in sentences."""
    text = []
    for metric, words in (
        ("copies", "copies of tokens cross nodes (predicted)"),
        ("traffic/cross_node_bytes", "bytes cross nodes (measured)"),
    ):
        row = comparison.row(metric)
        if row is not None and row.ratios[-1] is not None:
            text.append(f"With {comparison.names[-1]}, {_change(row)} {words}.")
    row = comparison.row("node_imbalance")
    if row is not None and row.values[-1] is not None:
        text.append(
            f"The busiest node does {row.values[-1] - 1:.1%} more work than the mean "
            f"({comparison.names[0]}: {(row.values[0] or 1) - 1:.1%})."
        )
    row = comparison.row("quality/eval_loss")
    if row is not None and row.values[0] is not None and row.values[-1] is not None:
        difference = abs(row.values[-1] - row.values[0])
        text.append(f"The held-out loss differs by {difference:.2g} nats per token.")
    return tuple(part for part in (" ".join(text), *comparison.notes) if part)


def _change(row: Row) -> str:
    ratio = row.ratios[-1] or 1.0
    return f"{abs(1 - ratio):.1%} {'fewer' if ratio <= 1 else 'more'}"


def headlines_of(comparison: Comparison) -> tuple[Headline, ...]:
    """Return the few figures in large type."""
    tiles = []
    for metric, label in HEADLINES:
        row = comparison.row(metric)
        if row is None or row.values[0] is None or row.values[-1] is None:
            continue
        ratio = row.ratios[-1]
        first, last = (f"{value:,.4g}" for value in (row.values[0], row.values[-1]))
        is_amount = metric in ("copies", "traffic/cross_node_bytes") and ratio is not None
        tiles.append(
            Headline(
                label=f"{label} ({row.how})",
                value=f"{ratio - 1:+.1%}" if is_amount and ratio is not None else last,
                context=f"{first} → {last} {row.unit}" if is_amount else f"baseline {first}",
            )
        )
    return tuple(tiles)
