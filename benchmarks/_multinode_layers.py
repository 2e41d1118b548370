"""The layers that ``_multinode_program.py`` compares: DeepSpeed's, transformers' and ours.

All compute the same function: SwiGLU experts with weights of their own, top-k of a softmax, weights
of a token's experts summing to one, nothing dropped. Recorded routes are replayed without a changed
gate: the first E columns of a token are scores of the experts and the gate's weights are the
identity, so any gate picks what was recorded. ``reference`` computes it in one process.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import moe_locality
from moe_locality import compat
from moe_locality.placement import PlacementPlan

Layer = Callable[[Tensor], Tensor]
"""[T, D] tokens to [T, D]"""


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class DeepSpeedLayers(nn.Module):
    """``deepspeed.moe.layer.MoE`` times L; what ``moe_locality.apply`` turns into ours."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        experts, width = sizes["experts"], sizes["width"]
        self.layers = nn.ModuleList(
            deepspeed.moe.layer.MoE(
                width,
                SwiGLU(width, sizes["hidden"]),
                num_experts=experts,
                ep_size=world,
                k=sizes["top_k"],
                drop_tokens=False,
            )
            for _ in range(sizes["layers"])
        )
        for module in self.layers:
            layer: Any = module.deepspeed_moe
            mine = layer.experts.deepspeed_experts
            with torch.no_grad():
                layer.gate.wg.weight.copy_(torch.eye(experts, width))
                for place, expert in enumerate(mine, start=rank * len(mine)):
                    parts = (expert.gate, expert.up, expert.down)
                    for part, weight in zip(parts, expert_weights(place, sizes), strict=True):
                        part.weight.copy_(weight)


