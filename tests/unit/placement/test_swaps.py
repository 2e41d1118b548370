"""The search of one layer: against all placements of small cases, and its sums against recounts."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.placement.search import load_noise, swaps
from moe_locality.placement.search.load_noise import next_multiplier, search_lagrangian
from moe_locality.placement.search.swaps import STEEP, anneal


def made(seed, *, experts=8, blocks=2, requests=30):
    """(weight, pin, load, noise) of a layer whose requests differ."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(0, 100, (experts, experts)).astype(float)
    weight = np.triu(weight, 1) + np.triu(weight, 1).T
    unit_load = rng.poisson(rng.gamma(1.0, 4.0, (requests, experts)))
    pin = rng.integers(0, 50, (experts, blocks)).astype(float)
    return weight, pin, unit_load.sum(axis=0).astype(float), load_noise.noise_of(unit_load)


def cost_of(block_of, weight, pin, load, noise, price, limit):
    """What the search makes small, from scratch."""
    blocks = pin.shape[1]
    same = block_of[:, None] == block_of
    inside = (weight * same).sum() / 2 + pin[np.arange(len(load)), block_of].sum()
    onto = (block_of == np.arange(blocks)[:, None]).astype(float)
    spread = noise.deviation * np.sqrt(np.diag(onto @ noise.covariance @ onto.T))
    draws = load_noise.few_draws(blocks)
    level = ((onto @ load)[:, None] + spread[:, None] * draws).max(axis=0).mean()
    return price * (level + STEEP * max(level - limit, 0.0)) - inside


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [(8, 2), (6, 3)], ids=str)
@pytest.mark.parametrize(
    ("price", "limit", "slack"),
    [(0.0, 1.05, 0), (1.0, 1.05, 0), (0.0, np.inf, 0), (10.0, np.inf, 0), (10.0, 1.05, 0.03)],
)
def test_the_best_of_some_runs_is_the_best_placement_or_near_it(seed, price, limit, slack, size):
    """Examples of how good the search is; no search of this kind finds the best of every case."""
    experts, blocks = size
    weight, pin, load, noise = made(seed, experts=experts, blocks=blocks)
    case = (weight, pin, load, noise, price, limit * load.sum() / blocks)
    start = np.repeat(np.arange(blocks), experts // blocks)
    got = min(cost_of(anneal(*case, start, 4000, s), *case) for s in range(8))
    best = min(
        cost_of(np.array(some), *case) for some in set(itertools.permutations(start.tolist()))
    )
    assert best - 1e-6 <= got <= best + slack * abs(best) + 1e-6


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.0, 2.0]), st.integers(1, 300))
def test_the_search_never_ends_dearer_than_it_began_and_repeats_itself(seed, price, steps):
    """It used to be asked for the best of all placements in every example. [A1]"""
    weight, pin, load, noise = made(seed, experts=12, blocks=4)
    start = np.random.default_rng(seed).permutation(np.repeat(np.arange(4), 3))
    case = (weight, pin, load, noise, price, 1.1 * load.sum() / 4)
    found = anneal(*case, start, steps, seed)
    assert np.bincount(found).tolist() == [3] * 4
    assert cost_of(found, *case) <= cost_of(start, *case) + 1e-6
    assert (found == anneal(*case, start, steps, seed)).all()


def test_without_noise_the_highest_load_counts():
    weight, pin, load, _ = made(3, experts=12, blocks=3)
    start = np.repeat(np.arange(3), 4)
    found = anneal(weight * 0, pin * 0, load, None, 1.0, np.inf, start, 20_000, 0)
    level = np.bincount(found, weights=load).max()
    assert level <= np.bincount(start, weights=load).max()
    assert level == pytest.approx(load.sum() / 3, rel=0.02)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000))
def test_loads_and_variances_after_a_swap_are_those_counted(seed):
    _, _, load, noise = made(seed, experts=9, blocks=3)
    rng = np.random.default_rng(seed)
    block_of = rng.permutation(np.repeat(np.arange(3), 3))
    near, loads, variances = swaps.block_sums(noise.covariance, load, block_of, 3)
    e = int(rng.integers(9))
    f = int(rng.choice(np.flatnonzero(block_of != block_of[e])))
    a, b = block_of[e], block_of[f]
    after = swaps.loads_after(load, noise.covariance, near, loads, variances, a, b, e, f)
    block_of[e], block_of[f] = b, a
    near_after, loads, variances = swaps.block_sums(noise.covariance, load, block_of, 3)
    assert after == (loads[a], loads[b], variances[a], variances[b])
    swaps.swap_near(near, noise.covariance, a, b, e, f)
    assert (near == near_after).all()


def test_the_expected_highest_load_is_the_mean_over_the_samples():
    rng = np.random.default_rng(0)
    load, spread, draws = rng.random(5), rng.random(5), rng.standard_normal((5, 32))
    found = swaps.expected_highest(load, spread, draws, np.empty(32))
    assert found == pytest.approx((load[:, None] + spread[:, None] * draws).max(axis=0).mean())


@settings(max_examples=50, deadline=None)
@given(st.floats(0.05, 5), st.floats(0.5, 3), st.floats(0.005, 0.5))
def test_the_price_comes_near_to_the_one_that_fits(scale, power, target):
    """Imbalance that falls with the price as a power of it, in two layers."""
    seen = []

    def search(place, price, turn):
        seen.append((place, turn))
        level = 10.0 if price == 0 else min(scale * price**-power * (0.5 + place), 10.0)
        return 1 + level

    price = search_lagrangian(search, [1 + target] * 2, 14)
    assert len(seen) == 28
    assert scale * price**-power == pytest.approx(target, rel=0.35)


def test_the_next_price():
    assert next_multiplier([(2.0, 0.2)], 0.1) == 8.0
    assert next_multiplier([(2.0, 0.09)], 0.1) == 0.5
    assert next_multiplier([(2.0, 0.01)], 0.1) == 0.0  # far too level: without a price
    assert next_multiplier([(0.0, 0.5), (2.0, 0.01)], 0.1) == 1.0
    assert next_multiplier([(0.0, 0.5)], 0.1) > 0
    between = next_multiplier([(1.0, 0.2), (4.0, 0.05)], 0.1)
    assert between == pytest.approx(2.0)
