"""The recorder on Hugging Face models: experts behind transformers' ExpertsInterface."""

import numpy as np
import pytest
import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moe_locality.trace import DECODE, PREFILL, read_trace
from moe_locality.trace.recorder import RoutingRecorder, annotate, attach

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def mixtral():
    return MixtralForCausalLM(MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **COMMON))


def qwen3_moe():
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=16,
            head_dim=16,
            mlp_only_layers=[0],
            **COMMON,
        )
    )


def olmoe():
    return OlmoeForCausalLM(OlmoeConfig(num_experts=8, num_experts_per_tok=4, **COMMON))


def gpt_oss():
    return GptOssForCausalLM(
        GptOssConfig(num_local_experts=4, num_experts_per_tok=2, head_dim=16, **COMMON)
    )


FAMILIES = [mixtral, qwen3_moe, olmoe, gpt_oss]


def built(family):
    torch.manual_seed(0)
    return family().eval()


def routers(model):
    """The modules whose output is (logits, scores [T, K], ids [T, K])."""
    return [m for m in model.modules() if type(m).__name__.endswith("TopKRouter")]


def tokens(batch=2, length=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 64, (batch, length), generator=generator)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_ids_are_those_of_the_router_and_logits_stay(tmp_path, family, implementation):
    model = built(family)
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        before = model(tokens()).logits
    chosen = []
    for router in routers(model):
        router.register_forward_hook(lambda _m, _a, out: chosen.append((out[2], out[1])))
    with attach(model, tmp_path, strict=True, weights=True) as recorder, torch.no_grad():
        after = model(tokens()).logits
    assert torch.equal(before, after)
    assert model.get_experts_implementation()[""] == implementation
    trace = read_trace(tmp_path)
    assert trace.num_experts == (4 if family in (mixtral, gpt_oss) else 8)
    assert trace.num_layers == len(chosen) == (2 if family is qwen3_moe else 3)
    assert all(name.endswith("experts") for name in recorder.layer_names)
    for layer, (ids, weights) in enumerate(chosen):
        assert (trace.expert_ids[:, layer] == ids.numpy()).all()
        assert (trace.expert_weights[:, layer] == weights.half().numpy()).all()
    assert trace.position.tolist() == [*range(6), *range(6)]


def test_generate(tmp_path):
    model = built(mixtral)
    prompts = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])
    mask = (prompts != 0).long()
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": 99}
    before = model.generate(prompts, **options)
    with (
        attach(model, tmp_path, strict=True, model="tiny"),
        annotate(request_ids=[10, 20], domains=["code", "law"], stage="generate", mask=mask),
    ):
        after = model.generate(prompts, **options)
    assert torch.equal(before, after)
    trace = read_trace(tmp_path)
    for request, prompt in ((10, 2), (20, 4)):
        mine = trace.filter(requests=[request])
        # the last new token is returned, not run
        assert mine.position.tolist() == list(range(prompt + 3))
        assert mine.stage.tolist() == [PREFILL] * prompt + [DECODE] * 3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_records_once(tmp_path, reentrant):
    torch.manual_seed(0)
    model = mixtral().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    routers(model)[0].register_forward_hook(lambda *_: calls.append(1))
    with attach(model, tmp_path, strict=True) as recorder:
        for seed in range(2):
            model(tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()
        assert len(calls) == 4  # the recomputation did run
        recorder.flush()
        assert recorder.report().recorded_tokens == 24
    assert (read_trace(tmp_path).expert_ids >= 0).all()


def test_local_ids_of_expert_parallelism_are_refused(tmp_path):
    model = built(mixtral)
    # with its own expert parallelism transformers numbers experts locally and marks the others
    routers(model)[1].register_forward_hook(lambda _m, _a, out: (*out[:2], out[2].clamp(max=3) + 1))
    for experts in (m for m in model.modules() if type(m).__name__ == "MixtralExperts"):
        experts.forward = lambda hidden, _ids, _weights: hidden
    recorder = RoutingRecorder(tmp_path)
    recorder.attach(model)
    with torch.no_grad():
        model(tokens(length=32))
    report = recorder.close()
    assert report.recorded_tokens == 0
    assert report.dropped_tokens == 64
    assert "found expert ids" in report.failure
    assert "local ids (expert parallelism inside transformers)" in report.failure


def test_a_relabelled_model_maps_slots_to_logical_ids(tmp_path):
    model = built(mixtral)
    order = np.array([2, 0, 3, 1])
    with attach(model, tmp_path / "a", first_request_id=0, strict=True), torch.no_grad():
        model(tokens())
    for module in model.modules():
        if type(module).__name__ == "MixtralExperts":
            module.slot_to_logical = order
    with attach(model, tmp_path / "b", first_request_id=0, strict=True), torch.no_grad():
        model(tokens())
    plain, mapped = read_trace(tmp_path / "a"), read_trace(tmp_path / "b")
    assert (mapped.expert_ids == order[plain.expert_ids]).all()
