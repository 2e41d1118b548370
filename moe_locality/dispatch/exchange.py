"""Collectives of the flat exchange: counts first, then one ragged all-to-all. No arithmetic.

``comm`` is the module whose ``all_to_all_single`` is called: ``torch.distributed``, or
``deepspeed.comm``, which has the same function and logs it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

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


def exchange_counts(tokens_per_slot: Tensor, num_ranks: int, *, group: Any, comm: Any) -> Tensor:
    """Tell every rank of ``group`` how many rows it will get.

    ``tokens_per_slot [P] int64`` (slots of rank 0, then of rank 1, ...) gives ``[G, e] int64``:
    rows that each source rank sends to each local expert of this rank.
    """
    received = torch.empty_like(tokens_per_slot)
    with _explained("token counts"):
        comm.all_to_all_single(received, tokens_per_slot.contiguous(), group=group)
    return received.view(num_ranks, -1)


def exchange_rows(
    rows: Tensor,
    input_splits: Sequence[int],
    output_splits: Sequence[int],
    *,
    group: Any,
    comm: Any,
) -> Tensor:
    """Send consecutive rows to the ranks of ``group`` in order, and return what they send.

    ``rows [sum(input_splits), D]`` gives ``[sum(output_splits), D]`` in the order of the sources.
    Every rank must call it, those with nothing to send or to get too.
    """
    received = rows.new_empty(sum(output_splits), *rows.shape[1:])
    with _explained("tokens"):
        comm.all_to_all_single(
            received,
            rows.contiguous(),
            output_split_sizes=list(output_splits),
            input_split_sizes=list(input_splits),
            group=group,
        )
    return received
