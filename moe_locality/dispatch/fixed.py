"""The flat way with buffers of a fixed size: nothing about a step is known to the host.

Every rank sends exactly C rows for every slot, of which those without a route are zero, so no
counts travel, no shape depends on the routes, and a step can be captured in a CUDA graph. Routes
beyond the C-th of a slot find no row: they are counted on the device, and are an error on all ranks
or are dropped, as ``dispatch.capacity`` says.

Which routes are dropped: of the routes of a rank's tokens to a slot, those after the first C in the
order (token, k). That is DeepSpeed's ``drop_policy="position"``, once per source rank: the choice
depends on nothing that other ranks do, so it is the same in every run.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_locality.config import CapacityConfig
from moe_locality.dispatch.exchange import Arriving, Counts, Link
from moe_locality.dispatch.flat import FlatTransport
from moe_locality.dispatch.permute import StepPlan, expert_major_order, inverse
from moe_locality.errors import ConfigError
from moe_locality.kernels import ops
from moe_locality.kernels.ops import RowMap

_MAX_ROWS = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedPlan(StepPlan):
    """A :class:`StepPlan` whose splits are constants.

    ``lost``: routes without a row, of every rank, on their way to the host; None where nobody asks
    (``on_overflow="drop"``, or while a CUDA graph is captured).
    """

    lost: Counts | None


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
    return RowMap(
        row_route=made.row_route.index_select(0, source).masked_fill(empty, -1),
        row_token=made.row_token.index_select(0, source).masked_fill(empty, -1),
        positions=positions.masked_fill(made.positions < 0, -1),
        tokens_per_slot=made.tokens_per_slot,
        slot_offsets=starts,
        routed_per_slot=made.routed_per_slot,
        overflow=(made.routed_per_slot.sum() - made.tokens_per_slot.sum()).to(torch.int32).view(1),
        padded=True,
    )


class FixedTransport(FlatTransport):
    """:class:`FlatTransport` with C rows per source rank and slot, whatever is routed.

    ``tokens_per_local_expert`` is then ``G * C`` for every expert: an expert works on its padding
    too, as in DeepSpeed's padded dispatch, and its results for padding are never read.
    """

    def __init__(self, link: Link, *, capacity: CapacityConfig, **common: Any) -> None:
        super().__init__(link, **common)
        self.capacity = capacity
        self.lost: Tensor | None = None
        """int64 [1], on the device: routes of this rank that found no row, since the start"""
        self._agreed: int | None = None
        self._orders: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def start_dispatch(
        self, x: Tensor, slot_ids: Tensor, weights: Tensor | None, plan: StepPlan | None
    ) -> tuple[StepPlan, Arriving]:
        """As that of the flat transport; no counts travel. Collective."""
        if plan is None:
            with self.clock("plan"):
                plan = self._plan(slot_ids)
        return super().start_dispatch(x, slot_ids, weights, plan)

    def start_combine(self, expert_out: Tensor, weights: Tensor, plan: StepPlan) -> Arriving:
        """As that of the flat transport.

        Raises:
            ConfigError: on all ranks, where a rank had more routes for a slot than it has rows.
        """
        if isinstance(plan, FixedPlan) and plan.lost is not None:
            # here, and not before the experts: their work is launched while the counts travel
            self._refuse(sum(plan.lost.read()[2]))
        return super().start_combine(expert_out, weights, plan)

    def check_overflow(self) -> None:
        """Raise ConfigError on all ranks if routes found no row since the last check. Collective.

        Waits for the device: call it between the replays of a CUDA graph, which nothing else
        checks. With ``on_overflow="drop"`` it raises all the same: who calls it wants to know.
        """
        lost = self.lost
        if lost is None:
            lost = torch.zeros(1, dtype=torch.int64)
            lost = lost.to("cuda") if self._on_cuda() else lost
        everyone = self.link.start_counts(lost.repeat(self.link.size)).read()[2]
        lost.zero_()
        self._refuse(sum(everyone))

    def _on_cuda(self) -> bool:
        running = torch.distributed.is_available() and torch.distributed.is_initialized()
        return running and "nccl" in torch.distributed.get_backend(self.link.group)

    def _refuse(self, lost: int) -> None:
        if lost:
            raise ConfigError(
                f"found {lost} routes beyond the rows of the fixed capacity "
                f"({self.capacity.text()}), expected none: raise dispatch.capacity, or choose "
                "dispatch.capacity.on_overflow 'drop'"
            )

    def _plan(self, slot_ids: Tensor) -> FixedPlan:
        capturing = is_capturing(slot_ids)
        rows = self._rows_per_slot(slot_ids, capturing)
        row_map = fixed_rows(slot_ids, self.num_slots, rows, self.kernels)
        self._count(row_map.overflow, capturing)
        asked = self.capacity.on_overflow == "error" and not capturing
        lost = row_map.overflow.long().repeat(self.link.size) if asked else None
        size = self.num_slots // self.link.size
        splits = (size * rows,) * self.link.size
        by_expert, by_source = self._order(rows, size, slot_ids.device)
        return FixedPlan(
            row_map=row_map,
            input_splits=splits,
            output_splits=splits,
            tokens_per_local_expert=(self.link.size * rows,) * size,
            by_expert=by_expert,
            by_source=by_source,
            lost=None if lost is None else self.link.start_counts(lost),
        )

    def _rows_per_slot(self, slot_ids: Tensor, capturing: bool) -> int:
        """C: what the user says, or a factor of the rows that a slot gets where routes are even.

        All ranks need the same number: with a factor they agree on it, once, in the first step.
        """
        if self.capacity.rows is not None:
            rows = self.capacity.rows
        elif self.link.size == 1:
            rows = self._share(slot_ids.numel())
        else:
            if self._agreed is None:
                _check_warm(capturing)
                mine = torch.full((self.link.size,), slot_ids.numel(), device=slot_ids.device)
                self._agreed = self._share(max(self.link.start_counts(mine).read()[2]))
            rows = self._agreed
        if rows * self.num_slots > _MAX_ROWS:
            raise ConfigError(
                f"found {rows} rows for each of {self.num_slots} slots, expected at most "
                f"{_MAX_ROWS} rows in all: lower dispatch.capacity"
            )
        return rows

    def _share(self, routes: int) -> int:
        assert self.capacity.factor is not None
        return max(1, math.ceil(self.capacity.factor * routes / self.num_slots))

    def _count(self, overflow: Tensor, capturing: bool) -> None:
        lost = self.lost
        if lost is None or lost.device != overflow.device:
            _check_warm(capturing)  # what a graph allocates, its replays would begin anew
            self.lost = lost = torch.zeros(1, dtype=torch.int64, device=overflow.device)
        lost.add_(overflow)

    def _order(self, rows: int, size: int, device: torch.device) -> tuple[Any, Any]:
        ranks = self.link.size
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


def fixed_transports(model: nn.Module) -> Iterator[FixedTransport]:
    """Yield the transport of every layer of a model that has dispatched with a fixed capacity."""
    for module in model.modules():
        transport = getattr(getattr(module, "dispatcher", None), "transport", None)
        if isinstance(transport, FixedTransport):
            yield transport


def check_overflow(model: nn.Module) -> None:
    """:meth:`FixedTransport.check_overflow` of every layer of a model. Collective.

    For what no step checks: the replays of a CUDA graph.
    """
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
