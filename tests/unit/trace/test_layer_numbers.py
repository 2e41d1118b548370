"""One number for an MoE layer: its transformer layer, in recorder, plans and exported maps."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from deepspeed.moe.layer import MoE
from transformers import AutoConfig, AutoModelForCausalLM

from moe_locality.config import TraceConfig
from moe_locality.errors import PlacementError, TraceError
from moe_locality.layer.relabeling import relabel
from moe_locality.layer.state import current_order, layer_ids_of, plan_rows
from moe_locality.placement import PlacementPlan
from moe_locality.placement.export import write_export
from moe_locality.trace import read_trace
from moe_locality.trace.recorder import attach
from moe_locality.trace.recorder.hooks import layer_numbers
from tests.recorder_models import WIDTH

DENSE = ("attn.q.weight", "attn.k.weight", "norm.weight", "mlp.up.weight")
SPARSE = ("attn.q.weight", "attn.k.weight", "norm.weight", "mlp.gate.weight")


def blocks(of_list, kinds):
    """Parameter names of a list of blocks: one letter each, ``d`` dense and ``m`` MoE."""
    return [
        f"{of_list}.{entry}.{name}"
        for entry, kind in enumerate(kinds)
        for name in (SPARSE if kind == "m" else DENSE)
    ]


def t5(of_list, kinds, sublayers):
    attention = ("SelfAttention.q.weight", "SelfAttention.k.weight", "layer_norm.weight")
    last = {"d": "DenseReluDense.wi.weight", "m": "mlp.router.weight"}
    names = []
    for entry, kind in enumerate(kinds):
        for at in range(sublayers - 1):
            names += [f"{of_list}.{entry}.layer.{at}.{name}" for name in attention]
        below = f"{of_list}.{entry}.layer.{sublayers - 1}."
        names += [below + "layer_norm.weight", below + last[kind]]
    return names


SWIN = [
    name
    for stage, kinds in enumerate(("dm", "d", "dmdm"))
    for name in (*blocks(f"layers.{stage}.blocks", kinds), f"layers.{stage}.downsample.weight")
]

RULE = {
    "a list not called layers": (["transformer.h.1.mlp"], blocks("transformer.h", "dmd"), [1]),
    "Megatron": (
        ["language_model.encoder.layers.1.mlp", "language_model.encoder.layers.3.mlp"],
        blocks("language_model.encoder.layers", "dmdm"),
        [1, 3],
    ),
    "encoder and decoder, dense layers of the encoder counted": (
        ["encoder.block.1.layer.1.mlp.experts", "decoder.block.0.layer.2.mlp.experts"],
        [*t5("encoder.block", "dmd", 2), *t5("decoder.block", "md", 3)],
        [1, 3],
    ),
    "one block, sublayers in a list": (
        ["decoder.block.0.layer.2.mlp.experts"],
        t5("decoder.block", "m", 3),
        [0],
    ),
    "stages of blocks": (
        ["layers.0.blocks.1.mlp", "layers.2.blocks.1.mlp", "layers.2.blocks.3.mlp"],
        SWIN,
        [1, 4, 6],
    ),
    "a model in a Sequential": (
        ["1.layers.2.mlp"],
        ["0.weight", *blocks("1.layers", "ddm"), "2.weight"],
        [2],
    ),
    "a Sequential around a model": (["0.layers.2.mlp"], blocks("0.layers", "ddm"), [2]),
    "an MoE layer beside others": (["1"], ["0.weight", "1.gate.weight", "2.weight"], None),
    "no number": (["moe1", "moe2"], ["moe1.gate.weight", "moe2.gate.weight"], None),
    "MoE modules in a list": (["moes.1", "moes.2"], ["moes.0.weight", "moes.1.gate.weight"], None),
    "two in one block": (
        ["layers.1.a", "layers.1.b"],
        [*blocks("layers", "dm"), "layers.1.b.gate.weight"],
        None,
    ),
}


@pytest.mark.parametrize("case", RULE.values(), ids=RULE.keys())
def test_the_number_is_in_the_name(case):
    """Layers counted as 0, 1, 2, ...; the rule of docs/formats.md reads the index [D2]."""
    names, parameters, expected = case
    assert layer_numbers(names, parameters) == expected
    wrapped = [f"module.{name}" for name in names]
    assert layer_numbers(wrapped, [f"module.{name}" for name in parameters]) == expected


COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
LATENT = {
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
DENSE_FIRST = {
    "ernie4_5_moe": ({"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}, [1, 2, 3]),
    "exaone_moe": (
        {
            "num_experts": 4,
            "head_dim": 16,
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        },
        [1, 2, 3],
    ),
    "afmoe": ({"num_experts": 4, "num_dense_layers": 2, "head_dim": 16}, [2, 3]),
    "lfm2_moe": (
        {
            "num_experts": 4,
            "num_dense_layers": 2,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        },
        [2, 3],
    ),
    "kimi_linear": (
        {
            "num_experts": 4,
            "num_experts_per_token": 2,
            "first_k_dense_replace": 1,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **LATENT,
        },
        [1, 2, 3],
    ),
    "deepseek_v3": (
        {
            "n_routed_experts": 4,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "n_group": 1,
            "topk_group": 1,
            **LATENT,
        },
        [1, 2, 3],
    ),
}


@pytest.mark.parametrize("family", DENSE_FIRST)
def test_families_with_dense_layers_first_are_numbered_by_transformer_layer(tmp_path, family):
    """Their layers were recorded as 0, 1, 2, ..., and every exported row was shifted [D2]."""
    options, expected = DENSE_FIRST[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **options})
    model = AutoModelForCausalLM.from_config(config).eval()
    with attach(model, tmp_path / "trace", strict=True), torch.no_grad():
        model(torch.randint(1, 64, (2, 6)), use_cache=False)
    trace = read_trace(tmp_path / "trace")
    assert trace.layer_ids.tolist() == expected
    assert trace.num_tokens == 12
    order = [3, 2, 1, 0]
    plan = PlacementPlan(
        layer_ids=tuple(trace.layer_ids.tolist()),
        num_experts=4,
        num_nodes=2,
        ranks_per_node=1,
        physical_to_logical_map=np.array([order] * trace.num_layers),
    )
    path = write_export(plan, tmp_path / "map.json", "sglang", COMMON["num_hidden_layers"])
    rows = json.loads(path.read_text())["physical_to_logical_map"]
    assert [row == order for row in rows] == [layer in expected for layer in range(4)]


class Block(torch.nn.Module):
    """A transformer block without attention, dense or MoE, on [S, B, D] or [B, S, D]."""

    def __init__(self, moe):
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        expert = torch.nn.Linear(WIDTH, WIDTH)
        options = {"drop_tokens": False, "top2_2nd_expert_sampling": False}
        self.mlp = MoE(WIDTH, expert, num_experts=4, k=2, **options) if moe else expert

    def forward(self, x):
        y = self.mlp(self.norm(x))
        return x + (y[0] if isinstance(y, tuple) else y)


class Gpt(torch.nn.Module):
    """As Megatron-DeepSpeed's: token ids [B, S] in, hidden states [S, B, D]."""

    def __init__(self, kinds="dmdm", depth=1):
        super().__init__()
        torch.manual_seed(0)
        made = [Block(kind == "m") for kind in kinds]
        self.language_model = torch.nn.Module()
        self.language_model.embedding = torch.nn.Embedding(64, WIDTH)
        self.language_model.encoder = torch.nn.Module()
        self.language_model.encoder.layers = torch.nn.ModuleList(made * depth)
        self.loops = 1

    def forward(self, tokens, attention_mask=None):
        x = self.language_model.embedding(tokens).transpose(0, 1)
        for _ in range(self.loops):
            for layer in self.language_model.encoder.layers:
                x = layer(x)
        return x


