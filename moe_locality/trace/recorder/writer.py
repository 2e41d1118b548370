"""The writer thread: takes blocks out of the ring, builds rows [T, L, K] and writes shards."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace.parquet import ShardWriter
from moe_locality.trace.recorder.labels import BlockLabels, spread
from moe_locality.trace.recorder.ring import Block, HostPicks, Ring

logger = logging.getLogger(__name__)

QUEUED_BLOCKS = 1024
"""Bound of the queue: blocks of few tokens (decode) take little of the ring, yet are objects."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSettings:
    """What every shard of a recorder has in common."""

    directory: Path
    model: str
    rank: int
    layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int | None
    """Largest K of the layers; None: taken from the first block."""
    weights: bool
    shard_tokens: int


class ShardBuffer:
    """Rows of the shard that is being filled.

    Memory: shard_tokens * (L * K * 2 + 25) bytes, twice the L * K * 2 with weights; pages are taken
    as rows come.
    """

    def __init__(self, settings: ShardSettings, top_k: int) -> None:
        self._settings = settings
        self.top_k = top_k
        rows, layers = settings.shard_tokens, len(settings.layer_ids)
        self._columns = {
            "expert_ids": np.empty((rows, layers, top_k), np.int16),
            "request_id": np.empty(rows, np.int64),
            "position": np.empty(rows, np.int32),
            "stage": np.empty(rows, np.uint8),
            "domain_id": np.empty(rows, np.int32),
            "step": np.empty(rows, np.int64),
        }
        if settings.weights:
            self._columns["expert_weights"] = np.empty((rows, layers, top_k), np.float16)
        self._domains: dict[str, int] = {}
        self._writer = ShardWriter(
            settings.directory,
            rank=settings.rank,
            model=settings.model,
            num_experts=settings.num_experts,
            top_k=top_k,
            layer_ids=settings.layer_ids,
            weights=settings.weights,
        )
        self.num_rows = 0
        self.written_rows = 0
        self.written_shards = 0
        self.masked_rows = 0

    def add(self, block: Block, ring: Ring | HostPicks) -> None:
        """Append the rows of a block; write a shard each time the buffer is full.

        Raises:
            TraceError: an expert id is out of range, K grew, or the disk refuses.
        """
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
            room = self._settings.shard_tokens - self.num_rows
            self._append(block, labels, layers, rows[:room])
            rows = rows[room:]
            if self.num_rows == self._settings.shard_tokens:
                self.write()

    def _layer(self, entry, num_tokens: int, ring: Ring | HostPicks) -> tuple[int, np.ndarray, Any]:
        if entry.top_k > self.top_k:
            raise TraceError(
                f"found {entry.top_k} picks per token in layer {entry.layer}, expected at most "
                f"{self.top_k}, as in the layers before: record models of one top_k"
            )
        ids, weights = ring.read(entry.offset, num_tokens * entry.top_k)
        low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
        if low < -1 or high >= self._settings.num_experts:
            raise TraceError(
                f"found expert ids {low}..{high} in layer {entry.layer}, expected -1.."
                f"{self._settings.num_experts - 1}: local ids (expert parallelism inside "
                "transformers) cannot be recorded, use DeepSpeed's AutoEP or none"
            )
        if entry.slot_to_logical is not None:
            ids = entry.slot_to_logical[ids]
        shape = (num_tokens, entry.top_k)
        return entry.layer, ids.reshape(shape), None if weights is None else weights.reshape(shape)

    def _append(self, block: Block, labels: BlockLabels, layers: list, rows: np.ndarray) -> None:
        columns = self._columns
        place = slice(self.num_rows, self.num_rows + len(rows))
        whole = len(rows) == block.num_tokens
        ids, weights = columns["expert_ids"][place], columns.get("expert_weights")
        weights = weights[place] if weights is not None else None
        width = {values.shape[1] for _, values, _ in layers}
        if len(layers) < len(self._settings.layer_ids) or width != {self.top_k}:
            ids.fill(-1)
            if weights is not None:
                weights.fill(0)
        for layer, values, layer_weights in layers:
            ids[:, layer, : values.shape[1]] = values if whole else values[rows]
            if weights is not None and layer_weights is not None:
                weights[:, layer, : values.shape[1]] = (
                    layer_weights if whole else layer_weights[rows]
                )
        columns["request_id"][place] = labels.request_id if whole else labels.request_id[rows]
        columns["position"][place] = labels.position if whole else labels.position[rows]
        columns["stage"][place] = (
            labels.stage[rows] if isinstance(labels.stage, np.ndarray) else labels.stage
        )
        columns["domain_id"][place] = self._domain_ids(labels, rows)
        columns["step"][place] = block.step
        self.num_rows += len(rows)

    def _domain_ids(self, labels: BlockLabels, rows: np.ndarray) -> np.ndarray | int:
        if labels.domains is None:
            return -1
        ids = [self._domains.setdefault(name, len(self._domains)) for name in labels.domains]
        if labels.domain_index is None:
            return ids[0]
        return np.array(ids, np.int32)[labels.domain_index[rows]]

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
    """Feeds a ShardBuffer from a bounded queue, in a daemon thread.

    After a failure it goes on emptying the queue and the ring, so that no hook waits for it, and
    counts the tokens as lost.
    """

    def __init__(self, settings: ShardSettings, on_failure: Callable[[Exception], None]) -> None:
        self._settings = settings
        self._on_failure = on_failure
        self._queue: queue.Queue[Any] = queue.Queue(QUEUED_BLOCKS)
        self._buffer: ShardBuffer | None = None
        self._failed = False
        self._taken_tokens = 0
        self._thread = threading.Thread(target=self._run, name="moe_locality-recorder", daemon=True)
        self._thread.start()

    @property
    def recorded_tokens(self) -> int:
        """Tokens in complete shards."""
        return self._buffer.written_rows if self._buffer else 0

    @property
    def lost_tokens(self) -> int:
        """Tokens taken over before or after a failure and not in a complete shard."""
        if not self._failed:
            return 0
        masked = self._buffer.masked_rows if self._buffer else 0
        return self._taken_tokens - masked - self.recorded_tokens

    @property
    def shards(self) -> int:
        return self._buffer.written_shards if self._buffer else 0

    def put(self, block: Block, ring: Ring | HostPicks, timeout_s: float) -> None:
        """Hand over a finished block; raises queue.Full without room within ``timeout_s``."""
        self._queue.put((block, ring), timeout=timeout_s)

    def flush(self, timeout_s: float) -> bool:
        """Write everything handed over so far into a shard; False when that takes too long."""
        return self._command("flush", timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Write the rest and end the thread; False when that takes too long."""
        return self._command("stop", timeout_s)

    def _command(self, name: str, timeout_s: float) -> bool:
        done = threading.Event()
        try:
            self._queue.put((name, done), timeout=timeout_s)
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
            self._guarded(self._write)
            other.set()
            if item == "stop":
                return

    def _add(self, block: Block, ring: Ring | HostPicks) -> None:
        if block.arrived is not None:
            block.arrived.synchronize()
        if self._buffer is None:
            top_k = self._settings.top_k or max(entry.top_k for entry in block.entries)
            self._buffer = ShardBuffer(self._settings, top_k)
        self._buffer.add(block, ring)

    def _write(self) -> None:
        if self._buffer is not None:
            self._buffer.write()

    def _guarded(self, action: Callable[..., None], *args: Any) -> None:
        if self._failed:
            return
        try:
            action(*args)
        except Exception as error:  # noqa: BLE001  whatever it is: training goes on, hooks never wait
            self._failed = True
            self._on_failure(error)
