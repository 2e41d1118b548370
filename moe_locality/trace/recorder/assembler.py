"""Collects the picks of all layers of one forward pass into a block and hands it to the writer.

A block ends when the model's forward pass ends; where that is not seen (layers called one by one),
when a layer comes again or the annotation changes. A layer that did not run has no pick (-1).
"""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch.nn import Module

from moe_locality.errors import TraceError
from moe_locality.trace.recorder import labels, writer
from moe_locality.trace.recorder.hooks import Places, Read, Routes
from moe_locality.trace.recorder.labels import Annotation, Axes, Layout, generates
from moe_locality.trace.recorder.writer import Block, Entry, Ring, RingFull, is_capturing

logger = logging.getLogger(__name__)


class Forward(NamedTuple):
    """The forward pass that runs: class of the model that is attached, [B, S] of its token ids."""

    model: str
    input_axes: Axes | None


@dataclass(kw_only=True, eq=False)
class Assembler:
    """The state between two hooks; one thread at a time runs forward passes. The first fields are
    arguments of RoutingRecorder; the next request without a name gets ``next_request_id``."""

    weights: bool
    every_n_steps: int
    ring_tokens: int
    sequence_first: bool | None
    max_wait_s: float
    strict: bool
    graph_replays: int
    next_request_id: int
    explicit_steps: bool
    """Whether ``step`` is set, not counted here."""
    step: int = 0
    forward: Forward | None = None
    dropped_tokens: int = 0
    skipped_blocks: int = 0

    def __post_init__(self) -> None:
        self.replays = writer.Replays(self.graph_replays, self.weights)
        self.layer_names: list[str] = []
        self.writer: writer.WriterThread | None = None
        """None: nothing has been recorded."""
        self._found_sequence_first = False
        self._ring: Ring | None = None
        self._block: Block | None = None
        # how many forward passes the annotation has had; the numbers of its sequences without
        # request ids, kept for the rest of a generation
        self._annotation, self._forward_index = Annotation(), 0
        self._numbers: np.ndarray | None = None
        self._book = labels.PositionBook()
        self._lookups: dict[int, np.ndarray] = {}
        self._warned: set[str] = set()
        self._stalled = False

    # -- what the hooks call --------------------------------------------------------------------

    def add(
        self, places: Places, module: Module, read: Read, shape: Axes | None, annotation: Annotation
    ) -> None:
        """Take the picks of one layer, that of the first of its places that has none yet."""
        block = self._block
        if block is not None and block.thread != threading.get_ident():
            self.skip("threads", "found a forward pass in a second thread while one was running")
            return
        seen = set() if block is None else block.layers_seen
        layer = next((place for place in places if place not in seen), None)
        if block is not None and (layer is None or block.told is not annotation):
            if block.told is annotation and self.forward is not None and not generates(annotation):
                self._ran_again(block, places)
                return
            self.finish()
            block = None
        layer = places[0] if layer is None or block is None else layer
        if block is not None and not block.recorded:
            return
        routes = read(self.weights)
        if routes.ids.is_meta:  # shape inference
            return
        if is_capturing(routes.ids):
            if block is not None:
                self.discard("the capture of a CUDA graph began inside it")
            fits = self.replays.add(places, module, routes, shape, annotation)
            if not fits and "capture" not in self._warned:
                self.skip(
                    "capture",
                    f"found the capture of a CUDA graph with {len(routes.ids)} tokens, expected "
                    "graph_replays above 0 and a forward pass of as many tokens before it: what "
                    "this graph replays is not recorded",
                )
            return
        if block is None:
            block = self._begin(len(routes.ids), annotation, shape, module.training)
        block.layers_seen.add(layer)
        if block.recorded:
            self._store(block, layer, module, routes)

    def finish(self) -> None:
        """End the block that is open and hand it over."""
        self.replays.open = None
        block, self._block = self._block, None
        if block is None:
            return
        if block.annotation.found is not None:
            block.annotation = block.annotation.found.settle(block.annotation)
        self._count(block)
        if not block.recorded:
            return
        ring = self._ring
        assert ring is not None
        block.end = ring.head
        block.arrived = ring.send(block.start, block.end)
        self._hand_over(block, ring)
        top_k = max((entry.top_k for entry in block.entries), default=0)
        self.replays.prepare(len(self.layer_names), block.num_tokens, top_k, ring.device)

    def drain(self) -> None:
        """Take over what the replays of captured graphs recorded. Waits for the device."""
        if not self.replays.captures:
            return
        noted = len(self.replays.notes)
        found, tokens, overwritten = self.replays.drain()
        ran = len(found) + overwritten
        for replayed, annotation in found:
            capture = replayed.capture
            block = self._begin(capture.ring.tokens, annotation, capture.shape, capture.training)
            self._block = None
            self._count(block)
            if block.recorded:
                block.entries = [
                    Entry(layer, number, top_k, self._lookup(module))
                    for number, (layer, top_k, module) in enumerate(capture.layers)
                ]
                self._hand_over(block, replayed)
        if noted and noted != ran:
            self.skip(
                "notes",
                f"found {noted} calls of replayed() for {ran} replays, expected one each or none: "
                "their picks are kept without labels",
                count=0,
            )
        if overwritten:
            self.dropped_tokens += tokens
            reason = (
                f"found {overwritten} replays of a CUDA graph that later ones had overwritten, "
                f"expected at most {self.replays.slots} between two calls of step() or drain(): "
                "call them more often, or raise graph_replays"
            )
            self.skip("overwritten", reason, count=overwritten)

    def discard(self, reason: str) -> None:
        """Throw the open block away: its forward pass did not come to its end."""
        self.replays.open = None
        block, self._block = self._block, None
        if block is not None and block.recorded:
            self._give_up(block, "unfinished", reason)

    # -- one block --------------------------------------------------------------------------------

    def _count(self, block: Block) -> None:
        """Go on to the next forward pass: positions of its requests, step."""
        self._forward_index += 1
        if generates(block.annotation) and len(block.request_ids):
            known = (block.annotation, block.layout, block.request_ids, block.starts)
            self._book.advance(*known, block.forward_index == 0)
        if not self.explicit_steps:
            self.step += 1

    def _hand_over(self, block: Block, ring: Ring | writer.Replayed) -> None:
        assert self.writer is not None
        try:
            self.writer.put(block, ring, self._patience_s())
            self._stalled = False
        except queue.Full:
            if block.arrived is not None:
                block.arrived.synchronize()  # its region is about to be written again
            self._give_up(block, "queue", self._too_slow())

    def _begin(
        self, num_tokens: int, annotation: Annotation, shape: Axes | None, training: bool
    ) -> Block:
        if self._annotation is not annotation:
            self._annotation, self._forward_index, self._numbers = annotation, 0, None
        error = None
        try:
            layout = labels.layout_of(num_tokens, shape, annotation, self._is_sequence_first(shape))
            labels.check_fits(annotation, layout, self._forward_index == 0)
        except TraceError as found:
            if annotation.explicit is not None:  # what was found is of other tokens
                block = self._begin(num_tokens, annotation.explicit, shape, training)
                block.told = annotation
                return block
            layout, error = Layout(num_sequences=1, length=num_tokens), str(found)
        self._block = block = Block(
            num_tokens=num_tokens,
            annotation=annotation,
            told=annotation,
            layout=layout,
            step=self.step,
            training=training,
            thread=threading.get_ident(),
            recorded=self.step % self.every_n_steps == 0 and num_tokens > 0,
            forward_index=self._forward_index,
            start=self._ring.head if self._ring else 0,
        )
        if error is None:
            block.request_ids = self._request_ids(block)
            if labels.continues(annotation, self._forward_index):
                block.starts = self._book.starts(block.request_ids)
        elif block.recorded:
            self._give_up(block, "labels", error)
        return block

    def _is_sequence_first(self, shape: Axes | None) -> bool:
        """As set; else as last seen where the ids are [B, S] and a layer is given [S, B, D]."""
        ids = None if self.forward is None else self.forward.input_axes
        if self.sequence_first is not None:
            return self.sequence_first
        if ids is not None and shape is not None:
            if shape == ids:
                self._found_sequence_first &= ids[0] == ids[1]
            elif shape == ids[::-1]:
                self._found_sequence_first = True
        return self._found_sequence_first

    def _request_ids(self, block: Block) -> np.ndarray:
        """The ids that were given, those of the generation that goes on, or new ones."""
        annotation, count = block.annotation, block.layout.num_sequences
        if annotation.request_ids is not None:
            return annotation.request_ids
        known = self._numbers if annotation.stage in ("decode", labels.GENERATE) else None
        if known is None or len(known) != count:
            known = self._numbers = self.new_requests(count)
        return known

    def new_requests(self, count: int) -> np.ndarray:
        """Numbers of requests that nobody named: int64 [count]."""
        first, self.next_request_id = self.next_request_id, self.next_request_id + count
        return np.arange(first, self.next_request_id, dtype=np.int64)

    def open_requests(self) -> np.ndarray:
        """Requests of the block that is open; none without one."""
        return self._block.request_ids if self._block is not None else np.zeros(0, np.int64)

    def _store(self, block: Block, layer: int, module: Any, routes: Routes) -> None:
        num_tokens, top_k = routes.ids.shape
        if num_tokens != block.num_tokens:
            reason = (
                f"found {num_tokens} tokens in MoE layer {layer} and {block.num_tokens} in the "
                "layers before it in the same forward pass, expected the same tokens in all layers"
            )
            self._give_up(block, "tokens", reason)
            return
        try:
            ring = self._ring_for(block, routes)
            if block.entries and ring.head - block.start + 2 * routes.ids.numel() > ring.capacity:
                raise RingFull  # waiting would not help: the block itself fills the ring
            offset = ring.reserve(routes.ids.numel(), self._patience_s())
        except RingFull:
            self._give_up(block, "ring", self._too_slow())
            return
        if not block.entries:
            block.start = offset
        ring.fill(offset, routes.ids, routes.weights)
        block.entries.append(Entry(layer, offset, top_k, self._lookup(module)))

    def _ring_for(self, block: Block, routes: Routes) -> Ring:
        """Return the ring, with room for two such blocks: one is copied while one is filled."""
        per_token, tokens = len(self.layer_names) * routes.ids.shape[1], 2 * block.num_tokens
        ring = self._ring
        if ring is not None and (block.entries or ring.capacity >= per_token * tokens):
            return ring
        if ring is not None and not ring.wait_empty(self._patience_s()):
            raise RingFull
        capacity = per_token * max(self.ring_tokens, tokens)
        ring = self._ring = Ring(capacity, routes.ids.device, self.weights)
        block.start = 0
        return ring

    def _lookup(self, module: Any) -> Any:
        """Map of a gate whose ids are slots; a gate that routes in the logical frame needs none."""
        table = vars(module).get("slot_to_logical")  # a plain attribute; Module.__getattr__ is slow
        if table is None or getattr(module, "routes_in_logical_frame", False):
            return None
        known = self._lookups.get(id(module))
        if known is None or not np.array_equal(known[:-1], table):
            known = np.append(np.asarray(table), -1).astype(np.int16)  # index -1, no pick: -1
            self._lookups[id(module)] = known
        return known

    # -- what goes wrong --------------------------------------------------------------------------

    def _patience_s(self) -> float:
        """Once the writer was too slow, nothing waits again until it has caught up."""
        return 0.0 if self._stalled else self.max_wait_s

    def _too_slow(self) -> str:
        self._stalled = True
        return (
            "found the writer behind by more than the ring holds for "
            f"{self.max_wait_s} s, expected it to keep up: write to a faster disk, raise "
            "ring_tokens or every_n_steps"
        )

    def _give_up(self, block: Block, kind: str, reason: str) -> None:
        block.recorded = False
        if self._ring is not None and block.entries:
            self._ring.rewind(block.start)
        self.dropped_tokens += block.num_tokens
        self.skip(kind, reason)

    def _ran_again(self, block: Block, places: Places) -> None:
        """Refuse a forward pass in which a layer runs more often than it has names."""
        if not block.recorded:
            return
        self._give_up(
            block,
            "again",
            f"found that MoE layer {self.layer_names[places[-1]]!r} ran {len(places) + 1} times in "
            f"one forward pass of {self.forward and self.forward.model}, expected {len(places)}: "
            "where one module stands at several depths, give it a name for each (a ModuleList that "
            "holds it several times), and each is recorded as a layer; where a part of the model "
            "runs on several inputs, attach the recorder to that part",
        )

    def skip(self, kind: str, reason: str, count: int = 1) -> None:
        """Count blocks that are not recorded; say so once per kind, or raise where ``strict``."""
        self.skipped_blocks += count
        if self.strict:
            raise TraceError(reason)
        if kind not in self._warned:
            self._warned.add(kind)
            logger.warning(
                "a forward pass is not recorded: %s. Later ones of this kind are only counted.",
                reason,
            )
