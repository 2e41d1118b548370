"""Files of requests with their picks, as engines and RL frameworks write them: several at once,
damaged ones among them, and what a response says of its tokens and layers."""

import base64
import json
import logging

import numpy as np
import pytest

from moe_locality.errors import TraceError
from moe_locality.trace import DECODE, PREFILL, import_trace, read_trace, write_trace
from moe_locality.trace.importers import find_format, import_to

torch = pytest.importorskip("torch")
LAYERS, TOP_K, EXPERTS = 6, 2, 16


def picks(tokens, seed=0, *, layers=LAYERS, top_k=TOP_K, experts=EXPERTS, dense=()):
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((tokens, layers, experts)), axis=2)[:, :, :top_k].astype(np.int16)
    ids[:, list(dense)] = 0
    return ids


def flat(ids):
    return base64.b64encode(np.ascontiguousarray(ids, "<i4").tobytes()).decode()


def write(path, content):
    path.write_text(json.dumps(content))
    return path


# -- SGLang: which tokens, which layers --


def generated(ids, prompt, answer, **more):
    counts = {"prompt_tokens": prompt, "completion_tokens": answer}
    return {"text": "x", "meta_info": {**counts, "routed_experts": flat(ids), **more}}


def test_a_response_that_begins_later_keeps_its_tokens_and_layers(tmp_path):
    """100 rows of 24 layers of a response from position 100 on were read as 200 of 12. [D4]"""
    ids = picks(100, layers=24)
    response = generated(ids, 150, 51, routed_experts_start_len=100)
    trace = import_trace(write(tmp_path / "a.json", response), top_k=2, num_experts=EXPERTS)
    assert trace.expert_ids.tolist() == ids.tolist()
    assert trace.position.tolist() == list(range(100, 200))
    assert trace.stage.tolist() == [PREFILL] * 50 + [DECODE] * 50
    assert trace.layer_ids.tolist() == list(range(24))
    # the same where the response does not say so, and the number of layers is given
    del response["meta_info"]["routed_experts_start_len"]
    path = write(tmp_path / "b.json", response)
    again = import_trace(path, top_k=2, num_experts=EXPERTS, num_layers=24)
    assert again.same_content(trace)
    with pytest.raises(TraceError, match=r"16 more.*give the right top_k= and num_layers="):
        import_trace(path, top_k=2, num_layers=23)
    response["meta_info"]["routed_experts_start_len"] = 100
    write(path, response)
    with pytest.raises(
        TraceError, match=r"start_len \(100\).*give the right top_k= and num_layers="
    ):
        import_trace(path, top_k=2, num_layers=12)


def test_responses_of_unknown_start_and_layers_are_not_guessed_at(tmp_path, caplog):
    """Two responses that make different numbers of layers were an error about models; [D4]
    one made a number of layers without a word."""
    both = [generated(picks(9), 5, 5), generated(picks(8), 5, 12)]
    path = write(tmp_path / "t.json", both)
    with pytest.raises(TraceError, match=r"found 3 layers, and 6 in .*give num_layers"):
        import_trace(path, top_k=2, num_experts=EXPERTS)
    trace = import_trace(path, top_k=2, num_layers=LAYERS, num_experts=EXPERTS)
    assert trace.position.tolist() == [*range(9), *range(8, 16)]
    with caplog.at_level(logging.WARNING):
        import_trace(write(path, both[0]), top_k=2, num_experts=EXPERTS)
    assert "does not say at which token it begins" in caplog.text
    assert "makes 6 layers; pass num_layers" in caplog.text


@pytest.mark.parametrize(("right", "wrong"), [(4, 2), (6, 2), (8, 4)])
def test_too_small_a_top_k_is_said(tmp_path, right, wrong):
    """Half the right top_k doubled the layers without a word. [D4]"""
    path = write(tmp_path / "t.json", generated(picks(200, top_k=right), 150, 51))
    assert import_trace(path, top_k=right).layer_ids.tolist() == list(range(LAYERS))
    with pytest.raises(TraceError, match=f"top_k = {wrong} is too small"):
        import_trace(path, top_k=wrong)


def test_too_large_a_top_k_is_said(tmp_path):
    """Twice the right top_k ended in "expert twice" without a hint. [D4]"""
    path = write(tmp_path / "t.json", generated(picks(200), 150, 51))
    with pytest.raises(TraceError, match=r"twice .*read with top_k = 4: is that right"):
        import_trace(path, top_k=4)


