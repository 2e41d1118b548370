import json
import re
from pathlib import Path

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


@pytest.mark.parametrize("workers", [0, 2])
def test_sampler_resumes_in_the_middle_of_an_epoch(workers):
    """A training on homes could not go on where it stopped; every rank's sampler can now [F5]."""
    data = pytest.importorskip("torch.utils.data")
    homes = np.random.default_rng(1).integers(0, 4, 48)

    def train(sampler, until=None, done=0, first_epoch=0):
        """Train as the README says; return the batches and what the checkpoint holds."""
        loader = data.DataLoader(
            list(range(48)),
            batch_sampler=sampler,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )
        seen = []
        for epoch in range(first_epoch, 2):
            sampler.set_epoch(epoch)
            for batch in loader:
                seen.append(batch.tolist())
                done += 1
                if (epoch, done) == until:
                    return seen, sampler.state_dict(done)
            done = 0
        return seen, None

    states = []
    for stop in (1, 6):  # in the middle, and when an epoch is through
        for rank in range(4) if not workers else [1]:
            options = {"batch_size": 2, "rank": rank, "num_ranks": 4, "seed": 5}
            whole, _ = train(LocalityBatchSampler(homes, **options))
            before, state = train(LocalityBatchSampler(homes, **options), (0, stop))
            again = LocalityBatchSampler(homes, **options)
            again.load_state_dict(state)
            after, _ = train(again, done=state["batches"], first_epoch=state["epoch"])
            assert before + after == whole
            assert len(whole) == 12
            states.append(state)
    assert workers or states[:4] == [states[0]] * 4  # rank 0's serves all ranks


def test_the_readme_deals_out_requests_with_these_lines(tmp_path, monkeypatch):
    """The steps ended before the DataLoader, where homes pay; its lines are there, and run [F5]."""
    data = pytest.importorskip("torch.utils.data")
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "--homes" not in readme[readme.index("| step |") : readme.index("In code,")]
    (block,) = re.findall(r"```python\n([^`]*homes = .*?)```", readme, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "homes.json").write_text(json.dumps({str(q): q % 2 for q in range(48)}))
    names = {"json": json, "LocalityBatchSampler": LocalityBatchSampler, "rank": 1, "num_ranks": 2}
    sampler = LocalityBatchSampler([q % 2 for q in range(48)], batch_size=8, rank=1, num_ranks=2)
    names |= {"DataLoader": data.DataLoader, "dataset": range(48), "state": sampler.state_dict(2)}
    exec(block, names)
    (batch,) = names["loader"]
    assert batch.tolist() == list(sampler)[2]


def test_sampler_refuses_the_state_of_another():
    """A state is good for the same bundles and batches only [F5]."""
    homes = [q % 4 for q in range(48)]
    options = {"batch_size": 2, "rank": 1, "num_ranks": 4, "seed": 5}
    state = LocalityBatchSampler(homes, **options).state_dict(3)
    for change in ({"batch_size": 3}, {"seed": 6}, {"num_ranks": 5}, {"shuffle": False}):
        with pytest.raises(ConfigError, match=r"set_epoch\(1\)"):
            LocalityBatchSampler(homes, **{**options, **change}).load_state_dict(state)
    with pytest.raises(ConfigError):
        LocalityBatchSampler(homes[::-1], **options).load_state_dict(state)
    sampler = LocalityBatchSampler(homes, **options)
    with pytest.raises(ConfigError):
        sampler.load_state_dict({**state, "batches": 7})
    sampler.load_state_dict(state)
    sampler.set_epoch(1)  # another epoch starts at its top
    assert len(list(sampler)) == len(sampler) == 6


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
