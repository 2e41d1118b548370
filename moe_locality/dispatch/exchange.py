"""Collectives of the exchange: counts first, then ragged all-to-alls. No arithmetic.

``comm`` is the module whose ``all_to_all_single`` is called: ``torch.distributed``, or
``deepspeed.comm``, which has the same function and logs it.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.distributed
from torch import Tensor

from moe_locality.dispatch import notes
from moe_locality.dispatch.place import (
    HEADER,
    NO_REPORT,
    Place,
    RanksApart,
    calls_so_far,
    check_headers,
)
from moe_locality.dispatch.traffic import SubgroupCounter, TrafficCounter
from moe_locality.errors import MoeLocalityError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Arriving:
    """Rows on their way; :meth:`wait` gives them. What is sent must live as long.

    ``kind``: what they are; ``link``: the way they take.
    """

    received: Tensor
    work: Any
    sent: Tensor
    kind: str = "dispatch"
    link: "Link | None" = None

    def wait(self) -> Tensor:
        if self.work is not None:
            assert self.link is not None
            with self.link.explained(self.kind):
                self.work.wait()
        return self.received


class Counts:
    """Counts of this rank and those it gets, on their way between ranks and to the host.

    On a GPU they cross to the host on a stream of their own, so what is launched meanwhile on the
    current stream does not delay them; on a CPU the ranks talk in the background.
    """

    def __init__(
        self,
        sent: Tensor,
        received: Tensor,
        work: Any = None,
        link: "Link | None" = None,
        apart: RanksApart | None = None,
    ) -> None:
        self.sent, self.received, self._work, self._link = sent, received, work, link
        self._apart = apart
        self._copy = None
        if sent.is_cuda:  # the current stream waits for the ranks, this thread does not
            self._wait()
            self._copy = _HostCopy(torch.stack([sent, received]))

    def read(self) -> tuple[Tensor, list[int], list[int]]:
        """Return what arrived, on the device, and (sent, received) on the host. Waits.

        Raises:
            RanksApart: on all ranks of the link, where one stands at another layer.
        """
        self._wait()
        if self._copy is None:
            sent, got = self.sent.tolist(), self.received.tolist()
        else:
            sent, got = self._copy.read()
        if self._link is None:
            return self.received, sent, got
        self._link.check([row[:HEADER] for row in got], self._apart)
        received = self.received[:, HEADER:].reshape(-1)
        return received, _without_header(sent), _without_header(got)

    def _wait(self) -> None:
        if self._work is not None:
            assert self._link is not None
            with self._link.explained("token counts"):
                self._work.wait()
            self._work = None


def _without_header(rows: list[list[int]]) -> list[int]:
    return [count for row in rows for count in row[HEADER:]]


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
    order, those with nothing to send or to get too. ``ranks``: global ranks of the group, in its
    order; ``group_ranks``: those of the whole EP group. ``place``: of the layer that is served.
    """

    group: Any
    size: int
    comm: Any
    counter: TrafficCounter | SubgroupCounter | None
    ranks: tuple[int, ...] = ()
    group_ranks: tuple[int, ...] = ()
    place: Place = field(default_factory=Place)

    def start_counts(self, counts: Tensor, apart: RanksApart | None = None) -> Counts:
        """Tell every rank how many rows it will get.

        ``counts [size * n] int64`` (n for the first rank, then n for the next, ...); what arrives
        is ``[size * n]``: n from each rank. Where the ranks stand travels with them; ``apart``:
        what an exchange before found about that, for ranks that do not know.
        """
        counts = counts.contiguous()
        if self.size == 1:
            return Counts(counts, counts)
        counts = counts.view(self.size, -1)
        sent = counts.new_empty(self.size, HEADER + counts.shape[1])
        sent[:, HEADER:] = counts
        header = (self.place.code(), *(NO_REPORT if apart is None else apart.report))
        if sent.is_cuda:  # fills: a copy of host memory would make this thread wait
            for column, value in enumerate(header):
                sent[:, column] = value
        else:
            sent[:, :HEADER] = torch.tensor(header)
        received = torch.empty_like(sent)
        with self.explained("token counts"):
            work = self.comm.all_to_all_single(received, sent, group=self.group, async_op=True)
        return Counts(sent, received, work, self, apart)

    def check(self, headers: Sequence[Sequence[int]], apart: RanksApart | None) -> None:
        """Raise RanksApart where the ranks do not stand at one layer."""
        check_headers(headers, self.ranks, self.place, torch.distributed.get_rank(), apart)

    @contextmanager
    def explained(self, kind: str) -> Iterator[None]:
        """Say what a broken connection means, and which ranks are gone; what the backend says
        follows.
        """
        try:
            yield
        except RuntimeError as error:
            raise MoeLocalityError(self._explanation(kind, error)) from error

    def _explanation(self, kind: str, error: RuntimeError) -> str:
        where = f"{kind} of {self.place}"
        history = calls_so_far(self.group_ranks)
        where += f" ({history})" if history else ""
        found = (
            f"the exchange of {where} with ranks {list(self.ranks)} broke off on rank "
            f"{torch.distributed.get_rank()}, which mostly means that another rank died or left "
            "before this one"
        )
        # at once: the launcher may end this process before the others answered
        logger.error("moe_locality: %s: asking the other ranks where they stand", found)
        told = notes.ask(self.ranks, self.group_ranks, where)
        return f"{found}. {told} The backend says: {error}"

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
            return Arriving(rows, None, rows, kind)
        arriving = rows.new_empty(sum(received), *rows.shape[1:])
        with self.explained(kind):
            work = self.comm.all_to_all_single(
                arriving,
                rows,
                output_split_sizes=list(received),
                input_split_sizes=list(sent),
                group=self.group,
                async_op=True,
            )
        return Arriving(arriving, work, rows, kind, self)

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
