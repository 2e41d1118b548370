"""Slots on arrays: schedules of moves, which slots share an expert, where slots are copied from."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.layer.relocate import plan_steps, reverse_step
from moe_locality.layer.state import LayerReplicas
from moe_locality.placement.plan import count_moved, first_slots, source_slots
from tests.unit.placement.cases import plans


@st.composite
def layers(draw):
    ranks = draw(st.integers(1, 6))
    slots = ranks * draw(st.integers(1, 5))
    order = st.permutations(range(slots))
    return ranks, np.array(draw(order)), np.array(draw(order))


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
def test_plan_steps_takes_the_fewest_rounds_with_room_for_one_expert(case):
    ranks, current, target = case
    per_rank = len(current) // ranks
    crosses = [
        any(a // per_rank != b // per_rank for a, b in step)
        for step in plan_steps(current, target, ranks)
    ]
    assert crosses == sorted(crosses, reverse=True)  # rounds first, then swaps inside the ranks
    sent = Counter()
    for step in plan_steps(current, target, ranks)[: sum(crosses)]:
        read, written = ([slot // per_rank for slot in slots] for slots in zip(*step, strict=True))
        assert len(set(read)) == len(read)  # at most one expert leaves a rank ...
        assert sorted(read) == sorted(written)  # ... and one comes for it ...
        assert {a for a, _ in step} == {b for _, b in step}  # ... into the slot just freed
        assert all(a // per_rank != b // per_rank for a, b in step)
        sent.update(read)
    changed = np.argsort(current) // per_rank != np.argsort(target) // per_rank
    assert (
        count_moved(source_slots(current, target), per_rank) == changed.sum() == sum(sent.values())
    )
    assert sum(crosses) == max(sent.values(), default=0)


@settings(max_examples=60, deadline=None)
@given(layers())
def test_plan_steps_lead_to_the_target_and_back_from_anywhere(case):
    ranks, current, target = case
    per_rank = len(current) // ranks
    steps = plan_steps(current, target, ranks)
    passed = [list(current)]
    for step in steps:
        passed.append(take(passed[-1], step, per_rank))
    assert passed[-1] == list(target)
    for before, step, after in zip(passed, steps, passed[1:], strict=False):
        assert take(after, reverse_step(step), per_rank) == before


@settings(max_examples=30, deadline=None)
@given(layers())
def test_plan_steps_of_the_same_order_are_none(case):
    ranks, current, _ = case
    assert plan_steps(current, current, ranks) == []


def test_source_slots_is_what_the_new_order_reads():
    current, target = np.array([2, 0, 1]), np.array([1, 2, 0])
    assert (current[source_slots(current, target)] == target).all()


@pytest.mark.parametrize(("ranks", "steps"), [(1, 4), (2, 2), (4, 1), (8, 0)])
def test_plan_steps_inside_ranks_are_swaps_of_all_ranks_at_once(ranks, steps):
    current = np.arange(8)
    target = current.reshape(ranks, -1)[:, ::-1].ravel()
    assert len(plan_steps(current, target, ranks)) == steps
    assert count_moved(source_slots(current, target), 8 // ranks) == 0


# -- replicas ------------------------------------------------------------------------------------


def seen_from(plan, row):
    return [
        LayerReplicas(
            slot_to_logical=plan.physical_to_logical_map[row].astype(np.int64),
            ep_rank=rank,
            num_ranks=plan.num_ranks,
        )
        for rank in range(plan.num_ranks)
    ]


def test_layer_replicas_by_hand():
    slots = np.array([2, 0, 1, 2, 0, 2])
    assert first_slots(slots).tolist() == [1, 2, 0]
    views = [LayerReplicas(slot_to_logical=slots, ep_rank=r, num_ranks=3) for r in range(3)]
    assert [view.extra_local_slots for view in views] == [[], [1], [0, 1]]
    assert views[0].shared == [(1, [0, 2]), (0, [0, 1, 2])]  # experts 0, then 2
    assert views[1].shared == [(1, [0, 1, 2])]
    assert views[2].shared == [(0, [0, 2]), (1, [0, 1, 2])]


@given(plans())
@settings(max_examples=40, deadline=None)
def test_layer_replicas_holders_agree_and_every_expert_has_one_primary_slot(plan):
    views = seen_from(plan, 0)
    extras = sum(len(view.extra_local_slots) for view in views)
    assert extras == plan.num_redundant_experts
    meetings = {}
    for rank, view in enumerate(views):
        order = [int(view.local_experts[local]) for local, _ in view.shared]
        assert order == sorted(order)  # all ranks meet in the same order
        for local, holders in view.shared:
            assert rank in holders
            assert holders == sorted(holders)
            meetings.setdefault(int(view.local_experts[local]), []).append(holders)
    for expert, found in meetings.items():
        assert all(holders == found[0] for holders in found)
        assert len(found) == len(found[0]) == plan.logical_replica_count[0, expert]


@given(plans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_source_slots_hold_the_expert_and_are_near(plan, seed):
    ranks, target = plan.num_ranks, plan.physical_to_logical_map[0].astype(np.int64)
    size = -(-plan.num_experts // ranks) * ranks
    current = np.random.default_rng(seed).permutation(size) % plan.num_experts
    sources = source_slots(current, target, ranks)
    assert (current[sources] == target).all()
    per_rank = size // ranks
    for slot, source in enumerate(sources):
        rank = slot // plan.slots_per_rank
        held = current[rank * per_rank : (rank + 1) * per_rank]
        assert (source // per_rank == rank) == (target[slot] in held)
