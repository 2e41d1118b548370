"""Side by side: plans on a trace (predicted) or two runs (measured); as rows, figures, wandb.

A run directory holds any of: ``metrics.jsonl`` (one object per step: "step", "loss", "step_s"),
``summary.json``, ``traffic.json`` (a traffic report), ``evaluation.npz`` (rows per request),
``plan.json`` and ``trace/``; docs/formats.md has the keys. What is missing is left out of the
comparison, and said.
"""

import dataclasses
import json
import logging
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.figures import (
    Basis,
    FigureData,
    LayersData,
    LossData,
    Table,
    TradeoffData,
    TradeoffPoint,
    TrafficData,
    draw,
    png_bytes,
)
from moe_locality.placement import Costs, PlacementPlan, evaluate
from moe_locality.placement.costs import copies_of_blocks, ratio_interval, request_blocks
from moe_locality.placement.problem import align_trace
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace import RoutingTrace
from moe_locality.tracking import Tracker

How = Literal["measured", "simulated"]
Better = Literal["lower", "higher", "equal"]
SplitFrom = tuple[str, str]
"""Content hashes: of a trace that was split, and of the part that was not held out."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric: a value per candidate (the baseline first), None where it is not known; which way
    is ``better``, and the 95 % ``interval`` of the last ratio."""

    metric: str
    unit: str
    how: How
    values: tuple[float | None, ...]
    better: Better = "lower"
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

    ``tables``: further ones (per layer and plan, per domain). ``notes``: sentences that a reader
    must know, for example that a plan was made from the very trace it is judged on. ``sources``: by
    name, what each candidate is (model, plan digest, ds_config, commit ...)."""

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
        rows = []
        for row in self.rows:
            interval = "" if row.interval is None else "{:.3f} to {:.3f}".format(*row.interval)
            ratio = None if row.ratios[-1] is None else round(row.ratios[-1], 4)
            rows.append((row.metric, row.unit, row.how, *row.values, ratio, interval))
        return Table(title="Side by side", columns=head, rows=tuple(rows))


def known(value: float | None) -> float | None:
    """Return the value, or None for nan, which JSON does not know."""
    return None if value is None or math.isnan(value) else float(value)


METRICS = (
    ("copies", "remote nodes per token and layer"),
    ("picks", "remote (token, expert) pairs per token and layer"),
    ("link", "rows of the busiest node, per layer"),
    ("node_imbalance", "busiest node / mean"),
    ("rank_imbalance", "busiest rank / mean"),
    ("straggler", "busiest rank / mean, per batch"),
    ("distinct", "experts per rank and batch"),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A plan with the homes that its requests have: None = anywhere, else request id -> rank."""

    name: str
    plan: PlacementPlan
    homes: dict[int, int] | None = None

    @property
    def label(self) -> str:
        """The name, with what the homes are where they were assigned."""
        return self.name if self.homes is None else f"{self.name}, homes assigned"


def is_synthetic(trace: RoutingTrace) -> bool:
    """Whether the trace says that it is synthetic, in the name of its model."""
    return "synthetic" in trace.model.lower()


def compare_plans(
    trace: RoutingTrace,
    candidates: list[Candidate],
    topology: ClusterTopology | None = None,
    *,
    seed: int = 0,
    split_from: SplitFrom | None = None,
) -> Comparison:
    """Evaluate the candidates (the first is the baseline) on a trace and put them side by side.

    The interval of the copies' ratio is a jackknife over blocks of whole requests, so it says how
    far the ratio depends on which requests were recorded. ``split_from``: see :func:`made_from`.
    PlacementError: no candidate, two of one name, or a plan does not fit the trace."""
    labels = tuple(candidate.label for candidate in candidates)
    if not labels or len(set(labels)) != len(labels):
        raise PlacementError(
            f"found the plans {list(labels)}, expected one or more with different names: rename one"
        )
    costs = {c.label: evaluate(trace, c.plan, topology, c.homes) for c in candidates}
    blocks = request_blocks(trace, seed) if len(candidates) > 1 else None
    ends = (candidates[0], candidates[-1])
    copies = (copies_of_blocks(trace, c.plan, topology, c.homes, blocks) for c in ends)
    interval = ratio_interval(*copies)
    rows = []
    for name, unit in METRICS:
        values = tuple(known(getattr(cost, name)) for cost in costs.values())
        reach = interval if name == "copies" else None
        rows.append(Row(metric=name, unit=unit, how="simulated", values=values, interval=reach))
    own = [c.label for c in candidates if made_from(c.plan, trace, split_from)]
    baseline = candidates[0].plan
    cluster = f"{baseline.num_nodes} nodes x {baseline.ranks_per_node} ranks"
    facts = (
        ("model", trace.model or "not named"),
        ("trace", f"{trace.content_hash()[:12]} ({trace.num_tokens:,} tokens)"),
        ("cluster", cluster if topology is None else topology.describe()),
        *((f"plan {c.label}", c.plan.digest()[:12]) for c in candidates),
    )
    return Comparison(
        names=labels,
        rows=tuple(rows),
        facts=facts,
        figures=tuple(_figures_of_plans(trace, candidates, costs, topology, seed, own)),
        tables=(_layer_table(costs),),
        notes=tuple(_notes(own, candidates, costs)),
        synthetic=is_synthetic(trace),
        sources={
            c.label: {"model": c.plan.model, "plan": c.plan.digest(), **c.plan.provenance}
            for c in candidates
        },
    )


