"""Replicas: exact costs of the search, feasible plans, the cap."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_locality.placement import evaluate, solve
from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.plan.serving import choose_serving_nodes
from moe_locality.placement.search import replica_moves as replica_search
from moe_locality.placement.search import replicas
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
        found = replica_search.add_greedily(
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
    best, excess, change = replica_search.anneal(
        *layer.index, layer.load, layer.order, layer.picks, cap, held.copy(), served, sets,
        300, 3.0, 0.1, 1.0, 7,
    )  # fmt: skip
    assert after + change == copies_of(trace, best, home)
    table = choose_serving_nodes(best.T[None], layer.load[None])[0]
    assert excess == replica_search.load_above(table, layer.picks, cap)


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
@given(layers(), st.floats(1, 1.5), st.integers(0, 2**31 - 1))
def test_all_slots_are_used_once_and_loads_are_those_served(case, allowed, seed):
    trace, nodes, slots, home = case
    ids, load = np.ascontiguousarray(trace.expert_ids[:, 0]), trace.load()[0].astype(float)
    node_of = np.arange(trace.num_experts) // (trace.num_experts // nodes)
    cap = load.sum() / nodes * allowed
    arguments = (ids, node_of, load, home, slots, cap, seed)
    placed = replicas.place_with_replicas(*arguments)
    again = replicas.place_with_replicas(*arguments)
    assert placed.nodes == again.nodes
    assert [len(set(members)) for members in placed.nodes] == [slots] * nodes
    assert set().union(*placed.nodes) == set(range(trace.num_experts))
    node_load = placed.served_load.sum(axis=1)
    assert np.maximum(node_load - cap, 0).sum() == pytest.approx(placed.excess)
    held = np.zeros((nodes, trace.num_experts), dtype=bool)
    for row, members in zip(held, placed.nodes, strict=True):
        row[members] = True
    costs = evaluate(trace, plan_of(trace, held), homes="trace" if home.size else None)
    assert costs.node_imbalance == pytest.approx(node_load.max() / node_load.mean())


@CASES
@given(layers())
def test_without_a_cap_replicas_never_cost_copies(case):
    trace, nodes, slots, home = case
    ids, load = np.ascontiguousarray(trace.expert_ids[:, 0]), trace.load()[0].astype(float)
    node_of = np.arange(trace.num_experts) // (trace.num_experts // nodes)
    placed = replicas.place_with_replicas(ids, node_of, load, home, slots, np.inf, 0)
    held = np.zeros((nodes, trace.num_experts), dtype=bool)
    for row, members in zip(held, placed.nodes, strict=True):
        row[members] = True
    before = _recount(trace, node_of == np.arange(nodes)[:, None], home)
    assert _recount(trace, held, home) <= before


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
        assert (costs.per_layer["rank_imbalance"] <= 1.1).all()
        assert (costs.per_layer["copies"] < before.per_layer["copies"]).all()
    assert copies == sorted(copies, reverse=True)


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
