import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.batching import LocalityBatchSampler, domain_homes, make_bundles
from moe_locality.errors import ConfigError, PlacementError
from moe_locality.placement.plan import PlacementPlan


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(0, 5), max_size=40))
def test_bundles_are_equal_complete_and_mostly_at_home(num_ranks, homes):
    homes = [h % num_ranks for h in homes]
    bundles = make_bundles(homes, num_ranks)
    sizes = [len(b) for b in bundles]
    assert max(sizes) - min(sizes) <= 1
    assert sorted(q for b in bundles for q in b) == list(range(len(homes)))
    at_home = sum(homes[q] == rank for rank, b in enumerate(bundles) for q in b)
    # no fair split can keep more: each rank keeps its own up to its size
    wanted = np.bincount(homes, minlength=num_ranks) if homes else np.zeros(num_ranks, int)
    assert at_home == sum(min(size, int(w)) for size, w in zip(sizes, wanted, strict=True))
    size, larger = divmod(len(homes), num_ranks)
    best = sum(min(size, int(w)) for w in wanted) + min(larger, sum(int(w) > size for w in wanted))
    assert at_home == best


def test_bundles_from_a_dict_of_requests():
    assert make_bundles({30: 1, 10: 1, 20: 1, 40: 0}, 2) == [[30, 40], [10, 20]]
    with pytest.raises(PlacementError, match="found home rank 2 for sequence 5"):
        make_bundles({5: 2}, 2)


def samplers(homes, **options):
    return [LocalityBatchSampler(homes, rank=r, num_ranks=4, **options) for r in range(4)]


def test_sampler_gives_every_rank_as_many_batches_and_no_sequence_twice():
    homes = np.random.default_rng(0).integers(0, 4, 50)
    every = samplers(homes, batch_size=3, seed=1)
    batches = [list(s) for s in every]
    assert [len(b) for b in batches] == [4] * 4 == [len(s) for s in every]
    assert all(len(batch) == 3 for rank in batches for batch in rank)
    seen = [q for rank in batches for batch in rank for q in batch]
    assert len(set(seen)) == len(seen)
    assert [list(s) for s in samplers(homes, batch_size=3, seed=1)] == batches
    for sampler in every:
        sampler.set_epoch(1)
    assert [list(s) for s in every] != batches


def test_sampler_in_a_dataloader():
    data = pytest.importorskip("torch.utils.data")
    homes = [q % 4 for q in range(16)]
    sampler = LocalityBatchSampler(homes, batch_size=2, rank=1, num_ranks=4, shuffle=False)
    loader = data.DataLoader(list(range(16)), batch_sampler=sampler)
    assert [batch.tolist() for batch in loader] == [[1, 5], [9, 13]]
    assert len(loader) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "found batch_size 0"),
        ({"rank": 4}, "rank 4 of 4"),
        ({"batch_size": 5}, "found 16 sequences for 4 ranks, expected at least 5 for each"),
    ],
)
def test_sampler_refuses_what_cannot_be(change, message):
    with pytest.raises(ConfigError) as caught:
        LocalityBatchSampler([0] * 16, **{"batch_size": 2, "rank": 0, "num_ranks": 4, **change})
    assert message in str(caught.value)


def test_homes_from_domains_alone():
    profiles = {"domain_rank_share": {"code": [0.9, 0.1], "law": [0.2, 0.8]}}
    plan = PlacementPlan(
        layer_ids=(0,),
        num_experts=2,
        num_nodes=2,
        ranks_per_node=1,
        physical_to_logical_map=[[0, 1]],
        home_profiles=profiles,
    )
    assert domain_homes(["code", "law", "code", "law"], plan).tolist() == [0, 1, 0, 1]
    # equal numbers win over wishes; the unknown domain gives way
    assert domain_homes(["code", "code", "new", "code"], plan, group_tokens=[5, 5, 1, 1]).tolist()[
        :2
    ] == [0, 0]
    with pytest.raises(PlacementError, match="no domain profiles"):
        domain_homes(["code"], PlacementPlan.linear(2, [0], 2, 1))
