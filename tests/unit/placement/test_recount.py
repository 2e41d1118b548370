"""A plan file alone, read by a script that shares nothing with the package, costs what
``evaluate`` says."""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_locality.errors import PlacementError
from moe_locality.placement import PlacementPlan, evaluate, solve
from moe_locality.placement.export import engine_serving_slots
from moe_locality.topology.cluster import ClusterTopology
from tests.unit.placement.cases import plans_with_traces, random_trace
from tests.unit.placement.recount import recount


def check(trace, plan, homes, rule=None):
    text = plan.to_json()
    costs = evaluate(trace, PlacementPlan.from_dict(json.loads(text)), homes=homes, rule=rule)
    home_of_token = None if homes is None else trace.rank.tolist()
    served = None if rule is None else engine_serving_slots(plan, rule) // plan.slots_per_rank
    copies, by_rank, picks, node, rank = recount(
        text, trace.expert_ids.tolist(), home_of_token, served
    )
    if homes is not None:
        assert (costs.total_copies, costs.total_picks) == (copies, picks)
    units = trace.num_tokens * trace.num_layers
    assert costs.copies == pytest.approx(copies / units, rel=1e-9, abs=1e-12)
    assert costs.picks == pytest.approx(picks / units, rel=1e-9, abs=1e-12)
    expected = {"once_per_node": copies, "per_pick": picks, "per_rank": by_rank}
    for transport, total in expected.items():
        some = evaluate(trace, plan, homes=homes, rule=rule, transport=transport)
        assert some.crossing == pytest.approx(total / units, rel=1e-9, abs=1e-12)
    assert costs.per_layer["node_imbalance"] == pytest.approx(np.array(node))
    assert costs.per_layer["rank_imbalance"] == pytest.approx(np.array(rank))


@settings(max_examples=25, deadline=None)
@given(
    plans_with_traces(),
    st.sampled_from([None, "trace"]),
    st.sampled_from([None, "sglang", "in_turn"]),
)
def test_any_plan_costs_what_its_file_says(case, homes, rule):
    """Ranks of a node may go to different nodes under the rules of engines."""
    plan, trace = case
    assume(rule != "sglang" or (plan.slots_of_layers == plan.num_slots).all())  # the engine's map
    check(trace, plan, homes, rule)


def test_evaluate_knows_the_rules_of_engines():
    trace = random_trace(np.random.default_rng(0), tokens=9, layers=1, experts=4, top_k=2)
    with pytest.raises(PlacementError, match="rule: found 'eplb', expected 'home', 'sglang' or"):
        evaluate(trace, PlacementPlan.linear(4, [0], 2, 1), rule="eplb")


@pytest.mark.parametrize("homes", [None, "trace"])
@pytest.mark.parametrize("redundant", [0, 8])
@pytest.mark.parametrize("method", ["coactivation", "eplb"])
def test_a_solved_plan_costs_what_its_file_says(method, redundant, homes):
    rng = np.random.default_rng(0)
    trace = random_trace(
        rng, tokens=150, layers=2, experts=16, top_k=3, requests=20, ranks=8, skew=2
    )
    given_homes = homes if method == "coactivation" else None
    plan = solve(
        trace,
        ClusterTopology.uniform(4, 2),
        method=method,
        num_redundant_experts=redundant,
        homes=given_homes,
        max_imbalance=1.3,
    )
    check(trace, plan, homes)
