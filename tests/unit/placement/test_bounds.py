"""Bounds against all placements of tiny layers, and against found plans of real traces."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.mean_imbalance_bound import bound_for_mean_imbalance
from moe_locality.errors import PlacementError
from moe_locality.placement import evaluate, solve
from moe_locality.placement.bounds import replicated
from moe_locality.placement.bounds.lower import certify_plan, lower_bounds
from moe_locality.placement.bounds.relaxation import hull_slopes, partition_counts, set_partitions
from moe_locality.placement.plan import PlacementPlan
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace import RoutingTrace
from tests.unit.placement.cases import random_trace


def placements(experts: int, nodes: int):
    """Yield all placements with equal nodes, as [E] node of each expert (nodes told apart)."""
    if nodes == 1:
        yield np.zeros(experts, dtype=np.int64)
        return
    for chosen in itertools.combinations(range(experts), experts // nodes):
        rest = np.setdiff1d(np.arange(experts), chosen)
        for others in placements(len(rest), nodes - 1):
            block_of = np.full(experts, nodes - 1)
            block_of[rest] = others
            yield block_of


def plan_of(block_of: np.ndarray, nodes: int) -> PlacementPlan:
    return PlacementPlan(
        layer_ids=(0,),
        num_experts=len(block_of),
        num_nodes=nodes,
        ranks_per_node=1,
        physical_to_logical_map=np.argsort(block_of, kind="stable")[None].astype(np.int32),
    )


def fewest_copies(trace, topology, homes, experts, nodes, cap):
    """(fewest copies of all placements within the cap, how many are within it)."""
    best, count = np.inf, 0
    for block_of in placements(experts, nodes):
        costs = evaluate(trace, plan_of(block_of, nodes), topology, homes)
        if cap is None or costs.node_imbalance <= cap:
            best, count = min(best, costs.copies), count + 1
    return best, count


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_no_placement_is_below_the_bound(data):
    experts, nodes = data.draw(st.sampled_from([(4, 2), (6, 2), (6, 3), (4, 4), (8, 2)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    tokens, top_k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, min(4, experts)))
    trace = random_trace(rng, tokens=tokens, layers=1, experts=experts, top_k=top_k)
    topology = ClusterTopology.uniform(nodes, 1)
    homes = None
    if data.draw(st.booleans()):
        homes = {int(q): int(rng.integers(nodes)) for q in trace.request_ids}
    cap = data.draw(st.sampled_from([None, 1.2, 1.6]))
    if not trace.load().any():
        return
    best, count = fewest_copies(trace, topology, homes, experts, nodes, cap)
    for seconds in (0.0, 0.02, 0.1):  # the trivial start, the coarse bound, the tight one
        bounds = lower_bounds(trace, topology, homes, max_imbalance=cap, seconds=seconds)
        if count:
            assert bounds.copies[0] <= best + 1e-9
        assert bounds.copies[0] >= 0


def test_the_bound_is_met_where_experts_go_in_pairs():
    """Tokens that pick 2i and 2i + 1: a placement with every pair together touches one node."""
    ids = np.repeat(np.arange(8).reshape(4, 2), 25, axis=0)[:, None].astype(np.int16)
    trace = trace_of(ids, 8)
    bounds = lower_bounds(trace, ClusterTopology.uniform(4, 1), seconds=1.0)
    assert bounds.copies[0] == pytest.approx(0.75, abs=1e-6)


def test_the_bound_is_tight_on_a_layer_that_can_be_solved():
    """Random layers of 8 experts on 2 nodes: on average within 3 % of the best of 70 placements."""
    gaps = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        trace = random_trace(rng, tokens=300, layers=1, experts=8, top_k=3, dropped=0.0)
        topology = ClusterTopology.uniform(2, 1)
        best, _ = fewest_copies(trace, topology, None, 8, 2, None)
        bound = lower_bounds(trace, topology, seconds=2.0)
        assert bound.rounds[0] > 100
        gaps.append(1 - bound.copies[0] / best)
    assert np.mean(gaps) < 0.03, gaps


def test_a_load_cap_raises_the_bound():
    """Two busy experts that go together must part when no node may serve both."""
    ids = np.array([[0, 1]] * 80 + [[2, 3]] * 10 + [[4, 5]] * 10, dtype=np.int16)[:, None]
    trace, topology = trace_of(ids, 6), ClusterTopology.uniform(2, 1)
    free = lower_bounds(trace, topology, seconds=1.0).copies[0]
    capped = lower_bounds(trace, topology, max_imbalance=1.1, seconds=1.0).copies[0]
    assert capped > free + 0.3


def test_the_same_call_gives_the_same_bound():
    trace = random_trace(np.random.default_rng(1), tokens=200, layers=2, experts=8, top_k=3)
    topology = ClusterTopology.uniform(2, 2)
    first = lower_bounds(trace, topology, max_imbalance=1.1, seconds=0.5)
    again = lower_bounds(trace, topology, max_imbalance=1.1, seconds=0.5)
    assert first.copies.tolist() == again.copies.tolist()


def test_certificate_is_about_the_plan_and_refuses_replicas_with_homes():
    trace = random_trace(np.random.default_rng(2), tokens=400, layers=2, experts=8, top_k=3)
    topology = ClusterTopology.uniform(2, 2)
    plan = solve(trace, topology)
    shown = certify_plan(trace, plan, topology, max_imbalance=1.05, seconds=1.0)
    assert shown.found.tolist() == evaluate(trace, plan).per_layer["copies"].tolist()
    assert (shown.bound <= shown.found + 1e-9).all()
    assert 0 <= shown.gap <= shown.gap_per_layer.max() <= 1
    assert shown.to_dict()["worst_gap"] == pytest.approx(shown.gap_per_layer.max(), abs=1e-6)
    more = solve(trace, topology, num_redundant_experts=4)
    shown = certify_plan(trace, more, topology, max_imbalance=1.05, seconds=50.0)
    assert (shown.bound > 0).all()
    assert (shown.bound < shown.found).all()
    assert shown.to_dict()["max_imbalance"] is None
    homes = {int(request): 0 for request in trace.request_ids}
    with pytest.raises(PlacementError, match="redundant"):
        certify_plan(trace, more, topology, homes)


def test_bounds_need_tokens_and_equal_nodes():
    trace = random_trace(np.random.default_rng(3), tokens=20, layers=1, experts=9, top_k=2)
    with pytest.raises(PlacementError, match="expected a multiple"):
        lower_bounds(trace, ClusterTopology.uniform(2, 1))


def test_set_partitions_are_all_there_and_no_more():
    assert [len(set_partitions(k, k, k).starts) - 1 for k in range(1, 7)] == [1, 2, 5, 15, 52, 203]
    some = set_partitions(5, 2, 3)
    assert len(some.starts) - 1 == 10  # splits 3 + 2
    assert {tuple(x) for x in set_partitions(4, 3, 4).counts().tolist()} == {
        tuple(x) for x in partition_counts(4, 3, 4).tolist()
    }


def test_hull_slopes_of_four_picks():
    """(0, 4), (1, 3), (2, 2), (3, 2), (6, 1): from two pairs on, one block costs four pairs."""
    assert hull_slopes(partition_counts(4, 4, 4)).tolist() == [1.0, 0.25]


@pytest.mark.parametrize("homes", [None, "some"])
def test_found_plans_of_a_real_trace_are_above_the_bound(routing_data, homes):
    trace = RoutingTrace.from_npz(routing_data / "gpt_oss_20b_benchmarks.npz")
    trace = trace.filter(layers=[int(trace.layer_ids[3])])
    topology = ClusterTopology.uniform(4, 2)
    if homes:
        homes = {int(q): int(q) % 8 for q in trace.request_ids}
    for method in ("linear", "coactivation"):
        given = {"homes": homes} if homes and method == "coactivation" else {}
        plan = solve(trace, topology, method=method, **given)
        shown = certify_plan(trace, plan, topology, homes, max_imbalance=1.05, seconds=1.5)
        assert shown.bound[0] <= shown.found[0]
    assert shown.gap < (0.3 if homes else 0.2)


def trace_of(ids: np.ndarray, experts: int) -> RoutingTrace:
    tokens = len(ids)
    return RoutingTrace(
        model="made",
        num_experts=experts,
        layer_ids=np.zeros(1, dtype=np.int32),
        domain=("a",),
        expert_ids=ids,
        request_id=np.arange(tokens, dtype=np.int64),
        position=np.zeros(tokens, dtype=np.int32),
        stage=np.zeros(tokens, dtype=np.uint8),
        domain_id=np.zeros(tokens, dtype=np.int32),
    )


def copies_and_imbalance(trace, layer, block_of, nodes):
    """Counted without the package: expected copies per token for uniform homes, max / mean load."""
    picked = [ids[ids >= 0] for ids in trace.expert_ids[:, layer]]
    touched = sum(len(set(block_of[ids].tolist())) for ids in picked)
    load = np.bincount(block_of, weights=trace.load()[layer], minlength=nodes)
    return touched / len(picked) * (nodes - 1) / nodes, load.max() / load.mean()


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_no_pair_of_placements_is_below_the_bound_for_their_mean_imbalance(data):
    experts, nodes = data.draw(st.sampled_from([(6, 2), (6, 3), (8, 2)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    tokens = data.draw(st.integers(5, 40))
    trace = random_trace(rng, tokens=tokens, layers=2, experts=experts, top_k=3)
    if not trace.load().any(axis=1).all():
        return
    topology = ClusterTopology.uniform(nodes, 1)
    all_of = [
        [
            copies_and_imbalance(trace, layer, block_of, nodes)
            for block_of in placements(experts, nodes)
        ]
        for layer in range(2)
    ]
    most = data.draw(st.sampled_from([1.05, 1.2, 1.5, 3.0]))
    sums = [a[0] + b[0] for a, b in itertools.product(*all_of) if a[1] + b[1] <= 2 * most + 1e-12]
    found = bound_for_mean_imbalance(trace, topology, max_imbalance=most, seconds=0.04)
    assert found <= min(sums, default=np.inf) / 2 + 1e-9


def test_a_tighter_mean_imbalance_raises_the_bound_and_is_above_the_loose_one():
    trace = random_trace(np.random.default_rng(3), tokens=60, layers=2, experts=6, top_k=2)
    found = [
        bound_for_mean_imbalance(
            trace, ClusterTopology.uniform(2, 1), max_imbalance=most, seconds=0.3
        )
        for most in (1.0, 1.1, 2.0)
    ]
    assert found[0] > found[1] > found[2] - 1e-9
    loose = lower_bounds(trace, ClusterTopology.uniform(2, 1), seconds=1.0).copies.mean()
    assert found[2] == pytest.approx(loose, abs=0.02)
    with pytest.raises(PlacementError, match="at least 1"):
        bound_for_mean_imbalance(trace, ClusterTopology.uniform(2, 1), max_imbalance=0.9)


def copies_of_every_plan(ids, experts, nodes, slots):
    """([plans] fewest copies per token whoever serves, the nodes of the experts [plans, nodes] as
    bits), counted without the package: all ways to fill the slots so that every expert is held.
    """
    sets = [sum(1 << e for e in some) for some in itertools.combinations(range(experts), slots)]
    plans = np.array(list(itertools.product(sets, repeat=nodes)))
    plans = plans[np.bitwise_or.reduce(plans, axis=1) == (1 << experts) - 1]
    total = np.zeros(len(plans))
    for picked in ids:
        token = sum(1 << int(e) for e in set(picked[picked >= 0].tolist()))
        for home in range(nodes):
            fewest = np.full(len(plans), nodes)
            for visited in itertools.product((0, 1), repeat=nodes):
                if visited[home]:
                    held = np.bitwise_or.reduce(plans * np.array(visited), axis=1)
                    fits = (token & ~held) == 0
                    fewest = np.where(fits, np.minimum(fewest, sum(visited) - 1), fewest)
            total += fewest
    return total / (len(ids) * nodes), plans


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_no_plan_with_replicas_is_below_the_bound_whoever_serves(data):
    experts, nodes, slots = data.draw(
        st.sampled_from([(5, 2, 3), (4, 2, 3), (5, 3, 2), (6, 3, 3), (4, 4, 2), (5, 4, 2)])
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    trace = random_trace(
        rng, tokens=data.draw(st.integers(3, 14)), layers=1, experts=experts, top_k=3
    )
    ids = trace.expert_ids[:, 0]
    copies, plans = copies_of_every_plan(ids, experts, nodes, slots)
    found = lower_bounds(
        trace,
        ClusterTopology.uniform(nodes, 1),
        num_redundant_experts=nodes * slots - experts,
        seconds=1e3,
    )
    bound = found.copies[0]
    assert found.rounds[0] > 0
    assert bound <= copies.min() + 1e-9
    sets = plans[rng.integers(len(plans))]
    table = [[e for e in range(experts) if held >> e & 1] for held in sets]
    for rule in ("home", "visited"):
        plan = PlacementPlan(
            layer_ids=(0,),
            num_experts=experts,
            num_nodes=nodes,
            ranks_per_node=1,
            physical_to_logical_map=np.array(table, dtype=np.int32).reshape(1, -1),
            serving_rule=rule,
        )
        found = certify_plan(trace, plan, seconds=1e3)
        assert found.bound[0] == pytest.approx(bound, abs=1e-12)
        assert found.found[0] >= bound - 1e-9


@settings(max_examples=8, deadline=None)
@given(st.sampled_from([(1, 4), (2, 3), (2, 5), (3, 3), (3, 4)]), st.integers(0, 2**32 - 1))
def test_cover_asks_no_more_than_any_replicas_that_serve_a_token(shape, seed):
    """Against all ways to put replicas of its picks: nodes touched, and the prices of these."""
    picks, nodes = shape
    rng = np.random.default_rng(seed)
    u, z = (rng.random(s) * rng.choice([0, 0.1, 0.3, 1], s) for s in (picks, (picks, picks)))
    np.fill_diagonal(z, 0)
    reach, asked = np.zeros((picks, 1 << picks)), {}
    replicated._sum_near(z, picks, reach)
    every = range(1, 1 << nodes)
    for held in itertools.product(every, repeat=picks):  # nodes of each pick as bits
        covers = [s for s in every if all(s & some for some in held)]
        size = min(s.bit_count() for s in covers)
        found = np.bitwise_or.reduce([s for s in covers if s.bit_count() == size])
        touched = (size * nodes - int(found).bit_count()) / (nodes - 1)
        on = [[n for n in range(nodes) if some >> n & 1] for some in held]
        for first in itertools.product(*on):  # the primaries
            blocks = [[i for i in range(picks) if first[i] == n] for n in sorted(set(first))]
            key = tuple(sorted(sum(1 << i for i in some) for some in blocks))
            if key not in asked:
                args = (np.array(key), 0, len(key), picks, u, reach, nodes)
                asked[key] = replicated._cover(*args)[0]
            price = sum(
                u[i] + sum(z[i, j] for j in range(picks) if first[j] == n)
                for i in range(picks)
                for n in on[i]
                if n != first[i]
            )
            assert asked[key] <= touched + price + 1e-9
