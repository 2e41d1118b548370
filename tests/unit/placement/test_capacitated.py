import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from moe_locality.placement.homes.capacitated import Capacities, assign


def worth(score, tokens, rank_of):
    return float((score[np.arange(len(tokens)), rank_of] * tokens).sum())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 2),
    st.lists(st.integers(1, 50), min_size=1, max_size=60),
    st.floats(1.0, 1.5),
    st.integers(0, 10**6),
)
def test_tokens_stay_below_the_cap_up_to_one_request(nodes, per_node, tokens, cap, seed):
    tokens, ranks = np.array(tokens), nodes * per_node
    score = np.random.default_rng(seed).random((len(tokens), ranks))
    most = cap * tokens.sum() / ranks
    found = assign(score, tokens, np.arange(ranks) // per_node, Capacities(tokens=most))
    filled = np.bincount(found.rank_of, weights=tokens, minlength=ranks)
    assert found.rank_of.min() >= 0
    assert filled.sum() == tokens.sum()
    assert filled.max() <= max(most, filled.min() + tokens.max())
    if filled.max() <= most:
        assert worth(score, tokens, found.rank_of) <= found.dual_bound + 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_few_requests_against_every_assignment(seed):
    rng = np.random.default_rng(seed)
    tokens, score = rng.integers(1, 9, 7), rng.random((7, 3))
    most = 1.3 * tokens.sum() / 3
    best = -np.inf
    for choice in itertools.product(range(3), repeat=7):
        filled = np.bincount(choice, weights=tokens, minlength=3)
        if filled.max() <= most:
            best = max(best, worth(score, tokens, np.array(choice)))
    found = assign(score, tokens, np.arange(3), Capacities(tokens=most))
    assert best <= found.dual_bound + 1e-9
    assert worth(score, tokens, found.rank_of) >= 0.9 * best


@pytest.mark.parametrize(("requests", "ranks"), [(200, 8), (203, 8), (7, 8), (1, 3)])
def test_as_many_requests_on_every_rank(requests, ranks):
    rng = np.random.default_rng(requests)
    score, tokens = rng.random((requests, ranks)), rng.integers(1, 50, requests)
    found = assign(score, tokens, np.arange(ranks), Capacities(tokens=np.inf, even=True))
    sizes = np.bincount(found.rank_of, minlength=ranks)
    assert sizes.max() - sizes.min() <= 1
    assert worth(score, tokens, found.rank_of) <= found.dual_bound + 1e-6
    if requests % ranks == 0:
        row, column = linear_sum_assignment(
            np.repeat(score * tokens[:, None], requests // ranks, axis=1), maximize=True
        )
        best = worth(score[row], tokens[row], column // (requests // ranks))
        assert worth(score, tokens, found.rank_of) >= 0.995 * best


def test_thousands_of_requests_lose_little_against_the_bound():
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 512, 5000)
    score = np.repeat(rng.dirichlet(np.ones(4), 5000), 2, axis=1) + rng.random((5000, 8)) * 0.01
    score[:1600, :2] += 0.3  # one kind of requests is too many for its node
    caps = Capacities(tokens=tokens.sum() / 8 * 1.05)
    found = assign(score, tokens, np.arange(8) // 2, caps)
    filled = np.bincount(found.rank_of, weights=tokens)
    assert filled.max() <= caps.tokens
    assert worth(score, tokens, found.rank_of) >= 0.999 * found.dual_bound
