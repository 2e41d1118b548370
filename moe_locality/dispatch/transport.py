"""The interface of a transport, and what all transports are made of.

A *transport* is one way to send rows to the ranks of their experts and back: flat, hierarchical or
DeepEP. They share how a row is coded on the wire, the counters of what was sent, and the all-to-all
of one group of ranks: counts first, then rows.
"""

import contextlib
import logging
import math
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from moe_locality import quantization
from moe_locality.config import DispatchConfig
from moe_locality.dispatch.desync import (
    HEADER,
    NO_REPORT,
    CallPosition,
    DesyncError,
    ask_ranks,
    calls_so_far,
    check_headers,
)
from moe_locality.errors import MoeLocalityError
from moe_locality.kernels import ops
from moe_locality.kernels.ops import RowMap
from moe_locality.topology.cluster import ClusterTopology

if TYPE_CHECKING:  # absent from a torch that was built without torch.distributed
    from torch.distributed import ProcessGroup, Work

logger = logging.getLogger(__name__)


# -- the interface


class DispatchMetadata(Protocol):
    """Splits and row orders of one step; each transport has its own class.

    ``tokens_per_local_expert [e]``: rows of each local expert. ``shape``: (T, K) of the routes. A
    later :meth:`~moe_locality.dispatch.TokenDispatcher.dispatch` of them may use it again.
    """

    @property
    def tokens_per_local_expert(self) -> tuple[int, ...]: ...

    @property
    def shape(self) -> tuple[int, int]: ...


Metadata = TypeVar("Metadata", bound=DispatchMetadata)
Dispatched = tuple[Metadata, Tensor, Tensor | None]
"""What a dispatch delivers: metadata, rows ``[R, D]`` in the order of the local experts, and the
weights as they arrived, where the transport sends them."""
Combined = tuple[Tensor, Tensor]
"""What a combine delivers: ``[T, D]``, and the rows that the weights multiplied."""


