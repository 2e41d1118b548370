"""Which slots share an expert, and where new slots are copied from."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.layer.replica_map import LayerReplicas, first_slots, source_slots
from tests.unit.placement.cases import plans


def seen_from(plan, row):
    return [
        LayerReplicas(
            slot_to_logical=plan.physical_to_logical_map[row].astype(np.int64),
            ep_rank=rank,
            num_ranks=plan.num_ranks,
        )
        for rank in range(plan.num_ranks)
    ]


def test_by_hand():
    slots = np.array([2, 0, 1, 2, 0, 2])
    assert first_slots(slots).tolist() == [1, 2, 0]
    views = [LayerReplicas(slot_to_logical=slots, ep_rank=r, num_ranks=3) for r in range(3)]
    assert [view.extra_local_slots for view in views] == [[], [1], [0, 1]]
    assert views[0].shared == [(1, [0, 2]), (0, [0, 1, 2])]  # experts 0, then 2
    assert views[1].shared == [(1, [0, 1, 2])]
    assert views[2].shared == [(0, [0, 2]), (1, [0, 1, 2])]


@given(plans())
@settings(max_examples=40, deadline=None)
def test_holders_agree_and_every_expert_has_one_primary_slot(plan):
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
def test_sources_hold_the_expert_and_are_near(plan, seed):
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
