"""Sampling against probabilities computed here, and its independence of batch and rank."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from moe_locality.serving.requests import RequestError, SamplingParams
from moe_locality.serving.sampling import choose, draw, seed_of

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))


def frequencies(params, count=4000):
    rng = np.random.default_rng(0)
    rows = choose(LOGITS.expand(count, -1), [params] * count, rng.random(count).tolist())
    counts = Counter(row.token for row in rows)
    return [counts[token] / count for token in range(len(LOGITS))]


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [0.725, 0.181, 0.065, 0.029]),
        ({"top_k": 2}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_k": -1}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [2 / 3, 1 / 3, 0, 0]),
    ],
)
def test_choose_draws_from_the_distribution(params, wanted):
    assert frequencies(SamplingParams(**params)) == pytest.approx(wanted, abs=0.03)


def test_choose_gives_a_row_the_same_token_in_any_batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=generator)
    params = [SamplingParams(temperature=t, top_k=k) for t, k in [(1, 0), (0, 0), (0.7, 5)] * 2]
    draws = [draw(7, i, 3) for i in range(6)]
    together = [row.token for row in choose(logits, params, draws)]
    alone = [choose(logits[i : i + 1], [params[i]], [draws[i]])[0].token for i in range(6)]
    assert together == alone


def test_choose_returns_log_probabilities_of_the_best_and_of_the_chosen():
    params = [SamplingParams(logprobs=2), SamplingParams(), SamplingParams(logprobs=0)]
    rows = choose(LOGITS.expand(3, -1), params, [0.99, 0.0, 0.0])
    assert rows[0].token == 3
    assert rows[0].logprobs == pytest.approx(
        {0: math.log(0.5), 1: math.log(0.25), 3: math.log(0.1)}, abs=1e-5
    )
    assert rows[1].logprobs is None
    assert rows[2].logprobs == pytest.approx({0: math.log(0.5)}, abs=1e-5)


def test_draw_depends_on_seed_continuation_and_position_alone():
    places = [(seed, index, at) for seed in (0, 1, 2**63) for index in (0, 1) for at in range(50)]
    values = [draw(*place) for place in places]
    assert len(set(values)) == len(values)
    assert values == [draw(*place) for place in places]
    assert all(0 <= value < 1 for value in values)
    assert 0.4 < np.mean(values) < 0.6


def test_seed_of_is_the_requests_own_or_made_of_its_id():
    own = SamplingParams(seed=5)
    assert seed_of(own, 1, 0) == seed_of(own, "x", 9) == 5
    made = [seed_of(SamplingParams(), request, seed) for request in (1, "1") for seed in (0, 1)]
    assert len(set(made)) == 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -2},
        {"top_k": 1.5},
        {"max_tokens": 0},
        {"max_tokens": "many"},
        {"logprobs": -1},
        {"stop": [""]},
        {"stop_token_ids": ["a"]},
        {"seed": "x"},
        {"temperature": "hot"},
    ],
)
def test_sampling_params_refuse_what_cannot_be(wrong):
    with pytest.raises(RequestError):
        SamplingParams(**wrong)
