"""Experts as grouped matrix products against the loop over experts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("deepspeed")

from deepspeed.moe.experts import Experts

import moe_locality
from moe_locality import compat
from moe_locality.errors import ConfigError
from moe_locality.layer.expert_store import store_experts
from moe_locality.layer.experts import GroupedMLP, grouping_pays, recognize, run_experts
from tests.tolerances import LAYER

WIDTH, HIDDEN = 24, 40
pytestmark = pytest.mark.skipif(compat.grouped_mm() is None, reason="this torch has no grouped_mm")


class SwiGLU(nn.Module):
    """Names and order that nobody could guess."""

    def __init__(self, bias=False, act=F.silu):
        super().__init__()
        self.act = act
        self.third = nn.Linear(HIDDEN, WIDTH, bias=bias)
        self.first = nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.second = nn.Linear(WIDTH, HIDDEN, bias=bias)

    def forward(self, x):
        return self.third(self.first(x) * self.act(self.second(x)))


class Plain(nn.Module):
    def __init__(self, act=F.gelu, bias=True):
        super().__init__()
        self.fc1, self.fc2 = (
            nn.Linear(WIDTH, HIDDEN, bias=bias),
            nn.Linear(HIDDEN, WIDTH, bias=bias),
        )
        self.act = act

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


def sequential():
    return nn.Sequential(
        nn.Linear(WIDTH, HIDDEN), nn.GELU(approximate="tanh"), nn.Linear(HIDDEN, WIDTH)
    )


KINDS = {
    "swiglu": SwiGLU,
    "swiglu with bias": lambda: SwiGLU(bias=True),
    "geglu": lambda: SwiGLU(act=F.gelu),
    "gelu": Plain,
    "relu without bias": lambda: Plain(act=nn.ReLU(), bias=False),
    "sequential": sequential,
}


def make(expert, count=4, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    experts = Experts(expert, count).to(dtype)
    for p in experts.parameters():
        nn.init.normal_(p, std=0.2)
    return experts


def run(experts, rows, counts, mode):
    """Output, input gradient and all weight gradients."""
    experts.zero_grad(set_to_none=True)
    rows = rows.clone().requires_grad_()
    out = run_experts(experts, rows, counts, mode)
    weight = torch.linspace(-1, 1, out.numel()).view_as(out).to(out)
    (out * weight).sum().backward()
    return [out.detach(), rows.grad, *(p.grad for p in experts.parameters())]


@pytest.mark.parametrize("kind", KINDS)
@given(counts=st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any))
@settings(max_examples=6, deadline=None)
def test_run_experts_grouped_equals_the_loop(kind, counts):
    experts = make(KINDS[kind]())
    assert isinstance(recognize(experts.deepspeed_experts), GroupedMLP)
    rows = torch.randn((sum(counts), WIDTH), generator=torch.Generator().manual_seed(1))
    looped, grouped = (run(experts, rows, tuple(counts), mode) for mode in ("loop", "grouped"))
    rtol, atol = LAYER["float32"]
    for a, b in zip(looped, grouped, strict=True):
        torch.testing.assert_close(b, a, rtol=rtol, atol=10 * atol)


@pytest.mark.parametrize("kind", ["swiglu with bias", "gelu"])
def test_run_experts_three_way_oracle_in_bfloat16(kind):
    """No further from float64 than twice the loop's own distance."""
    experts = make(KINDS[kind](), dtype=torch.bfloat16)
    rows = torch.randn((37, WIDTH), generator=torch.Generator().manual_seed(2)).bfloat16()
    counts = (20, 0, 1, 16)
    truth = run(copy.deepcopy(experts).double(), rows.double(), counts, "loop")
    looped, grouped = (run(experts, rows, counts, mode) for mode in ("loop", "grouped"))
    for exact, a, b in zip(truth, looped, grouped, strict=True):
        error = (b.double() - exact).norm()
        assert error <= 2 * (a.double() - exact).norm() + 1e-2 * exact.norm()


def test_run_experts_which_formula_it_is():
    assert recognize(make(SwiGLU()).deepspeed_experts) == GroupedMLP(
        up="first", gate="second", down="third", activation="silu"
    )
    assert recognize(make(sequential()).deepspeed_experts) == GroupedMLP(
        up="0", gate=None, down="2", activation="gelu_tanh"
    )


class Residual(Plain):
    def forward(self, x):
        return x + super().forward(x)


