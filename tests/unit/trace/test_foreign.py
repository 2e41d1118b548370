"""Records of serving engines: files made by hand from the documented formats."""

import base64
import io
import json
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import TraceError
from moe_locality.trace import DECODE, PREFILL, UNKNOWN, import_trace, read_trace, tables
from moe_locality.trace.importers import find_format, import_to

# 4 tokens, 3 layers (the middle one dense: zeros), 2 picks
PICKS = [
    [[3, 1], [0, 0], [7, 2]],
    [[1, 0], [0, 0], [0, 7]],
    [[5, 4], [0, 0], [2, 1]],
    [[6, 3], [0, 0], [4, 5]],
]
ROUTED = [[token[0], token[2]] for token in PICKS]


def npy(picks, dtype=np.int16):
    buffer = io.BytesIO()
    np.save(buffer, np.array(picks, dtype))
    return base64.b64encode(buffer.getvalue()).decode()


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


def check(trace, *, prompt=None, requests=1):
    assert trace.layer_ids.tolist() == [0, 2]
    assert trace.expert_ids.tolist() == ROUTED * requests
    assert trace.request_id.tolist() == np.repeat(np.arange(requests), len(PICKS)).tolist()
    assert trace.position.tolist() == [0, 1, 2, 3] * requests
    if prompt is None:
        assert (trace.stage == UNKNOWN).all()
    else:
        one = [PREFILL] * prompt + [DECODE] * (len(PICKS) - prompt)
        assert trace.stage.tolist() == one * requests


# -- vLLM --


def test_vllm_arrays(tmp_path):
    np.save(tmp_path / "one.npy", np.array(PICKS, np.uint8))
    check(import_trace(tmp_path / "one.npy", num_experts=8))
    np.savez(tmp_path / "two.npz", a=np.array(PICKS), b=np.array(PICKS))
    assert find_format(tmp_path / "two.npz") == "vllm"
    check(import_trace(tmp_path / "two.npz", num_experts=8), requests=2)


@pytest.mark.parametrize("content", [PICKS, [PICKS]])
def test_vllm_nested_lists(tmp_path, content):
    check(import_trace(write_json(tmp_path / "t.json", content), num_experts=8))


@pytest.mark.parametrize(
    "encoded",
    [
        npy(PICKS),
        PICKS,
        {
            "encoding": "base64",
            "dtype": "int16",
            "shape": [4, 3, 2],
            "data": base64.b64encode(np.array(PICKS, np.int16).tobytes()).decode(),
        },
    ],
)
def test_vllm_responses_since_0_22(tmp_path, encoded):
    response = {
        "id": "cmpl-1",
        "choices": [{"index": 0, "text": "x", "routed_experts": encoded}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    path = write_json(tmp_path / "t.json", response)
    check(import_trace(path, num_experts=8), prompt=3)
    lines = tmp_path / "t.jsonl"
    lines.write_text(json.dumps(response) + "\n\n" + json.dumps(response) + "\n")
    check(import_trace(lines, num_experts=8), prompt=3, requests=2)


def test_vllm_rows_omitted_in_front_are_counted(tmp_path):
    usage = {"prompt_tokens": 13, "completion_tokens": 2}
    response = {"choices": [{"routed_experts": npy(PICKS)}], "usage": usage}
    trace = import_trace(write_json(tmp_path / "t.json", response), num_experts=8)
    assert trace.position.tolist() == [10, 11, 12, 13]
    assert trace.stage.tolist() == [PREFILL] * 3 + [DECODE]


def test_vllm_responses_of_0_21(tmp_path):
    response = {
        "prompt_routed_experts": PICKS[:1],
        "choices": [{"routed_experts": PICKS[1:]}, {"routed_experts": PICKS[1:]}],
    }
    check(
        import_trace(write_json(tmp_path / "t.json", response), num_experts=8), prompt=1, requests=2
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"choices": [{"text": "x"}]}, "choice 0: found no routed_experts"),
        ({"choices": 3}, "no list of objects in choices"),
        ({"choices": [{"routed_experts": "!!"}]}, "no base64 text"),
        ({"choices": [{"routed_experts": "AAAA"}]}, r"no \.npy file"),
        ({"choices": [{"routed_experts": npy(PICKS, object)}]}, r"no \.npy file"),
        ({"choices": [{"routed_experts": npy(PICKS, float)}]}, "found float64 of shape"),
        ({"choices": [{"routed_experts": [[[1, 2]], [[1]]]}]}, "no even table"),
        ({"choices": [{"routed_experts": {"shape": [1], "dtype": "int16"}}]}, "no base64 text"),
        (
            {"choices": [{"routed_experts": {"shape": [9], "dtype": "int16", "data": "AAAAAA=="}}]},
            "found 2 numbers for the shape",
        ),
        ({"choices": [{"routed_experts": {"shape": [1], "dtype": "O", "data": ""}}]}, "dtype 'O'"),
        ({"choices": [{"routed_experts": [[[1, 1]]]}]}, "expert 1 twice"),
        ({"choices": [{"routed_experts": [[[0, 0]]]}]}, "no routed token"),
        ([PICKS, [[[1, 2]]]], r"request 1: found \(1, 2\) layers and picks, expected \(3, 2\)"),
    ],
)
def test_wrong_vllm_files_are_named(tmp_path, content, message):
    path = write_json(tmp_path / "t.json", content)
    with pytest.raises(TraceError, match=message) as caught:
        import_trace(path, num_experts=8)
    assert str(path) in str(caught.value)


