"""The dispatcher on one rank; tests/distributed/test_dispatch.py has the exchange."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from moe_locality.config import DispatchConfig
from moe_locality.dispatch import dispatcher as dispatcher_module
from moe_locality.dispatch.deepep import DeepEPMetadata
from moe_locality.dispatch.dispatcher import SlotMap, TokenDispatcher, run_moe
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


def test_dispatch_metadata_is_used_again_for_the_same_routes_only():
    dispatcher = TokenDispatcher(num_slots=3)
    slots, weights = torch.tensor([[2, 0], [0, -1]]), torch.ones(2, 2)
    first = dispatcher.dispatch(torch.randn(2, 4), slots, weights)
    x = torch.randn(2, 4)
    again = dispatcher.dispatch(x, slots, weights, metadata=first.handle.metadata)
    assert again.handle.metadata is first.handle.metadata
    assert torch.equal(again.rows, x[[0, 1, 0]])
    with pytest.raises(ConfigError, match=r"metadata of routes \(2, 2\) and routes \(3, 2\)"):
        dispatcher.dispatch(
            torch.ones(3, 4),
            torch.zeros(3, 2).int(),
            torch.ones(3, 2),
            metadata=first.handle.metadata,
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


def test_dispatch_refuses_metadata_of_another_transport():
    other = DeepEPMetadata(handle=None, shape=(2, 1), tokens_per_local_expert=(2,))
    with pytest.raises(ConfigError, match="of type DeepEPMetadata, expected FlatMetadata"):
        TokenDispatcher(num_slots=1).dispatch(
            torch.ones(2, 4), torch.zeros(2, 1).int(), torch.ones(2, 1), metadata=other
        )


def test_dispatch_takes_the_names_of_the_last_version_with_a_warning():
    dispatcher = TokenDispatcher(num_slots=1)
    x, slots, weights = torch.ones(2, 4), torch.zeros(2, 1).int(), torch.ones(2, 1)
    with pytest.warns(DeprecationWarning, match="the argument 'weights' is now 'topk_weights'"):
        first = dispatcher.dispatch(x, slots, weights=weights)
    with pytest.warns(DeprecationWarning, match=r"DispatchHandle\.plan is now metadata"):
        plan = first.handle.plan
    with pytest.warns(DeprecationWarning, match="the argument 'plan' is now 'metadata'"):
        again = dispatcher.dispatch(x, slots, weights, plan=plan)
    assert again.handle.metadata is first.handle.metadata
    with pytest.warns(DeprecationWarning, match=r"DispatchHandle\.weights is now topk_weights"):
        assert again.handle.weights is weights


def test_slot_map_keeps_dropped_routes_dtype_and_shape():
    ids = torch.tensor([[2, -1], [0, 1]], dtype=torch.int32)
    found = SlotMap(np.array([1, 2, 0])).slot_ids(ids)
    assert found.tolist() == [[0, -1], [1, 2]]
    assert found.dtype == torch.int32
    assert SlotMap().slot_ids(ids) is ids


def test_run_moe_is_the_weighted_sum_of_the_experts_of_each_token():
    """Experts sit in other slots than their numbers; expert e multiplies by e + 1."""
    slot_of_expert = np.array([2, 0, 1])
    dispatcher = TokenDispatcher(num_slots=3, slot_map=SlotMap(slot_of_expert))
    expert_of_slot = np.argsort(slot_of_expert)
    stages, between = [], []

    def experts(rows, tokens_per_expert):
        factors = torch.from_numpy(expert_of_slot + 1.0).float()
        return rows * factors.repeat_interleave(torch.tensor(tokens_per_expert))[:, None]

    class Stage:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            stages.append(f"begin {self.name}")

        def __exit__(self, *_):
            stages.append(f"end {self.name}")

    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    topk_ids = torch.tensor([[0, 2], [1, -1], [-1, -1], [2, 1]])
    topk_weights = torch.tensor([[0.5, 1.0], [2.0, 9.0], [9.0, 9.0], [1.0, 1.0]])
    out = run_moe(
        dispatcher,
        x,
        topk_ids,
        topk_weights,
        experts,
        overlap_fn=lambda: between.append(list(stages)),
        stage=Stage,
    )
    torch.testing.assert_close(out, x * torch.tensor([[3.5], [4.0], [0.0], [5.0]]))
    assert stages == ["begin dispatch", "end dispatch", "begin combine", "end combine"]
    assert between == [stages[:3]]
    assert dispatcher.traffic.load == 5
    assert dispatcher.traffic.rows["dispatch"].tolist() == [5]


def test_run_moe_needs_no_deepspeed():
    code = (
        "import sys\n"
        "sys.modules['deepspeed'] = sys.modules['transformers'] = None\n"
        "import torch\n"
        "from moe_locality.dispatch import TokenDispatcher, run_moe\n"
        "x, ids = torch.ones(2, 3), torch.tensor([[0], [1]])\n"
        "d, w = TokenDispatcher(num_slots=2), torch.ones(2, 1)\n"
        "out = run_moe(d, x, ids, w, lambda rows, counts: 2 * rows)\n"
        "assert torch.equal(out, 2 * x)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
