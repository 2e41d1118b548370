"""Move the experts of one layer between the ranks of its EP group, in place, all or nothing.

A layer changes its order in steps that touch at most two slots of a rank. A step gathers what the
slots hold (weights, masters, moments), exchanges it point to point, compares checksums, writes,
reads back and compares again; all ranks vote before and after the writing. When any rank fails,
the step writes back what the slots held, the steps before it are taken back in reverse order, and
the layer is as it was, on every rank. A rank that fails still enters the collectives of its step,
so that none waits for it. Ctrl-C and SIGTERM wait for the end of a step, are taken back like a
failure, and end the program then (:func:`signals_deferred`).

Parameters stay the objects they were: their values are written into ``.data``, so optimizers,
hooks, flat buffers and references stay valid.
"""

import hashlib
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_locality.errors import PlacementError
from moe_locality.layer.fragments import (
    Piece,
    StateSource,
    expert_pieces,
    no_state,
    pack,
    parameter_pieces,
    slab_bytes,
    unpack,
    whole_bytes,
    whole_tensors,
)
from moe_locality.layer.moves import Step, plan_moves, plan_steps, source_slots, undone
from moe_locality.layer.relabel_weights import GATE_ROWS
from moe_locality.layer.vote import LostRanks, vote

NUM_SLABS = 3
"""Experts, with all their state, that a rank has room for beside the model during a move."""

TIMEOUT_S = 120.0
"""How long one exchange of a step may take. A step has at most two in a row, so who has not voted
after three times as long is lost.
"""


class Undone(PlacementError):
    """A rank failed; the layer is as it was before, on every rank.

    ``interrupted``: some rank was asked to end. ``stop``: what asked this one, unless a signal.
    """

    interrupted = False
    stop: BaseException | None = None


_noted: list[int] = []
"""Signals that came during a move."""


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Note SIGINT and SIGTERM while a move is under way; they take effect when the block ends.

    Elsewhere than in the main thread, and where another language handles them, they are left alone.
    """
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                handlers[number] = signal.signal(number, lambda got, _: _noted.append(got))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        came = list(_noted)
        _noted.clear()
        for number in came[:1]:
            signal.raise_signal(number)


@dataclass(slots=True, kw_only=True)
class MoveReport:
    """What a relocation did. Bytes and seconds are this rank's.

    Args:
        num_experts_moved: experts that changed rank, over all layers, in one EP group.
        sent_bytes: sent point to point to other ranks.
        gathered_bytes: put together from the parts of ZeRO by all-reduce, reading back included.
        buffer_bytes: the most that the move needed beside the model.
    """

    num_layers: int = 0
    num_experts_moved: int = 0
    sent_bytes: int = 0
    gathered_bytes: int = 0
    buffer_bytes: int = 0
    elapsed_s: float = 0.0

    def add(self, other: "MoveReport") -> None:
        """Count another layer in; the buffers of two layers are never held at once."""
        self.num_layers += other.num_layers
        self.num_experts_moved += other.num_experts_moved
        self.sent_bytes += other.sent_bytes
        self.gathered_bytes += other.gathered_bytes
        self.buffer_bytes = max(self.buffer_bytes, other.buffer_bytes)
        self.elapsed_s += other.elapsed_s


@dataclass(slots=True, kw_only=True)
class _Layer:
    """A layer on the move: what its slots here hold, and the buffers.

    ``errors`` are those of this rank since the last vote.
    """

    name: str
    slots: dict[int, list[Piece]]
    group: dist.ProcessGroup | None
    per_rank: int
    slabs: list[Tensor]
    report: MoveReport
    timeout_s: float
    errors: list[str] = field(default_factory=list)
    stop: BaseException | None = None
    undoing: bool = False

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Note an error of this rank; the vote raises it on all. So does a KeyboardInterrupt or a
        SystemExit, which goes on when the step is taken back.
        """
        try:
            yield
        except BaseException as error:  # noqa: BLE001
            self.errors.append(f"{type(error).__name__}: {error}")
            if not isinstance(error, Exception):
                self.stop = error

    def agree(self, digests: dict[str, str] | None = None) -> None:
        """Raise Undone on all ranks when any has an error or two digests of a thing differ."""
        if _noted and not self.undoing:
            self.errors.append(f"{signal.Signals(_noted[0]).name}: this rank was told to end")
        errors, self.errors = self.errors, []
        interrupted = bool(_noted) or self.stop is not None
        answers = vote((errors, digests or {}, interrupted), self.name, 3 * self.timeout_s)
        found = {rank: answer[0] for rank, answer in enumerate(answers) if answer[0]}
        seen: dict[str, tuple[int, str]] = {}
        for rank, (_, mine, _) in enumerate(answers):
            for thing, digest in mine.items():
                first, other = seen.setdefault(thing, (rank, digest))
                if other != digest:
                    found.setdefault(rank, []).append(
                        f"checksum {digest[:12]} of {thing.partition('|')[2]}, but {other[:12]} on "
                        f"rank {first}"
                    )
        if found:
            rank, texts = next(iter(found.items()))
            failure = Undone(f"ranks {sorted(found)} failed, rank {rank} with {texts[0]}")
            failure.interrupted, failure.stop = any(answer[2] for answer in answers), self.stop
            self.undoing = True
            raise failure