@pytest.mark.parametrize("place", ["sgl_ext", "sglext", "meta_info", "response"])
def test_openai_responses_of_sglang(tmp_path, place):
    """They were taken for vLLM's: "start vLLM with ...". [D4]"""
    ids = picks(7)
    spot = {"routed_experts": flat(ids), "prompt_tokens": 5, "completion_tokens": 3}
    response = {"choices": [{"index": 0}], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}
    if place == "response":
        response["sglext"] = {"routed_experts": flat(ids)}
    else:
        response["choices"][0][place] = (
            spot if place == "meta_info" else {"routed_experts": flat(ids)}
        )
    path = write(tmp_path / "t.json", response)
    assert find_format(path) == "sglang"
    trace = import_trace(path, top_k=2, num_experts=EXPERTS)
    assert trace.expert_ids.tolist() == ids.tolist()
    assert trace.stage.tolist() == [PREFILL] * 5 + [DECODE] * 2


def test_choices_that_share_one_usage_need_the_layers(tmp_path):
    """Nothing says how many tokens each of several choices has. [D4]"""
    one, other = picks(7), picks(9, 1)
    response = {
        "choices": [{"sgl_ext": {"routed_experts": flat(ids)}} for ids in (one, other)],
        "usage": {"prompt_tokens": 5, "completion_tokens": 8},
    }
    path = write(tmp_path / "t.json", response)
    with pytest.raises(TraceError, match="several choices share one usage: give num_layers"):
        import_trace(path, top_k=2)
    trace = import_trace(path, top_k=2, num_layers=LAYERS, num_experts=EXPERTS)
    assert trace.expert_ids.tolist() == [*one.tolist(), *other.tolist()]


# -- layers that hold nothing --


def test_empty_layers_are_named_when_they_are_left_out(tmp_path, caplog):
    """They went without a word. [D4]"""
    np.save(tmp_path / "t.npy", picks(9, dense=[0, 3]))
    with caplog.at_level(logging.WARNING):
        trace = import_trace(tmp_path / "t.npy", num_experts=EXPERTS)
    assert trace.layer_ids.tolist() == [1, 2, 4, 5]
    assert "left out layers 0, 3, which hold no picks" in caplog.text


def test_dense_layers_of_a_top_1_model(tmp_path, caplog):
    """Dense layers became layers that always pick expert 0, without a word. [D5]"""
    ids = picks(50, top_k=1, dense=[0, 2, 4])
    np.save(tmp_path / "t.npy", ids)
    with caplog.at_level(logging.WARNING):
        trace = import_trace(tmp_path / "t.npy", num_experts=EXPERTS)
    assert trace.layer_ids.tolist() == list(range(LAYERS))
    assert "in layers 0, 2, 4 every token picks expert 0" in caplog.text
    trace = import_trace(tmp_path / "t.npy", num_experts=EXPERTS, layers=[1, 3, 5])
    assert trace.layer_ids.tolist() == [1, 3, 5]
    assert trace.expert_ids.tolist() == ids[:, 1::2].tolist()
    with pytest.raises(TraceError, match=r"found 6 layers in .* one numbered 6"):
        import_trace(tmp_path / "t.npy", layers=[1, 6])


@pytest.mark.parametrize("top_k", [1, 2])
def test_an_array_of_zeros_is_said(tmp_path, top_k):
    """ "found no routed token" did not say what was found; [E4]
    with one pick it was a trace."""
    np.save(tmp_path / "t.npy", np.zeros((5, 4, top_k), np.int16))
    with pytest.raises(TraceError, match="every pick is 0"):
        import_trace(tmp_path / "t.npy")


# -- several files --


def folder_of(path, count=6):
    for number in range(count):
        folder = path / ("math", "law")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{number + 40}.npy", picks(5 + number, number))
    return path


def domains(trace):
    return {
        int(request): trace.domain[domain] if domain >= 0 else None
        for request, domain in zip(trace.request_id, trace.domain_id, strict=True)
    }


def test_a_directory_of_one_array_per_request_is_one_trace(tmp_path):
    """A directory was refused, and so were several files. [E4]"""
    source = folder_of(tmp_path / "in")
    trace = import_trace(source, num_experts=EXPERTS)
    assert domains(trace) == {40 + i: ("math", "law")[i % 2] for i in range(6)}
    for number in range(6):
        rows = trace.request_id == 40 + number
        assert trace.expert_ids[rows].tolist() == picks(5 + number, number).tolist()
        assert trace.position[rows].tolist() == list(range(5 + number))
    files = sorted(source.rglob("*.npy"))
    listed = import_trace(files, num_experts=EXPERTS)
    assert set(listed.request_id.tolist()) == set(range(40, 46))
    assert listed.domain == ()
    summary = import_to(source, tmp_path / "out", num_experts=EXPERTS)
    assert (summary["requests"], summary["left_out"]) == (6, [])
    assert read_trace(tmp_path / "out").same_content(trace)


