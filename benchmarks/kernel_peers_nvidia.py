"""Transformer Engine's Triton permutation and Megatron-core's, for training and for inference."""

import importlib
from typing import Any

import torch
from kernel_cases import Case, Step, autograd_step
from kernel_peers import Peer, dense, hidden, import_alone
from torch import Tensor


def transformer_engine(case: Case) -> Step:
    """The Triton permutation by mask map, its map included."""
    te: Any = import_alone(
        "transformer_engine.pytorch.triton.permutation",
        "transformer_engine.common",
        "transformer_engine.common.triton",
    )
    tokens, width = case.x.shape
    experts, rows_out = case.num_experts, case.num_rows

    def step():
        probs, mask = dense(case, case.weights)
        where = te.make_row_id_map(mask.to(torch.int32), tokens, experts)
        rows, _, _ = te.permute_with_mask_map(
            case.x, where, None, None, None, tokens, experts, rows_out, width, None
        )
        out, _ = te.unpermute_with_mask_map(rows, where, probs, None, None, tokens, experts, width)
        grad_rows, grad_probs = te.unpermute_with_mask_map_bwd_with_merging_probs(
            case.grad, where, rows, probs, None, tokens, experts, rows_out, width
        )
        grad_x, _ = te.unpermute_with_mask_map(
            grad_rows, where, None, None, None, tokens, experts, width
        )
        return out, grad_x, grad_probs.gather(1, case.ids.long())

    return step


def megatron(name: str) -> Any:
    """A module of Megatron-core; a Transformer Engine without its CUDA half ends its import."""
    with hidden("transformer_engine"):
        return importlib.import_module(f"megatron.core.{name}")


def megatron_unfused(case: Case) -> Step:
    """``moe_utils.permute`` and ``unpermute`` without Transformer Engine."""
    moe_utils = megatron("transformer.moe.moe_utils")

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        probs, mask = dense(case, weights)
        rows, _, order, *_ = moe_utils.permute(x, mask, num_out_tokens=case.num_rows)
        return moe_utils.unpermute(rows, order, x.shape, probs=probs, routing_map=mask)

    return autograd_step(case, forward)


def megatron_inference(case: Case) -> Step:
    """``permute_tokens`` and ``unpermute_tokens`` of the fused MoE for inference: fp32 out."""
    moe = megatron("inference.moe.permute")
    tokens = len(case.x)
    valid = torch.full((), tokens, dtype=torch.int32, device=case.x.device)

    def step():
        rows, weights, where, ends = moe.permute_tokens(
            case.x, case.weights, case.ids, 0, case.num_experts, valid
        )
        return (moe.unpermute_tokens(rows, weights, where, tokens, ends[-1:], valid),)

    return step


PEERS = [
    Peer(
        name="Transformer Engine Triton",
        distribution="transformer_engine",
        read_from="2.20.2",
        make=transformer_engine,
        gpu_only="it allocates its results on the GPU whatever it is given",
    ),
    Peer(
        name="Megatron-core unfused",
        distribution="megatron-core",
        read_from="0.19.2",
        make=megatron_unfused,
    ),
    Peer(
        name="Megatron-core inference",
        distribution="megatron-core",
        read_from="0.19.2",
        make=megatron_inference,
        forward_only=True,
        note="no backward; its rows come in no fixed order, its sums are atomic",
    ),
]
