"""The layer on one rank; tests/distributed/test_layer_*.py compare it with DeepSpeed's."""

import copy
import inspect
import logging
import pickle

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("deepspeed")

import deepspeed.moe.layer
from deepspeed.moe.layer import MoE as StockMoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate

import moe_locality
from moe_locality.dispatch.transport import TrafficCounter
from moe_locality.errors import BackendUnavailable, ConfigError, PlacementError
from moe_locality.kernels import ops
from moe_locality.layer.moe import LocalityMOELayer, LocalityTopKGate, MoE, adopt
from moe_locality.layer.state import set_slot_to_logical

WIDTH = 4


def make(cls=MoE, seed=0, **options):
    torch.manual_seed(seed)
    return cls(WIDTH, nn.Linear(WIDTH, WIDTH), num_experts=4, **options)


def spread(layer):
    """Make the experts different: DeepSpeed starts with copies of one."""
    for i, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
        with torch.no_grad():
            expert.weight.mul_(i + 1)
    return layer


def test_it_is_deepspeeds_to_everything_that_asks():
    layer = make()
    assert moe_locality.MoE is MoE
    assert isinstance(layer, StockMoE)
    assert isinstance(layer.deepspeed_moe, MOELayer)
    assert isinstance(layer.deepspeed_moe.gate, TopKGate)
    assert layer.deepspeed_moe.gate.routes_in_logical_frame is True
    stock = make(StockMoE)
    assert list(layer.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in stock.named_parameters()]
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, stock.get_parameter(name)), name
        assert getattr(parameter, "allreduce", True) == ("deepspeed_experts" not in name)


def test_the_constructor_takes_deepspeeds_arguments_by_position():
    expert = nn.Linear(WIDTH, WIDTH)
    layer = MoE(WIDTH, expert, 4, 1, 2, 1.5, 2.0, 3, True, "Jitter", False, False)
    gate = layer.deepspeed_moe.gate
    assert (gate.k, gate.capacity_factor, gate.eval_capacity_factor) == (2, 1.5, 2.0)
    assert (gate.min_capacity, gate.noisy_gate_policy) == (3, "Jitter")
    assert (gate.drop_tokens, gate.use_rts, layer.use_residual) == (False, False, True)
    with pytest.raises(AssertionError, match="should be divisible by expert parallel size"):
        MoE(WIDTH, expert, num_experts=3, ep_size=2)


def test_its_signature_is_deepspeeds_with_the_extras_last():
    stock = list(inspect.signature(StockMoE).parameters)
    ours = inspect.signature(MoE).parameters
    assert list(ours) == [*stock, "dispatch_config", "kernels", "experts", "topology"]
    assert all(ours[n].kind is inspect.Parameter.KEYWORD_ONLY for n in list(ours)[len(stock) :])


def test_the_name_can_be_rebound_to_it(monkeypatch):
    monkeypatch.setattr(deepspeed.moe.layer, "MoE", MoE)
    layer = deepspeed.moe.layer.MoE(WIDTH, nn.Linear(WIDTH, WIDTH), num_experts=2)
    assert type(layer) is MoE
    assert layer(torch.randn(8, WIDTH))[0].shape == (8, WIDTH)


def test_extras_are_keyword_only_and_checked():
    layer = make(dispatch_config={"payload": "mxfp8"})
    layer(torch.randn(8, WIDTH))
    assert layer.deepspeed_moe.dispatcher.transport.payload.format == "mxfp8"
    layer = make(dispatch_config={"exchange": "flat"}, kernels="reference")
    assert layer.deepspeed_moe.dispatch_config.exchange == "flat"
    ops.reset_backend_counts()
    layer(torch.randn(8, WIDTH))
    assert ops.backend_counts().keys() == {"reference"}


def test_a_missing_kernel_backend_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(ops._MODULES, "triton", "moe_locality.kernels.not_there")
    with pytest.raises(BackendUnavailable, match="kernels='triton' was asked for"):
        make(kernels="triton")


def test_a_layer_can_be_copied_and_pickled_before_and_after_use():
    layer = spread(make(k=2, top2_2nd_expert_sampling=False))
    x = torch.randn(8, WIDTH)
    with torch.no_grad():  # l_aux stays on the layer, and with a graph it cannot be copied
        expected = layer(x)[0]
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x)[0], expected)
        assert type(other) is MoE


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_placement_is_only_a_renaming(k):
    order = np.array([2, 3, 1, 0])
    plain = spread(make(k=k, top2_2nd_expert_sampling=False))
    placed = spread(make(k=k, top2_2nd_expert_sampling=False))
    experts = placed.deepspeed_moe.experts.deepspeed_experts
    source = plain.deepspeed_moe.experts.deepspeed_experts
    with torch.no_grad():
        gate = placed.deepspeed_moe.gate.wg.weight
        gate.copy_(gate[torch.from_numpy(order)].clone())
        for slot, logical in enumerate(order):
            experts[slot].load_state_dict(source[logical].state_dict())
    set_slot_to_logical(placed, order)
    x = torch.randn(16, WIDTH)
    torch.manual_seed(1)
    expected = plain(x)
    torch.manual_seed(1)
    found = placed(x)
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])


def test_recorded_ids_are_logical():
    """What a forward hook of the gate sees does not depend on the placement."""
    seen = []
    for order in (np.arange(4), np.array([3, 1, 0, 2])):
        layer = make(k=2, top2_2nd_expert_sampling=False)
        with torch.no_grad():
            gate = layer.deepspeed_moe.gate.wg.weight
            gate.copy_(gate[torch.from_numpy(order)].clone())
        set_slot_to_logical(layer, order)
        layer.deepspeed_moe.gate.register_forward_hook(lambda m, a, out: seen.append(out[3]))
        torch.manual_seed(3)
        layer(torch.randn(16, WIDTH))
    assert torch.equal(seen[0], seen[1])


