"""A comparison in wandb: the table, the figures, the files as artifacts."""

import re
from collections.abc import Iterable
from pathlib import Path

from moe_locality.compare.rows import Comparison
from moe_locality.figures import draw, png_bytes
from moe_locality.tracking import NullTracker


def track_comparison(
    tracker: NullTracker, comparison: Comparison, *, files: Iterable[str | Path] = ()
) -> None:
    """Log a comparison: its rows and tables, each value as a scalar, its figures as images,
    ``files`` as artifacts.

    Plans (``*.json``) become artifacts of kind "plan", pages of kind "report", the rest "data".
    """
    if not tracker.active:
        return
    table = comparison.table()
    tracker.log_table("comparison/rows", table.columns, table.rows)
    for extra in comparison.tables:
        tracker.log_table(f"comparison/{_key(extra.title)}", extra.columns, extra.rows)
    for figure in comparison.figures:
        tracker.log_image(
            f"figures/{_key(figure.title)}",
            png_bytes(draw(figure)),
            caption=figure.basis.sentence(),
        )
    scalars = {}
    for row in comparison.rows:
        scalars[f"comparison/{row.metric}/baseline"] = row.values[0]
        scalars[f"comparison/{row.metric}/ours"] = row.values[-1]
        scalars[f"comparison/{row.metric}/ratio"] = row.ratios[-1]
    tracker.log({key: value for key, value in scalars.items() if value is not None})
    kinds = {".json": "plan", ".html": "report"}
    for path in map(Path, files):
        tracker.log_artifact(_key(path.stem), kinds.get(path.suffix, "data"), [path])


def _key(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
