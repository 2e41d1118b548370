"""The engine on one rank: what it takes, refuses and returns, on a tiny whole model."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer import store_experts
from moe_locality.quantization import fake_quantize
from moe_locality.trace import read_trace

transformers = pytest.importorskip("transformers")
serving = pytest.importorskip("moe_locality.serving", reason="transformers before 5.23")

from tests.unit.trace.families import build, families, inputs  # noqa: E402

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
}
LIMITS = {"max_num_seqs": 3, "max_num_batched_tokens": 16, "max_model_len": 40}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, sliding_window=None)
    return transformers.MixtralForCausalLM(config).eval()


class Letters:
    """A tokenizer: token t is the character number t of its alphabet."""

    alphabet = "".join(chr(33 + i) for i in range(64))

    def __call__(self, text):
        return {"input_ids": [self.alphabet.index(letter) for letter in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(self.alphabet[i] for i in ids)


def engine_of(model, tokenizer=None, **options):
    limits = serving.Limits(**{**LIMITS, **options.pop("limits", {})})
    return serving.Engine(model, tokenizer, limits=limits, **options)


def greedy(model, ids, count):
    output = model.generate(
        torch.tensor([ids]),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return output[0, len(ids) :].tolist()


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 64, rng.integers(1, 25)).tolist() for _ in range(count)]


def test_generate_takes_texts_tokens_dicts_and_requests(model):
    params = serving.SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    ids = prompts(1)[0]
    text = Letters().decode(ids)
    given = [
        text,
        ids,
        {"prompt": text, "request_id": "a", "temperature": 0, "max_tokens": 4},
        {"prompt_token_ids": ids, "sampling_params": {"temperature": 0, "max_tokens": 4}},
        serving.Request(request_id=9, prompt_token_ids=ids, sampling_params=params),
    ]
    outputs = list(engine_of(model, Letters()).generate(given, params))
    wanted = greedy(model, ids, 4)
    assert sorted(map(str, (output.request_id for output in outputs))) == ["0", "1", "3", "9", "a"]
    for output in outputs:
        assert output.prompt_token_ids == ids
        assert output.outputs[0].token_ids == wanted
        assert output.outputs[0].text == Letters().decode(wanted)
        assert output.outputs[0].finish_reason == "length"
        assert json.loads(output.to_json())["outputs"][0]["token_ids"] == wanted


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_token_ids": []},
        {"prompt_token_ids": [64]},
        {"prompt_token_ids": [1.5]},
        {"prompt_token_ids": ["x"]},
        {"prompt_token_ids": [float("inf")]},
        {"prompt_token_ids": 5},
        {"prompt": "ab", "prompt_token_ids": [1]},
        {"prompt": 5},
        {},
        {"prompt_token_ids": [1], "temprature": 1},
        {"prompt_token_ids": [1], "max_tokens": 0},
        {"prompt_token_ids": [1], "sampling_params": [3]},
        {"prompt_token_ids": [1], "request_id": [3]},
        {"prompt_token_ids": [1] * 40},
        {"prompt_token_ids": [1] * 20, "max_tokens": 11},  # than the room of the caches
        {"prompt_token_ids": [1], "n": 4},
        {"prompt_token_ids": [1], "temperature": "hot"},
        {"prompt_token_ids": [1], "temperature": 10**400},
        {"prompt_token_ids": [1], "top_k": 10**30},
        {"prompt_token_ids": [1], "n": True},
        {"prompt_token_ids": [1], "stop": 5},
        {"prompt_token_ids": [1], "domain": 5},
        {"prompt_token_ids": [1], "domain": ["a"]},
        {"prompt_token_ids": [1], "request_id": True},
        {"prompt_token_ids": [1], "request_id": 2**63},
        {"prompt_token_ids": [1], "request_id": -(10**5000)},
        None,
        5,
    ],
)
def test_generate_refuses_a_wrong_request_alone(model, wrong):
    good = {"prompt_token_ids": [1, 2], "temperature": 0, "max_tokens": 3}
    engine = engine_of(model, Letters(), limits={"max_num_kv_tokens": 30})
    outputs = list(engine.generate([good, wrong, good]))
    refused = [output for output in outputs if output.error]
    assert len(refused) == 1
    assert refused[0].error.startswith("found ")
    assert "expected" in refused[0].error
    served = [output.outputs[0].token_ids for output in outputs if not output.error]
    assert served == [greedy(model, [1, 2], 3)] * 2


def test_generate_refuses_texts_without_a_tokenizer(model):
    stops = {"prompt_token_ids": [1], "stop": "ab"}
    text, stop = engine_of(model).generate(["ab", stops])
    assert text.error.startswith("found prompt as a text and no tokenizer")
    assert stop.error.startswith("found stop as a text and no tokenizer")


BAD_LINES = [
    b'{"prompt_token_ids": [1], "request_id": 18446744073709551616}',
    b'{"prompt_token_ids": [1], "request_id": true}',
    b'{"prompt_token_ids": [1], "domain": 5}',
    b'{"prompt_token_ids": [1], "domain": ["a"]}',
    b'{"prompt_token_ids": [1], "domain": "\\ud800"}',
    b'{"prompt_token_ids": [1], "request_id": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"prompt_token_ids": [1], "max_tokens": Infinity}',
    b'{"prompt_token_ids": [1], "seed": 1e400}',
    b'{"prompt_token_ids": [1], "stop_token_ids": [[2]]}',
    b'{"prompt_token_ids": ' + b"[" * 900 + b"]" * 900 + b"}",
    b'{"prompt": "\xff"}',
    b"[" * 100_000,
    b"no json",
]


def test_serve_file_refuses_a_wrong_line_alone(model, tmp_path):
    """The line before each and behind it is served, recorded too; a mark of the order of bytes is
    no part of the first; a line without an id has none that another request may have.
    """
    import moe_locality
    from moe_locality.serving.jobs import read_results, serve_file

    good = b'{"prompt_token_ids": [1, 2], "temperature": 0, "max_tokens": 3, "request_id": %d}'
    lines = [good % 0]
    for number, bad in enumerate(BAD_LINES, start=1):
        lines += [bad, good % number]
    lines += [b'{"prompt_token_ids": [1, 2], "domain": "", "request_id": "\\ud800"}', b"[3]"]
    file, out = tmp_path / "in.jsonl", tmp_path / "out"
    file.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    with moe_locality.attach(model, tmp_path / "trace"):
        total = serve_file(engine_of(model), file, out)
    assert (total["served"], total["refused"]) == (len(BAD_LINES) + 3, len(BAD_LINES))
    results = list(read_results(out))
    served = {r["request_id"]: r["outputs"][0]["token_ids"] for r in results if not r["error"]}
    wanted = greedy(model, [1, 2], 3)
    assert [served[number] for number in range(len(BAD_LINES) + 1)] == [wanted] * (len(served) - 2)
    assert served.keys() - range(len(served)) == {"\ud800", f"line {len(lines)}"}
    refused = [r["request_id"] for r in results if r["error"]]
    assert refused[-3:] == [f"line {len(lines) - after}" for after in (7, 5, 3)]
    assert read_trace(tmp_path / "trace").num_rows == total["tokens"] + len(served) - 1
    total = serve_file(engine_of(model), file, out)
    assert (total["served"], total["refused"]) == (0, len(BAD_LINES))


def test_serve_file_counts_what_a_drain_leaves_and_shares_no_results(model, tmp_path):
    """All lines that have not begun are unserved, those too that the engine had not taken; a job
    that finds another one at its results ends before it reads its model.
    """
    from typer.testing import CliRunner

    from moe_locality.cli import app
    from moe_locality.serving.jobs import lock_results, read_results, serve_file

    file, out = tmp_path / "in.jsonl", tmp_path / "out"
    line = '{"prompt": [1, 2], "max_tokens": 2, "request_id": %d}\n'
    file.write_text("".join(line % number for number in range(40)))
    engine = engine_of(model)
    total = serve_file(engine, file, out, on_result=lambda result: engine.drain())
    assert 0 < total["served"] <= 2 * LIMITS["max_num_seqs"]
    assert total["served"] + total["unserved"] == 40
    before = list(read_results(out))
    with lock_results(out, 0):
        with pytest.raises(ConfigError, match=r"found a job that is running and writes .*rank-0"):
            serve_file(engine_of(model), file, out)
        words = ["serve", str(file), "--model", str(tmp_path / "none"), "--out", str(out)]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 1
        assert "found a job that is running" in done.output
    assert list(read_results(out)) == before
    assert serve_file(engine_of(model), file, out)["served"] == total["unserved"]


def test_engine_names_the_choices_of_homes_and_watch(model):
    from moe_locality.commands.serve import _online

    for homes in ("first:x", "first:0", "nearest"):
        with pytest.raises(ConfigError, match=f"found homes='{homes}', expected arrival, pred"):
            engine_of(model, homes=homes)
    with pytest.raises(ConfigError, match="found --watch x, expected one of off, propose, apply"):
        _online("x", 500, 0.1)


def test_engine_refuses_a_plan_of_another_model(model, tmp_path):
    """On one rank a plan for any number of ranks is taken, from its file too."""
    from moe_locality.placement.plan import PlacementPlan

    plan = PlacementPlan.linear(4, range(2), 2, 2)
    engine_of(model, plan=plan.write(tmp_path / "plan.json"))
    other = dataclasses.replace(plan, provenance={"model_type": "qwen3_moe"})
    with pytest.raises(
        PlacementError, match="the plan does not fit: model_type: found 'qwen3_moe'"
    ):
        engine_of(model, plan=other)
    with pytest.raises(PlacementError, match="found a int as the plan"):
        engine_of(model, plan=5)


def test_generate_ends_at_stop_tokens_stop_texts_and_the_models_own(model):
    ids = prompts(1, seed=3)[0]
    plain = greedy(model, ids, 12)
    letters = Letters()
    base = {"prompt_token_ids": ids, "temperature": 0, "max_tokens": 12}
    token = plain[4]
    cut = plain.index(token) + 1
    engine = engine_of(model, letters)
    (output,) = engine.generate([{**base, "stop_token_ids": [token]}])
    assert output.outputs[0].token_ids == plain[:cut]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", token)
    stop = letters.decode(plain[3:5])
    (output,) = engine.generate([{**base, "stop": stop}])
    whole = letters.decode(plain)
    assert output.outputs[0].text == whole[: whole.index(stop)]
    assert output.outputs[0].stop_reason == stop
    engine.eos = frozenset([token])
    (output,) = engine.generate([base])
    assert output.outputs[0].token_ids == plain[:cut]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)
    (output,) = engine.generate([{**base, "ignore_eos": True}])
    assert output.outputs[0].token_ids == plain


def test_generate_samples_the_same_tokens_in_any_batch(model):
    requests = [
        {"prompt_token_ids": ids, "request_id": i, "seed": i, "max_tokens": 8, "n": 1 + i % 3}
        for i, ids in enumerate(prompts(8, seed=1))
    ]
    together = {o.request_id: o for o in engine_of(model).generate(requests)}
    for request in requests:
        (alone,) = engine_of(model, limits={"max_num_batched_tokens": 5}).generate([request])
        found = [c.token_ids for c in together[request["request_id"]].outputs]
        assert found == [c.token_ids for c in alone.outputs]
        assert len({tuple(tokens) for tokens in found}) == request["n"]


def test_generate_returns_log_probabilities(model):
    request = {"prompt_token_ids": [3, 4, 5], "temperature": 0, "max_tokens": 4, "logprobs": 2}
    (output,) = engine_of(model).generate([request])
    found = output.outputs[0]
    ids = [3, 4, 5]
    for token, logs in zip(found.token_ids, found.logprobs, strict=True):
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        best = wanted.topk(2).indices.tolist()
        assert logs == pytest.approx({i: float(wanted[i]) for i in best}, abs=1e-4)
        ids.append(token)
    chosen = [logs[t] for t, logs in zip(found.token_ids, found.logprobs, strict=True)]
    assert found.cumulative_logprob == pytest.approx(sum(chosen))


def test_generate_streams_tokens_and_takes_requests_as_there_is_room(model):
    seen, taken = [], []

    def source():
        for number, ids in enumerate(prompts(9, seed=5)):
            taken.append(len(seen))
            yield {"prompt_token_ids": ids, "request_id": number, "max_tokens": 6, "seed": number}

    engine = engine_of(model, on_token=lambda s, token: seen.append((s.request.request_id, token)))
    outputs = list(engine.generate(source()))
    assert taken[-1] > 0
    for output in outputs:
        mine = [token for number, token in seen if number == output.request_id]
        assert mine == output.outputs[0].token_ids


@pytest.mark.parametrize("grouping", ["cosine", "experts"])
def test_generate_gives_the_same_tokens_in_any_grouping(model, grouping):
    requests = [
        {"prompt_token_ids": ids, "request_id": i, "temperature": 0, "max_tokens": 2 + i % 7}
        for i, ids in enumerate(prompts(14, seed=9))
    ]
    plain = {o.request_id: o for o in engine_of(model).generate(requests)}
    steps = []
    limits = {"max_num_ready": 6}
    engine = engine_of(model, limits=limits, grouping=grouping, on_step=steps.append)
    outputs = list(engine.generate(requests))
    assert len(outputs) == 14
    for output in outputs:
        assert output.outputs[0].token_ids == plain[output.request_id].outputs[0].token_ids
    order = [output.request_id for output in outputs]
    assert order != list(plain)  # other requests ran together
    for step in steps:
        assert (step["distinct"] is not None) == (step["kind"] == "decode")
        assert step["distinct"] is None or 2 <= step["distinct"] <= 4


def test_generate_is_recorded_with_requests_positions_and_stages(model, tmp_path):
    import moe_locality

    requests = [
        {"prompt_token_ids": ids, "request_id": 50 + i, "temperature": 0, "max_tokens": 5}
        for i, ids in enumerate(prompts(5, seed=7))
    ]
    engine = engine_of(model)
    with moe_locality.attach(model, tmp_path / "trace"):
        outputs = {o.request_id: o for o in engine.generate(requests)}
    trace = read_trace(tmp_path / "trace")
    for request in requests:
        mine = trace.request_id == request["request_id"]
        prompt = len(request["prompt_token_ids"])
        tokens = len(outputs[request["request_id"]].outputs[0].token_ids)
        assert sorted(trace.position[mine]) == list(range(prompt + tokens - 1))
        assert (trace.stage[mine] == 0).sum() == prompt
        assert (trace.stage[mine] == 1).sum() == tokens - 1


def test_engine_refuses_caches_that_it_cannot_join():
    config = transformers.DeepseekV32Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, first_k_dense_replace=1,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, intermediate_size=16,
        n_routed_experts=4, index_n_heads=2, index_head_dim=16,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="DynamicIndexedLayer"):
        engine_of(transformers.DeepseekV32ForCausalLM(config))


def test_engine_refuses_models_with_a_cache_of_their_own():
    sizes = {**SIZES, "head_dim": 8, "layer_types": ["full_attention", "linear_attention"]}
    with pytest.raises(ConfigError, match="MiniMax"):
        engine_of(transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(**sizes)))


@pytest.mark.parametrize("watch", ["propose", "wrong"])
def test_engine_refuses_to_watch_what_it_cannot_place(model, watch):
    with pytest.raises(ConfigError, match=f"found watch='{watch}' for 0 layers on 1 ranks"):
        engine_of(model, watch=watch)


def test_engine_takes_what_the_model_allows():
    """[F17.1] Lengths come from the model; a loss over the router's logits is no part of a step."""
    config = transformers.MixtralConfig(
        **SIZES, sliding_window=None, max_position_embeddings=24, output_router_logits=True
    )
    torch.manual_seed(0)
    small = transformers.MixtralForCausalLM(config).eval()
    with pytest.raises(ConfigError, match="found max_model_len=40, expected at most 24"):
        engine_of(small)
    engine = serving.Engine(small)
    assert (engine.limits.max_model_len, engine.limits.kv_room) == (24, 16 * 24)
    given = {"prompt": [1, 2, 3], "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    long = {"prompt_token_ids": [1] * 24}
    done = {output.request_id: output for output in engine.generate([given, long])}
    assert "expected fewer than max_model_len=24" in done[1].error
    small.config.output_router_logits = False
    assert done[0].outputs[0].token_ids == greedy(small, [1, 2, 3], 5)


@pytest.mark.parametrize("payload", ["none", "fp8", "mxfp8", "mxfp4"])
@pytest.mark.parametrize("combine_payload", ["none", "mxfp8"])
def test_copy_bytes_are_those_of_the_coded_rows(payload, combine_payload):
    """What a watch takes for the price of a copy is what the exchange sends."""
    from moe_locality.config import DispatchConfig
    from moe_locality.dispatch.transport import Codec
    from moe_locality.serving.watch import copy_bytes

    config = DispatchConfig(payload=payload, combine_payload=combine_payload)
    row = torch.ones(1, 200, dtype=torch.bfloat16)
    sent = [Codec.of_payload(name).encode(row) for name in (payload, combine_payload)]
    assert copy_bytes(config, 200, 2) == sum(coded.nbytes for coded in sent)


def with_rounded_experts(model, name):
    """The same whole model with the experts' matrices as a format holds them, in place."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False) if hasattr(module, "has_gate") else ():
            if parameter.ndim > 2:
                data = parameter.data.mT if module.is_transposed else parameter.data
                rows = torch.stack([fake_quantize(row, name, role="weight") for row in data])
                parameter.data = rows.mT.contiguous() if module.is_transposed else rows
    return model


@pytest.mark.parametrize(("family", "name"), [("Mixtral", "nvfp4"), ("GptOss", "mxfp4-mbs-h")])
def test_engine_keeps_experts_in_low_bits(family, name):
    """[F17.5] On a whole model: less memory, the logits and tokens of rounded weights bit for bit;
    no training, no state dict, no second store.
    """
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, head_dim=8)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    rounded = with_rounded_experts(copy.deepcopy(model), name)
    plain = sum(p.nbytes for n, p in model.named_parameters() if ".experts." in n)
    with pytest.raises(ConfigError, match="int4"):
        engine_of(model, expert_store="int4")
    engine = engine_of(model, expert_store=name)
    stored = sum(b.nbytes for n, b in model.named_buffers() if ".experts." in n)
    assert not [n for n, _ in model.named_parameters() if ".experts." in n]
    assert 5 < plain / stored < 8
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, rounded(ids).logits)
    (done,) = engine.generate([[1, 2, 3]], serving.SamplingParams(temperature=0, max_tokens=5))
    assert done.outputs[0].token_ids == greedy(rounded, [1, 2, 3], 5)
    with pytest.raises(ConfigError, match=f"need gradients at an expert stored in {name}"):
        model(ids)
    for what in (model.state_dict, lambda: model.load_state_dict(rounded.state_dict())):
        with pytest.raises(ConfigError, match=f"experts stored in {name}, expected neither"):
            what()
    with pytest.raises(ConfigError, match=f"found experts stored in {name} already"):
        engine_of(model, expert_store="mxfp8")


NOT_STORED = {"dbrx", "doge", "jetmoe", "llama4", "longcat_flash", "nllb_moe", "step3p7"}
NOT_STORED |= {"switch_transformers", "vitpose", "vitpose_backbone"}
REFUSED = {
    *(
        "axk2",
        "deepseek_v32",
        "deepseek_v4",
        "diffusion_gemma",
        "doge",
        "dots3_note",
        "glm_moe_dsa",
    ),
    *("hy_v4", "hy_v4_vl", "llama4", "minimax", "mistral_large4", "nllb_moe", "unlimited_ocr"),
    "switch_transformers",
    # none of their two tiny layers has full attention
    *("jamba", "qwen3_5_moe", "qwen3_next", "qwen4_exp"),
}
INCOMPLETE = {"qwen3_omni_moe"}  # generate of the part alone needs what the whole has


@pytest.mark.families
@pytest.mark.parametrize("family", families())
def test_every_family_is_stored_and_decoded_or_refused_by_name(family):
    """[F17.1] [F17.5] Experts in low bits give the results of rounded weights, bit for bit; greedy
    tokens are those of generate.
    """
    model = build(family).eval()
    stored, rounded = copy.deepcopy(model), with_rounded_experts(copy.deepcopy(model), "mxfp8")
    if family in NOT_STORED:
        with pytest.raises(ConfigError, match=r"found no experts in \w+ that can be stored"):
            store_experts(stored, "mxfp8")
    else:
        store_experts(stored, "mxfp8")
        given = inputs(family, model)
        with torch.no_grad():
            assert torch.equal(stored(**given)[0], rounded(**given)[0])
            assert not torch.equal(stored(**given)[0], model(**given)[0])
    if family in REFUSED:
        with pytest.raises(ConfigError, match=r"use model\.generate"):
            engine_of(model)
    elif hasattr(model, "generate") and family not in INCOMPLETE:
        model.generation_config.eos_token_id = None
        prompts = [[5, 6, 7, 8, 9], [11, 12, 13], [21, 3, 4, 5, 6, 7, 8]]
        params = serving.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        for output in engine_of(model).generate(prompts, params):
            wanted = greedy(model, output.prompt_token_ids, 6)
            assert output.outputs[0].token_ids == wanted


def test_lockstep_explains_errors_of_the_backend_alone(model):
    """Out of memory is no lost rank."""
    lockstep = engine_of(model).lockstep
    with pytest.raises(torch.OutOfMemoryError), lockstep.explained("here"):
        raise torch.OutOfMemoryError("too large")
