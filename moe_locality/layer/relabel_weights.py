"""Move the experts of one layer between the ranks of its EP group, in place.

Parameters stay the objects they were: their values are written into ``.data``, so optimizers,
hooks, flat buffers and references stay valid. Collective over the EP group.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_locality.layer.moves import Moves, plan_moves, source_slots

GATE_ROWS = ("wg.weight", "wg.bias", "bias", "e_score_correction_bias", "expert_bias")
"""Tensors of a gate that have one row (or number) per expert."""

_ALIGN_BYTES = 16  # a slice of a byte buffer can be viewed as any dtype only at its alignment


def expert_tensors(expert: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """Return what travels with one expert: parameters, buffers, then the optimizer's tensors."""
    return [tensor for _, tensor in named_expert_tensors(expert, optimizer)]


def named_expert_tensors(
    expert: nn.Module, optimizer: torch.optim.Optimizer | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in an order that is the same for every expert of a layer."""
    yield from expert.named_buffers()
    for name, parameter in expert.named_parameters():
        yield name, parameter
        for key, value in state_tensors(optimizer, parameter):
            yield f"{name}:{key}", value


def state_tensors(
    optimizer: torch.optim.Optimizer | None, parameter: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that the optimizer keeps for a parameter, by name."""
    if optimizer is None or parameter not in optimizer.state:
        return
    state = optimizer.state[parameter]
    yield from ((key, state[key]) for key in sorted(state) if isinstance(state[key], Tensor))


@torch.no_grad()
def relabel_layer(
    module: Any,
    current: np.ndarray,
    target: np.ndarray,
    *,
    group: dist.ProcessGroup | None,
    optimizer: torch.optim.Optimizer | None,
) -> int:
    """Take a layer from one slot order to another; return how many experts changed rank.

    Args:
        module: a ``deepspeed.moe.layer.MoE``.
        group: its EP group; None where ``ep_size`` is 1.
        optimizer: a plain torch optimizer over the module's own parameters, or None.
    """
    moves = plan_moves(current, target, module.ep_size)
    if moves.is_empty:
        return 0
    experts = list(module.deepspeed_moe.experts.deepspeed_experts)
    tensors = [expert_tensors(expert, optimizer) for expert in experts]
    ep_rank = 0 if group is None else dist.get_rank(group)
    first = ep_rank * len(experts)
    if moves.rounds:
        assert group is not None
        _exchange(tensors, moves, first, group)
    _permute_local(tensors, moves.local[first : first + len(experts)] - first)
    permute_gate(module.deepspeed_moe.gate, source_slots(current, target), optimizer)
    return moves.num_travellers


def permute_gate(
    gate: nn.Module, source: np.ndarray, optimizer: torch.optim.Optimizer | None
) -> None:
    """Row s of every per-expert tensor of the gate, moments too, takes row ``source[s]``."""
    for name in GATE_ROWS:
        tensor = _find(gate, name)
        if tensor is None:
            continue
        for rows in (tensor, *(state for _, state in state_tensors(optimizer, tensor))):
            if rows.shape == tensor.shape:  # a step counter stays
                rows.data.copy_(rows.data[torch.from_numpy(source).to(rows.device)])


def _find(module: nn.Module, dotted: str) -> Tensor | None:
    found: Any = module
    for part in dotted.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, Tensor) else None


def _exchange(
    tensors: list[list[Tensor]], moves: Moves, first: int, group: dist.ProcessGroup
) -> None:
    """Send and receive, round by round; a received expert goes into the slot that was freed."""
    here = range(first, first + len(tensors))
    ranks = dist.get_process_group_ranks(group)
    device = _wire_device(group, tensors[0])
    for pairs in moves.rounds:
        mine = next((pair for pair in pairs if pair[0] in here), None)
        if mine is None:
            continue  # this rank rests: it neither sends nor receives
        slot, destination = mine[0], ranks[mine[1] // len(tensors)]
        source = next(ranks[read // len(tensors)] for read, written in pairs if written == slot)
        outgoing = pack(tensors[slot - first], device)
        incoming = torch.empty_like(outgoing)
        operations = [
            dist.P2POp(dist.isend, outgoing, destination, group),
            dist.P2POp(dist.irecv, incoming, source, group),
        ]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        unpack(incoming, tensors[slot - first])


def _permute_local(tensors: list[list[Tensor]], source: np.ndarray) -> None:
    """Slot s takes what slot ``source[s]`` holds, in place, with one expert set aside."""
    done = source == np.arange(len(source))
    for start in range(len(source)):
        if done[start]:
            continue
        aside = [tensor.data.clone() for tensor in tensors[start]]
        slot = start
        while int(source[slot]) != start:
            for new, old in zip(tensors[slot], tensors[int(source[slot])], strict=True):
                new.data.copy_(old.data)
            done[slot] = True
            slot = int(source[slot])
        for new, old in zip(tensors[slot], aside, strict=True):
            new.data.copy_(old)
        done[slot] = True


def _padded_bytes(tensor: Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    return -(-size // _ALIGN_BYTES) * _ALIGN_BYTES


def pack(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Lay tensors of any dtypes one after the other in one byte buffer (gloo has no fp8 type)."""
    buffer = torch.zeros(
        sum(map(_padded_bytes, tensors)), dtype=torch.uint8, device=tensors[0].device
    )
    start = 0
    for tensor in tensors:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        buffer[start : start + raw.numel()] = raw
        start += _padded_bytes(tensor)
    return buffer.to(device)


def unpack(buffer: Tensor, tensors: list[Tensor]) -> None:
    """Write what :func:`pack` laid out into ``tensors``, whose shapes and dtypes are the same."""
    start = 0
    for tensor in tensors:
        raw = buffer[start : start + tensor.numel() * tensor.element_size()]
        tensor.data.copy_(raw.view(tensor.dtype).view(tensor.shape))
        start += _padded_bytes(tensor)


def _wire_device(group: dist.ProcessGroup, tensors: list[Tensor]) -> torch.device:
    """Device of the buffers: before ``initialize`` a model is often on the CPU while NCCL is up."""
    backend = dist.get_backend(group)
    if backend == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if backend == "gloo" else tensors[0].device
