import os
import resource
import signal
import threading
import zlib
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import TraceError
from moe_locality.trace import RoutingTrace, ShardWriter, read_trace, read_trace_report
from moe_locality.trace.parquet import CRC_KEY, META_KEY, read_shard, write_shard
from tests.unit.trace.cases import assert_equal, make_load_trace, make_trace, traces

SCALARS = ("request_id", "position", "stage", "domain_id", "step")


def columns(trace):
    names = ("expert_ids", "expert_weights", *SCALARS)
    return {name: getattr(trace, name) for name in names if getattr(trace, name) is not None}


def writer(directory, trace, **options):
    return ShardWriter(
        directory,
        model=trace.model,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        layer_ids=trace.layer_ids,
        **{"domain": trace.domain, "domain_group": trace.domain_group} | options,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@settings(max_examples=40, deadline=None)
@given(traces())
def test_round_trip(folder, trace):
    path, _ = write_shard(trace, folder, None, 0)
    read, meta = read_shard(path)
    path.unlink()
    assert_equal(read, trace)
    assert meta.rank is None


def test_round_trip_of_loads(tmp_path):
    trace = make_load_trace()
    path, _ = write_shard(trace, tmp_path, None, 0)
    assert_equal(read_shard(path)[0], trace)


def test_layout_is_the_documented_one(tmp_path):
    """A stranger with pyarrow finds what docs/formats.md says, and nothing else."""
    trace = make_trace(num_experts=300, weights=True, step=True)
    path = writer(tmp_path, trace, rank=3, weights=True).write(columns(trace))
    assert path.name == "part-00003-00000.parquet"
    file = pq.ParquetFile(path)
    names = [f"{kind}_{layer}" for kind in ("expert_ids", "expert_weights") for layer in (1, 3, 5)]
    assert file.schema_arrow.names == [*SCALARS, *names]
    assert file.schema_arrow.field("expert_ids_3").type == pa.binary(4)
    assert file.metadata.row_group(0).column(5).compression == "ZSTD"
    first = file.read().column("expert_ids_3")[0].as_py()
    expected = trace.expert_ids[0, 1].astype(np.int64)
    assert first == np.where(expected < 0, 0xFFFF, expected).astype("<u2").tobytes()
    small = make_trace()
    path, _ = write_shard(small, tmp_path, None, 0)
    assert pq.read_schema(path).field("expert_ids_3").type == pa.binary(2)


def test_sequence_goes_on_and_nothing_is_overwritten(tmp_path):
    trace = make_trace()
    first = writer(tmp_path, trace, rank=2)
    names = [first.write(columns(trace)).name for _ in range(2)]
    second = writer(tmp_path, trace, rank=2)
    names += [second.write(columns(trace)).name, first.write(columns(trace)).name]
    names += [writer(tmp_path, trace, rank=7).write(columns(trace)).name]
    assert names == [f"part-00002-{i:05d}.parquet" for i in range(4)] + ["part-00007-00000.parquet"]
    assert read_trace(tmp_path).num_tokens == 5 * trace.num_tokens


def test_the_number_of_a_removed_shard_is_not_used_again(tmp_path):
    trace = make_trace()
    first = writer(tmp_path, trace)
    paths = [first.write(columns(trace)) for _ in range(3)]
    paths[0].unlink()
    assert writer(tmp_path, trace).write(columns(trace)).name == "part-00000-00003.parquet"


def test_writers_of_the_same_rank_do_not_lose_shards(tmp_path):
    trace = make_trace()
    writers = [writer(tmp_path, trace) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda w=w: [w.write(columns(trace)) for _ in range(5)])
        for w in writers
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(tmp_path.iterdir())) == 20
    assert read_trace(tmp_path).num_tokens == 20 * trace.num_tokens


def test_without_hard_links_nothing_is_overwritten_either(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    trace = make_trace()
    first, second = writer(tmp_path, trace), writer(tmp_path, trace)
    assert first.write(columns(trace)).name == "part-00000-00000.parquet"
    assert second.write(columns(trace)).name == "part-00000-00001.parquet"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "part-00000-00000.parquet",
        "part-00000-00001.parquet",
    ]


def test_rank_of_the_writer_is_the_rank_of_its_rows(tmp_path):
    trace = make_trace()
    for rank in (0, 1):
        writer(tmp_path, trace, rank=rank).write(columns(trace))
    read = read_trace(tmp_path)
    assert read.rank.tolist() == [0] * 40 + [1] * 40
    own = dict(columns(trace), rank=np.full(40, 9))
    writer(tmp_path, trace, rank=2).write(own)
    assert read_trace(tmp_path).rank[-40:].tolist() == [9] * 40


def test_domain_table_may_grow_but_not_change(tmp_path):
    trace = replace(make_trace(), domain=(), domain_group=(), domain_id=None)
    shards = writer(tmp_path, trace, domain=())
    names: list[str] = []
    for name in ("b", "a"):
        names.append(name)
        content = dict(columns(trace), domain_id=np.full(40, len(names) - 1))
        shards.write(content, domain=names)
    read = read_trace(tmp_path)
    assert read.domain == ("b", "a")
    assert read.domain_id.tolist() == [0] * 40 + [1] * 40
    with pytest.raises(TraceError, match="append new names"):
        shards.write(columns(trace), domain=["a", "b"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_ids": np.full((40, 3, 2), 8)}, "expert id 8"),
        ({"expert_ids": np.full((40, 3, 1), 1)}, "found 1 picks per token, expected top_k = 2"),
        ({"expert_weights": np.zeros((40, 3, 2), np.float16)}, "made with weights=False"),
        ({"request_id": np.full(40, -1)}, "request_id -1"),
    ],
)
def test_bad_columns_leave_no_file(tmp_path, change, message):
    trace = make_trace()
    with pytest.raises(TraceError, match=message):
        writer(tmp_path, trace).write(columns(trace) | change)
    assert list(tmp_path.iterdir()) == []


