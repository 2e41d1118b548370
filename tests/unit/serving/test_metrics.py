"""The numbers of an engine: scraped over HTTP while it runs, in its file, and in an offline run of
wandb; all equal to what the engine did.
"""

import json
import math
import re
import shutil
import socket
import struct
import threading
import time
import urllib.error
import urllib.request

import pytest

from moe_locality.errors import ConfigError
from tests.unit.serving.test_engine import engine_of, model, prompts  # noqa: F401
from tests.unit.test_tracking import ReadBack, offline  # noqa: F401

pytest.importorskip("transformers")
serving = pytest.importorskip("moe_locality.serving", reason="transformers before 5.23")

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"')
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "summary": ("", "_sum", "_count")}


def parse(text):
    """Read the text format 0.0.4 of Prometheus, strictly: {name: {labels: value}}."""
    assert text.endswith("\n")
    kinds, helped, samples, family = {}, set(), {}, None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = re.fullmatch(rf"# HELP ({NAME}) (?:[^\\]|\\\\|\\n)+", line)[1]
            assert family not in helped, "a family in two places"
            helped.add(family)
        elif line.startswith("# TYPE "):
            found = re.fullmatch(rf"# TYPE ({NAME}) (counter|gauge|histogram|summary)", line)
            assert found[1] == family
            assert family not in kinds
            kinds[family] = found[2]
        else:
            name, given, value = re.fullmatch(rf"({NAME})(?:{{(.*)}})? (\S+)", line).groups()
            allowed = [family + end for end in SUFFIXES.get(kinds[family], ("",))]
            assert name in allowed, (name, kinds[family])
            labels = LABEL.findall(given or "")
            assert ",".join(f'{k}="{v}"' for k, v in labels) == given
            assert len(dict(labels)) == len(labels)
            key = frozenset(labels)
            assert key not in samples.setdefault(name, {}), "a sample twice"
            samples[name][key] = float(value)
            assert kinds[family] != "counter" or samples[name][key] >= 0
    for family, kind in kinds.items():
        if kind == "histogram":
            _check_histogram(samples, family)
    return samples


def _check_histogram(samples, family):
    bounds = {float(dict(key)["le"]): value for key, value in samples[f"{family}_bucket"].items()}
    counts = [bounds[bound] for bound in sorted(bounds)]
    assert counts == sorted(counts)
    (count,) = samples[f"{family}_count"].values()
    assert bounds[math.inf] == count


def scrape(port, path="/metrics"):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=60) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return parse(answer.read().decode())


def value(samples, name, **labels):
    found = [
        number
        for key, number in samples[f"moe_locality:{name}"].items()
        if labels.items() <= dict(key).items()
    ]
    return sum(found)


def hang_up(port):
    """Begin a request, break the connection off, and wait until the server has seen it."""
    with socket.create_connection(("127.0.0.1", port)) as scraper:
        scraper.sendall(b"GET /metrics HTTP/1.1\r\n")
        scraper.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    scrape(port)  # its connection is taken after that one
    while any("process_request" in thread.name for thread in threading.enumerate()):
        time.sleep(0.01)


def test_metrics_are_what_the_engine_did(model, offline, tmp_path, capfd):  # noqa: F811
    """[F17.6] Over HTTP while it runs and at its end, in the file and in wandb."""
    from moe_locality.tracking import start_tracking

    odd = 'a "b"\\\n'
    metrics, early = serving.Metrics(model=odd), []
    port = metrics.listen(0)
    metrics._began -= 1e6  # a model that takes long to load
    metrics.write_to(tmp_path / "metrics-0.jsonl")
    tracker = start_tracking(offline, step_metric="step")
    metrics.track(tracker)
    steps = []

    def on_step(counts):
        metrics.on_step(counts)
        steps.append(counts)
        if counts["step"] == 20:
            early.append(scrape(port))

    engine = engine_of(model, on_step=on_step)
    requests = [
        {"prompt_token_ids": ids, "temperature": 0, "max_tokens": 1 + i % 9, "ignore_eos": True}
        for i, ids in enumerate(prompts(20, seed=2))
    ]
    outputs = list(engine.generate([*requests, {"prompt_token_ids": []}]))
    found = scrape(port)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        scrape(port, "/other")
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
        serving.Metrics().listen(port)
    hang_up(port)
    engine.add_request({"prompt_token_ids": []})  # after the last step
    metrics.close(engine)
    metrics.close(engine)
    assert "Error" not in capfd.readouterr().err
    with pytest.raises(urllib.error.URLError):
        scrape(port)

    read = sum(len(request["prompt_token_ids"]) for request in requests)
    new = sum(len(c.token_ids) for output in outputs for c in output.outputs)
    labels = dict(next(iter(found["moe_locality:prompt_tokens_total"])))
    assert labels == {"engine": "0", "model_name": 'a \\"b\\"\\\\\\n'}
    assert value(found, "prompt_tokens_total") == read
    assert value(found, "generation_tokens_total") == new
    assert value(found, "request_success_total", finished_reason="length") == 20
    assert value(found, "requests_refused_total") == 1
    assert value(found, "num_requests_running") == value(found, "num_requests_waiting") == 0
    assert value(found, "time_to_first_token_seconds_count") == 20
    assert value(found, "request_queue_time_seconds_count") == 20
    assert value(found, "e2e_request_latency_seconds_count") == 20
    assert value(found, "inter_token_latency_seconds_count") == new - 20
    done = sum(output.seconds["finished"] for output in outputs if not output.error)
    assert value(found, "e2e_request_latency_seconds_sum") == pytest.approx(done)
    for kind in ("prefill", "decode"):
        mine = [step for step in steps if step["kind"] == kind]
        assert value(found, "steps_total", kind=kind) == len(mine) > 0
        spent = sum(step["seconds"]["model"] for step in mine)
        assert value(found, "step_seconds_total", kind=kind, stage="model") == pytest.approx(spent)
    distinct = [step["distinct"] for step in steps if step["distinct"] is not None]
    assert value(found, "distinct_experts_count") == len(distinct)
    assert value(found, "distinct_experts_sum") == pytest.approx(sum(distinct))
    assert value(early[0], "steps_total") == 20
    assert 0 < value(early[0], "num_requests_running") <= 3
    assert 0 < value(early[0], "kv_cache_usage_perc") <= 1

    again = serving.Metrics()  # a job that finds nothing left to do
    again.write_to(tmp_path / "metrics-0.jsonl")
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics-0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[:-1]] == list(range(16, len(steps) + 1, 16))
    assert lines[-1]["values"]["generation_tokens_total"][""] == new
    assert lines[-1]["values"]["requests_refused_total"][""] == 2
    shutil.copy(tmp_path / "metrics-0.jsonl", tmp_path / "metrics-1.jsonl")  # of an earlier job
    assert serving.metrics.read_metrics(tmp_path) == [lines]
    assert all(line["seconds"] < 1e6 for line in lines)
    picks = {stage: sum(map(sum, counts)) for stage, counts in lines[-1]["picked"].items()}
    assert picks == {"prefill": 2 * read * 2, "decode": 2 * (new - 20) * 2}  # layers x top_k
    run = ReadBack(tracker.directory)
    assert [row["step"] for row in run.history()] == [line["step"] for line in lines[:-1]]
