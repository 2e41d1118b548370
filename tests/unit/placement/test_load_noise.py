from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import PlacementError
from moe_locality.placement import evaluate, solve
from moe_locality.placement.search import load_noise
from moe_locality.placement.search.coactivation import lightest_first
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import RoutingTrace


class Some(NamedTuple):
    copies: float
    imbalance: float


def drawn(rng, *, requests, experts=48, tokens=100, spread=2.0):
    """[R, E] picks of requests that each have their own favorites, around common ones."""
    taste = rng.dirichlet(spread * rng.gamma(2.0, 0.5, experts), size=requests)
    length = rng.geometric(1 / tokens, requests)
    return np.stack([rng.multinomial(4 * n, p) for n, p in zip(length, taste, strict=True)])


def test_units_are_requests_bundled_beyond_a_number_and_stretches_of_tokens_below_another():
    assert (
        load_noise.units_of(np.repeat(np.arange(10), 3) * 7).tolist()
        == np.repeat(range(10), 3).tolist()
    )
    many = load_noise.units_of(np.arange(3000))
    assert many.max() == load_noise.MAX_UNITS - 1
    assert np.bincount(many).max() <= -(-3000 // load_noise.MAX_UNITS)
    one = load_noise.units_of(np.zeros(1000, dtype=np.int64))
    assert len(np.unique(one)) == 64
    assert (np.diff(one) >= 0).all()
    assert load_noise.units_of(np.zeros(2, dtype=np.int64)).max() <= 1


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
        expected.append(
            load_noise.expected_imbalance(block_of, total, load_noise.noise_of(seen), blocks)
        )
        naive.append(np.bincount(block_of, weights=total).max() * blocks / total.sum())
    assert np.mean(expected) == pytest.approx(np.mean(shown), abs=0.006)
    assert np.mean(naive) < np.mean(shown) - 0.01


def test_no_noise_is_claimed_where_nothing_differs_or_nothing_can_be_known():
    load = np.array([3.0, 1.0, 1.0, 1.0])
    same = load_noise.noise_of(np.tile([6, 2, 2, 2], (10, 1)))
    alone = load_noise.noise_of(np.array([[6, 2, 2, 2], [0, 0, 0, 0]]))
    for noise in (same, alone):
        found = load_noise.expected_imbalance(np.array([0, 0, 1, 1]), load, noise, 2)
        assert found == pytest.approx(4 / 3)
    nothing = load_noise.noise_of(np.zeros((3, 2)))
    assert load_noise.expected_imbalance(np.array([0, 1]), np.zeros(2), nothing, 2) == 1


def of_documents(rng, *, documents, pages, tokens=60, experts=16, own=1.0):
    """A trace of requests, ``pages`` next to each other from one document with its favorites."""
    taste = np.repeat(rng.gumbel(size=(documents, experts)) * own, pages * tokens, axis=0)
    ids = np.argsort(-(taste + rng.gumbel(size=taste.shape)), axis=1)[:, None, :2]
    request = np.repeat(np.arange(documents * pages), tokens)
    return RoutingTrace(
        model="documents",
        num_experts=experts,
        layer_ids=[0],
        expert_ids=ids.astype(np.int16),
        request_id=request,
        position=np.tile(np.arange(tokens), documents * pages),
    )


@pytest.mark.parametrize("pages", [1, 4])
def test_neighbors_alike_finds_documents_that_no_label_names(pages):
    found = [
        load_noise.neighbors_alike(
            of_documents(np.random.default_rng(seed), documents=60, pages=pages)
        )
        for seed in range(5)
    ]
    assert found == [pages] * 5 if pages > 1 else max(found) <= 2


def test_the_promise_counts_documents_where_requests_are_cut_from_them():
    """Requests that come by the document make other samples than requests by themselves; counted
    as if they came one by one, unseen documents are less level than expected [16.4]."""
    topology, shown, promised, naive = ClusterTopology.uniform(2, 1), [], [], []
    for seed in range(10):
        trace = of_documents(np.random.default_rng(seed), documents=120, pages=4, own=1.5)
        drawn = np.random.default_rng(seed).permutation(120)[:84]
        seen = np.isin(trace.request_id // 4, drawn)
        train, test = trace.take(seen), trace.take(~seen)
        plan = solve(train, topology, max_imbalance=1, sampling_unit="auto")
        single = solve(train, topology, max_imbalance=1)
        assert plan.provenance["sampling_unit"] == 4
        shown.append(evaluate(test, plan, topology).node_imbalance)
        promised.append(plan.provenance["expected_imbalance"])
        one_by_one = evaluate(test, single, topology).node_imbalance
        naive.append(one_by_one - single.provenance["expected_imbalance"])
    assert np.mean(shown) == pytest.approx(np.mean(promised), abs=0.015)
    assert np.mean(naive) > 0.008


def test_sampling_units_bundle_neighbors_inside_their_domain_beyond_a_number(monkeypatch):
    monkeypatch.setattr(load_noise, "MAX_UNITS", 8)
    trace = of_documents(np.random.default_rng(0), documents=32, pages=4)
    units = load_noise.sampling_units(trace, "auto")
    assert units.of == 4
    assert len(units.stratum) == units.unit.max() + 1 <= 8
    by_request = units.unit[::60]
    assert (by_request.reshape(-1, 4) == by_request[::4, None]).all()
    with pytest.raises(PlacementError, match="1 domains"):
        load_noise.sampling_units(trace, "domain")


def test_cap_of_a_layer_is_between_what_it_can_reach_and_its_usual_order():
    reach, linear = 1.04, 1.2
    assert load_noise.cap_of(linear, reach, 1.05, None).allowed == 1.05
    assert load_noise.cap_of(linear, 1.1, 1.05, None).allowed == 1.1
    assert load_noise.cap_of(linear, 1.1, 1.05, None).most == pytest.approx(1.15)
    assert load_noise.cap_of(linear, reach, 1.08, 0.08).allowed == pytest.approx(1.12)
    assert load_noise.cap_of(1.06, reach, 1.08, 0.08) == load_noise.Cap(allowed=1.06, most=1.06)
    assert load_noise.cap_of(1.02, reach, 1.08, 0.08).allowed == 1.02


def test_few_draws_make_equal_loads_differ_as_blocks_do():
    for blocks, mean in ((2, 2**0.5 / np.sqrt(np.pi)), (8, 1.424 * np.sqrt(8 / 7))):
        draws = load_noise.few_draws(blocks)
        assert draws.max(axis=0).mean() == pytest.approx(mean, rel=0.12)
        assert draws.sum() == pytest.approx(0, abs=1e-9)


def test_shares_of_whole_experts_are_blocks():
    counts = drawn(np.random.default_rng(1), requests=40, experts=12)
    noise, load = load_noise.noise_of(counts), counts.sum(axis=0).astype(float)
    block_of = np.arange(12) % 3
    onto = (block_of == np.arange(3)[:, None]).astype(float)
    blocks = load_noise.expected_imbalance(block_of, load, noise, 3)
    assert load_noise.expected_shared_imbalance(onto, load, noise) == pytest.approx(blocks)
    even = np.full((3, 12), 1 / 3)  # every block serves a third of all: nothing left to vary
    assert load_noise.expected_shared_imbalance(even, load, noise) == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_allocate_keeps_the_budget_and_is_near_the_best(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    layers = data.draw(st.integers(1, 4))
    copies = [rng.uniform(1, 2, 4).tolist() for _ in range(layers)]
    level = [rng.uniform(1, 1.2, 4).tolist() for _ in range(layers)]
    least = sum(min(some) for some in level)
    budget = least + data.draw(st.floats(0, 0.5))
    tried = [
        [Some(copies=c, imbalance=x) for c, x in zip(*some, strict=True)]
        for some in zip(copies, level, strict=True)
    ]
    mean = budget / layers
    chosen = load_noise.allocate(tried, [load_noise.Cap(allowed=mean, most=1.15)] * layers)
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


def test_shared_noise_expects_the_mean_imbalance_of_the_layers():
    """Layers whose loads are drawn: one layer that stands for all has their mean of max / mean."""
    rng = np.random.default_rng(3)
    share = 1 + 0.2 * rng.standard_normal((400, 16))
    loads = 1000 * share / share.sum(axis=1, keepdims=True)
    block_of = np.arange(16) // 4
    mean = np.mean([np.bincount(block_of, weights=some).max() / 250 for some in loads])
    noise = load_noise.shared_noise([load_noise.no_noise(16)] * 400, loads)
    assert load_noise.expected_imbalance(block_of, loads.sum(axis=0), noise, 4) == pytest.approx(
        mean, rel=0.02
    )
    same = np.repeat(loads[:1], 5, axis=0)  # layers that are alike, each with noise: that of one
    units = rng.gamma(2.0, 1.0, (60, 16))
    alone = load_noise.noise_of(units)
    load = np.repeat(units.sum(axis=0)[None], 5, axis=0)
    together = load_noise.shared_noise([alone] * 5, load)
    expected = load_noise.expected_imbalance(block_of, load[0], alone, 4)
    assert load_noise.expected_imbalance(block_of, load.sum(axis=0), together, 4) == pytest.approx(
        expected
    )
    quiet = load_noise.shared_noise([load_noise.no_noise(16)] * 5, same)
    assert load_noise.expected_imbalance(block_of, same.sum(axis=0), quiet, 4) == pytest.approx(
        np.bincount(block_of, weights=same[0]).max() / 250
    )
