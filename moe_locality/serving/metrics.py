"""What the engine of a rank does, as numbers: for Prometheus, for a file, for wandb.

``Engine(on_step=metrics.on_step)`` feeds them; they have the names of vLLM, where it has one, with
our prefix. ``moe-locality report`` reads the file.
"""

import bisect
import contextlib
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_locality.dispatch.transport import LINKS
from moe_locality.errors import ConfigError
from moe_locality.figures import Basis, LoadData, LossData, Table
from moe_locality.report import Headline, ReportData
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.tracking import Tracker, package_versions

if TYPE_CHECKING:
    from moe_locality.serving.engine import Engine

PREFIX = "moe_locality:"
EVERY = 16  # steps between two lines of the file, and two calls of wandb
# name: type, help and the labels of its samples
METRICS = {
    "num_requests_running": ("gauge", "Sequences that are continued in a step."),
    "num_requests_waiting": ("gauge", "Requests that wait to be read."),
    "num_requests_ready": ("gauge", "Requests that were read and wait for a row."),
    "kv_cache_usage_perc": ("gauge", "Share of the room for caches that is reserved, 0 to 1."),
    "prompt_tokens_total": ("counter", "Tokens of prompts that were read."),
    "generation_tokens_total": ("counter", "New tokens."),
    "request_success_total": ("counter", "Continuations that ended.", "finished_reason"),
    "requests_refused_total": ("counter", "Requests that came back with an error."),
    "time_to_first_token_seconds": ("histogram", "From the arrival of a request."),
    "inter_token_latency_seconds": ("histogram", "Between two tokens of a sequence."),
    "request_queue_time_seconds": ("histogram", "Until the first token of a prompt is read."),
    "e2e_request_latency_seconds": ("histogram", "From the arrival of a request to its end."),
    "steps_total": ("counter", "Steps, by what this rank did in them.", "kind"),
    "step_seconds_total": ("counter", "Time of the stages of steps.", "kind", "stage"),
    "exchange_bytes_total": ("counter", "Bytes that this rank sent in the exchange.", "link"),
    "exchange_rows_total": ("counter", "Rows that this rank sent in the exchange.", "link"),
    "handover_bytes_total": ("counter", "Bytes of requests sent to their homes.", "link"),
    "handover_requests_total": ("counter", "Requests sent to their homes."),
    "control_bytes_total": ("counter", "Bytes of the counts that the ranks tell each other."),
    "expert_rows_total": ("counter", "Rows that the experts of a rank worked on.", "rank"),
    "node_imbalance": ("gauge", "Load of the busiest node / mean, over the last steps."),
    "distinct_experts": ("summary", "Experts of a layer that a decode step of this rank picked."),
    "home_requests": ("gauge", "Requests that a rank has.", "rank"),
    "watch_decisions_total": ("counter", "Decisions on another plan.", "end"),
    "watch_drift_bits": ("gauge", "Divergence of the loads from those of the plan.", "stage"),
}
LATENCIES = {
    "first_token": "time_to_first_token_seconds",
    "between_tokens": "inter_token_latency_seconds",
    "queued": "request_queue_time_seconds",
    "finished": "e2e_request_latency_seconds",
}
# upper bounds of the histograms in seconds, 1 ms to 500 s
BUCKETS = tuple(m * 10.0**e for e in range(-3, 3) for m in (1, 2.5, 5))


