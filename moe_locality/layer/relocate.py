"""Move the experts of one layer between the ranks of its EP group, in place, all or nothing.

A layer changes its order in steps that touch at most two slots of a rank. A step gathers what the
slots hold (weights, masters, moments), exchanges it point to point, compares checksums, writes,
reads back and compares again; all ranks agree before and after the writing. When a rank fails, the
step restores the old content of its slots, the earlier steps are reversed, and the layer is in its
old order on every rank. A rank that fails still enters the collectives of its step, so the others
do not wait for it. Ctrl-C and SIGTERM take effect after the current step: the move is rolled back,
then the program ends (:func:`signals_deferred`).

Values are written into ``.data`` of the same parameters, so optimizers, hooks, flat buffers and
references stay valid.
"""

import hashlib
import logging
import signal
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_locality.errors import PlacementError
from moe_locality.layer.agreement import LostRanks, all_agree, all_succeed, gather_answers
from moe_locality.layer.state import (
    StateSource,
    TensorShard,
    expert_shards,
    flat_bytes,
    gate_shards,
    no_state,
    pack,
    stacked_shards,
    state_source,
    unpack,
    whole_bytes,
    whole_tensors,
)
from moe_locality.placement.plan import count_moved, source_slots

logger = logging.getLogger(__name__)

NUM_BUFFERS = 3
"""Flat buffers per rank during a move: room for so many experts with all their state."""

TIMEOUT_S = 120.0
"""Seconds that one exchange of a step may take. A step has at most two exchanges in a row, so a
rank that does not respond within 3 x timeout is considered dead."""


class RolledBackError(PlacementError):
    """A rank failed; the layer is in its old order on every rank."""

    interrupted = False  # a rank was
    stop: BaseException | None = None  # the KeyboardInterrupt or SystemExit of this rank


