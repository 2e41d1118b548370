"""A small model with two MoE layers whose experts differ, and engines around it."""

import hashlib

import numpy as np
import torch
from torch import nn

from moe_locality.placement import PlacementPlan

EXPERTS, WIDTH, CLASSES = 8, 8, 5


class Net(nn.Module):
    def __init__(self, layer, ep_size, **moe):
        super().__init__()
        options = {"num_experts": EXPERTS, "ep_size": ep_size, "k": 2, "min_capacity": 1}
        options |= {"use_rts": False, "top2_2nd_expert_sampling": False, "drop_tokens": False}
        options |= moe
        self.first = nn.Linear(WIDTH, WIDTH)
        self.moe1 = layer(WIDTH, _expert(), **options)
        self.moe2 = layer(WIDTH, _expert(), **options)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        h = self.first(x)
        a, l1, self.counts1 = self.moe1(h)
        h = h + a
        b, l2, self.counts2 = self.moe2(h)
        self.l_aux = l1 + l2
        return self.last(h + b)


def _expert():
    return nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))


def layer_class(kind):
    if kind == "stock":
        from deepspeed.moe.layer import MoE
    else:
        from moe_locality.layer.moe import MoE
    return MoE


def build(kind="stock", ep_size=1, ep_rank=0, **moe):
    """The same model on any number of ranks: an expert's values follow from its global number."""
    net = Net(layer_class(kind), ep_size, **moe)
    local = EXPERTS // ep_size
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            head, mark, tail = name.partition("deepspeed_experts.")
            if mark:
                number, rest = tail.split(".", 1)
                name = f"{head}{int(number) + ep_rank * local}.{rest}"
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
            generator = torch.Generator().manual_seed(seed)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return net


def plan_of(ep_size, seed, layers=2):
    """A random permutation per layer (seed None: linear)."""
    plan = PlacementPlan.linear(EXPERTS, range(layers), 1, ep_size)
    if seed is None:
        return plan
    rng = np.random.default_rng(seed)
    rows = np.stack([rng.permutation(EXPERTS) for _ in range(layers)])
    return PlacementPlan(
        layer_ids=tuple(range(layers)),
        num_experts=EXPERTS,
        num_nodes=1,
        ranks_per_node=ep_size,
        physical_to_logical_map=rows,
    )


def config_of(zero=0, precision="fp32", clip=0.0, **changes):
    adam = {"lr": 1e-2, "torch_adam": True}
    found = {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_optimization": {"stage": zero},
        "gradient_clipping": clip,
    }
    if precision != "fp32":
        found[precision] = {"enabled": True}
    if precision == "fp16":
        found[precision]["initial_scale_power"] = 8
    return found | changes


def engine_of(net, zero=0, precision="fp32", optimizer=True, **options):
    import deepspeed

    config = config_of(zero, precision, **options)
    if not optimizer:
        del config["optimizer"]
    engine, *_ = deepspeed.initialize(
        model=net, model_parameters=list(net.parameters()) if optimizer else None, config=config
    )
    return engine


def batch(step, rank, tokens=6):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(4, tokens, WIDTH, generator=generator)
    return x, torch.randint(CLASSES, (4, tokens), generator=generator)


def train(engine, steps, rank):
    """Losses of a few steps, this rank's."""
    engine.train()
    losses = []
    dtype = next(engine.module.parameters()).dtype
    for step in steps:
        x, y = batch(step, rank)
        logits = engine(x.to(dtype)).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss = loss + 0.01 * engine.module.l_aux
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def logits_of(model, rank, step=99):
    model.eval()
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return model(batch(step, rank)[0].to(dtype)).float().clone()


def weights_of(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_bits(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def ep_rank_of(rank, ep_size):
    """DeepSpeed's default layout: EP groups are consecutive ranks."""
    return rank % ep_size
