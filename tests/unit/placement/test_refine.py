import numpy as np
import pytest

from moe_locality.placement.counting import pairs_of_layer
from moe_locality.placement.search import load_noise, swaps
from moe_locality.placement.search.swaps import anneal, patterns, refine_exact


def visits_of(ids, block_of, home):
    """Blocks that each token visits besides its home, summed."""
    ones = np.ones(len(ids))
    blocks = 1 + max(block_of.max(), home.max(initial=0))
    return swaps.count_pattern_visits(ids, home, ones, block_of, blocks)


def made(rng, *, experts=12, nodes=3, tokens=300, picks=4, homes=False):
    weight = np.linspace(1, 2, experts)
    ids = np.argsort(rng.random((tokens, experts)) * weight, axis=1)[:, :picks].astype(np.int16)
    ids[rng.random(ids.shape) < 0.1] = -1
    home = rng.integers(0, nodes, tokens) if homes else np.zeros(0, np.int64)
    load = np.bincount(ids[ids >= 0], minlength=experts).astype(float)
    return ids, home, load


@pytest.mark.parametrize("homes", [False, True])
@pytest.mark.parametrize("picks", [1, 4])
def test_patterns_keep_every_token(homes, picks):
    ids, home, _ = made(np.random.default_rng(0), picks=picks, homes=homes)
    rows, row_home, count = patterns(ids, 12, home)
    assert count.sum() == 300
    assert len(rows) < 300 or picks > 1
    block_of = np.arange(12) % 3
    total = sum(
        n * visits_of(row[None], block_of, row_home[i : i + 1])
        for i, (row, n) in enumerate(zip(rows, count, strict=True))
    )
    assert total == visits_of(ids, block_of, home)


def test_patterns_of_many_experts_are_the_tokens_themselves():
    ids = np.array([[300, 5, 7, 1, 2, 3, 4, 0]], dtype=np.int16)
    rows, _, count = patterns(ids, 512, np.zeros(0, np.int64))
    assert sorted(rows[0].tolist()) == sorted(ids[0].tolist())
    assert count.tolist() == [1]


@pytest.mark.parametrize("homes", [False, True])
def test_patterns_are_told_apart_by_picks_and_home_alone(homes):
    rng = np.random.default_rng(4)
    ids = np.argsort(rng.random((9000, 64)), axis=1)[:, :3].astype(np.int16)
    ids[5000:] = ids[:4000, ::-1]  # the same picks in another order
    home = rng.integers(0, 8, 9000) if homes else np.zeros(0, np.int64)
    if homes:
        home[5000:] = home[:4000]
    rows, row_home, count = patterns(ids, 64, home)
    counted = {}
    for token, picks in enumerate(ids):
        key = (frozenset(picks.tolist()), int(home[token]) if homes else 0)
        counted[key] = counted.get(key, 0) + 1
    found = {
        (frozenset(row.tolist()), int(row_home[i]) if homes else 0): count[i]
        for i, row in enumerate(rows)
    }
    assert found == counted


@pytest.mark.parametrize("homes", [False, True])
@pytest.mark.parametrize("price", [0.0, 0.5])
def test_the_visits_kept_up_to_date_are_the_visits_counted(homes, price):
    rng = np.random.default_rng(1)
    for trial in range(10):
        ids, home, load = made(rng, homes=homes)
        start = rng.permutation(np.repeat(np.arange(3), 4))
        noise = load_noise.noise_of(rng.poisson(load, (20, 12)))
        rows = patterns(ids, 12, home)
        most = load.sum() / 3 * 1.05
        found, visits = refine_exact(rows, load, noise, price, most, start, 3, 2000, trial)
        assert visits == visits_of(ids, found, home)
        assert np.bincount(found).tolist() == [4, 4, 4]
        assert (
            found == refine_exact(rows, load, noise, price, most, start, 3, 2000, trial)[0]
        ).all()
        if not price:
            assert visits <= visits_of(ids, start, home)


def test_exact_swaps_find_what_pairs_do_not_see():
    # pairs reward 3 picks of 4 in one block more than 2; the number of blocks visited does not
    rng = np.random.default_rng(2)
    better = 0
    for seed in range(8):
        ids, home, load = made(rng, experts=10, nodes=2, picks=4, tokens=60)
        pairs, start = pairs_of_layer(ids, 10), np.repeat([0, 1], 5)
        by_pairs = anneal(pairs, np.zeros((10, 2)), load, None, 0.0, np.inf, start, 20_000, seed)
        rows = patterns(ids, 10, home)
        _, visits = refine_exact(rows, load, None, 0.0, np.inf, by_pairs, 2, 20_000, seed)
        before = visits_of(ids, by_pairs, home)
        assert visits <= before
        better += visits < before
    assert better >= 1


def test_a_price_on_imbalance_makes_blocks_more_level():
    rng = np.random.default_rng(3)
    ids, home, load = made(rng, experts=24, nodes=4, tokens=2000)
    noise = load_noise.noise_of(rng.poisson(load / 20, (40, 24)))
    start, rows = np.repeat(np.arange(4), 6), patterns(ids, 24, home)
    levels, visits = [], []
    for price in (0.0, 1.0, 30.0):
        found, cost = refine_exact(rows, load, noise, price, np.inf, start, 4, 20_000, 0)
        levels.append(load_noise.expected_imbalance(found, load, noise, 4))
        visits.append(cost)
    assert levels == sorted(levels, reverse=True)
    assert visits == sorted(visits)
    assert levels[-1] < levels[0] - 0.02
