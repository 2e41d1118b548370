"""Reports: what is said about a trace, a comparison and a potential, and the HTML file of it.

One self-contained file, without network and JavaScript, that can be mailed, archived and opened in
ten years: figures as inline SVG, tables, and where the numbers are from. What goes in is plain data
(:class:`ReportData`); the same data gives the same bytes.
"""

import dataclasses
import html
import logging
import os
import re
from pathlib import Path

import numpy as np

from moe_locality.analysis import analyze
from moe_locality.analysis.potential import Potential
from moe_locality.analysis.stats import UNKNOWN_PART, load_by
from moe_locality.compare import Comparison, is_synthetic
from moe_locality.errors import ConfigError, MoeLocalityError
from moe_locality.figures import (
    Basis,
    FigureData,
    LoadData,
    SimilarityData,
    Table,
    TradeoffData,
    TradeoffPoint,
    draw,
    format_value,
    is_number,
    numbers,
    svg_text,
)
from moe_locality.files import write_text
from moe_locality.trace import RoutingTrace
from moe_locality.tracking import package_versions

logger = logging.getLogger(__name__)

MAX_BYTES = 5_000_000
MAX_DETAIL_ROWS = 2_000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """One figure in large type: what it is, its value, and a line of context."""

    label: str
    value: str
    context: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """What a report says. ``facts``: name and value pairs of the header (model, trace, cluster,
    plan digest); ``versions``: of packages; ``command``: the line that makes the report again."""

    title: str
    summary: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    command: str = ""
    synthetic: bool = False
    headlines: tuple[Headline, ...] = ()
    figures: tuple[FigureData, ...] = ()
    tables: tuple[Table, ...] = ()
    next_steps: tuple[str, ...] = ()


def write_report(data: ReportData, path: str | os.PathLike[str]) -> Path:
    """Write the report, whole or not at all, and return its path; ConfigError: it cannot be
    written, or is too large to open in a browser; BackendUnavailable: matplotlib is missing."""
    text = render_html(data)
    size = len(text.encode())
    if size > MAX_BYTES:
        raise ConfigError(
            f"the report would take {size:,} bytes, expected at most {MAX_BYTES:,}: give it fewer "
            "domains, runs or steps"
        )
    return write_text(path, text, what="report")


