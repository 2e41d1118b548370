import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.analysis.drift import compare, compare_plan, load_drift, windows
from moe_locality.errors import TraceError
from moe_locality.placement import evaluate, solve
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace
from tests.unit.made_trace import make_trace
from tests.unit.trace.cases import make_load_trace


def test_requests_of_one_kind_differ_as_much_as_the_floor_says():
    trace = make_trace(num_requests=400, seed=1)
    found = [compare(*trace.split(share, seed=s)) for share, s in ((0.5, 0), (0.8, 1), (0.3, 2))]
    for drift in found:
        assert not drift.drifted.any()
    ratio = [(d.js_bits / d.noise_floor_bits).mean() for d in found]
    assert 0.6 < np.mean(ratio) < 1.6
    # requests are of one kind, so pairs agree within their floor too
    assert np.mean([(d.pairs_js_bits / d.pairs_noise_floor_bits).mean() for d in found]) < 2


def test_load_drift_is_that_of_compare_and_has_a_floor():
    """[F17.4] A plan keeps only the loads that it was made for; other domains stand out."""
    old, new = make_trace(seed=1), make_trace(seed=2)
    found, floor = load_drift(old.load(), new)
    assert found == pytest.approx(compare(old, new).js_bits.mean())
    assert found < 2 * floor
    other, floor = load_drift(old.load(), new.take(new.domain_id == 0))
    assert other > 10 * floor > 0


def test_other_domains_are_seen_as_drift():
    trace = make_trace(num_requests=400, seed=1)
    old = trace.filter(domains=["code", "math"])
    other = trace.filter(domains=["chat", "law"])
    found = compare(old, other)
    assert found.drifted.all()
    assert (found.js_bits > 0.4).all()
    assert (found.load_cosine < 0.5).all()
    # the pairs of a domain are those of its own experts: other top pairs, another distribution
    assert (found.pairs_js_bits > 10 * found.pairs_noise_floor_bits).all()
    same = compare(old, old)
    assert same.js_bits.max() == 0
    assert same.top_pairs_kept.min() == 1
    assert found.top_pairs_kept.max() < 0.5


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.integers(9, 40), st.integers(0, 99))
def test_windows_cut_by_request_without_loss(count, requests, seed):
    trace = make_trace(num_requests=requests, tokens_per_request=2, seed=seed)
    order = np.random.default_rng(seed).permutation(trace.num_rows)
    parts = windows(trace.take(order), count)
    assert len(parts) == count
    ids = [part.request_ids for part in parts]
    assert np.concatenate(ids).tolist() == trace.request_ids.tolist()  # ascending: none twice
    sizes = [part.num_rows for part in parts]
    assert sum(sizes) == trace.num_rows
    assert max(sizes) - min(sizes) <= 4


def test_windows_of_uneven_requests_are_never_empty():
    trace = make_trace(num_requests=4, tokens_per_request=30)
    few = trace.take(np.flatnonzero((trace.request_id == 0) | (trace.position < 1)))
    assert [part.num_rows for part in windows(few, 4)] == [30, 1, 1, 1]
    with pytest.raises(TraceError, match="5 windows"):
        windows(few, 5)


def test_one_request_has_no_floor():
    trace = make_trace(num_requests=5)
    one, rest = trace.filter(requests=[0]), trace.filter(requests=[1, 2, 3, 4])
    found = compare(one, rest)
    assert np.isnan(found.noise_floor_bits).all()
    assert not found.drifted.any()


def test_counts_have_no_pairs():
    trace = make_load_trace()
    found = compare(trace, trace)
    assert np.isnan(found.pairs_js_bits).all()
    assert found.js_bits.max() == 0


def test_traces_that_do_not_belong_together():
    trace = make_trace()
    with pytest.raises(TraceError, match="of one model"):
        compare(trace, make_trace(model="another"))
    with pytest.raises(TraceError, match="of one model"):
        compare(trace, trace.filter(layers=trace.layer_ids[:1]))
    with pytest.raises(TraceError, match="empty"):
        compare(trace, trace.take(np.zeros(0, int)))


def test_what_a_plan_costs_on_both_sides():
    trace = make_trace(num_requests=200, seed=3)
    old = trace.filter(domains=["code", "math"])
    new = trace.filter(domains=["chat", "law"])
    topology = ClusterTopology.uniform(2, 2)
    plan = solve(old, topology)
    found = compare_plan(old, new, plan, move_budget=0.5)
    assert found.copies_old == evaluate(old, plan).copies
    assert found.copies_new == evaluate(new, plan).copies
    linear = solve(new, topology, method="linear")
    assert found.saving_new == pytest.approx(1 - found.copies_new / evaluate(new, linear).copies)
    assert found.refresh_saving == pytest.approx(found.copies_new - found.refreshed_copies)
    assert found.refresh_moved_share <= 0.5
    with pytest.raises(TraceError, match="kind 'load'"):
        compare_plan(make_load_trace(), make_load_trace(), plan)


def test_training_loads_drift_away_step_by_step(routing_data):
    trace = RoutingTrace.from_npz(routing_data / "smartmoe_24l_32e_training_load.npz")
    first, *later = windows(trace, 6)
    curve = [compare(first, other, num_splits=4) for other in later]
    js = [drift.js_bits.mean() for drift in curve]
    assert js == sorted(js)  # the later, the farther from the start
    assert js[0] > 5 * curve[0].noise_floor_bits.mean()
    assert all(drift.drifted.all() for drift in curve)
    even, odd = (trace.take(np.arange(trace.num_rows) % 2 == side) for side in (0, 1))
    mixed = compare(even, odd)  # every second step: the same training, no drift
    assert not mixed.drifted.any()
    assert mixed.js_bits.mean() < 0.02 * js[-1]


def test_real_requests_at_random_do_not_drift(routing_data):
    trace = RoutingTrace.from_npz(routing_data / "gpt_oss_20b_benchmarks.npz")
    trace = trace.filter(layers=trace.layer_ids[::8].tolist())
    found = compare(*trace.split(0.5, seed=1))
    assert not found.drifted.any()
    first, *_, last = windows(trace, 6)  # numbered by domain
    assert compare(first, last).drifted.all()
