"""Decode replayed from a trace: steps, what they cost, grouping, domains told from prefill."""

import numpy as np
import pytest

from moe_locality.analysis.decoding import (
    FewestExperts,
    classify_domains,
    decode_tokens,
    lockstep,
    step_costs,
)
from moe_locality.demo import paper
from moe_locality.errors import TraceError
from moe_locality.placement import evaluate, solve
from moe_locality.topology import ClusterTopology
from moe_locality.trace import DECODE, PREFILL
from tests.unit.made_trace import make_trace


@pytest.fixture(scope="module")
def trace():
    return make_trace(num_requests=120)


def homes_of(trace, ranks):
    return {int(request): at % ranks for at, request in enumerate(trace.request_ids)}


def test_decode_tokens_are_those_that_no_prediction_has_seen(trace):
    judged = decode_tokens(trace)
    assert set(judged.stage) == {DECODE}
    assert judged.num_rows == (trace.stage == DECODE).sum()
    unknown = trace.evolve(stage=None)
    late = decode_tokens(unknown)
    counts = np.unique(trace.request_id, return_counts=True)[1]
    assert late.num_rows == np.maximum(counts - 32, 0).sum()


def test_lockstep_decodes_every_request_of_a_rank_before_one_again(trace):
    judged = decode_tokens(trace)
    ranks, batch = 4, 3
    homes = homes_of(judged, ranks)
    steps = 2 * judged.num_rows // (ranks * batch)
    rows = lockstep(judged, homes, ranks, max_num_seqs=batch, steps=steps, seed=1)
    assert rows.shape == (steps, ranks, batch)
    for rank in range(ranks):
        of = judged.request_id[rows[:, rank]]  # [steps, batch]
        assert {homes[int(request)] for request in np.unique(of)} == {rank}
        assert all(len(set(step)) == batch for step in of)
        # after the first batch, which starts midway, a request starts at its first token
        starts = [
            int(of[step, place])
            for step in range(1, steps)
            for place in range(batch)
            if judged.position[rows[step, rank, place]]
            == judged.position[judged.request_id == of[step, place]].min()
        ]
        own = sum(home == rank for home in homes.values())
        full = starts[batch * 0 : own - batch]
        assert len(set(full)) == len(full)


def test_step_costs_of_all_rows_are_those_of_evaluate(trace):
    """A step that holds every token costs what ``evaluate`` counts on the whole trace."""
    judged = decode_tokens(trace)
    topology = ClusterTopology.uniform(2, 2)
    plan = solve(judged, topology, homes="joint", num_redundant_experts=4, max_imbalance=2.0)
    order = np.random.default_rng(0).permutation(judged.num_rows)[: judged.num_rows // 4 * 4]
    rows = order.reshape(1, 4, -1)
    home = np.empty(judged.num_rows, dtype=np.int64)
    home[rows.ravel()] = np.repeat(np.arange(4), rows.shape[2])
    kept = judged.take(order)
    costs = evaluate(kept, plan, topology, home[order])
    found = step_costs(judged, plan, topology, rows)
    assert found.copies == pytest.approx(costs.copies * len(order))
    assert found.picks == pytest.approx(costs.picks * len(order))
    assert found.node_imbalance == pytest.approx(costs.node_imbalance)
    assert found.rank_imbalance == pytest.approx(costs.rank_imbalance)
    assert found.largest_copy_message <= found.copies
    assert found.largest_pick_message >= found.picks / 8  # of 8 pairs of ranks across nodes


def test_fewest_experts_chooses_the_request_of_the_running_domain(trace):
    """Each domain of the made trace has experts of its own."""
    choose = FewestExperts(trace, trace, "prefill")
    domain = dict(zip(trace.request_id.tolist(), trace.domain_id.tolist(), strict=True))
    requests = trace.request_ids.tolist()
    one_each = list({domain[r]: r for r in requests}.values())
    for running in one_each:
        like = next(r for r in requests if domain[r] == domain[running] and r != running)
        others = [r for r in one_each if domain[r] != domain[running]]
        assert choose([*others, like], [running]) == len(others)


def test_classify_domains_finds_domains_that_have_experts_of_their_own(trace):
    train, test = trace.split(0.7, seed=0)
    found = classify_domains(train, test)
    assert found.ridge == found.nearest_center == 1
    assert found.num_requests == len(test.request_ids)
    mixed = test.evolve(domain_id=np.roll(test.domain_id, len(test.domain_id) // 2))
    assert classify_domains(train, mixed).ridge < 1
    with pytest.raises(TraceError, match="found 1 domains"):
        classify_domains(train, test, lambda name: "all")


@pytest.mark.parametrize("seed", [0, 1])
def test_paper_on_trace_finds_what_the_trace_was_made_with(monkeypatch, seed):
    """[F17.7] Domains of disjoint experts, nine picks of ten: under a cap that has room for the
    sampling of few requests, placement and homes keep nearly every token on its node.
    """
    monkeypatch.setattr(paper, "MAX_IMBALANCE", 1.2)
    trace = make_trace(num_requests=120, seed=seed)
    found = paper.paper_on_trace(trace, nodes=(2,), seed=seed)
    (one,) = found["replays"]
    cases = {case["name"]: case for case in one["conditions"]}
    linear, ours = cases["linear, random homes"], cases["ours, predicted homes"]
    with_replicas = cases["ours, 12.5% replicas, predicted homes"]
    assert with_replicas["change"]["copies"] < ours["change"]["copies"] < -75
    assert cases["ours, random homes"]["change"]["copies"] < -30
    assert max(case["node_imbalance"] for case in (ours, with_replicas)) <= 1.2
    oracle = cases["ours, oracle homes"]
    gained = linear["copies"] - ours["copies"]
    best = linear["copies"] - oracle["copies"]
    assert one["kept"]["ours"]["of_all"] == pytest.approx(gained / best)
    assert gained / best > 0.95
    assert linear["picks"] == pytest.approx(trace.top_k / 2)
    words = "\n".join(paper.lines(found))
    assert "100.0 % right" in words
    assert [title for title, *_ in paper.tables(found)][-1] == "The paper (arXiv 2604.23150)"


def test_paper_on_trace_leaves_a_collapsed_layer_out(trace):
    ids = trace.expert_ids.copy()
    ids[:, 1, 0], ids[:, 1, 1:] = 0, -1
    bad = trace.evolve(expert_ids=ids, expert_weights=None)
    kept, left_out = paper.without_collapsed(bad)
    assert left_out == [int(trace.layer_ids[1])]
    assert left_out[0] not in kept.layer_ids
    assert paper.without_collapsed(trace) == (trace, [])
    with pytest.raises(TraceError, match="no decode tokens"):
        paper.replay(trace.filter(stages=PREFILL), nodes=2)
