"""Figures of the report: plain data in, matplotlib figures, SVG text and PNG bytes out.

One color map per meaning: blues for amounts, red-blue around 1 for ratios to uniform, greens for
similarity; gray is the baseline, blue is the plan. Nothing here touches pyplot, so no global state
is changed.
"""

import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import numpy as np

from moe_locality.errors import BackendUnavailable, ConfigError
from moe_locality.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """What stands behind the numbers of a figure: "measured" (counted in a run or a recorded trace)
    or "simulated" (predicted by replaying a trace); ``count`` is n, in ``unit``."""

    how: Literal["measured", "simulated"]
    count: int
    unit: str = "tokens"
    num_requests: int | None = None
    seed: int | None = None
    synthetic: bool = False
    note: str = ""

    def sentence(self) -> str:
        """Return the caption line: how, n and seed."""
        words = "Measured"
        if self.how == "simulated":
            words = "Simulated (predicted by replaying the trace)"
        source = " on a synthetic trace" if self.synthetic else ""
        count = f"n = {self.count:,} {self.unit}"
        if self.num_requests is not None:
            count += f" of {self.num_requests:,} requests"
        seed = "no random part" if self.seed is None else f"seed {self.seed}"
        return f"{words}{source}; {count}; {seed}." + (f" {self.note}" if self.note else "")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrafficData:
    """Traffic matrices of two placements on one scale.

    ``before``, ``after`` [n, n]: row = home, column = destination. ``node_of`` [n] names the node
    of each row, so that what stays on a node is grayed out; ``per`` divides both totals (for
    example the number of tokens) and ``per_name`` names it."""

    before: np.ndarray
    after: np.ndarray
    node_of: tuple[int, ...]
    unit: str
    basis: Basis
    title: str = "Traffic between nodes, before and after"
    names: tuple[str, str] = ("baseline", "plan")
    axis: Literal["node", "rank"] = "node"
    per: float = 1.0
    per_name: str = ""

    def crossing(self) -> tuple[float, float]:
        """Return the totals that cross nodes, before and after."""
        nodes = np.asarray(self.node_of)
        far = nodes[:, None] != nodes[None, :]
        return float(self.before[far].sum()) / self.per, float(self.after[far].sum()) / self.per


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadData:
    """Expert load by domain. ``ratio`` [panels, D, E]: load over that of a uniform router."""

    ratio: np.ndarray
    domains: tuple[str, ...]
    panels: tuple[str, ...]
    basis: Basis
    title: str = "Expert load by domain"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SimilarityData:
    """Similarity of domains. ``matrix`` [D, D]; on its diagonal the split-half noise floor."""

    matrix: np.ndarray
    domains: tuple[str, ...]
    measure: str
    basis: Basis
    title: str = "Similarity of domains, with the noise floor on the diagonal"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TradeoffPoint:
    """One plan: load of the busiest node over the mean, and copies per token and layer."""

    name: str
    imbalance: float
    copies: float
    is_baseline: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TradeoffData:
    """Balance against locality, one point per plan. ``cap``: what the solver was allowed."""

    points: tuple[TradeoffPoint, ...]
    basis: Basis
    cap: float | None = None
    title: str = "Balance against locality"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LayersData:
    """A cost per MoE layer. ``values`` name -> [L]; the first one is the baseline."""

    layer_ids: tuple[int, ...]
    values: dict[str, np.ndarray]
    unit: str
    basis: Basis
    title: str = "Cross-node copies by layer"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LossData:
    """Curves, of losses by default. ``runs`` name -> (steps [n], loss [n]), the baseline first."""

    runs: dict[str, tuple[np.ndarray, np.ndarray]]
    basis: Basis
    title: str = "Training loss"
    x_label: str = "step"
    y_label: str = "loss (nats per token)"
    log_x: bool = False


FigureData = TrafficData | LoadData | SimilarityData | TradeoffData | LayersData | LossData


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of a report: ``rows`` of numbers or words, one entry per column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]


def numbers(data: FigureData) -> Table:
    """Return the numbers that a figure shows as one table, so that a reader can copy them."""
    if isinstance(data, TrafficData):
        head = ("placement", f"home {data.axis}", *map(str, range(len(data.node_of))))
        pairs = zip(data.names, (data.before, data.after), strict=True)
        rows = [(name, i, *row) for name, matrix in pairs for i, row in enumerate(matrix.tolist())]
    elif isinstance(data, LoadData):
        head = ("layer", "domain", *map(str, range(data.ratio.shape[2])))
        rows = [
            (panel, domain, *data.ratio[i, j].tolist())
            for i, panel in enumerate(data.panels)
            for j, domain in enumerate(data.domains)
        ]
    elif isinstance(data, SimilarityData):
        head = (data.measure, *data.domains)
        rows = [(n, *row) for n, row in zip(data.domains, data.matrix.tolist(), strict=True)]
    elif isinstance(data, TradeoffData):
        head = ("plan", "load of the busiest node / mean", "copies per token and layer")
        rows = [(p.name, p.imbalance, p.copies) for p in data.points]
    elif isinstance(data, LayersData):
        head = ("layer", *data.values)
        columns = [np.asarray(values).tolist() for values in data.values.values()]
        rows = list(zip(data.layer_ids, *columns, strict=True))
    else:
        head = ("run", data.x_label, data.y_label.partition(" (")[0])
        rows = [
            (name, *point)
            for name, curve in data.runs.items()
            for point in zip(*(np.asarray(axis).tolist() for axis in curve), strict=True)
        ]
    return Table(title=data.title, columns=head, rows=tuple(map(tuple, rows)))


