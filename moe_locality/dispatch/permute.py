"""The pure arithmetic of one dispatch step: splits, and the order of received rows by expert.

Shapes: G ranks of the EP group, e local experts, P = G*e slots, R rows received.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_locality.kernels import ops
from moe_locality.kernels.ops import RowMap


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What one step sends and receives, known on the host. It can be used again for the same routes
    (see :meth:`~moe_locality.dispatch.TokenDispatcher.dispatch`).

    ``row_map``: the routes of this rank's tokens sorted by slot, so by destination rank; its
    ``positions`` are -1 where a route is dropped.
    ``input_splits [G]``: rows this rank sends to each rank; ``output_splits [G]``: rows it gets.
    ``tokens_per_local_expert [e]``: rows received for each local expert.
    ``by_expert [R] int64``: row of the received buffer (ordered by source, then expert) for each
    row ordered by expert, then source; ``by_source [R]`` is its inverse. None where both orders
    agree.
    """

    row_map: RowMap
    input_splits: tuple[int, ...]
    output_splits: tuple[int, ...]
    tokens_per_local_expert: tuple[int, ...]
    by_expert: Tensor | None
    by_source: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(T, K) of the routes."""
        tokens, top_k = self.row_map.positions.shape
        return tokens, top_k


def sort_routes(slot_ids: Tensor, num_slots: int, backend: ops.Backend) -> RowMap:
    """Sort routes ``[T, K]`` (-1: dropped) by slot, without waiting for a device.

    On a GPU the map has T*K rows, whatever is dropped; those in use come first.
    """
    rows = slot_ids.numel() if _static(slot_ids) else None
    return ops.row_map(slot_ids, num_slots, num_rows=rows, backend=backend)


def _static(ids: Tensor) -> bool:
    """Whether to ask for the number of rows would make this thread wait."""
    return ids.is_cuda


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
    """Return the rows of consecutive blocks of ``lengths [B]``, the blocks taken in another
    ``order [B]``: ``[num_rows] int64``.
    """
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
    """Return, for rows that arrive as ``counts [G, e]`` (source, then expert), the expert-major
    order.

    The result ``[R] int64`` lists rows of the received buffer by expert, then source.
    """
    blocks = torch.arange(counts.numel(), device=counts.device).view_as(counts)
    return block_order(counts.reshape(-1), blocks.t().reshape(-1), num_rows)


def plan_step(
    row_map: RowMap, received: Tensor, num_ranks: int, sent: list[int], got: list[int]
) -> StepPlan:
    """Return the plan of a step from what is sent (``row_map``) and what is received.

    ``received [G * e] int64``: rows that each source rank sends to each local expert. ``sent [P]``
    and ``got [G * e]`` are the counts of both sides on the host.
    """
    size = len(sent) // num_ranks
    starts = range(0, len(sent), size)
    output_splits = tuple(sum(got[i : i + size]) for i in starts)
    per_expert = tuple(sum(got[i::size]) for i in range(size))
    by_expert = by_source = None
    if num_ranks > 1 and size > 1:
        by_expert = expert_major_order(received.view(num_ranks, size), sum(got))
        by_source = inverse(by_expert)
    return StepPlan(
        row_map=trim(row_map, sum(sent)),
        input_splits=tuple(sum(sent[i : i + size]) for i in starts),
        output_splits=output_splits,
        tokens_per_local_expert=per_expert,
        by_expert=by_expert,
        by_source=by_source,
    )
