"""A bounded ring of routing picks: filled by the hooks on the device, emptied on the host.

With CUDA there are two buffers of the same layout, one on the device and one in pinned host
memory. The hooks write into the first without waiting; ``send`` copies a finished region to the
second on a stream of its own. Elsewhere there is one buffer in host memory. A region is written
again only after ``release``, which its reader calls when the copy has arrived: no other ordering is
needed.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import torch

_BLOCKS_OF_ROOM = 2
"""A ring has room for this many forward passes: one is copied while one is filled."""


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
        # a tensor made under inference_mode could not be written by a later training step
        with torch.inference_mode(False):
            self._host = _buffers(capacity, torch.device("cpu"), weights, pinned=on_cuda)
            self._device = _buffers(capacity, device, weights, False) if on_cuda else self._host
            self._stream = torch.cuda.Stream(device) if on_cuda else None
        self._arrays = [buffer.numpy() for buffer in self._host]
        self._head = 0
        self._tail = 0
        self._released = threading.Condition()

    @property
    def head(self) -> int:
        """Offset after the last reserved region."""
        return self._head

    def is_empty(self) -> bool:
        return self._tail >= self._head

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until every region is released; False when that takes too long."""
        with self._released:
            return self._released.wait_for(self.is_empty, timeout_s)

    def reserve(self, count: int, timeout_s: float) -> int:
        """Return the offset of ``count`` free elements in a row.

        Raises:
            RingFull: the consumer did not make room within ``timeout_s``.
        """
        start = self._head
        if start % self.capacity + count > self.capacity:
            start += self.capacity - start % self.capacity
        end = start + count
        if end - self._tail > self.capacity:
            deadline = time.monotonic() + timeout_s
            with self._released:
                while end - self._tail > self.capacity:
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._released.wait(left):
                        raise RingFull
        self._head = end
        return start

    def rewind(self, head: int) -> None:
        """Give back everything reserved since the head was there."""
        self._head = head

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
        with torch.cuda.device(self.device), torch.inference_mode(False):
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                for source, target in zip(self._device, self._host, strict=True):
                    for a, b in self._spans(start, end):
                        target[a:b].copy_(source[a:b], non_blocking=True)
                event = torch.cuda.Event(blocking=True)  # the writer sleeps, it does not spin
                event.record(self._stream)
        return event

    def _spans(self, start: int, end: int) -> list[tuple[int, int]]:
        first, last = start % self.capacity, end % self.capacity or self.capacity
        if first < last:
            return [(first, last)]
        return [(first, self.capacity), (0, last)]

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


def ring_capacity(elements_per_token: int, ring_tokens: int, block_tokens: int) -> int:
    """Elements for ``ring_tokens`` tokens, or for two forward passes if that is more."""
    return elements_per_token * max(ring_tokens, _BLOCKS_OF_ROOM * block_tokens)


def _buffers(
    capacity: int, device: torch.device, weights: bool, pinned: bool
) -> tuple[torch.Tensor, ...]:
    dtypes = (torch.int16, torch.float16) if weights else (torch.int16,)
    return tuple(
        torch.empty(capacity, dtype=dtype, device=device, pin_memory=pinned) for dtype in dtypes
    )
