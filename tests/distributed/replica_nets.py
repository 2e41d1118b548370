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
    """Random slots with ``extra_per_rank`` (one number, or by layer) more on every rank than
    experts need.
    """
    rng = np.random.default_rng(seed)
    return random_plan(
        rng,
        layers=layers,
        experts=EXPERTS,
        nodes=nodes,
        ranks_per_node=world // nodes,
        slots_per_rank=np.add(EXPERTS // world, extra_per_rank),
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


class Net(nn.Module):
    """Two MoE layers with experts of odd sizes between linear layers; returns a loss."""

    def __init__(self, cls, ep_size, ep_rank):
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(WIDTH, WIDTH)
        options = {"num_experts": EXPERTS, "ep_size": ep_size, "k": TOP_K, "drop_tokens": False}
        expert = nn.Sequential(nn.Linear(WIDTH, 13), nn.GELU(), nn.Linear(13, WIDTH))
        self.moe1 = cls(WIDTH, expert, **options)
        self.moe2 = cls(WIDTH, expert, **options)
        self.last = nn.Linear(WIDTH, WIDTH)
        for number, moe in enumerate((self.moe1, self.moe2)):
            for local, module in enumerate(moe.deepspeed_moe.experts.deepspeed_experts):
                fill(module, 100 * number + ep_rank * (EXPERTS // ep_size) + local)

    def forward(self, x, y):
        x = self.first(x)
        out, aux1, _ = self.moe1(x)
        x = x + out
        out, aux2, _ = self.moe2(x)
        return (self.last(x + out) - y).float().square().sum() / 50 + 0.01 * (aux1 + aux2)


def config_of(stage, dtype, accumulate=1, **extra):
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 1000},
        "bf16": {"enabled": dtype == "bfloat16"},
        **extra,
    }


def engine_of(rank, ep_size, config, plan_path=None):
    """An engine of ``moe_locality.initialize``, from DeepSpeed's own layers."""
    from deepspeed.moe.layer import MoE

    import moe_locality

    net = Net(MoE, ep_size, rank % ep_size)
    section = {} if plan_path is None else {"plan": plan_path}
    cluster = {"num_nodes": 1, "ranks_per_node": torch.distributed.get_world_size()}
    given = {**config, "moe_locality": {"cluster": cluster, **section}}
    # collected before the replicas exist, as scripts do
    return moe_locality.initialize(
        model=net, model_parameters=list(net.parameters()), config=given
    )[0]


def stock_engine_of(rank, ep_size, config):
    import deepspeed
    from deepspeed.moe.layer import MoE

    net = Net(MoE, ep_size, rank % ep_size)
    return deepspeed.initialize(model=net, model_parameters=list(net.parameters()), config=config)[
        0
    ]


def train(engine, steps, rank, dtype="float32"):
    """The losses of a few steps, summed over the ranks; now and then a rank has no tokens."""
    losses = []
    micro = engine.gradient_accumulation_steps()
    for step in (step * micro + part for step in steps for part in range(micro)):
        generator = torch.Generator().manual_seed(100 * step + rank)
        count = 0 if step % 4 == rank else 5
        x, y = (torch.randn(1, count, WIDTH, generator=generator) for _ in range(2))
        loss = engine(*(t.to(getattr(torch, dtype)) for t in (x, y)))
        engine.backward(loss)
        engine.step()
        total = loss.detach().float().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item())
    return losses


def state_by_slot(engine):
    """{(layer, slot, piece): its bytes, whole} on every rank: weights, masters, moments."""
    from moe_locality.layer.state import expert_shards, moe_modules, state_source

    mine, source = [], state_source(engine)
    for number, (_, module) in enumerate(moe_modules(engine.module)):
        replicas = module.deepspeed_moe.replicas
        for local, expert in enumerate(module.deepspeed_moe.experts.deepspeed_experts):
            slot = replicas.ep_rank * replicas.slots_per_rank + local
            for piece in expert_shards(expert, source):
                if piece.local is not None:
                    values = piece.local.detach().float().reshape(-1).numpy()
                    mine.append(((number, slot, piece.name), piece.start, values))
    everyone = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    parts = {}
    for key, start, values in (entry for entries in everyone for entry in entries):
        parts.setdefault(key, {})[start] = values
    return {
        key: np.concatenate([found[start] for start in sorted(found)])
        for key, found in parts.items()
    }


def check_replicas_agree(engine):
    """Weights, masters and moments of all replicas are equal, bit for bit; returns their number."""
    from moe_locality.layer.state import moe_modules

    tables = [m.deepspeed_moe.replicas.slot_to_logical for _, m in moe_modules(engine.module)]
    first, compared = {}, 0
    for (number, slot, name), values in state_by_slot(engine).items():
        key = (number, int(tables[number][slot]), name)
        if key in first:
            assert np.array_equal(first[key], values), (key, np.abs(first[key] - values).max())
            compared += 1
        first.setdefault(key, values)
    return compared


def loss_of(model, rank):
    """The loss of one batch, without a step."""
    generator = torch.Generator().manual_seed(7 + rank)
    dtype = next(model.parameters()).dtype
    x, y = (torch.randn(1, 6, WIDTH, generator=generator).to(dtype) for _ in range(2))
    model.eval()
    with torch.no_grad():
        return model(x, y).float()


def local_weights(engine):
    """{(layer, logical expert): its state dict} of this rank's slots."""
    from moe_locality.layer.state import moe_modules

    found = {}
    for number, (_, module) in enumerate(moe_modules(engine.module)):
        layer = module.deepspeed_moe
        held = zip(layer.replicas.local_experts, layer.experts.deepspeed_experts, strict=True)
        found |= {(number, int(logical)): expert.state_dict() for logical, expert in held}
    return found