BASELINE_COLOR = "#767676"
PLAN_COLOR = "#0072B2"
LINE_COLORS = ("#767676", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Gray for the baseline, then Okabe and Ito's palette, which the color-blind can tell apart."""

MAX_CELL_LABELS = 10
STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: it can be selected, searched and read aloud
    "svg.hashsalt": "moe_locality",  # the same data gives the same bytes
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica Neue", "Arial"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9.0,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#9a9a9a",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "text.color": "#1f1f1f",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "image.interpolation": "nearest",
}


def _matplotlib() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise BackendUnavailable(
            "found no matplotlib, figures need it: pip install 'moe-locality[report]'"
        ) from error
    return mpl


def draw(data: FigureData) -> "Figure":
    """Return the figure of ``data``; BackendUnavailable: matplotlib is not installed; ConfigError:
    the shapes do not fit each other."""
    mpl = _matplotlib()
    painters = {
        TrafficData: _draw_traffic,
        LoadData: _draw_load,
        SimilarityData: _draw_similarity,
        TradeoffData: _draw_tradeoff,
        LayersData: _draw_layers,
        LossData: _draw_losses,
    }
    with mpl.rc_context(STYLE):
        figure = painters[type(data)](data)
        # The layout engine moves things at every drawing: freeze it, so that exports are equal.
        for _ in range(3):
            figure.draw_without_rendering()
        figure.set_layout_engine("none")
    return figure


def svg_text(figure: "Figure") -> str:
    """Return the figure as SVG text without a date, the same bytes for the same figure."""
    return _saved(figure, format="svg", metadata={"Date": None, "Creator": None}).decode()


def png_bytes(figure: "Figure") -> bytes:
    """Return the figure as a PNG file in memory."""
    return _saved(figure, format="png", dpi=150, metadata={"Software": None})


def _saved(figure: "Figure", **options: Any) -> bytes:
    buffer = io.BytesIO()
    with _matplotlib().rc_context(STYLE):
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def _new(width: float, height: float, *, square: bool = False) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="compressed" if square else "constrained")


def _title(data: FigureData) -> str:
    return data.title + (" (synthetic trace)" if data.basis.synthetic else "")


def _need(shape: Sequence[int], expected: Sequence[int], what: str) -> None:
    if tuple(shape) != tuple(expected):
        raise ConfigError(
            f"{what} has shape {list(shape)}, expected {list(expected)}: give arrays of one size"
        )


def _cells(
    axes: "Axes", values: np.ndarray, shades: tuple[str, float, float], low: float, high: float
) -> Any:
    """Draw a matrix as vector cells, row 0 on top; as one embedded image when it is large, in the
    part ``shades`` (name, first, last) of a color map for the values ``low`` to ``high``."""
    from matplotlib.colors import LinearSegmentedColormap

    name, first, last = shades
    colors = _matplotlib().colormaps[name](np.linspace(first, last, 256))
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(values),
        cmap=LinearSegmentedColormap.from_list(f"{name}_part", colors.tolist()),
        vmin=low,
        vmax=high,
        rasterized=values.size > 4000,
        edgecolors="white" if values.size <= 400 else "none",
        linewidth=0.6,
    )
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return mesh


def _cell_labels(axes: "Axes", texts: list[list[str]], shades: np.ndarray) -> None:
    """Write a text into every cell, white on dark ones. ``shades`` [n, m, 4] RGBA."""
    luminance = shades[..., :3] @ np.array([0.299, 0.587, 0.114])
    middle: Any = {"ha": "center", "va": "center", "fontsize": 8}
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            color = "white" if luminance[row, column] < 0.55 else "#1f1f1f"
            axes.text(column + 0.5, row + 0.5, text, color=color, **middle)


def short(value: float) -> str:
    """Return a number with about three digits and a k, M or G, as figures print it."""
    if not np.isfinite(value):
        return ""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:#.3g}".rstrip(".") + letter
    return f"{value:#.3g}".rstrip(".") if value else "0"


