"""The flat exchange: one row per (token, expert) pair, ragged or with a fixed capacity.

With a fixed capacity (``dispatch.capacity``) the host is never told what was routed: every rank
sends exactly C rows for every slot, and rows without a route are zero. So no counts are exchanged,
no shape depends on the routes, and a step can be captured in a CUDA graph. Routes beyond the C-th
of a slot have no row: they are counted on the device and raise on all ranks, or are dropped, as
``on_overflow`` says. Dropped are, of the routes of one rank to one slot, those after the first C in
the order (token, k): DeepSpeed's ``drop_policy="position"``, applied per source rank, so the choice
does not depend on other ranks and is the same in every run.

Shapes: G ranks of the EP group, e local experts, P = G*e slots, R rows received.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moe_locality.config import CapacityConfig
from moe_locality.dispatch.transport import (
    AllToAllGroup,
    Combined,
    Dispatched,
    PendingCounts,
    Splits,
    Transport,
)
from moe_locality.errors import ConfigError
from moe_locality.kernels import ops
from moe_locality.kernels.ops import RowMap


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatMetadata(Splits):
    """What one step sends and receives: splits, and orders of rows.

    ``row_map``: the routes of this rank's tokens sorted by slot, so by destination rank; its
    ``positions`` are -1 where a route is dropped.
    ``tokens_per_local_expert [e]``: rows received for each local expert.
    ``by_expert [R] int64``: row of the received buffer (ordered by source, then expert) for each
    row ordered by expert, then source; ``by_source [R]`` is its inverse. None where both orders
    agree.
    ``lost``: with a fixed capacity, routes without a row, of every rank, on their way to the host;
    None where not asked (``on_overflow="drop"``, or while a CUDA graph is captured).
    """

    row_map: RowMap
    tokens_per_local_expert: tuple[int, ...]
    by_expert: Tensor | None
    by_source: Tensor | None
    lost: PendingCounts | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(T, K) of the routes."""
        tokens, top_k = self.row_map.positions.shape
        return tokens, top_k


def sort_routes(slot_ids: Tensor, num_slots: int, backend: ops.Backend) -> RowMap:
    """Sort routes ``[T, K]`` (-1: dropped) by slot, without a wait for a device."""
    # on a GPU T*K rows even if routes are dropped (those in use first): the number costs a wait
    rows = slot_ids.numel() if slot_ids.is_cuda else None
    return ops.row_map(slot_ids, num_slots, num_rows=rows, backend=backend)


def trim(row_map: RowMap, num_rows: int) -> RowMap:
    """Return the map without its rows past the end, now that their number is known."""
    if not row_map.padded:
        return row_map
    return replace(
        row_map,
        row_route=row_map.row_route[:num_rows],
        row_token=row_map.row_token[:num_rows],
        padded=False,
    )


def block_order(lengths: Tensor, order: Tensor, num_rows: int) -> Tensor:
    """Return the rows ``[num_rows] int64`` of blocks of ``lengths [B]``, taken in ``order [B]``."""
    starts = torch.cumsum(lengths, 0) - lengths
    taken = lengths[order]
    before = torch.cumsum(taken, 0) - taken
    shift = torch.repeat_interleave(starts[order] - before, taken, output_size=num_rows)
    return shift + torch.arange(num_rows, dtype=shift.dtype, device=shift.device)


def inverse(order: Tensor) -> Tensor:
    """Return the inverse of a permutation."""
    found = torch.empty_like(order)
    found[order] = torch.arange(len(order), dtype=order.dtype, device=order.device)
    return found


def expert_major_order(counts: Tensor, num_rows: int) -> Tensor:
    """Return the order ``[R]`` by expert, then source, of rows by source: ``counts [G, e]``."""
    blocks = torch.arange(counts.numel(), device=counts.device).view_as(counts)
    return block_order(counts.reshape(-1), blocks.t().reshape(-1), num_rows)