def render_html(data: ReportData) -> str:
    """Return the report as the text of one HTML file."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_escape(data.title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>",
        _header(data),
        *(_figure(figure, place) for place, figure in enumerate(data.figures, start=1)),
        *(_section(table.title, _table(table)) for table in data.tables),
    ]
    if data.next_steps:
        items = "".join(f"<li><code>{_escape(step)}</code></li>" for step in data.next_steps)
        parts.append(_section("What to run next", f"<ol>{items}</ol>"))
    return "\n".join([*parts, _provenance(data), "</main>\n</body>\n</html>\n"])


def _escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def _header(data: ReportData) -> str:
    banner = (
        '<p class="banner">Synthetic trace: the numbers show that the method works, not what it '
        "brings on your data.</p>"
    )
    facts = "".join(
        f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>"
        for name, value in data.facts
    )
    summary = "".join(f"<p>{_escape(text)}</p>" for text in data.summary)
    tiles = "".join(
        f"<div class='tile'><div class='label'>{_escape(h.label)}</div>"
        f"<div class='value'>{_escape(h.value)}</div>"
        f"<div class='context'>{_escape(h.context)}</div></div>"
        for h in data.headlines
    )
    return (
        f"<header><h1>{_escape(data.title)}</h1>{banner if data.synthetic else ''}"
        f"<dl class='facts'>{facts}</dl><div class='summary'>{summary}</div></header>"
        + (f"\n<section class='tiles'>{tiles}</section>" if tiles else "")
    )


def _figure(data: FigureData, place: int) -> str:
    caption = _escape(f"{data.title}. {data.basis.sentence()}")
    try:
        svg = inline_svg(svg_text(draw(data)), prefix=f"f{place}-", label=data.title)
    except MoeLocalityError:
        logger.error("figure %d (%s) could not be drawn", place, data.title)
        raise
    return (
        f"<figure>{svg}<figcaption><b>Figure {place}.</b> {caption}</figcaption><details>"
        f"<summary>The numbers</summary>{_table(numbers(data))}</details></figure>"
    )


def inline_svg(text: str, *, prefix: str, label: str) -> str:
    """Return SVG text fit for the body of an HTML page, of relative size, without XML prologue,
    metadata and namespaces; with ``prefix`` ids differ between the figures of a page."""
    start = text.index("<svg")
    body = re.sub(r"<metadata>.*?</metadata>", "", text[start:], flags=re.DOTALL)
    body = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", body)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}\1"', body)
    head, rest = body.split(">", 1)
    width = re.search(r'\swidth="([\d.]+)pt"', head)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    style = f"max-width:{float(width.group(1)) * 4 / 3:.0f}px" if width else ""
    return f'{head} role="img" aria-label="{_escape(label)}" style="{style}">{rest.strip()}'


def _table(table: Table) -> str:
    rows = table.rows[:MAX_DETAIL_ROWS]
    first = rows[0] if rows else ("",) * len(table.columns)
    head = "".join(
        f"<th{' class=n' if is_number(value) else ''}>{_escape(name)}</th>"
        for name, value in zip(table.columns, first, strict=True)
    )
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    left_out = len(table.rows) - len(rows)
    note = f"<p class='note'>{left_out:,} more rows are left out.</p>" if left_out else ""
    return (
        f"<div class='scroll'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>\n{body}\n</tbody></table></div>{note}"
    )


def _cell(value: object) -> str:
    kind = " class=n" if is_number(value) or value is None else ""
    return f"<td{kind}>{_escape(format_value(value))}</td>"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_escape(title)}</h2>{body}</section>"


def _provenance(data: ReportData) -> str:
    command = f"<p>Made by</p><pre>{_escape(data.command)}</pre>" if data.command else ""
    versions = _escape(", ".join(f"{name} {value}" for name, value in data.versions.items()))
    words = (
        "Words: the <i>home</i> of a token is the rank where it lives. A <i>copy</i> is one remote "
        "node that a token is sent to in a layer, however many experts it picks there; a "
        "<i>pick</i> is one remote (token, expert) pair. <i>Imbalance</i> is the largest load over "
        "the mean."
    )
    versions = f"<p>Versions: {versions}</p>" if versions else ""
    return f"<footer><p>{words}</p>{command}{versions}</footer>"


_CSS = """
:root { color-scheme: light; }
body { margin: 0; background: #f6f7f8; color: #1f1f1f;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .8rem; }
h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
.banner { background: #fff4d6; border-left: 4px solid #e69f00; padding: .5rem .8rem;
  margin: 0 0 1rem; }
.facts { display: flex; flex-wrap: wrap; gap: .4rem 1.6rem; margin: 0 0 1rem; }
.facts dt { font-size: .74rem; letter-spacing: .03em; text-transform: uppercase; color: #666; }
.facts dd { margin: 0; font-size: .92rem; overflow-wrap: anywhere; }
.summary p { max-width: 46rem; margin: .5rem 0; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0; }
.tile { flex: 1 1 12rem; background: #fff; border: 1px solid #e2e4e7; border-radius: 8px;
  padding: .8rem 1rem; }
.tile .label { font-size: .82rem; color: #555; }
.tile .value { font-size: 1.6rem; font-weight: 650; line-height: 1.25; }
.tile .context { font-size: .82rem; color: #555; }
figure, section:not(.tiles) { background: #fff; border: 1px solid #e2e4e7; border-radius: 8px;
  padding: 1.1rem 1.2rem; margin: 1.2rem 0; }
figure svg { display: block; width: 100%; height: auto; margin: 0 auto; }
figcaption { font-size: .9rem; color: #444; margin-top: .7rem; }
details { margin-top: .6rem; font-size: .9rem; }
summary { cursor: pointer; color: #0b5c8e; }
.scroll { overflow: auto; max-height: 30rem; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid #eceef0; }
td.n { white-space: nowrap; }
th { position: sticky; top: 0; background: #f3f4f6; font-weight: 600; }
th.n, td.n { text-align: right; }
code, pre { font: .86em/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
pre { background: #f0f1f3; padding: .6rem .8rem; border-radius: 6px; overflow: auto;
  white-space: pre-wrap; }
.note, footer { color: #555; font-size: .86rem; }
footer { margin-top: 2rem; }
@media print { body { background: #fff; } figure, section { break-inside: avoid; } }
"""


MAX_DOMAINS = 10
NEXT_STEPS = (
    "moe-locality place TRACE --nodes 4 --ranks-per-node 8 --held-out 0.3 -o plan.json",
    "moe-locality report TRACE --plan plan.json -o report.html",
)
HEADLINES = (
    ("copies", "copies across nodes"),
    ("traffic/cross_node_bytes", "bytes across nodes"),
    ("node_imbalance", "busiest node / mean"),
    ("load/balancedness", "balancedness of ranks"),
    ("quality/eval_loss", "held-out loss"),
)


def trace_figures(trace: RoutingTrace, summary: dict, *, seed: int = 0) -> list[FigureData]:
    """Return load by domain, and the divergence of domains where there are two or more; ``summary``
    is what ``analyze(trace, seed)`` returned."""
    basis = Basis(how="measured", count=trace.num_tokens, synthetic=is_synthetic(trace))
    figures: list[FigureData] = [_load_figure(trace, basis)]
    domains = summary.get("domains")
    if domains:
        order = np.argsort(-np.array(domains["tokens"]), kind="stable")[:MAX_DOMAINS]
        matrix = np.array(domains["js_bits"], dtype=np.float64)
        floor = [np.nan if f is None else f for f in domains["noise_floor_bits"]]
        np.fill_diagonal(matrix, floor)
        note, count = _left_out(len(domains["names"]), len(order)), sum(domains["tokens"])
        figures.append(
            SimilarityData(
                matrix=matrix[np.ix_(order, order)],
                domains=tuple(domains["names"][i] for i in order),
                measure="Jensen-Shannon divergence of expert loads, bits",
                title="How far domains differ; on the diagonal what sampling alone gives",
                basis=dataclasses.replace(basis, count=count, seed=seed, note=note),
            )
        )
    return figures


def _left_out(found: int, shown: int) -> str:
    return f"The {shown} largest of {found} domains are shown." if found > shown else ""


def _load_figure(trace: RoutingTrace, basis: Basis) -> LoadData:
    names, loads = load_by(trace, "group")
    known = [i for i, name in enumerate(names) if name != UNKNOWN_PART] or list(range(len(names)))
    size = loads.sum(axis=(1, 2))
    chosen = sorted(known, key=lambda i: (-int(size[i]), names[i]))[:MAX_DOMAINS]
    layers = sorted({0, trace.num_layers // 2, trace.num_layers - 1})
    words = {1: ("layer",), 2: ("early", "late"), 3: ("early", "middle", "late")}[len(layers)]
    part = loads[chosen][:, layers].astype(np.float64)  # [D, panels, E]
    mean = part.mean(axis=2, keepdims=True)
    ratio = np.divide(part, mean, out=np.full(part.shape, np.nan), where=mean > 0)
    note, requests = _left_out(len(known), len(chosen)), len(trace.request_ids) or None
    ids = [int(trace.layer_ids[row]) for row in layers]
    return LoadData(
        ratio=ratio.transpose(1, 0, 2),
        domains=tuple(names[i] for i in chosen),
        panels=tuple(f"{word}: layer {layer}" for word, layer in zip(words, ids, strict=True)),
        basis=dataclasses.replace(basis, num_requests=requests, note=note),
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
    for part in ("load", "prefill_decode", "overlap", "coactivation"):
        for name, value in (summary.get(part) or {}).items():
            if isinstance(value, dict) and "per_layer" in value:
                rows.append((f"{part}: {name}", value["mean"], value["min"], value["max"]))
            elif part != "load" and isinstance(value, (int, float)):
                rows.append((f"{part}: {name}", value, None, None))
    domains = summary.get("domains") or {}
    means = ("mean_js_bits", "mean_noise_floor_bits", "mean_cosine")
    rows += [(f"domains: {name}", domains[name], None, None) for name in means if name in domains]
    head = ("measure", "value (mean over layers)", "least layer", "most layer")
    return Table(title="The trace in numbers", columns=head, rows=tuple(rows))


def trace_words(summary: dict) -> tuple[str, ...]:
    """Return the trace in two or three sentences."""
    imbalance = summary["load"]["imbalance"]["mean"]
    text = [f"Mean over the layers: the busiest expert gets {imbalance:.2f} times the mean load."]
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
    """Return the report of a trace, with the plans of ``comparison`` on it where there are any;
    ``summary``: what ``analyze(trace, seed)`` returned, if it is there already."""
    summary = analyze(trace, seed) if summary is None else summary
    title = f"{'Routing' if comparison is None else 'Placement'} of {trace.model or 'a model'}"
    first = ReportData(title=title, versions=package_versions(), command=command)
    if comparison is not None:
        first = comparison_report(comparison, command=command)
    more = (fact for fact in first.facts if fact[0] not in ("model", "trace"))
    return dataclasses.replace(
        first,
        title=title,
        summary=(*first.summary, *trace_words(summary)),
        facts=(*trace_facts(trace), *more),
        synthetic=is_synthetic(trace),
        figures=(*first.figures, *trace_figures(trace, summary, seed=seed)),
        tables=(*first.tables, trace_summary_table(summary)),
        next_steps=NEXT_STEPS if comparison is None else (),
    )


def comparison_report(comparison: Comparison, *, command: str = "") -> ReportData:
    """Return the report of a comparison alone."""
    return ReportData(
        title=f"{comparison.names[-1]} against {comparison.names[0]}",
        summary=comparison_words(comparison),
        facts=comparison.facts,
        versions=package_versions(),
        command=command,
        synthetic=comparison.synthetic,
        headlines=headlines_of(comparison),
        figures=comparison.figures,
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
        if row is not None and (ratio := row.ratios[-1]) is not None:
            change = f"{abs(1 - ratio):.1%} {'fewer' if ratio <= 1 else 'more'}"
            text.append(f"With {comparison.names[-1]}, {change} {words}.")
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


def headlines_of(comparison: Comparison) -> tuple[Headline, ...]:
    """Return the few figures in large type."""
    tiles = []
    for metric, label in HEADLINES:
        row = comparison.row(metric)
        if row is None or row.values[0] is None or row.values[-1] is None:
            continue
        ratio = row.ratios[-1]
        first, last = (f"{value:,.4g}" for value in (row.values[0], row.values[-1]))
        value, context = last, f"baseline {first}"
        if metric in ("copies", "traffic/cross_node_bytes") and ratio is not None:
            value, context = f"{ratio - 1:+.1%}", f"{first} → {last} {row.unit}"
        tiles.append(Headline(label=f"{label} ({row.how})", value=value, context=context))
    return tuple(tiles)


def potential_table(found: Potential) -> Table:
    """Return one row per lever: what it saves of the copies, its interval, ceiling and balance."""
    rows = []
    for lever in found.levers:
        shares = (lever.saving, *(lever.interval or (None, None)), lever.ceiling)
        percent = [None if share is None else 100 * share for share in shares]
        rows.append((lever.name, *percent, lever.node_imbalance, lever.rank_imbalance))
    head = ("lever", "saving %", "from %", "to %", "at most %")
    head += ("busiest node / mean", "busiest rank / mean")
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
    linear = ("linear", found.linear_imbalance, found.copies_linear)
    caps = ((f"cap {p['max_imbalance']:g}", p["node_imbalance"], p["copies"]) for p in points)
    levers = (
        (one.name, one.node_imbalance, (1 - one.saving) * found.copies_linear)
        for one in found.levers
    )
    shown = tuple(
        TradeoffPoint(name=name, imbalance=level, copies=copies, is_baseline=place == 0)
        for place, (name, level, copies) in enumerate((linear, *caps, *levers))
    )
    return TradeoffData(points=shown, basis=basis)


def add_potential(
    page: ReportData,
    trace: RoutingTrace,
    found: Potential,
    points: list[dict[str, float]],
    seed: int,
) -> ReportData:
    """Return a report with the verdict first, then its table and figure, then what was there."""
    return dataclasses.replace(
        page,
        summary=(found.verdict, *page.summary),
        tables=(potential_table(found), *page.tables),
        figures=(potential_figure(trace, found, points, seed), *page.figures),
    )
