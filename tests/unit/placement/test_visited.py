"""The search under the rule "visited": what it counts, and what it finds."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import PlacementError
from moe_locality.placement import PlacementPlan, evaluate, solve
from moe_locality.placement.costs import traffic_matrix
from moe_locality.placement.search import load_noise, visited
from moe_locality.placement.serving import check_choices
from moe_locality.placement.solve import AUTO_WORTH
from moe_locality.topology import ClusterTopology
from tests.unit.placement.cases import plans_with_traces, random_trace

CASES = settings(max_examples=40, deadline=None)


@CASES
@given(plans_with_traces(rules=("visited",)))
def test_visited_never_copies_more_than_home(case):
    """With the same preferred nodes, whatever the token: its nodes are visited there too."""
    plan, trace = case
    plan = replace(plan, serving_nodes=None)
    for homes in (None, "trace"):
        near = evaluate(trace, plan, homes=homes).per_layer["copies"]
        table = evaluate(trace, plan, homes=homes, rule="home").per_layer["copies"]
        assert (near <= table + 1e-9).all()


@CASES
@given(plans_with_traces(rules=("visited",)), st.booleans())
def test_served_visited_counts_what_evaluate_counts(case, at_home):
    plan, trace = case
    homes = "trace" if at_home else None
    costs = evaluate(trace, plan, homes=homes)
    home = plan.node_of_rank[trace.rank] if at_home else np.zeros(0, np.int64)
    onto = plan.node_of_rank[:, None] == np.arange(plan.num_nodes)
    matrix = traffic_matrix(trace, plan, homes=homes, per_layer=True)
    for layer in range(plan.num_layers):
        ids, load = trace.expert_ids[:, layer], trace.load()[layer].astype(float)
        tokens = visited.distinct_tokens(ids, home, plan.num_experts, 0)
        found = visited.served_visited(
            tokens, load, load_noise.no_noise(plan.num_experts),
            plan.held_by_node[layer].T, plan.node_choices()[layer],
        )  # fmt: skip
        assert found.copies == pytest.approx(costs.per_layer["copies"][layer])
        by_node = (matrix[layer].sum(axis=0) @ onto).tolist()
        assert found.served_load.sum(axis=1).tolist() == pytest.approx(by_node)


@pytest.mark.parametrize("at_home", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_anneal_visited_costs_no_more_than_its_start(seed, at_home):
    """Costs are followed by what changes; a count from scratch says what they are."""
    rng = np.random.default_rng(seed)
    trace = random_trace(rng, tokens=400, layers=1, experts=10, top_k=3, skew=1)
    held = rng.random((3, 10)) < 0.3
    held[rng.integers(0, 3, 10), np.arange(10)] = True
    home = rng.integers(0, 3, 400) if at_home else np.zeros(0, np.int64)
    tokens = visited.distinct_tokens(trace.expert_ids[:, 0], home, 10, 0)
    lists = visited.all_holders(held, np.broadcast_to(held.argmax(axis=0), (3, 10)))
    price, flat = 0.5, np.zeros((3, 1))

    def cost(choices):
        args = (tokens.ids, tokens.weight, tokens.home, choices, 3)
        copies, served = visited.count_served(*args)
        return copies + price * served.sum(axis=1).max()

    before = cost(lists)
    found, choices = visited.anneal_visited(
        *tokens.arrays, held.copy(), lists.copy(), 600, 20.0, 0.1, price, 1e9, np.zeros(3), flat,
        0.3, seed,
    )  # fmt: skip
    assert cost(choices) < before
    assert (found.sum(axis=1) == held.sum(axis=1)).all()
    assert found.any(axis=0).all()
    check_choices(choices[None], found.T[None])


@pytest.mark.parametrize(
    "homes", [None, *(pytest.param(homes, marks=pytest.mark.slow) for homes in ("trace", "joint"))]
)
def test_solve_with_replicas_serves_by_visits_as_level_as_promised(homes):
    rng, layers = np.random.default_rng(4), 2 if homes == "joint" else 1
    trace = random_trace(
        rng, tokens=600, layers=layers, experts=16, top_k=4, requests=30, ranks=8, skew=2
    )
    options = {"num_redundant_experts": 8, "max_imbalance": 1.3, "homes": homes}
    topology = ClusterTopology.uniform(4, 2)
    plan = solve(trace, topology, **options)
    assert plan.serving_rule == "visited"
    assert plan.provenance["expected_imbalance"] <= 1.3 + 1e-6
    assert solve(trace, topology, **options).to_json() == plan.to_json()
    assert PlacementPlan.from_dict(json.loads(plan.to_json())) == plan
    assert solve(trace, topology, **options | {"serving_rule": "home"}).serving_rule == "home"


def test_solve_searches_for_visited_only_where_it_can():
    rng = np.random.default_rng(2)
    trace = random_trace(rng, tokens=60, layers=1, experts=8, top_k=2, requests=10)
    topology = ClusterTopology.uniform(2, 2)
    assert solve(trace, topology).serving_rule == "home"  # without replicas nothing is to choose
    eplb = solve(trace, topology, method="eplb", num_redundant_experts=4)
    assert eplb.serving_rule == "home"
    with pytest.raises(PlacementError, match="serving_rule: found 'nearest'"):
        solve(trace, topology, serving_rule="nearest")
    for change in ({"method": "eplb"}, {"one_layout": True}, {"expert_groups": 4}):
        with pytest.raises(PlacementError, match="found 'visited', expected 'home' or none"):
            solve(trace, topology, serving_rule="visited", **change)


def test_a_cap_that_is_found_is_spent_on_replicas_only_as_far_as_it_pays():
    trace = random_trace(np.random.default_rng(0), tokens=1500, layers=2, experts=16, top_k=2)
    topology = ClusterTopology.uniform(4, 1)
    found, free = (
        solve(trace, topology, num_redundant_experts=4, max_imbalance=cap)
        for cap in ("auto", "auto+0.08")
    )
    linear = solve(trace, topology, method="linear").costs["copies"]
    levels = [plan.provenance["expected_imbalance"] for plan in (found, free)]
    assert levels[0] < levels[1] - 0.03
    saved = (found.costs["copies"] - free.costs["copies"]) / linear
    assert saved < AUTO_WORTH * (levels[1] - levels[0])  # what the rest of the cap would bring


def test_replicas_save_copies_where_the_usual_order_is_level():
    """[F9] Four hot experts, one on each node: the cap that is found is as tight as that."""
    rng = np.random.default_rng(0)
    likely = np.where(np.arange(16) % 4 == 0, np.log(14.0), 0.0)
    picked = np.argsort(-(likely + rng.gumbel(size=(8000, 16))), axis=1)[:, :2]
    trace = random_trace(rng, tokens=8000, layers=1, experts=16, top_k=2, requests=250)
    trace = replace(trace, expert_ids=picked[:, None].astype(np.int16))
    topology = ClusterTopology.uniform(4, 1)
    plan = solve(trace, topology, num_redundant_experts=4)
    assert plan.provenance["expected_imbalance"] <= plan.provenance["max_imbalance"] < 1.08
    eplb = solve(trace, topology, method="eplb", num_redundant_experts=4)
    assert plan.costs["copies"] < eplb.costs["copies"]