@torch.no_grad()
def relabel_layer(
    module: Any,
    current: np.ndarray,
    target: np.ndarray,
    *,
    group: dist.ProcessGroup | None,
    state: StateSource = no_state,
    name: str = "the layer",
    timeout_s: float = TIMEOUT_S,
) -> MoveReport:
    """Take a layer from one slot order to another; collective over all ranks.

    Args:
        module: a ``deepspeed.moe.layer.MoE``.
        group: its EP group; None where ``ep_size`` is 1.
        state: what the optimizer keeps for a parameter.
        timeout_s: see ``TIMEOUT_S``.

    Raises:
        Undone: a rank failed, and the layer is in ``current`` order again on all ranks.
        LostRanks: a rank ended or hangs.
        PlacementError: a rank failed, and then failed to put things back.
    """
    started = time.monotonic()
    moves = plan_moves(current, target, module.ep_size)
    report = MoveReport(num_layers=1, num_experts_moved=moves.num_travellers)
    if moves.is_empty:
        return report
    layer, gate = _open(module, group, state, name, report, timeout_s)
    done: list[Step] = []
    try:
        for step in plan_steps(moves, module.ep_size):
            _take(layer, step)
            done.append(step)
        _permute_gate(layer, gate, source_slots(current, target))
    except Undone as failure:
        for step in reversed(done):
            with _fatal(name, failure):
                _take(layer, undone(step))
        raise
    report.elapsed_s = time.monotonic() - started
    return report


def _open(
    module: Any, group: Any, state: StateSource, name: str, report: MoveReport, timeout_s: float
) -> tuple[_Layer, list[Piece]]:
    """Find what travels and make room for it, before anything is touched."""
    experts = list(module.deepspeed_moe.experts.deepspeed_experts)
    first = (0 if group is None else dist.get_rank(group)) * len(experts)
    layer = _Layer(
        name=name,
        slots={},
        group=group,
        per_rank=len(experts),
        slabs=[],
        report=report,
        timeout_s=timeout_s,
    )
    gate: list[Piece] = []
    with layer.guard():
        for number, expert in enumerate(experts):
            layer.slots[first + number] = expert_pieces(expert, state)
        gate = gate_pieces(module.deepspeed_moe.gate, state)
        largest = max(slab_bytes(layer.slots[first]), slab_bytes(gate))
        device = _wire_device(group, layer.slots[first])
        layer.slabs = [
            torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(NUM_SLABS)
        ]
        report.buffer_bytes = NUM_SLABS * largest
    layer.agree()
    return layer, gate


@contextmanager
def _fatal(name: str, failure: Exception) -> Iterator[None]:
    try:
        yield
    except LostRanks:
        raise
    except PlacementError as error:
        raise PlacementError(
            f"{name}: found a failure ({failure}) and then another while it was taken back "
            f"({error}): the experts of this layer are in no order. End this job and go on from "
            "the last checkpoint"
        ) from error


def _take(layer: _Layer, step: Step) -> None:
    """Do a step on all ranks, or leave everything as it was and raise Undone."""
    mine = [(read, written) for read, written in step if read in layer.slots]
    held: dict[int, Tensor] = {}
    for slab, (read, _) in zip(layer.slabs, mine, strict=False):
        held[read] = _view(slab, layer.slots[read])
        _gather(layer, layer.slots[read], held[read])
    arrived = _travel(layer, step, mine, held)
    wanted, digests = {}, {}
    with layer.guard():
        where = 0 if layer.group is None else dist.get_process_group_ranks(layer.group)[0]
        wanted = {written: _digest(slab) for written, slab in arrived.items()}
        sent = {written: _digest(held[read]) for read, written in mine}
        # sender and receiver name the same slot of the same EP group
        digests = {f"{where}|slot {slot}": digest for slot, digest in (sent | wanted).items()}
    layer.agree(digests)
    with layer.guard():
        for written, slab in arrived.items():
            unpack(slab, layer.slots[written])
    _verify_or_restore(
        layer,
        {written: (layer.slots[written], wanted[written], held[written]) for written in arrived},
        layer.slabs[-1],
    )