@dataclass(eq=False)
class Transport(ABC, Generic[Metadata]):
    """Sends rows to the ranks of their experts and back; keeps no state of a step.

    All methods are collective over the EP group. A ``start_`` method begins and returns a function
    that waits and gives the result; rows travel between the two. No method records autograd:
    ``dispatcher`` wraps them.
    """

    metadata_type: ClassVar[type]
    """the class of its metadata"""
    sends_weights = False
    """whether the weights travel with the rows: they are then used where the experts are"""

    config: DispatchConfig
    num_slots: int
    kernels: ops.Backend
    clock: "StageClock"

    def __post_init__(self) -> None:
        self.payload = Codec.of_payload(self.config.payload, self.kernels)
        self.combine_payload = Codec.of_payload(self.config.combine_payload, self.kernels)

    @abstractmethod
    def start_dispatch(
        self, x: Tensor, slot_ids: Tensor, topk_weights: Tensor | None, metadata: Metadata | None
    ) -> Callable[[], Dispatched[Metadata]]:
        """Send the tokens ``x [T, D]`` to the slots of their routes ``slot_ids [T, K]``.

        ``topk_weights [T, K]``: given where the transport sends them. ``metadata``: of an earlier
        dispatch of the same routes; then no counts are exchanged.
        """

    @abstractmethod
    def dispatch_backward(
        self, grad_rows: Tensor, grad_weights: Tensor | None, metadata: Metadata
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of ``x [T, D]`` and of the weights ``[T, K]`` that were sent.

        ``grad_weights``: of the weights that arrived; None where it is not wanted.
        """

    @abstractmethod
    def start_combine(
        self, expert_out: Tensor, topk_weights: Tensor, metadata: Metadata
    ) -> Callable[[], Combined]:
        """Send the results of the experts ``[R, D]`` back; the tokens get their weighted sums.

        ``topk_weights``: ``[T, K]``, or those that the dispatch delivered.
        """

    @abstractmethod
    def combine_backward(
        self,
        grad: Tensor,
        rows: Tensor | None,
        topk_weights: Tensor,
        metadata: Metadata,
        need_rows: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the experts' results ``[R, D]`` and of the weights.

        ``grad [T, D]``. ``rows``: those of :data:`Combined`; None where the gradient of the
        weights is not wanted. ``need_rows``: whether that of the results is.
        """


# -- how a row is coded


@dataclass(frozen=True, slots=True)
class Codec:
    """How rows are coded on the wire: ``format`` is a row format of ``moe_locality.quantization``
    (lossy), or None for rows as they are.

    Every row is coded, one that stays on its rank too, so what the model computes does not depend
    on where an expert is. Gradients are not coded and pass the coding unchanged: the
    straight-through estimator, arXiv 1308.3432.
    """

    format: str | None
    kernels: ops.Backend = "auto"

    @classmethod
    def of_payload(cls, payload: str, kernels: ops.Backend = "auto") -> "Codec":
        """Return the codec of a ``dispatch.payload`` of the configuration."""
        return cls(None if payload == "none" else payload, kernels)

    def encode(self, rows: Tensor) -> Tensor:
        """Code rows ``[N, D]``: the rows themselves, or uint8 ``[N, row_bytes]``."""
        return rows if self.format is None else quantization.encode_rows(rows, self.format)

    def decode(self, coded: Tensor, like: Tensor, order: Tensor | None = None) -> Tensor:
        """Invert :meth:`encode` up to its rounding: rows ``[N, D]`` of the width and dtype of
        ``like``; with ``order``, those rows in that order, without moving the coded ones first.
        """
        if self.format is None:
            return coded if order is None else ops.permute(coded, order, backend=self.kernels)
        size = (like.shape[1], like.dtype)
        return quantization.decode_rows(coded.contiguous(), self.format, *size, index=order)

    def permute(self, x: Tensor, row_map: RowMap) -> Tensor:
        """Return the coded row of every row of the map; each token is coded once."""
        if self.format is None:
            return ops.permute(x, row_map, backend=self.kernels)
        where = (row_map.row_token, self.format)
        return quantization.permute_encode(x, *where, positions=row_map.positions)


# -- counters of what was sent


class StageClock:
    """Adds up the time of each stage: ``with clock("dispatch"): ...``. Negligible when disabled.

    On a GPU the time is that of the device (events on the current stream), read when asked for, so
    nothing waits meanwhile; on a CPU it is that of the process.
    """

    def __init__(self, enabled: bool = False) -> None:
        self.enabled = enabled
        self._cuda = torch.cuda.is_available()
        self.reset()

    def reset(self) -> None:
        """Forget all times."""
        self._us: dict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, Any, Any]] = []

    def __call__(self, stage: str) -> contextlib.AbstractContextManager[None]:
        return self._span(stage) if self.enabled else _OFF

    def stage_us(self) -> dict[str, float]:
        """Return the microseconds of each stage so far. Waits for the device."""
        for stage, start, stop in self._pending:
            stop.synchronize()
            self._us[stage] += 1e3 * start.elapsed_time(stop)
        self._pending = []
        return dict(self._us)

    @contextlib.contextmanager
    def _span(self, stage: str) -> Iterator[None]:
        if self._cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            stop.record()
            self._pending.append((stage, start, stop))
        else:
            begin = time.perf_counter()
            yield
            self._us[stage] += 1e6 * (time.perf_counter() - begin)


_OFF = contextlib.nullcontext()


KINDS = ("dispatch", "combine", "dispatch_grad", "combine_grad")
HOMEWARD = ("combine", "dispatch_grad")  # back to the tokens
ALL_KINDS = (*KINDS, "routing")
"""``routing``: slots and weights (and their gradients) that travel in the packed rows of the
hierarchical exchange, and the bytes that align them: the same rows and messages as those of
``dispatch`` (or ``dispatch_grad``) between nodes. The flat exchange has none."""
LINKS = ("same_rank", "same_node", "cross_node")


