"""The dispatcher on one rank; tests/distributed/test_dispatch.py has the exchange."""

import pytest
import torch

from moe_locality.config import DispatchConfig
from moe_locality.dispatch.dispatcher import TokenDispatcher
from moe_locality.errors import BackendUnavailable, ConfigError, TopologyError
from moe_locality.kernels import ops


def test_dispatch_orders_rows_by_expert_and_combine_brings_them_back():
    dispatcher = TokenDispatcher(num_slots=3)
    x = torch.arange(8.0).view(4, 2)
    slots = torch.tensor([[2, 0], [0, -1], [1, 2], [-1, -1]])
    routed = dispatcher.dispatch(x, slots)
    assert routed.tokens_per_local_expert == (2, 1, 2)
    assert torch.equal(routed.rows, x[[0, 1, 2, 0, 2]])
    weights = torch.tensor([[0.5, 2.0], [1.0, 9.0], [1.0, 1.0], [9.0, 9.0]])
    out = dispatcher.combine(routed.rows, weights, routed.handle)
    assert torch.equal(out, x * torch.tensor([[2.5], [1.0], [2.0], [0.0]]))
    assert (routed.handle.num_tokens, routed.handle.top_k) == (4, 2)


def test_gradients_through_dispatch_and_combine():
    dispatcher = TokenDispatcher(num_slots=3)
    slots = torch.tensor([[2, 0], [0, -1], [1, 2], [-1, -1]])

    def function(x, weights):
        routed = dispatcher.dispatch(x, slots)
        return dispatcher.combine(routed.rows.sin(), weights, routed.handle)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, weights))


def test_several_steps_may_be_in_flight():
    dispatcher = TokenDispatcher(num_slots=2)
    first = dispatcher.dispatch(torch.ones(2, 1), torch.tensor([[0], [1]]))
    second = dispatcher.dispatch(torch.full((3, 1), 5.0), torch.tensor([[1], [1], [0]]))
    out = dispatcher.combine(first.rows, torch.ones(2, 1), first.handle)
    assert torch.equal(out, torch.ones(2, 1))
    out = dispatcher.combine(second.rows, torch.ones(3, 1), second.handle)
    assert torch.equal(out, torch.full((3, 1), 5.0))


def test_what_is_not_available_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"payload is 'mxfp4', which is not available yet"):
        TokenDispatcher(num_slots=2, config=DispatchConfig(payload="mxfp4"))


def test_a_missing_backend_is_refused_before_the_first_step(monkeypatch):
    monkeypatch.setitem(ops._MODULES, "cuda", "moe_locality.kernels.not_there")
    with pytest.raises(BackendUnavailable, match="kernels='cuda' was asked for"):
        TokenDispatcher(num_slots=2, kernels="cuda")


def test_ranks_without_a_process_group_are_refused():
    with pytest.raises(TopologyError, match=r"found no process group, expected one of 4 ranks"):
        TokenDispatcher(num_slots=8, num_ranks=4)
