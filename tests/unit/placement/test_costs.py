from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import PlacementError
from moe_locality.placement.costs import evaluate, ratio_interval, traffic_matrix
from moe_locality.placement.plan import PlacementPlan
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import RoutingTrace
from tests.unit.placement.cases import plans, plans_with_traces, random_plan, random_trace
from tests.unit.placement.recount import server

SCALARS = ("copies", "picks", "link", "node_imbalance", "rank_imbalance", "straggler", "distinct")
SCALARS += ("idle", "crossing")
quick = settings(max_examples=40, deadline=None)


def brute_force(trace, plan, home_of_token):
    """The definitions, token by token."""
    serve, node = server(plan.to_dict()), plan.rank_to_node
    layers, ranks, nodes = plan.num_layers, plan.num_ranks, plan.num_nodes
    copies, picks = [0] * layers, [0] * layers
    sent = np.zeros((layers, nodes, nodes), dtype=int)
    matrix = np.zeros((layers, ranks, ranks), dtype=int)
    for token, home in enumerate(home_of_token):
        for layer in range(layers):
            reached = set()
            for rank in serve(layer, home, trace.expert_ids[token, layer].tolist()):
                if rank is None:
                    continue
                matrix[layer, home, rank] += 1
                if node[rank] != node[home]:
                    picks[layer] += 1
                    reached.add(node[rank])
            copies[layer] += len(reached)
            for other in reached:
                sent[layer, node[home], other] += 1
    return copies, picks, sent, matrix


@quick
@given(plans_with_traces())
def test_costs_with_homes_are_those_of_the_definition(case):
    plan, trace = case
    copies, picks, sent, matrix = brute_force(trace, plan, trace.rank.tolist())
    costs = evaluate(trace, plan, homes="trace", row_bytes=10)
    assert costs.total_copies == sum(copies)
    assert costs.total_picks == sum(picks)
    assert costs.per_layer["copies"] == pytest.approx(np.array(copies) / trace.num_tokens)
    assert costs.per_layer["picks"] == pytest.approx(np.array(picks) / trace.num_tokens)
    busiest = np.maximum(sent.sum(axis=1), sent.sum(axis=2)).max(axis=1)
    assert costs.per_layer["link"].tolist() == (10 * busiest).tolist()
    assert (traffic_matrix(trace, plan, homes="trace", per_layer=True) == matrix).all()
    assert traffic_matrix(trace, plan, homes="trace").sum() == trace.load().sum()
    rank_load = matrix.sum(axis=1)
    node_load = np.stack(
        [rank_load[:, plan.node_of_rank == n].sum(axis=1) for n in range(plan.num_nodes)], axis=1
    )
    for name, load in (("rank_imbalance", rank_load), ("node_imbalance", node_load)):
        mean = load.mean(axis=1)
        expected = np.where(mean > 0, load.max(axis=1) / np.where(mean > 0, mean, 1), 1)
        assert costs.per_layer[name] == pytest.approx(expected)


@quick
@given(plans_with_traces())
def test_costs_without_homes_are_the_mean_over_all_homes(case):
    plan, trace = case
    per_home = [
        evaluate(trace, plan, homes=np.full(trace.num_tokens, home))
        for home in range(plan.num_ranks)
    ]
    costs = evaluate(trace, plan)
    for name in ("copies", "picks"):
        expected = np.mean([c.per_layer[name] for c in per_home], axis=0)
        assert costs.per_layer[name] == pytest.approx(expected)
    matrices = [
        traffic_matrix(trace, plan, homes=np.full(trace.num_tokens, home), per_layer=True)
        for home in range(plan.num_ranks)
    ]
    expected = np.mean(matrices, axis=0)
    assert traffic_matrix(trace, plan, per_layer=True) == pytest.approx(expected)
    assert traffic_matrix(trace, plan).sum() == pytest.approx(trace.load().sum())
    assert (costs.total_copies, costs.total_picks) == (None, None)