def _notes(own: list[str], candidates: list[Candidate], costs: dict[str, Costs]) -> list[str]:
    """What to know of plans made from the trace itself, and of each that is less level here than
    its solver was told to expect."""
    found, baseline = [], candidates[0].label
    if own:
        found.append(
            f"Made from these same requests: {', '.join(own)}. In-sample figures flatter a plan: "
            "judge it on requests that its solver did not see (--held-out)."
        )
    for candidate in candidates:
        made, level = candidate.plan.provenance, costs[candidate.label].node_imbalance
        expected, cap = made.get("expected_imbalance"), made.get("max_imbalance")
        if expected is not None and round(level, 3) > max(round(expected, 3), cap):
            found.append(
                f"{candidate.label} is above its cap: the busiest node has {level:.3f} of the mean "
                f"load on these requests; the cap is {cap:g}, {expected:.3f} was expected, "
                f"{baseline} has {costs[baseline].node_imbalance:.3f}."
            )
    return found


def made_from(
    plan: PlacementPlan, trace: RoutingTrace, split_from: SplitFrom | None = None
) -> bool:
    """Whether the plan was solved on requests of this trace. ``split_from``: where it was held out
    of another, the hashes of that and of its other part, which alone a plan may be made from."""
    if plan.provenance.get("method") in ("linear", "round_robin", None):
        return False
    solved_on, drawn_from = plan.provenance.get("trace"), plan.provenance.get("drawn_from")
    if trace.content_hash() in (solved_on, drawn_from):
        return True
    if split_from is None:
        return False
    whole, other_part = split_from
    return whole in (solved_on, drawn_from) and solved_on != other_part


def _figures_of_plans(
    trace: RoutingTrace,
    candidates: list[Candidate],
    costs: dict[str, Costs],
    topology: ClusterTopology | None,
    seed: int,
    own: list[str],
) -> list[FigureData]:
    if trace.expert_ids is None:
        return []
    basis = Basis(
        how="simulated",
        count=trace.num_tokens,
        num_requests=len(trace.request_ids),
        seed=seed,
        synthetic=is_synthetic(trace),
        note=f"In-sample: {', '.join(own)}." if own else "",
    )
    figures: list[FigureData] = []
    first, last = candidates[0], candidates[-1]
    if len(candidates) > 1:
        visits = (
            align_trace(trace, c.plan, topology, c.homes).node_visits().sum(axis=0)
            for c in (first, last)
        )
        before, after = (np.asarray(matrix, float) for matrix in visits)
        figures.append(
            TrafficData(
                before=before,
                after=after,
                node_of=tuple(range(len(before))),
                names=(first.label, last.label),
                unit="copies",
                per=trace.num_tokens * trace.num_layers,
                per_name=" per token and layer",
                basis=basis,
            )
        )
        points = []
        for name, cost in costs.items():
            at: dict[str, float] = {"imbalance": cost.node_imbalance, "copies": cost.copies}
            points.append(TradeoffPoint(name=name, **at, is_baseline=not points))
        cap = last.plan.provenance.get("max_imbalance")
        cap = cap if isinstance(cap, float) else None
        figures.append(TradeoffData(points=tuple(points), basis=basis, cap=cap))
    values = {name: cost.per_layer["copies"] for name, cost in costs.items()}
    layers, unit = costs[first.label].layer_ids, "copies per token"
    figures.append(LayersData(layer_ids=layers, values=values, unit=unit, basis=basis))
    return figures


def _layer_table(costs: dict[str, Costs]) -> Table:
    names = ("copies", "picks", "node_imbalance", "rank_imbalance")
    rows = [
        (label, layer, *(known(cost.per_layer[name][row]) for name in names))
        for label, cost in costs.items()
        for row, layer in enumerate(cost.layer_ids)
    ]
    return Table(title="Layer by layer", columns=("plan", "layer", *names), rows=tuple(rows))