def test_weights_must_be_given_where_promised(tmp_path):
    trace = make_trace()
    with pytest.raises(TraceError, match="found no expert_weights"):
        writer(tmp_path, trace, weights=True).write(columns(trace))


def test_a_place_that_cannot_be_written(tmp_path):
    trace = make_trace()
    (tmp_path / "file").write_text("x")
    with pytest.raises(TraceError, match=r"cannot be made .*give another path"):
        writer(tmp_path / "file" / "trace", trace)
    shards = writer(tmp_path / "gone", trace)
    (tmp_path / "gone").rmdir()
    with pytest.raises(TraceError, match=r"cannot be written to .*gone"):
        shards.write(columns(trace))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(TraceError, match=r"no permission to write .*chmod"):
        writer(tmp_path, make_trace())


def test_a_full_disk_leaves_no_file(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    trace = make_trace()
    shards = writer(full, trace)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, before[1]))
        with pytest.raises(TraceError, match=r"cannot be written to .*free space"):
            shards.write(columns(trace))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, previous)
    assert list(full.iterdir()) == []
    shards.write(columns(trace))
    assert read_trace(full).num_tokens == 40


def attempt(path):
    try:
        return "", read_shard(path)[0]
    except TraceError as error:
        return str(error), None


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_damage_is_named_or_harmless(folder, data):
    """Flip or cut anywhere in a shard: TraceError naming it, or the very same content."""
    directory = folder / "damage"
    directory.mkdir(exist_ok=True)
    trace = make_trace(num_tokens=30)
    path, _ = write_shard(trace, directory, None, 0)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    message, result = attempt(path)
    path.unlink()
    assert str(path) in message if result is None else result.same_content(trace)


def signed(text):
    return {META_KEY: text, CRC_KEY: f"{zlib.crc32(text):08x}".encode()}


def rewrite(path, *, drop=(), metadata=None, cast=None):
    table = pq.read_table(path).drop_columns(list(drop))
    for name, kind in (cast or {}).items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, table.column(name).cast(kind))
    if metadata is not None:
        table = table.replace_schema_metadata({**table.schema.metadata, **metadata})
    pq.write_table(table, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["expert_ids_3"]}, r"the columns differ .* \['expert_ids_3'\]"),
        ({"drop": ["request_id"]}, r"the columns differ .* \['request_id'\]"),
        ({"cast": {"position": pa.int64()}}, "column 'position' has type int64"),
        ({"cast": {"expert_ids_3": pa.binary()}}, "column 'expert_ids_3' has type binary"),
        ({"metadata": {META_KEY: b"{}"}}, "checksum of the metadata"),
        ({"metadata": signed(b"{}")}, "'format_version'"),
        ({"metadata": signed(b'{"format_version": 2}')}, "format_version 2, expected 1"),
        ({"metadata": signed(b'{"format_version": 1, "rank": null}')}, "'kind'"),
        ({"metadata": signed(b"not json")}, "Expecting value"),
    ],
)
def test_wrong_columns_and_metadata(tmp_path, change, message):
    path, _ = write_shard(make_trace(), tmp_path, None, 0)
    rewrite(path, **change)
    with pytest.raises(TraceError, match=message) as caught:
        read_shard(path)
    assert str(path) in str(caught.value)


def test_files_that_are_no_shards(tmp_path):
    good = make_trace()
    write_shard(good, tmp_path, None, 0)
    (tmp_path / "part-00001-00000.parquet").write_text("hello, this is text\n" * 10)
    (tmp_path / "part-00002-00000.parquet").write_bytes(b"")
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "part-00003-00000.parquet")
    with pytest.raises(TraceError, match=r"damaged or foreign shard .*part-00001-00000"):
        read_trace(tmp_path)
    trace, problems = read_trace_report(tmp_path)
    assert_equal(trace, good)
    assert len(problems) == 3
    for problem, rank in zip(problems, (1, 2, 3), strict=True):
        assert f"part-{rank:05d}-00000.parquet" in problem
    assert "metadata key 'moe_locality.trace' is missing" in problems[2]


def test_reading_some_layers(tmp_path):
    trace = make_trace(weights=True)
    write_shard(trace, tmp_path, None, 0)
    part = read_trace(tmp_path, layers=[5, 1])
    assert part.same_content(trace.filter(layers=[5, 1]))
    assert part.layer_ids.tolist() == [5, 1]
    with pytest.raises(TraceError, match="layer 2 asked for"):
        read_trace(tmp_path, layers=[2])


def test_types_of_the_columns_are_kept(tmp_path):
    trace = make_trace(weights=True, rank=True, step=True)
    path, _ = write_shard(trace, tmp_path, None, 0)
    read = RoutingTrace.concat([read_shard(path)[0]])
    assert read.expert_weights.dtype == np.float16
    assert read.rank.dtype == np.int32


def test_a_table_of_domains_that_its_owner_changes_is_compared_with_what_was_written(tmp_path):
    trace = make_trace()
    table = list(trace.domain)
    shards = writer(tmp_path, trace, domain=table)
    table[0] = "other"
    with pytest.raises(TraceError, match="found a domain table that begins"):
        shards.write(columns(trace), domain=table)