def requests_of(trace):
    return len(set(trace.request_id.tolist()))


def token_ids(batch=3, length=8, seed=0):
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("how", ["positional", "keyword", "in a dict", "in a list"])
def test_hidden_states_s_b_d_are_found(tmp_path, how):
    """8 sequences of 16 tokens were recorded as 16 of 8, unless sequence_first was said [F2]."""
    model = Gpt()

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return self.model(batch["tokens"] if isinstance(batch, dict) else batch[1])

    ids = token_ids()
    attached = Outer() if how.startswith("in") else model
    with attach(attached, tmp_path, strict=True), torch.no_grad():
        if how == "positional":
            model(ids, torch.ones(1, 1, 8, 8, dtype=torch.bool))
        elif how == "keyword":
            model(tokens=ids)
        else:
            attached({"tokens": ids} if how == "in a dict" else [torch.ones(3, 8), ids])
    trace = read_trace(tmp_path)
    assert (requests_of(trace), trace.num_tokens) == (3, 24)
    assert trace.position.tolist() == [position for position in range(8) for _ in range(3)]


def test_sequence_first_that_is_said_is_not_guessed(tmp_path):
    """A user's word wins over the shapes, in both directions [F2]."""
    for said, sequences in ((False, 8), (True, 3), (None, 3)):
        model, path = Gpt(), str(tmp_path / str(said))
        config = TraceConfig(path=path, sequence_first=said)
        with attach(model, config, strict=True), torch.no_grad():
            model(token_ids())
        assert requests_of(read_trace(path)) == sequences


def test_square_batches_follow_what_earlier_ones_showed(tmp_path):
    """[8, 8] tells nothing: the layout seen before holds [F2]."""
    model = Gpt()
    with attach(model, tmp_path, strict=True), torch.no_grad():
        model(token_ids())
        model(token_ids(batch=8))
    trace = read_trace(tmp_path)
    square = trace.take(np.arange(24, 88))
    assert square.position.tolist() == [position for position in range(8) for _ in range(8)]


def plan_for(layer_ids, seed=0):
    rng = np.random.default_rng(seed)
    return PlacementPlan(
        layer_ids=tuple(layer_ids),
        num_experts=4,
        num_nodes=1,
        ranks_per_node=1,
        physical_to_logical_map=np.stack([rng.permutation(4) for _ in layer_ids]),
    )


