"""Families of transformers outside its ExpertsInterface: recorded = what their routers picked."""

import types

import numpy as np
import pytest
import torch
import transformers
from transformers.integrations import mxfp4

from moe_locality.errors import TraceError
from moe_locality.trace import read_trace
from moe_locality.trace.recorder import attach

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
EIGHT = torch.arange(1, 17).reshape(2, 8)


def llama4():
    config = transformers.Llama4TextConfig(
        **SMALL,
        intermediate_size=32,
        intermediate_size_mlp=32,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        interleave_moe_layer_step=1,
    )
    return transformers.Llama4ForCausalLM(config)


def dbrx():
    config = transformers.DbrxConfig(
        vocab_size=64,
        d_model=32,
        n_layers=2,
        n_heads=2,
        max_seq_len=64,
        ffn_config={"ffn_hidden_size": 32, "hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
    )
    return transformers.DbrxForCausalLM(config)


def jetmoe():
    config = transformers.JetMoeConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=16,
        intermediate_size=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    return transformers.JetMoeForCausalLM(config)


def longcat():
    config = transformers.LongcatFlashConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_hidden_layers=4,
        num_attention_heads=2,
        ffn_hidden_size=32,
        expert_ffn_hidden_size=16,
        n_routed_experts=4,
        zero_expert_num=2,
        moe_topk=2,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        head_dim=8,
        pad_token_id=0,
    )
    return transformers.LongcatFlashForCausalLM(config)


def switch():
    config = transformers.SwitchTransformersConfig(
        vocab_size=64,
        d_model=32,
        d_kv=16,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        num_experts=4,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        expert_capacity=3,
        decoder_start_token_id=0,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


def nllb():
    config = transformers.NllbMoeConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_experts=4,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
        expert_capacity=64,
        pad_token_id=0,
    )
    return transformers.NllbMoeForConditionalGeneration(config)


def largest(logits, count):
    return np.sort(np.argsort(-logits.detach().float().numpy(), axis=-1)[..., :count], axis=-1)


def of_linear(name, count):
    """Picks by the outputs of the linear layers of this name."""

    def watch(model, seen):
        for path, module in model.named_modules():
            if path.endswith(name):
                module.register_forward_hook(
                    lambda _m, _a, out: seen.append(
                        largest((out[-1] if isinstance(out, tuple) else out).flatten(0, -2), count)
                    )
                )

    return watch


def of_longcat(model, seen):
    for path, module in model.named_modules():
        if path.endswith("router"):
            module.register_forward_hook(
                lambda _m, _a, out: seen.append(np.sort(np.where(out[2] >= 4, -1, out[2]), axis=1))
            )


@pytest.mark.parametrize(
    ("family", "watch"),
    [
        (llama4, of_linear("router", 2)),
        (dbrx, of_linear("router", 2)),
        (jetmoe, of_linear("mlp.router.layer", 2)),
        (longcat, of_longcat),
    ],
    ids=lambda value: getattr(value, "__name__", "")[:8],
)
def test_decoders_outside_the_experts_interface(tmp_path, family, watch):
    """attach() found no MoE layer in these families; picks are those of their routers [F9]."""
    torch.manual_seed(0)
    model, seen = family().eval(), []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
        before = model(EIGHT).logits
        watch(model, seen)
        with attach(model, tmp_path, strict=True):
            after = model(EIGHT).logits
    assert torch.equal(before, after)
    trace = read_trace(tmp_path)
    assert trace.num_experts == 4
    assert (np.sort(trace.expert_ids, axis=2) == np.stack(seen, axis=1)).all()


@pytest.mark.parametrize("family", [switch, nllb], ids=lambda f: f.__name__)
def test_encoders_and_decoders(tmp_path, family):
    """attach() found no MoE layer, and tokens of encoder and decoder are not the same; each has its
    rows, with no pick in the layers of the other [F9]."""
    torch.manual_seed(0)
    model, seen = family().eval(), []
    count = 1 if family is switch else 2
    of_linear("classifier", count)(model, seen)
    with attach(model, tmp_path, strict=True) as recorder, torch.no_grad():
        model(input_ids=EIGHT, decoder_input_ids=EIGHT[:, :5])
    names = recorder.layer_names
    trace = read_trace(tmp_path)
    assert trace.num_tokens == 16 + 10
    for layer, (name, picks) in enumerate(zip(names, seen, strict=True)):
        rows = slice(0, 16) if "encoder" in name.split(".")[0:2] else slice(16, 26)
        found = np.sort(trace.expert_ids[rows, layer], axis=1)
        kept = found >= 0
        assert kept.mean() > 0.5  # the rest is over capacity
        assert (found == picks)[kept].all()


def test_mxfp4_experts_of_gpt_oss(tmp_path, monkeypatch):
    """gpt-oss as a GPU loads it, with MXFP4 experts, was not found; a stand-in for the kernels,
    the module around them is transformers' own [F9]."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **SMALL, intermediate_size=32, head_dim=16, num_local_experts=4, num_experts_per_tok=2
    )
    model, seen = transformers.GptOssForCausalLM(config).eval(), []

    class StandIn(torch.nn.Module):
        num_experts = 4

        def forward(self, hidden_states, routing_data, gather_idx, scatter_idx):
            return hidden_states

    def routing(logits, top_k):
        seen.append(largest(logits, top_k))
        return None, None, None

    monkeypatch.setattr(
        mxfp4,
        "triton_kernels_hub",
        types.SimpleNamespace(routing=types.SimpleNamespace(routing=routing)),
        raising=False,
    )
    for layer in model.model.layers:
        layer.mlp = mxfp4.Mxfp4GptOssMLP(layer.mlp.router, StandIn())
    with attach(model, tmp_path, strict=True), torch.no_grad():
        model(EIGHT)
    trace = read_trace(tmp_path)
    assert trace.num_experts == 4
    assert (np.sort(trace.expert_ids, axis=2) == np.stack(seen, axis=1)).all()


def test_a_router_named_by_hand(tmp_path):
    """The error for models without known routers named no way out: routers= is one [F9]."""

    class Router(torch.nn.Linear):
        pass

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.router = Router(4, 6)

        def forward(self, x):
            return self.router(x)

    model, x = Net(), torch.randn(2, 3, 4)
    with pytest.raises(TraceError, match="routers="):
        attach(model, tmp_path / "none")
    routers = {Router: (6, lambda _module, _args, out: out.flatten(0, 1).topk(2).indices)}
    with attach(model, tmp_path / "hand", strict=True, routers=routers):
        out = model(x)
    found = np.sort(read_trace(tmp_path / "hand").expert_ids[:, 0], axis=1)
    assert (found == largest(out.flatten(0, 1), 2)).all()
