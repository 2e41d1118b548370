"""What a trace could save on a cluster, judged on unseen requests."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from typer.testing import CliRunner

from moe_locality.analysis.potential import MIN_SAVING, grouping_ceiling, potential, tradeoff
from moe_locality.cli import app
from moe_locality.errors import TraceError
from moe_locality.placement import PlacementPlan, evaluate, solve
from moe_locality.placement.problem import warnings_once
from moe_locality.report import add_potential, render_html, trace_report
from moe_locality.topology import ClusterTopology
from moe_locality.trace import write_trace
from tests.unit.made_trace import make_trace
from tests.unit.trace.cases import make_load_trace

CLUSTER = ClusterTopology.uniform(num_nodes=4, ranks_per_node=1)


@pytest.fixture(scope="module")
def structured():
    return make_trace(faithful=1.0, num_requests=60)


@pytest.fixture(scope="module")
def found(structured, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "t.npz"
    write_trace(structured, path)
    return potential(structured, CLUSTER, max_imbalance=2.0, trace_name=str(path))


def test_clean_domains_are_found_and_kept_together(found):
    """All picks of a token are of one domain: one node holds them, and it can be the home, as far
    as homes stay level (the domains are not equally long in the judged part).
    """
    levers = {lever.name: lever for lever in found.levers}
    assert levers["placement and homes"].saving > levers["placement"].saving + 0.1
    assert levers["placement"].interval[0] <= levers["placement"].saving
    # linear: two picks on two different nodes mostly; placed: one node, at home in one of four
    expected = 1 - 0.75 / found.copies_linear
    assert levers["placement"].saving == pytest.approx(expected, abs=1e-6)
    assert found.worth_it
    assert found.verdict.startswith("Worth it")
    for lever in found.levers:
        replicas = "replicas" in lever.name
        assert lever.extra_expert_weights == (0.25 if replicas else 0)  # 4 slots for 16 experts
        assert ("--redundant-experts 4" in lever.command) == replicas
        assert lever.ceiling is None or lever.saving <= lever.ceiling + 1e-9
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == json.loads(
        json.dumps(asdict(found))
    )


def test_the_verdict_names_the_command_and_the_memory(found, tmp_path):
    """It said "Worth it: … 4 replicas" without how to get them and what they take [F7]."""
    best = max(found.levers, key=lambda lever: lever.saving)
    assert found.verdict.endswith(f"Make it: {best.command}")
    assert ("It takes +25.0 % memory for expert weights" in found.verdict) == (
        best.extra_expert_weights > 0
    )
    for lever in found.levers:
        out = tmp_path / "plan.json"
        for line in lever.command.replace("plan.json", str(out)).split(" && "):
            words = line.replace("homes.json", str(tmp_path / "homes.json")).split()
            assert words[0] == "moe-locality"
            assert CliRunner().invoke(app, words[1:]).exit_code == 0, line
        plan = PlacementPlan.read(out)
        assert plan.num_redundant_experts / 16 == lever.extra_expert_weights
        assert (tmp_path / "homes.json").exists() or "homes" not in lever.name


def test_what_warns_in_every_solve_is_said_once(structured, caplog):
    """``analyze --nodes`` solves eleven times and said the same seven times [A5]."""
    with warnings_once():
        potential(structured, CLUSTER)
        tradeoff(structured, CLUSTER)
    said = [record for record in caplog.records if "cannot be as level" in record.message]
    assert len(said) == 1
    solve(structured, CLUSTER, max_imbalance=1.05)
    solve(structured, CLUSTER, max_imbalance=1.05)
    said = [record for record in caplog.records if "cannot be as level" in record.message]
    assert len(said) == 3


def test_a_uniform_router_is_not_worth_it():
    """Nothing to learn: what fits one half of the requests says nothing about the other."""
    trace = make_trace(faithful=0.0, num_requests=120, num_experts=32, seed=3)
    verdict = potential(trace, ClusterTopology.uniform(num_nodes=4, ranks_per_node=1))
    placed = {lever.name: lever for lever in verdict.levers}["placement"]
    assert abs(placed.saving) < MIN_SAVING
    assert not placed.interval[0] > MIN_SAVING


def test_one_node_has_nothing_to_save(structured):
    verdict = potential(structured, ClusterTopology.uniform(num_nodes=1, ranks_per_node=4))
    assert not verdict.worth_it
    assert verdict.levers == ()
    assert "nothing to save" in verdict.verdict


def test_what_homes_alone_can_save_is_bounded_by_the_best_home_of_every_token(structured):
    """Against the definition: give every token the best of all homes."""
    plan = PlacementPlan.linear(structured.num_experts, structured.layer_ids, 4, 1)
    best = np.full((structured.num_tokens, structured.num_layers), np.inf)
    node_of = np.arange(structured.num_experts) // 4
    nodes = node_of[structured.expert_ids]
    for home in range(4):
        away = sum((nodes == n).any(axis=2) for n in range(4) if n != home)
        best = np.minimum(best, away)
    anywhere = evaluate(structured, plan, CLUSTER).copies
    expected = 1 - best.mean() / anywhere
    assert grouping_ceiling(structured, plan, CLUSTER) == pytest.approx(expected)


def test_a_looser_cap_never_costs_locality(structured):
    points = tradeoff(structured, CLUSTER, caps=(1.5, 1.01))
    assert [point["max_imbalance"] for point in points] == [1.01, 1.5]
    assert points[1]["copies"] <= points[0]["copies"] + 1e-9
    assert all(point["saving"] <= 1 for point in points)


def test_counts_and_single_requests_are_refused(structured):
    with pytest.raises(TraceError, match="trace of counts"):
        potential(make_load_trace(), CLUSTER)
    with pytest.raises(TraceError, match="at least 2"):
        potential(structured.filter(requests=[0]), CLUSTER)


def test_the_report_says_the_verdict_first(structured, found):
    page = add_potential(
        trace_report(structured), structured, found, tradeoff(structured, CLUSTER, caps=(1.1,)), 0
    )
    html = render_html(page)
    assert found.verdict in page.summary[0]
    assert "placement and homes" in html
    assert "cap 1.1" in html
