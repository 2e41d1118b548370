"""The outcome of a comparison: one row per metric, the baseline first, ratios to it."""

import dataclasses
import math
from typing import Any, Literal

from moe_locality.figures import FigureData, Table

How = Literal["measured", "simulated"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric: a value per candidate (the baseline first), None where it is not known.

    ``better`` says which way is good; ``interval`` is the 95 % interval of the last ratio.
    """

    metric: str
    unit: str
    how: How
    values: tuple[float | None, ...]
    better: Literal["lower", "higher", "equal"] = "lower"
    interval: tuple[float, float] | None = None

    @property
    def ratios(self) -> tuple[float | None, ...]:
        """Each value over the baseline's; None where a value is missing or the baseline is 0."""
        first = self.values[0]
        return tuple(
            None if first in (None, 0) or value is None else value / first for value in self.values
        )

    def to_dict(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return plain data; ``ours`` and ``ratio`` are those of the last candidate."""
        return {
            "metric": self.metric,
            "unit": self.unit,
            "how": self.how,
            "better": self.better,
            "baseline": self.values[0],
            "ours": self.values[-1],
            "ratio": self.ratios[-1],
            "interval": None if self.interval is None else list(self.interval),
            "values": dict(zip(names, self.values, strict=True)),
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Rows over the candidates ``names`` (the baseline first), with what the report needs beside.

    ``tables`` are further tables (per layer and plan, per domain); ``notes`` are sentences that a
    reader must know, for example that a plan was made from the very trace it is judged on.
    ``sources``: by name, what each candidate is (model, plan digest, ds_config, commit ...), for
    those who look at it later.
    """

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    facts: tuple[tuple[str, str], ...] = ()
    figures: tuple[FigureData, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    synthetic: bool = False
    sources: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def row(self, metric: str) -> Row | None:
        """Return the row of a metric, or None."""
        return next((row for row in self.rows if row.metric == metric), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, the JSON of ``moe-locality compare``."""
        return {
            "baseline": self.names[0],
            "names": list(self.names),
            "rows": [row.to_dict(self.names) for row in self.rows],
            "facts": dict(self.facts),
            "notes": list(self.notes),
        }

    def table(self) -> Table:
        """Return the rows as a table: metric, how, every candidate, ratio and interval."""
        head = ("metric", "unit", "how", *self.names, "ratio", "95 % interval")
        return Table(title="Side by side", columns=head, rows=tuple(map(self._cells, self.rows)))

    def _cells(self, row: Row) -> tuple[object, ...]:
        ratio = row.ratios[-1]
        interval = "" if row.interval is None else "{:.3f} to {:.3f}".format(*row.interval)
        ratio = None if ratio is None else round(ratio, 4)
        return (row.metric, row.unit, row.how, *row.values, ratio, interval)


def known(value: float | None) -> float | None:
    """Return the value, or None for nan, which JSON does not know."""
    return None if value is None or math.isnan(value) else float(value)
