"""The gate of the reference backend: choice, ties, group limits, weights and their derivative."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import ConfigError
from moe_locality.kernels import local, ops
from moe_locality.kernels.backends import GateSpec
from tests.unit.kernels import oracle

SPECS = [
    GateSpec(top_k=2),
    GateSpec(top_k=2, renormalize=True),
    GateSpec(top_k=12),
    GateSpec(top_k=3, score="sigmoid", renormalize=True, scale=2.5),
    GateSpec(top_k=4, score="sigmoid", num_groups=4, top_groups=2, renormalize=True),
    GateSpec(top_k=3, num_groups=3, top_groups=1, group_score="max", scale=16.0),
]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPECS), st.integers(0, 7), st.booleans(), st.integers(0, 2**31))
def test_the_gate_is_its_definition(spec, tokens, with_bias, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, 12, generator=generator, dtype=torch.float64)
    bias = torch.randn(12, generator=generator, dtype=torch.float64) if with_bias else None
    ids, weights = ops.gate(logits, spec, bias=bias)
    wanted_ids, wanted = oracle.gate(logits, spec, bias)
    assert torch.equal(ids, wanted_ids)
    assert ids.dtype == torch.int32
    torch.testing.assert_close(weights, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spec", SPECS)
def test_ties_go_to_the_lower_id(spec):
    ids, weights = ops.gate(torch.zeros(2, 12), spec)
    assert ids.tolist() == [list(range(spec.top_k))] * 2
    assert weights.dtype == torch.float32


@pytest.mark.parametrize("spec", SPECS)
def test_the_derivative_is_that_of_the_weights(spec):
    logits = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.autograd.gradcheck(
        lambda x: local.topk_gate(x, spec)[1], logits.requires_grad_(), atol=1e-6
    )


def test_bias_moves_the_choice_and_not_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    ids, weights = ops.gate(logits, GateSpec(top_k=1), bias=torch.tensor([0.0, 0.0, 5.0]))
    assert ids.tolist() == [[2]]
    torch.testing.assert_close(weights[0, 0], logits.softmax(1)[0, 2])


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (GateSpec(top_k=13), "top_k=13, expected 1 to 12"),
        (GateSpec(top_k=2, num_groups=5), "12 experts in 5 groups"),
        (GateSpec(top_k=5, num_groups=3, top_groups=1), "expected 1 to 4"),
        (GateSpec(top_k=1, num_groups=3, top_groups=4), "top_groups=4, expected 1 to 3"),
    ],
)
def test_a_gate_that_cannot_be_is_refused(spec, says):
    with pytest.raises(ConfigError, match=says):
        ops.gate(torch.zeros(1, 12), spec)