logger = logging.getLogger(__name__)

EVALUATION_NAMES = ("evaluation.npz", "eval.npz")
WARM_UP_STEPS = 5
LINKS = ("same_rank", "same_node", "cross_node")
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
    """Read a run directory; ConfigError: it is none, holds none of the files, or one is damaged;
    PlacementError: its plan is not valid."""
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
    """Read an .npz file; ConfigError: it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"cannot read {path}: {error}: run again, or remove the file") from error


def compare_runs(
    baseline: Run, ours: Run, *, node_of_rank: tuple[int, ...] | None = None
) -> Comparison:
    """Put two runs side by side: losses, bytes by link, balance, times. ``node_of_rank``: else that
    of a plan of the runs; without both there is no traffic figure."""
    names = (baseline.name, ours.name if ours.name != baseline.name else f"{ours.name} (2)")
    pair = (baseline, ours)
    rows = _measured_rows(pair)
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
    notes += _differences(pair)
    named = dict(zip(names, pair, strict=True))
    plans = {name: run.plan for name, run in named.items() if run.plan is not None}
    facts = [(f"run {name}", str(run.path)) for name, run in named.items()]
    facts += [(f"plan of {name}", plan.digest()[:12]) for name, plan in plans.items()]
    sources = {
        name: {key: run.summary[key] for key in SOURCES if key in run.summary}
        for name, run in named.items()
    }
    for name, plan in plans.items():
        sources[name]["plan"] = plan.digest()
    return Comparison(
        names=names,
        rows=tuple(rows),
        facts=tuple(facts),
        figures=tuple(_figures_of_runs(named, nodes)),
        tables=_domain_tables(named),
        notes=notes,
        sources=sources,
    )


def _differences(pair: tuple[Run, Run]) -> tuple[str, ...]:
    """A sentence for each thing but the placement in which the runs differ."""
    first, second = pair
    found = []
    for key in ("model", "cluster", "num_ranks"):
        told = [run.summary.get(key) for run in pair if run.summary]
        if len(told) == 2 and None not in told and told[0] != told[1]:
            found.append(
                f"The runs differ in {key}: {first.name} has {told[0]}, {second.name} {told[1]}."
            )
    curves = [run.loss_curve() for run in pair]
    ends = [int(curve[0].max()) for curve in curves if curve is not None]
    if len(ends) == 2 and ends[0] != ends[1]:
        found.append(
            f"The runs have lines up to step {ends[0]} and {ends[1]}: losses are those of the last "
            "step that both have."
        )
    return tuple(found)


def _measured_rows(pair: tuple[Run, Run]) -> list[Row]:
    """A row for each metric that both runs have."""
    curves = [curve for run in pair if (curve := run.loss_curve()) is not None]
    steps = np.intersect1d(curves[0][0], curves[1][0]) if len(curves) == 2 else np.zeros(0)
    last = steps[-1] if steps.size else None
    per_step = all((run.traffic or {}).get("steps") for run in pair)
    per = " per step" if per_step else ""
    units: dict[str, tuple[str, Better]] = {
        "quality/train_loss": ("nats per token, last step", "equal"),
        "quality/eval_loss": ("nats per token, held out", "equal"),
        "traffic/cross_node_bytes": (f"bytes{per}, all directions", "lower"),
        "traffic/cross_node_frac": ("share of all bytes", "lower"),
        "traffic/dispatch_cross_node_bytes": (f"bytes{per}, dispatch", "lower"),
        "traffic/cross_node_messages": (f"messages{per}, all directions", "lower"),
        "load/balancedness": ("mean / max rows per rank", "higher"),
        "time/step_us": (f"µs, median after {WARM_UP_STEPS} steps", "lower"),
        "time/eval_s": ("s, one evaluation, not repeated", "lower"),
    }
    measured = [_measures(run, last, per_step=per_step) for run in pair]
    rows = []
    for metric, (unit, better) in units.items():
        if all(metric in found for found in measured):
            values = tuple(known(found[metric]) for found in measured)
            rows.append(Row(metric=metric, unit=unit, how="measured", values=values, better=better))
    return rows


def _measures(run: Run, last_step: int | None, *, per_step: bool) -> dict[str, float]:
    """Metric -> value; those that a run has."""
    found: dict[str, float] = {}
    curve = run.loss_curve()
    if curve is not None and last_step is not None:
        found["quality/train_loss"] = float(curve[1][curve[0] == last_step][-1])
    if run.evaluation and "loss" in run.evaluation:
        found["quality/eval_loss"] = float(run.evaluation["loss"].mean())
    traffic = run.traffic or {}
    steps = traffic["steps"] if per_step else 1
    if links := traffic.get("by_link"):
        total = {link: sum(kind[link] for kind in links.values()) for link in LINKS}
        found["traffic/cross_node_bytes"] = total["cross_node"] / steps
        found["traffic/cross_node_frac"] = total["cross_node"] / max(sum(total.values()), 1)
        found["traffic/dispatch_cross_node_bytes"] = links["dispatch"]["cross_node"] / steps
    if messages := traffic.get("messages_by_link"):
        counts = [kind["cross_node"] for name, kind in messages.items() if name != "routing"]
        found["traffic/cross_node_messages"] = sum(counts) / steps
    # A report of an older version has the rows that each rank received instead of its load: the
    # same where rows go straight to their experts.
    matrix = _dispatched(run, "rows")
    load = traffic.get("load") or ([] if matrix is None else matrix.sum(axis=0))
    rows = np.asarray(load, dtype=np.float64)
    if rows.sum() > 0:
        found["load/balancedness"] = float(rows.mean() / rows.max())
    times, warm = [], 0
    for line in run.steps:  # a line may stand for several steps
        if "step_s" in line:
            times += [line["step_s"]] if warm >= WARM_UP_STEPS else []
            warm += line.get("steps", 1)
    if times:
        found["time/step_us"] = statistics.median(times) * 1e6
    if run.summary.get("eval_s") is not None:
        found["time/eval_s"] = run.summary["eval_s"]
    return found


def _dispatched(run: Run, unit: str) -> np.ndarray | None:
    """[G, G] rows or bytes of the dispatch from rank to rank, or None."""
    matrix = ((run.traffic or {}).get(unit) or {}).get("dispatch")
    return None if matrix is None else np.asarray(matrix, dtype=np.float64)


def _figures_of_runs(runs: dict[str, Run], nodes: tuple[int, ...] | None) -> list[FigureData]:
    figures: list[FigureData] = []
    first, second = runs
    seed = runs[first].summary.get("seed")
    bytes_of, rows_of = (
        [m for run in runs.values() if (m := _dispatched(run, unit)) is not None]
        for unit in ("bytes", "rows")
    )
    if nodes is not None and len(bytes_of) == 2 and all(len(m) == len(nodes) for m in bytes_of):
        rows = sum(int(count.sum()) for count in rows_of)
        before, after = (matrix / 1e6 for matrix in bytes_of)
        figures.append(
            TrafficData(
                before=before,
                after=after,
                node_of=nodes,
                names=(first, second),
                axis="rank",
                unit="MB",
                title="Dispatched bytes between ranks",
                basis=Basis(how="measured", count=rows, unit="routed rows in both", seed=seed),
            )
        )
    found = {name: c for name, run in runs.items() if (c := run.loss_curve()) is not None}
    if found:
        count = sum(len(steps) for steps, _ in found.values())
        basis = Basis(how="measured", count=count, unit="steps", seed=seed)
        figures.append(LossData(runs=found, basis=basis))
    return figures


def _domain_tables(runs: dict[str, Run]) -> tuple[Table, ...]:
    """Held-out loss by domain, where both runs have it."""
    first, second = (run.summary.get("eval_loss_by_domain") or {} for run in runs.values())
    rows = tuple((domain, first[domain], second[domain]) for domain in first if domain in second)
    table = Table(title="Held-out loss by domain", columns=("domain", *runs), rows=rows)
    return (table,) if rows else ()


def track_comparison(
    tracker: Tracker, comparison: Comparison, *, files: Iterable[str | Path] = ()
) -> None:
    """Log a comparison: its rows and tables, each value as a scalar, its figures as images, and
    ``files`` as artifacts: plans (``*.json``) of kind "plan", pages "report", the rest "data"."""
    if not tracker.active:
        return
    table = comparison.table()
    tracker.log_table("comparison/rows", table.columns, table.rows)
    for extra in comparison.tables:
        tracker.log_table(f"comparison/{_key(extra.title)}", extra.columns, extra.rows)
    for figure in comparison.figures:
        key, picture = f"figures/{_key(figure.title)}", png_bytes(draw(figure))
        tracker.log_image(key, picture, caption=figure.basis.sentence())
    scalars = {}
    for row in comparison.rows:
        content = row.to_dict(comparison.names)
        for name in ("baseline", "ours", "ratio"):
            scalars[f"comparison/{row.metric}/{name}"] = content[name]
    tracker.log({key: value for key, value in scalars.items() if value is not None})
    kinds = {".json": "plan", ".html": "report"}
    for path in map(Path, files):
        tracker.log_artifact(_key(path.stem), kinds.get(path.suffix, "data"), [path])


def _key(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
