"""Replicas: exact costs of the search, feasible plans, the cap."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_locality.errors import PlacementError
from moe_locality.placement import evaluate, solve
from moe_locality.placement.export import write_export
from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.search import coactivation, load_noise, replica_moves, replicas
from moe_locality.placement.serving import choose_serving_nodes
from moe_locality.topology import ClusterTopology
from tests.unit.placement.cases import random_trace

CASES = settings(max_examples=15, deadline=None)


@st.composite
def layers(draw, homes=None):
    """(trace of one layer, nodes, slots per node, home node of each token or empty)."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nodes, size = draw(st.integers(2, 4)), draw(st.integers(1, 4))
    experts = nodes * size
    trace = random_trace(
        rng, tokens=draw(st.integers(1, 120)), layers=1, experts=experts,
        top_k=draw(st.integers(1, min(4, experts))), ranks=nodes,
    )  # fmt: skip
    assume((trace.expert_ids >= 0).any())
    slots = draw(st.integers(size + 1, experts))
    given_homes = draw(st.booleans()) if homes is None else homes
    home = np.asarray(trace.rank, dtype=np.int64) if given_homes else np.zeros(0, dtype=np.int64)
    return trace, nodes, slots, home


def plan_of(trace, held):
    """One rank per node; every node must hold as many experts."""
    rows = [np.flatnonzero(row) for row in held]
    return PlacementPlan(
        layer_ids=(0,), num_experts=trace.num_experts, num_nodes=len(held), ranks_per_node=1,
        physical_to_logical_map=np.concatenate(rows)[None], expert_load=trace.load(),
    )  # fmt: skip


def copies_of(trace, held, home):
    """Exact copies, summed over tokens (and over home nodes, where homes are uniform)."""
    costs = evaluate(trace, plan_of(trace, held), homes="trace" if home.size else None)
    if home.size:
        return costs.total_copies
    return round(costs.copies * trace.num_tokens * len(held))


class Layer:
    """What the kernels take, for a start with experts in linear order."""

    def __init__(self, trace, nodes, home):
        self.ids = np.ascontiguousarray(trace.expert_ids[:, 0])
        experts = trace.num_experts
        self.index = replicas.index_tokens(self.ids, home, experts, nodes).arrays
        self.load = trace.load()[0].astype(np.int64)
        self.order = np.argsort(-self.load, kind="stable")
        self.picks = np.tile(self.load.astype(float), (nodes, 1))
        node_of = np.arange(experts) // (experts // nodes)
        self.held = node_of == np.arange(nodes)[:, None]

    def add(self, room, cap=np.inf):
        held, room = self.held.copy(), np.asarray(room, dtype=np.int64)
        found = replica_moves.add_greedily(
            *self.index, self.load, self.order, self.picks, cap, held, room
        )
        return held, *found


