"""Training with the real engine: losses equal DeepSpeed's, step by step, whatever the placement."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from tests.distributed.moe_cases import WIDTH, expert, fill_expert, quiet
from tests.launch import run_ranks
from tests.tolerances import LOSS

NUM_EXPERTS = 4
STEPS = 5


class Net(nn.Module):
    def __init__(self, cls, world, k=2):
        super().__init__()
        torch.manual_seed(3)
        options = {"num_experts": NUM_EXPERTS, "ep_size": world, "k": k, "min_capacity": 1}
        self.first = nn.Linear(WIDTH, WIDTH)
        self.moe1 = cls(WIDTH, expert(), **options)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.moe2 = cls(WIDTH, expert(), use_residual=True, **options)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y):
        x = self.first(x)
        out, aux1, _ = self.moe1(x)
        x = self.middle(x + out)
        out, aux2, _ = self.moe2(x)
        return (self.last(x + out) - y).float().square().mean() + 0.01 * (aux1 + aux2)


def make_net(cls, rank, world, orders=None):
    from moe_locality.layer.state import set_slot_to_logical

    net = Net(cls, world)
    per_rank = NUM_EXPERTS // world
    for index, moe in enumerate((net.moe1, net.moe2)):
        order = np.arange(NUM_EXPERTS) if orders is None else orders[index]
        mine = order[rank * per_rank : (rank + 1) * per_rank]
        for logical, module in zip(mine, moe.deepspeed_moe.experts.deepspeed_experts, strict=True):
            fill_expert(module, int(logical) + 50 * index)
        if orders is not None:
            weight = moe.deepspeed_moe.gate.wg.weight
            with torch.no_grad():
                weight.copy_(weight.clone()[torch.from_numpy(order)])
            set_slot_to_logical(moe, order)
    return net


def config_of(stage, dtype, **extra):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 3000},
        "bf16": {"enabled": dtype == "bfloat16"},
        **extra,
    }


def train(engine, rank, dtype, steps=STEPS):
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + rank)
        x, y = (
            torch.randn(4, 8, WIDTH, generator=generator).to(getattr(torch, dtype))
            for _ in range(2)
        )
        torch.manual_seed(500 + 10 * step + rank)  # the noise of the gate
        loss = engine(x, y)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / torch.distributed.get_world_size())
    return losses


def losses_equal_stock(rank, world, combos):
    import deepspeed
    from deepspeed.moe.layer import MoE as Stock

    from moe_locality import MoE

    quiet()
    orders = [np.array([2, 0, 3, 1]), np.array([3, 2, 1, 0])]
    for stage, dtype in combos:
        runs = {}
        for name, cls, placed in (
            ("stock", Stock, None),
            ("ours", MoE, None),
            ("placed", MoE, orders),
        ):
            net = make_net(cls, rank, world, placed)
            engine = deepspeed.initialize(
                model=net, model_parameters=list(net.parameters()), config=config_of(stage, dtype)
            )[0]
            assert engine.has_moe_layers
            runs[name] = train(engine, rank, dtype)
            engine.destroy()
        rtol, atol = LOSS[dtype]
        for name in ("ours", "placed"):
            np.testing.assert_allclose(
                runs[name], runs["stock"], rtol, atol, err_msg=f"{name}, stage {stage}, {dtype}"
            )
        assert runs["stock"][-1] < runs["stock"][0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_equal_stock_at_every_stage(dtype):
    combos = [(stage, dtype) for stage in (0, 1, 2)]
    run_ranks(losses_equal_stock, 2, combos, deepspeed=True, timeout_s=240)


def losses_with_checkpointing_and_autocast(rank, world):
    """Activation checkpointing recomputes the exchange; autocast makes the experts' rows bf16."""
    from deepspeed.moe.layer import MoE as Stock
    from torch.utils.checkpoint import checkpoint

    from moe_locality import MoE

    quiet()
    results = []
    for cls in (Stock, MoE):
        net = make_net(cls, rank, world)
        for moe in (net.moe1, net.moe2):
            moe.set_deepspeed_parallelism()
        generator = torch.Generator().manual_seed(rank)
        x, y = (torch.randn(4, 8, WIDTH, generator=generator) for _ in range(2))
        torch.manual_seed(5 + rank)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = checkpoint(net, x.requires_grad_(), y, use_reentrant=False)
        loss.backward()
        results.append((loss.detach(), x.grad, *(p.grad for p in net.parameters())))
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_activation_checkpointing_and_autocast():
    run_ranks(losses_with_checkpointing_and_autocast, 2, deepspeed=True)


def timers_are_kept(rank, world):
    import deepspeed

    from moe_locality import MoE

    quiet()
    net = make_net(MoE, rank, world)
    engine = deepspeed.initialize(
        model=net,
        model_parameters=list(net.parameters()),
        config=config_of(0, "float32", wall_clock_breakdown=True),
    )[0]
    train(engine, rank, "float32", steps=1)
    layer = net.moe1.deepspeed_moe
    assert layer.time_moe >= layer.time_falltoall > 0
    assert layer.time_salltoall > 0
    assert layer.gate.gate_time > 0


def test_the_timers_that_the_engine_reads():
    run_ranks(timers_are_kept, 2, deepspeed=True)


def checkpoints_are_stock(rank, world, folder):
    """What our layers save is a plain DeepSpeed checkpoint, and the other way round."""
    import deepspeed
    from deepspeed.moe.layer import MoE as Stock

    from moe_locality import MoE

    quiet()

    def engine_of(cls):
        net = make_net(cls, rank, world)
        return deepspeed.initialize(
            model=net, model_parameters=list(net.parameters()), config=config_of(1, "float32")
        )[0]

    for source, target in ((MoE, Stock), (Stock, MoE)):
        saved = engine_of(source)
        train(saved, rank, "float32", steps=2)
        path = f"{folder}/{source.__module__}"
        saved.save_checkpoint(path, tag="t")
        expected = train(saved, rank, "float32", steps=2)
        restored = engine_of(target)
        restored.load_checkpoint(path, tag="t")
        found = train(restored, rank, "float32", steps=2)
        np.testing.assert_allclose(found, expected, *LOSS["float32"])


def test_checkpoints_go_both_ways(tmp_path):
    run_ranks(checkpoints_are_stock, 2, str(tmp_path), deepspeed=True, timeout_s=240)


def the_section_goes_through_deepspeed(rank, world, folder):
    import deepspeed
    from deepspeed.moe.layer import MoE as Stock

    quiet()
    config = {**config_of(0, "float32"), "moe_locality": {"dispatch": {"exchange": "flat"}}}
    path = f"{folder}/ds_{rank}.json"
    with open(path, "w", encoding="utf-8") as file:
        json.dump(config, file)
    for source in (config, path):
        net = Net(Stock, world)
        engine = deepspeed.initialize(
            model=net, model_parameters=list(net.parameters()), config=source
        )[0]
        assert engine.config["moe_locality"] == {"dispatch": {"exchange": "flat"}}


def test_stock_deepspeed_ignores_the_section(tmp_path):
    run_ranks(the_section_goes_through_deepspeed, 1, str(tmp_path), deepspeed=True)