class Clamped(SwiGLU):
    def forward(self, x):
        return self.third(self.first(x) * F.silu(self.second(x)).clamp(max=7.0))


class Dropping(Plain):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Scaled(Plain):
    scale: float = 1.0

    def forward(self, x):
        return super().forward(x) * self.scale


class Holding(Plain):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("expert", [Residual, Clamped, Dropping, Holding])
def test_run_experts_what_computes_something_else_keeps_the_loop(expert):
    experts = make(expert())
    assert isinstance(recognize(experts.deepspeed_experts), str)
    rows = torch.randn(6, WIDTH)
    with pytest.raises(ConfigError, match="use 'auto' or 'loop'"):
        run_experts(experts, rows, (2, 1, 0, 3), "grouped")
    assert run_experts(experts, rows, (2, 1, 0, 3), "auto").shape == rows.shape


def test_run_experts_dropout_that_is_off_does_not_count():
    experts = make(Dropping()).eval()
    assert isinstance(recognize(experts.deepspeed_experts), GroupedMLP)
    assert isinstance(recognize(experts.train().deepspeed_experts), str)


def test_run_experts_experts_that_differ_keep_the_loop():
    experts = make(Scaled())
    assert isinstance(recognize(experts.deepspeed_experts), GroupedMLP)
    experts = make(Scaled())
    experts.deepspeed_experts[2].scale = 2.0
    assert "settings" in recognize(experts.deepspeed_experts)
    experts = make(Plain())
    experts.deepspeed_experts[1] = SwiGLU()
    assert "class" in recognize(experts.deepspeed_experts)


def test_run_experts_what_changes_between_passes_is_seen():
    experts = make(Plain()).deepspeed_experts
    assert isinstance(recognize(experts), GroupedMLP)
    handle = experts[3].fc1.register_forward_hook(lambda *args: None)
    assert "hooks" in recognize(experts)
    handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in recognize(experts)
    assert isinstance(recognize(experts), GroupedMLP)
    kept, experts[1].fc2.bias.data = experts[1].fc2.bias.data, torch.empty(0)
    assert "ZeRO-3" in recognize(experts)
    experts[1].fc2.bias.data = kept
    assert isinstance(recognize(experts), GroupedMLP)


def test_run_experts_stored_experts_keep_the_loop():
    experts = make(SwiGLU())
    assert isinstance(recognize(experts.deepspeed_experts), GroupedMLP)
    store_experts(experts, "mxfp8")
    assert isinstance(recognize(experts.deepspeed_experts), str)


def test_run_experts_unaligned_rows_keep_the_loop():
    torch.manual_seed(0)
    expert = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
    assert "not a multiple of 16" in recognize(Experts(expert, 2).deepspeed_experts)


def test_run_experts_no_rows_at_all_still_give_gradients_of_zero():
    experts = make(SwiGLU())
    grads = run(experts, torch.zeros(0, WIDTH), (0, 0, 0, 0), "grouped")[2:]
    assert all(g is not None and not g.any() for g in grads)


def test_run_experts_auto_is_the_loop_on_a_cpu():
    assert not grouping_pays(torch.zeros(1))
    assert not grouping_pays(torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.parametrize("mode", ["loop", "grouped"])
def test_moe_takes_the_mode(mode, monkeypatch):
    from moe_locality.layer import experts as module

    seen = []
    real = module.run_grouped
    monkeypatch.setattr(module, "run_grouped", lambda *a: seen.append(1) or real(*a))
    torch.manual_seed(0)
    layer = moe_locality.MoE(WIDTH, SwiGLU(), num_experts=4, experts=mode)
    layer(torch.randn(8, WIDTH))
    assert bool(seen) == (mode == "grouped")
    with pytest.raises(ConfigError, match="expected auto, loop or grouped"):
        moe_locality.MoE(WIDTH, SwiGLU(), num_experts=4, experts="fast")


def test_apply_the_section_reaches_the_layers():
    from deepspeed.moe.layer import MoE as StockMoE

    torch.manual_seed(0)
    model = nn.ModuleList([StockMoE(WIDTH, SwiGLU(), num_experts=4)])
    moe_locality.apply(model, {"experts": "grouped"})
    assert model[0].deepspeed_moe.experts_mode == "grouped"
    moe_locality.apply(model, {})  # built or swapped before: kept unless the section says otherwise
    assert model[0].deepspeed_moe.experts_mode == "grouped"
    moe_locality.apply(model, {"experts": "loop"})
    assert model[0].deepspeed_moe.experts_mode == "loop"