@CASES
@given(layers())
def test_copies_before_and_after_the_greedy_are_those_of_evaluate(case):
    trace, nodes, slots, home = case
    layer = Layer(trace, nodes, home)
    held, _, _, before, after = layer.add([slots - trace.num_experts // nodes] * nodes)
    assert before == copies_of(trace, layer.held, home)
    assert after == copies_of(trace, held, home)


@CASES
@given(layers())
def test_the_first_replica_is_the_best_of_all(case):
    trace, nodes, _, home = case
    layer = Layer(trace, nodes, home)
    gains = []
    for node in range(nodes):
        for expert in np.flatnonzero(~layer.held[node]):
            held = layer.held.copy()
            held[node, expert] = True
            gains.append(_recount(trace, held, home))
    *_, before, after = layer.add(np.eye(nodes, dtype=np.int64)[0])
    on_node_0 = gains[: trace.num_experts - trace.num_experts // nodes]
    assert after == min(on_node_0)
    assert before == _recount(trace, layer.held, home)


@CASES
@given(layers())
def test_copies_of_the_annealing_are_those_of_evaluate(case):
    trace, nodes, slots, home = case
    layer = Layer(trace, nodes, home)
    cap = 1.2 * layer.picks.sum() / nodes
    room = [slots - trace.num_experts // nodes] * nodes
    held, served, sets, _, after = layer.add(room, cap)
    counts = np.random.default_rng(0).poisson(layer.load, (20, len(layer.load)))
    noise = load_noise.noise_of(counts)
    best, change = replica_moves.anneal(
        *layer.index, layer.load, layer.order, layer.picks, held.copy(), served, sets,
        300, 3.0, 0.1, 1.0, cap, noise.covariance, noise.deviation, load_noise.few_draws(nodes), 7,
    )  # fmt: skip
    assert after + change == copies_of(trace, best, home)


@CASES
@given(layers())
def test_compiled_serving_is_the_rule_of_the_plan(case):
    trace, nodes, slots, home = case
    layer = Layer(trace, nodes, home)
    held, served, *_ = layer.add([slots - trace.num_experts // nodes] * nodes)
    assert (served == choose_serving_nodes(held.T[None], layer.load[None])[0]).all()
    plan = plan_of(trace, held)
    assert (served == plan.rank_of_slot[plan.serving_slot()[0]]).all()


@CASES
@given(layers(), st.floats(1, 1.5), st.sampled_from([0.0, 0.5, 5.0]), st.integers(0, 2**31 - 9))
def test_all_slots_are_used_once_and_copies_and_loads_are_those_of_evaluate(
    case, limit, price, seed
):
    trace, nodes, slots, home = case
    start = begun(trace, nodes, slots, home, limit, seed)
    for placed in (
        replicas.candidate(start, start.held),
        replicas.searched(start, price, seed),
    ):
        assert (placed.held.sum(axis=1) == slots).all()
        assert placed.held.any(axis=0).all()
        node_load = placed.served_load.sum(axis=1)
        costs = evaluate(trace, plan_of(trace, placed.held), homes="trace" if home.size else None)
        assert costs.node_imbalance == pytest.approx(node_load.max() / node_load.mean())
        assert costs.copies == pytest.approx(placed.copies)
        if len(np.unique(trace.request_id)) < 2 and trace.num_tokens < 2:  # nothing varies
            assert costs.node_imbalance == pytest.approx(placed.imbalance)
    assert (replicas.searched(start, price, seed).held == placed.held).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_serving_after_a_change_of_two_experts_is_serving_from_scratch(seed):
    rng = np.random.default_rng(seed)
    nodes, experts = int(rng.integers(2, 5)), int(rng.integers(2, 9))
    load = rng.integers(1, 9, experts)
    order = np.argsort(-load, kind="stable")
    before = rng.random((nodes, experts)) < 0.4
    before[0, ~before.any(axis=0)] = True
    served = np.empty((2, nodes, experts), np.int64)
    replica_moves.serve(before, load, order, served[0])
    e, f = rng.choice(experts, 2, replace=False)
    after = before.copy()
    after[:, [e, f]] = rng.random((nodes, 2)) < 0.5
    after[0, ~after.any(axis=0)] = True
    base = replica_moves.sure_loads(before, load, before.sum(axis=0))
    for x in (e, f):
        replica_moves.hold(before, load, before.sum(axis=0), base, x, -1)
        replica_moves.hold(after, load, after.sum(axis=0), base, x, 1)
    found, room, some = served[0].copy(), np.empty_like(base), np.empty(experts, np.int64)
    count = replica_moves.serve_changed(
        after, load, order, after.sum(axis=0), base, e, f, found, room, some
    )
    replica_moves.serve(after, load, order, served[1])
    assert (found == served[1]).all()
    assert set(np.flatnonzero((served[0] != served[1]).any(axis=0))) <= set(some[:count].tolist())


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_loads_and_covariances_kept_up_to_date_are_those_from_scratch(seed):
    rng = np.random.default_rng(seed)
    nodes, experts = int(rng.integers(2, 5)), int(rng.integers(2, 9))
    picks = rng.integers(0, 50, (nodes, experts)).astype(float)
    part, of_expert = picks / np.maximum(picks.sum(axis=0), 1e-9), picks.sum(axis=0)
    root = rng.normal(size=(experts, experts))
    cov = root @ root.T
    before = rng.integers(0, nodes, (nodes, experts))
    after = np.where(rng.random(before.shape) < 0.3, rng.integers(0, nodes, before.shape), before)

    def recounted(served):
        here = served == np.arange(nodes)[:, None, None]  # [node, home, expert]
        share = (here * part).sum(axis=1)
        return share @ cov, (here * picks).sum(axis=(1, 2)), np.diag(share @ cov @ share.T)

    near, load, variance = replica_moves._loads_of(cov, of_expert, before, part)
    for found, expected in zip((near, load, variance), recounted(before), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    changed, share = np.empty(experts, np.int64), np.empty((nodes, experts))
    count = replica_moves._rerouted(before, after, part, np.arange(experts), changed, share)
    assert changed[:count].tolist() == np.flatnonzero((before != after).any(axis=0)).tolist()
    replica_moves._loads_after(
        cov, of_expert, near, load.copy(), variance.copy(), changed, share, count, load, variance
    )
    replica_moves._follow(cov, near, changed, share, count)
    for found, expected in zip((near, load, variance), recounted(after), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def made_start(seed):
    rng = np.random.default_rng(seed)
    trace = random_trace(rng, tokens=300, layers=1, experts=8, top_k=2, requests=30, dropped=0)
    return begun(trace, 2, 5, np.zeros(0, dtype=np.int64), 1.0, seed)


def highest_load(start, placed):
    """What the search takes for the load of the busiest node, in picks."""
    load = placed.served_load.sum(axis=1)
    share = placed.served_load / np.maximum(placed.served_load.sum(axis=0), 1e-9)
    variance = np.diag(share @ start.noise.covariance @ share.T)
    spread = start.noise.deviation * np.sqrt(np.maximum(variance, 0))
    return (load[:, None] + spread[:, None] * load_noise.few_draws(len(load))).max(axis=0).mean()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_a_high_price_never_makes_the_nodes_less_level(seed):
    """The level is the search's own measure; it used to be another one, with some slack. [A1]"""
    start = made_start(seed)
    found = replicas.searched(start, 1e6, seed)
    assert highest_load(start, found) <= highest_load(start, replicas.candidate(start, start.held))
    assert (found.held == replicas.searched(start, 1e6, seed).held).all()


@pytest.mark.parametrize("seed", range(5))
def test_a_high_price_buys_level_nodes_with_copies(seed):
    start = made_start(seed)
    cheap, dear = (replicas.searched(start, price, seed) for price in (0.0, 1e6))
    assert dear.imbalance <= min(cheap.imbalance, replicas.candidate(start, start.held).imbalance)
    assert cheap.copies <= dear.copies


def begun(trace, nodes, slots, home, limit, seed):
    """The greedy start from experts in linear order."""
    ids = np.ascontiguousarray(trace.expert_ids[:, 0])
    experts, load = trace.num_experts, trace.load()[0].astype(float)
    tables = coactivation.count_tables(trace)
    noise = load_noise.noise_of(tables.unit_load[0])
    node_of = np.arange(experts) // (experts // nodes)
    return replicas.begin(ids, node_of, load, home, slots, noise, limit, seed)


@CASES
@given(layers())
def test_without_a_price_replicas_never_cost_copies(case):
    trace, nodes, slots, home = case
    start = begun(trace, nodes, slots, home, np.inf, 0)
    node_of = np.arange(trace.num_experts) // (trace.num_experts // nodes)
    before = _recount(trace, node_of == np.arange(nodes)[:, None], home)
    for placed in (replicas.candidate(start, start.held), replicas.searched(start, 0.0, 0)):
        after = _recount(trace, placed.held, home)
        assert after <= before
        before = after


def test_replicas_save_copies_below_the_cap():
    rng = np.random.default_rng(3)
    trace = random_trace(rng, tokens=3000, layers=2, experts=16, top_k=3, dropped=0)
    cluster = ClusterTopology.uniform(num_nodes=4, ranks_per_node=1)
    plain = solve(trace, cluster)
    before = evaluate(trace, plain)
    copies = [before.copies]
    for extra in (4, 8, 16):
        plan = solve(trace, cluster, num_redundant_experts=extra, max_imbalance=1.1)
        costs = evaluate(trace, plan)
        copies.append(costs.copies)
        assert costs.rank_imbalance <= 1.1  # the mean over the layers
        assert costs.per_layer["rank_imbalance"].max() <= 1.2
        assert (costs.per_layer["copies"] < before.per_layer["copies"]).all()
    assert copies == sorted(copies, reverse=True)


def test_redundant_per_layer_gives_slots_to_the_layers_that_save_most(tmp_path):
    """[F2] The total is kept, and the cap; engines with one number of slots are told so."""
    rng = np.random.default_rng(5)
    shape = {"tokens": 1500, "layers": 2, "experts": 16, "top_k": 3, "dropped": 0, "requests": 40}
    trace, flat = random_trace(rng, **shape, skew=0.2), random_trace(rng, **shape, skew=50)
    ids = np.stack([trace.expert_ids[:, 0], flat.expert_ids[:, 0]], axis=1)
    trace = replace(trace, expert_ids=ids)
    cluster = ClusterTopology.uniform(num_nodes=4, ranks_per_node=1)
    options = {"num_redundant_experts": 4}
    equal, plan = (solve(trace, cluster, **options, redundant_per_layer=x) for x in (False, True))
    assert plan.slots_of_layers.sum() == equal.slots_of_layers.sum() == 2 * 20
    assert len(set(plan.slots_of_layers.tolist())) == 2
    assert plan.costs["copies"] < equal.costs["copies"]
    assert plan.provenance["expected_imbalance"] <= plan.provenance["max_imbalance"]
    again = PlacementPlan.read(plan.write(tmp_path / "plan.json"))
    assert again == plan
    assert evaluate(trace, again).copies == plan.costs["copies"]
    alike = r"found a plan with 16 to 24 slots per layer, expected as many in every layer"
    for use in (
        lambda: write_export(plan, tmp_path / "map.json", "sglang", 2),
        lambda: evaluate(trace, plan, rule="sglang"),
        lambda: solve(trace, cluster, start=plan),
    ):
        with pytest.raises(PlacementError, match=alike):
            use()
    for change in ({"method": "eplb"}, {"one_layout": True}, {"num_redundant_experts": 0}):
        with pytest.raises(PlacementError, match="redundant_per_layer: found method"):
            solve(trace, cluster, **options | change, redundant_per_layer=True)
    whole = "found 16 slots per rank for 16 experts, expected at most 15.*at most 44 redundant"
    with pytest.raises(PlacementError, match=whole):
        solve(trace, cluster, num_redundant_experts=48, redundant_per_layer=True)


@pytest.mark.parametrize("ranks_per_node", [1, 2])
@pytest.mark.parametrize("extra", [4, 16])
def test_up_to_as_many_replicas_as_experts(ranks_per_node, extra):
    rng = np.random.default_rng(4)
    trace = random_trace(rng, tokens=400, layers=2, experts=16, top_k=3)
    cluster = ClusterTopology.uniform(num_nodes=2, ranks_per_node=ranks_per_node)
    plan = solve(trace, cluster, num_redundant_experts=extra, seed=1)
    assert plan.to_json() == solve(trace, cluster, num_redundant_experts=extra, seed=1).to_json()
    if extra == 16:  # each node has a slot for every expert
        assert evaluate(trace, plan).copies == 0


def test_index_lists_the_tokens_of_each_expert_by_home():
    ids = np.array([[0, 40], [40, 0], [1, -1], [0, 40], [-1, -1]])
    index = replicas.index_tokens(ids, np.array([1, 1, 0, 0, 1]), 70, 2)
    assert index.words.shape == (4, 5)
    spans = {
        (home, e): (index.first[home, e], index.first[home, e + 1])
        for home in range(2) for e in (0, 1, 40, 69)
    }  # fmt: skip
    weights = {key: int(index.weight[a:b].sum()) for key, (a, b) in spans.items()}
    assert weights == {
        (0, 0): 1, (0, 1): 1, (0, 40): 1, (0, 69): 0,
        (1, 0): 2, (1, 1): 0, (1, 40): 2, (1, 69): 0,
    }  # fmt: skip
    start, stop = spans[1, 0]
    assert (index.words[:, start:stop] == (index.bit[0] | index.bit[40])[:, None]).all()


def _recount(trace, held, home):
    """Copies in plain loops; nodes may hold different numbers of experts."""
    nodes = len(held)
    table = choose_serving_nodes(held.T[None], trace.load()[:1].astype(np.int64))[0]
    total = 0
    for token, picks in enumerate(trace.expert_ids[:, 0]):
        for node in [home[token]] if home.size else range(nodes):
            total += len({table[node, e] for e in picks if e >= 0} - {node})
    return total
