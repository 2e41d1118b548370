import numpy as np
import pytest

from moe_locality.errors import ConfigError
from moe_locality.placement import PlacementPlan, solve
from moe_locality.simulator import StepModel, gain_ends, simulate, sweep
from moe_locality.topology import ClusterTopology
from tests.unit.made_trace import make_trace

TOPOLOGY = ClusterTopology.uniform(4, 1)
MODEL = StepModel(hidden_size=2048, exchange="hierarchical", expert_us=0.1, row_us=0.001)


def linear(trace, topology):
    return PlacementPlan.linear(
        trace.num_experts,
        trace.layer_ids,
        topology.num_nodes,
        topology.ranks_per_node,
        model=trace.model,
    )


def strided(trace, topology):
    """The experts of a domain together: what the made trace asks for."""
    rows = np.arange(trace.num_experts).reshape(-1, topology.num_nodes).T.ravel()
    base = linear(trace, topology)
    return PlacementPlan.from_dict(
        {**base.to_dict(), "physical_to_logical_map": [rows.tolist()] * trace.num_layers}
    )


@pytest.fixture(scope="module")
def case():
    trace = make_trace(num_requests=40)
    return trace, (linear(trace, TOPOLOGY), strided(trace, TOPOLOGY))


def test_gain_grows_where_the_links_across_nodes_are_slow(case):
    trace, plans = case
    rows = sweep("bandwidth", trace, plans, TOPOLOGY, model=MODEL, batch_tokens=64)
    speedups = [row["speedup"] for row in rows]
    assert speedups == sorted(speedups)
    assert speedups[-1] > 1.2
    assert gain_ends(rows) == [row["value"] for row in rows if row["speedup"] >= 1.02]
    assert gain_ends(rows, gain=99) == []
    shares = [row["across_share"] for row in rows]
    assert shares == sorted(shares)


def test_rows_are_those_of_single_simulations(case):
    trace, plans = case
    row = sweep("batch", trace, plans, TOPOLOGY, model=MODEL, values=[16])[0]
    options = {"model": MODEL, "batch_tokens": 16, "max_steps": 32}
    first, second = (simulate(trace, plan, TOPOLOGY, **options) for plan in plans)
    assert row["baseline_us"] == first.step_us
    assert row["plan_us_error"] == second.step_us_error
    assert row["speedup"] == first.step_us / second.step_us


def test_one_pick_moves_less_than_two(case):
    trace, plans = case
    rows = sweep("k", trace, plans, TOPOLOGY, model=MODEL, batch_tokens=64)
    assert [row["value"] for row in rows] == [1, 2]
    assert rows[0]["baseline_us"] < rows[1]["baseline_us"]


def test_nodes_get_plans_of_their_own(case):
    trace, plans = case
    seen = []

    def plans_of(topology):
        seen.append(topology.num_nodes)
        return linear(trace, topology), solve(trace, topology, max_imbalance=1.3)

    rows = sweep("nodes", trace, plans, TOPOLOGY, model=MODEL, values=[1, 4], plans_of=plans_of)
    assert seen == [1, 4]
    assert rows[0]["across_share"] == 0
    assert rows[1]["speedup"] > 1.1
    with pytest.raises(ConfigError, match="found no plans_of"):
        sweep("nodes", trace, plans, TOPOLOGY, values=[2])


@pytest.mark.parametrize(
    ("what", "values", "message"),
    [
        ("weather", None, "expected one of batch, bandwidth, k, nodes"),
        ("k", [3], "found k = 3"),
        ("batch", [0.5], "whole number"),
        ("bandwidth", [0], "the ratio 0"),
    ],
)
def test_impossible_sweeps_are_refused(case, what, values, message):
    trace, plans = case
    with pytest.raises(ConfigError, match=message):
        sweep(what, trace, plans, TOPOLOGY, values=values)
