"""The ceiling of a refresh: its gains against recounting, its knapsack against all choices."""

import itertools
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from refresh_ceiling import best_gains, inside, knapsack


def test_the_best_swaps_are_those_of_trying_all():
    rng = np.random.default_rng(0)
    node_of = np.array([0, 0, 1, 1, 2, 2])
    pairs = np.triu(rng.integers(0, 9, (6, 6)), 1).astype(float)
    pairs += pairs.T
    start = inside(pairs[None], node_of[None])[0]

    def after(*swaps):
        table = node_of.copy()
        for i, j in swaps:
            table[[i, j]] = table[[j, i]]
        return inside(pairs[None], table[None])[0] - start

    swaps = list(itertools.combinations(range(6), 2))
    none, one, two = best_gains(pairs, node_of)
    assert (none, one) == (0, max(after(s) for s in swaps))
    assert two == max(after(s, t) for s in swaps for t in swaps)


def test_the_budget_goes_where_it_gains_most():
    gains = np.array([[0, 5, 6], [0, 1, 9], [0, 2, 3.0]])
    for swaps in range(4):
        best = max(
            sum(gains[layer, n] for layer, n in enumerate(chosen))
            for chosen in itertools.product(range(3), repeat=3)
            if sum(chosen) <= swaps
        )
        assert knapsack(gains, swaps) == best
