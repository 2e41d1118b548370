"""What goes wrong around a recorder: killed processes, full disks, slow writers, forks, exits."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_locality.errors import TraceError
from moe_locality.trace import parquet, read_trace
from moe_locality.trace.recorder import RoutingRecorder, annotate, attach, core, writer
from moe_locality.trace.recorder.writer import Ring, RingFull
from tests.recorder_models import MoeModel, inputs

ROOT = Path(__file__).parents[3]


def record(directory, forwards=10**9, write_shard=parquet.write_shard):
    """Record one request of 16 tokens after the other."""
    parquet.write_shard = write_shard
    model = MoeModel(num_layers=2).eval()
    attach(model, directory, shard_tokens=64, strict=True, rank=0)
    with torch.no_grad():
        for request in range(forwards):
            with annotate(request_ids=[request]):
                model(inputs(batch=1, length=16, seed=request))


def in_place(trace, directory, rank, sequence):
    """Write a shard under its own name, as a careless writer would; never end the second one."""
    whole = directory / "whole"
    parquet.pq.write_table(parquet.to_table(trace, rank), whole)
    content = whole.read_bytes()
    whole.unlink()
    shard = directory / parquet.shard_name(rank or 0, sequence)
    shard.write_bytes(content[: -256 * sequence or None])
    if sequence:
        time.sleep(600)  # it is killed here
    return sequence, sequence + 1


def kill_after_shards(directory, count, **options):
    """Record in a child, kill it -9 once ``count`` shards are there, and return their number."""
    process = multiprocessing.get_context("fork").Process(
        target=record, args=(directory,), kwargs=options, daemon=True
    )
    process.start()
    deadline = time.monotonic() + 60
    while len(list(directory.glob("part-*.parquet"))) < count:
        assert process.is_alive(), "the recording child died"
        assert time.monotonic() < deadline, "no shard appeared"
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return len(list(directory.glob("part-*.parquet")))


@pytest.mark.parametrize("count", [1, 4])
def test_kill_9_loses_at_most_the_shard_being_filled(tmp_path, count):
    found = kill_after_shards(tmp_path, count)
    trace = read_trace(tmp_path)  # strict: a damaged shard would be an error
    tokens = trace.request_id * 16 + trace.position
    assert np.array_equal(np.sort(tokens), np.arange(64 * found))  # no hole, nothing twice


def test_the_kill_test_sees_shards_that_are_written_in_place(tmp_path):
    kill_after_shards(tmp_path, 2, write_shard=in_place)
    with pytest.raises(TraceError, match=r"part-00000-00001\.parquet"):
        read_trace(tmp_path)


def test_a_program_that_ends_without_close_keeps_everything(tmp_path):
    code = f"from {__name__} import record; import sys; record(sys.argv[1], forwards=5)"
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    assert read_trace(tmp_path).num_tokens == 80


def test_two_runs_into_one_directory_do_not_share_request_numbers(tmp_path):
    model = MoeModel(num_layers=1)
    for _ in range(2):
        with attach(model, tmp_path, strict=True):
            model(inputs())
    trace = read_trace(tmp_path)
    assert (trace.num_tokens, len(trace.request_ids)) == (20, 4)


def test_an_unwritable_directory_is_found_before_anything_runs(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(TraceError, match=r"cannot be made .* expected a directory"):
        RoutingRecorder(blocked / "trace")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        user = os.geteuid()
        try:
            if user == 0:  # root may write everywhere
                os.seteuid(65534)
            with pytest.raises(TraceError, match="expected a writable directory"):
                RoutingRecorder(folder)
        finally:
            os.seteuid(user)
            os.chmod(folder, 0o700)


def break_the_disk(monkeypatch):
    def full(*_args):
        raise TraceError("found that a shard cannot be written (No space left on device)")

    monkeypatch.setattr(parquet, "write_shard", full)


def test_a_full_disk_stops_the_recording_and_not_the_training(tmp_path, monkeypatch, caplog):
    break_the_disk(monkeypatch)
    model = MoeModel(num_layers=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = attach(model, tmp_path, shard_tokens=10, ring_tokens=20)
    with caplog.at_level(logging.ERROR):
        for seed in range(40):  # many times the ring: nothing may wait for a writer that has failed
            model(inputs(seed=seed)).square().mean().backward()
            optimizer.step()
        report = recorder.close()
    assert (report.recorded_tokens, report.shards) == (0, 0)
    assert report.dropped_tokens >= 10
    assert "No space left on device" in report.failure
    assert sum("the model goes on" in r.message for r in caplog.records) == 1
    assert sum("trace in" in r.message and "incomplete" in r.message for r in caplog.records) == 1


class SlowLog(logging.Handler):
    """Keeps the thread that logs until ``go_on`` is set."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.entered, self.go_on = threading.Event(), threading.Event()

    def emit(self, _record):
        self.entered.set()
        self.go_on.wait(60)