class TrafficCounter:
    """``rows[kind][i]``, ``bytes[kind][i]`` and ``messages[kind][i]`` (int64): sent by this rank to
    ``ranks[i]`` of the EP group (global ranks, in its order); ``load``: rows that this rank's
    experts worked on; ``clock``: times of the stages; ``resets``: how often counting began anew.
    """

    def __init__(
        self,
        *,
        ranks: Sequence[int],
        topology: ClusterTopology | None = None,
        clock: StageClock | None = None,
    ) -> None:
        self.ranks = tuple(ranks)
        self.topology = topology
        self.clock = clock or StageClock()
        self.resets = -1
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero."""
        self.resets += 1
        self.load = 0
        self.rows, self.bytes, self.messages = (
            {kind: np.zeros(len(self.ranks), dtype=np.int64) for kind in ALL_KINDS}
            for _ in range(3)
        )
        self.clock.reset()

    def count(
        self,
        kind: str,
        splits: Sequence[int],
        rows: Tensor,
        extra_bytes: int = 0,
        *,
        among: tuple[int, ...] | None = None,
    ) -> None:
        """Add one exchange: ``splits[i]`` rows like those of ``rows [*, D]`` to ``ranks[i]``, or to
        the i-th rank of those that it is ``among``.

        ``extra_bytes`` of each row count as ``routing``.
        """
        where: Any = slice(None)
        if among is not None and among != self.ranks:
            where = [self.ranks.index(rank) for rank in among]
        sent = np.asarray(splits, dtype=np.int64)
        sizes = {kind: math.prod(rows.shape[1:]) * rows.element_size() - extra_bytes}
        if extra_bytes:
            sizes["routing"] = extra_bytes
        for name, size in sizes.items():
            self.rows[name][where] += sent
            self.bytes[name][where] += sent * size
            self.messages[name][where] += sent > 0


# -- the all-to-all of one group


class Collectives(Protocol):
    """A module such as ``torch.distributed``."""

    def all_to_all_single(self, output: Tensor, rows: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        """Exchange rows; with ``async_op=True``, return what to wait for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """Rows between this rank and each rank of a group, in its order: ``input_splits`` are sent in a
    dispatch and received in a combine, ``output_splits`` the other way round.
    """

    input_splits: tuple[int, ...]
    output_splits: tuple[int, ...]


@dataclass(slots=True)
class PendingRows:
    """Rows that are being sent; :meth:`wait` returns them. ``sent`` must live until then.

    ``kind``: what is sent, for the message of an error. ``group``: the ranks that exchange it.
    """

    received: Tensor
    work: "Work | None"
    sent: Tensor
    kind: str
    group: "AllToAllGroup"

    def wait(self) -> Tensor:
        if self.work is not None:
            with self.group.explained(self.kind):
                self.work.wait()
            self.work = None
        return self.received


class PendingCounts:
    """Row counts on their way between the ranks and to the host.

    On a GPU they are copied to the host on a stream of their own, so kernels launched meanwhile on
    the current stream do not delay them; on a CPU the ranks exchange them in the background.
    """

    def __init__(self, rows: PendingRows, desync: DesyncError | None = None) -> None:
        self._rows, self._desync = rows, desync
        self._read_copy = None
        if rows.sent.is_cuda:  # the current stream waits for the ranks, this thread does not
            self._read_copy = _copy_to_host(torch.stack([rows.sent, rows.wait()]))

    def read(self) -> tuple[Tensor, list[int], list[int]]:
        """Return what arrived, on the device, and (sent, received) on the host. Waits.

        Raises:
            DesyncError: on all ranks of the group, where one is at another layer.
        """
        received, group = self._rows.wait(), self._rows.group
        if self._read_copy is None:
            sent, got = self._rows.sent.tolist(), received.tolist()
        else:
            sent, got = self._read_copy()
        if group.size == 1:
            return received, sent, got
        headers, me = [row[:HEADER] for row in got], torch.distributed.get_rank()
        check_headers(headers, group.ranks, group.position, me, self._desync)
        sent, got = ([n for row in rows for n in row[HEADER:]] for rows in (sent, got))
        return received[:, HEADER:].reshape(-1), sent, got


_streams: dict[torch.device, Any] = {}


def _copy_to_host(values: Tensor) -> Callable[[], list]:
    """Begin to copy a CUDA tensor to pinned memory on a side stream; return what waits for it."""
    if values.device not in _streams:
        _streams[values.device] = torch.cuda.Stream(values.device)
    stream = _streams[values.device]
    stream.wait_stream(torch.cuda.current_stream(values.device))
    with torch.cuda.stream(stream):
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        done = torch.cuda.Event()
        done.record(stream)
    values.record_stream(stream)

    def read() -> list:
        done.synchronize()
        return host.tolist()

    return read