@quick
@given(plans_with_traces(), st.integers(1, 12))
def test_batches_with_homes_are_those_of_the_definition(case, batch_tokens):
    plan, trace = case
    costs = evaluate(trace, plan, homes="trace", batch_tokens=batch_tokens)
    size = min(batch_tokens, trace.num_tokens)
    serve = server(plan.to_dict())
    straggler, distinct, idle = [], [], []
    for start in range(0, trace.num_tokens - size + 1, size):
        for layer in range(plan.num_layers):
            load, used = [0] * plan.num_ranks, set()
            for token in range(start, start + size):
                picks = trace.expert_ids[token, layer].tolist()
                ranks = serve(layer, int(trace.rank[token]), picks)
                for expert, rank in zip(picks, ranks, strict=True):
                    if expert >= 0:
                        load[rank] += 1
                        used.add((rank, expert))
            straggler.append(max(load) / (sum(load) / len(load)) if sum(load) else 1)
            distinct.append(len(used) / plan.num_ranks)
            idle.append(load.count(0) / plan.num_ranks)
    assert costs.idle == pytest.approx(np.mean(idle))
    assert costs.straggler == pytest.approx(np.mean(straggler))
    assert costs.distinct == pytest.approx(np.mean(distinct))


def test_expected_distinct_with_replicas_is_the_mean_over_independent_homes():
    # expert 0 on both nodes; 2 tokens pick it: a replica is idle when both homes are elsewhere
    plan = PlacementPlan(
        layer_ids=(0,),
        num_experts=1,
        num_nodes=2,
        ranks_per_node=1,
        physical_to_logical_map=[[0, 0]],
    )
    trace = RoutingTrace(
        model="",
        num_experts=1,
        layer_ids=np.array([0]),
        expert_ids=np.zeros((2, 1, 1), dtype=np.int16),
        request_id=np.zeros(2, dtype=np.int64),
        position=np.arange(2),
    )
    cases = [np.array([a, b]) for a in range(2) for b in range(2)]
    mean = np.mean([evaluate(trace, plan, homes=h).distinct for h in cases])
    assert evaluate(trace, plan).distinct == pytest.approx(mean) == 0.75


@quick
@given(plans_with_traces(replicas=False))
def test_without_replicas_placement_acts_on_copies_alone(case):
    """E[picks] = k(M-1)/M for every placement; E[copies] = E[nodes touched] (M-1)/M."""
    plan, trace = case
    remote = Fraction(plan.num_nodes - 1, plan.num_nodes)
    costs = evaluate(trace, plan)
    picks = [int((trace.expert_ids[:, layer] >= 0).sum()) for layer in range(plan.num_layers)]
    expected = [float(n * remote / trace.num_tokens) for n in picks]
    assert costs.per_layer["picks"] == pytest.approx(expected)
    node_of_expert = plan.node_of_rank[plan.rank_of_slot[plan.serving_slot()[:, 0]]]
    for layer in range(plan.num_layers):
        touched = sum(
            len({int(node_of_expert[layer, e]) for e in row[row >= 0]})
            for row in trace.expert_ids[:, layer]
        )
        exact = float(touched * remote / trace.num_tokens)
        assert costs.per_layer["copies"][layer] == pytest.approx(exact)


@quick
@given(plans_with_traces())
def test_copies_never_exceed_picks_and_one_node_costs_nothing(case):
    plan, trace = case
    for homes in (None, "trace"):
        costs = evaluate(trace, plan, homes=homes)
        assert (costs.per_layer["copies"] <= costs.per_layer["picks"] + 1e-9).all()
        if plan.num_nodes == 1:
            assert costs.copies == costs.picks == costs.link == 0
            assert costs.node_imbalance == 1


@quick
@given(plans_with_traces(replicas=False), st.randoms(use_true_random=False))
def test_renaming_the_nodes_changes_nothing(case, random):
    plan, trace = case
    names = list(range(plan.num_nodes))
    random.shuffle(names)
    renamed = PlacementPlan(
        layer_ids=plan.layer_ids,
        num_experts=plan.num_experts,
        num_nodes=plan.num_nodes,
        ranks_per_node=plan.ranks_per_node,
        physical_to_logical_map=plan.physical_to_logical_map,
        rank_to_node=tuple(names[n] for n in plan.rank_to_node),
    )
    for homes in (None, "trace"):
        before, after = (evaluate(trace, p, homes=homes) for p in (plan, renamed))
        for name in SCALARS:
            assert getattr(before, name) == pytest.approx(getattr(after, name))


def test_more_nodes_than_bits_in_a_byte():
    rng = np.random.default_rng(0)
    plan = random_plan(rng, layers=2, experts=40, nodes=20, ranks_per_node=1, slots_per_rank=3)
    trace = random_trace(rng, tokens=200, layers=2, experts=40, top_k=8, ranks=20)
    copies, picks, _, _ = brute_force(trace, plan, trace.rank.tolist())
    costs = evaluate(trace, plan, homes="trace")
    assert (costs.total_copies, costs.total_picks) == (sum(copies), sum(picks))


