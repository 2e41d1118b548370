"""DeepSpeed's local dispatches: ``MOELayer`` since 0.19.4 and AutoEP, default and fused."""

import importlib
from typing import Any

import torch
from kernel_cases import Case, Step, autograd_step
from kernel_peers import Peer
from torch import Tensor


def moe_layer(case: Case) -> Step:
    """Index gathers into a buffer of equal capacities (einsums until 0.19.3).

    Capacity is the load of the busiest expert, so that nothing is dropped.
    """
    from deepspeed.moe import sharded_moe

    encode: Any = sharded_moe._sparse_encode
    decode: Any = sharded_moe._sparse_decode
    experts = case.num_experts
    capacity = int(torch.bincount(case.ids.reshape(-1).long(), minlength=experts).max())

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        ids = case.ids.t().contiguous()
        mask = torch.zeros(len(x), experts, dtype=torch.bool, device=x.device)
        mask.scatter_(1, case.ids.long(), True)
        places = (mask.cumsum(0) - 1).gather(1, case.ids.long()).t()
        slots = sharded_moe._route_slots(ids, places, experts, capacity)
        rows = encode(x, slots, experts, capacity)
        return decode(rows.reshape(-1, x.shape[1]), slots, weights.t(), len(x))

    return autograd_step(case, forward)


def auto_ep(case: Case, *, fused: bool) -> Step:
    """The local path (``ep_size=1``) of ``AutoEPMoELayer``, weights after the experts.

    ``fused`` is its ``combine_impl="fused_weighted_sum"``, otherwise ``"weighted_sum"``.
    """
    layer: Any = importlib.import_module("deepspeed.module_inject.auto_ep_layer")
    count = importlib.import_module("deepspeed.moe.ep_count").count_tokens_per_expert
    name = "deepspeed.ops.triton_ops.autoep_fused_token_ops"
    restore = importlib.import_module(name).fused_weighted_restore if fused else None

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        ids, shape = case.ids.long(), (1, *x.shape)
        order = torch.argsort(ids.view(-1), stable=True)
        routed = x[order // case.top_k]
        counts = count(ids, case.num_experts)
        rows, where, _, kept = layer.permute_by_local_expert(routed, counts)
        back = layer.unpermute_by_local_expert(rows, where, kept)
        if restore is not None:
            out = restore(back, weights, order, case.top_k, shape)
        else:
            how = (case.top_k, "post", "weighted_sum")
            out = layer.combine_from_routed(back, weights, order, *how, shape)
        return out.view(x.shape)

    return autograd_step(case, forward)


PEERS = [
    Peer(
        name="DeepSpeed MOELayer (sparse)",
        distribution="deepspeed",
        read_from="0.19.8",
        make=moe_layer,
    ),
    Peer(
        name="DeepSpeed AutoEP, default",
        distribution="deepspeed",
        read_from="0.19.8",
        make=lambda case: auto_ep(case, fused=False),
    ),
    Peer(
        name="DeepSpeed AutoEP, fused_weighted_sum",
        distribution="deepspeed",
        read_from="0.19.8",
        make=lambda case: auto_ep(case, fused=True),
        gpu_only="its Triton kernels are defined only where there is a GPU",
    ),
]