@pytest.mark.parametrize("form", ["csv", "json"])
def test_a_table_gives_request_ids_and_domains(tmp_path, form):
    """Names of files, of arrays in an .npz and of responses are known to it. [E4]"""
    np.savez(tmp_path / "arrays.npz", first=picks(5), second=picks(6, 1))
    if form == "csv":
        table = tmp_path / "t.csv"
        table.write_text("name,request_id,domain\nfirst,7,law\narrays/second,9,\n")
    else:
        table = write(
            tmp_path / "t.json",
            {"first": {"request_id": 7, "domain": "law"}, "second": {"request_id": 9}},
        )
    trace = import_trace(tmp_path / "arrays.npz", num_experts=EXPERTS, table=table)
    assert domains(trace) == {7: "law", 9: None}
    response = {"id": "first", "choices": [{"routed_experts": picks(5).tolist()}]}
    trace = import_trace(write(tmp_path / "r.json", response), num_experts=EXPERTS, table=table)
    assert domains(trace) == {7: "law"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "file,domain\nx,law\n", "the columns"),
        ("t.csv", "name,request_id\nfirst,x\n", "one entry per name"),
        ("t.csv", "name,request_id\nfirst,1\nfirst,2\n", "one entry per name"),
        ("t.csv", "name,request_id\nfirst,1\nsecond,1\n", "request id 1 for two requests"),
        ("t.json", "[]", "no entry in the table"),
        ("t.json", '{"first": 3}', "one entry per name"),
    ],
)
def test_wrong_tables_are_named(tmp_path, name, text, message):
    """A table that does not fit is no guess. [E4]"""
    np.savez(tmp_path / "arrays.npz", first=picks(5), second=picks(6, 1))
    (tmp_path / name).write_text(text)
    with pytest.raises(TraceError, match=message):
        import_trace(tmp_path / "arrays.npz", num_experts=EXPERTS, table=tmp_path / name)


def broken_files(folder):
    good = picks(8, 3)
    np.save(folder / "shape.npy", picks(4, layers=5))
    np.save(folder / "twice.npy", np.where(np.arange(LAYERS)[:, None] == 1, 3, good))
    np.save(folder / "zeros.npy", np.zeros_like(good))
    np.save(folder / "hole.npy", picks(8, 3, dense=[2]))
    np.save(folder / "high.npy", good + EXPERTS)
    np.save(folder / "floats.npy", good.astype(float))
    (folder / "cut.npy").write_bytes((folder / "zeros.npy").read_bytes()[:150])
    (folder / "line.jsonl").write_text('{"id": 1, "choi\n')
    return [path.name for path in folder.iterdir()]


def test_a_broken_request_is_named_and_left_out(tmp_path, caplog):
    """One damaged array among a thousand refused the whole import. [E4]"""
    source = tmp_path / "in"
    source.mkdir()
    names = broken_files(source)
    for number in range(12):
        np.save(source / f"good{number}.npy", picks(5, number))
    with caplog.at_level(logging.WARNING):
        summary = import_to(source, tmp_path / "out", num_experts=EXPERTS, format="vllm")
    assert summary["requests"] == 12
    assert len(summary["left_out"]) == len(names)
    for name in names:
        assert name in caplog.text
    trace = read_trace(tmp_path / "out")
    assert trace.num_layers == LAYERS
    assert trace.num_tokens == 12 * 5
    for path in source.glob("good*"):
        path.unlink()
    with pytest.raises(TraceError):
        import_trace(source, num_experts=EXPERTS, format="vllm")


def test_a_broken_line_or_choice_is_left_out(tmp_path):
    """The same for lines of a file and choices of a response. [E4]"""
    good = {"choices": [{"routed_experts": picks(5, i).tolist()} for i in range(3)]}
    good["choices"].insert(1, {"routed_experts": "!!"})
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join([json.dumps(good), '{"choices": [{"rou', json.dumps(good)]))
    summary = import_to(path, tmp_path / "out", num_experts=EXPERTS)
    assert summary["requests"] == 6
    assert [text.split(": ")[0] for text in summary["left_out"]] == [
        f"{path}, line 1, choice 1",
        f"{path}, line 2",
        f"{path}, line 3, choice 1",
    ]


