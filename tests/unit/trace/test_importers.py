import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import TraceError
from moe_locality.trace import DECODE, PREFILL, UNKNOWN, import_trace
from moe_locality.trace.npz import write_npz
from tests.unit.trace.cases import assert_equal, make_trace

HEADER = {"model": "m", "num_experts": 8, "layer_ids": [2, 5]}
TOKENS = [
    {
        "request_id": 4,
        "position": 0,
        "stage": "prefill",
        "domain": "law",
        "expert_ids": [[3, 1], [0, 7]],
    },
    {"request_id": 4, "position": 1, "stage": 1, "domain": "code", "expert_ids": [[2], []]},
    {"request_id": 9, "position": 0, "expert_ids": [[5, 6], [1, -1]]},
]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def check_generic(trace):
    assert (trace.model, trace.num_experts, trace.top_k) == ("m", 8, 2)
    assert trace.layer_ids.tolist() == [2, 5]
    assert trace.request_id.tolist() == [4, 4, 9]
    assert trace.stage.tolist() == [PREFILL, DECODE, UNKNOWN]
    assert [trace.domain[i] if i >= 0 else None for i in trace.domain_id] == ["law", "code", None]
    assert trace.expert_ids.tolist() == [[[3, 1], [0, 7]], [[2, -1], [-1, -1]], [[5, 6], [1, -1]]]


def test_json_lines(tmp_path):
    check_generic(import_trace(write_lines(tmp_path / "t.jsonl", [HEADER, *TOKENS])))


def test_json(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({**HEADER, "tokens": TOKENS}))
    check_generic(import_trace(path))


def test_csv(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        "request_id,position,layer,expert_ids,stage,domain\n"
        "4,0,2,3 1,prefill,law\n4,0,5,0 7,prefill,law\n"
        "4,1,2,2,decode,code\n4,1,5,,decode,code\n9,0,5,1 -1,,\n9,0,2,5 6,,\n"
    )
    check_generic(import_trace(path, model="m", num_experts=8))
    path.write_text(path.read_text(), encoding="utf-8-sig")  # as a spreadsheet writes it
    check_generic(import_trace(path, model="m", num_experts=8))


def test_import_trace_heeds_the_table_of_a_single_file(tmp_path):
    """It was read and left aside."""
    (tmp_path / "t.csv").write_text("request_id,position,layer,expert_ids\n4,0,2,3 1\n")
    (tmp_path / "names.csv").write_text("name,request_id,domain\nt,7,law\n")
    table = {"num_experts": 8, "table": tmp_path / "names.csv"}
    trace = import_trace(tmp_path / "t.csv", **table)
    assert (trace.request_ids.tolist(), trace.domain) == ([7], ("law",))
    with pytest.raises(TraceError, match="found one for megatron"):
        import_trace(tmp_path / "t.csv", format="megatron", **table)


def test_npz(tmp_path):
    trace = make_trace()
    write_npz(trace, tmp_path / "t.npz")
    assert_equal(import_trace(tmp_path / "t.npz"), trace)
    assert import_trace(tmp_path / "t.npz", model="x").model == "x"
    with pytest.raises(TraceError, match="found 8 experts, expected 9 as asked"):
        import_trace(tmp_path / "t.npz", num_experts=9)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 999))
