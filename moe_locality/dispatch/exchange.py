"""Collectives of the exchange: counts first, then ragged all-to-alls. No arithmetic.

``comm`` is the module whose ``all_to_all_single`` is called: ``torch.distributed``, or
``deepspeed.comm``, which has the same function and logs it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_locality.dispatch.traffic import SubgroupCounter, TrafficCounter
from moe_locality.errors import MoeLocalityError


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Say what a broken connection means; the backend's own message follows."""
    try:
        yield
    except RuntimeError as error:
        raise MoeLocalityError(
            f"the exchange of {what} between the expert-parallel ranks broke off, which mostly "
            "means that another rank died or left before this one: look for the first error in "
            f"the output of the other ranks. The backend says: {error}"
        ) from error


@dataclass(frozen=True, slots=True)
class Arriving:
    """Rows on their way; :meth:`wait` gives them. What is sent must live as long."""

    received: Tensor
    work: Any
    sent: Tensor

    def wait(self) -> Tensor:
        if self.work is not None:
            with _explained("tokens"):
                self.work.wait()
        return self.received


class Counts:
    """Counts of this rank and those it gets, on their way between ranks and to the host.

    On a GPU they cross to the host on a stream of their own, so what is launched meanwhile on the
    current stream does not delay them; on a CPU the ranks talk in the background.
    """

    def __init__(self, sent: Tensor, received: Tensor, work: Any) -> None:
        self.sent, self.received, self._work = sent, received, work
        self._copy = None
        if sent.is_cuda:  # the current stream waits for the ranks, this thread does not
            self._wait()
            self._copy = _HostCopy(torch.stack([sent, received]))

    def read(self) -> tuple[Tensor, list[int], list[int]]:
        """Return what arrived, on the device, and (sent, received) on the host. Waits."""
        self._wait()
        if self._copy is None:
            return self.received, self.sent.tolist(), self.received.tolist()
        return self.received, *self._copy.read()

    def _wait(self) -> None:
        if self._work is not None:
            with _explained("token counts"):
                self._work.wait()
            self._work = None


class _HostCopy:
    """A copy of a CUDA tensor to pinned memory on a side stream."""

    _streams: ClassVar[dict[torch.device, Any]] = {}

    def __init__(self, values: Tensor) -> None:
        if values.device not in self._streams:
            self._streams[values.device] = torch.cuda.Stream(values.device)
        stream = self._streams[values.device]
        stream.wait_stream(torch.cuda.current_stream(values.device))
        with torch.cuda.stream(stream):
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(stream)
        values.record_stream(stream)

    def read(self) -> list:
        self._done.synchronize()
        return self._host.tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The way among the ranks of one group; ``size`` 1 means that nothing is exchanged.

    ``group`` may be None for the world. Every rank of the group calls the same methods in the same
    order, those with nothing to send or to get too.
    """

    group: Any
    size: int
    comm: Any
    counter: TrafficCounter | SubgroupCounter | None

    def start_counts(self, counts: Tensor) -> Counts:
        """Tell every rank how many rows it will get.

        ``counts [size * n] int64`` (n for the first rank, then n for the next, ...); what arrives
        is ``[size * n]``: n from each rank.
        """
        counts = counts.contiguous()
        if self.size == 1:
            return Counts(counts, counts, None)
        received = torch.empty_like(counts)
        with _explained("token counts"):
            work = self.comm.all_to_all_single(received, counts, group=self.group, async_op=True)
        return Counts(counts, received, work)

    def start_rows(
        self,
        rows: Tensor,
        sent: Sequence[int],
        received: Sequence[int],
        kind: str,
        *,
        extra_bytes: int = 0,
    ) -> Arriving:
        """Begin to send consecutive rows to the ranks in order.

        ``rows [>= sum(sent), B]`` arrive as ``[sum(received), B]`` in the order of the sources.
        ``extra_bytes`` of each row count as ``routing``, the rest as ``kind``.
        """
        rows = rows[: sum(sent)].contiguous()
        if self.counter is not None:
            self.counter.count(kind, sent, rows, extra_bytes)
        if self.size == 1:
            return Arriving(rows, None, rows)
        arriving = rows.new_empty(sum(received), *rows.shape[1:])
        with _explained("tokens"):
            work = self.comm.all_to_all_single(
                arriving,
                rows,
                output_split_sizes=list(received),
                input_split_sizes=list(sent),
                group=self.group,
                async_op=True,
            )
        return Arriving(arriving, work, rows)

    def rows(
        self,
        rows: Tensor,
        sent: Sequence[int],
        received: Sequence[int],
        kind: str,
        *,
        extra_bytes: int = 0,
    ) -> Tensor:
        """:meth:`start_rows`, and wait."""
        return self.start_rows(rows, sent, received, kind, extra_bytes=extra_bytes).wait()
