"""One self-contained HTML file: figures as inline SVG, tables, and where the numbers are from.

No network, no JavaScript: the file can be mailed, archived and opened in ten years. What goes in is
plain data (:class:`ReportData`); the same data gives the same bytes.
"""

import dataclasses
import html
import logging
import math
import os
import re
from pathlib import Path

from moe_locality.errors import ConfigError, MoeLocalityError
from moe_locality.figures import FigureData, Table, draw, numbers, svg_text
from moe_locality.files import replace_text

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
    """What a report says.

    ``facts`` are name and value pairs of the header (model, trace hash, cluster, plan digest);
    ``versions`` package -> version; ``command`` the line that makes the report again.
    """

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
    """Write the report, whole or not at all, and return its path.

    Raises:
        ConfigError: the file cannot be written, or would be too large to open in a browser.
        BackendUnavailable: matplotlib is missing.
    """
    text = render_html(data)
    size = len(text.encode())
    if size > MAX_BYTES:
        raise ConfigError(
            f"the report would take {size:,} bytes, expected at most {MAX_BYTES:,}: give it fewer "
            "domains, runs or steps"
        )
    return write_text_atomically(path, text, what="report")


def write_text_atomically(path: str | os.PathLike[str], text: str, *, what: str = "file") -> Path:
    """Write a text file whole or not at all: a new file beside it, then a rename.

    Raises:
        ConfigError: the directory cannot be made or written; ``what`` names the file in the
        message.
    """
    try:
        return replace_text(path, text)
    except OSError as error:
        raise ConfigError(
            f"cannot write the {what} {path}: {error.strerror or error}: give a path in a "
            "directory that exists or can be made, and that you may write"
        ) from error


def render_html(data: ReportData) -> str:
    """Return the report as the text of one HTML file."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_escape(data.title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>",
        _header(data),
        _headlines(data.headlines),
        *(_figure(figure, place) for place, figure in enumerate(data.figures, start=1)),
        *(_section(table.title, _table(table)) for table in data.tables),
        _next_steps(data.next_steps),
        _provenance(data),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def _header(data: ReportData) -> str:
    banner = (
        '<p class="banner">Synthetic trace: the numbers show that the method works, not what it '
        "brings on your data.</p>"
        if data.synthetic
        else ""
    )
    facts = "".join(
        f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>"
        for name, value in data.facts
    )
    summary = "".join(f"<p>{_escape(text)}</p>" for text in data.summary)
    return (
        f"<header><h1>{_escape(data.title)}</h1>{banner}<dl class='facts'>{facts}</dl>"
        f"<div class='summary'>{summary}</div></header>"
    )


def _headlines(headlines: tuple[Headline, ...]) -> str:
    if not headlines:
        return ""
    tiles = "".join(
        f"<div class='tile'><div class='label'>{_escape(h.label)}</div>"
        f"<div class='value'>{_escape(h.value)}</div>"
        f"<div class='context'>{_escape(h.context)}</div></div>"
        for h in headlines
    )
    return f"<section class='tiles'>{tiles}</section>"


def _figure(data: FigureData, place: int) -> str:
    caption = _escape(f"{data.title}. {data.basis.sentence()}")
    try:
        svg = inline_svg(svg_text(draw(data)), prefix=f"f{place}-", label=data.title)
    except MoeLocalityError:
        logger.error("figure %d (%s) could not be drawn", place, data.title)
        raise
    table = _table(numbers(data))
    return (
        f"<figure>{svg}<figcaption><b>Figure {place}.</b> {caption}</figcaption>"
        f"<details><summary>The numbers</summary>{table}</details></figure>"
    )


def inline_svg(text: str, *, prefix: str, label: str) -> str:
    """Return SVG text fit for the body of an HTML page.

    The XML prologue, metadata and namespace addresses go; every id gets ``prefix``, because ids
    must differ between the figures of a page; the size becomes relative.
    """
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
        f"<th{' class=n' if _is_number(value) else ''}>{_escape(name)}</th>"
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
    kind = " class=n" if _is_number(value) or value is None else ""
    return f"<td{kind}>{_escape(format_value(value))}</td>"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def format_value(value: object) -> str:
    """Return a number as people read it: thousands separated, four digits, a hyphen for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{_escape(title)}</h2>{body}</section>"


def _next_steps(steps: tuple[str, ...]) -> str:
    if not steps:
        return ""
    items = "".join(f"<li><code>{_escape(step)}</code></li>" for step in steps)
    return _section("What to run next", f"<ol>{items}</ol>")


def _provenance(data: ReportData) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in data.versions.items())
    command = f"<p>Made by</p><pre>{_escape(data.command)}</pre>" if data.command else ""
    words = (
        "Words: the <i>home</i> of a token is the rank where it lives. A <i>copy</i> is one remote "
        "node that a token is sent to in a layer, however many experts it picks there; a "
        "<i>pick</i> is one remote (token, expert) pair. <i>Imbalance</i> is the largest load over "
        "the mean."
    )
    return (
        f"<footer><p>{words}</p>{command}"
        + (f"<p>Versions: {_escape(versions)}</p>" if versions else "")
        + "</footer>"
    )


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