def test_generic_round_trip(tmp_path_factory, seed):
    trace = make_trace(seed, missing=False)
    records = [
        {
            "request_id": int(trace.request_id[i]),
            "position": int(trace.position[i]),
            "stage": int(trace.stage[i]),
            "domain": trace.domain[trace.domain_id[i]] if trace.domain_id[i] >= 0 else None,
            "expert_ids": trace.expert_ids[i].tolist(),
        }
        for i in range(trace.num_tokens)
    ]
    header = {"model": trace.model, "num_experts": 8, "layer_ids": trace.layer_ids.tolist()}
    path = write_lines(tmp_path_factory.mktemp("generic") / "t.jsonl", [header, *records])
    assert import_trace(path).same_content(trace.evolve(domain_group=()))


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no line in"),
        ([{"foo": 1}], r"\['foo'\] as the keys of the first line"),
        ([HEADER, {**TOKENS[0], "position": -1}], r"line 2: found position -1"),
        ([HEADER, TOKENS[0], {**TOKENS[0], "request_id": True}], r"line 3: found request_id True"),
        (
            [HEADER, {**TOKENS[0], "expert_ids": [[1]]}],
            r"line 2: found 1 lists in expert_ids, expected 2",
        ),
        ([HEADER, {**TOKENS[0], "expert_ids": [[1], [1.5]]}], r"line 2: found picks \[1.5\]"),
        ([HEADER, {**TOKENS[0], "expert_ids": [[1], [8]]}], r"t.jsonl: found expert id 8"),
        ([HEADER, {**TOKENS[0], "expert_ids": [[1, 1], [0]]}], r"t.jsonl: found expert 1 twice"),
        ([HEADER, {**TOKENS[0], "stage": "middle"}], r"line 2: found stage 'middle'"),
        ([{**HEADER, "layer_ids": "all"}, TOKENS[0]], r"layer_ids 'all' in the header"),
        ([{**HEADER, "top_k": "2"}, TOKENS[0]], r"top_k '2' in the header"),
        ([{**HEADER, "num_experts": "8"}, TOKENS[0]], r"num_experts = '8'"),
        ([HEADER, [1, 2]], r"line 2: found a list, expected an object"),
    ],
)
def test_wrong_records_are_named(tmp_path, records, message):
    with pytest.raises(TraceError, match=message):
        import_trace(write_lines(tmp_path / "t.jsonl", records))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", '{"layer_ids": [0]}\nnot json\n', r"line 2: found no JSON"),
        ("t.json", "[1, 2", "cannot be read as JSON"),
        ("t.json", "[" * 100_000, "cannot be read as JSON"),
        ("t.json", "[]", "no list named tokens"),
        ("t.csv", "a,b\n1,2\n", "column 'request_id' is missing"),
        ("t.csv", "request_id,position,layer,expert_ids\n1,0,2,x\n", "invalid literal"),
        ("t.csv", "request_id,position,layer,expert_ids\n1,0\n", "cannot be read as a routing CSV"),
        (
            "t.csv",
            "request_id,position,layer,expert_ids\n1,0,2,3\n1,0,2,4\n",
            r"layer 2 of token \(1, 0\) again",
        ),
        (
            "t.csv",
            "request_id,position,layer,expert_ids\n1,0,2,3\n1,1,3,4\n",
            "no row for layer 3 of request 1, position 0",
        ),
        ("t.xlsx", "x", r"unknown format, expected one of: npz, json, csv, megatron"),
    ],
)
def test_wrong_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(TraceError, match=message) as caught:
        import_trace(path)
    assert str(path) in str(caught.value)