# -- SGLang responses --


def sglang_response(prompt=3, completion=2, picks=PICKS):
    flat = base64.b64encode(np.array(picks, "<i4").tobytes()).decode()
    return {
        "text": "x",
        "meta_info": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "routed_experts": flat,
        },
    }


def test_sglang_responses(tmp_path):
    path = write_json(tmp_path / "t.json", [sglang_response(), sglang_response()])
    check(import_trace(path, num_experts=8, top_k=2), prompt=3, requests=2)
    lines = tmp_path / "lines"
    lines.write_text("\n".join(json.dumps(sglang_response()) for _ in range(2)))
    check(import_trace(lines, num_experts=8, top_k=2), prompt=3, requests=2)


def test_sglang_responses_need_top_k(tmp_path):
    path = write_json(tmp_path / "t.json", sglang_response())
    with pytest.raises(TraceError, match="pass top_k"):
        import_trace(path, num_experts=8)
    with pytest.raises(TraceError, match=r"24 picks for 4 tokens and top_k = 5"):
        import_trace(path, num_experts=8, top_k=5)
    response = sglang_response()
    del response["meta_info"]["routed_experts"]
    with pytest.raises(TraceError, match="found no meta_info"):
        import_trace(write_json(path, response), top_k=2)
    with pytest.raises(TraceError, match="prompt_tokens None"):
        import_trace(write_json(path, sglang_response(prompt=None)), top_k=2)


# -- llama.cpp --


def llamacpp_rows():
    """A prompt of 3 tokens and 2 decoded ones, layers 1 to 3, the last with only the last token of
    the prompt."""
    passes = [
        {1: [[0, 1], [2, 3], [4, 5]], 2: [[1, 2], [3, 4], [5, 6]], 3: [[7, 6]]},
        {1: [[3, 2]], 2: [[0, 7]], 3: [[1, 5]]},
        {1: [[6, 0]], 2: [[2, 1]], 3: [[4, 3]]},
    ]
    rows = [
        f"{layer},{expert}"
        for one in passes
        for layer, tokens in one.items()
        for picks in tokens
        for expert in picks
    ]
    none = [-1, -1]
    expected = [
        [[0, 1], [1, 2], none],
        [[2, 3], [3, 4], none],
        [[4, 5], [5, 6], [7, 6]],
        [[3, 2], [0, 7], [1, 5]],
        [[6, 0], [2, 1], [4, 3]],
    ]
    return rows, expected


