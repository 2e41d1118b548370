"""Figure of a simulated sweep: speed-up over one thing, with error bars."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_locality.errors import BackendUnavailable, ConfigError
from moe_locality.figures.draw import BASELINE_COLOR, PLAN_COLOR, STYLE, png_bytes, svg_text
from moe_locality.files import replace_file, replace_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_sweep(rows: Sequence[dict[str, Any]], over: str, title: str) -> "Figure":
    """Return the figure of the rows of ``moe_locality.simulator.simulate``.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailable(
            "found no matplotlib, figures need it: pip install 'moe-locality[report]'"
        ) from error
    values = [float(row["value"]) for row in rows]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(1.0, color=BASELINE_COLOR, linewidth=1)
        axes.errorbar(
            values,
            [row["speedup"] for row in rows],
            yerr=[row["speedup_error"] for row in rows],
            color=PLAN_COLOR,
            marker="o",
            markersize=4,
            capsize=3,
        )
        if len(values) > 1 and min(values) > 0 and max(values) / min(values) > 10:
            axes.set_xscale("log", base=2)
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.minorticks_off()
        axes.set_xlabel(over)
        axes.set_ylabel("speed-up over linear, simulated")
        axes.set_title(title)
    return figure


def write_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as ``.svg`` or ``.png``.

    Raises:
        ConfigError: another suffix, or the file cannot be written.
    """
    suffix = path.suffix.lower()
    if suffix not in (".svg", ".png"):
        raise ConfigError(f"found the figure {path}, expected a name that ends in .svg or .png")
    try:
        if suffix == ".svg":
            replace_text(path, svg_text(figure))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, lambda file: file.write(png_bytes(figure)))
    except OSError as error:
        raise ConfigError(f"cannot write the figure {path}: {error.strerror or error}") from error