class Metrics:
    """The numbers of one rank. ``values``: ``{name: {labels: value}}``, labels joined by commas;
    ``rank``: label ``engine`` of all its samples; ``model``: label ``model_name``; ``topology``:
    for the imbalance of nodes, None: every rank is one.
    """

    def __init__(
        self, rank: int = 0, *, model: str = "", topology: ClusterTopology | None = None
    ) -> None:
        self.rank, self.model, self.topology = rank, model, topology
        self.values: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.histograms = {name: [0] * (len(BUCKETS) + 1) for name in LATENCIES.values()}
        self.decisions: list[dict[str, Any]] = []
        self._lock, self._began = threading.Lock(), time.monotonic()
        self._server: ThreadingHTTPServer | None = None
        self._path: Path | None = None
        self._file, self._tracker = None, Tracker()
        self._window: dict[str, Any] = {}

    # -- in

    def on_step(self, counts: dict[str, Any]) -> None:
        """Add the counts of a step: :meth:`moe_locality.serving.Engine.step_counts`."""
        with self._lock:
            self._add(counts)
        for key in ("load", "cross_bytes", "new_tokens"):
            self._window[key] = self._window.get(key, 0) + np.array(counts["ranks"][key])
        if counts["step"] % EVERY == 0:
            self._tell(counts["step"])

    def _add(self, counts: dict[str, Any]) -> None:
        kind, values = counts["kind"], self.values
        for name in ("running", "waiting", "ready"):
            values[f"num_requests_{name}"][""] = counts[name]
        values["kv_cache_usage_perc"][""] = counts["kv_tokens"] / counts["kv_room"]
        values["steps_total"][kind] += 1
        for stage, seconds in counts["seconds"].items():
            values["step_seconds_total"][f"{kind},{stage}"] += seconds
        values["prompt_tokens_total"][""] += counts["tokens"] if kind == "prefill" else 0
        values["generation_tokens_total"][""] += counts["new_tokens"]
        values["requests_refused_total"][""] = counts["refused"]
        for reason, number in counts["ended"].items():
            values["request_success_total"][reason] += number
        for what in ("bytes", "rows"):
            for links in counts[what].values():
                for link, number in zip(LINKS, links, strict=True):
                    values[f"exchange_{what}_total"][link] += number
        values["handover_bytes_total"].update(zip(LINKS, counts["handover_bytes"], strict=True))
        values["handover_requests_total"][""] = counts["moved"]
        values["control_bytes_total"][""] = counts["control_bytes"]
        for rank, load in enumerate(counts["ranks"]["load"]):
            values["expert_rows_total"][str(rank)] += load
            values["home_requests"][str(rank)] = counts["ranks"]["held"][rank]
        if counts["distinct"] is not None:
            values["distinct_experts"]["sum"] += counts["distinct"]
            values["distinct_experts"]["count"] += 1
        for name, seconds in counts["latencies"].items():
            values[LATENCIES[name]]["sum"] += sum(seconds)
            for value in seconds:
                self.histograms[LATENCIES[name]][bisect.bisect_left(BUCKETS, value)] += 1
        decision = counts["watch"]
        if decision is not None:
            self.decisions.append(decision)
            end = "applied" if decision["applied"] else "proposed"
            values["watch_decisions_total"][end if decision["proposed"] else "none"] += 1
            values["watch_drift_bits"].update(decision["drift_bits"])

    # -- out

    def text(self) -> str:
        """Return all samples in the text format of Prometheus, version 0.0.4."""
        own = {"engine": str(self.rank), "model_name": self.model}
        with self._lock:
            lines = [line for name in METRICS for line in self._samples(name, own)]
        return "\n".join(lines) + "\n"

    def _samples(self, name: str, own: Mapping[str, str]) -> Iterator[str]:
        kind, words, *names = METRICS[name]
        full, found = PREFIX + name, self.values.get(name, {})
        yield f"# HELP {full} {words}"
        yield f"# TYPE {full} {kind}"
        if kind == "histogram":
            below, bounds = 0, (*(f"{bound:g}" for bound in BUCKETS), "+Inf")
            for bound, count in zip(bounds, self.histograms[name], strict=True):
                below += count
                yield f"{full}_bucket{_labels({**own, 'le': bound})} {below}"
            yield f"{full}_sum{_labels(own)} {float(found.get('sum', 0))!r}"
            yield f"{full}_count{_labels(own)} {below}"
            return
        for given, value in sorted(found.items()):
            told = dict(zip(names, given.split(","), strict=False))
            suffix = f"_{given}" if kind == "summary" else ""
            yield f"{full}{suffix}{_labels({**own, **told})} {float(value)!r}"

    def listen(self, port: int, host: str = "127.0.0.1") -> int:
        """Serve ``/metrics`` from a thread; return the port (0: any). ConfigError: it is taken."""
        try:
            self._server = ThreadingHTTPServer((host, port), _handler(self))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"found no way to listen on {host}:{port} for metrics ({error}), expected a free "
                "port: give another one as metrics_port"
            ) from error
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self._server.server_address[1]

    def write_to(self, path: str | Path) -> None:
        """Write a line of JSON every few steps: ``step``, ``seconds`` from now, ``values``."""
        self._began = time.monotonic()  # a model may have been loaded since this was made
        self._path = Path(path)
        self._path.open("a").close()  # to fail now; a run without a step leaves what is there

    def track(self, tracker: Tracker) -> None:
        """Log what all ranks did, every few steps, as ``serving/...``, ``traffic/...``, ..."""
        self._tracker = tracker

    def _tell(self, step: int) -> None:
        now = time.monotonic()
        window, self._window = self._window, {"at": now}
        load = np.asarray(window.get("load", [0]), dtype=np.float64)
        if self.topology is not None and len(load) == self.topology.num_ranks:
            load = np.bincount(self.topology.rank_to_node, weights=load)
        imbalance = float(load.max() / load.mean()) if load.any() else 1.0
        with self._lock:
            self.values["node_imbalance"][""] = imbalance
        self._write({"step": step, "seconds": now - self._began, "values": self.values})
        seconds, values = now - window.get("at", self._began), self.values
        self._tracker.log(
            {
                "load/node_imbalance": imbalance,
                "traffic/cross_node_bytes": float(np.sum(window["cross_bytes"])),
                "serving/tokens_per_s": float(np.sum(window["new_tokens"])) / seconds,
                "serving/running": values["num_requests_running"][""],
                "serving/waiting": values["num_requests_waiting"][""],
                "serving/requests": sum(values["home_requests"].values()),
                "time/step_us": 1e6 * seconds / EVERY,
            },
            step=step,
        )

    def _write(self, line: dict[str, Any]) -> None:
        if self._path is not None:
            self._file = self._file or self._path.open("w", encoding="utf-8")
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self, engine: "Engine | None" = None) -> None:
        """Write a last line, with latencies, decisions and how often each expert was picked
        (``{stage: [L, E]}``) in the ``engine``, and end what listens and tracks.
        """
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        if engine is not None:  # some are refused after the last step
            self.values["requests_refused_total"][""] = engine.refused
        if self.values.get("steps_total"):
            picked = {} if engine is None else engine.picked
            last = {"seconds": time.monotonic() - self._began, "values": self.values}
            last |= {"latencies": self.histograms, "decisions": self.decisions}
            last["picked"] = {stage: counts.tolist() for stage, counts in picked.items()}
            self._write(last)
        if self._file is not None:
            self._file.close()
        self._tracker.finish()
        self._server = self._file = self._path = None
        self._tracker = Tracker()