_pending_signals: list[int] = []
"""Signals received during a move."""


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Defer SIGINT and SIGTERM until the block ends; nothing changes outside the main thread, nor
    for handlers that Python did not install."""
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                handlers[number] = signal.signal(number, lambda n, _: _pending_signals.append(n))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        came = _pending_signals[:1]
        _pending_signals.clear()
        for number in came:
            signal.raise_signal(number)


FindShards = Callable[[], tuple[list[list[TensorShard]], list[TensorShard]]]
"""What moves with the expert of each slot of this rank, and what of the gate."""

Step = tuple[tuple[int, int], ...]
"""Pairs (slot that is read, slot that is written): a rank reads the slots that it writes."""


def plan_steps(current: np.ndarray, target: np.ndarray, num_ranks: int) -> list[Step]:
    """Return the steps from ``current`` to ``target``, both permutations of 0..E-1.

    A step touches at most two slots of a rank, and is done as a whole or not at all. First come the
    rounds: a rank sends at most one expert and receives at most one, into the slot that it has just
    freed. The rounds are the perfect matchings of a regular bipartite multigraph (König 1916): as
    many as the busiest rank has experts to send, which no schedule of this kind can beat. Then the
    ranks put their own slots in order, one swap per rank and step."""
    per_rank = len(current) // num_ranks
    holds = np.array(current, dtype=np.int64)  # what every slot holds, step after step
    new_rank = np.argsort(np.asarray(target)) // per_rank  # of each expert
    waiting: dict[tuple[int, int], deque[int]] = defaultdict(deque)
    for slot, expert in enumerate(holds.tolist()):
        waiting[slot // per_rank, int(new_rank[expert])].append(expert)
    counts = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    for (source, destination), experts in waiting.items():
        counts[source, destination] = len(experts) if source != destination else 0
    steps: list[Step] = []
    for partner in _matchings(counts):
        slot_of = np.argsort(holds)
        sent = {r: waiting[r, d].popleft() for r, d in enumerate(partner) if d != r}
        freed = {r: int(slot_of[expert]) for r, expert in sent.items()}
        steps.append(tuple((freed[r], freed[int(partner[r])]) for r in sent))
        for r, expert in sent.items():
            holds[freed[int(partner[r])]] = expert
    swaps: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    for slot, expert in enumerate(np.asarray(target).tolist()):
        other = int(np.flatnonzero(holds == expert)[0])  # on the same rank
        if other != slot:
            swaps[slot // per_rank].append((slot, other))
            holds[[slot, other]] = holds[[other, slot]]
    swapped = (tuple(filter(None, now)) for now in zip_longest(*swaps))
    return steps + [tuple(pair for a, b in now for pair in ((a, b), (b, a))) for now in swapped]


def reverse_step(step: Step) -> Step:
    """Return the step that undoes ``step``."""
    return tuple((written, read) for read, written in step)


def _matchings(counts: np.ndarray):
    """Yield, per round, the rank that each rank sends to (itself: it sends nothing). Row r of
    ``counts [G, G]``, with a zero diagonal, sums up to what column r does: a rank receives as many
    experts as it sends."""
    from scipy.optimize import linear_sum_assignment

    # every row has the largest sum now, so each round has a perfect matching
    left = counts + np.diag(counts.sum(1).max(initial=0) - counts.sum(1))
    while left.any():
        rows, partner = linear_sum_assignment(left == 0)
        left[rows, partner] -= 1
        yield partner


@dataclass(slots=True, kw_only=True)
class MoveReport:
    """What a relocation did. Bytes and seconds are those of this rank.

    Args:
        num_experts_moved: experts that changed rank, over all layers, in one EP group.
        sent_bytes: sent point to point to other ranks.
        gathered_bytes: all-reduced to join ZeRO's partitions, verification included.
        buffer_bytes: largest size of the buffers at any time.
    """

    num_layers: int = 0
    num_experts_moved: int = 0
    sent_bytes: int = 0
    gathered_bytes: int = 0
    buffer_bytes: int = 0
    elapsed_s: float = 0.0

    def log(self, done: str) -> None:
        """Log what was done to the layers of a model ("relabelled", "placed")."""
        facts = (done, self.num_layers, self.elapsed_s, self.num_experts_moved, self.sent_bytes)
        text = "%s %d MoE layers in %.2f s: %d experts changed rank, %d bytes left this rank"
        logger.info(text, *facts)


@dataclass(slots=True, kw_only=True)
class _Layer:
    """One move: what the slots of this rank hold, buffers, ``errors`` since the ranks agreed."""

    name: str
    group: dist.ProcessGroup | None
    per_rank: int
    report: MoveReport
    timeout_s: float
    slots: dict[int, list[TensorShard]] = field(default_factory=dict)
    buffers: list[Tensor] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    stop: BaseException | None = None
    rolling_back: bool = False

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Keep an error of this rank for :meth:`agree`, which raises it on all ranks; an interrupt
        is raised again after the roll-back."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001
            self.errors.append(f"{type(error).__name__}: {error}")
            if not isinstance(error, Exception):
                self.stop = error

    def agree(self, digests: dict[str, str] | None = None) -> None:
        """Raise RolledBackError on all ranks where one has an error or digests of a key differ."""
        if _pending_signals and not self.rolling_back:
            name = signal.Signals(_pending_signals[0]).name
            self.errors.append(f"{name}: this rank was interrupted")
        mine = (self.errors, digests or {}, bool(_pending_signals) or self.stop is not None)
        self.errors = []
        answers = gather_answers(mine, self.name, 3 * self.timeout_s)
        found = {rank: answer[0] for rank, answer in enumerate(answers) if answer[0]}
        seen: dict[str, tuple[int, str]] = {}
        for rank, (_, theirs, _) in enumerate(answers):
            for thing, digest in theirs.items():
                first, other = seen.setdefault(thing, (rank, digest))
                if other != digest:
                    found.setdefault(rank, []).append(
                        f"checksum {digest[:12]} of {thing.partition('|')[2]}, but {other[:12]} on "
                        f"rank {first}"
                    )
        if found:
            rank, texts = next(iter(found.items()))
            failure = RolledBackError(f"ranks {sorted(found)} failed, rank {rank} with {texts[0]}")
            failure.interrupted, failure.stop = any(answer[2] for answer in answers), self.stop
            self.rolling_back = True
            raise failure


def layer_shards(
    module: Any, state: StateSource
) -> tuple[list[list[TensorShard]], list[TensorShard]]:
    """What moves with each local expert of a ``deepspeed.moe.layer.MoE``, and its gate."""
    layer = module.deepspeed_moe
    experts = [expert_shards(expert, state) for expert in layer.experts.deepspeed_experts]
    return experts, gate_shards(layer.gate, state)


@torch.no_grad()
def move_experts(
    find_shards: FindShards,
    current: np.ndarray,
    target: np.ndarray,
    *,
    num_ranks: int,
    group: dist.ProcessGroup | None,
    report: MoveReport,
    name: str = "the layer",
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Take a layer from one slot order to another; collective over all ranks.

    Args:
        find_shards: what moves with the expert of each slot of this rank, and the tensors of the
            gate that have a row per expert (none where the gate is in logical order).
        current, target: ``[E]``, the expert of each slot.
        group: its EP group of ``num_ranks``; None where that is 1.
        report: what is done is added to it.
        timeout_s: see ``TIMEOUT_S``.

    Raises:
        RolledBackError: a rank failed, and the layer is in ``current`` order again on all ranks.
        LostRanks: a rank exited or hangs.
        PlacementError: a rank failed, and the roll-back failed too.
    """
    started = time.monotonic()
    sources, per_rank = source_slots(current, target), len(current) // num_ranks
    report.num_layers += 1
    report.num_experts_moved += count_moved(sources, per_rank)
    steps = plan_steps(current, target, num_ranks)
    if not steps:
        return
    layer = _Layer(name=name, group=group, per_rank=per_rank, report=report, timeout_s=timeout_s)
    gate = _open(layer, find_shards)
    done: list[Step] = []
    try:
        for step in steps:
            _run_step(layer, step)
            done.append(step)
        if gate:
            _permute_gate(layer, gate, sources)
    except RolledBackError as failure:
        for step in reversed(done):
            with _fatal(name, failure):
                _run_step(layer, reverse_step(step))
        raise
    report.elapsed_s += time.monotonic() - started


