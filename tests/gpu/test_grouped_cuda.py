"""Grouped experts on a GPU: no further from float64 than twice the loop over experts."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("deepspeed")

from deepspeed.moe.experts import Experts

from moe_locality.layer.experts import grouping_pays, run_experts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

WIDTH, HIDDEN = 256, 384


class SwiGLU(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=bias)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=bias)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def run(experts, rows, counts, mode):
    experts.zero_grad(set_to_none=True)
    rows = rows.clone().requires_grad_()
    out = run_experts(experts, rows, counts, mode)
    out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out))
    return [out.detach(), rows.grad, *(p.grad for p in experts.parameters())]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counts", [(100, 0, 7, 293), (0, 0, 1, 0), (64, 64, 64, 64)])
def test_three_way_oracle(bias, counts):
    torch.manual_seed(0)
    experts = Experts(SwiGLU(bias), 4).to("cuda", torch.bfloat16)
    for p in experts.parameters():
        nn.init.normal_(p, std=0.06)
    rows = torch.randn(sum(counts), WIDTH, device="cuda", dtype=torch.bfloat16)
    truth = run(copy.deepcopy(experts).double(), rows.double(), counts, "loop")
    looped, grouped = (run(experts, rows, counts, mode) for mode in ("loop", "grouped"))
    for exact, a, b in zip(truth, looped, grouped, strict=True):
        assert b.isfinite().all()
        error = (b.double() - exact).norm()
        assert error <= 2 * (a.double() - exact).norm() + 1e-2 * exact.norm()
    if grouping_pays(rows):
        chosen = run(experts, rows, counts, "auto")
        assert all(torch.equal(a, b) for a, b in zip(chosen, grouped, strict=True))
