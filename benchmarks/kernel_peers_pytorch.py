"""What plain torch, torch.compile, torchtitan and torchao do."""

import importlib
from typing import Any

import torch
from kernel_cases import Case, Step, autograd_step
from kernel_peers import Peer, expert_counts, sorted_routes
from torch import Tensor

ALIGNMENT = 32
"""Rows of an expert that torchao pads to: the block of its grouped MXFP8 product."""


def index_add(case: Case) -> Step:
    """What a newcomer writes: index_select, multiply, index_add."""

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        order, token = sorted_routes(case)
        rows = x.index_select(0, token)
        scaled = rows * weights.reshape(-1).index_select(0, order)[:, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, scaled)

    return autograd_step(case, forward)


def compiled(case: Case) -> Step:
    """Gather, multiply and sum over k in fp32, fused by torch.compile."""

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        order, token = sorted_routes(case)
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device)
        rows = x.index_select(0, token)
        picked = rows[position].view(*case.ids.shape, -1)
        return (picked.float() * weights[..., None]).sum(1).to(x.dtype)

    how = "inductor" if case.x.is_cuda else "aot_eager"  # a dry run needs no C++ compiler
    return autograd_step(case, torch.compile(forward, backend=how))


def torchtitan(case: Case) -> Step:
    """``LocalTokenDispatcher``: argsort, gather, deterministic scatter-add."""
    module: Any = importlib.import_module("torchtitan.models.common.token_dispatcher")
    kind = module.LocalTokenDispatcher
    dispatcher = kind(kind.Config(num_experts=case.num_experts, top_k=case.top_k))

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        counts = expert_counts(case)
        rows, _, kept = dispatcher.dispatch(x, weights, case.ids.long(), counts)
        return dispatcher.combine(rows, kept, x)

    return autograd_step(case, forward)


def torchao(case: Case) -> Step:
    """``permute_and_pad`` and its inverse behind the sort that torchtitan does before them."""
    pad = importlib.import_module("torchao.prototype.moe_training.ep.permute").permute_and_pad
    name = "torchao.prototype.moe_training.ep.unpermute"
    back = importlib.import_module(name).unpermute_hp_fwd_mxfp8_bwd

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        order, token = sorted_routes(case)
        counts = expert_counts(case, torch.int32)
        shape, rows, where, *_ = pad(
            x.index_select(0, token), counts, 1, case.num_experts, ALIGNMENT
        )
        scores = weights.reshape(-1).index_select(0, order)[:, None]
        scaled = (back(rows, where, shape).float() * scores).to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, scaled)

    return autograd_step(case, forward)


PEERS = [
    Peer(
        name="torch index_select + index_add",
        distribution="torch",
        read_from="2.11 and 2.13",
        make=index_add,
    ),
    Peer(
        name="torch.compile, gather and sum",
        distribution="torch",
        read_from="2.11 and 2.13",
        make=compiled,
    ),
    Peer(
        name="torchtitan LocalTokenDispatcher",
        distribution="torchtitan",
        read_from="0.3.0",
        make=torchtitan,
        note="imports spmd_types, tyro and torchdata",
    ),
    Peer(
        name="torchao permute_and_pad",
        distribution="torchao",
        read_from="0.18.0",
        make=torchao,
        note=f"rows padded to {ALIGNMENT} per expert; the sort and the sum are torch's",
    ),
]