@pytest.mark.parametrize("header", [[], ["layer,expert"]])
def test_llamacpp(tmp_path, header):
    rows, expected = llamacpp_rows()
    path = tmp_path / "moe_trace.csv"
    path.write_text("\n".join([*header, *rows, ""]))
    trace = import_trace(path, num_experts=8)
    assert trace.layer_ids.tolist() == [1, 2, 3]
    assert trace.expert_ids.tolist() == expected
    assert trace.stage.tolist() == [PREFILL] * 3 + [DECODE] * 2
    assert trace.position.tolist() == [0, 1, 2, 3, 4]
    assert set(trace.request_id.tolist()) == {0}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("layer,expert\n1,2\nx,3\n", {}, "line 3: found 'x,3'"),
        ("layer,expert\n1,-2\n", {}, "line 2: found '1,-2'"),
        ("layer,expert\n", {}, "no pick in"),
        ("1,2\n1,3\n", {}, "a single layer"),
        ("1,2\n2,3\n", {"top_k": 2}, "multiples of top_k = 2"),
        ("1,2\n1,3\n2,3\n3,3\n", {"top_k": 1}, "1 tokens in layer 2 and 2 in another layer"),
        ("1,2\n1,2\n2,3\n2,4\n", {}, r"expert 2 twice .*\(read with top_k = 2\)"),
    ],
)
def test_wrong_llamacpp_files_are_named(tmp_path, text, options, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=message) as caught:
        import_trace(path, **options)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("header", [[], ["layer,expert"]])
def test_llamacpp_logs_in_one_file_are_requests_of_their_own(tmp_path, header):
    """Two logs put together were one request, or an error at the second header. [D6]"""
    rows, expected = llamacpp_rows()
    path = tmp_path / "moe_trace.csv"
    path.write_text("\n".join([*header, *rows, *header, *rows, ""]))
    trace = import_trace(path, num_experts=8)
    assert trace.expert_ids.tolist() == expected * 2
    assert trace.request_id.tolist() == [0] * 5 + [1] * 5
    assert trace.position.tolist() == [0, 1, 2, 3, 4] * 2
    assert trace.stage.tolist() == ([PREFILL] * 3 + [DECODE] * 2) * 2


def test_llamacpp_logs_of_one_token_are_told_apart_by_their_headers(tmp_path):
    """Without a continuation before it, only its header says that a prompt begins. [D6]"""
    rows, _ = llamacpp_rows()
    path = tmp_path / "moe_trace.csv"
    path.write_text("\n".join(["layer,expert", *rows[-6:], "layer,expert", *rows[-6:], ""]))
    trace = import_trace(path, num_experts=8)
    assert trace.request_id.tolist() == [0, 1]
    assert trace.stage.tolist() == [PREFILL] * 2


# -- CSV with a row per pick --

LONG = """request_id,position,layer,k,expert,weight,stage,domain
4,1,5,0,6,0.5,decode,law
4,0,2,1,1,0.25,prefill,law
4,0,2,0,3,0.75,prefill,law
4,0,5,0,0,1.0,prefill,law
9,0,2,0,7,1.0,,
"""


def check_long(trace):
    assert trace.layer_ids.tolist() == [2, 5]
    assert trace.request_id.tolist() == [4, 4, 9]
    assert trace.position.tolist() == [0, 1, 0]
    assert trace.expert_ids.tolist() == [
        [[3, 1], [0, -1]],
        [[-1, -1], [6, -1]],
        [[7, -1], [-1, -1]],
    ]
    assert trace.expert_weights[0].tolist() == [[0.75, 0.25], [1.0, 0.0]]
    assert trace.stage.tolist() == [PREFILL, DECODE, UNKNOWN]
    assert [trace.domain[i] if i >= 0 else None for i in trace.domain_id] == ["law", "law", None]


