"""Where the tensors of a parameter are on this rank: the weight, its fp32 master, its moments.

A *piece* is one of them. A plain torch optimizer keeps moments beside the parameter; DeepSpeed's
fp16 and bf16 optimizers at ZeRO stage 0 keep a whole fp32 master; ZeRO 1 and 2 and
``BF16_Optimizer`` keep, on each rank of the expert-data-parallel group, a part of a flat fp32
master and of flat moments. A *slab* is one byte buffer with all the pieces of an expert, whole.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_locality import compat
from moe_locality.errors import ConfigError

_ALIGN_BYTES = 16  # a slice of a byte buffer can be viewed as any dtype only at its alignment


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """One tensor that belongs to a parameter.

    Args:
        name: parameter, or parameter:state.
        shape: of the whole tensor.
        local: the tensor; or, where ``group`` is set, the flat part that this rank holds (None: no
            part), which begins at element ``start``.
        group: process group whose ranks hold the parts; None where the whole tensor is here.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    local: Tensor | None
    start: int = 0
    group: Any = None

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


StateSource = Callable[[Tensor], list[Piece]]
"""Pieces that an optimizer keeps for a parameter; named by the state alone ("exp_avg")."""


def no_state(parameter: Tensor) -> list[Piece]:
    """The state of a model that has no optimizer."""
    return []


def plain_state(optimizer: torch.optim.Optimizer) -> StateSource:
    """State of an optimizer that steps the model's own parameters."""
    return lambda parameter: _whole(optimizer.state.get(parameter, {}))


def copied_state(optimizer: Any) -> StateSource:
    """Masters and state of ``FP16_UnfusedOptimizer``: one whole fp32 copy per parameter."""
    master_of = {
        id(parameter): master
        for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for parameter, master in zip(parameters, masters, strict=True)
    }

    def pieces(parameter: Tensor) -> list[Piece]:
        master = master_of.get(id(parameter))
        if master is None:
            return []
        return [_whole_piece("fp32", master), *_whole(optimizer.state.get(master, {}))]

    return pieces


def partitioned_state(optimizer: Any) -> StateSource:
    """Masters and state of ZeRO 1 and 2 and of ``BF16_Optimizer``: parts of flat tensors."""
    flats = getattr(optimizer, "single_partition_of_fp32_groups", None)
    if flats is None:
        flats = optimizer.fp32_groups_flat_partition
    groups = getattr(optimizer, "bit16_groups", None)
    groups = optimizer.bf16_groups if groups is None else groups
    group_of = {id(p): number for number, members in enumerate(groups) for p in members}
    state = optimizer.optimizer.state

    def pieces(parameter: Tensor) -> list[Piece]:
        found = compat.master_fragment(parameter)
        if found is None:
            return []
        fragment, group = found
        # every rank needs the names of the states, also one that holds no part
        flat = flats[group_of[id(parameter)]]
        tensors = {"fp32": flat, **_partitioned_tensors(flat, state.get(flat, {}))}
        return [_part(key, parameter, tensors[key], fragment, group) for key in sorted(tensors)]

    return pieces


def _part(key: str, parameter: Tensor, flat: Tensor, fragment: Any, group: Any) -> Piece:
    local, start = None, 0
    if fragment is not None:
        address = fragment.get_hp_fragment_address()
        local = flat.data.narrow(0, address.start, address.numel)
        start = fragment.lp_fragment_address.start
    return Piece(
        name=key,
        shape=tuple(parameter.shape),
        dtype=flat.dtype,
        local=local,
        start=start,
        group=group,
    )


def _partitioned_tensors(flat: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
    found = {}
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.numel() == 1 != flat.numel():
            continue  # a step counter is the same for all parameters of the group
        if value.shape != flat.shape:
            raise ConfigError(
                f"found the optimizer state {key!r} of shape {tuple(value.shape)}, expected "
                f"{tuple(flat.shape)} like its partition: this optimizer's state cannot follow the "
                "experts: relabel the model before deepspeed.initialize"
            )
        found[key] = value
    return found


def _whole(state: dict[str, Any]) -> list[Piece]:
    return [_whole_piece(key, state[key]) for key in sorted(state) if torch.is_tensor(state[key])]


def _whole_piece(name: str, tensor: Tensor) -> Piece:
    return Piece(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, local=tensor)


def expert_pieces(expert: nn.Module, state: StateSource) -> list[Piece]:
    """Return what travels with one expert, in an order that is the same for all of a layer."""
    found = [_whole_piece(name, buffer) for name, buffer in expert.named_buffers()]
    for name, parameter in expert.named_parameters():
        found += parameter_pieces(name, parameter, state)
    return sorted(found, key=lambda piece: piece.group is not None)


def parameter_pieces(name: str, parameter: Tensor, state: StateSource) -> Iterator[Piece]:
    """Yield the parameter itself, then what the optimizer keeps for it."""
    yield _whole_piece(name, parameter)
    for piece in state(parameter):
        yield Piece(
            name=f"{name}:{piece.name}",
            shape=piece.shape,
            dtype=piece.dtype,
            local=piece.local,
            start=piece.start,
            group=piece.group,
        )


# -- slabs -----------------------------------------------------------------------------------------


def slab_bytes(pieces: list[Piece]) -> int:
    """Size of the byte buffer that holds the pieces, whole."""
    return sum(_padded_bytes(piece) for piece in pieces)


def whole_bytes(pieces: list[Piece]) -> int:
    """Bytes at the front of a slab that every rank has whole; the parts come behind them."""
    return slab_bytes([piece for piece in pieces if piece.group is None])


def pack(pieces: list[Piece], buffer: Tensor) -> None:
    """Write what this rank holds into ``buffer``; what others hold is zero (gloo has no fp8 type,
    so a slab is bytes).
    """
    buffer.zero_()
    for piece, start in _places(pieces):
        if piece.local is not None:
            raw = piece.local.detach().contiguous().reshape(-1).view(torch.uint8)
            first = start + piece.start * piece.dtype.itemsize
            buffer[first : first + raw.numel()].copy_(raw)


def unpack(buffer: Tensor, pieces: list[Piece]) -> None:
    """Write a slab into the tensors of this rank, whose shapes and dtypes are the same."""
    for piece, start in _places(pieces):
        if piece.local is not None:
            first = start + piece.start * piece.dtype.itemsize
            raw = buffer[first : first + piece.local.numel() * piece.dtype.itemsize]
            piece.local.data.copy_(raw.view(piece.dtype).view(piece.local.shape))


def whole_tensors(buffer: Tensor, pieces: list[Piece]) -> Iterator[Tensor]:
    """Yield the whole tensors of a slab, as views."""
    for piece, start in _places(pieces):
        yield buffer[start : start + piece.num_bytes].view(piece.dtype).view(piece.shape)


def _places(pieces: list[Piece]) -> Iterator[tuple[Piece, int]]:
    start = 0
    for piece in pieces:
        yield piece, start
        start += _padded_bytes(piece)


def _padded_bytes(piece: Piece) -> int:
    return -(-piece.num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