def test_rows_of_a_plan_go_to_the_layers_they_name(caplog):
    """Row i went to the i-th MoE layer whatever its number; old plans (0, 1) still fit [D2]."""
    plan = plan_for([1, 3])
    orders = []
    for given in (
        plan,
        dataclasses.replace(
            plan,
            layer_ids=(3, 1),
            physical_to_logical_map=plan.physical_to_logical_map[::-1].copy(),
        ),
        dataclasses.replace(plan, layer_ids=(0, 1)),
    ):
        model = Gpt()
        before = model(token_ids())
        relabel(model, given)
        torch.testing.assert_close(model(token_ids()), before)
        layers = model.language_model.encoder.layers
        orders.append([current_order(layers[at].mlp).tolist() for at in (1, 3)])
    assert orders == [plan.physical_to_logical_map.tolist()] * 3
    assert caplog.text.count("they are taken in order for the MoE layers [1, 3]") == 1
    model = Gpt()
    with pytest.raises(PlacementError, match=r"layer ids: found \(2, 3\) .* expected \(1, 3\)"):
        relabel(model, plan_for([2, 3]))
    with pytest.raises(PlacementError, match="MoE layers: found 1"):
        plan_rows(model, plan_for([1]))
    assert layer_ids_of(model) == ([1, 3], 2)
    unknown = torch.nn.Sequential(*(block.mlp for block in model.language_model.encoder.layers))
    assert plan_rows(unknown, plan_for([5, 9])) == [0, 1]


def test_a_module_at_several_depths_is_as_many_layers(tmp_path):
    """A weight-tied stack split each forward pass: 24 tokens became 72 rows of 12 requests [D6]."""
    model = Gpt("dm", depth=3)
    seen = []
    gate = model.language_model.encoder.layers[1].mlp.deepspeed_moe.gate
    gate.register_forward_hook(lambda _m, _a, out: seen.append(out[3].t().clone()))
    with attach(model, tmp_path, strict=True) as recorder, torch.no_grad():
        for seed in range(2):
            model(token_ids(seed=seed))
    assert len(recorder.layer_names) == 3
    trace = read_trace(tmp_path)
    assert (trace.num_tokens, requests_of(trace)) == (48, 6)
    assert trace.layer_ids.tolist() == [1, 3, 5]
    assert sorted(set(trace.step.tolist())) == [0, 1]
    for forward in range(2):
        for depth in range(3):
            rows = trace.expert_ids[24 * forward : 24 * forward + 24, depth]
            assert (rows == seen[3 * forward + depth].numpy()).all()


def test_another_name_of_a_module_is_no_layer(tmp_path):
    """An attribute that points to an MoE layer does not make it run twice [D6]."""
    model = Gpt()
    model.first_moe = model.language_model.encoder.layers[1].mlp
    with attach(model, tmp_path, strict=True), torch.no_grad():
        model(token_ids())
    assert (read_trace(tmp_path).expert_ids >= 0).all()
    assert read_trace(tmp_path).num_layers == 2


def test_a_module_that_runs_in_a_loop_is_refused_by_name(tmp_path, caplog):
    """A loop over one block was split into forward passes of their own, without a word [D6]."""
    model = Gpt()
    model.loops = 3
    recorder = attach(model, tmp_path / "warned")
    model(token_ids())
    model.loops = 1
    model(token_ids())
    report = recorder.close()
    assert (report.recorded_tokens, report.dropped_tokens, report.skipped_forwards) == (24, 24, 1)
    assert "'language_model.encoder.layers.1.mlp.deepspeed_moe.gate' ran 2 times" in caplog.text
    assert (read_trace(tmp_path / "warned").expert_ids >= 0).all()
    model.loops = 3
    attach(model, tmp_path / "strict", strict=True)
    with pytest.raises(TraceError, match="attach the recorder to that part"):
        model(token_ids())


def test_old_plans_are_exported_with_the_layers_that_are_said(tmp_path):
    """Without a number a map with too few rows was written, with one every row was shifted [D2]."""
    plan, path = plan_for([0, 1]), tmp_path / "map.json"
    with pytest.raises(PlacementError, match="give num_hidden_layers="):
        write_export(plan, path, "sglang")
    with pytest.raises(PlacementError, match=r"--layers, such as 2-3 \(dense layers first\)"):
        write_export(plan, path, "sglang", 4)
    with pytest.raises(PlacementError, match="expected 2 different ones"):
        write_export(plan, path, "sglang", 4, [1, 2, 3])
    assert not path.exists()
    linear, (first, second) = [0, 1, 2, 3], plan.physical_to_logical_map.tolist()
    write_export(plan, path, "sglang", 4, [1, 3])
    assert json.loads(path.read_text())["physical_to_logical_map"] == [
        linear,
        first,
        linear,
        second,
    ]
    write_export(plan, path, "sglang", 2)
    assert json.loads(path.read_text())["physical_to_logical_map"] == [first, second]
    turned = dataclasses.replace(plan, layer_ids=(3, 1))
    assert json.loads(write_export(turned, path, "vllm").read_text()) == [second, first]
