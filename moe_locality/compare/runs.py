"""Two runs: what their directories hold, measured, side by side.

A run directory holds any of: ``metrics.jsonl`` (one object per step: "step", "loss", "step_s"),
``summary.json``, ``traffic.json`` (a traffic report), ``evaluation.npz`` (rows per request),
``plan.json`` and ``trace/``; docs/formats.md has the keys. What is missing is left out of the
comparison, and said.
"""

import dataclasses
import json
import logging
import statistics
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.compare.rows import Comparison, Row, known
from moe_locality.errors import ConfigError
from moe_locality.figures import Basis, FigureData, LossData, Table, TrafficData
from moe_locality.placement import PlacementPlan

logger = logging.getLogger(__name__)

EVALUATION_NAMES = ("evaluation.npz", "eval.npz")
WARM_UP_STEPS = 5
SOURCES = ("model", "ds_config", "commit", "versions", "cluster", "num_ranks", "steps", "seed")
"""What of a run's summary says what it is."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a run directory holds; None or empty where a file is missing."""

    name: str
    path: Path
    steps: tuple[dict[str, Any], ...] = ()
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    traffic: dict[str, Any] | None = None
    evaluation: dict[str, np.ndarray] | None = None
    plan: PlacementPlan | None = None
    trace: Path | None = None

    def loss_curve(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return (steps [n], losses [n]) of the training steps, or None."""
        points = [(s["step"], s["loss"]) for s in self.steps if "loss" in s and "step" in s]
        if not points:
            return None
        steps, losses = zip(*points, strict=True)
        return np.array(steps), np.array(losses, dtype=np.float64)


def read_run(path: str | Path, name: str | None = None) -> Run:
    """Read a run directory.

    Raises:
        ConfigError: it is not a directory, holds none of the files, or one of them is damaged.
        PlacementError: its plan is not valid.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(
            f"found no directory {folder}, expected the output of a run (metrics.jsonl, "
            "traffic.json, evaluation.npz ...): check the path"
        )
    evaluation = next((folder / n for n in EVALUATION_NAMES if (folder / n).is_file()), None)
    plan = folder / "plan.json"
    run = Run(
        name=name or folder.name or str(folder),
        path=folder,
        steps=_read_steps(folder / "metrics.jsonl"),
        summary=_read_object(folder / "summary.json") or {},
        traffic=_read_object(folder / "traffic.json"),
        evaluation=None if evaluation is None else read_arrays(evaluation),
        plan=PlacementPlan.read(plan) if plan.is_file() else None,
        trace=folder / "trace" if (folder / "trace").is_dir() else None,
    )
    if not (run.steps or run.summary or run.traffic or run.evaluation):
        raise ConfigError(
            f"found nothing to compare in {folder}, expected metrics.jsonl, summary.json, "
            "traffic.json or evaluation.npz: give the output directory of a run"
        )
    return run


def _read_object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}: run again, or remove the file") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _read_steps(path: Path) -> tuple[dict[str, Any], ...]:
    """Return the step lines; a last line that was cut off by a crash is left out with a warning."""
    if not path.is_file():
        return ()
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    steps = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                logger.warning("%s: left out the last line, which is cut off", path)
                break
            raise ConfigError(
                f"{path}, line {number} is not JSON: {error}: run again, or remove the line"
            ) from error
        if isinstance(entry, dict) and entry.get("kind", "step") == "step":
            steps.append(entry)
    return tuple(steps)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read an .npz file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"cannot read {path}: {error}: run again, or remove the file") from error


