"""Buffers of a fixed size between ranks: the ragged exchange's results while nothing overflows, one
error on all ranks or a stated drop where something does.
"""

import pytest
import torch
from torch import nn

from moe_locality.config import DispatchConfig
from moe_locality.dispatch import TokenDispatcher
from moe_locality.dispatch.flat import check_overflow, lost_routes
from moe_locality.errors import ConfigError
from tests.distributed.exchange_cases import (
    SLOTS_PER_RANK,
    TOP_K,
    CountingComm,
    Experts,
    data_of,
    step,
)
from tests.launch import run_ranks
from tests.tolerances import LAYER

WORLD = 4
SLOTS = WORLD * SLOTS_PER_RANK


def make(comm=None, payload="none", **capacity) -> TokenDispatcher:
    config = DispatchConfig.model_validate({"capacity": capacity or None, "payload": payload})
    return TokenDispatcher(num_slots=SLOTS, config=config, comm=comm)


def run(rank, dispatcher, data):
    mine = range(rank * SLOTS_PER_RANK, (rank + 1) * SLOTS_PER_RANK)
    return step(dispatcher, Experts(mine, data[0].dtype), data)


def compare(found, wanted, where):
    rtol, atol = LAYER[str(wanted[0].dtype).removeprefix("torch.")]
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        scale = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
        torch.testing.assert_close(
            ours,
            theirs,
            rtol=rtol,
            atol=atol * scale,
            msg=lambda text, number=number: f"{where}, value {number}: {text}",
        )


def first_of_each_slot(slots, count):
    """The rule of dropping, in plain Python."""
    seen, kept = [0] * SLOTS, slots.clone()
    for t in range(slots.shape[0]):
        for k in range(slots.shape[1]):
            slot = int(slots[t, k])
            if slot >= 0:
                seen[slot] += 1
                if seen[slot] > count:
                    kept[t, k] = -1
    return kept


def equals_ragged_with_room(rank):
    for dtype, payload in (
        (torch.float32, "none"),
        (torch.bfloat16, "none"),
        (torch.float32, "mxfp8"),
    ):
        for pattern in ("uneven", "one slot", "none kept"):
            data = data_of(rank, SLOTS, dtype, pattern)
            wanted = run(rank, make(payload=payload), data)
            comm = CountingComm()
            found = run(rank, make(comm, payload, rows=9, on_overflow="drop"), data)
            assert comm.calls == 4, "rows there and back, twice: no counts"
            compare(found, wanted, f"{dtype} {payload} {pattern}")
            assert found[0].isfinite().all()


def drops_by_its_rule(rank):
    x, weights, slots = data_of(rank, SLOTS, torch.float32, "many")
    kept = first_of_each_slot(slots, 11)
    dispatcher = make(rows=11, on_overflow="drop")
    found = run(rank, dispatcher, (x, weights, slots))
    compare(found, run(rank, make(), (x, weights, kept)), "dropped")
    again = run(rank, make(rows=11, on_overflow="drop"), (x, weights, slots))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    lost = int((slots >= 0).sum() - (kept >= 0).sum())
    model = nn.Module()
    model.dispatcher = dispatcher  # pyright: ignore[reportAttributeAccessIssue]
    assert lost_routes(model) == lost > 0
    with pytest.raises(ConfigError, match="routes beyond the rows"):
        check_overflow(model)
    check_overflow(model)  # nothing since then
    assert lost_routes(model) == 0


def one_full_rank_is_an_error_on_all(rank):
    dispatcher = make(rows=4)
    data = data_of(rank, SLOTS, torch.float32, "none kept")
    if rank == 2:
        data[2][:, 0] = 5
        data = tuple(torch.cat([part, part]) for part in data)
    with pytest.raises(ConfigError, match=r"found 4 routes .*rows=4.*expected none") as caught:
        run(rank, dispatcher, data)
    assert "'drop'" in str(caught.value)
    fits = data_of(rank, SLOTS, torch.float32, "uneven")
    fits[2][3:] = -1
    compare(run(rank, dispatcher, fits), run(rank, make(), fits), "after the error")


def a_factor_is_agreed_on(rank):
    dispatcher = make(factor=2.0)
    data = data_of(rank, SLOTS, torch.float32, "uneven")  # 5, 0, 9 and 2 tokens
    x, weights, slots = data
    routed = dispatcher.dispatch(x, slots, weights)
    rows = -(-2 * 9 * TOP_K // SLOTS)
    assert routed.tokens_per_local_expert == (WORLD * rows,) * SLOTS_PER_RANK
    dispatcher.combine(routed.rows, routed.handle)


def all_cases(rank, world):
    torch.manual_seed(0)
    equals_ragged_with_room(rank)
    drops_by_its_rule(rank)
    one_full_rank_is_an_error_on_all(rank)
    a_factor_is_agreed_on(rank)


def test_fixed_buffers_between_four_ranks():
    run_ranks(all_cases, WORLD)
