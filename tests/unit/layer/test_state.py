"""What travels with an expert: tensors of any dtype, buffers, per-expert biases of the router."""

import numpy as np
import pytest
import torch
from deepspeed.moe.layer import MoE
from torch import nn

from moe_locality.errors import ConfigError
from moe_locality.layer.relabeling import relabel
from moe_locality.layer.state import (
    TensorShard,
    check_state_moves,
    current_order,
    flat_bytes,
    pack,
    plain_state,
    unpack,
)
from moe_locality.placement import PlacementPlan

EXPERTS, WIDTH = 4, 6


def shards_of(tensors):
    return [TensorShard(name="", shape=tuple(t.shape), dtype=t.dtype, local=t) for t in tensors]


def test_pack_any_dtype_and_shape_survives_the_byte_buffer():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(3, 5, generator=generator), torch.tensor(7.0), torch.empty(0)]
    kinds = (torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int64)
    values += [values[0].to(kind) for kind in (*kinds, torch.bool)]
    values.append(values[0].t())  # not contiguous
    buffer = torch.empty(flat_bytes(shards_of(values)), dtype=torch.uint8)
    pack(shards_of(values), buffer)
    copies = [torch.zeros_like(value) for value in values]
    copies[-1] = torch.zeros(3, 5).t()
    unpack(buffer, shards_of(copies))
    for value, copy in zip(values, copies, strict=True):
        assert copy.dtype == value.dtype
        assert torch.equal(
            copy.view(torch.uint8) if copy.element_size() == 1 else copy,
            value.view(torch.uint8) if value.element_size() == 1 else value,
        )


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        expert = nn.Linear(WIDTH, WIDTH)
        expert.register_buffer("seen", torch.zeros(2, dtype=torch.int64))
        self.moe = MoE(WIDTH, expert, num_experts=EXPERTS, ep_size=1)
        gate = self.moe.deepspeed_moe.gate
        gate.register_buffer("e_score_correction_bias", torch.arange(EXPERTS) * 1.0)
        for number, copy in enumerate(self.experts):
            with torch.no_grad():
                copy.weight.fill_(number)
                copy.bias.fill_(number)
            copy.seen.fill_(number)

    @property
    def experts(self):
        return self.moe.deepspeed_moe.experts.deepspeed_experts


def plan_of(order):
    return PlacementPlan(
        layer_ids=(0,),
        num_experts=EXPERTS,
        num_nodes=1,
        ranks_per_node=2,
        physical_to_logical_map=[order],
    )


def test_relabel_buffers_and_biases_of_the_router_go_along():
    model, order = Model(), [2, 0, 3, 1]
    gate = model.moe.deepspeed_moe.gate
    rows = gate.wg.weight.detach().clone()
    relabel(model, plan_of(order))  # a plan for two ranks: on one rank every order fits
    assert current_order(model.moe).tolist() == order
    assert [int(expert.seen[0]) for expert in model.experts] == order
    assert [expert.bias[0].item() for expert in model.experts] == order
    assert gate.e_score_correction_bias.tolist() == order
    assert torch.equal(gate.wg.weight, rows[order])
    assert isinstance(gate.slot_to_logical, np.ndarray)
    assert "slot_to_logical" not in " ".join(model.state_dict())


def stepped(optimizer_class, model, **options):
    optimizer = optimizer_class(model.parameters(), **options)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def test_check_state_moves_state_that_is_not_per_weight_is_refused():
    model = Model()
    check_state_moves(model.moe, plain_state(stepped(torch.optim.AdamW, model)), "moe")
    with pytest.raises(ConfigError, match=r"'col_var' of shape \(1, 6\), expected \(4, 6\)"):
        check_state_moves(model.moe, plain_state(stepped(torch.optim.Adafactor, model)), "moe")


def test_check_state_moves_experts_with_unlike_state_are_refused():
    model = Model()
    optimizer = stepped(torch.optim.AdamW, model)
    del optimizer.state[model.experts[1].weight]
    with pytest.raises(ConfigError, match="different tensors or optimizer states on one rank"):
        check_state_moves(model.moe, plain_state(optimizer), "moe")


def test_relabel_what_is_no_model_is_refused():
    with pytest.raises(ConfigError, match="found a dict, expected a torch module"):
        relabel({}, plan_of(range(EXPERTS)))
