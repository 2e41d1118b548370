"""The schedule of a relabelling: every expert arrives, in the fewest rounds, with room for one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.layer.moves import plan_moves, plan_steps, source_slots, undone


@st.composite
def layers(draw):
    ranks = draw(st.integers(1, 6))
    slots = ranks * draw(st.integers(1, 5))
    order = st.permutations(range(slots))
    return ranks, np.array(draw(order)), np.array(draw(order))


def carry_out(current, moves, num_ranks):
    """Do what the schedule says with one buffer per rank, and check that no more is needed."""
    per_rank = len(current) // num_ranks
    held = list(current)
    for pairs in moves.rounds:
        read = [a // per_rank for a, _ in pairs]
        written = [b // per_rank for _, b in pairs]
        assert len(set(read)) == len(read)  # at most one expert leaves a rank ...
        assert sorted(read) == sorted(written)  # ... and one comes for it ...
        assert {a for a, _ in pairs} == {b for _, b in pairs}  # ... into the slot just freed
        assert all(a // per_rank != b // per_rank for a, b in pairs)
        sent = {b: held[a] for a, b in pairs}
        for slot, expert in sent.items():
            held[slot] = expert
    assert (moves.local // per_rank == np.arange(len(held)) // per_rank).all()
    return [held[s] for s in moves.local]


@settings(max_examples=60, deadline=None)
@given(layers())
def test_every_expert_arrives_and_only_those_that_change_rank_travel(case):
    ranks, current, target = case
    moves = plan_moves(current, target, ranks)
    assert carry_out(current, moves, ranks) == list(target)
    per_rank = len(current) // ranks
    changed = np.argsort(current) // per_rank != np.argsort(target) // per_rank
    assert moves.num_travellers == changed.sum()
    sent_per_rank = np.bincount(np.argsort(current)[changed] // per_rank, minlength=ranks)
    assert len(moves.rounds) == sent_per_rank.max(initial=0)


def take(held, step, per_rank):
    """Do a step; a rank reads the slots that it writes, two at the most."""
    for rank in range(len(held) // per_rank):
        read = sorted(a for a, _ in step if a // per_rank == rank)
        assert read == sorted(b for _, b in step if b // per_rank == rank)
        assert len(read) <= 2
    sent = {b: held[a] for a, b in step}
    return [sent.get(slot, value) for slot, value in enumerate(held)]


@settings(max_examples=60, deadline=None)
@given(layers())
def test_steps_lead_to_the_target_and_back_from_anywhere(case):
    ranks, current, target = case
    per_rank = len(current) // ranks
    steps = plan_steps(plan_moves(current, target, ranks), ranks)
    passed = [list(current)]
    for step in steps:
        passed.append(take(passed[-1], step, per_rank))
    assert passed[-1] == list(target)
    for before, step, after in zip(passed, steps, passed[1:], strict=False):
        assert take(after, undone(step), per_rank) == before


@settings(max_examples=30, deadline=None)
@given(layers())
def test_the_same_order_again_moves_nothing(case):
    ranks, current, _ = case
    assert plan_moves(current, current, ranks).is_empty


def test_source_slots_is_what_the_new_order_reads():
    current, target = np.array([2, 0, 1]), np.array([1, 2, 0])
    assert (current[source_slots(current, target)] == target).all()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_local_moves_need_no_round(ranks):
    current = np.arange(8)
    target = current.reshape(ranks, -1)[:, ::-1].ravel()
    moves = plan_moves(current, target, ranks)
    assert moves.rounds == ()
    assert not moves.is_empty or ranks == 8
