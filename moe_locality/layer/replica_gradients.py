"""Training with replicas: every replica of an expert gets the sum of the gradients of all.

An identity stands between the parameters of replicated experts and the forward pass. Its backward
runs after the experts' and before that of the dispatch, on every rank at the same place between the
exchanges of the layer; the holders of an expert swap their gradients and each adds them up in slot
order, in fp32. So all have the same bits, and DeepSpeed's hooks (reduction over data-parallel
ranks, ZeRO, accumulation) see the gradient that an expert without replicas would have; with three
or more expert-data-parallel ranks each sees a part of their sum, and zeros.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_locality import compat
from moe_locality.layer.experts import ExpertsMode, grouping_pays, run_experts
from moe_locality.layer.grouped import recognize
from moe_locality.layer.relabel_weights import pack, unpack
from moe_locality.layer.replica_map import LayerReplicas


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedExpert:
    """An expert of this rank that others hold too.

    ``count``: its parameters among those of the exchange. ``ranks``: the global ranks of all
    holders in slot order; ``own``: this rank's place among them.
    """

    count: int
    ranks: tuple[int, ...]
    own: int


def run_with_summed_gradients(
    experts: Any,
    rows: Tensor,
    tokens_per_expert: tuple[int, ...],
    mode: ExpertsMode,
    replicas: LayerReplicas,
    group: Any,
) -> Tensor:
    """:func:`~moe_locality.layer.experts.run_experts`, with gradients summed over the replicas.

    ``group``: the EP group, None for the world. Backward is collective among the holders of an
    expert.
    """
    names, parameters, shared = _collect(experts.deepspeed_experts, replicas, group)
    if not parameters:
        return run_experts(experts, rows, tokens_per_expert, mode)
    if mode == "grouped" or grouping_pays(rows):
        recognize(experts.deepspeed_experts)  # it copies an expert, so before others stand in
    edp_group = compat.expert_data_parallel_group(getattr(parameters[0], "group_name", ""))
    stand_ins = _SumOverReplicas.apply(shared, group, edp_group, *parameters)
    return torch.func.functional_call(
        _Runner(experts, mode),
        dict(zip(names, stand_ins, strict=True)),
        (rows, tokens_per_expert),
    )


class _Runner(nn.Module):
    """``run_experts`` as a module, so that torch can put other tensors in the parameters' place."""

    def __init__(self, experts: nn.Module, mode: ExpertsMode) -> None:
        super().__init__()
        self.experts = experts
        self.mode: ExpertsMode = mode
        self.training = experts.training

    def forward(self, rows: Tensor, tokens_per_expert: tuple[int, ...]) -> Tensor:
        return run_experts(self.experts, rows, tokens_per_expert, self.mode)


def _collect(
    experts: nn.ModuleList, replicas: LayerReplicas, group: Any
) -> tuple[list[str], list[Tensor], list[SharedExpert]]:
    """Names (below a :class:`_Runner`) and parameters to train of the experts that others hold."""
    names, parameters, shared = [], [], []
    ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    for local, holders in replicas.shared:
        found = [(n, p) for n, p in experts[local].named_parameters() if p.requires_grad]
        names += [f"experts.deepspeed_experts.{local}.{name}" for name, _ in found]
        parameters += [parameter for _, parameter in found]
        shared.append(
            SharedExpert(
                count=len(found),
                ranks=tuple(ranks[holder] for holder in holders),
                own=holders.index(replicas.ep_rank),
            )
        )
    return names, parameters, shared


class _SumOverReplicas(torch.autograd.Function):
    """Parameters as they are; gradients summed over the replicas."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, shared: list[SharedExpert], group: Any, edp_group: Any, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.shared, ctx.group, ctx.edp_group = shared, group, edp_group
        return tuple(parameter.detach() for parameter in parameters)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        summed: list[Tensor] = []
        for expert in ctx.shared:  # one after the other: room for the copies of one expert
            mine = list(grads[len(summed) : len(summed) + expert.count])
            total = sum_in_order(_swap(mine, expert, ctx.group))
            summed += _own_part(total, ctx.edp_group)
        return None, None, None, *summed


def _swap(mine: list[Tensor], expert: SharedExpert, group: Any) -> list[list[Tensor]]:
    """Return the gradients of all holders in slot order. Collective among the holders."""
    if not mine:
        return [mine]
    outgoing = pack(mine, mine[0].device)
    incoming = {rank: torch.empty_like(outgoing) for rank in expert.ranks}
    others = [rank for place, rank in enumerate(expert.ranks) if place != expert.own]
    operations = [dist.P2POp(dist.isend, outgoing, rank, group) for rank in others]
    operations += [dist.P2POp(dist.irecv, incoming[rank], rank, group) for rank in others]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    found = []
    for place, rank in enumerate(expert.ranks):
        theirs = mine
        if place != expert.own:
            theirs = [grad.new_empty(grad.shape) for grad in mine]
            unpack(incoming[rank], theirs)
        found.append(theirs)
    return found


def _own_part(grads: list[Tensor], edp_group: Any) -> list[Tensor]:
    """Return the gradients summed over the expert-data-parallel ranks, a part per rank: zeros
    elsewhere. Collective over ``edp_group``.

    DeepSpeed adds these ranks up in an order that depends, from three ranks on, on where an element
    lies in its buffers, which differs between replicas. So each rank adds up one part in rank
    order, and what DeepSpeed adds to it are zeros: exact in every order.
    """
    size = 1 if edp_group is None else dist.get_world_size(edp_group)
    if size < 3 or not grads:
        return grads  # a + b is b + a
    sizes = [grad.numel() for grad in grads]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    part = -(-flat.numel() // size)
    outgoing = flat.new_zeros(size * part)
    outgoing[: flat.numel()] = flat
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=edp_group)
    parts = torch.zeros_like(outgoing).view(size, part)
    parts[dist.get_rank(edp_group)] = sum_in_order([[p] for p in incoming.view(size, part)])[0]
    found = parts.view(-1)[: flat.numel()].split(sizes)
    return [new.view(old.shape).to(old.dtype) for new, old in zip(found, grads, strict=True)]


def sum_in_order(replicas: list[list[Tensor]]) -> list[Tensor]:
    """Add up the gradients of replicas in the order given, in fp32 (or wider where they are)."""
    summed = []
    for grads in zip(*replicas, strict=True):
        total = grads[0].to(torch.promote_types(grads[0].dtype, torch.float32), copy=True)
        for grad in grads[1:]:
            total += grad
        summed.append(total.to(grads[0].dtype))
    return summed