def expert_weights(expert: int, sizes: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Return gate [F, D], up [F, D] and down [D, F] of an expert, the same on all ranks."""
    generator = torch.Generator().manual_seed(expert)
    width, hidden = sizes["width"], sizes["hidden"]
    gate, up = torch.randn(2, hidden, width, generator=generator) / width**0.5
    return gate, up, torch.randn(width, hidden, generator=generator) / hidden**0.5


def build(case: dict[str, Any], sizes: dict[str, Any], topology: Any) -> tuple[Any, list[Layer]]:
    """Return the model of a case and its L layers."""
    dtype = getattr(torch, sizes["dtype"])
    if case["layer"] == "autoep":
        return build_auto_ep(case, sizes, dtype, topology)
    if case["layer"] == "transformers":
        return build_transformers(case, sizes, dtype, topology)
    model = DeepSpeedLayers(sizes).to(dtype)
    if case["layer"] == "ours":
        plan = PlacementPlan.read(case["plan"]) if case["plan"] else None
        section = {"dispatch": case["dispatch"]}
        moe_locality.apply(model, section, plan=plan, topology=topology)
    layers: list[Any] = list(model.layers)
    for layer in layers:
        layer.set_deepspeed_parallelism()
    return model, [lambda x, layer=layer: layer(x)[0] for layer in layers]


def build_auto_ep(
    case: dict[str, Any], sizes: dict[str, Any], dtype: torch.dtype, topology: Any
) -> tuple[Any, list[Layer]]:
    """As ``deepspeed.initialize`` makes them of a Qwen3-MoE; with ``dispatch``, our exchange."""
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "expert_parallel": {
            "enabled": True,
            "autoep_size": int(os.environ["WORLD_SIZE"]),
            "preset_model": "qwen3_moe",
        },
    }
    compat.let_auto_ep_read_recorders()
    engine = deepspeed.initialize(model=qwen3_moe(sizes), config=ds_config)[0]
    blocks: list[Any] = [layer.mlp.to(dtype) for layer in engine.module.model.layers]
    wanted = "AutoEPMoELayer"
    if "dispatch" in case:
        wanted, section = "LocalityAutoEPMoELayer", {"dispatch": case["dispatch"]}
        moe_locality.apply(engine, section, plan=plan_of(case, sizes), topology=topology)
    found = {type(block).__name__ for block in blocks}
    if found != {wanted}:
        raise RuntimeError(f"found {found} in the model, expected {wanted} everywhere")
    return engine.module, [lambda x, block=block: block(x[None])[0] for block in blocks]


def build_transformers(
    case: dict[str, Any], sizes: dict[str, Any], dtype: torch.dtype, topology: Any
) -> tuple[Any, list[Layer]]:
    """As ``from_pretrained`` makes them with transformers' own expert parallelism, or with ours.

    The layers are the experts modules: routes are computed here, for both alike.
    """
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    folder, world = case["checkpoint"], int(os.environ["WORLD_SIZE"])
    if dist.get_rank() == 0 and not Path(folder).exists():
        qwen3_moe(sizes).to(dtype).save_pretrained(folder)
    dist.barrier()
    if case["ep_implementation"] == "moe_locality":
        moe_locality.register({"dispatch": case["dispatch"]})
    spread = DistributedConfig(
        fsdp_size=world, ep_size=world, ep_implementation=case["ep_implementation"]
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=spread)
    if case["ep_implementation"] == "moe_locality":
        moe_locality.apply(model, plan=plan_of(case, sizes), topology=topology)

    with torch.no_grad():  # FSDP sets itself up at the first call of the whole model
        model(torch.zeros(1, 1, dtype=torch.long))

    def call(x: Tensor, module: Any) -> Tensor:
        scores = torch.softmax(x[:, : sizes["experts"]].float(), dim=1)
        weights, ids = scores.topk(sizes["top_k"], dim=1)
        return module(x, ids, (weights / weights.sum(dim=1, keepdim=True)).to(x.dtype))

    return model, [lambda x, module=module: call(x, module) for module in experts_of(model)]


def experts_of(model: Any) -> list[Any]:
    """Return the experts module of every layer of a transformers model."""
    return [layer.mlp.experts for layer in model.model.layers]


def plan_of(case: dict[str, Any], sizes: dict[str, Any]) -> PlacementPlan | None:
    """Return the plan of a case, made for some layers of a model, for all layers of this one."""
    if not case["plan"]:
        return None
    plan = PlacementPlan.read(case["plan"])
    return dataclasses.replace(plan, layer_ids=tuple(range(sizes["layers"])))


def qwen3_moe(sizes: dict[str, Any]) -> Any:
    """Return a Qwen3-MoE of transformers with the experts of ``expert_weights``."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=8,
        hidden_size=sizes["width"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        num_experts=sizes["experts"],
        num_experts_per_tok=sizes["top_k"],
        moe_intermediate_size=sizes["hidden"],
        norm_topk_prob=True,
    )
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            block: Any = layer.mlp
            block.gate.weight.copy_(torch.eye(sizes["experts"], sizes["width"]))
            for expert in range(sizes["experts"]):
                gate, up, down = expert_weights(expert, sizes)
                block.experts.gate_up_proj[expert] = torch.cat([gate, up])
                block.experts.down_proj[expert] = down
    return model


def tokens(ids: np.ndarray, sizes: dict[str, Any]) -> Tensor:
    """[T, D] tokens whose gate picks ``ids [T, K]``, the first with the highest score."""
    picked = torch.from_numpy(ids.astype(np.int64))
    x = torch.randn(len(picked), sizes["width"]) * 0.1
    x[:, : sizes["experts"]] = 0
    x.scatter_(1, picked, torch.linspace(6, 3, picked.shape[1]).expand(picked.shape))
    return x.to(getattr(torch, sizes["dtype"])).requires_grad_()


def loss_of(out: Tensor) -> Tensor:
    return out.float().square().mean()


def reference(x: Tensor, ids: np.ndarray, sizes: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return output and gradient of the tokens, computed in one process in float32."""
    x, dtype = x.detach().float().requires_grad_(), getattr(torch, sizes["dtype"])
    picked = torch.from_numpy(ids.astype(np.int64))
    scores = torch.softmax(x[:, : sizes["experts"]], dim=1).gather(1, picked)
    weights = scores / scores.sum(dim=1, keepdim=True)
    out = torch.zeros_like(x)
    for expert in range(sizes["experts"]):
        token, place = torch.where(picked == expert)
        gate, up, down = (w.to(dtype).float() for w in expert_weights(expert, sizes))
        rows = x[token]
        result = (F.silu(rows @ gate.t()) * (rows @ up.t())) @ down.t()
        out = out.index_add(0, token, weights[token, place, None] * result)
    loss_of(out).backward()
    assert x.grad is not None
    return out.detach(), x.grad


def distance(found: Tensor, wanted: Tensor) -> float:
    """Return the length of the difference over the length of what is wanted."""
    return float((found.float() - wanted).norm() / wanted.norm())