def test_several_files_of_other_formats_are_numbered_on(tmp_path):
    """One llama.cpp log per prompt: requests do not fall together. [E4]"""
    for number in range(3):
        rows = [f"{layer},{e}" for layer in (1, 2) for e in (number, number + 1)]
        (tmp_path / f"p{number}.csv").write_text("\n".join(["layer,expert", *rows]))
    (tmp_path / "p3.csv").write_text("layer,expert\nx\n")
    summary = import_to(sorted(tmp_path.glob("p*.csv")), tmp_path / "out", top_k=2, num_experts=8)
    assert (summary["requests"], summary["tokens"]) == (3, 3)
    assert "p3.csv" in summary["left_out"][0]
    assert read_trace(tmp_path / "out").request_id.tolist() == [0, 1, 2]


def test_files_of_different_formats_are_refused(tmp_path):
    """Several files are one trace only where one reader reads them. [E4]"""
    np.save(tmp_path / "a.npy", picks(3))
    (tmp_path / "b.csv").write_text("layer,expert\n1,2\n")
    with pytest.raises(TraceError, match="formats llamacpp, vllm, expected one"):
        import_trace(tmp_path)


@pytest.mark.parametrize("suffix", ["npz", "json", "jsonl"])
def test_files_that_say_other_numbers_of_experts_are_refused(tmp_path, suffix):
    """A trace of layers with 4 experts next to one with 8 counted as 8. [D3]"""
    for name, experts in (("small", 4), ("large", 8)):
        ids = picks(5, layers=1, experts=experts)
        header = {"num_experts": experts, "layer_ids": [0], "top_k": TOP_K}
        tokens = [
            {"request_id": 0, "position": i, "expert_ids": row}
            for i, row in enumerate(ids.tolist())
        ]
        path = tmp_path / f"{name}.{suffix}"
        if suffix == "jsonl":
            path.write_text("\n".join(json.dumps(line) for line in (header, *tokens)))
        else:
            write(path.with_suffix(".json"), {**header, "tokens": tokens})
        if suffix == "npz":
            write_trace(import_trace(path.with_suffix(".json")), path)
            path.with_suffix(".json").unlink()
    with pytest.raises(TraceError, match=r"8 in .*large.*, 4 in .*small.*expected one"):
        import_trace(tmp_path)
    assert import_trace(tmp_path / f"small.{suffix}").num_experts == 4


# -- slime, counts --


def test_slime_rollouts(tmp_path):
    """There was no reader of them. [E4]"""
    for rollout in range(2):
        samples = [
            {
                "index": 10 * rollout + i,
                "prompt": "x",
                "tokens": list(range(9)),
                "response_length": 4,
                "rollout_routed_experts": torch.tensor(
                    picks(8, 10 * rollout + i), dtype=torch.int32
                ),
                "status": "completed",
                "metadata": {},
                "spec_info": {"spec_verify_ct": 0},
            }
            for i in range(3)
        ]
        samples[1]["rollout_routed_experts"] = (
            None if rollout else samples[1]["rollout_routed_experts"]
        )
        torch.save({"rollout_id": rollout, "samples": samples}, tmp_path / f"{rollout}.pt")
    assert find_format(tmp_path / "0.pt") == "slime"
    summary = import_to(tmp_path, tmp_path / "out", num_experts=EXPERTS)
    assert summary["requests"] == 5
    assert "1.pt, sample 1: found no rollout_routed_experts" in summary["left_out"][0]
    trace = read_trace(tmp_path / "out")
    first = trace.request_id == 0
    assert trace.expert_ids[first].tolist() == picks(8).tolist()
    assert trace.stage[first].tolist() == [PREFILL] * 5 + [DECODE] * 3
    write(tmp_path / "t.json", {"12": {"request_id": 99}})
    named = import_trace(tmp_path / "1.pt", num_experts=EXPERTS, table=tmp_path / "t.json")
    assert named.expert_ids[named.request_id == 99].tolist() == picks(8, 12).tolist()


@pytest.mark.parametrize("steps", [False, True])
def test_logical_counts_in_json(tmp_path, steps):
    """The JSON that SGLang takes as --init-expert-location was not known. [E4]"""
    counts = np.array([[0, 0, 0], [1, 2, 3], [4, 0, 1]])
    content = {"logical_count": ([counts, counts] if steps else counts)}
    path = tmp_path / "t.json"
    path.write_text(json.dumps(content, default=np.ndarray.tolist))
    trace = import_trace(path, model="m")
    assert (trace.kind, trace.num_experts, trace.layer_ids.tolist()) == ("load", 3, [1, 2])
    assert trace.expert_load.tolist() == [counts[1:].tolist()] * (1 + steps)
    write(path, {"logical_count": [[[0.5]]]})
    with pytest.raises(TraceError, match="logical_count as float64"):
        import_trace(path)
