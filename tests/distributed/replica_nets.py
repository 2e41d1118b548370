"""Layers and small models with replicas, and the same without, for the tests of replicas."""

import numpy as np
import torch
from torch import nn

from moe_locality.placement import PlacementPlan
from tests.distributed import relabel_nets as nets
from tests.unit.placement.cases import random_plan

EXPERTS, WIDTH, TOP_K = nets.EXPERTS, nets.WIDTH, 3


class Scale(nn.Module):
    """An expert whose result for a row does not depend, in a single bit, on the other rows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x * self.weight


def plan_of(world, nodes=1, seed=0, layers=2, extra_per_rank=1, loaded=True) -> PlacementPlan:
    """Random slots with ``extra_per_rank`` more on every rank than experts need."""
    rng = np.random.default_rng(seed)
    return random_plan(
        rng,
        layers=layers,
        experts=EXPERTS,
        nodes=nodes,
        ranks_per_node=world // nodes,
        slots_per_rank=EXPERTS // world + extra_per_rank,
        expert_load=rng.integers(1, 100, (layers, EXPERTS)) if loaded else None,
    )


def fill(module: nn.Module, logical: int) -> None:
    generator = torch.Generator().manual_seed(1000 + logical)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)


def layer_of(ep_size, ep_rank, dtype, expert=None, **options):
    """A layer of ours without replicas; values follow from the logical number of an expert."""
    from moe_locality import MoE

    torch.manual_seed(0)
    given = {"num_experts": EXPERTS, "ep_size": ep_size, "k": TOP_K, "drop_tokens": False}
    layer = MoE(WIDTH, expert or nets._expert(), **given, **options)
    for local, module in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
        fill(module, ep_rank * (EXPERTS // ep_size) + local)
    return layer.to(dtype)


def tokens_of(rank, dtype):
    """Uneven numbers of tokens, none on the last rank of four or more."""
    generator = torch.Generator().manual_seed(50 + rank)
    count = 0 if rank % 4 == 3 else 6 + 5 * (rank % 3)
    return torch.randn(1, count, WIDTH, generator=generator).to(dtype)
