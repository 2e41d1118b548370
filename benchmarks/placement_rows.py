"""One figure of the placement benchmark: its place in results.csv, and the target it is held to."""

import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_locality.placement import Costs

UNITS = {
    "copies": "per token per layer",
    "copies_vs_linear": "%",
    "picks_vs_linear": "%",
    "crossing_once_per_node": "%",
    "crossing_per_rank": "%",
    "idle": "share of ranks",
    "node_imbalance": "max/mean",
    "rank_imbalance": "max/mean",
    "straggler": "max/mean",
    "solve": "s",
    "distinct": "experts per rank and batch",
}
PEER_COLUMNS = ("eplb", "eplb_global", "balance", "seed, predicted homes", "hottest", "mtkahypar")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A figure. ``target``: what it should reach; ``above``: more is better; ``holds``: whether the
    condition that the target names (a cap on imbalance, say) is kept. ``cell``, ``method`` and
    ``imbalance`` put methods side by side in ``target_table``.
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
    cell: tuple[str, int, float] | None = None  # (trace, nodes, replicas per expert)
    method: str = ""
    imbalance: float | None = None

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


def against(costs: Costs, linear: Costs) -> dict[str, float]:
    """The figures of a plan beside those of the linear layout with homes at random."""
    return {
        "copies_vs_linear": 100 * (costs.copies / linear.copies - 1),
        "picks_vs_linear": 100 * (costs.picks / linear.picks - 1),
        "node_imbalance": costs.node_imbalance,
        "rank_imbalance": costs.rank_imbalance,
    }


def summary(values: Sequence[float]) -> tuple[float, str]:
    """(median, the range in words)."""
    low, high = min(values), max(values)
    return statistics.median(values), f"median of {len(values)}, {low:.4f} to {high:.4f}"


def target_table(rows: Iterable[Row]) -> str:
    """The rows that have a target, aligned; beside them the peers of the same cell, with their
    imbalance, where they were run.
    """
    rows = list(rows)
    held = [row for row in rows if row.target is not None]
    if not held:
        return ""
    peers = {
        (row.cell, row.metric, row.method): f"{row.value:.1f} @ {row.imbalance:.3f}"
        for row in rows
        if row.target is None and row.cell is not None and row.imbalance is not None
    }
    named = [m for m in PEER_COLUMNS if any(key[2] == m for key in peers)]
    lines = [("figure", "target", "found", "imbalance", "", *named)]
    for row in held:
        words = "met" if row.met else ("not met" if row.holds else "not met: balance")
        level = "" if row.imbalance is None else f"{row.imbalance:.4f}"
        beside = [peers.get((row.cell, row.metric, m), "") for m in named]
        figures = (f"{row.target:g}", f"{row.value:.4g}", level, words)
        lines.append((f"{row.case}: {row.metric}", *figures, *beside))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
