"""Counts of the simulator against the cost function; times against closed forms."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.placement import PlacementPlan, evaluate
from moe_locality.placement.costs import traffic_matrix
from moe_locality.placement.problem import align_trace
from moe_locality.simulator import StepModel, model, row_bytes, simulate
from moe_locality.simulator.model import count_all, count_rows, expected_maximum
from moe_locality.simulator.simulate import draw_steps, random_homes
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace
from tests.unit.placement.cases import plans_with_traces
from tests.unit.placement.recount import server

FLAT = StepModel(hidden_size=8, exchange="flat")
HIERARCHICAL = StepModel(hidden_size=8, exchange="hierarchical")


@settings(max_examples=60, deadline=None)
@given(plans_with_traces(), st.sampled_from(["bf16", "fp8", "mxfp8", "mxfp4"]))
def test_bytes_are_those_of_the_cost_function(case, payload):
    plan, trace = case
    model = dataclasses.replace(FLAT, payload=payload)
    costs = evaluate(trace, plan, homes="trace")
    flat = simulate(trace, plan, homes="trace", model=model, batch_tokens=2)
    size = row_bytes(payload, 8)
    assert flat.bytes["dispatch"]["cross_node"] == costs.total_picks * size
    assert flat.bytes["combine"]["cross_node"] == costs.total_picks * 16
    once = dataclasses.replace(model, exchange="hierarchical")
    once = simulate(trace, plan, homes="trace", model=once, batch_tokens=2)
    assert once.bytes["dispatch"]["cross_node"] == costs.total_copies * size
    assert once.bytes["combine"]["cross_node"] == costs.total_copies * 16
    assert once.bytes["dispatch"]["cross_node"] <= flat.bytes["dispatch"]["cross_node"]
    # the busiest node of the whole trace, summed over the layers, is bounded by that of each
    link = once.busiest_link["bytes"]
    assert link <= evaluate(trace, plan, homes="trace", row_bytes=size).per_layer["link"].sum()


@settings(max_examples=40, deadline=None)
@given(plans_with_traces())
def test_rows_by_link_are_those_of_the_traffic_matrix(case):
    plan, trace = case
    matrix = traffic_matrix(trace, plan, homes="trace")
    nodes = plan.node_of_rank
    same_node = nodes[:, None] == nodes[None]
    found = count_all(align_trace(trace, plan, None, "trace"), "flat")
    assert found.rows_by_link() == {
        "same_rank": int(np.trace(matrix)),
        "same_node": int(matrix[same_node].sum() - np.trace(matrix)),
        "cross_node": int(matrix[~same_node].sum()),
    }
    off = matrix * ~np.eye(len(matrix), dtype=bool)
    np.testing.assert_array_equal(found.inside_sent.sum(0), (off * same_node).sum(1))
    np.testing.assert_array_equal(found.across_received.sum(0), (off * ~same_node).sum(0))
    np.testing.assert_array_equal(found.computed.sum(0), matrix.sum(0))


@settings(max_examples=30, deadline=None)
@given(plans_with_traces())
def test_hierarchical_rows_by_brute_force(case):
    """Stage one: a row per token and node, over the rail; stage two: a row per pick."""
    plan, trace = case
    serve = server(plan.to_dict())
    nodes = plan.node_of_rank
    members = [np.flatnonzero(nodes == n).tolist() for n in range(plan.num_nodes)]
    expected = np.zeros((plan.num_ranks, plan.num_ranks), int)
    for token in range(trace.num_tokens):
        home = int(trace.rank[token])
        index = members[nodes[home]].index(home)
        for layer in range(trace.num_layers):
            ranks = serve(layer, home, trace.expert_ids[token, layer].tolist())
            ranks = [rank for rank in ranks if rank is not None]
            for node in {int(nodes[r]) for r in ranks}:
                expected[home, members[node][index]] += 1
            for rank in ranks:
                expected[members[nodes[rank]][index], rank] += 1
    same_node = nodes[:, None] == nodes[None]
    found = count_all(align_trace(trace, plan, None, "trace"), "hierarchical")
    assert found.rows_by_link() == {
        "same_rank": int(np.trace(expected)),
        "same_node": int(expected[same_node].sum() - np.trace(expected)),
        "cross_node": int(expected[~same_node].sum()),
    }


@settings(max_examples=20, deadline=None)
@given(plans_with_traces(), st.sampled_from(["flat", "hierarchical"]))
def test_many_ranks_are_counted_alike(case, exchange):
    plan, trace = case
    aligned = align_trace(trace, plan, None, "trace")
    pairs = count_all(aligned, exchange)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "MATRIX_ENTRIES", 0)
        alone = count_all(aligned, exchange)
    for name in model.RowCounts.__slots__:
        np.testing.assert_array_equal(getattr(pairs, name), getattr(alone, name))


@settings(max_examples=20, deadline=None)
@given(plans_with_traces())
def test_counts_of_steps_add_up_and_distinct_is_the_number_of_experts_used(case):
    plan, trace = case
    aligned = align_trace(trace, plan, None, "trace")
    whole = count_rows(aligned, slice(None), "flat")
    parts = [count_rows(aligned, np.array([t]), "flat") for t in range(trace.num_tokens)]
    for name in ("local", "inside_sent", "across_sent", "computed"):
        total = sum(getattr(part, name) for part in parts)
        np.testing.assert_array_equal(getattr(whole, name), total)
    serve = server(plan.to_dict())
    for layer in range(trace.num_layers):
        used = set()
        for token, home in enumerate(trace.rank.tolist()):
            picks = trace.expert_ids[token, layer].tolist()
            used |= {
                (r, e) for r, e in zip(serve(layer, home, picks), picks, strict=True) if e >= 0
            }
        counts = np.bincount([rank for rank, _ in used], minlength=plan.num_ranks)
        np.testing.assert_array_equal(whole.distinct[layer], counts)


# -- closed forms --


def two_nodes(picks, homes, ranks_per_node=1, experts=4):
    """One layer, linear plan, tokens with these picks on these ranks."""
    trace = RoutingTrace(
        model="",
        num_experts=experts,
        layer_ids=[0],
        expert_ids=np.array(picks)[:, None],
        request_id=np.arange(len(picks)),
        position=np.zeros(len(picks), int),
        rank=np.array(homes),
    )
    plan = PlacementPlan.linear(experts, [0], 2, ranks_per_node)
    topology = ClusterTopology.uniform(
        2,
        ranks_per_node,
        intra_node_gbps=100.0,
        inter_node_gbps=10.0,
        intra_node_latency_us=2.0,
        inter_node_latency_us=7.0,
    )
    return trace, plan, topology


def run(case, **options):
    trace, plan, topology = case
    model = {"hidden_size": 1000, "expert_us": 0.0, "row_us": 0.0, **options}
    return simulate(
        trace, plan, topology, "trace", model=StepModel(**model), batch_tokens=trace.num_tokens
    )


def test_one_token_across_two_nodes():
    case = two_nodes([[2, 3]], [0])  # both picks on node 1
    found = run(case)
    # two rows of 2000 bytes at 10 GB/s = 10 000 bytes per us, each way
    assert found.parts_us == pytest.approx({"dispatch": 7.4, "compute": 0.0, "combine": 7.4})
    assert found.tiers_us == pytest.approx({"inside": 0.0, "across": 14.8})
    once = run(case, exchange="hierarchical")
    assert once.step_us == pytest.approx(2 * 7.2)
    assert found.busiest_link == {"node": 0, "direction": "out", "bytes": 4000, "share": 1.0}


def test_one_token_that_stays_home_costs_no_link():
    assert run(two_nodes([[0, 1]], [0])).step_us == 0
    assert run(two_nodes([[0, 1]], [0]), exchange="hierarchical").step_us == 0


def test_flat_tiers_overlap_and_hierarchical_stages_do_not():
    # rank 0 of 4 (2 per node), one expert each: picks on ranks 1 (inside) and 3 (across)
    case = two_nodes([[1, 3]], [0], ranks_per_node=2)
    flat = run(case)
    assert flat.parts_us["dispatch"] == pytest.approx(max(2 + 0.02, 7 + 0.2))
    once = run(case, exchange="hierarchical")
    # across: rank 0 to its rail, rank 2: one row. inside: 0 to 1 and 2 to 3: one row each.
    assert once.parts_us["dispatch"] == pytest.approx((7 + 0.2) + (2 + 0.02))


def test_payload_changes_dispatch_only():
    case = two_nodes([[2, 3]], [0])
    found = run(case, payload="mxfp4")
    assert found.parts_us["dispatch"] == pytest.approx(7 + 2 * (500 + 32) / 10_000)
    assert found.parts_us["combine"] == pytest.approx(7.4)


def test_compute_is_the_slowest_rank():
    case = two_nodes([[2, 3], [2, 0]], [0, 0])
    found = run(case, expert_us=5.0, row_us=0.5)
    assert found.parts_us["compute"] == pytest.approx(2 * 5.0 + 3 * 0.5)


def test_row_bytes():
    assert [row_bytes(p, 7168) for p in ("bf16", "fp8", "mxfp8", "mxfp4")] == [
        14336,
        7168 + 224,
        7168 + 224,
        3584 + 224,
    ]
    assert row_bytes("fp8", 130) == 130 + 8
    with pytest.raises(ConfigError, match="expected one of bf16, fp8, mxfp8, mxfp4"):
        row_bytes("int3", 8)


# -- behaviour --


@settings(max_examples=40, deadline=None)
@given(
    plans_with_traces(),
    st.sampled_from([FLAT, HIERARCHICAL]),
    st.floats(1, 500),
    st.floats(1, 500),
    st.floats(1, 8),
)
def test_more_bandwidth_is_never_slower(case, model, inside, across, factor):
    plan, trace = case

    def step_us(inside, across):
        topology = ClusterTopology(
            rank_to_node=plan.rank_to_node, intra_node_gbps=inside, inter_node_gbps=across
        )
        return simulate(trace, plan, topology, "trace", model=model, batch_tokens=4).step_us

    now = step_us(inside, across)
    assert step_us(inside * factor, across) <= now * (1 + 1e-12)
    assert step_us(inside, across * factor) <= now * (1 + 1e-12)


def test_slower_groups_hold_up_the_step():
    values = np.array([1.0, 2.0, 3.0])
    assert expected_maximum(values, 1) == pytest.approx(2.0)
    assert expected_maximum(values, 2) == pytest.approx((1 * 1 + 2 * 3 + 3 * 5) / 9)
    assert expected_maximum(values, 10**6) == pytest.approx(3.0)


def test_steps_give_every_rank_its_own_tokens():
    home = np.array([0, 0, 1, 0, 1, 3, 0, 0])
    steps = draw_steps(home, 4, 1, 64, 0)
    assert [sorted(step.tolist()) for step in steps] == [[0, 2, 5], [1, 4, 5]]
    assert len(draw_steps(home, 4, 1, 1, 0)) == 1
    for step in draw_steps(np.arange(400) % 4, 4, 10, 5, 0):
        assert np.bincount(step % 4).tolist() == [10] * 4


def test_homes_at_random_are_level_and_follow_the_seed():
    trace, *_ = two_nodes([[0, 1]] * 40, [0] * 40)
    homes = random_homes(trace, 4, 0)
    assert np.bincount(list(homes.values())).tolist() == [10] * 4
    assert homes == random_homes(trace, 4, 0)
    assert homes != random_homes(trace, 4, 1)


def test_share_and_standard_error():
    rng = np.random.default_rng(0)
    picks = rng.random((400, 4)).argsort(axis=1)[:, :2]
    trace, plan, topology = two_nodes(picks, rng.integers(0, 2, 400))
    found = simulate(trace, plan, topology, batch_tokens=10, compute_us=100.0, groups=3)
    assert found.num_steps == 20
    assert 0 < found.step_us_error < found.step_us
    assert found.group_step_us >= found.step_us
    assert found.share == pytest.approx(found.group_step_us / (found.group_step_us + 100))
    assert simulate(trace, plan, topology, batch_tokens=10, max_steps=5).num_steps == 5


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_tokens": 0}, PlacementError, "batch_tokens 0"),
        ({"groups": 0}, PlacementError, "groups: found 0"),
        ({"compute_us": -1.0}, PlacementError, "compute_us: found -1"),
        ({"topology": ClusterTopology.uniform(1, 2)}, PlacementError, "make a plan for this"),
    ],
)
def test_impossible_simulations_are_refused(options, error, message):
    trace, plan, topology = two_nodes([[0, 1]], [0])
    with pytest.raises(error, match=message):
        simulate(trace, plan, **{"topology": topology, "homes": "trace", **options})


@pytest.mark.parametrize(
    "wrong",
    [
        {"payload": "x"},
        {"exchange": "x"},
        {"hidden_size": 0},
        {"ffn_size": 0},
        {"expert_us": -1.0},
        {"row_us": float("nan")},
    ],
)
def test_impossible_models_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        StepModel(**wrong)


def test_a_trace_of_counts_is_refused():
    _, plan, _ = two_nodes([[0, 1]], [0])
    counts = RoutingTrace(
        model="", num_experts=4, layer_ids=[0], expert_load=np.ones((1, 1, 4), int)
    )
    with pytest.raises(PlacementError, match="found a trace of counts"):
        simulate(counts, plan)
