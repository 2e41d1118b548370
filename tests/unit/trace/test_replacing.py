"""A trace that replaces another: whoever reads finds one of the two, wherever the writing stops."""

import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from moe_locality.errors import TraceError
from moe_locality.trace import io, parquet, read_trace, read_trace_report, write_trace
from moe_locality.trace.importers import import_to
from moe_locality.trace.io import read_pieces
from tests.unit.trace.cases import make_trace

OLD, NEW, LATER = (make_trace(seed) for seed in range(3))
FILE_EVENTS = ("open", "os.", "shutil.", "tempfile.", "pathlib.")
_watch = threading.local()


def _hook(event, arguments):
    watcher = getattr(_watch, "call", None)
    if watcher is not None and event.startswith(FILE_EVENTS):
        watcher(event, arguments)


@pytest.fixture(scope="module", autouse=True)
def _audit():
    sys.addaudithook(_hook)


@contextmanager
def before_each_step(directory, act):
    """Call ``act(n)`` before the n-th file operation below ``directory``, counted from 1, and
    before every fsync."""
    count = 0

    def step(*_):
        nonlocal count
        count += 1
        _watch.call = None
        try:
            act(count)
        finally:
            _watch.call = watch

    def watch(event, arguments):
        if any(str(directory) in str(part) for part in arguments):
            step()

    real = os.fsync

    def fsync(handle):
        if getattr(_watch, "call", None) is not None:
            step()
        real(handle)

    os.fsync = fsync
    _watch.call = watch
    try:
        yield lambda: count
    finally:
        _watch.call = None
        os.fsync = real


def prepare(directory, old):
    if old:
        write_trace(OLD, directory, overwrite=True, shard_tokens=12)
    else:
        directory.mkdir()


def found(directory):
    """'old', 'new', 'later' or 'nothing'; anything else is a mix."""
    try:
        trace, problems = read_trace_report(directory, strict=True)
    except TraceError as error:
        if "found no part-" not in str(error):
            raise
        return "nothing"
    assert problems == []
    known = {"old": OLD, "new": NEW, "later": LATER}
    names = [name for name, one in known.items() if one.same_content(trace)]
    assert names, f"a mix of {trace.num_rows} rows"
    pieces = sum(piece.num_rows for piece in read_pieces(directory, max_bytes=1 << 30))
    assert pieces == trace.num_rows
    return names[0]


def by_trace(directory):
    write_trace(NEW, directory, overwrite=True, shard_tokens=20)


def by_import(directory):
    source = directory.parent / "new.npz"
    if not source.exists():
        write_trace(NEW, source)
    import_to(source, directory, overwrite=True)


WAYS = pytest.mark.parametrize(
    ("way", "old"), [(by_trace, True), (by_trace, False), (by_import, True)]
)


@WAYS
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_at_any_step_leaves_the_old_trace_or_the_new(tmp_path, way, old, error):
    """Stopped between its steps an overwrite left old and new shards side by side, which a [B2]
    strict reading returned as one trace; the trace is the old or the new one now."""
    before, seen, step = ("old" if old else "nothing"), [], 0
    while True:
        step += 1
        directory = tmp_path / f"{step}"
        prepare(directory, old)

        def fail(number, step=step):
            if number == step:
                raise error

        stopped = False
        with before_each_step(directory, fail) as count:
            try:
                way(directory)
            except (TraceError, OSError, KeyboardInterrupt):
                stopped = True
        if count() < step:
            break
        seen.append(found(directory))
        assert seen[-1] in (before, "new")
        assert stopped or seen[-1] == "new"
        write_trace(LATER, directory, overwrite=True, shard_tokens=40)
        assert found(directory) == "later"
        strange = [path.name for path in directory.iterdir() if not parquet.is_shard(path.name)]
        assert all(name.startswith(parquet.TMP_PREFIX) for name in strange)
    assert {before, "new"} == set(seen)
    assert len(seen) > 15


@WAYS
def test_who_reads_between_the_steps_finds_the_old_trace_or_the_new(tmp_path, way, old):
    """A reader in the middle of an overwrite got a part of one trace or rows of both. [B2]"""
    directory = tmp_path / "trace"
    prepare(directory, old)
    seen = []
    with before_each_step(directory, lambda _: seen.append(found(directory))):
        way(directory)
    seen.append(found(directory))
    assert [n for n, m in zip(seen, ["", *seen], strict=False) if n != m] == [
        "old" if old else "nothing",
        "new",
    ]
    assert all(parquet.is_shard(path.name) for path in directory.iterdir())


