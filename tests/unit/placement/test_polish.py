import numpy as np
import pytest

from moe_locality.placement.search import swaps as search
from moe_locality.placement.search.nodes import pairs_of_layer
from moe_locality.placement.search.polish import patterns, polish


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
    rows, row_home, count = patterns(ids, 12, home, 3)
    assert count.sum() == 300
    assert len(rows) < 300 or picks > 1
    block_of = np.arange(12) % 3
    total = sum(
        n * search.count_visits(row[None], block_of, row_home[i : i + 1])
        for i, (row, n) in enumerate(zip(rows, count, strict=True))
    )
    assert total == search.count_visits(ids, block_of, home)


def test_patterns_of_many_experts_are_the_tokens_themselves():
    ids = np.array([[300, 5, 7, 1, 2, 3, 4, 0]], dtype=np.int16)
    rows, _, count = patterns(ids, 512, np.zeros(0, np.int64), 8)
    assert sorted(rows[0].tolist()) == sorted(ids[0].tolist())
    assert count.tolist() == [1]


@pytest.mark.parametrize("homes", [False, True])
@pytest.mark.parametrize("deviations", [0.0, 0.5])
def test_the_visits_kept_up_to_date_are_the_visits_counted(homes, deviations):
    rng = np.random.default_rng(1)
    for trial in range(10):
        ids, home, load = made(rng, homes=homes)
        start = rng.permutation(np.repeat(np.arange(3), 4))
        most, cov = load.sum() / 3 * 1.03, np.diag(np.arange(12.0))
        found, excess, visits = polish(
            patterns(ids, 12, home, 3), load, most, start, 3, 5, trial, cov, deviations
        )
        assert visits == search.count_visits(ids, found, home)
        assert np.bincount(found).tolist() == [4, 4, 4]
        loads = np.bincount(found, weights=load)
        spread = deviations * np.sqrt(np.bincount(found, weights=np.diag(cov)))
        assert excess == pytest.approx(np.maximum(loads + spread - most, 0).sum())
        if excess == 0 and np.bincount(start, weights=load).max() <= most and not deviations:
            assert visits <= search.count_visits(ids, start, home)


def test_exact_swaps_find_what_pairs_do_not_see():
    # pairs reward 3 picks of 4 in one block more than 2; the number of blocks visited does not
    rng = np.random.default_rng(2)
    better = 0
    for seed in range(8):
        ids, home, load = made(rng, experts=10, nodes=2, picks=4, tokens=60)
        pairs = pairs_of_layer(ids, 10)
        start = np.repeat([0, 1], 5)
        args = (load, np.inf)
        by_pairs = search.search(pairs, np.zeros((10, 2)), *args, start[None], 200, seed)[0][0]
        exact = polish(
            patterns(ids, 10, home, 2), *args, by_pairs, 2, 20, seed, np.zeros((10, 10)), 0.0
        )
        before = search.count_visits(ids, by_pairs, home)
        assert exact[2] <= before
        better += exact[2] < before
    assert better >= 1


def test_the_search_keeps_loads_with_their_noise_below_the_cap():
    rng = np.random.default_rng(3)
    ids, _, load = made(rng, experts=24, nodes=4, tokens=2000)
    pairs = pairs_of_layer(ids, 24)
    root = rng.normal(size=(6, 24)) * load.mean() * 0.05
    cov = np.rint(root.T @ root)
    most = load.sum() / 4 * 1.1
    starts = rng.permutation(np.repeat(np.arange(4), 6))[None]
    found, excess, inside = search.search(
        pairs, np.zeros((24, 4)), load, most, starts, 30, 0, cov, 1.0
    )
    for block in range(4):
        own = np.flatnonzero(found[0] == block)
        spread = np.sqrt(cov[np.ix_(own, own)].sum())
        assert load[own].sum() + spread <= most + 1e-3
    assert excess[0] == 0
    same = found[0][:, None] == found[0]
    assert inside[0] == (pairs * same).sum() / 2
