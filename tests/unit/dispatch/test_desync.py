"""Places of ranks, as headers: who stands elsewhere is found by all, in one stage and in two."""

import gc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.dispatch.desync import (
    NO_REPORT,
    CallPosition,
    DesyncError,
    calls_so_far,
    check_headers,
)


def place_at(number, calls, name=""):
    place = CallPosition(number, name)
    place.calls = calls
    return place


def exchange(ranks, places, known):
    """What each rank of an exchange raises, or None."""
    headers = [
        (places[rank].code(), *(known[rank].report if known[rank] else NO_REPORT)) for rank in ranks
    ]
    return {me: raised(headers, ranks, places[me], me, known[me]) for me in ranks}


def raised(*arguments):
    try:
        check_headers(*arguments)
    except DesyncError as apart:
        return apart


@settings(max_examples=60)
@given(
    nodes=st.integers(2, 4),
    per_node=st.integers(1, 3),
    victim=st.integers(0, 11),
    number=st.integers(0, 70),
    calls=st.integers(0, 2**33),
)
def test_in_two_stages_every_rank_learns_who_stands_elsewhere(
    nodes, per_node, victim, number, calls
):
    world = nodes * per_node
    victim %= world
    places = {rank: place_at(3, 5) for rank in range(world)}
    places[victim] = place_at(number, calls)
    apart = (number, calls & 0xFFFFFFFF) != (3, 5)
    known = dict.fromkeys(range(world))
    for local in range(per_node):
        known |= exchange(range(local, world, per_node), places, known)
    for node in range(nodes):
        inside = range(node * per_node, (node + 1) * per_node)
        if per_node > 1:
            known |= exchange(inside, places, known)
    if not apart:
        assert not any(known.values())
        return
    assert all(known.values())
    for rank, found in known.items():
        assert found.codes[victim] == places[victim].code()
        assert f"ranks [{victim}] at layer {number}, call {calls & 0xFFFFFFFF}" in str(found)
        assert "at layer 3, call 5" in str(found)
        if len(found.codes) > 2:
            assert f"what ranks [{victim}] did differently" in str(found), (rank, str(found))


def test_what_is_no_header_is_seen():
    ours = place_at(1, 2, "model.moe")
    good = (ours.code(), *NO_REPORT)
    check_headers([good, good], (4, 9), ours, 4)
    for rubbish in (0, -7, 4607182418800017408, 2**62 - 1):
        with pytest.raises(DesyncError, match=r"ranks \[9\] at another exchange than that of"):
            check_headers([good, (rubbish, rubbish, rubbish)], (4, 9), ours, 4)
    with pytest.raises(DesyncError, match=r"ranks \[4\] at layer 1 \(model\.moe\), call 2"):
        check_headers([good, (1, 0, 0)], (4, 9), ours, 4)


def test_layers_are_numbered_in_the_order_of_their_first_call_or_as_they_were_told():
    ranks = (100, 101)
    first, second, told = CallPosition(), CallPosition(), CallPosition(7, "last")
    for place in (first, second, first, told):
        place.enter(ranks)
    assert (first.number, second.number, told.number) == (0, 1, 7)
    assert (first.calls, second.calls) == (2, 1)
    assert str(told) == "layer 7 (last), call 1"


def test_calls_so_far_are_told_where_they_differ():
    ranks = (200, 201)
    places = [CallPosition(number) for number in range(4)]
    for place in places:
        place.enter(ranks)
    assert calls_so_far(ranks) == ""
    for place in places[:3]:
        place.enter(ranks)
    assert calls_so_far(ranks) == "calls so far by layer: 0-2: 2, 3: 1"
    del place, places[2:]
    gc.collect()
    assert calls_so_far(ranks) == ""  # a layer that is gone says nothing
