"""Replicas without ranks: sums in order, parameters for the optimizer, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from moe_locality import MoE
from moe_locality.dispatch import SlotMap
from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer.experts import sum_in_order
from moe_locality.layer.relabeling import relabel
from moe_locality.layer.replicas import add_replicas, has_replicas, with_new_parameters
from moe_locality.layer.state import LayerReplicas, set_slot_to_logical
from moe_locality.placement import PlacementPlan


def model_with_replicas():
    """Four experts on one rank and, by hand, copies of two of them behind."""
    model = nn.Sequential(nn.Linear(4, 4), MoE(4, nn.Linear(4, 4), num_experts=4))
    before = list(model.parameters())
    layer = model[1].deepspeed_moe
    experts = layer.experts.deepspeed_experts
    experts.extend([copy.deepcopy(experts[0]), copy.deepcopy(experts[2])])
    slots = np.array([0, 1, 2, 3, 0, 2])
    layer.replicas = LayerReplicas(slot_to_logical=slots, ep_rank=0, num_ranks=1)
    return model, before


def ids(parameters):
    return [id(parameter) for parameter in parameters]


def test_sum_in_order_the_sum_is_taken_in_fp32_and_in_order():
    values = [2.0**24, 1.0, 1.0, -(2.0**24)]
    grads = [[torch.tensor([value])] for value in values]
    assert sum_in_order(grads)[0].item() == 0.0  # each 1 is lost
    assert sum_in_order(grads[1:3] + grads[::3])[0].item() == 2.0
    low = [[torch.tensor([value], dtype=torch.bfloat16)] for value in (256.0, 1.0, 1.0)]
    assert sum_in_order(low)[0].item() == 258.0  # in bf16 it would stay 256
    assert sum_in_order(low)[0].dtype == torch.bfloat16
    assert low[0][0].item() == 256.0
    wide = [[torch.tensor([value], dtype=torch.float64)] for value in (2.0**40, 1.0)]
    assert sum_in_order(wide)[0].item() == 2.0**40 + 1


def test_with_new_parameters_new_parameters_follow_in_a_list_in_groups_and_in_an_optimizer():
    model, before = model_with_replicas()
    assert has_replicas(model)
    found = with_new_parameters(model, before)
    assert sorted(ids(found)) == sorted(ids(model.parameters()))
    assert with_new_parameters(model, found) == found
    assert sorted(ids(with_new_parameters(model, model.parameters()))) == sorted(ids(found))

    groups = [
        {"params": [p for p in before if p.dim() == 1], "weight_decay": 0.0},
        {"params": (p for p in before if p.dim() > 1)},
    ]
    found = with_new_parameters(model, groups)
    assert [{p.dim() for p in group["params"]} for group in found] == [{1}, {2}]
    assert sum(len(group["params"]) for group in found) == len(list(model.parameters()))
    assert found[0]["weight_decay"] == 0.0

    optimizer = torch.optim.AdamW(before)
    assert with_new_parameters(model, optimizer) is optimizer
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))


def test_with_new_parameters_an_optimizer_with_state_is_refused():
    model, before = model_with_replicas()
    optimizer = torch.optim.AdamW(before)
    for parameter in before:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    with pytest.raises(ConfigError, match="has taken steps"):
        with_new_parameters(model, optimizer)


def test_relabel_a_layer_with_replicas_is_not_relabelled():
    model, _ = model_with_replicas()
    with pytest.raises(PlacementError, match="replicas do not move"):
        relabel(model, PlacementPlan.linear(4, [0], 1, 1))


def test_add_replicas_replicas_need_our_layer_and_the_ranks_of_the_plan():
    from deepspeed.moe.layer import MoE as Stock

    plan = PlacementPlan(
        layer_ids=(0,),
        num_experts=4,
        num_nodes=1,
        ranks_per_node=2,
        physical_to_logical_map=[[0, 1, 2, 3, 0, 1]],
    )
    with pytest.raises(PlacementError, match="expert-parallel ranks"):
        add_replicas(MoE(4, nn.Linear(4, 4), num_experts=4), plan)
    with pytest.raises(ConfigError, match="a layer of DeepSpeed's"):
        add_replicas(Stock(4, nn.Linear(4, 4), num_experts=4, ep_size=2), plan)


def test_add_replicas_the_gate_names_the_serving_slot():
    layer = MoE(4, nn.Linear(4, 4), num_experts=4)
    gate = layer.deepspeed_moe.gate
    gate.serving = SlotMap(np.array([4, 1, 5, 3]))
    ids_of = torch.tensor([[0, 2], [-1, 3]], dtype=torch.int32)
    assert gate.slot_ids(ids_of).tolist() == [[4, 5], [-1, 3]]
    assert gate.slot_ids(ids_of).dtype == torch.int32
    gate.serving = None
    set_slot_to_logical(layer, [1, 0, 3, 2])
    assert gate.slot_ids(ids_of).tolist() == [[1, 3], [-1, 2]]
