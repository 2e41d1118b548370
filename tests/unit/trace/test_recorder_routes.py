"""What routers return: DeepSpeed's sparse, dense and list layouts, AutoEP, transformers."""

import numpy as np
import pytest
import torch
from deepspeed.moe.sharded_moe import TopKGate

from moe_locality.errors import TraceError
from moe_locality.trace.recorder.hooks import (
    read_autoep_router,
    read_deepspeed_gate,
    read_experts,
)


def gate_output(k, *, sparse, drop, seed=0):
    torch.manual_seed(seed)
    gate = TopKGate(
        16, 8, k, capacity_factor=0.6, min_capacity=1, drop_tokens=drop, use_rts=False,
        top2_2nd_expert_sampling=False,
    )  # fmt: skip
    x = torch.randn(24, 16)
    return gate(x, sparse_routes=sparse)


def pairs(routes):
    """{(token, expert): weight} of every pick."""
    ids, weights = routes.ids.numpy(), routes.weights.numpy()
    return {
        (t, int(e)): float(weights[t, c]) for t in range(len(ids)) for c, e in enumerate(ids[t])
        if e >= 0
    }  # fmt: skip


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_dense_layout_holds_the_picks_of_the_sparse_one(k, drop):
    sparse = read_deepspeed_gate(gate_output(k, sparse=True, drop=drop), k, True)
    dense = read_deepspeed_gate(gate_output(k, sparse=False, drop=drop), k, True)
    assert sparse.ids.shape == dense.ids.shape == (24, k)
    a, b = pairs(sparse), pairs(dense)
    assert a.keys() == b.keys()
    assert len(a) == 24 * k if not drop else len(a) < 24 * k
    np.testing.assert_allclose([a[key] for key in a], [b[key] for key in a], rtol=1e-6)
    if k > 1:  # no order is known: heaviest first
        assert (dense.weights.diff(dim=1) <= 0).all()


def test_lists_of_older_versions():
    l_aux, capacity, experts, ids, locations, gates, counts = gate_output(2, sparse=True, drop=True)
    old = (l_aux, capacity, experts, list(ids), list(locations), list(gates), counts)
    got = read_deepspeed_gate(old, 2, True)
    assert (got.ids == ids.t()).all()
    assert (got.weights == gates.t()).all()


def test_weights_carry_no_gradient_and_are_left_out_where_nobody_wants_them():
    output = gate_output(2, sparse=True, drop=False)
    assert output[5].requires_grad
    assert not read_deepspeed_gate(output, 2, True).weights.requires_grad
    assert read_deepspeed_gate(output, 2, False).weights is None


def test_autoep_and_experts_by_position_and_by_name():
    ids, scores = torch.tensor([[1, 0]]), torch.tensor([[0.7, 0.3]])
    for routes in (
        read_autoep_router((scores, ids, torch.tensor([1, 1])), True),
        read_experts(None, (torch.zeros(1, 4), ids, scores), {}, True),
        read_experts(
            None, (torch.zeros(1, 4),), {"router_indices": ids, "routing_weights": scores}, True
        ),
    ):
        assert routes.ids is ids
        assert torch.equal(routes.weights, scores)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: read_deepspeed_gate((1, 2, 3), 2, True), r"TopKGate output \(int, int, int\)"),
        (lambda: read_deepspeed_gate(torch.zeros(2), 2, True), "TopKGate output Tensor"),
        (
            lambda: read_autoep_router((torch.zeros(2, 2), torch.zeros(2, 2)), True),
            r"\(torch.float32 \[2, 2\], torch.float32 \[2, 2\]\), expected \(scores",
        ),
        (lambda: read_experts(None, (torch.zeros(2, 2),), {}, True), "expected hidden states"),
    ],
)
def test_anything_else_is_named_in_the_error(call, message):
    with pytest.raises(TraceError, match=message):
        call()