def test_chunks_of_tokens_add_up(monkeypatch):
    rng = np.random.default_rng(1)
    plan = random_plan(rng, layers=3, experts=12, nodes=3, ranks_per_node=2, slots_per_rank=3)
    trace = random_trace(rng, tokens=500, layers=3, experts=12, top_k=4, ranks=6)
    whole = [evaluate(trace, plan, homes=h, batch_tokens=64).to_dict() for h in (None, "trace")]
    monkeypatch.setattr("moe_locality.placement.counting.CHUNK_PICKS", 900)
    parts = [evaluate(trace, plan, homes=h, batch_tokens=64).to_dict() for h in (None, "trace")]
    for one, other in zip(whole, parts, strict=True):
        for name in SCALARS:
            assert one[name] == pytest.approx(other[name], rel=1e-12)


@pytest.mark.parametrize("homes", [None, "trace"])
@pytest.mark.parametrize("slots", [4, 5])
def test_compiled_counts_equal_the_plain_ones(monkeypatch, homes, slots):
    rng = np.random.default_rng(8)
    plan = random_plan(rng, layers=3, experts=40, nodes=5, ranks_per_node=2, slots_per_rank=slots)
    trace = random_trace(rng, tokens=300, layers=3, experts=40, top_k=4, ranks=10)
    plain = evaluate(trace, plan, homes=homes, batch_tokens=64).to_dict()
    monkeypatch.setattr("moe_locality.placement.counting.COMPILED_PICKS", 1)
    monkeypatch.setattr("moe_locality.placement.counting.CHUNK_PICKS", 60)  # groups of batches
    found = evaluate(trace, plan, homes=homes, batch_tokens=64).to_dict()
    for name in SCALARS:  # batches are added up in another order, the rest is equal to the last bit
        exact = name not in ("straggler", "distinct", "idle")
        assert found[name] == (plain[name] if exact else pytest.approx(plain[name], rel=1e-12))
        assert found["per_layer"][name] == pytest.approx(plain["per_layer"][name], rel=1e-12)
    assert found["total_copies"] == plain["total_copies"]


def test_compiled_counts_of_more_nodes_than_bits_in_a_byte(monkeypatch):
    rng = np.random.default_rng(9)
    plan = random_plan(rng, layers=2, experts=40, nodes=20, ranks_per_node=1, slots_per_rank=3)
    trace = random_trace(rng, tokens=200, layers=2, experts=40, top_k=8, ranks=20)
    copies, picks, _, _ = brute_force(trace, plan, trace.rank.tolist())
    monkeypatch.setattr("moe_locality.placement.counting.COMPILED_PICKS", 1)
    costs = evaluate(trace, plan, homes="trace")
    assert (costs.total_copies, costs.total_picks) == (sum(copies), sum(picks))


def test_homes_as_a_dict_name_requests():
    rng = np.random.default_rng(2)
    plan = PlacementPlan.linear(8, range(2), 2, 2)
    trace = random_trace(rng, tokens=60, layers=2, experts=8, top_k=2, requests=5)
    homes = {int(q): int(q) % 4 for q in trace.request_ids}
    by_token = np.array([homes[int(q)] for q in trace.request_id])
    assert evaluate(trace, plan, homes=homes).to_dict() == (
        evaluate(trace, plan, homes=by_token).to_dict()
    )
    del homes[int(trace.request_ids[1])]
    with pytest.raises(PlacementError, match="found none for 1 requests"):
        evaluate(trace, plan, homes=homes)


@quick
@given(plans())
def test_move_is_zero_at_home_and_counts_new_slots(plan):
    rng = np.random.default_rng(3)
    trace = random_trace(rng, tokens=5, layers=plan.num_layers, experts=plan.num_experts, top_k=1)
    assert evaluate(trace, plan, baseline=plan).move == 0
    assert np.isnan(evaluate(trace, plan).move)


def test_move_counts_the_slots_that_must_be_fetched():
    trace = random_trace(np.random.default_rng(4), tokens=5, layers=1, experts=4, top_k=1)
    old = PlacementPlan.linear(4, [0], 2, 1)
    new = PlacementPlan(
        layer_ids=(0,),
        num_experts=4,
        num_nodes=2,
        ranks_per_node=1,
        physical_to_logical_map=[[1, 3, 2, 0]],  # 1 and 2 stay on their ranks
    )
    assert evaluate(trace, new, baseline=old).move == 0.5
    assert evaluate(trace, new, baseline=old, expert_bytes=100).move == 200