def test_set_slot_to_logical_refuses_what_is_no_permutation():
    layer = make()
    for wrong in ([0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 4], [[0, 1], [2, 3]]):
        with pytest.raises(PlacementError, match="expected a permutation of 0 to 3"):
            set_slot_to_logical(layer, wrong)
    assert layer.deepspeed_moe.gate.is_identity


def test_set_slot_to_logical_only_marks_a_stock_gate():
    stock = make(StockMoE)
    set_slot_to_logical(stock, [3, 2, 1, 0])
    assert stock.deepspeed_moe.gate.slot_to_logical.tolist() == [3, 2, 1, 0]
    assert adopt(stock)
    assert isinstance(stock.deepspeed_moe.gate, LocalityTopKGate)
    assert stock.deepspeed_moe.gate.slot_to_logical.tolist() == [3, 2, 1, 0]
    assert not stock.deepspeed_moe.gate.is_identity


def test_the_placement_is_not_part_of_the_state():
    layer = make()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    set_slot_to_logical(layer, [1, 0, 3, 2])
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())
    assert not list(layer.buffers())


def test_an_idle_expert_has_a_gradient_of_zero_and_no_gradient_without_grad():
    layer = make(k=1, drop_tokens=False)
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.zero_()  # every token goes to expert 0
    layer(torch.randn(8, WIDTH))[0].sum().backward()
    gradients = [p.grad for p in layer.deepspeed_moe.experts.parameters()]
    assert all(g is not None for g in gradients)
    assert [bool(g.any()) for g in gradients] == [True, True] + [False] * 6
    with torch.no_grad():
        output = layer(torch.randn(8, WIDTH))[0]
    assert output.shape == (8, WIDTH)


def test_experts_see_four_dimensions_as_in_deepspeed():
    shapes = []

    class Looks(nn.Linear):
        def forward(self, input):
            shapes.append(tuple(input.shape))
            return super().forward(input)

    layer = MoE(WIDTH, Looks(WIDTH, WIDTH), num_experts=2, k=1, drop_tokens=False)
    layer(torch.randn(2, 5, WIDTH))
    assert [s[:2] + s[3:] for s in shapes] == [(1, 1, WIDTH)] * 2
    assert sum(s[2] for s in shapes) == 10


def test_no_tokens_at_all():
    layer = make(k=2)
    output, l_aux, counts = layer(torch.empty(0, 7, WIDTH, requires_grad=True))
    assert output.shape == (0, 7, WIDTH)
    assert l_aux == 0
    assert counts.tolist() == [0] * 4
    (output.sum() + l_aux).backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_traffic_is_none_until_the_first_forward():
    layer = make().deepspeed_moe
    assert layer.traffic is None
    layer(torch.randn(8, WIDTH), None)
    assert isinstance(layer.traffic, TrafficCounter)


@pytest.mark.parametrize("placed", [False, True])
def test_with_tensor_parallelism_deepspeeds_padded_dispatch_runs(monkeypatch, caplog, placed):
    """The size of the mpu is what DeepSpeed looks at; with one rank its collectives do nothing."""
    layer = spread(make(k=2, top2_2nd_expert_sampling=False))
    if placed:
        set_slot_to_logical(layer, [2, 0, 3, 1])
    x = torch.randn(16, WIDTH)
    expected = layer(x)
    layer.deepspeed_moe.dispatcher = None
    monkeypatch.setattr("moe_locality.compat.tensor_parallel_size", lambda: 2)
    with caplog.at_level(logging.WARNING, logger="moe_locality.layer.moe"):
        found = [layer(x), layer(x)][0]
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], expected[2])
    assert layer.deepspeed_moe.traffic is None
    assert [r.message for r in caplog.records if "padded dispatch" in r.message] == [
        caplog.records[0].message
    ]


def test_compiled_models_break_the_graph_at_the_dispatch():
    layer = spread(make(k=2, top2_2nd_expert_sampling=False))
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())

    def function(x):
        return layer(model(x))[0] * 2

    x = torch.randn(8, WIDTH)
    found = torch.compile(function, backend="eager")(x)
    torch.testing.assert_close(found, function(x))


def test_the_gate_alone_still_gives_deepspeeds_dense_output():
    """Code that calls the gate itself gets combine weights of all experts, in logical order."""
    ours, stock = make(k=1, use_rts=False), make(StockMoE, k=1, use_rts=False)
    set_slot_to_logical(ours, [1, 0, 3, 2])
    with torch.no_grad():
        gate = ours.deepspeed_moe.gate.wg.weight
        gate.copy_(gate[torch.tensor([1, 0, 3, 2])].clone())
    x = torch.randn(16, WIDTH)
    for found, expected in zip(
        ours.deepspeed_moe.gate(x), stock.deepspeed_moe.gate(x), strict=True
    ):
        assert torch.equal(found, expected)


def test_a_changed_layer_is_not_swapped():
    class OtherGate(TopKGate):
        pass

    stock = make(StockMoE)
    stock.deepspeed_moe.gate.__class__ = OtherGate
    with pytest.raises(ConfigError, match="OtherGate as gate of an MoE layer, expected DeepSpeed"):
        adopt(stock)
    assert type(stock) is StockMoE
    assert not isinstance(stock.deepspeed_moe, LocalityMOELayer)