KILLED = """
import os, sys
from pathlib import Path
from tests.unit.trace import test_replacing as t

sys.addaudithook(t._hook)
way, old, folder = getattr(t, sys.argv[1]), sys.argv[2] == "True", Path(sys.argv[3])

def in_child(action, *args):
    child = os.fork()
    if not child:
        try:
            action(*args)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def write(directory, step):
    with t.before_each_step(directory, lambda n: os._exit(9) if n == step else None):
        way(directory)

def check(directory):
    print(t.found(directory), flush=True)
    t.write_trace(t.LATER, directory, overwrite=True, shard_tokens=40)
    assert t.found(directory) == "later"

step, code = 0, 9
while code == 9:
    step += 1
    directory = folder / f"{step}"
    assert in_child(t.prepare, directory, old) == 0
    code = in_child(write, directory, step)
    assert code in (0, 9), code
    assert in_child(check, directory) == 0
"""


@WAYS
def test_a_process_killed_at_any_step_leaves_the_old_trace_or_the_new(tmp_path, way, old):
    """The same for a process that ends at once, so that nothing is tidied up. [B2]"""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, way.__name__, str(old), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = done.stdout.split()
    before = "old" if old else "nothing"
    assert [n for n, m in zip(seen, ["", *seen], strict=False) if n != m] == [before, "new"]
    assert len(seen) > 15


def test_a_reader_that_is_overtaken_reads_again(tmp_path, monkeypatch):
    """A trace replaced between two shards of a reading gave rows of both. [B2]"""
    write_trace(OLD, tmp_path, shard_tokens=10)
    real, calls = io.read_shard, []

    def overtaken(path, layers):
        calls.append(path)
        if len(calls) == 3:
            write_trace(NEW, tmp_path, overwrite=True, shard_tokens=20)
        return real(path, layers)

    monkeypatch.setattr(io, "read_shard", overtaken)
    assert read_trace(tmp_path).same_content(NEW)
    assert len(calls) == 3 + 2

    def always(path, layers):
        write_trace((OLD, NEW)[len(calls) % 2], tmp_path, overwrite=True, shard_tokens=10)
        calls.append(path)
        return real(path, layers)

    monkeypatch.setattr(io, "read_shard", always)
    with pytest.raises(TraceError, match="replaced 5 times while it was being read"):
        read_trace(tmp_path)


def test_a_piecewise_reader_that_is_overtaken_says_so(tmp_path):
    """A reading in pieces cannot begin again: [B2]
    it was a mix, and is an error now."""
    write_trace(OLD, tmp_path, shard_tokens=10)
    pieces = read_pieces(tmp_path, max_bytes=1)
    next(pieces)
    write_trace(NEW, tmp_path, overwrite=True, shard_tokens=10)
    with pytest.raises(TraceError, match="was replaced while the trace was being read"):
        list(pieces)


def test_a_recorder_goes_on_in_a_directory_whose_overwrite_was_interrupted(tmp_path):
    """Shards that are recorded after an interrupted overwrite are read, and stay. [B2]"""
    write_trace(OLD, tmp_path, shard_tokens=12)

    def stop_while_tidying(number):
        if (tmp_path / parquet.MANIFEST).exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), before_each_step(tmp_path, stop_while_tidying):
        write_trace(NEW, tmp_path, overwrite=True, shard_tokens=20)
    assert found(tmp_path) == "new"
    writer = io.ShardWriter(
        tmp_path,
        rank=None,
        model=NEW.model,
        num_experts=NEW.num_experts,
        top_k=NEW.top_k,
        layer_ids=NEW.layer_ids,
        domain=NEW.domain,
        domain_group=NEW.domain_group,
    )
    names = ("expert_ids", "request_id", "position", "stage", "domain_id")
    more = make_trace(5, num_tokens=7)
    columns = {name: getattr(more, name) for name in names}
    columns["request_id"] = columns["request_id"] + 1000
    writer.write(columns)
    trace = read_trace(tmp_path)
    assert trace.num_rows == NEW.num_rows + 7
    assert np.isin(columns["request_id"], trace.request_id).all()


def test_a_damaged_manifest_is_named(tmp_path):
    """What says which shards count is never guessed at. [B2]"""
    write_trace(OLD, tmp_path)
    for content in (
        "{",
        "[]",
        '{"shards": ["../x"], "replaced": {}, "staging": ".tmp-1"}',
        '{"shards": [], "replaced": {}, "staging": ".."}',
    ):
        (tmp_path / parquet.MANIFEST).write_text(content)
        with pytest.raises(TraceError, match=r"damaged .*\.manifest\.json"):
            read_trace(tmp_path)


def test_an_npz_file_is_replaced_whole(tmp_path):
    """An interrupted overwrite of an .npz file destroyed the old one. [B2]"""
    path, step = tmp_path / "trace.npz", 0
    while True:
        step += 1
        write_trace(OLD, path, overwrite=True)

        def fail(number, step=step):
            if number == step:
                raise OSError(28, "No space left on device")

        with before_each_step(tmp_path, fail) as count:
            try:
                write_trace(NEW, path, overwrite=True)
            except TraceError as error:
                assert "No space left" in str(error)  # noqa: PT017  most steps fail, not all
        trace = read_trace(path)
        assert trace.same_content(OLD) or trace.same_content(NEW)
        if count() < step:
            break
    assert step > 4
