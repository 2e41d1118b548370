import inspect

import pytest
import torch
from torch import nn

pytest.importorskip("deepspeed")

import deepspeed
from deepspeed.moe.layer import MoE as StockMoE

import moe_locality
from moe_locality import PlacementPlan
from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer.moe import LocalityMOELayer, MoE

WIDTH = 4


class UserMoE(StockMoE):
    """A user's own subclass, with a forward of its own."""

    def forward(self, x):
        return super().forward(x)[0]


class Net(nn.Module):
    def __init__(self, cls=StockMoE):
        super().__init__()
        torch.manual_seed(0)
        self.a = StockMoE(WIDTH, nn.Linear(WIDTH, WIDTH), num_experts=4)
        self.blocks = nn.ModuleList([cls(WIDTH, nn.Linear(WIDTH, WIDTH), num_experts=4)])

    def forward(self, x):
        x = self.a(x)[0]
        out = self.blocks[0](x)
        return out if torch.is_tensor(out) else out[0]


def test_apply_swaps_in_place_and_keeps_every_parameter():
    net = Net()
    x = torch.randn(8, WIDTH)
    torch.manual_seed(1)
    expected = net(x)
    before = dict(net.named_parameters())
    gate, calls = net.a.deepspeed_moe.gate, []
    gate.register_forward_hook(lambda *a: calls.append(1))
    assert moe_locality.apply(net) is net
    assert type(net.a) is type(net.blocks[0]) is MoE
    after = dict(net.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    torch.manual_seed(1)
    torch.testing.assert_close(net(x), expected)
    assert calls == [1]  # hooks from before still fire


def test_apply_an_optimizer_made_before_trains_the_swapped_model():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    weight = net.a.deepspeed_moe.experts.deepspeed_experts[0].weight
    moe_locality.apply(net)
    before = weight.detach().clone()
    net(torch.randn(32, WIDTH)).square().sum().backward()
    optimizer.step()
    assert net.a.deepspeed_moe.experts.deepspeed_experts[0].weight is weight
    assert not torch.equal(weight, before)


def test_apply_twice_changes_nothing():
    net = moe_locality.apply(Net(), {"dispatch": {"exchange": "flat"}})
    layer = net.a.deepspeed_moe
    net(torch.randn(8, WIDTH))
    dispatcher = layer.dispatcher
    moe_locality.apply(net)
    assert net.a.deepspeed_moe is layer
    assert layer.dispatcher is dispatcher
    assert layer.dispatch_config.exchange == "flat"


def test_apply_a_root_module_and_a_subclass_are_swapped():
    root = StockMoE(WIDTH, nn.Linear(WIDTH, WIDTH), num_experts=2)
    assert type(moe_locality.apply(root)) is MoE
    net = moe_locality.apply(Net(UserMoE))
    assert type(net.blocks[0]) is UserMoE  # its own forward stays
    assert isinstance(net.blocks[0].deepspeed_moe, LocalityMOELayer)
    assert net(torch.randn(8, WIDTH)).shape == (8, WIDTH)
    assert net.blocks[0].deepspeed_moe.traffic.rows["dispatch"].sum() > 0


def test_apply_a_model_without_moe_layers_is_refused():
    with pytest.raises(ConfigError, match=r"found no deepspeed\.moe\.layer\.MoE in Linear"):
        moe_locality.apply(nn.Linear(2, 2))


def test_apply_a_wrong_section_is_refused_before_anything_changes():
    net = Net()
    with pytest.raises(ConfigError, match="exchnage"):
        moe_locality.apply(net, {"dispatch": {"exchnage": "flat"}})
    with pytest.raises(ConfigError, match=r"dispatch\.payload"):
        moe_locality.apply(net, {"dispatch": {"payload": "int3"}})
    assert type(net.a) is StockMoE


def test_apply_a_plan_that_does_not_fit_is_refused_before_anything_changes():
    net = Net()
    for plan in (PlacementPlan.linear(8, [0, 1], 1, 1), PlacementPlan.linear(4, [0], 1, 1)):
        with pytest.raises(PlacementError, match="the plan does not fit"):
            moe_locality.apply(net, plan=plan)
        assert type(net.a) is StockMoE


def test_initialize_shows_the_signature_of_deepspeeds():
    assert inspect.signature(moe_locality.initialize) == inspect.signature(deepspeed.initialize)
    assert "moe_locality around it" in moe_locality.initialize.__doc__


def test_initialize_needs_a_model_and_a_config():
    with pytest.raises(ConfigError, match="found model=NoneType, expected a torch module"):
        moe_locality.initialize(config={})


def test_apply_a_plan_relabels_and_the_model_stays_the_same():
    import dataclasses

    import numpy as np

    net = Net()
    for layer in (net.a, net.blocks[0]):
        for i, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            nn.init.normal_(expert.weight, std=0.1 * (i + 1))
    x = torch.randn(8, WIDTH)
    torch.manual_seed(1)
    expected = net(x)
    plan = dataclasses.replace(
        PlacementPlan.linear(4, [0, 1], 1, 1),
        physical_to_logical_map=np.array([[3, 1, 0, 2], [1, 0, 3, 2]], dtype=np.int32),
    )
    moe_locality.apply(net, plan=plan)
    assert net.a.deepspeed_moe.gate.slot_to_logical.tolist() == [3, 1, 0, 2]
    torch.manual_seed(1)
    torch.testing.assert_close(net(x), expected)


def test_apply_the_plan_of_the_section_is_used(tmp_path):
    plan = PlacementPlan.linear(
        num_experts=4, layer_ids=(0, 1), num_nodes=1, ranks_per_node=1
    ).to_dict()
    plan["physical_to_logical_map"] = [[3, 2, 1, 0], [1, 0, 3, 2]]
    path = tmp_path / "plan.json"
    PlacementPlan.from_dict(plan).write(path)
    net = moe_locality.apply(Net(), {"moe_locality": {"plan": str(path)}})
    assert net.a.deepspeed_moe.gate.slot_to_logical.tolist() == [3, 2, 1, 0]
    by_path = moe_locality.apply(Net(), plan=str(path))
    assert by_path.a.deepspeed_moe.gate.slot_to_logical.tolist() == [3, 2, 1, 0]
    with pytest.raises(PlacementError, match="none"):
        moe_locality.apply(Net(), {"plan": str(tmp_path / "none.json")})


@pytest.mark.parametrize("replicas", [0, 4])
def test_apply_a_model_with_two_ep_sizes_cannot_be_placed(replicas):
    """One plan was refused for 4 ranks, the next for 2; now one error says that none fits [E2]"""
    from moe_locality.layer.relabeling import plan_targets
    from moe_locality.layer.replicas import add_replicas

    net = Net()
    net.a = StockMoE(WIDTH, nn.Linear(WIDTH, WIDTH), num_experts=4, ep_size=2)
    net.blocks[0] = StockMoE(WIDTH, nn.Linear(WIDTH, WIDTH), num_experts=4, ep_size=4)
    for ranks in (2, 4):
        plan = PlacementPlan.linear(4, [0, 1], 1, ranks)
        with pytest.raises(PlacementError, match=r"different ep_size \(\[2, 4\]\), expected one"):
            (add_replicas if replicas else plan_targets)(net, plan)


def test_traffic_report_a_report_of_nothing_says_why(caplog):
    """The traffic report of a model that counts nothing was empty without a word [F3]"""
    from moe_locality.config import MoeLocalityConfig
    from moe_locality.layer.convert import LocalityRuntime

    runtime = LocalityRuntime(model=nn.Linear(2, 2), config=MoeLocalityConfig())
    with caplog.at_level("WARNING"):
        assert runtime.traffic_report()["per_layer"] == []
    assert "nothing was counted: AutoEP's own exchange" in caplog.text