def compare_runs(
    baseline: Run, ours: Run, *, node_of_rank: tuple[int, ...] | None = None
) -> Comparison:
    """Put two runs side by side: losses, bytes by link, balance, times.

    ``node_of_rank`` is taken from a plan of the runs where it is not given; without either the
    traffic figure is left out.
    """
    names = (baseline.name, ours.name if ours.name != baseline.name else f"{ours.name} (2)")
    pair = (baseline, ours)
    rows = [*_loss_rows(pair), *_traffic_rows(pair), *_time_rows(pair)]
    if not rows:
        todo = "compare two runs of the same kind"
        short = [str(run.path) for run in pair if run.summary and not (run.steps or run.traffic)]
        if short:  # a run directory holds a summary from the start
            todo = (
                f"{' and '.join(short)} ended before the first multiple of tracking.every_n_steps "
                "(10 where it is not set): give a smaller one, or train longer"
            )
        raise ConfigError(
            f"found no metric that both {baseline.path} and {ours.path} hold, expected losses, "
            f"traffic or times in both: {todo}"
        )
    nodes = node_of_rank or next((r.plan.rank_to_node for r in pair if r.plan is not None), None)
    notes = tuple(
        f"{run.name} has no {what}; it is left out of the comparison."
        for run in pair
        for what, there in (("traffic.json", run.traffic), ("metrics.jsonl", run.steps))
        if not there
    )
    facts = (
        *((f"run {name}", str(run.path)) for name, run in zip(names, pair, strict=True)),
        *(
            (f"plan of {name}", run.plan.digest()[:12])
            for name, run in zip(names, pair, strict=True)
            if run.plan is not None
        ),
    )
    return Comparison(
        names=names,
        rows=tuple(rows),
        facts=facts,
        figures=tuple(_figures(pair, names, nodes)),
        tables=tuple(_domain_tables(pair, names)),
        notes=notes,
        sources={name: _source(run) for name, run in zip(names, pair, strict=True)},
    )


def _source(run: Run) -> dict[str, Any]:
    found = {key: run.summary[key] for key in SOURCES if key in run.summary}
    return found if run.plan is None else {**found, "plan": run.plan.digest()}


def _row(metric: str, unit: str, values: list[float | None], better: Any = "lower") -> list[Row]:
    """One row, or none where a run lacks the value."""
    if any(value is None for value in values):
        return []
    found = tuple(map(known, values))
    return [Row(metric=metric, unit=unit, how="measured", values=found, better=better)]


def _loss_rows(pair: tuple[Run, Run]) -> list[Row]:
    rows: list[Row] = []
    curves = [run.loss_curve() for run in pair]
    last = [None if curve is None else float(curve[1][-1]) for curve in curves]
    rows += _row("quality/train_loss", "nats per token, last step", last, "equal")
    losses = [None if run.evaluation is None else run.evaluation.get("loss") for run in pair]
    means = [None if loss is None else float(loss.mean()) for loss in losses]
    rows += _row("quality/eval_loss", "nats per token, held out", means, "equal")
    return rows


def _traffic_rows(pair: tuple[Run, Run]) -> list[Row]:
    rows: list[Row] = []
    links = [run.traffic.get("by_link") if run.traffic else None for run in pair]
    steps = [(run.traffic or {}).get("steps") for run in pair]
    counted = [step for step in steps if step]
    per, of = (" per step", counted) if len(counted) == 2 else ("", [1, 1])
    if all(links):
        totals = [_link_totals(link) for link in links if link]
        crossing = [total["cross_node"] / n for total, n in zip(totals, of, strict=True)]
        rows += _row("traffic/cross_node_bytes", f"bytes{per}, all directions", [*crossing])
        shares = [total["cross_node"] / max(sum(total.values()), 1) for total in totals]
        rows += _row("traffic/cross_node_frac", "share of all bytes", [*shares])
        dispatch = [link["dispatch"]["cross_node"] for link in links if link]
        dispatch = [count / n for count, n in zip(dispatch, of, strict=True)]
        rows += _row("traffic/dispatch_cross_node_bytes", f"bytes{per}, dispatch", dispatch)
    messages = [run.traffic.get("messages_by_link") if run.traffic else None for run in pair]
    if all(messages):
        counts = [
            sum(kind["cross_node"] for name, kind in by_kind.items() if name != "routing") / n
            for by_kind, n in zip(messages, of, strict=True)
            if by_kind
        ]
        rows += _row("traffic/cross_node_messages", f"messages{per}, all directions", [*counts])
    received = [_received(run) for run in pair]
    if all(r is not None and r.sum() > 0 for r in received):
        balance = [float(r.mean() / r.max()) for r in received if r is not None]
        rows += _row("load/balancedness", "mean / max rows per rank", [*balance], "higher")
    return rows