def sums_of(counts: Sequence[int], size: int) -> tuple[int, ...]:
    """Return the sum of each ``size`` counts in a row."""
    return tuple(sum(counts[i : i + size]) for i in range(0, len(counts), size))


def flat_metadata(
    row_map: RowMap, received: Tensor, num_ranks: int, sent: list[int], got: list[int]
) -> FlatMetadata:
    """Return the metadata of a step from what is sent (``row_map``) and what is received.

    ``received [G * e] int64``: rows that each source rank sends to each local expert. ``sent [P]``
    and ``got [G * e]`` are the counts of both sides on the host.
    """
    size = len(sent) // num_ranks
    by_expert = by_source = None
    if num_ranks > 1 and size > 1:
        by_expert = expert_major_order(received.view(num_ranks, size), sum(got))
        by_source = inverse(by_expert)
    return FlatMetadata(
        row_map=trim(row_map, sum(sent)),
        input_splits=sums_of(sent, size),
        output_splits=sums_of(got, size),
        tokens_per_local_expert=tuple(sum(got[i::size]) for i in range(size)),
        by_expert=by_expert,
        by_source=by_source,
    )


def fixed_rows(slot_ids: Tensor, num_slots: int, capacity: int, backend: ops.Backend) -> RowMap:
    """Return a map of ``num_slots * capacity`` rows: slot p has rows ``[p * C, (p + 1) * C)``.

    ``slot_ids [T, K]``, -1 where a route is dropped. The first C routes of a slot in (token, k)
    order keep a row; ``overflow [1]`` counts the others. Waits for no device.
    """
    device, count = slot_ids.device, max(1, slot_ids.numel())
    made = ops.row_map(slot_ids, num_slots, capacity=capacity, num_rows=count, backend=backend)
    first = made.slot_offsets[:-1]
    rank = torch.arange(capacity, dtype=torch.int32, device=device)
    used = rank < made.tokens_per_slot[:, None]
    source = (first[:, None] + rank).clamp_max(count - 1).reshape(-1)
    empty = ~used.reshape(-1)
    starts = torch.arange(num_slots + 1, dtype=torch.int32, device=device) * capacity
    slots = slot_ids.long().clamp(0, num_slots - 1)
    positions = made.positions + (starts[:-1] - first)[slots]
    return replace(
        made,
        row_route=made.row_route.index_select(0, source).masked_fill(empty, -1),
        row_token=made.row_token.index_select(0, source).masked_fill(empty, -1),
        positions=positions.masked_fill(made.positions < 0, -1),
        slot_offsets=starts,
        overflow=(made.routed_per_slot.sum() - made.tokens_per_slot.sum()).to(torch.int32).view(1),
        padded=True,
    )


_MAX_ROWS = 2**31 - 1


