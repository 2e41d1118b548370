"""The tables of docs/multinode.md and its two pictures, made from the rows of results.csv.

A table stands between ``<!-- multinode NAME -->`` and ``<!-- multinode end -->``; what is between
is written anew, the rest of the page stays.
"""

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = dict[tuple[str, str, str], Mapping[str, str]]
"""(case, metric, baseline) to the newest row"""

TEXT, OTHERS, OURS = "#7a7a7a", "#9c9c9c", "#2f81c7"
"""read on white and on black alike"""
AIM_OF_NODES = {2: "3.9x", 4: "2.15x", 8: "1.48x"}
AIM_OF_PAYLOAD = {"mxfp8": "1.9x", "mxfp4": "3.7x"}
AIM_OF_SPEED = {"DeepSpeed MoE, dropless": "2x", "DeepSpeed AutoEP": "1.5x"}
AIM_OF_TIME = "-20 %"
PICK, ONCE = "every pick", "once per node"


def newest(rows: Iterable[Mapping[str, str]]) -> Rows:
    """Return the last ``multinode`` row of every case, metric and baseline."""
    return {
        (row["case"], row["metric"], row["baseline"]): row
        for row in rows
        if row["benchmark"] == "multinode"
    }


def write_page(page: Path, results: Path, steps_where: str) -> None:
    """Write tables and pictures from the newest rows; ``steps_where`` begins the cases of times."""
    with results.open(newline="", encoding="utf-8") as file:
        rows = newest(csv.DictReader(file))
    text = page.read_text(encoding="utf-8")
    tables = {
        "bytes": bytes_table(rows),
        "payload": payload_table(rows),
        "steps": steps_table(rows, steps_where),
    }
    for name, lines in tables.items():
        text = between_markers(text, name, lines)
    page.write_text(text, encoding="utf-8")
    pictures = page.parent / "pictures"
    pictures.mkdir(exist_ok=True)
    draw_bytes(rows, pictures / "multinode_bytes.svg")
    draw_steps(rows, steps_where, pictures / "multinode_steps.svg")


