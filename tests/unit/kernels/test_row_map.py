"""The row map of the reference backend against a definition in loops, with and without limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import ConfigError
from moe_locality.kernels import ops
from tests.unit.kernels import oracle


@st.composite
def requests(draw):
    """A map to make: ids ``[T, K]``, slots, and every option present or absent."""
    tokens, top_k = draw(st.integers(0, 13)), draw(st.integers(1, 5))
    slots, seed = draw(st.integers(1, 9)), draw(st.integers(0, 2**31))
    wanted = {"ids": oracle.random_ids(tokens, top_k, slots, seed), "num_slots": slots}
    wanted["capacity"] = draw(st.none() | st.integers(0, 5))
    wanted["num_rows"] = draw(st.none() | st.integers(0, 40))
    return wanted


@settings(max_examples=150, deadline=None)
@given(requests())
def test_the_map_is_its_definition(wanted):
    options = dict(wanted)
    ids, slots = options.pop("ids"), options.pop("num_slots")
    oracle.assert_map(ops.row_map(ids, slots, **options), oracle.row_map(**wanted))


def test_capacity_drops_what_deepspeed_drops():
    """``topkgating`` with ``drop_policy="position"``: the same routes in the same places."""
    sharded_moe = pytest.importorskip("deepspeed.moe.sharded_moe")
    logits = torch.randn(37, 6, generator=torch.Generator().manual_seed(0))
    _, capacity, _, indices, locations, _, counts = sharded_moe.topkgating(
        logits, 2, 0.9, 2, drop_policy="position", sparse_routes=True
    )
    ids = logits.topk(2, dim=1).indices
    found = ops.row_map(ids, 6, capacity=int(capacity))
    assert (found.positions.t() < 0).equal(indices < 0)
    assert bool((indices < 0).any()), "the case must drop something"
    assert found.routed_per_slot.tolist() == counts.tolist()
    first = found.slot_offsets[:-1][ids.long()]
    kept = found.positions >= 0
    assert torch.equal((found.positions - first)[kept], locations.t()[kept].int())


def test_a_static_map_is_the_dynamic_one_with_room_to_spare():
    ids = oracle.random_ids(11, 3, 5, 1)
    free = ops.row_map(ids, 5)
    fixed = ops.row_map(ids, 5, num_rows=40)
    used = len(free.row_route)
    assert torch.equal(fixed.row_route[:used], free.row_route)
    assert fixed.row_token[used:].eq(-1).all()
    assert torch.equal(fixed.positions, free.positions)
    assert fixed.overflow.tolist() == [0]


def test_row_map_counts_an_overflow():
    ids = torch.tensor([[0, 1], [1, 2], [2, 0]])
    found = ops.row_map(ids, 3, num_rows=4)
    assert found.overflow.tolist() == [2]
    assert found.positions.tolist() == [[0, 2], [3, -1], [-1, 1]]


def test_row_map_refuses_impossible_arguments():
    ids = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ConfigError, match="found capacity=-1, expected at least 0"):
        ops.row_map(ids, 2, capacity=-1)
    with pytest.raises(ConfigError, match="found slot 3 in the routes, expected at most 1"):
        ops.row_map(ids + 3, 2)
