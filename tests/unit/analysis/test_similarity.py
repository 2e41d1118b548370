from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.analysis import stats
from moe_locality.errors import TraceError
from moe_locality.trace import RoutingTrace
from tests.unit.trace.cases import make_load_trace, make_trace


def test_divergence_of_known_loads():
    a, b = np.array([4, 4, 0, 0]), np.array([0, 0, 1, 9])
    js = stats.jensen_shannon_bits
    np.testing.assert_allclose(js(a, b), 1)
    np.testing.assert_allclose(js(a, 7 * a), 0, atol=1e-15)
    np.testing.assert_allclose(js(np.array([1, 0]), np.array([1, 1])), 0.31127812445913283)
    assert np.isnan(js(a, np.zeros(4)))
    np.testing.assert_allclose(stats.cosine(a, b), 0)
    np.testing.assert_allclose(stats.cosine(a, 3 * a), 1)
    assert np.isnan(stats.cosine(a, np.zeros(4)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999))
def test_divergence_is_a_symmetric_measure_between_0_and_1(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, 5, (2, 3, 16)) + np.eye(16, dtype=int)[0]
    first, second = stats.jensen_shannon_bits(a, b), stats.jensen_shannon_bits(b, a)
    np.testing.assert_allclose(first, second)
    assert ((first >= -1e-12) & (first <= 1)).all()
    p, q = a[0] / a[0].sum(), b[0] / b[0].sum()
    m = (p + q) / 2
    entropy = [-(x[x > 0] * np.log2(x[x > 0])).sum() for x in (p, q, m)]
    np.testing.assert_allclose(first[0], entropy[2] - (entropy[0] + entropy[1]) / 2)


def two_domains(seed=0, num_requests=60, length=50, shift=0):
    """Two domains; tokens of the second pick experts ``shift`` places further."""
    rng = np.random.default_rng(seed)
    request = np.repeat(np.arange(num_requests), length)
    domain = request % 2
    base = np.minimum(rng.geometric(0.3, len(request)), 8) - 1
    return RoutingTrace(
        model="toy",
        num_experts=8,
        layer_ids=[0],
        domain=("a", "b"),
        expert_ids=((base + shift * domain) % 8)[:, None, None],
        request_id=request,
        position=np.tile(np.arange(length), num_requests),
        stage=np.tile(np.arange(length) >= 10, num_requests).astype(int),
        domain_id=domain,
    )


def test_domains_stand_out_of_the_noise_only_when_they_differ():
    same = stats.domain_divergence(two_domains())
    assert same.names == ("a", "b")
    assert same.tokens == (1500, 1500)
    assert same.mean_js_bits < 4 * same.mean_noise_floor_bits
    other = stats.domain_divergence(two_domains(shift=4))
    assert other.mean_js_bits > 50 * other.mean_noise_floor_bits
    assert other.js_bits[0, 1] == other.js_bits[1, 0] == other.mean_js_bits
    assert other.js_bits[0, 0] == 0
    assert other.mean_cosine < same.mean_cosine


def test_small_and_unknown_domains_are_left_out():
    trace = two_domains()
    few = stats.domain_divergence(trace, min_tokens=1501)
    assert few.names == ()
    assert np.isnan(few.mean_js_bits)
    assert np.isnan(few.mean_noise_floor_bits)
    unlabeled = replace(trace, domain_id=np.where(trace.domain_id == 1, -1, 0))
    assert stats.domain_divergence(unlabeled).names == ("a",)


def test_split_halves_are_seeded_and_need_two_requests():
    trace = two_domains()
    first = stats.split_half_js_bits(trace, seed=1)
    assert (first == stats.split_half_js_bits(trace, seed=1)).all()
    assert (first != stats.split_half_js_bits(trace, seed=2)).any()
    assert np.isnan(stats.split_half_js_bits(trace.filter(requests=[0]))).all()
    assert (stats.split_half_js_bits(make_load_trace()) > 0).any()


def test_split_halves_by_hand():
    """One split of two requests: the divergence between the two."""
    trace = make_trace(num_tokens=60).filter(requests=[0, 1])
    loads = [trace.filter(requests=[i]).load() for i in (0, 1)]
    expected = stats.jensen_shannon_bits(*loads).mean()
    np.testing.assert_allclose(stats.split_half_js_bits(trace, num_splits=3).mean(), expected)


def test_prefill_says_something_about_decode():
    rng = np.random.default_rng(0)
    trace = two_domains(shift=3)
    favorite = rng.permutation(60)[trace.request_id] % 8
    habit = rng.random(trace.num_tokens) < 0.5
    ids = np.where(habit, favorite, trace.expert_ids[:, 0, 0])[:, None, None]
    found = stats.prefill_decode_correlation(replace(trace, expert_ids=ids))
    assert found.num_requests == 60
    assert found.same_request > found.same_domain + 0.5
    assert found.same_domain > found.other_domain + 0.03