def between_markers(text: str, name: str, lines: Sequence[str]) -> str:
    """Return ``text`` with the lines between the markers of ``name`` replaced."""
    pattern = rf"(<!-- multinode {name} -->\n).*?(<!-- multinode end -->)"
    body = "".join(f"{line}\n" for line in lines)
    made, count = re.subn(pattern, lambda m: f"{m[1]}{body}{m[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"found {count} places for the table {name!r}, expected one")
    return made


def bytes_table(rows: Rows) -> list[str]:
    """Table of bytes between nodes by number of nodes."""
    lines = [
        f"| nodes x ranks | {PICK}: counted, on the wire (MB) | {ONCE}: counted, on the wire (MB) "
        "| wire over counted | fewer rows, counted | fewer bytes, counted | fewer bytes, on the "
        "wire | closed form, rows | aim |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    used = []
    for nodes, where in _uniform_cases(rows):

        def value(metric: str, where: str = where) -> str:
            return _plain(rows[where, metric, ""]["value"])

        sizes = [f"{value(f'counted, {n}')}, {value(f'on the wire, {n}')}" for n in (PICK, ONCE)]
        more = [float(rows[where, f"wire over counted, {n}", ""]["value"]) for n in (PICK, ONCE)]
        over = " and ".join(f"+{percent:.1f} %" for percent in more)
        what = ("counted rows", "counted bytes", "on the wire", "closed form")
        fewer = [_times(rows[where, f"fewer, {each}", ""]) for each in what]
        cells = [f"{nodes} x {8 // nodes}", *sizes, over, *fewer, AIM_OF_NODES[nodes]]
        lines.append(_line(cells))
        used.append(rows[where, "fewer, on the wire", ""])
    return [*lines, "", _source(used)]


def payload_table(rows: Rows) -> list[str]:
    """Table of the bytes of a dispatch by payload."""
    lines = [
        "| payload of the dispatch | counted (MB) | on the wire (MB) | fewer, counted | fewer, on "
        "the wire | aim |",
        "|---|---|---|---|---|---|",
    ]
    used = []
    for case in sorted({case for case, _, _ in rows if ", payload " in case}, reverse=True):
        payload = case.rsplit(" ", 1)[1]
        ways = ("counted", "on the wire")
        sizes = [rows[case, f"dispatch, {way}", ""] for way in ways]
        base = "payload none"
        fewer = [rows.get((case, f"dispatch fewer, {way}", base)) for way in ways]
        cells = ["bfloat16" if payload == "none" else payload.upper()]
        cells += [_plain(row["value"]) for row in sizes]
        cells += [_times(row) for row in fewer]
        lines.append(_line([*cells, AIM_OF_PAYLOAD.get(payload, "")]))
        used.append(sizes[0])
    return [*lines, "", _source(used)]


def steps_table(rows: Rows, where: str) -> list[str]:
    """Table of the times, and what the plan and the homes change."""
    names = _step_names(rows, where)
    theirs = [name for name in names if not name.startswith("ours")]
    head = ["layer", "step: median (range), ms", "sent by all nodes, MB", "busiest link, MB"]
    head.append("CPU of all ranks, ms")
    head += [f"against {name} (aim {AIM_OF_SPEED.get(name, 'none')})" for name in theirs]
    lines = [_line(head), _line(["---"] * len(head))]
    for name in names:
        case = f"{where}: {name}"

        def value(metric: str, case: str = case) -> str:
            return _plain(rows[case, metric, ""]["value"])

        times = [value(f"step, {which}") for which in ("median", "lowest", "highest")]
        cells = [name, f"{times[0]} ({times[1]} to {times[2]})"]
        cells += [value(metric) for metric in ("sent by all nodes", "busiest link")]
        cells.append(value("CPU of all ranks"))
        for base in theirs:
            found = rows.get((case, "speed, median of rounds", base))
            cells.append(_times(found))
        lines.append(_line(cells))
    changes = [
        f"**{name}**, against {base}: time {float(row['value']):+.0f} % (aim {AIM_OF_TIME})."
        for (case, metric, base), row in rows.items()
        if metric == "time, median of rounds"
        and base.startswith("ours")
        and case.startswith(f"{where}: ")
        and (name := case.split(": ", 1)[1])
    ]
    last = rows[f"{where}: {names[0]}", "step, median", ""]
    source = _source([{**last, "case": f"{where}: LAYER"}])
    return [*lines, "", *changes, "", source]


def _uniform_cases(rows: Rows) -> list[tuple[int, str]]:
    cases = {case for case, metric, _ in rows if metric == "fewer, on the wire"}
    return sorted((int(case.split(" ", 1)[0]), case) for case in cases)


def _step_names(rows: Rows, where: str) -> list[str]:
    begin = f"{where}: "
    cases = [case for case, metric, _ in rows if metric == "step, median"]
    names = [case.removeprefix(begin) for case in cases if case.startswith(begin)]
    if not names:
        raise ValueError(f"found no rows of times that begin with {where!r}: run the part 'steps'")
    return names


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(value: str) -> str:
    number = float(value)
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _times(row: Mapping[str, str] | None) -> str:
    return f"{float(row['value']):.2f}x" if row else ""


def _source(rows: Sequence[Mapping[str, str]]) -> str:
    cases = "; ".join(f"`{row['case']}`" for row in rows)
    last = rows[-1]
    return (
        f"Rows `multinode` of `benchmarks/results.csv`, cases {cases}: {last['note']}. "
        f"{last['device']}, {last['versions']}, commit {last['commit']}, {last['date']}."
    )


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.patch.set_alpha(0)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(TEXT)
        ax.tick_params(colors=TEXT, labelcolor=TEXT)
        ax.xaxis.label.set_color(TEXT)
        ax.yaxis.label.set_color(TEXT)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib as mpl

    style = {"svg.fonttype": "none", "svg.hashsalt": "multinode"}
    with mpl.rc_context(style):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


def draw_bytes(rows: Rows, path: Path) -> None:
    """Bars of the bytes on the wire by number of nodes."""
    figure, (ax,) = _figure(6.4, 3.2)
    cases = _uniform_cases(rows)
    for shift, name, color in ((-0.2, PICK, OTHERS), (0.2, ONCE, OURS)):
        heights = [float(rows[where, f"on the wire, {name}", ""]["value"]) for _, where in cases]
        at = [place + shift for place in range(len(cases))]
        ax.bar(at, heights, 0.38, color=color, label=name)
        for x, height in zip(at, heights, strict=True):
            ax.text(x, height, f"{height:.0f}", ha="center", va="bottom", color=TEXT)
    fewer = [_times(rows[where, "fewer, on the wire", ""]) for _, where in cases]
    labels = [f"{n} nodes\n{times} fewer" for (n, _), times in zip(cases, fewer, strict=True)]
    ax.set_xticks(range(len(cases)), labels)
    ax.margins(y=0.12)
    ax.set_ylabel("MB on the wire, one step")
    ax.set_title("Bytes between nodes, uniform routing, k = 8 of 256", loc="left", color=TEXT)
    ax.legend(frameon=False, labelcolor=TEXT)
    _save(figure, path)


def draw_steps(rows: Rows, where: str, path: Path) -> None:
    """Bars of the times with their range, and of the bytes."""
    names = _step_names(rows, where)
    figure, (left, right) = _figure(8.6, 0.9 + 0.5 * len(names), 2)
    places = list(range(len(names)))[::-1]
    colors = [OURS if name.startswith("ours, once") else OTHERS for name in names]

    def values(metric: str) -> list[float]:
        return [float(rows[f"{where}: {name}", metric, ""]["value"]) for name in names]

    median, low, high = (values(f"step, {which}") for which in ("median", "lowest", "highest"))
    spread = [
        [m - lo for m, lo in zip(median, low, strict=True)],
        [hi - m for m, hi in zip(median, high, strict=True)],
    ]
    left.barh(places, median, 0.6, xerr=spread, color=colors, ecolor=TEXT, capsize=2)
    left.set_yticks(places, [name.replace(", ", ",\n", 1) for name in names])
    left.set_xlabel("ms per step: median and range")
    sent = values("sent by all nodes")
    right.barh(places, sent, 0.6, color=colors)
    right.set_yticks(places, [""] * len(names))
    right.set_xlabel("MB per step, sent by all nodes")
    for ax, shown in ((left, high), (right, sent)):
        bar = median if ax is left else sent
        for place, end, value in zip(places, shown, bar, strict=True):
            ax.text(end, place, f" {value:,.0f}", va="center", color=TEXT)
        ax.margins(x=0.15)
    left.set_title("One layer, links of 200 Mbit/s", loc="left", color=TEXT)
    _save(figure, path)