def test_a_full_disk_raises_where_strict(tmp_path, monkeypatch):
    break_the_disk(monkeypatch)
    model = MoeModel(num_layers=1)
    recorder = attach(model, tmp_path, shard_tokens=10, strict=True)
    log = SlowLog()
    monkeypatch.setattr(core.logger, "handlers", [log])
    model(inputs())
    assert log.entered.wait(60)  # the writer has failed, and is still telling the log
    assert recorder.report().failure
    with pytest.raises(TraceError, match=r"recording stopped: .*No space left"):
        model(inputs())
    log.go_on.set()
    with pytest.raises(TraceError, match=r"recording stopped: .*No space left"):
        recorder.close()


@pytest.fixture
def disk(monkeypatch):
    """An event: no shard is written before it is set."""
    write, free = parquet.write_shard, threading.Event()

    def slow(*args):
        assert free.wait(60)
        return write(*args)

    monkeypatch.setattr(parquet, "write_shard", slow)
    yield free
    free.set()


def test_a_slow_disk_is_waited_for(tmp_path, disk):
    model = MoeModel(num_layers=1)
    threading.Timer(0.5, disk.set).start()
    with attach(model, tmp_path, shard_tokens=10, ring_tokens=20, strict=True) as recorder:
        for seed in range(12):
            model(inputs(seed=seed))
    assert recorder.report().recorded_tokens == 120


@pytest.mark.parametrize("bound", ["ring", "queue"])
def test_a_slow_disk_costs_tokens_and_not_time_where_asked(
    tmp_path, caplog, monkeypatch, disk, bound
):
    monkeypatch.setattr(writer, "QUEUED_BLOCKS", 1 if bound == "queue" else 1024)
    model = MoeModel(num_layers=1)
    ring_tokens = 20 if bound == "ring" else 10_000
    recorder = attach(model, tmp_path, shard_tokens=10, ring_tokens=ring_tokens, max_wait_s=0.0)
    for seed in range(30):
        model(inputs(seed=seed))
    disk.set()
    recorder.flush()  # the writer catches up, and recording goes on
    model(inputs(seed=30))
    report = recorder.close()
    assert report.recorded_tokens + report.dropped_tokens == 310
    assert report.dropped_tokens == 10 * report.skipped_forwards > 0
    assert report.failure is None
    assert caplog.text.count("found the writer behind") == 1
    trace = read_trace(tmp_path)
    assert trace.num_tokens == report.recorded_tokens
    assert 30 in trace.step
    expected = attach(model, tmp_path / "all", strict=True)
    for seed in range(31):
        model(inputs(seed=seed))
    expected.close()
    whole = read_trace(tmp_path / "all")
    for step in np.unique(trace.step):  # what is there is right
        rows, reference = trace.take(trace.step == step), whole.take(whole.step == step)
        assert np.array_equal(rows.expert_ids, reference.expert_ids)


def test_forward_passes_larger_than_the_ring_enlarge_it(tmp_path):
    model = MoeModel()
    with attach(model, tmp_path, ring_tokens=4, strict=True, shard_tokens=7) as recorder:
        for length in (1, 3, 50, 2, 200):
            model(inputs(batch=1, length=length))
    assert recorder.report().recorded_tokens == 256
    assert (read_trace(tmp_path).expert_ids >= 0).all()


def test_a_forked_child_does_not_record(tmp_path):
    model = MoeModel()
    recorder = attach(model, tmp_path, strict=True)
    model(inputs())
    child = os.fork()
    if not child:
        model(inputs())
        recorder.step()
        os._exit(0 if recorder.close().recorded_tokens == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    model(inputs())
    assert recorder.close().recorded_tokens == 20
    assert read_trace(tmp_path).num_tokens == 20


def test_an_unknown_gate_output_stops_the_recording_with_its_shapes(tmp_path):
    model = MoeModel(num_layers=1)
    recorder = attach(model, tmp_path)
    recorder._on_routes((0,), model.blocks[0], lambda _weights: 1 / 0)
    model(inputs())
    assert recorder.close().failure == "division by zero"


def test_the_ring_gives_regions_in_order_and_waits_for_room():
    ring = Ring(10, torch.device("cpu"), weights=True)
    first, second = ring.reserve(4, 0), ring.reserve(4, 0)
    with pytest.raises(RingFull):
        ring.reserve(4, 0.01)
    ring.release(first + 4)
    third = ring.reserve(4, 0)
    assert (first, second, third) == (0, 4, 10)  # no region wraps
    ids = torch.arange(4, dtype=torch.int32).view(2, 2)
    ring.fill(third, ids.t(), torch.full((2, 2), 0.5))
    assert ring.send(third, third + 4) is None
    got, weights = ring.read(third, 4)
    assert (got.tolist(), weights.tolist()) == ([0, 2, 1, 3], [0.5] * 4)
    ring.rewind(third)
    ring.release(second + 4)
    assert ring.reserve(4, 0) == 10
    assert not ring.wait_empty(0.0)
    ring.release(14)
    assert ring.wait_empty(0.0)


def test_the_ring_is_on_the_host_whatever_the_default_device_is():
    with torch.device("meta"):
        ring = Ring(10, torch.device("cpu"), weights=True)
    assert ring.reserve(4, 1.0) == 0
