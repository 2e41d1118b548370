import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.placement import baselines

# The example of the README of deepseek-ai/EPLB: 12 experts, 16 slots, 4 groups, 2 nodes, 8 ranks
LOADS = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PUBLISHED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def rank_loads(load, held):
    counts = np.bincount(np.concatenate(held), minlength=len(load))
    return np.array([sum(load[e] / counts[e] for e in rank) for rank in held])


def test_eplb_is_as_level_as_the_published_example():
    for load, published in zip(np.array(LOADS), PUBLISHED, strict=True):
        held = baselines.eplb(load, 2, 4, 16, np.arange(12) // 3)
        theirs = rank_loads(load, np.array(published).reshape(8, 2).tolist())
        assert rank_loads(load, held).max() <= theirs.max()
        for group in range(4):  # a group stays on one node
            members = set(range(3 * group, 3 * group + 3))
            nodes = {n for n in range(2) for rank in held[4 * n : 4 * n + 4] if members & set(rank)}
            assert len(nodes) == 1
        # the same experts are replicated as in the example
        ours = np.bincount(np.concatenate(held), minlength=12)
        assert ours.tolist() == np.bincount(published, minlength=12).tolist()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_eplb_holds_every_expert_and_none_twice_on_a_rank(data):
    nodes, per_node = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    ranks = nodes * per_node
    experts = data.draw(st.integers(1, 24))
    fewest = -(-experts // ranks)
    per_rank = data.draw(st.integers(fewest, min(experts, fewest + 3)))
    load = np.array(data.draw(st.lists(st.integers(0, 1000), min_size=experts, max_size=experts)))
    held = baselines.eplb(load, nodes, per_node, per_rank * ranks)
    assert len(held) == ranks
    assert all(len(rank) == len(set(rank)) == per_rank for rank in held)
    assert {e for rank in held for e in rank} == set(range(experts))


def test_pack_replicas_packs_single_experts_lightest_first():
    ones = np.ones(4, dtype=np.int64)
    assert baselines.pack_replicas(np.array([5, 9, 1, 3]), ones, 2) == [[1, 2], [0, 3]]


def test_replicas_go_to_the_largest_load_per_replica():
    counts = baselines.replicate(np.array([90, 20, 40]), 6, most=4)
    assert counts.tolist() == [3, 1, 2]
    assert baselines.replicate(np.array([90, 20, 40]), 6, most=2).tolist() == [2, 2, 2]