def test_a_trace_of_counts_gives_balance_alone():
    load = np.array([[[4, 0, 2, 2]], [[0, 0, 4, 4]]])
    trace = RoutingTrace(
        model="", num_experts=4, layer_ids=np.array([0]), expert_load=load, load_top_k=2
    )
    costs = evaluate(trace, PlacementPlan.linear(4, [0], 2, 1))
    assert np.isnan(costs.copies)
    assert costs.to_dict()["copies"] is None
    assert costs.node_imbalance == costs.rank_imbalance == 12 / 8
    assert costs.straggler == (1.0 + 2.0) / 2
    assert costs.distinct == (1.5 + 1.0) / 2
    assert costs.idle == 0.25
    assert np.isnan(costs.crossing)
    assert costs.num_tokens == 8
    with pytest.raises(PlacementError, match="homes for a trace of counts"):
        evaluate(trace, PlacementPlan.linear(4, [0], 2, 1), homes={0: 1})


def test_evaluate_says_what_crosses_nodes_under_each_transport():
    """Nodes {0, 1} and {2, 3}; the token picks the experts of ranks 1, 2 and twice 3, at home on
    rank 0; an all-gather sends it to every node whatever it picks.
    """
    trace = RoutingTrace(
        model="",
        num_experts=8,
        layer_ids=np.array([0]),
        expert_ids=np.array([[[2, 4, 6, 7]]], dtype=np.int16),
        request_id=np.array([0]),
        position=np.array([0]),
        rank=np.array([0], dtype=np.int32),
    )
    plan = PlacementPlan.linear(8, [0], 2, 2)
    crossing = {"once_per_node": 1, "per_pick": 3, "per_rank": 2, "allgather": 1}
    for transport, rows in crossing.items():
        costs = evaluate(trace, plan, homes="trace", transport=transport)
        assert (costs.crossing, costs.transport) == (rows, transport)
        assert costs.idle == 0.25
    with pytest.raises(PlacementError, match="transport: found 'tcp', expected one of once_per"):
        evaluate(trace, plan, transport="tcp")


def test_a_part_of_the_layers_is_matched_by_layer_id():
    rng = np.random.default_rng(5)
    plan = random_plan(rng, layers=3, experts=8, nodes=2, ranks_per_node=1, slots_per_rank=4)
    trace = random_trace(rng, tokens=50, layers=3, experts=8, top_k=2)
    whole, part = evaluate(trace, plan), evaluate(trace.filter(layers=[2, 0]), plan)
    assert part.layer_ids == (2, 0)
    assert part.per_layer["copies"].tolist() == whole.per_layer["copies"][[2, 0]].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topology": ClusterTopology.uniform(4, 1)}, "expected one for the cluster [0, 1, 2, 3]"),
        ({"homes": "trace"}, "found no ranks in the trace"),
        ({"homes": "here"}, "homes: found 'here'"),
        ({"homes": np.array([1])}, "expected integers of shape (20,)"),
        ({"homes": np.full(20, 4)}, "homes: found rank 4, expected 0 to 3"),
        ({"homes": np.full(20, -1)}, "homes: found rank -1"),
        ({"batch_tokens": 0}, "batch_tokens: found 0"),
        ({"plan": PlacementPlan.linear(4, [0, 1], 2, 2)}, "8 experts per layer and a plan with 4"),
        ({"plan": PlacementPlan.linear(8, [0, 7], 2, 2)}, "found layers [1] in the trace that"),
        ({"baseline": PlacementPlan.linear(8, [0], 2, 2)}, "layer ids"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    trace = random_trace(np.random.default_rng(6), tokens=20, layers=2, experts=8, top_k=2)
    arguments = {"plan": PlacementPlan.linear(8, [0, 1], 2, 2), **arguments}
    with pytest.raises(PlacementError) as caught:
        evaluate(trace, **arguments)
    assert message in str(caught.value)


def test_an_empty_trace_is_refused():
    trace = random_trace(np.random.default_rng(7), tokens=2, layers=1, experts=4, top_k=1)
    empty = trace.take(np.zeros(2, dtype=bool))
    with pytest.raises(PlacementError, match="found an empty trace"):
        evaluate(empty, PlacementPlan.linear(4, [0], 2, 1))


def test_ratio_interval_holds_no_negative_ratio():
    """A few requests gave "copies -72.9% (-102.0% to -43.9%)"."""
    low, high = ratio_interval(np.full(5, 4), np.array([0, 0, 0, 0, 4]))
    assert (low, high > 0.2) == (0, True)