def test_csv_of_picks(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(LONG)
    check_long(import_trace(path, num_experts=8))


def test_csv_of_picks_read_in_blocks(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    head, *rows = LONG.splitlines()
    path.write_text("\n".join([head, *sorted(rows)]))
    monkeypatch.setattr(tables, "SORT_BYTES", 0)
    monkeypatch.setattr(tables, "BLOCK_BYTES", 80)  # about two rows
    import_to(path, tmp_path / "out", num_experts=8)
    assert len(list((tmp_path / "out").glob("*.parquet"))) > 1
    check_long(import_trace(path, num_experts=8))
    path.write_text(LONG)
    with pytest.raises(TraceError, match="not sorted by request and position"):
        import_trace(path, num_experts=8)


def test_csv_of_picks_with_blocks_without_rows(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    path.write_text(LONG + 2000 * "\n")
    monkeypatch.setattr(tables, "BLOCK_BYTES", 256)
    check_long(import_trace(path, num_experts=8))


def test_csv_of_a_single_request_with_other_names(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(
        "phase,token,layer,rank,expert\nprefill,0,1,0,5\nprefill,0,1,1,2\ndecode,1,1,0,3\n"
    )
    trace = import_trace(path, num_experts=8)
    assert trace.expert_ids.tolist() == [[[5, 2]], [[3, -1]]]
    assert trace.stage.tolist() == [PREFILL, DECODE]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("position,layer,expert\n0,1,x\n", "routing CSV"),
        ("position,layer,expert\n0,1\n", "routing CSV"),
        ("position,layer,expert\n0,1,-1\n", "expert outside"),
        ("position,layer,expert\n-1,1,1\n", "position outside"),
        ("position,layer,expert\n", "no row of a pick"),
        ("position,expert\n0,1\n", "routing CSV"),
        ("position,layer,expert,stage\n0,1,1,middle\n", "found stage 'middle'"),
        ("position,layer,expert\n0,1,1\n0,1,1\n", "expert 1 twice"),
    ],
)
def test_wrong_csv_of_picks_is_named(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=message) as caught:
        import_trace(path, num_experts=8)
    assert str(path) in str(caught.value)


# -- all of them --


def samples(folder):
    """A good file of every text and array format, with the options that it needs."""
    rows, _ = llamacpp_rows()
    np.save(folder / "vllm.npy", np.array(PICKS))
    np.savez(folder / "vllm.npz", a=np.array(PICKS))
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    response = {"choices": [{"routed_experts": npy(PICKS)}], "usage": usage}
    (folder / "vllm.jsonl").write_text(json.dumps(response))
    write_json(folder / "sglang.json", sglang_response())
    (folder / "llamacpp.csv").write_text("layer,expert\n" + "\n".join(rows))
    (folder / "long.csv").write_text(LONG)
    (folder / "wide.csv").write_text("request_id,position,layer,expert_ids\n4,0,2,3 1\n4,1,2,5 6\n")
    header = {"num_experts": 8, "layer_ids": [2]}
    token = {"request_id": 1, "position": 0, "expert_ids": [[1, 2]]}
    write_json(folder / "generic.json", {**header, "tokens": [token]})
    (folder / "generic.jsonl").write_text(json.dumps(header) + "\n" + json.dumps(token))
    record = {
        "step": 0,
        "block": "decoder",
        "layer": 0,
        "rank": 0,
        "num_tokens": 1,
        "topk": 2,
        "top_indices": [[1, 2]],
    }
    (folder / "megatron.jsonl").write_text(json.dumps(record))
    return sorted(path for path in folder.iterdir())


@pytest.fixture(scope="module")
def good_files(tmp_path_factory):
    return samples(tmp_path_factory.mktemp("good"))


def test_formats_are_found_from_the_content(good_files, tmp_path):
    for path in good_files:
        renamed = tmp_path / path.stem
        renamed.write_bytes(path.read_bytes())
        expected = {"generic": "json", "long": "csv", "wide": "csv"}.get(path.stem, path.stem)
        assert find_format(renamed) == expected, path
        trace = import_trace(path, num_experts=8, top_k=2)
        assert trace.num_tokens > 0
        assert import_trace(path, format=expected, num_experts=8, top_k=2).same_content(trace)
        renamed.unlink()


def test_streamed_to_disk_equals_read_into_memory(good_files, tmp_path):
    for path in good_files:
        seen: list[tuple[int, int]] = []

        def note(done, total, seen=seen):
            seen.append((done, total))

        out = tmp_path / path.name
        import_to(path, out, num_experts=8, top_k=2, report=note)
        assert read_trace(out).same_content(import_trace(path, num_experts=8, top_k=2))
        assert all(0 <= done <= total for done, total in seen)


def test_parts_become_shards(tmp_path, monkeypatch):
    from moe_locality.trace import tables

    monkeypatch.setattr(tables, "PART_PICKS", 4)
    header = {"num_experts": 8, "layer_ids": [2]}
    tokens = [{"request_id": 1, "position": i, "expert_ids": [[i, 7]]} for i in range(5)]
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, [header, *tokens])))
    import_to(path, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("part-*.parquet"))) == 3
    assert read_trace(tmp_path / "out").same_content(import_trace(path))