def place_stacked(
    layers: Sequence[tuple[str, Any]], orders: Sequence[np.ndarray], engine: Any = None
) -> None:
    """Move the experts of named layers to the slots of ``orders``. Collective over all ranks. A
    layer that fails is in its old order on all ranks and says so.

    A layer has ``experts`` (parameters ``[e, ...]``), ``ep_size``, ``ep_group``, the order
    ``slot_to_logical [E]`` and ``set_order``, which states a new one; its router is in logical
    order, and stays. Optimizer state of an ``engine`` moves along; ConfigError where it cannot."""
    state = no_state if engine is None else all_succeed(lambda: state_source(engine))
    text = repr([(name, order.tolist()) for (name, _), order in zip(layers, orders, strict=True)])
    all_agree("plans", hashlib.sha256(text.encode()).hexdigest())
    report = MoveReport()
    with signals_deferred():
        for (name, module), order in zip(layers, orders, strict=True):
            move_experts(
                lambda experts=module.experts: (stacked_shards(experts, state), []),
                module.slot_to_logical,
                order,
                num_ranks=module.ep_size,
                group=module.ep_group,
                report=report,
                name=name,
            )
            module.set_order(order)
    report.log("placed")


def _open(layer: _Layer, find_shards: FindShards) -> list[TensorShard]:
    """Find what moves and allocate the buffers, before anything changes; return the gate's part."""
    first = (0 if layer.group is None else dist.get_rank(layer.group)) * layer.per_rank
    gate: list[TensorShard] = []
    with layer.guard():
        experts, gate = find_shards()
        layer.slots = {first + number: shards for number, shards in enumerate(experts)}
        largest = max(flat_bytes(layer.slots[first]), flat_bytes(gate))
        locals_ = (s.local for s in layer.slots[first])
        device = wire_device(layer.group, next((t for t in locals_ if t is not None), None))
        layer.buffers = [
            torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(NUM_BUFFERS)
        ]
        layer.report.buffer_bytes = max(layer.report.buffer_bytes, NUM_BUFFERS * largest)
    layer.agree()
    return gate


@contextmanager
def _fatal(name: str, failure: Exception) -> Iterator[None]:
    try:
        yield
    except LostRanks:
        raise
    except PlacementError as error:
        raise PlacementError(
            f"{name}: moving its experts failed ({failure}), and the roll-back failed too "
            f"({error}): the experts of this layer are in no order. End this job and go on from "
            "the last checkpoint"
        ) from error