@dataclass(frozen=True, slots=True, kw_only=True)
class AllToAllGroup:
    """The ranks of one process group that exchange counts and rows; ``size`` 1 exchanges nothing.

    Every rank of the group calls the same methods in the same order, also with nothing to send or
    to receive.

    ``process_group``: None for the world. ``comm``: ``torch.distributed``, or ``deepspeed.comm``,
    which logs it. ``counter``: of the whole EP group. ``ranks``: global ranks of this group in its
    order. ``position``: of the layer.
    """

    process_group: "ProcessGroup | None"
    comm: Collectives
    counter: TrafficCounter
    ranks: tuple[int, ...]
    position: CallPosition = field(default_factory=CallPosition)

    @property
    def size(self) -> int:
        return len(self.ranks)

    def start_counts(self, counts: Tensor, desync: DesyncError | None = None) -> PendingCounts:
        """Tell every rank how many rows it will get, and where this one is.

        ``counts [size * n] int64``: n for each rank in turn; what arrives is ``[size * n]``, n from
        each. ``desync``: what an earlier exchange found, for ranks that have not heard of it.
        """
        counts = counts.contiguous()
        if self.size == 1:
            return PendingCounts(PendingRows(counts, None, counts, "token counts", self))
        counts = counts.view(self.size, -1)
        sent = counts.new_empty(self.size, HEADER + counts.shape[1])
        sent[:, HEADER:] = counts
        header = (self.position.code(), *(NO_REPORT if desync is None else desync.report))
        if sent.is_cuda:  # fills: a copy of host memory would make this thread wait
            for column, value in enumerate(header):
                sent[:, column] = value
        else:
            sent[:, :HEADER] = torch.tensor(header)
        return PendingCounts(self._start(sent, torch.empty_like(sent), "token counts"), desync)

    def start_rows(
        self, rows: Tensor, splits: Splits, kind: str, *, extra_bytes: int = 0
    ) -> PendingRows:
        """Begin to send consecutive rows to the ranks in order.

        In a ``dispatch`` or ``combine_grad``, ``rows [>= sum(input_splits), B]`` arrive as
        ``[sum(output_splits), B]`` in the order of the sources; in the other kinds, which go back
        to the tokens, the other way round. ``extra_bytes`` of each row count as ``routing``.
        """
        sent, got = splits.input_splits, splits.output_splits
        assert kind in KINDS
        if kind in HOMEWARD:
            sent, got = got, sent
        rows = rows[: sum(sent)].contiguous()
        self.counter.count(kind, sent, rows, extra_bytes, among=self.ranks)
        if self.size == 1:
            return PendingRows(rows, None, rows, kind, self)
        received = rows.new_empty(sum(got), *rows.shape[1:])
        sizes = {"output_split_sizes": list(got), "input_split_sizes": list(sent)}
        return self._start(rows, received, kind, **sizes)

    def _start(self, sent: Tensor, received: Tensor, kind: str, **sizes: Any) -> PendingRows:
        with self.explained(kind):
            work = self.comm.all_to_all_single(
                received, sent, group=self.process_group, async_op=True, **sizes
            )
        return PendingRows(received, work, sent, kind, self)

    @contextlib.contextmanager
    def explained(self, kind: str) -> Iterator[None]:
        """Add to an error of the backend which exchange failed and which ranks are gone."""
        try:
            yield
        except RuntimeError as error:
            where = f"{kind} of {self.position}"
            if history := calls_so_far(self.counter.ranks):
                where += f" ({history})"
            found = (
                f"the exchange of {where} with ranks {list(self.ranks)} broke off on rank "
                f"{torch.distributed.get_rank()}, which mostly means that another rank died or "
                "left before this one"
            )
            # logged first: the launcher may end this process before the others answer
            logger.error("moe_locality: %s: asking the other ranks where they stand", found)
            told = ask_ranks(self.ranks, self.counter.ranks, where)
            raise MoeLocalityError(f"{found}. {told} The backend says: {error}") from error
