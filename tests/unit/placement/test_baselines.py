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
    held = baselines.pack_replicas(np.array([5, 9, 1, 3]), 2, 4)
    assert list(map(sorted, held)) == [[1, 2], [0, 3]]


def test_pack_replicas_gives_them_to_the_largest_load_per_replica():
    held = baselines.pack_replicas(np.array([90, 20, 40]), 6, 6)
    assert np.bincount(np.ravel(held)).tolist() == [3, 1, 2]
    held = baselines.pack_replicas(np.array([90, 20, 40]), 2, 6)
    assert np.bincount(np.ravel(held)).tolist() == [2, 2, 2]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pack_replicas_is_the_published_rule(data):
    """Written again from the description, in plain Python."""
    ranks, experts = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 24))
    size = data.draw(st.integers(-(-experts // ranks), experts))
    counts = st.lists(st.integers(0, data.draw(st.sampled_from([1, 3, 1000]))))
    load = np.array(data.draw(counts.filter(bool).map(lambda some: (some * experts)[:experts])))
    held = baselines.pack_replicas(load, ranks, ranks * size)
    expected = pack_in_python(load, ranks * size, ranks)
    assert list(map(sorted, held)) == list(map(sorted, expected))


def pack_in_python(load, num_slots, num_ranks):
    """Replicas one by one for the largest load per replica; then heaviest first onto the lightest
    rank that has room and lacks the expert, which a full rank makes where there is none.
    """
    counts = np.ones(len(load), dtype=np.int64)
    for _ in range(num_slots - len(load)):
        counts[int(np.argmax(np.where(counts < num_ranks, load / counts, -1.0)))] += 1
    size, share = num_slots // num_ranks, load / counts
    held, sums = [[] for _ in range(num_ranks)], np.zeros(num_ranks)
    order = sorted(range(len(load)), key=lambda e: (-share[e], e))
    for expert in (e for e in order for _ in range(int(counts[e]))):
        room = [r for r in range(num_ranks) if len(held[r]) < size]
        fine = [r for r in room if expert not in held[r]]
        if not fine:
            fine = [r for r in range(num_ranks) if expert not in held[r]]
        rank = min(fine, key=lambda r: sums[r])
        if rank not in room:
            lacking = [e for e in held[rank] if e not in held[room[0]]]
            moved = min(lacking, key=lambda e: (share[e], e))
            held[rank].remove(moved)
            held[room[0]].append(moved)
            sums[rank] -= share[moved]
            sums[room[0]] += share[moved]
        held[rank].append(expert)
        sums[rank] += share[expert]
    return held