def test_nothing_to_import(tmp_path):
    with pytest.raises(TraceError, match="found nothing at"):
        import_trace(tmp_path / "t.jsonl")
    with pytest.raises(TraceError, match="without router_trace_rank"):
        import_trace(tmp_path)
    (tmp_path / "t.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TraceError, match="cannot be read as text"):
        import_trace(tmp_path / "t.jsonl")


def record(step, layer, picks, rank=0, **extra):
    return {
        "step": step,
        "stage": "pre_dispatch",
        "block": "decoder",
        "layer": layer,
        "rank": rank,
        "num_tokens": len(picks),
        "topk": len(picks[0]),
        "top_indices": picks,
        **extra,
    }


def megatron_run(rank=0):
    """Two micro-batches in step 0, one in step 1, layers 3 and 4."""
    a, b, c = [[0, 1], [2, 3], [4, 5]], [[6, 7]], [[1, 0], [3, 2]]
    d, e, f = [[7, 6], [5, 4], [3, 1]], [[0, 2]], [[2, 4], [6, 0]]
    steps = [(0, 3, a), (0, 4, d), (0, 3, b), (0, 4, e), (1, 3, c), (1, 4, f)]
    return [record(step, layer, picks, rank) for step, layer, picks in steps], (
        a + b + c,
        d + e + f,
    )


def test_megatron_records(tmp_path, caplog):
    records, (first, second) = megatron_run()
    records.insert(2, record(0, 3, [[0, 1]], block="mtp", mtp_idx=0))
    with caplog.at_level(logging.WARNING):
        trace = import_trace(write_lines(tmp_path / "router_trace_rank0.jsonl", records))
    assert "left out 1 records of multi-token-prediction" in caplog.text
    assert "taking 8, the highest id seen plus one" in caplog.text
    assert trace.num_experts == 8
    assert trace.layer_ids.tolist() == [3, 4]
    assert trace.expert_ids[:, 0].tolist() == first
    assert trace.expert_ids[:, 1].tolist() == second
    assert trace.request_id.tolist() == [0, 0, 0, 1, 2, 2]
    assert trace.position.tolist() == [0, 1, 2, 0, 0, 1]
    assert trace.step.tolist() == [0, 0, 0, 0, 1, 1]
    assert (trace.stage == UNKNOWN).all()


def test_megatron_ranks_of_a_directory(tmp_path):
    for rank in range(2):
        write_lines(tmp_path / f"router_trace_rank{rank}.jsonl", megatron_run(rank)[0])
    trace = import_trace(tmp_path, model="big", num_experts=64)
    assert (trace.model, trace.num_experts, trace.num_tokens) == ("big", 64, 12)
    assert trace.rank.tolist() == [0] * 6 + [1] * 6
    assert len(np.unique(trace.request_id)) == 6


def test_megatron_run_that_was_cut_off(tmp_path, caplog):
    records, (first, _) = megatron_run()
    with caplog.at_level(logging.WARNING):
        trace = import_trace(write_lines(tmp_path / "t.jsonl", records[:-1]))
    assert "step 1 lacks records" in caplog.text
    assert trace.expert_ids[:, 0].tolist() == first[:4]
    with pytest.raises(TraceError, match="step 0 lacks records of some layers"):
        import_trace(write_lines(tmp_path / "t.jsonl", records[1:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_indices": [[0, 1], [2]]}, "no table of numbers"),
        ({"top_indices": [[0, 1.5], [1, 2], [3, 4]]}, r"expected whole numbers of shape \(3, 2\)"),
        ({"top_indices": "x"}, "expected whole numbers of shape"),
        ({"num_tokens": 4}, r"expected whole numbers of shape \(4, 2\)"),
        ({"layer": None}, "line 1: found layer None"),
        ({"block": "encoder"}, "line 1: found block 'encoder'"),
        ({"top_indices": [[0, 1], [2, 2], [4, 5]]}, "found expert 2 twice"),
    ],
)
def test_wrong_megatron_records_are_named(tmp_path, change, message):
    records, _ = megatron_run()
    records[0] = {**records[0], **change}
    with pytest.raises(TraceError, match=message):
        import_trace(write_lines(tmp_path / "t.jsonl", records))


def test_megatron_layers_with_different_tokens(tmp_path):
    records = [record(0, 3, [[0, 1]]), record(0, 4, [[0, 1], [2, 3]])]
    with pytest.raises(TraceError, match="layers of step 0 with different token counts"):
        import_trace(write_lines(tmp_path / "t.jsonl", records))
    write_lines(tmp_path / "router_trace_rank0.jsonl", [record(0, 3, [[0, 1]])])
    write_lines(tmp_path / "router_trace_rank1.jsonl", [record(0, 5, [[0, 1]], rank=1)])
    with pytest.raises(TraceError, match="pipeline stage on their own"):
        import_trace(tmp_path)
    write_lines(tmp_path / "mtp.jsonl", [record(0, 3, [[0, 1]], block="mtp")])
    with pytest.raises(TraceError, match="no complete decoder record"):
        import_trace(tmp_path / "mtp.jsonl")