def test_prefill_correlation_by_hand():
    trace = two_domains(num_requests=6)
    found = stats.prefill_decode_correlation(trace)
    rows = {
        (stage, i): trace.filter(requests=[i], stages=stage).load().ravel()
        for i in range(6)
        for stage in ("prefill", "decode")
    }
    r = [
        [np.corrcoef(rows["prefill", i], rows["decode", j])[0, 1] for j in range(6)]
        for i in range(6)
    ]
    own = [r[i][i] for i in range(6)]
    alike = [r[i][j] for i in range(6) for j in range(6) if i != j and i % 2 == j % 2]
    other = [r[i][j] for i in range(6) for j in range(6) if i % 2 != j % 2]
    np.testing.assert_allclose(
        (found.same_request, found.same_domain, found.other_domain),
        (np.mean(own), np.mean(alike), np.mean(other)),
        atol=1e-6,
    )
    sampled = stats.prefill_decode_correlation(trace, max_requests=3, seed=1)
    assert sampled.num_requests == 3


def test_prefill_correlation_needs_both_stages():
    with pytest.raises(TraceError, match="found 0 requests with at least 8 prefill and decode"):
        stats.prefill_decode_correlation(two_domains().filter(stages="decode"))
    with pytest.raises(TraceError, match="kind 'load'"):
        stats.prefill_decode_correlation(make_load_trace())


def test_overlap_of_tokens():
    trace = make_trace(num_tokens=400, num_experts=64, top_k=4, missing=False)
    constant = replace(trace, expert_ids=np.tile(np.arange(4), (400, 3, 1)))
    found = stats.token_overlap(constant)
    assert (found.adjacent, found.same_request, found.any) == (1, 1, 1)
    random = stats.token_overlap(trace)
    assert random.uniform == 4 / 64
    for value in (random.adjacent, random.same_request, random.any):
        np.testing.assert_allclose(value, 4 / 64, rtol=0.5)
    alternating = np.where(trace.position % 2, 4, 0)[:, None, None] + np.tile(
        np.arange(4), (400, 3, 1)
    )
    swapped = replace(trace, expert_ids=alternating).take(np.random.default_rng(0).permutation(400))
    assert stats.token_overlap(swapped).adjacent == 0
    gaps = replace(constant, position=2 * trace.position)
    assert np.isnan(stats.token_overlap(gaps).adjacent)
    missing = replace(trace, expert_ids=np.full((400, 3, 4), -1))
    assert stats.token_overlap(missing).any == 0
    assert np.isnan(stats.token_overlap(trace.take(np.zeros(0, int))).adjacent)


# Jensen-Shannon bits between groups, split-half noise, cosine, published with the data. The noise
# there is one
# split of one group, here the mean over groups and splits: it agrees within a factor of two.
DOMAINS = {
    "gpt_oss_20b_benchmarks": (0.1175, 0.0226, 0.795),
    "deepseek_v2_lite_esft_tasks": (0.1576, 0.0056, 0.656),
    "llama4_maverick_mmlu": (0.3474, 0.0265, 0.464),
    "olmoe_1b7b_domain_load": (0.1758, None, 0.633),
    "mixtral_8x7b_mmlu_request_load": (0.0084, None, 0.978),
}


@pytest.mark.parametrize("name", DOMAINS)
def test_real_domains(routing_data, name):
    js, noise, cosine = DOMAINS[name]
    found = stats.domain_divergence(RoutingTrace.from_npz(routing_data / f"{name}.npz"))
    np.testing.assert_allclose(found.mean_js_bits, js, atol=6e-5)
    np.testing.assert_allclose(found.mean_cosine, cosine, atol=6e-4)
    if noise is not None:
        assert noise / 2 < found.mean_noise_floor_bits < noise * 2


def test_real_prefill_and_decode(routing_data):
    """Published: 0.642 / 0.454 / 0.262 / 0.797; the middle two there are sampled pairs, here all
    pairs.
    """
    trace = RoutingTrace.from_npz(routing_data / "llama4_maverick_mmlu.npz")
    found = stats.prefill_decode_correlation(trace)
    assert found.num_requests == 226
    np.testing.assert_allclose((found.same_request, found.aggregate), (0.642, 0.797), atol=6e-4)
    np.testing.assert_allclose((found.same_domain, found.other_domain), (0.454, 0.262), atol=6e-3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt_oss_20b_benchmarks", (0.436, 0.313, 0.188, 0.125)),
        ("deepseek_v2_lite_esft_tasks", (0.278, 0.164, 0.119, 0.094)),
        ("llama4_maverick_mmlu", (0.334, 0.179, 0.084, 0.008)),
    ],
)
def test_real_overlap(routing_data, name, expected):
    found = stats.token_overlap(
        RoutingTrace.from_npz(routing_data / f"{name}.npz"), max_pairs=30_000
    )
    values = (found.adjacent, found.same_request, found.any, found.uniform)
    np.testing.assert_allclose(values, expected, atol=4e-3)
