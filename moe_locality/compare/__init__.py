"""Side by side: plans on a trace (predicted) or two runs (measured); as rows, report, wandb."""

from moe_locality.compare.content import comparison_report, trace_figures, trace_report
from moe_locality.compare.plans import Candidate, compare_plans
from moe_locality.compare.publish import track_comparison
from moe_locality.compare.rows import Comparison, Row
from moe_locality.compare.runs import Run, compare_runs, read_run

__all__ = [
    "Candidate",
    "Comparison",
    "Row",
    "Run",
    "compare_plans",
    "compare_runs",
    "comparison_report",
    "read_run",
    "trace_figures",
    "trace_report",
    "track_comparison",
]