def _link_totals(by_link: dict[str, dict[str, int]]) -> dict[str, int]:
    links = ("same_rank", "same_node", "cross_node")
    return {link: sum(kind[link] for kind in by_link.values()) for link in links}


def _received(run: Run) -> np.ndarray | None:
    """[G] rows that each rank's experts worked on, or None.

    A report without them, of an older version, has the rows that each rank received: the same where
    rows go straight to their experts.
    """
    if (run.traffic or {}).get("load"):
        return np.asarray((run.traffic or {})["load"], dtype=np.float64)
    matrix = ((run.traffic or {}).get("rows") or {}).get("dispatch")
    return None if matrix is None else np.asarray(matrix, dtype=np.float64).sum(axis=0)


def _time_rows(pair: tuple[Run, Run]) -> list[Row]:
    steps = []
    for run in pair:
        times, warm = [], 0
        for line in run.steps:  # a line may stand for several steps
            if "step_s" in line:
                times += [line["step_s"]] if warm >= WARM_UP_STEPS else []
                warm += line.get("steps", 1)
        steps.append(statistics.median(times) * 1e6 if times else None)
    rows = _row("time/step_us", f"µs, median after {WARM_UP_STEPS} steps", steps)
    seconds = [run.summary.get("eval_s") for run in pair]
    rows += _row("time/eval_s", "s, one evaluation, not repeated", seconds)
    return rows


def _num_rows(run: Run) -> int:
    rows = ((run.traffic or {}).get("rows") or {}).get("dispatch")
    return int(np.sum(rows)) if rows else 0


def _figures(
    pair: tuple[Run, Run], names: tuple[str, str], nodes: tuple[int, ...] | None
) -> list[FigureData]:
    figures: list[FigureData] = []
    seed = pair[0].summary.get("seed")
    matrices = [((run.traffic or {}).get("bytes") or {}).get("dispatch") for run in pair]
    if nodes is not None and all(m is not None and len(m) == len(nodes) for m in matrices):
        rows = sum(map(_num_rows, pair))
        before, after = (np.asarray(matrix, dtype=np.float64) / 1e6 for matrix in matrices)
        figures.append(
            TrafficData(
                before=before,
                after=after,
                node_of=nodes,
                names=names,
                axis="rank",
                unit="MB",
                title="Dispatched bytes between ranks",
                basis=Basis(how="measured", count=rows, unit="routed rows in both", seed=seed),
            )
        )
    curves = {name: run.loss_curve() for name, run in zip(names, pair, strict=True)}
    found = {name: curve for name, curve in curves.items() if curve is not None}
    if found:
        count = sum(len(steps) for steps, _ in found.values())
        figures.append(
            LossData(
                runs=found,
                basis=Basis(how="measured", count=count, unit="steps", seed=seed),
            )
        )
    return figures


def _domain_tables(pair: tuple[Run, Run], names: tuple[str, str]) -> list[Table]:
    """Held-out loss by domain, where both runs have it."""
    parts = [run.summary.get("eval_loss_by_domain") or {} for run in pair]
    shared = [name for name in parts[0] if name in parts[1]]
    if not shared:
        return []
    rows = tuple((domain, *(part[domain] for part in parts)) for domain in shared)
    return [Table(title="Held-out loss by domain", columns=("domain", *names), rows=rows)]
