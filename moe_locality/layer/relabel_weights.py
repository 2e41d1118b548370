"""The whole tensors of an expert or a gate, in and out of byte buffers, and rows of a gate."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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


def gate_rows(gate: nn.Module) -> list[Tensor]:
    """Return the tensors of a gate that have a row per expert."""
    return [tensor for tensor in (_find(gate, name) for name in GATE_ROWS) if tensor is not None]


def permute_gate(
    gate: nn.Module, source: np.ndarray, optimizer: torch.optim.Optimizer | None
) -> None:
    """Row s of every per-expert tensor of the gate, moments too, takes row ``source[s]``."""
    for tensor in gate_rows(gate):
        for rows in (tensor, *(state for _, state in state_tensors(optimizer, tensor))):
            if rows.shape == tensor.shape:  # a step counter stays
                rows.data.copy_(rows.data[torch.from_numpy(source).to(rows.device)])


def _find(module: nn.Module, dotted: str) -> Tensor | None:
    found: Any = module
    for part in dotted.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, Tensor) else None


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