# -- the report of a run


def read_metrics(folder: Path) -> list[list[dict[str, Any]]]:
    """Return the lines of each rank's ``metrics-R.jsonl``; one that was cut off is left out, and so
    are files of ranks that the last job did not have. ConfigError: a file without such lines.
    """
    found = []
    for path in sorted(folder.glob("metrics-*.jsonl"), key=lambda one: (len(one.name), one.name)):
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        try:
            read = [json.loads(line) for line in lines]
            if not all(line["values"]["steps_total"] for line in read) or not read:
                raise ValueError("no steps")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"found no metrics in {path} ({error!r}), expected what `moe-locality serve "
                "--metrics` writes: give another directory, or serve longer"
            ) from error
        found.append(read)
        if len(found) == len(read[-1]["values"]["home_requests"]):  # of all ranks of the job
            break
    return found


def serving_report(folder: Path, *, command: str = "") -> ReportData:
    """Return the report of a run of ``moe-locality serve --metrics``; ``folder``: its results."""
    ranks = read_metrics(folder)
    last = [lines[-1] for lines in ranks]
    total = {name: _summed(last, name) for name in last[0]["values"]}
    seconds = max(line["seconds"] for line in last)
    new = total["generation_tokens_total"].get("", 0.0)
    across = total.get("exchange_bytes_total", {}).get("cross_node", 0.0)
    levels = [line["values"]["node_imbalance"][""] for line in ranks[0][:-1]] or [1.0]
    steps = int(sum(last[0]["values"]["steps_total"].values()))
    basis = Basis(how="measured", count=steps, unit="steps")
    short = [rank for rank, line in enumerate(last) if "picked" not in line]
    words = f"Ranks {short} were cut off: what they did last is missing." if short else ""
    times = sorted(total["step_seconds_total"].items())
    told = ("step", "applied", "moved_slots", "copies_before", "copies_after", "reason")
    rows = tuple((*name.split(","), value) for name, value in times)
    columns = ("kind", "stage", "seconds")
    tables = [Table(title="Time of the steps, all ranks", columns=columns, rows=rows)]
    if last[0].get("decisions"):
        rows = tuple(tuple(one[key] for key in told) for one in last[0]["decisions"])
        tables.append(Table(title="Decisions of the watch", columns=told, rows=rows))
    return ReportData(
        title="A run of the serving engine",
        facts=(("directory", str(folder)), ("ranks", str(len(ranks)))),
        summary=(f"{new:,.0f} new tokens in {seconds:.1f} s.", words),
        headlines=(
            Headline(label="new tokens per second", value=f"{new / seconds:,.1f}"),
            Headline(label="bytes across nodes per new token", value=f"{across / (new or 1):,.0f}"),
            Headline(label="busiest node / mean", value=f"{np.mean(levels):.3f}"),
        ),
        figures=(*_load_figure(last, basis), *_step_figures(ranks, basis), *_latency(last, basis)),
        tables=tuple(tables),
        versions=package_versions(),
        command=command,
    )


