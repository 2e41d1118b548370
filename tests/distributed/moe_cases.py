"""Shared by the tests of the layer: a small MoE layer of either class, and what comes out of it."""

import dataclasses
import itertools
import logging
from typing import Any

import torch
from torch import nn

WIDTH = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration of the layer; ``moe`` holds constructor arguments."""

    name: str
    moe: dict[str, Any]
    dtype: torch.dtype = torch.float32
    train: bool = True
    used_token: bool = False


def quiet() -> None:
    from deepspeed.utils.logging import logger

    logger.setLevel(logging.ERROR)


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))


class TupleExpert(nn.Module):
    """Returns (output, bias), as Megatron's layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = expert()

    def forward(self, x):
        return self.inner(x), torch.ones(3)


def cases() -> list[Case]:
    """Every k with and without dropping, and each special path of the gate once or more."""
    made = [
        Case(
            name=f"k{k}-{'drop' if drop else 'dropless'}-{str(dtype).removeprefix('torch.')}",
            moe={"k": k, "drop_tokens": drop},
            dtype=dtype,
        )
        for k, drop, dtype in itertools.product(
            (1, 2, 4), (True, False), (torch.float32, torch.bfloat16)
        )
    ]
    made += [
        Case(name="k1-no-rts", moe={"k": 1, "use_rts": False}),
        Case(name="k1-jitter", moe={"k": 1, "noisy_gate_policy": "Jitter"}),
        Case(name="k1-rsample", moe={"k": 1, "noisy_gate_policy": "RSample"}),
        Case(name="k2-jitter", moe={"k": 2, "noisy_gate_policy": "Jitter"}),
        Case(name="k1-used-token", moe={"k": 1}, used_token=True),
        Case(name="k2-no-sampling", moe={"k": 2, "top2_2nd_expert_sampling": False}),
        Case(name="k2-residual", moe={"k": 2, "use_residual": True}),
        Case(name="k1-eval", moe={"k": 1, "eval_capacity_factor": 0.5}, train=False),
        Case(name="k4-eval", moe={"k": 4, "eval_capacity_factor": 0.5}, train=False),
        Case(name="k2-tuple", moe={"k": 2, "expert": "tuple"}),
        Case(name="k1-tight", moe={"k": 1, "capacity_factor": 0.25, "min_capacity": 1}),
        Case(name="k4-tight", moe={"k": 4, "capacity_factor": 0.25, "min_capacity": 1}),
    ]
    return made


def build(cls: type, case: Case, ep_size: int, num_experts: int = 8, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    arguments = dict(case.moe)
    kind = TupleExpert if arguments.pop("expert", None) == "tuple" else expert
    layer = cls(WIDTH, kind(), num_experts=num_experts, ep_size=ep_size, **arguments)
    # DeepSpeed copies one expert, so all start equal: make each its own, by its logical number
    rank = torch.distributed.get_rank() % ep_size if torch.distributed.is_initialized() else 0
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    for local, module in enumerate(experts):
        fill_expert(module, rank * len(experts) + local)
    layer.to(case.dtype)
    layer.set_deepspeed_parallelism()
    return layer.train(case.train)


def fill_expert(module: nn.Module, logical: int) -> None:
    generator = torch.Generator().manual_seed(1000 + logical)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def inputs(case: Case, rank: int, tokens: tuple[int, int] = (4, 12), seed: int = 7) -> tuple:
    generator = torch.Generator().manual_seed(seed + 31 * rank)
    x = torch.randn(*tokens, WIDTH, generator=generator).to(case.dtype).requires_grad_()
    used = None
    if case.used_token:
        used = (torch.rand(tokens[0] * tokens[1], generator=generator) < 0.7).long()
    return x, used


def run(layer: nn.Module, case: Case, rank: int, tokens: tuple[int, int] = (4, 12)) -> dict:
    """Forward and backward; every rank of a layer draws its own noise from the same seed."""
    x, used = inputs(case, rank, tokens)
    torch.manual_seed(99 + rank)
    output, l_aux, exp_counts = layer(x, used)
    (output.float().square().sum() + l_aux).backward()
    result = {
        "output": output.detach(),
        "l_aux": l_aux.detach(),
        "exp_counts": exp_counts.clone(),
        "noise_after": torch.rand(3),
        "grad input": x.grad,
    }
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        result[f"grad {name}"] = parameter.grad
    return result