def is_number(value: object) -> TypeGuard[int | float]:
    """Return whether the value is an int or a float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def format_value(value: object) -> str:
    """Return a number as people read it: thousands separated, four digits, a hyphen for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if not is_number(value):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _draw_traffic(data: TrafficData) -> "Figure":
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FuncFormatter

    count, both = len(data.node_of), (data.before, data.after)
    for matrix, when in zip(both, ("before", "after"), strict=True):
        _need(matrix.shape, (count, count), f"the traffic matrix {when}")
    nodes = np.asarray(data.node_of)
    near = nodes[:, None] == nodes[None, :]
    top = max(float(np.where(near, 0, m).max(initial=0)) for m in both)
    figure = _new(8.6, 4.9, square=True)
    panels = figure.subplots(1, 2)
    for axes, matrix, name, total in zip(panels, both, data.names, data.crossing(), strict=True):
        far = np.where(near, np.nan, matrix)
        mesh = _cells(axes, far, ("Blues", 0.04, 0.98), 0, top or 1.0)
        for row, column in np.argwhere(near):
            axes.add_patch(Rectangle((column, row), 1, 1, fc="#ececec", ec="white", lw=0.6))
        if count <= MAX_CELL_LABELS:
            shades = np.where(near[..., None], 1.0, mesh.to_rgba(matrix))
            _cell_labels(axes, [[short(v) for v in row] for row in matrix], shades)
        axes.set_aspect("equal")
        axes.set_title(f"{name}\n{short(total)} {data.unit}{data.per_name} cross nodes")
        axes.set_xlabel(f"{data.axis} of the expert")
        axes.set_ylabel(f"home {data.axis} of the token")
        places = np.arange(0, count, max(1, -(-count // 16)))
        for set_ticks in (axes.set_xticks, axes.set_yticks):
            set_ticks(places + 0.5, list(map(str, places)))
    bar = figure.colorbar(mesh, ax=list(panels), shrink=0.75, pad=0.02)
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    return _finish_map(figure, data, bar, f"{data.unit} (one scale; gray stays on its node)")


def _draw_load(data: LoadData) -> "Figure":
    _need(data.ratio.shape[:2], (len(data.panels), len(data.domains)), "the load by domain")
    with np.errstate(divide="ignore"):
        logs = np.clip(np.log2(data.ratio), -3, 3)
    height = 0.9 + len(data.panels) * (0.5 + 0.19 * len(data.domains))
    figure = _new(8.6, min(height, 13.0))
    panels = np.atleast_1d(figure.subplots(len(data.panels), 1))
    for axes, panel, values in zip(panels, data.panels, logs, strict=True):
        order = np.argsort(-values[0], kind="stable")
        mesh = _cells(axes, values[:, order], ("RdBu_r", 0.02, 0.98), -3, 3)
        axes.set_title(panel)
        axes.set_yticks(np.arange(len(data.domains)) + 0.5, list(data.domains))
        axes.set_xticks([])
    panels[-1].set_xlabel(
        f"experts, sorted in each layer by their load in {data.domains[0]!r} "
        f"({data.ratio.shape[2]} experts)"
    )
    bar = figure.colorbar(mesh, ax=list(panels), shrink=0.9, pad=0.02, aspect=30)
    bar.set_ticks(range(-3, 4), labels=["≤ ⅛", "¼", "½", "1", "2", "4", "≥ 8"])
    return _finish_map(figure, data, bar, "load ÷ uniform load")


def _draw_similarity(data: SimilarityData) -> "Figure":
    from matplotlib.patches import Rectangle

    count = len(data.domains)
    _need(data.matrix.shape, (count, count), "the similarity matrix")
    finite = data.matrix[np.isfinite(data.matrix)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    side = min(2.8 + 0.46 * count, 9.0)
    figure = _new(side + 1.6, side, square=True)
    axes = figure.subplots()
    mesh = _cells(axes, data.matrix, ("Greens", 0.04, 0.95), low, max(high, low + 1e-9))
    if count <= MAX_CELL_LABELS + 4:
        texts = [[f"{v:.2f}" if np.isfinite(v) else "" for v in row] for row in data.matrix]
        _cell_labels(axes, texts, mesh.to_rgba(data.matrix))
    for i in range(count):
        axes.add_patch(Rectangle((i, i), 1, 1, fill=False, ec="#1f1f1f", lw=1.2))
    axes.set_aspect("equal")
    axes.set_xticks(np.arange(count) + 0.5, list(data.domains), rotation=40, ha="right")
    axes.set_yticks(np.arange(count) + 0.5, list(data.domains))
    bar = figure.colorbar(mesh, ax=axes, shrink=0.75, pad=0.02)
    return _finish_map(figure, data, bar, data.measure)


def _finish_map(figure: "Figure", data: FigureData, bar: Any, label: str) -> "Figure":
    bar.set_label(label)
    bar.outline.set_visible(False)
    figure.suptitle(_title(data), x=0.01, ha="left", fontweight="bold", fontsize=11.5)
    return figure


def _new_axes(
    size: tuple[float, float], x_label: str, y_label: str, title: str, grid: Any = "y"
) -> tuple["Figure", "Axes"]:
    figure = _new(*size)
    axes = figure.subplots()
    axes.grid(True, axis=grid, color="#eeeeee", lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title, fontsize=11.5)
    return figure, axes


def _draw_tradeoff(data: TradeoffData) -> "Figure":
    label = "load of the busiest node ÷ mean  (1 = balanced; left is better)"
    y_label = "remote nodes per token and layer\n(copies; lower is better)"
    figure, axes = _new_axes((7.2, 4.2), label, y_label, _title(data), grid="both")
    if data.cap is not None:
        axes.axvline(data.cap, color="#bbbbbb", lw=1, ls=(0, (4, 3)), zorder=1)
        axes.text(data.cap, 1.0, f" cap {data.cap:g}", color="#767676", fontsize=8, va="top",
                  transform=axes.get_xaxis_transform())  # fmt: skip
    for point in data.points:
        color = BASELINE_COLOR if point.is_baseline else PLAN_COLOR
        marker = "X" if point.is_baseline else "o"
        at = (point.imbalance, point.copies)
        axes.scatter(*at, s=64, c=color, marker=marker, ec="white", zorder=3)
        above = data.cap is not None and point.imbalance > data.cap and not point.is_baseline
        name = f"{point.name}: above the cap" if above else point.name
        axes.annotate(name, at, xytext=(8, 5), textcoords="offset points", fontsize=9)
    axes.margins(x=0.22, y=0.18)
    return figure


def _draw_layers(data: LayersData) -> "Figure":
    figure, axes = _new_axes((7.8, 3.4), "transformer layer", data.unit, _title(data))
    for place, (name, values) in enumerate(data.values.items()):
        _need(np.shape(values), (len(data.layer_ids),), f"the values of {name!r}")
        others = LINE_COLORS[2:]  # gray is the baseline, the first; blue is ours, the last
        color = PLAN_COLOR if place == len(data.values) - 1 else others[place % len(others) - 1]
        color = BASELINE_COLOR if place == 0 else color
        axes.plot(data.layer_ids, values, marker="o", ms=4, lw=1.6, color=color, label=name)
    axes.legend(frameon=False, loc="best")
    axes.set_ylim(bottom=0)
    return figure


def _draw_losses(data: LossData) -> "Figure":
    figure, axes = _new_axes((7.8, 3.6), data.x_label, data.y_label, _title(data))
    for place, (name, (steps, losses)) in enumerate(data.runs.items()):
        _need(np.shape(losses), np.shape(steps), f"the losses of {name!r}")
        # The later curves are thinner and dashed: equal curves stay visible under each other.
        width, dashes = (3.0, "-") if place == 0 else (1.3, "--")
        color = "#b5b5b5" if place == 0 else LINE_COLORS[place % len(LINE_COLORS)]
        axes.plot(steps, losses, lw=width, ls=dashes, color=color, label=name)
    if data.log_x:
        axes.set_xscale("log")
    axes.legend(frameon=False, loc="best")
    return figure


def draw_sweep(rows: Sequence[dict[str, Any]], over: str, title: str) -> "Figure":
    """Return the figure of the rows of ``simulator.sweep``; BackendUnavailable: no matplotlib."""
    values, speedups, errors = (
        [float(row[name]) for row in rows] for name in ("value", "speedup", "speedup_error")
    )
    with _matplotlib().rc_context(STYLE):
        figure = _new(6.4, 3.4)
        axes = figure.subplots()
        axes.axhline(1.0, color=BASELINE_COLOR, linewidth=1)
        style: Any = {"color": PLAN_COLOR, "marker": "o", "markersize": 4, "capsize": 3}
        axes.errorbar(values, speedups, yerr=errors, **style)
        if len(values) > 1 and min(values) > 0 and max(values) / min(values) > 10:
            axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
        axes.set_xlabel(over)
        axes.set_ylabel("speed-up over linear, simulated")
        axes.set_title(title)
    return figure


def write_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as .svg or .png; ConfigError: another suffix, or it cannot be written."""
    suffix = path.suffix.lower()
    if suffix not in (".svg", ".png"):
        raise ConfigError(f"found the figure {path}, expected a name that ends in .svg or .png")
    try:
        content = svg_text(figure).encode() if suffix == ".svg" else png_bytes(figure)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda file: file.write(content))
    except OSError as error:
        raise ConfigError(f"cannot write the figure {path}: {error.strerror or error}") from error