def _summed(lines: list[dict[str, Any]], name: str) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for line in lines:
        for key, value in line["values"].get(name, {}).items():
            found[key] += value
    return found


def _load_figure(last: list[dict[str, Any]], basis: Basis) -> list[LoadData]:
    stages = ("prefill", "decode")
    known = [line["picked"] for line in last if set(line.get("picked", ())) == set(stages)]
    if not known:
        return []
    load = np.array([np.sum([one[stage] for one in known], axis=0) for stage in stages], float)
    layers = sorted({0, load.shape[1] // 2, load.shape[1] - 1})
    part = load[:, layers].transpose(1, 0, 2)  # [panels, 2, E]
    mean = part.mean(axis=2, keepdims=True)
    ratio = np.divide(part, mean, out=np.full(part.shape, np.nan), where=mean > 0)
    panels = tuple(f"MoE layer {layer}" for layer in layers)
    title = "Expert load of prefill against decode"
    return [LoadData(ratio=ratio, domains=stages, panels=panels, basis=basis, title=title)]


def _step_figures(ranks: list[list[dict[str, Any]]], basis: Basis) -> list[LossData]:
    """Means over the steps between two lines, sums over the ranks."""
    count = min(len([line for line in lines if "step" in line]) for lines in ranks)
    at = np.array([line["step"] for line in ranks[0][:count]])

    def per_step(name: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        sums = [_summed([lines[i] for lines in ranks], name)[key] for i in range(count)]
        return at, np.diff(sums, prepend=0.0) / np.diff(at, prepend=0)

    traffic = {
        "requests to their homes": per_step("handover_bytes_total", "cross_node"),
        "exchange": per_step("exchange_bytes_total", "cross_node"),
    }
    tokens = {
        "prompts (prefill)": per_step("prompt_tokens_total", ""),
        "new tokens (decode)": per_step("generation_tokens_total", ""),
    }
    return [
        LossData(runs=traffic, basis=basis, title="Traffic per step", y_label="bytes across nodes"),
        LossData(runs=tokens, basis=basis, title="Tokens per step", y_label="tokens"),
    ][: 2 if count else 0]


def _latency(last: list[dict[str, Any]], basis: Basis) -> list[LossData]:
    known, runs = [line for line in last if "latencies" in line], {}
    for name in LATENCIES.values() if known else ():
        counts = np.sum([line["latencies"][name] for line in known], axis=0)
        if counts.any():
            runs[name] = (np.array(BUCKETS), np.cumsum(counts)[:-1] / counts.sum())
    words: dict[str, Any] = {"x_label": "seconds", "y_label": "share up to there", "log_x": True}
    return [LossData(runs=runs, basis=basis, title="Latencies", **words)] if runs else []


# -- Prometheus


def _labels(labels: Mapping[str, str]) -> str:
    escapes = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
    return "{" + ",".join(f'{k}="{v.translate(escapes)}"' for k, v in labels.items()) + "}"


def _handler(metrics: Metrics) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, "expected /metrics")
                return
            body = metrics.text().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # a scraper that hangs up is no news either
                super().handle()

        def log_message(self, format: str, *args: Any) -> None:
            """Requests of a scraper are no news."""

    return Handler
