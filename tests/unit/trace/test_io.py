import logging
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import TraceError
from moe_locality.trace import RoutingTrace, read_trace, read_trace_report, write_trace
from moe_locality.trace.parquet import write_shard
from tests.unit.trace.cases import assert_equal, make_load_trace, make_trace, traces

REAL = (
    "deepseek_v2_lite_chat_prompts",
    "deepseek_v2_lite_esft_tasks",
    "flame_moe_290m_pretrain_sample",
    "gpt_oss_20b_benchmarks",
    "llama4_maverick_mmlu",
    "mixtral_8x7b_domain_load",
    "mixtral_8x7b_mmlu_request_load",
    "olmoe_1b7b_domain_load",
    "smartmoe_24l_32e_training_load",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("io")


@settings(max_examples=25, deadline=None)
@given(traces(), st.integers(1, 20))
def test_round_trip_in_shards(folder, trace, shard_tokens):
    write_trace(trace, folder / "trace", overwrite=True, shard_tokens=shard_tokens)
    shards = sorted((folder / "trace").iterdir())
    assert len(shards) == max(-(-trace.num_tokens // shard_tokens), 1)
    assert shards[0].name == "part-00000-00000.parquet"
    assert_equal(read_trace(folder / "trace"), trace)


@pytest.mark.parametrize("name", REAL)
def test_real_traces_survive(routing_data, tmp_path, name):
    trace = RoutingTrace.from_npz(routing_data / f"{name}.npz")
    write_trace(trace, tmp_path, shard_tokens=50_000)
    read = read_trace(tmp_path)
    assert_equal(read, trace)
    with np.load(routing_data / f"{name}.npz") as file:
        for array in ("expert_ids", "expert_load", "position", "domain_id"):
            if array in file:
                np.testing.assert_array_equal(getattr(read, array), file[array])
        assert read.top_k == file["top_k"]


def test_writing_does_not_mix_traces(tmp_path):
    first, other = make_trace(0), make_trace(1)
    write_trace(first, tmp_path)
    before = (tmp_path / "part-00000-00000.parquet").stat()
    write_trace(first.take(np.arange(39, -1, -1)), tmp_path)
    after = (tmp_path / "part-00000-00000.parquet").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    with pytest.raises(TraceError, match=r"found another trace in .*overwrite=True"):
        write_trace(other, tmp_path)
    write_trace(other, tmp_path, overwrite=True, shard_tokens=15)
    assert len(list(tmp_path.iterdir())) == 3
    assert_equal(read_trace(tmp_path), other)
    (tmp_path / "part-00000-00001.parquet").write_bytes(b"damaged")
    with pytest.raises(TraceError, match="found another trace"):
        write_trace(other, tmp_path)
    with pytest.raises(TraceError, match="shard_tokens 0"):
        write_trace(other, tmp_path, shard_tokens=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "found nothing at .*check the path"),
        (lambda p: p.mkdir(), "found no part-.*check that the recorder was closed"),
        (lambda p: p.write_text("x"), "found a file .*moe-locality import"),
    ],
)
def test_nothing_to_read(tmp_path, make, message):
    make(tmp_path / "trace")
    with pytest.raises(TraceError, match=message):
        read_trace(tmp_path / "trace")
    with pytest.raises(TraceError, match=message):
        read_trace_report(tmp_path / "trace")


def test_one_shard_by_its_name(tmp_path):
    path, _ = write_shard(make_trace(), tmp_path, None, 0)
    assert_equal(read_trace(path), make_trace())


def test_temporary_files_are_ignored_and_strange_ones_reported(tmp_path, caplog):
    write_trace(make_trace(), tmp_path)
    (tmp_path / ".tmp-0123.parquet").write_bytes(b"half a shard")
    (tmp_path / "notes.txt").write_text("x")
    assert read_trace_report(tmp_path)[1] == []
    (tmp_path / "copy.parquet").write_bytes((tmp_path / "part-00000-00000.parquet").read_bytes())
    with caplog.at_level(logging.WARNING):
        assert read_trace(tmp_path).num_tokens == 40
    assert "found copy.parquet" in caplog.text


def test_a_lost_shard_is_reported(tmp_path, caplog):
    write_trace(make_trace(), tmp_path, shard_tokens=10)
    (tmp_path / "part-00000-00001.parquet").unlink()
    with caplog.at_level(logging.WARNING):
        assert read_trace(tmp_path).num_tokens == 30
    assert "found no shard part-00000-00001.parquet" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, r"model 'other' \(expected 'toy/model'\)"),
        ({"num_experts": 9}, r"num_experts 9 \(expected 8\)"),
        ({"expert_ids": np.zeros((20, 3, 1), np.int16)}, r"top_k 1 \(expected 2\)"),
    ],
)
def test_a_shard_of_another_model_is_named(tmp_path, change, message):
    good = make_trace(num_tokens=40)
    write_trace(good, tmp_path, shard_tokens=20)
    odd = replace(make_trace(num_tokens=20), **change)
    path, _ = write_shard(odd, tmp_path, None, 1)
    with pytest.raises(TraceError, match=message) as caught:
        read_trace(tmp_path)
    assert path.name in str(caught.value)
    trace, problems = read_trace_report(tmp_path)
    assert_equal(trace, good)
    assert len(problems) == 1
    assert path.name in problems[0]


def test_kinds_do_not_mix(tmp_path):
    write_shard(make_trace(), tmp_path, None, 0)
    path, _ = write_shard(make_load_trace(), tmp_path, None, 1)
    with pytest.raises(TraceError, match=r"kind 'load' \(expected 'tokens'\)") as caught:
        read_trace(tmp_path)
    assert path.name in str(caught.value)


def test_optional_fields_everywhere_or_nowhere(tmp_path):
    write_shard(make_trace(0, weights=True, step=True), tmp_path, None, 0)
    path, _ = write_shard(make_trace(1), tmp_path, None, 1)
    with pytest.raises(TraceError, match="no expert_weights in shard") as caught:
        read_trace(tmp_path)
    assert path.name in str(caught.value)
    trace, problems = read_trace_report(tmp_path)
    assert (trace.expert_weights, trace.step, trace.num_tokens) == (None, None, 80)
    assert len(problems) == 2


def test_all_shards_damaged(tmp_path):
    write_trace(make_trace(), tmp_path, shard_tokens=20)
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(TraceError, match=r"no readable shard among 2 in .*part-00000-00001"):
        read_trace_report(tmp_path)


def test_pipeline_stages_in_one_directory(tmp_path):
    trace = make_trace(num_tokens=60, num_layers=4, rank=True, step=True)
    first, second = trace.filter(layers=[1, 3]), trace.filter(layers=[5, 7])
    write_shard(first.take(np.arange(30)), tmp_path, 0, 0)
    write_shard(first.take(np.arange(30, 60)), tmp_path, 1, 0)
    late = replace(second, rank=second.rank + 4)
    write_shard(late.take(np.arange(59, -1, -1)), tmp_path, 4, 0)
    read = read_trace(tmp_path)
    assert_equal(read, trace)
    assert read_trace(tmp_path, layers=[7]).same_content(replace(late.filter(layers=[7])))
    (tmp_path / "part-00001-00000.parquet").write_bytes(b"x")
    with pytest.raises(TraceError, match="part-00001-00000"):
        read_trace(tmp_path)
    trace, problems = read_trace_report(tmp_path)
    assert trace.num_tokens == 60
    assert (trace.expert_ids[30:, :2] == -1).all()
    assert any("30 of 60 tokens not recorded in every pipeline stage" in text for text in problems)
