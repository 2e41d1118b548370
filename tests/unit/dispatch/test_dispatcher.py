"""The dispatcher on one rank; tests/distributed/test_dispatch.py has the exchange."""

import pytest
import torch

from moe_locality.config import DispatchConfig
from moe_locality.dispatch import dispatcher as dispatcher_module
from moe_locality.dispatch.dispatcher import TokenDispatcher
from moe_locality.errors import BackendUnavailable, ConfigError, TopologyError
from moe_locality.kernels import ops
from moe_locality.quantization import fake_quantize, row_bytes


def test_dispatch_orders_rows_by_expert_and_combine_brings_them_back():
    dispatcher = TokenDispatcher(num_slots=3)
    x = torch.arange(8.0).view(4, 2)
    slots = torch.tensor([[2, 0], [0, -1], [1, 2], [-1, -1]])
    weights = torch.tensor([[0.5, 2.0], [1.0, 9.0], [1.0, 1.0], [9.0, 9.0]])
    routed = dispatcher.dispatch(x, slots, weights)
    assert routed.tokens_per_local_expert == (2, 1, 2)
    assert torch.equal(routed.rows, x[[0, 1, 2, 0, 2]])
    out = dispatcher.combine(routed.rows, routed.handle)
    assert torch.equal(out, x * torch.tensor([[2.5], [1.0], [2.0], [0.0]]))
    assert (routed.handle.num_tokens, routed.handle.top_k) == (4, 2)


def test_gradients_through_dispatch_and_combine():
    dispatcher = TokenDispatcher(num_slots=3)
    slots = torch.tensor([[2, 0], [0, -1], [1, 2], [-1, -1]])

    def function(x, weights):
        routed = dispatcher.dispatch(x, slots, weights)
        return dispatcher.combine(routed.rows.sin(), routed.handle)

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, weights))


def test_several_steps_may_be_in_flight():
    dispatcher = TokenDispatcher(num_slots=2)
    first = dispatcher.dispatch(torch.ones(2, 1), torch.tensor([[0], [1]]), torch.ones(2, 1))
    second = dispatcher.dispatch(
        torch.full((3, 1), 5.0), torch.tensor([[1], [1], [0]]), torch.ones(3, 1)
    )
    out = dispatcher.combine(first.rows, first.handle)
    assert torch.equal(out, torch.ones(2, 1))
    out = dispatcher.combine(second.rows, second.handle)
    assert torch.equal(out, torch.full((3, 1), 5.0))


@pytest.mark.parametrize("payload", ["fp8", "mxfp8", "mxfp4"])
def test_rows_on_one_rank_are_coded_too_and_said_to_be(payload, caplog):
    dispatcher_module._said_lossy.clear()
    config = DispatchConfig(payload=payload, combine_payload=payload)
    dispatcher = TokenDispatcher(num_slots=3, config=config)
    assert f"dispatch.payload={payload}, dispatch.combine_payload={payload}" in caplog.text
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 48, generator=generator, requires_grad=True)
    slots = torch.tensor([[0, 1], [2, -1], [1, 0], [-1, -1], [0, 2]])
    weights = torch.rand(5, 2, generator=generator, requires_grad=True)
    routed = dispatcher.dispatch(x, slots, weights)
    assert torch.equal(routed.rows, fake_quantize(x, payload)[[0, 2, 4, 0, 2, 1, 4]])
    assert dispatcher.traffic.bytes["dispatch"].tolist() == [7 * row_bytes(payload, 48)]
    out = dispatcher.combine(routed.rows * 1.7, routed.handle)
    back = fake_quantize(fake_quantize(x, payload) * 1.7, payload)
    kept = weights * (slots >= 0)
    torch.testing.assert_close(out, back * kept.sum(1, keepdim=True))
    out.sum().backward()
    # straight through: the gradient of a token is that of rows that were not rounded
    torch.testing.assert_close(x.grad, 1.7 * kept.sum(1, keepdim=True).expand(5, 48))
    torch.testing.assert_close(weights.grad, back.sum(1, keepdim=True) * (slots >= 0))


def test_a_plan_is_used_again_for_the_same_routes_only():
    dispatcher = TokenDispatcher(num_slots=3)
    slots, weights = torch.tensor([[2, 0], [0, -1]]), torch.ones(2, 2)
    first = dispatcher.dispatch(torch.randn(2, 4), slots, weights)
    x = torch.randn(2, 4)
    again = dispatcher.dispatch(x, slots, weights, plan=first.handle.plan)
    assert again.handle.plan is first.handle.plan
    assert torch.equal(again.rows, x[[0, 1, 0]])
    with pytest.raises(ConfigError, match=r"plan for routes \(2, 2\) and routes \(3, 2\)"):
        dispatcher.dispatch(
            torch.ones(3, 4), torch.zeros(3, 2).int(), torch.ones(3, 2), plan=first.handle.plan
        )


def test_work_between_start_and_wait_is_in_the_graph_and_wait_may_be_repeated():
    dispatcher = TokenDispatcher(num_slots=2)
    x = torch.ones(2, 3, requires_grad=True)
    pending = dispatcher.dispatch_async(x, torch.tensor([[0], [1]]), torch.ones(2, 1))
    beside = x * 2
    routed = pending.wait()
    assert pending.wait() is routed
    combined = dispatcher.combine_async(routed.rows * 3, routed.handle)
    (combined.wait() + beside).sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3), 5.0))


def test_a_missing_backend_is_refused_before_the_first_step(monkeypatch):
    monkeypatch.setitem(ops._MODULES, "cuda", "moe_locality.kernels.not_there")
    with pytest.raises(BackendUnavailable, match="kernels='cuda' was asked for"):
        TokenDispatcher(num_slots=2, kernels="cuda")


def test_ranks_without_a_process_group_are_refused():
    with pytest.raises(TopologyError, match=r"found no process group, expected one of 4 ranks"):
        TokenDispatcher(num_slots=8, num_ranks=4)