def test_nothing_is_written_for_a_bad_file(tmp_path):
    good = {"request_id": 1, "position": 0, "expert_ids": [[1, 2]]}
    bad = {"request_id": 1, "position": 1, "expert_ids": [[1, 1]]}
    header = {"num_experts": 8, "layer_ids": [2]}
    path = tmp_path / "t.jsonl"
    out = tmp_path / "out"
    path.write_text("\n".join(map(json.dumps, [header, good])))
    import_to(path, out)
    before = read_trace(out)
    path.write_text("\n".join(map(json.dumps, [header, good, bad])))
    with pytest.raises(TraceError, match="expert 1 twice"):
        import_to(path, out, overwrite=True)
    assert read_trace(out).same_content(before)
    assert [p.name for p in out.iterdir()] == ["part-00000-00000.parquet"]
    path.write_text("\n".join(map(json.dumps, [header, good, {**good, "position": 1}])))
    with pytest.raises(TraceError, match="found another trace"):
        import_to(path, out)
    import_to(path, out, overwrite=True)
    assert read_trace(out).num_tokens == 2


def test_format_by_name(tmp_path):
    path = write_json(tmp_path / "t.json", PICKS)
    with pytest.raises(TraceError, match="found format 'excel', expected one of: npz, json"):
        import_trace(path, format="excel")
    with pytest.raises(TraceError, match="found a directory"):
        import_trace(tmp_path, format="json")
    with pytest.raises(TraceError, match="no router_trace_rank"):
        import_trace(tmp_path, format="megatron")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_end_in_a_trace_error(good_files, tmp_path_factory, data):
    """Cut, overwritten, spliced, or read as another format: a trace or a TraceError, no more."""
    path = data.draw(st.sampled_from(good_files))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(content)))
        kind = data.draw(st.sampled_from(["cut", "bytes", "remove", "token"]))
        if kind == "cut":
            del content[at:]
        elif kind == "bytes":
            content[at : at + 4] = data.draw(st.binary(max_size=4))
        elif kind == "remove":
            del content[at : at + data.draw(st.integers(1, 8))]
        else:
            words = [
                b"-1",
                b"null",
                b"1e9",
                b"[]",
                b'"x"',
                b"99999999999999999999",
                b",",
                b"{",
                b"0",
            ]
            content[at : at + 1] = data.draw(st.sampled_from(words))
    damaged = tmp_path_factory.mktemp("damaged") / path.name
    damaged.write_bytes(bytes(content))
    named = data.draw(
        st.sampled_from(
            [None, None, "json", "csv", "megatron", "vllm", "sglang", "llamacpp", "npz"]
        )
    )
    logging.disable(logging.WARNING)
    try:
        import_trace(damaged, format=named, num_experts=8, top_k=2)
    except TraceError:
        pass
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("named", ["json", "megatron", "vllm", "sglang"])
@pytest.mark.parametrize(
    "content", [3, "x", None, True, {}, [], [3], [{}], [[]], [[[]]], [[[1, []]]]]
)
def test_json_of_another_type_is_refused(tmp_path, named, content):
    path = write_json(tmp_path / "t", content)
    with pytest.raises(TraceError):
        import_trace(path, format=named, num_experts=8, top_k=2)
