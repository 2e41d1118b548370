"""One figure of the placement benchmark: its place in results.csv, and the target it is held to."""

import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

UNITS = {
    "copies": "per token per layer",
    "copies_vs_linear": "%",
    "picks_vs_linear": "%",
    "node_imbalance": "max/mean",
    "rank_imbalance": "max/mean",
    "straggler": "max/mean",
    "solve": "s",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A figure. ``target``: what it should reach; ``above``: more is better; ``holds``: whether the
    condition that the target names (a cap on imbalance, say) is kept.
    """

    case: str
    metric: str
    value: float
    unit: str = ""
    kind: str = "simulated"
    baseline: str = ""
    note: str = ""
    target: float | None = None
    above: bool = False
    holds: bool = True

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        enough = self.value >= self.target if self.above else self.value <= self.target
        return enough and self.holds

    def line(self) -> str:
        """The figure for people."""
        said = {None: "", True: "  met", False: "  MISSED"}[self.met]
        goal = "" if self.target is None else f"  (target {self.target:g})"
        return f"{self.case}: {self.metric} {self.value:.4g} {self.unit}{goal}{said}"

    def to_csv(self) -> dict[str, str]:
        """The figure for results.csv."""
        note = self.note
        if self.target is not None:
            words = "met" if self.met else "not met"
            if not self.holds:
                words += ": its condition on balance does not hold"
            note = f"target {self.target:g}, {words}; {note}".rstrip("; ")
        if self.kind == "measured":
            note = f"{note}; load average {os.getloadavg()[0]:.1f}".lstrip("; ")
        return {
            "benchmark": "placement",
            "case": self.case,
            "metric": self.metric,
            "value": f"{self.value:.4f}",
            "unit": self.unit or UNITS.get(self.metric, ""),
            "kind": self.kind,
            "baseline": self.baseline,
            "note": note,
        }


def summary(values: Sequence[float]) -> tuple[float, str]:
    """(median, the range in words)."""
    low, high = min(values), max(values)
    return statistics.median(values), f"median of {len(values)}, {low:.4f} to {high:.4f}"


def target_table(rows: Iterable[Row]) -> str:
    """The rows that have a target, aligned."""
    held = [row for row in rows if row.target is not None]
    if not held:
        return ""
    width = max(len(f"{row.case}: {row.metric}") for row in held)
    lines = [f"{'figure':{width}}  {'target':>9}  {'found':>9}"]
    for row in held:
        words = "met" if row.met else ("not met" if row.holds else "not met: balance")
        name = f"{row.case}: {row.metric}"
        lines.append(f"{name:{width}}  {row.target:>9g}  {row.value:>9.4g}  {words}")
    return "\n".join(lines)
