"""The pure arithmetic of one dispatch step: splits, and the order of received rows by expert.

Shapes: G ranks of the EP group, e local experts, P = G*e slots, R rows received.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_locality.kernels.ops import RowMap


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """What one step sends and receives, known on the host.

    ``row_map``: the routes of this rank's tokens sorted by slot, so by destination rank.
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


def expert_major_order(counts: Tensor, num_rows: int) -> Tensor:
    """Return, for rows that arrive as ``counts [G, e]`` (source, then expert), the expert-major
    order.

    The result ``[R] int64`` lists rows of the received buffer by expert, then source.
    """
    flat = counts.reshape(-1)
    starts = (torch.cumsum(flat, 0) - flat).view_as(counts).t().reshape(-1)
    lengths = counts.t().reshape(-1)
    before = torch.cumsum(lengths, 0) - lengths
    shift = torch.repeat_interleave(starts - before, lengths, output_size=num_rows)
    return shift + torch.arange(num_rows, dtype=shift.dtype, device=shift.device)


def plan_step(row_map: RowMap, received: Tensor, num_ranks: int) -> StepPlan:
    """Return the plan of a step from what is sent (``row_map``) and what is received.

    ``received [G, e] int64``: rows that each source rank sends to each local expert. This is the
    one place that waits for the device: all counts cross to the host in a single copy.
    """
    sent = row_map.tokens_per_slot.view(num_ranks, -1)
    counts = torch.stack([sent, received]).tolist()
    input_splits = tuple(sum(row) for row in counts[0])
    output_splits = tuple(sum(row) for row in counts[1])
    per_expert = tuple(sum(column) for column in zip(*counts[1], strict=True))
    by_expert = by_source = None
    if num_ranks > 1 and len(per_expert) > 1:
        num_rows = sum(output_splits)
        by_expert = expert_major_order(received, num_rows)
        by_source = torch.empty_like(by_expert)
        by_source[by_expert] = torch.arange(num_rows, device=by_expert.device)
    return StepPlan(
        row_map=row_map,
        input_splits=input_splits,
        output_splits=output_splits,
        tokens_per_local_expert=per_expert,
        by_expert=by_expert,
        by_source=by_source,
    )