def _run_step(layer: _Layer, step: Step) -> None:
    """Do a step on all ranks, or restore its slots and raise RolledBackError."""
    mine = [(read, written) for read, written in step if read in layer.slots]
    held: dict[int, Tensor] = {}
    for buffer, (read, _) in zip(layer.buffers, mine, strict=False):
        held[read] = _gather(layer, layer.slots[read], buffer)
    arrived = _exchange(layer, step, mine, held)
    wanted, digests = {}, {}
    with layer.guard():
        where = 0 if layer.group is None else dist.get_process_group_ranks(layer.group)[0]
        wanted = {written: _digest(buffer) for written, buffer in arrived.items()}
        sent = {written: _digest(held[read]) for read, written in mine}
        # sender and receiver name the same slot of the same EP group
        digests = {f"{where}|slot {slot}": digest for slot, digest in (sent | wanted).items()}
    layer.agree(digests)
    with layer.guard():
        for written, buffer in arrived.items():
            unpack(buffer, layer.slots[written])
    _verify_or_restore(
        layer,
        {written: (layer.slots[written], wanted[written], held[written]) for written in arrived},
    )


def _exchange(
    layer: _Layer, step: Step, mine: list[tuple[int, int]], held: dict[int, Tensor]
) -> dict[int, Tensor]:
    """Exchange buffers point to point; return the new content of each slot written here."""
    if all(written in layer.slots for _, written in mine):  # nothing, or a swap on this rank
        return {written: held[read] for read, written in mine}
    group = layer.group
    assert group is not None
    ranks = dist.get_process_group_ranks(group)
    ((slot, goes_to),) = mine
    source = next(read for read, written in step if written == slot)
    incoming = layer.buffers[1][: flat_bytes(layer.slots[slot])]
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
    layer: _Layer, written: dict[int, tuple[list[TensorShard], str, Tensor]]
) -> None:
    """Read back what was written (shards, expected checksum, old content); on a wrong checksum of
    any rank, restore the old content."""
    for thing, (shards, digest, _) in written.items():
        again = _gather(layer, shards, layer.buffers[-1])
        with layer.guard():
            if _digest(again) != digest:
                raise PlacementError(f"slot {thing} does not hold what was sent to it")
    try:
        layer.agree()
    except RolledBackError as failure:
        with _fatal(layer.name, failure):
            with layer.guard():
                for shards, _, before in written.values():
                    unpack(before, shards)
            layer.agree()
        raise


def _gather(layer: _Layer, shards: list[TensorShard], buffer: Tensor) -> Tensor:
    """Join the shards, whole, at the front of ``buffer``, and return that. Collective among the
    ranks that hold parts: a byte is on one and zero on the others, so an integer sum is exact."""
    joined = buffer[: flat_bytes(shards)]
    with layer.guard():
        pack(shards, joined)
    group = next((shard.group for shard in shards if shard.group is not None), None)
    if group is not None and dist.get_world_size(group) > 1:
        parts = joined[whole_bytes(shards) :].view(torch.int32)
        with layer.guard():
            request = dist.all_reduce(parts, group=group, async_op=True)
            assert request is not None
            request.wait(timedelta(seconds=layer.timeout_s))
            layer.report.gathered_bytes += 4 * parts.numel()
    return joined


def _permute_gate(layer: _Layer, shards: list[TensorShard], source: np.ndarray) -> None:
    """Row s of every per-expert tensor of the gate takes row ``source[s]``."""
    before = _gather(layer, shards, layer.buffers[0])
    after, digest = layer.buffers[1][: len(before)], ""
    with layer.guard():
        after.copy_(before)
        for tensor in whole_tensors(after, shards):
            tensor.copy_(tensor[torch.from_numpy(source).to(tensor.device)])
        digest = _digest(after)
    layer.agree()
    with layer.guard():
        unpack(after, shards)
    _verify_or_restore(layer, {0: (shards, digest, before)})


def _digest(buffer: Tensor) -> str:
    return hashlib.blake2b(buffer.cpu().numpy().data, digest_size=16).hexdigest()


def wire_device(group: dist.ProcessGroup | None, tensor: Tensor | None) -> torch.device:
    """Return the device for buffers that ``group`` exchanges: that of ``tensor``, or the backend's.

    Before ``initialize`` a model is often on the CPU while NCCL is up."""
    backend = "" if group is None else dist.get_backend(group)
    if backend == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if backend == "gloo" or tensor is None else tensor.device
