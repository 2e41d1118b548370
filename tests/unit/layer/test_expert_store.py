"""Experts in a low-bit format: bit for bit those with rounded weights, in less memory."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("deepspeed")

from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE as StockMoE

import moe_locality
from moe_locality.errors import ConfigError
from moe_locality.layer.expert_store import StoredExpert, store_experts
from moe_locality.placement import PlacementPlan
from moe_locality.quantization import FORMATS, bytes_per_row, fake_quantize
from tests.tolerances import LAYER

WIDTH, HIDDEN = 36, 40


class SwiGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH)
        self.register_buffer("gain", torch.tensor(0.5))

    def forward(self, x):
        return self.gain * self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def make(cls=moe_locality.MoE, seed=0):
    torch.manual_seed(seed)
    nothing_random = {"use_rts": False, "top2_2nd_expert_sampling": False}
    layer = cls(WIDTH, SwiGLU(), num_experts=4, k=2, drop_tokens=False, **nothing_random)
    for p in layer.deepspeed_moe.experts.parameters():  # DeepSpeed starts with copies of one
        nn.init.normal_(p, std=0.3)
    return layer.eval()


def rounded(layer, name):
    """The same layer with rounded matrices."""
    layer = copy.deepcopy(layer)
    for p in layer.deepspeed_moe.experts.parameters():
        if p.dim() == 2:
            p.data = fake_quantize(p.data, name, role="weight")
    return layer


def tokens(seed=1, count=20):
    return torch.randn((count, WIDTH), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("cls", [moe_locality.MoE, StockMoE])
def test_store_experts_results_are_those_of_rounded_weights(name, cls):
    layer = make(cls)
    expected = rounded(layer, name)
    store_experts(layer, name)
    with torch.no_grad():
        found, wanted = layer(tokens()), expected(tokens())
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[2], wanted[2])


def test_store_experts_a_plain_list_of_experts():
    experts = Experts(SwiGLU(), 3)
    wanted = [copy.deepcopy(e) for e in experts.deepspeed_experts]
    assert store_experts(experts, "mxfp8").num_experts == 3
    with torch.no_grad():
        for stored, expert in zip(experts.deepspeed_experts, wanted, strict=True):
            for p in (expert.gate_proj, expert.up_proj, expert.down_proj):
                p.weight.data = fake_quantize(p.weight.data, "mxfp8")
            assert torch.equal(stored(tokens()), expert(tokens()))


def test_store_experts_memory_is_counted_and_there():
    layer = make()
    report = store_experts(layer, "mxfp4-mbs-h")
    experts = layer.deepspeed_moe.experts
    assert not list(experts.parameters())
    assert report.bytes_before == 4 * 4 * (3 * WIDTH * HIDDEN + WIDTH + 1)
    matrices = 2 * HIDDEN * bytes_per_row("mxfp4-mbs-h", WIDTH)
    matrices += WIDTH * bytes_per_row("mxfp4-mbs-h", HIDDEN)
    assert report.bytes_after == 4 * (matrices + 4 * (WIDTH + 1))
    assert report.bytes_after == sum(b.numel() * b.element_size() for b in experts.buffers())


@pytest.mark.parametrize("name", ["mxfp4-mbs-h", "nvfp4", "fp8"])
def test_store_experts_state_dict_round_trip_and_plain_checkpoints(name):
    trained, stored, fresh, from_plain = (make(seed=s) for s in (0, 0, 1, 2))
    for layer in (stored, fresh, from_plain):
        store_experts(layer, name)
    state = stored.state_dict()
    key = "deepspeed_moe.experts.deepspeed_experts.2.down_proj"
    assert state[f"{key}.weight.codes"].dtype == torch.uint8
    assert torch.equal(state[f"{key}.bias.value"], trained.state_dict()[f"{key}.bias"])
    fresh.load_state_dict(state)
    from_plain.load_state_dict(trained.state_dict())
    with torch.no_grad():
        wanted = stored(tokens())[0]
        assert torch.equal(fresh(tokens())[0], wanted)
        assert torch.equal(from_plain(tokens())[0], wanted)
        assert set(fresh.state_dict()) == set(state)


def test_store_experts_a_checkpoint_that_does_not_fit_is_named():
    layer = make()
    state = layer.state_dict()
    store_experts(layer, "mxfp8")
    key = "deepspeed_moe.experts.deepspeed_experts.0.up_proj.weight"
    with pytest.raises(RuntimeError, match=r"expected \(40, 36\)"):
        layer.load_state_dict({**state, key: torch.zeros(3, 3)})
    del state[key]
    with pytest.raises(RuntimeError, match=r"up_proj\.weight\.codes"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("name", ["mxfp4-mbs-h", "fp8", "nvfp4"])
def test_store_experts_casting_the_model_keeps_the_store(name):
    layer = make()
    store_experts(layer, name)
    codes = {k: v.clone() for k, v in layer.state_dict().items() if v.dtype == torch.uint8}
    experts = layer.bfloat16().deepspeed_moe.experts.deepspeed_experts
    state = layer.state_dict()
    assert codes
    assert all(torch.equal(state[key], value) for key, value in codes.items())
    weight = experts[0].up_proj.weight.decode()
    assert weight.dtype == torch.bfloat16
    assert torch.equal(
        weight,
        rounded(make(), name)
        .deepspeed_moe.experts.deepspeed_experts[0]
        .up_proj.weight.detach()
        .bfloat16(),
    )
    with torch.no_grad():
        assert experts[0](tokens().bfloat16()).dtype == torch.bfloat16


def test_store_experts_training_through_it_is_refused():
    layer = make()
    store_experts(layer, "mxfp4-mbs-h")
    with pytest.raises(ConfigError, match="no weights to train"):
        layer(tokens().requires_grad_())
    with torch.no_grad():
        layer(tokens().requires_grad_())


def test_store_experts_a_copy_is_a_store_of_its_own():
    layer = make()
    store_experts(layer, "mxfp8")
    other = copy.deepcopy(layer)
    for buffer in other.deepspeed_moe.experts.buffers():
        buffer.zero_()
    with torch.no_grad():
        assert layer(tokens())[0].any()
        assert not other(tokens())[0].any()


def test_store_experts_refusals():
    with pytest.raises(ConfigError, match="found no experts"):
        store_experts(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="expected one of"):
        store_experts(make(), "int4")
    layer = make()
    store_experts(layer)
    assert isinstance(layer.deepspeed_moe.experts.deepspeed_experts[0], StoredExpert)
    with pytest.raises(ConfigError, match="already"):
        store_experts(layer, "mxfp8")
    partitioned = make()
    next(partitioned.deepspeed_moe.experts.parameters()).ds_id = 7
    with pytest.raises(ConfigError, match="ZeRO-3"):
        store_experts(partitioned)


def test_store_experts_stored_experts_can_be_relabelled():
    layer = make()
    store_experts(layer, "mxfp4-mbs-h")
    plan = PlacementPlan.linear(4, [0], 1, 1)
    plan = dataclasses.replace(plan, physical_to_logical_map=np.array([[2, 0, 3, 1]]))
    with torch.no_grad():
        wanted = layer(tokens())
        moe_locality.relabel(layer, plan)
        found = layer(tokens())
    torch.testing.assert_close(found[0], wanted[0], rtol=LAYER["float32"][0], atol=1e-6)
    assert torch.equal(found[2], wanted[2])


@pytest.mark.parametrize("shared", ["experts", "list", "modules", "parameters"])
def test_store_experts_experts_of_two_layers_are_stored_once(shared):
    """Experts that layers share were stored twice, or the store stopped halfway; now once [D1]"""
    net = nn.ModuleList([make(), make(seed=1)])
    one, two = (layer.deepspeed_moe.experts for layer in net)
    if shared == "experts":
        net[1].deepspeed_moe.experts = one
    elif shared == "list":
        two.deepspeed_experts = one.deepspeed_experts
    for index, expert in enumerate(one.deepspeed_experts):
        if shared == "modules":
            two.deepspeed_experts[index] = expert
        if shared == "parameters":
            for name, _ in list(expert.named_parameters()):
                path, _, leaf = name.rpartition(".")
                setattr(
                    two.deepspeed_experts[index].get_submodule(path),
                    leaf,
                    expert.get_parameter(name),
                )
            two.deepspeed_experts[index].gain = expert.gain
    expected = [rounded(layer, "mxfp8")(tokens())[0] for layer in net]
    alone = store_experts(nn.ModuleList([make()]), "mxfp8")
    assert store_experts(net, "mxfp8") == alone
    for layer, wanted in zip(net, expected, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(layer(tokens())[0], wanted)
