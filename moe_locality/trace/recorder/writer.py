"""Picks on their way to the disk: a bounded ring, filled by the hooks on the device and emptied on
the host, and the writer thread, which builds rows [T, L, K] of what is in it and writes shards.

With CUDA there are two buffers of the same layout, one on the device and one in pinned host
memory. The hooks write into the first without waiting; ``send`` copies a finished region to the
second on a stream of its own. Elsewhere there is one buffer in host memory. A region is written
again only after ``release``, which its reader calls when the copy has arrived: no other ordering is
needed.

A replay of a CUDA graph runs no Python, so there the recording is in the graph: while it is
captured, the hooks write into buffers that were made before, at places that are computed on the
device. Outside the graph, ``drain`` copies what is new to the host; replays that were overwritten
before that are counted. (TensorRT-LLM records routing in the same way, NVIDIA/TensorRT-LLM #18397.)
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from moe_locality.errors import TraceError
from moe_locality.trace.parquet import ShardWriter
from moe_locality.trace.recorder.hooks import Places, Routes
from moe_locality.trace.recorder.labels import Annotation, Axes, BlockLabels, Layout, spread
from moe_locality.trace.schema import SCALARS


class RingFull(Exception):
    """No room within the time allowed."""


class Ring:
    """One producer reserves regions in order, one consumer releases them in order.

    Offsets are virtual: they only grow; ``% capacity`` is the place. A region never wraps.

    Memory: ``capacity`` * 2 bytes, twice that with weights; on CUDA as much again in pinned memory.
    """

    def __init__(self, capacity: int, device: torch.device, weights: bool) -> None:
        self.capacity = capacity
        self.device = device
        on_cuda = device.type == "cuda"
        kinds = [torch.int16, torch.float16] if weights else [torch.int16]
        # a tensor made under inference_mode could not be written by a later training step
        with torch.inference_mode(False):
            self._host = [
                torch.empty(capacity, dtype=k, device="cpu", pin_memory=on_cuda) for k in kinds
            ]
            self._device, self._stream = self._host, None
            if on_cuda:
                self._device = [torch.empty(capacity, dtype=k, device=device) for k in kinds]
                self._stream = torch.cuda.Stream(device)
        self._arrays = [buffer.numpy() for buffer in self._host]
        self.head = 0
        """Offset after the last reserved region."""
        self._tail = 0
        self._released = threading.Condition()

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until every region is released; False when that takes too long."""
        with self._released:
            return self._released.wait_for(lambda: self._tail >= self.head, timeout_s)

    def reserve(self, count: int, timeout_s: float) -> int:
        """Return the offset of ``count`` free elements in a row; RingFull after ``timeout_s``."""
        start = self.head
        if start % self.capacity + count > self.capacity:
            start += self.capacity - start % self.capacity
        end = start + count
        if end - self._tail > self.capacity:
            with self._released:
                if not self._released.wait_for(
                    lambda: end - self._tail <= self.capacity, timeout_s
                ):
                    raise RingFull
        self.head = end
        return start

    def rewind(self, head: int) -> None:
        """Give back everything reserved since the head was there."""
        self.head = head

    def fill(self, offset: int, ids: torch.Tensor, weights: torch.Tensor | None) -> None:
        """Write [T, K] picks (any strides, any device) at ``offset``, without waiting for them."""
        place = offset % self.capacity
        for buffer, values in zip(self._device, (ids, weights), strict=False):
            if values is not None:
                target = buffer.as_strided(values.shape, (values.shape[1], 1), place)
                target.copy_(values, non_blocking=self._stream is not None)

    def send(self, start: int, end: int) -> torch.cuda.Event | None:
        """Begin the copy of [start, end) to the host; return the event that marks its arrival."""
        if self._stream is None:
            return None
        first, last = start % self.capacity, end % self.capacity or self.capacity
        spans = [(first, last)] if first < last else [(first, self.capacity), (0, last)]
        with torch.cuda.device(self.device), torch.inference_mode(False):
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                for source, target in zip(self._device, self._host, strict=True):
                    for a, b in spans:
                        target[a:b].copy_(source[a:b], non_blocking=True)
                event = torch.cuda.Event(blocking=True)  # the writer sleeps, it does not spin
                event.record(self._stream)
        return event

    def read(self, offset: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Views of ``count`` ids (int16) and weights (float16) on the host, valid until release."""
        place = offset % self.capacity
        views = [array[place : place + count] for array in self._arrays]
        return views[0], views[1] if len(views) > 1 else None

    def release(self, end: int) -> None:
        """Free everything before ``end``."""
        with self._released:
            self._tail = max(self._tail, end)
            self._released.notify_all()


class Entry(NamedTuple):
    """Where the picks of one layer lie in the ring."""

    layer: int
    offset: int
    top_k: int
    slot_to_logical: np.ndarray | None
    """int [E + 1] lookup whose last entry is -1, or None where ids are logical already."""


@dataclass(slots=True)
class Block:
    """T tokens of one forward pass. ``entries`` grows while the layers run."""

    num_tokens: int
    annotation: Annotation
    told: Annotation
    """What the hooks came with; not ``annotation`` where that did not fit the tokens."""
    layout: Layout
    step: int
    training: bool
    thread: int
    """Identity of the thread that runs the forward pass."""
    recorded: bool
    """False: this step is not sampled, or the block was given up."""
    start: int = 0
    """Ring offset at which the block begins."""
    end: int = 0
    request_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64, one per sequence or per token; empty where the labels do not fit."""
    starts: np.ndarray | None = None
    """Where the requests go on, one position per request id; None: nothing is continued."""
    forward_index: int = 0
    layers_seen: set[int] = field(default_factory=set)
    entries: list[Entry] = field(default_factory=list)
    arrived: Any = None
    """CUDA event after which the picks are in host memory; None: they are."""


_KEPT: list[ReplayRing] = []
"""Rings that a graph writes to. A graph keeps no tensor alive, so their memory is never freed."""


@dataclass(slots=True)
class Capture:
    """One forward pass inside a captured graph."""

    annotation: Annotation
    shape: Axes | None
    training: bool
    ring: ReplayRing
    slot: torch.Tensor
    """Place of the running replay, int64 [1] on the device."""
    layers: list[tuple[int, int, Any]] = field(default_factory=list)
    """(layer, K, module) in their order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """One replay of a captured forward pass, on the host, with the methods of a ring that a writer
    uses. An offset is the number of a layer among those of the capture."""

    capture: Capture
    tick: int
    """Number of the replay among all of this recorder, from 1."""
    picks: list[np.ndarray]
    """Ids int16 [layers of the capture, T, K], and weights float16 where they are kept."""

    def read(self, offset: int, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """As ``Ring.read``."""
        top_k = count // self.capture.ring.tokens
        found = [values[offset, :, :top_k].reshape(-1) for values in self.picks]
        return found[0], found[1] if len(found) > 1 else None

    def release(self, end: int) -> None:
        """Nothing waits for it."""


class ReplayRing:
    """Slots for the picks of T tokens in L layers, on the device. Memory: slots * L * T * K * 2
    bytes, twice that with weights."""

    def __init__(
        self, slots: int, layers: int, tokens: int, top_k: int, device: torch.device, weights: bool
    ) -> None:
        self.slots, self.tokens, self.top_k, self.device = slots, tokens, top_k, device
        shape = (layers, slots, tokens, top_k)
        self.picks = [torch.full(shape, -1, dtype=torch.int16, device=device)]
        if weights:
            self.picks.append(torch.zeros(shape, dtype=torch.float16, device=device))
        # counts the replays: (cursor - 1) % slots is the slot of the one that runs
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)
        self.ticks = torch.zeros(slots, dtype=torch.int64, device=device)
        self.captures = torch.full((slots,), -1, dtype=torch.int64, device=device)
        self.drained = 0

    def begin(self, number: int, tick: torch.Tensor) -> torch.Tensor:
        """Take the next slot for a capture, in the graph; ``tick`` int64 [1] counts all replays."""
        self.cursor.add_(1)
        tick.add_(1)
        slot = torch.remainder(self.cursor - 1, self.slots)
        self.ticks.index_copy_(0, slot, tick)
        self.captures.index_copy_(0, slot, torch.full_like(slot, number))
        return slot

    def write(self, slot: torch.Tensor, layer: int, routes: Routes) -> None:
        """Write the picks of a layer; runs in the graph."""
        for buffer, values in zip(self.picks, routes, strict=False):
            if values is not None:
                place = buffer[layer, :, :, : values.shape[1]]
                place.index_copy_(0, slot, values.to(buffer.dtype)[None])

    def drain(self, captures: list[Capture]) -> tuple[list[Replayed], int]:
        """Return the replays since the last call, oldest first, and how many were overwritten."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        end = int(self.cursor)
        first = max(self.drained, end - self.slots)
        place = torch.arange(first, end, device=self.device) % self.slots
        picks = [buffer.index_select(1, place).cpu().numpy() for buffer in self.picks]
        ticks, numbers = self.ticks[place].tolist(), self.captures[place].tolist()
        # a replay that another thread began meanwhile has written over the oldest
        torn = min(max(0, int(self.cursor) - self.slots - first), end - first)
        lost, self.drained = first - self.drained + torn, end
        found = []
        for index in range(torn, end - first):
            capture = captures[numbers[index]]
            rows = [layer for layer, _, _ in capture.layers]
            own = [values[rows, index] for values in picks]
            found.append(Replayed(capture=capture, tick=ticks[index], picks=own))
        return found, lost


class Replays:
    """The rings of a recorder, one for every number of tokens, and what was captured into them.
    ``slots``: replays that a ring holds between two drains; 0: nothing is recorded in graphs."""

    def __init__(self, slots: int, weights: bool) -> None:
        self.slots, self._weights = slots, weights
        self.captures: list[Capture] = []
        self.notes: list[Annotation] = []
        """Labels of the replays since the last drain."""
        self.open: Capture | None = None
        """The forward pass that is being captured."""
        self._rings: dict[tuple[int, torch.device], ReplayRing] = {}
        self._ticks: dict[torch.device, torch.Tensor] = {}
        self._first_tick = 1

    def prepare(self, num_layers: int, tokens: int, top_k: int, device: torch.device) -> None:
        """Make the ring for forward passes of this shape, before a graph of one is captured."""
        key = (tokens, device)
        if not self.slots or not tokens or key in self._rings:
            return
        with torch.inference_mode(False):  # as in Ring
            self._ticks.setdefault(device, torch.zeros(1, dtype=torch.int64, device=device))
            ring = ReplayRing(self.slots, num_layers, tokens, top_k, device, self._weights)
        self._rings[key] = ring

    def add(
        self, places: Places, module: Any, routes: Routes, shape: Axes | None, told: Annotation
    ) -> bool:
        """Write the picks of a layer into the graph that is being captured; False: no ring."""
        capture, (num_tokens, top_k) = self.open, routes.ids.shape
        seen = [] if capture is None else [known for known, _, _ in capture.layers]
        layer = next((place for place in places if place not in seen), None)
        if capture is None or layer is None:
            layer, capture = places[0], None
        ring = capture.ring if capture else self._rings.get((num_tokens, routes.ids.device))
        if ring is None or num_tokens != ring.tokens or top_k > ring.top_k:
            return False
        if capture is None:
            slot = ring.begin(len(self.captures), self._ticks[routes.ids.device])
            labels = Annotation(stage=told.stage)
            capture = self.open = Capture(labels, shape, module.training, ring, slot)
            self.captures.append(capture)
            if ring not in _KEPT:
                _KEPT.append(ring)
        ring.write(capture.slot, layer, routes)
        capture.layers.append((layer, top_k, module))
        return True

    def drain(self) -> tuple[list[tuple[Replayed, Annotation]], int, int]:
        """Return the replays since the last call with their labels, in the order in which they ran,
        the tokens that were overwritten, and in how many replays. Labels are the ``notes`` where
        every replay had one; else the stage in force at the capture. Waits for the device."""
        found: list[Replayed] = []
        tokens = replays = 0
        for ring in self._rings.values():
            new, lost = ring.drain(self.captures)
            found += new
            replays += lost
            tokens += lost * ring.tokens
        found.sort(key=lambda replayed: replayed.tick)
        notes, self.notes = self.notes, []
        ran = len(found) + replays
        first, self._first_tick = self._first_tick, self._first_tick + ran
        if len(notes) != ran:
            return [(r, r.capture.annotation) for r in found], tokens, replays
        return [(r, notes[r.tick - first]) for r in found], tokens, replays


def is_capturing(ids: torch.Tensor) -> bool:
    """Whether what is run now goes into a CUDA graph and not to the device."""
    return ids.is_cuda and torch.cuda.is_current_stream_capturing()


logger = logging.getLogger(__name__)

QUEUED_BLOCKS = 1024
"""Bound of the queue: blocks of few tokens (decode) take little of the ring, yet are objects."""


class ShardBuffer:
    """Rows of the next shard of ``writer``: shard_tokens * (L * K * 2 + 25) bytes, twice the
    L * K * 2 with weights; pages are taken as rows come."""

    def __init__(self, writer: ShardWriter, shard_tokens: int) -> None:
        self._writer, self._shard_tokens = writer, shard_tokens
        names = ("request_id", "position", "stage", "domain_id", "step")
        self._columns: dict[str, np.ndarray]
        self._columns = {name: np.empty(shard_tokens, SCALARS[name]) for name in names}
        shape = (shard_tokens, len(writer.layer_ids), writer.top_k)
        self._columns["expert_ids"] = np.empty(shape, np.int16)
        if writer.weights:
            self._columns["expert_weights"] = np.empty(shape, np.float16)
        self._domains: dict[str, int] = {}
        self.num_rows = self.masked_rows = 0
        self.written_rows = self.written_shards = 0

    def add(self, block: Block, ring: Ring | Replayed) -> None:
        """Append the rows of a block; write a shard each time the buffer is full. TraceError where
        an expert id is out of range, K grew, or the disk refuses."""
        labels = spread(
            block.annotation,
            block.layout,
            request_ids=block.request_ids,
            starts=block.starts,
            training=block.training,
            forward_index=block.forward_index,
        )
        layers = [self._layer(entry, block.num_tokens, ring) for entry in block.entries]
        rows = np.arange(block.num_tokens) if labels.keep is None else np.flatnonzero(labels.keep)
        self.masked_rows += block.num_tokens - len(rows)
        while len(rows):
            room = self._shard_tokens - self.num_rows
            self._append(block, labels, layers, rows[:room])
            rows = rows[room:]
            if self.num_rows == self._shard_tokens:
                self.write()

    def _layer(self, entry, num_tokens: int, ring: Ring | Replayed) -> tuple[int, np.ndarray, Any]:
        if entry.top_k > self._writer.top_k:
            raise TraceError(
                f"found {entry.top_k} picks per token in layer {entry.layer}, expected at most "
                f"{self._writer.top_k}, as in the layers before: record models of one top_k"
            )
        ids, weights = ring.read(entry.offset, num_tokens * entry.top_k)
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        if low < -1 or high >= self._writer.num_experts:
            raise TraceError(
                f"found expert ids {low}..{high} in layer {entry.layer}, expected -1.."
                f"{self._writer.num_experts - 1}: local ids (expert parallelism inside "
                "transformers) cannot be recorded, use DeepSpeed's AutoEP or none"
            )
        if entry.slot_to_logical is not None:
            ids = entry.slot_to_logical[ids]
        shape = (num_tokens, entry.top_k)
        return entry.layer, ids.reshape(shape), None if weights is None else weights.reshape(shape)

    def _append(self, block: Block, labels: BlockLabels, layers: list, rows: np.ndarray) -> None:
        place = slice(self.num_rows, self.num_rows + len(rows))
        taken = {name: column[place] for name, column in self._columns.items()}
        self.num_rows += len(rows)
        chosen = slice(None) if len(rows) == block.num_tokens else rows  # all: without a copy
        ids, weights = taken["expert_ids"], taken.get("expert_weights")
        width = {values.shape[1] for _, values, _ in layers}
        if len(layers) < len(self._writer.layer_ids) or width != {self._writer.top_k}:
            ids.fill(-1)
            if weights is not None:
                weights.fill(0)
        for layer, values, layer_weights in layers:
            ids[:, layer, : values.shape[1]] = values[chosen]
            if weights is not None and layer_weights is not None:
                weights[:, layer, : values.shape[1]] = layer_weights[chosen]
        known = self._domains
        domains = [known.setdefault(name, len(known)) for name in labels.domains or ()] or [-1]
        if labels.domain_index is not None:
            domains = np.array(domains, np.int32)[labels.domain_index[chosen]]
        stage = labels.stage[chosen] if isinstance(labels.stage, np.ndarray) else labels.stage
        taken["request_id"][:] = labels.request_id[chosen]
        taken["position"][:] = labels.position[chosen]
        taken["stage"][:] = stage
        taken["domain_id"][:] = domains
        taken["step"][:] = block.step

    def write(self) -> None:
        """Write what is in the buffer as one shard; nothing when it is empty."""
        if not self.num_rows:
            return
        rows, self.num_rows = self.num_rows, 0
        columns = {name: column[:rows] for name, column in self._columns.items()}
        path = self._writer.write(columns, domain=tuple(self._domains))
        self.written_rows += rows
        self.written_shards += 1
        logger.debug("wrote %d tokens to %s", rows, path)


class WriterThread:
    """Feeds a ShardBuffer from a bounded queue, in a daemon thread. After a failure it goes on
    emptying the queue and the ring, so that no hook waits for it, and counts the tokens as lost.

    ``shard_writer`` makes the writer of the shards, given ``top_k=``: the largest K of the layers,
    or that of the first block where ``top_k`` is None."""

    def __init__(
        self,
        shard_writer: Callable[..., ShardWriter],
        top_k: int | None,
        shard_tokens: int,
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._shard_writer, self._top_k = shard_writer, top_k
        self._shard_tokens, self._on_failure = shard_tokens, on_failure
        self._queue: queue.Queue[Any] = queue.Queue(QUEUED_BLOCKS)
        self._buffer: ShardBuffer | None = None
        self._failed = False
        self._taken_tokens = 0
        self._thread = threading.Thread(target=self._run, name="moe_locality-recorder", daemon=True)
        self._thread.start()

    def counts(self) -> tuple[int, int, int]:
        """Tokens in complete shards; tokens lost by a failure, before or after it; shards."""
        failed, buffer = self._failed, self._buffer  # after a failure the buffer does not change
        if buffer is None:
            return 0, self._taken_tokens if failed else 0, 0
        lost = self._taken_tokens - buffer.masked_rows - buffer.written_rows if failed else 0
        return buffer.written_rows, lost, buffer.written_shards

    def put(self, block: Block, ring: Ring | Replayed, timeout_s: float) -> None:
        """Hand over a finished block; raises queue.Full without room within ``timeout_s``."""
        self._queue.put((block, ring), timeout=timeout_s)

    def flush(self, timeout_s: float, *, stop: bool = False) -> bool:
        """Write all handed over into a shard, end the thread on ``stop``; False if too slow."""
        done = threading.Event()
        try:
            self._queue.put(("stop" if stop else "flush", done), timeout=timeout_s)
        except queue.Full:
            return False
        return done.wait(timeout_s)

    def _run(self) -> None:
        while True:
            item, other = self._queue.get()
            if isinstance(item, Block):
                self._taken_tokens += item.num_tokens
                self._guarded(self._add, item, other)
                other.release(item.end)
                continue
            if self._buffer is not None:
                self._guarded(self._buffer.write)
            other.set()
            if item == "stop":
                return

    def _add(self, block: Block, ring: Ring | Replayed) -> None:
        if block.arrived is not None:
            block.arrived.synchronize()
        if self._buffer is None:
            top_k = self._top_k or max(entry.top_k for entry in block.entries)
            self._buffer = ShardBuffer(self._shard_writer(top_k=top_k), self._shard_tokens)
        self._buffer.add(block, ring)

    def _guarded(self, action: Callable[..., None], *args: Any) -> None:
        if self._failed:
            return
        try:
            action(*args)
        except Exception as error:  # noqa: BLE001  whatever it is: training goes on, hooks never wait
            self._failed = True
            self._on_failure(error)
