"""DeepSpeed's local dispatches: ``MOELayer`` since 0.19.4 and AutoEP, default and fused."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from kernel_cases import Case, Step, autograd_step
from kernel_peers import Peer, expert_counts
from torch import Tensor


def moe_layer(case: Case) -> Step:
    busiest = int(expert_counts(case).max())  # not in the step: that would wait for the device

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        args = (x, case.ids, weights, case.num_experts)
        return moe_layer_forward(*args, lambda rows: rows, capacity=busiest)

    return autograd_step(case, forward)


def moe_layer_forward(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    experts: Callable[[Tensor], Tensor],
    *,
    capacity: int | None = None,
) -> Tensor:
    """Index gathers into a buffer ``[E, C, D]`` of equal capacities (einsums until 0.19.3).

    Capacity is the load of the busiest expert, so that nothing is dropped; to look it up waits for
    the device, as ``MOELayer`` does without dropping.
    """
    from deepspeed.moe import sharded_moe

    encode: Any = sharded_moe._sparse_encode
    decode: Any = sharded_moe._sparse_decode
    mask = torch.zeros(len(x), num_experts, dtype=torch.bool, device=x.device)
    mask.scatter_(1, ids.long(), True)
    capacity = int(mask.sum(0).max()) if capacity is None else capacity
    places = (mask.cumsum(0) - 1).gather(1, ids.long()).t()
    slots = sharded_moe._route_slots(ids.int().t().contiguous(), places, num_experts, capacity)
    rows = encode(x, slots, num_experts, capacity).reshape(num_experts, capacity, -1)
    return decode(experts(rows).reshape(-1, x.shape[1]), slots, weights.t(), len(x))


def auto_ep(case: Case, *, fused: bool) -> Step:
    def forward(x: Tensor, weights: Tensor) -> Tensor:
        return auto_ep_forward(
            x, case.ids, weights, case.num_experts, lambda rows, counts: rows, fused=fused
        )

    return autograd_step(case, forward)


def auto_ep_forward(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    num_experts: int,
    experts: Callable[[Tensor, Tensor], Tensor],
    *,
    fused: bool,
) -> Tensor:
    """The local path (``ep_size=1``) of ``AutoEPMoELayer``, weights after the experts.

    ``fused`` is its ``combine_impl="fused_weighted_sum"``, otherwise ``"weighted_sum"``. Experts
    get the padded rows and the counts, padding included.
    """
    layer: Any = importlib.import_module("deepspeed.module_inject.auto_ep_layer")
    count = importlib.import_module("deepspeed.moe.ep_count").count_tokens_per_expert
    ids, shape, top_k = ids.long(), (1, *x.shape), ids.shape[1]
    order = torch.argsort(ids.view(-1), stable=True)
    routed = x[order // top_k]
    rows, where, counts, kept = layer.permute_by_local_expert(routed, count(ids, num_experts))
    back = layer.unpermute_by_local_expert(experts(rows, counts), where, kept)
    if fused:
        name = "deepspeed.ops.triton_ops.autoep_fused_token_ops"
        restore = importlib.import_module(name).fused_weighted_restore
        out = restore(back, weights, order, top_k, shape)
    else:
        out = layer.combine_from_routed(back, weights, order, top_k, "post", "weighted_sum", shape)
    return out.view(x.shape)


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
