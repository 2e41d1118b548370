import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.placement.search import cap
from moe_locality.placement.search.nodes import lightest_first


def drawn(rng, *, requests, experts=48, tokens=100, spread=2.0):
    """[R, E] picks of requests that each have their own favorites, around common ones."""
    taste = rng.dirichlet(spread * rng.gamma(2.0, 0.5, experts), size=requests)
    length = rng.geometric(1 / tokens, requests)
    return np.stack([rng.multinomial(4 * n, p) for n, p in zip(length, taste, strict=True)])


def test_units_are_requests_bundled_beyond_a_number_and_stretches_of_tokens_below_another():
    assert (
        cap.units_of(np.repeat(np.arange(10), 3) * 7).tolist() == np.repeat(range(10), 3).tolist()
    )
    many = cap.units_of(np.arange(3000))
    assert many.max() == cap.MAX_UNITS - 1
    assert np.bincount(many).max() <= -(-3000 // cap.MAX_UNITS)
    one = cap.units_of(np.zeros(1000, dtype=np.int64))
    assert len(np.unique(one)) == 64
    assert (np.diff(one) >= 0).all()
    assert cap.units_of(np.zeros(2, dtype=np.int64)).max() <= 1


@pytest.mark.parametrize("blocks", [2, 4])
def test_the_expected_imbalance_is_what_unseen_requests_show(blocks):
    """Mean over many splits of one population, nodes leveled on the seen part; the loads of the
    seen part alone would be off by far more than the tolerance."""
    rng = np.random.default_rng(1)
    everything = drawn(rng, requests=4000)
    shown, expected, naive = [], [], []
    for _ in range(150):
        chosen = rng.permutation(4000)[:200]
        seen, unseen = everything[chosen[:140]], everything[chosen[140:]]
        total = seen.sum(axis=0).astype(float)
        block_of = lightest_first(total, [48 // blocks] * blocks)
        load = np.bincount(block_of, weights=unseen.sum(axis=0))
        shown.append(load.max() / load.mean())
        expected.append(cap.expected_imbalance(block_of, total, cap.noise_of(seen), blocks))
        naive.append(np.bincount(block_of, weights=total).max() * blocks / total.sum())
    assert np.mean(expected) == pytest.approx(np.mean(shown), abs=0.006)
    assert np.mean(naive) < np.mean(shown) - 0.01


def test_no_noise_is_claimed_where_nothing_differs_or_nothing_can_be_known():
    load = np.array([3.0, 1.0, 1.0, 1.0])
    same = cap.noise_of(np.tile([6, 2, 2, 2], (10, 1)))
    alone = cap.noise_of(np.array([[6, 2, 2, 2], [0, 0, 0, 0]]))
    for noise in (same, alone):
        found = cap.expected_imbalance(np.array([0, 0, 1, 1]), load, noise, 2)
        assert found == pytest.approx(4 / 3)
    nothing = cap.noise_of(np.zeros((3, 2)))
    assert cap.expected_imbalance(np.array([0, 1]), np.zeros(2), nothing, 2) == 1


def test_the_margin_is_the_mean_of_the_largest_normal_draw():
    assert cap.margin(1) == 0
    assert cap.margin(2) == pytest.approx(1 / np.sqrt(np.pi), abs=0.05)
    assert cap.margin(8) == pytest.approx(1.424, abs=0.05)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_allocate_keeps_the_budget_and_is_near_the_best(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    layers = data.draw(st.integers(1, 4))
    copies = [rng.uniform(1, 2, 4).tolist() for _ in range(layers)]
    level = [rng.uniform(1, 1.2, 4).tolist() for _ in range(layers)]
    least = sum(min(some) for some in level)
    budget = least + data.draw(st.floats(0, 0.5))
    chosen = cap.allocate(copies, level, budget, [1.15] * layers)
    used = sum(some[i] for some, i in zip(level, chosen, strict=True))
    assert used <= budget + 1e-9
    for some, i in zip(level, chosen, strict=True):
        assert some[i] <= 1.15 or some[i] == min(some)
    best = min(
        sum(c[i] for c, i in zip(copies, picks, strict=True))
        for picks in np.ndindex(*[4] * layers)
        if sum(some[i] for some, i in zip(level, picks, strict=True)) <= budget
        and all(
            some[i] <= 1.15 or some[i] == min(some) for some, i in zip(level, picks, strict=True)
        )
    )
    got = sum(c[i] for c, i in zip(copies, chosen, strict=True))
    widest = max(max(c) - min(c) for c in copies)
    assert best - 1e-9 <= got <= best + widest  # one layer's step at most is lost to rounding