def _travel(
    layer: _Layer, step: Step, mine: list[tuple[int, int]], held: dict[int, Tensor]
) -> dict[int, Tensor]:
    """Exchange slabs point to point; [slot written here] -> what it shall hold."""
    if not mine:
        return {}
    if all(written in layer.slots for _, written in mine):
        return {written: held[read] for read, written in mine}  # a swap on this rank
    group = layer.group
    assert group is not None
    ranks = dist.get_process_group_ranks(group)
    ((slot, goes_to),) = mine
    source = next(read for read, written in step if written == slot)
    incoming = _view(layer.slabs[1], layer.slots[slot])
    with layer.guard():
        operations = [
            dist.P2POp(dist.isend, held[slot], ranks[goes_to // layer.per_rank], group),
            dist.P2POp(dist.irecv, incoming, ranks[source // layer.per_rank], group),
        ]
        for request in dist.batch_isend_irecv(operations):
            request.wait(timedelta(seconds=layer.timeout_s))
        layer.report.sent_bytes += held[slot].numel()
    return {slot: incoming}


def _verify_or_restore(
    layer: _Layer,
    written: dict[int, tuple[list[Piece], str, Tensor]],
    spare: Tensor,
) -> None:
    """Read back what was written; where any rank finds another checksum, put the old back.

    ``written``: pieces, the checksum they shall have, and what they held before.
    """
    for thing, (pieces, digest, _) in written.items():
        again = _view(spare, pieces)
        _gather(layer, pieces, again)
        with layer.guard():
            if _digest(again) != digest:
                raise PlacementError(f"slot {thing} does not hold what was sent to it")
    try:
        layer.agree()
    except Undone as failure:
        with _fatal(layer.name, failure):
            with layer.guard():
                for pieces, _, before in written.values():
                    unpack(before, pieces)
            layer.agree()
        raise


def _gather(layer: _Layer, pieces: list[Piece], buffer: Tensor) -> None:
    """Put the pieces together, whole, in ``buffer``: every rank that shares them does so at once.

    Each byte is on one rank and zero on the others, so the sum of the words is exact in any dtype.
    """
    with layer.guard():
        buffer.zero_()
        pack(pieces, buffer)
    group = next((piece.group for piece in pieces if piece.group is not None), None)
    if group is None or dist.get_world_size(group) == 1:
        return
    parts = buffer[whole_bytes(pieces) :].view(torch.int32)
    with layer.guard():
        request = dist.all_reduce(parts, group=group, async_op=True)
        assert request is not None
        request.wait(timedelta(seconds=layer.timeout_s))
        layer.report.gathered_bytes += 4 * parts.numel()


def gate_pieces(gate: nn.Module, state: StateSource) -> list[Piece]:
    """Return the per-expert tensors of a gate, moments too; a step counter stays."""
    found = []
    for name in GATE_ROWS:
        tensor = _find(gate, name)
        if tensor is not None:
            pieces = parameter_pieces(name, tensor, state)
            found += [piece for piece in pieces if piece.shape == tuple(tensor.shape)]
    return sorted(found, key=lambda piece: piece.group is not None)


def _permute_gate(layer: _Layer, pieces: list[Piece], source: np.ndarray) -> None:
    """Row s of every per-expert tensor of the gate takes row ``source[s]``."""
    before, after, spare = (_view(slab, pieces) for slab in layer.slabs)
    _gather(layer, pieces, before)
    digest = ""
    with layer.guard():
        after.copy_(before)
        for old, new in zip(
            whole_tensors(before, pieces), whole_tensors(after, pieces), strict=True
        ):
            new.copy_(old[torch.from_numpy(source).to(old.device)])
        digest = _digest(after)
    layer.agree()
    with layer.guard():
        unpack(after, pieces)
    _verify_or_restore(layer, {0: (pieces, digest, before)}, spare)


def _find(module: nn.Module, dotted: str) -> Tensor | None:
    found: Any = module
    for part in dotted.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, Tensor) else None


def _view(slab: Tensor, pieces: list[Piece]) -> Tensor:
    return slab[: slab_bytes(pieces)]


def _digest(slab: Tensor) -> str:
    return hashlib.blake2b(slab.cpu().numpy().data, digest_size=16).hexdigest()


def _wire_device(group: dist.ProcessGroup | None, pieces: list[Piece]) -> torch.device:
    """Device of the buffers: before ``initialize`` a model is often on the CPU while NCCL is up."""
    backend = "" if group is None else dist.get_backend(group)
    if backend == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    local = next((piece.local for piece in pieces if piece.local is not None), None)
    return torch.device("cpu") if backend == "gloo" or local is None else local.device