@dataclass(eq=False)
class FlatTransport(Transport[FlatMetadata]):
    """One ragged all-to-all of the whole EP group in each direction; with a fixed capacity, exactly
    C rows per source rank and slot.

    ``tokens_per_local_expert`` is then ``G * C`` for every expert: an expert works on its padding
    too, as in DeepSpeed's padded dispatch, and its results for padding are never read.
    """

    metadata_type: ClassVar[type] = FlatMetadata

    all_to_all: AllToAllGroup
    lost: Tensor | None = field(default=None, init=False)
    """int64 [1], on the device: routes of this rank that found no row, since the start"""
    _agreed: int | None = field(default=None, init=False)
    _orders: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False)

    def start_dispatch(
        self,
        x: Tensor,
        slot_ids: Tensor,
        topk_weights: Tensor | None,
        metadata: FlatMetadata | None,
    ) -> Callable[[], Dispatched[FlatMetadata]]:
        """Sort the routes, exchange the counts while the rows are put in order, send the rows."""
        del topk_weights  # used where the tokens are
        if metadata is None and self.config.capacity is not None:
            with self.clock("plan"):
                metadata = self._fixed_metadata(slot_ids, self.config.capacity)
        if metadata is None:
            with self.clock("plan"):
                row_map = sort_routes(slot_ids, self.num_slots, self.kernels)
                counts = self.all_to_all.start_counts(row_map.tokens_per_slot)
            with self.clock("permute"):
                rows = self.payload.permute(x, row_map)
            with self.clock("counts"):
                arrived, sent, got = counts.read()
                made = flat_metadata(row_map, arrived, self.all_to_all.size, sent, got)
        else:
            made = metadata
            with self.clock("permute"):
                rows = self.payload.permute(x, made.row_map)
        pending = self.all_to_all.start_rows(rows, made, "dispatch")

        def finish() -> Dispatched[FlatMetadata]:
            with self.clock("dispatch"):
                coded = pending.wait()
            with self.clock("reorder"):
                return made, self.payload.decode(coded, x, made.by_expert), None

        return finish

    def dispatch_backward(
        self, grad_rows: Tensor, grad_weights: Tensor | None, metadata: FlatMetadata
    ) -> tuple[Tensor, None]:
        """Send the gradients of the rows back and add them up per token."""
        del grad_weights
        rows = self._take(grad_rows, metadata.by_source)
        rows = self.all_to_all.start_rows(rows, metadata, "dispatch_grad").wait()
        return ops.permute_backward(rows, metadata.row_map.positions, backend=self.kernels), None

    def start_combine(
        self, expert_out: Tensor, topk_weights: Tensor, metadata: FlatMetadata
    ) -> Callable[[], Combined]:
        """Send the results back; they are weighted and summed where the tokens are.

        Raises:
            ConfigError: on all ranks, where a rank had more routes for a slot than it has rows.
        """
        if metadata.lost is not None:
            # here, and not before the experts: their work is launched while the counts travel
            self._refuse(sum(metadata.lost.read()[2]))
        with self.clock("reorder"):
            rows = self.combine_payload.encode(self._take(expert_out, metadata.by_source))
        pending = self.all_to_all.start_rows(rows, metadata, "combine")

        def finish() -> Combined:
            with self.clock("combine"):
                rows = pending.wait()
            with self.clock("sum"):
                rows = self.combine_payload.decode(rows, expert_out)
                positions = metadata.row_map.positions
                out = ops.combine(rows, positions, topk_weights, backend=self.kernels)
                return out, rows

        return finish

    def combine_backward(
        self,
        grad: Tensor,
        rows: Tensor | None,
        topk_weights: Tensor,
        metadata: FlatMetadata,
        need_rows: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """As the interface says; the gradient of the weights needs no exchange."""
        grad_rows, grad_weights = ops.combine_backward(
            grad, rows, metadata.row_map, topk_weights, need_rows=need_rows, backend=self.kernels
        )
        if grad_rows is not None:
            arrived = self.all_to_all.start_rows(grad_rows, metadata, "combine_grad").wait()
            grad_rows = self._take(arrived, metadata.by_expert)
        return grad_rows, grad_weights

    def _take(self, rows: Tensor, order: Tensor | None) -> Tensor:
        return rows if order is None else ops.permute(rows, order, backend=self.kernels)

    # -- a fixed capacity

    def check_overflow(self) -> None:
        """Raise ConfigError on all ranks if routes found no row since the last check. Collective.

        Waits for the device: call it between the replays of a CUDA graph, which nothing else
        checks. An explicit call raises with ``on_overflow="drop"`` too.
        """
        lost, group = self.lost, self.all_to_all
        if lost is None:
            # "undefined" where the job named no backend: gloo for the CPU, NCCL for the GPU
            on_gpu = (
                torch.cuda.is_available()
                and torch.distributed.is_initialized()
                and torch.distributed.get_backend(group.process_group) != "gloo"
            )
            lost = torch.zeros(1, dtype=torch.int64, device="cuda" if on_gpu else "cpu")
        everyone = group.start_counts(lost.repeat(group.size)).read()[2]
        lost.zero_()
        self._refuse(sum(everyone))

    def _refuse(self, lost: int) -> None:
        if lost:
            assert self.config.capacity is not None
            raise ConfigError(
                f"found {lost} routes beyond the rows of the fixed capacity "
                f"({self.config.capacity.text()}), expected none: raise dispatch.capacity, or "
                "choose dispatch.capacity.on_overflow 'drop'"
            )

    def _fixed_metadata(self, slot_ids: Tensor, capacity: CapacityConfig) -> FlatMetadata:
        group, capturing = self.all_to_all, is_capturing(slot_ids)
        rows = self._rows_per_slot(slot_ids, capacity, capturing)
        row_map = fixed_rows(slot_ids, self.num_slots, rows, self.kernels)
        if self.lost is None or self.lost.device != slot_ids.device:
            _check_warm(capturing)  # what a graph allocates, its replays would begin anew
            self.lost = torch.zeros(1, dtype=torch.int64, device=slot_ids.device)
        self.lost.add_(row_map.overflow)
        lost = None
        if capacity.on_overflow == "error" and not capturing:
            lost = group.start_counts(row_map.overflow.long().repeat(group.size))
        size = self.num_slots // group.size
        by_expert, by_source = self._order(rows, size, slot_ids.device)
        return FlatMetadata(
            row_map=row_map,
            input_splits=(size * rows,) * group.size,
            output_splits=(size * rows,) * group.size,
            tokens_per_local_expert=(group.size * rows,) * size,
            by_expert=by_expert,
            by_source=by_source,
            lost=lost,
        )

    def _rows_per_slot(self, slot_ids: Tensor, capacity: CapacityConfig, capturing: bool) -> int:
        """C, the same on all ranks: with a factor they agree on it, once, in the first step."""
        group, rows = self.all_to_all, capacity.rows or self._agreed
        if rows is None:
            routes = slot_ids.numel()
            if group.size > 1:
                _check_warm(capturing)
                mine = torch.full((group.size,), routes, device=slot_ids.device)
                routes = max(group.start_counts(mine).read()[2])
            assert capacity.factor is not None
            rows = max(1, math.ceil(capacity.factor * routes / self.num_slots))
            self._agreed = rows if group.size > 1 else None
        if rows * self.num_slots > _MAX_ROWS:
            raise ConfigError(
                f"found {rows} rows for each of {self.num_slots} slots, expected at most "
                f"{_MAX_ROWS} rows in all: lower dispatch.capacity"
            )
        return rows

    def _order(
        self, rows: int, size: int, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        ranks = self.all_to_all.size
        if ranks == 1 or size == 1:
            return None, None
        key = (rows, device)
        if key not in self._orders:
            counts = torch.full((ranks, size), rows)
            order = expert_major_order(counts, ranks * size * rows)
            self._orders[key] = (order.to(device), inverse(order).to(device))
        return self._orders[key]


def is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured: nothing may wait for the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def fixed_transports(model: nn.Module) -> Iterator[FlatTransport]:
    """Yield the transport of every layer of a model that has dispatched with a fixed capacity."""
    for module in model.modules():
        transport = getattr(getattr(module, "dispatcher", None), "transport", None)
        if isinstance(transport, FlatTransport) and transport.config.capacity:
            yield transport


def check_overflow(model: nn.Module) -> None:
    """:meth:`FlatTransport.check_overflow` of every layer of a model. Collective."""
    for transport in fixed_transports(model):
        transport.check_overflow()


def lost_routes(model: nn.Module) -> int:
    """Return how many routes of this rank found no row since the last check, over all layers."""
    found = [transport.lost for transport in fixed_transports(model)]
    return sum(int(lost) for lost in found if lost is not None)


def _check_warm(capturing: bool) -> None:
    if capturing:
        raise ConfigError(
            "found the first step of a layer with a fixed capacity inside the capture of a CUDA "
            "graph, expected one before it: run the model once, then capture"
        )
