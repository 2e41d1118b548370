"""The main job from end to end on the smallest model: real launcher, real ranks, real files."""

import json
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import wandb

from moe_locality.compare import read_run
from moe_locality.demo import launch, run_demo
from moe_locality.demo.checks import check_agreement, check_prediction
from moe_locality.demo.model import read_recorded
from moe_locality.errors import MoeLocalityError
from moe_locality.placement import PlacementPlan, evaluate
from moe_locality.topology import ClusterTopology
from moe_locality.trace import PREFILL, TRAIN, read_trace, write_trace
from tests.fork_launcher import forked_command
from tests.unit.test_tracking import ReadBack


def run_tiny(out, *launched):
    """Run the demo; the first of its four runs are started by ``launched``, the others forked."""
    commands = iter(launched)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "launch_command", lambda *line: next(commands, forked_command)(*line))
        return run_demo(out=out, preset="tiny", steps=8, quiet=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The four runs are forked; tests/distributed/test_faults.py starts one as the demo does."""
    out = tmp_path_factory.mktemp("demo")
    return out, run_tiny(out)


@pytest.mark.slow
def test_ranks_of_deepspeeds_launcher_agree_with_forked_ones(tmp_path):
    found = run_tiny(tmp_path, launch.launch_command)
    assert "deepspeed.launcher" in (tmp_path / "record" / "log.txt").read_text()
    assert found["max_loss_difference"] < 1e-4


def test_bytes_are_predicted_exactly_and_fewer(demo):
    _, found = demo
    for check in found["prediction_check"].values():
        assert check["predicted_rows"] == check["counted_rows"] > 0
        assert check["counted_bytes"] == check["counted_rows"] * 32 * 4  # width, fp32
    sizes = found["cross_node_dispatch_bytes"]
    assert sizes["once_per_node"] < sizes["placed"] < sizes["linear"]


def test_counted_balance_is_the_predicted_one(demo):
    out, found = demo
    _, held_out = read_recorded(out / "record")
    homes = {int(k): v for k, v in json.loads((out / "homes.json").read_text()).items()}
    plan, cluster = PlacementPlan.read(out / "plan.json"), ClusterTopology.uniform(2, 2)
    costs = evaluate(held_out, plan, cluster, homes)
    assert found["node_imbalance"]["placed"] == pytest.approx(costs.node_imbalance, rel=1e-12)
    assert found["rank_imbalance"]["placed"] == pytest.approx(costs.rank_imbalance, rel=1e-12)


def test_placement_changes_nothing_that_is_computed(demo):
    out, found = demo
    assert found["max_loss_difference"] < 1e-4
    assert found["max_train_loss_difference"] < 1e-4
    plan = PlacementPlan.read(out / "plan.json")
    assert (plan.physical_to_logical_map != np.arange(plan.num_experts)).any()
    for compared in found["flips"].values():
        assert compared["near_ties"] <= compared["flips"] <= 0.01 * compared["pairs"]
    assert found["flips"]["placed"]["train_steps"] == 6
    assert found["flips"]["placed"]["pairs"] == (64 + 6 * 16) * 64 * 2  # token, layer


def test_the_cap_is_kept_by_a_plan_of_the_trained_router(demo):
    """The plan was made from steps in which the router still moved, and broke its cap. [A2]"""
    out, found = demo
    seen, held_out = read_recorded(out / "record")
    trace = read_trace(out / "record" / "trace")
    assert set(seen.request_ids) == set(trace.filter(stages=[TRAIN]).request_ids)
    assert not set(seen.request_ids) & set(held_out.request_ids)
    plan = PlacementPlan.read(out / "plan.json")
    assert plan.provenance["trace"] == seen.content_hash()
    balance = found["balance"]
    assert balance["counted"] == found["node_imbalance"]["placed"]
    assert balance["kept"]
    assert balance["counted"] <= max(balance["cap"], balance["usual_order"])


def test_everything_is_written(demo):
    out, found = demo
    trace = read_trace(out / "record" / "trace")
    assert {TRAIN, PREFILL} == set(np.unique(trace.stage))
    page = (out / "report.html").read_text(encoding="utf-8")
    HTMLParser().feed(page)
    assert page.count("<svg") >= 4
    assert "src=" not in page
    assert len(list(out.glob("wandb/offline-run-*/run-*.wandb"))) == 4
    json.dumps(found)


def test_curves_in_wandb_run_over_the_tokens(demo):
    """Every step was logged at 0 tokens, the x axis: curves were one vertical line. [F10]"""
    out, _ = demo
    wandb.teardown()
    tokens = {}
    for path in out.glob("wandb/offline-run-*"):
        found = ReadBack(path)
        steps = [line["tokens"] for line in found.history() if "quality/loss" in line]
        tokens[found.of("run")[0].display_name] = steps
    for name in ("linear", "placed", "once_per_node"):
        assert tokens[name] == [16 * 64 * step for step in range(1, 7)]


def test_a_wrong_counter_and_a_different_model_are_seen(demo):
    out, _ = demo
    linear, placed = read_run(out / "linear"), read_run(out / "placed")
    plan = PlacementPlan.read(out / "plan.json")
    _, held_out = read_recorded(out / "record")
    cluster = ClusterTopology.uniform(2, 2)
    placed.traffic["rows_by_link"]["dispatch"]["cross_node"] += 1
    with pytest.raises(MoeLocalityError, match="the prediction from the recorded trace is"):
        check_prediction(placed, held_out, plan, cluster, "picks")
    placed.traffic["rows_by_link"]["dispatch"]["cross_node"] -= 1
    check_prediction(placed, held_out, plan, cluster, "picks")
    with pytest.raises(MoeLocalityError, match="the prediction from the recorded trace is"):
        check_prediction(placed, held_out, plan, cluster, "copies")
    placed.evaluation["loss"] = placed.evaluation["loss"] + 0.01
    with pytest.raises(MoeLocalityError, match="must not change what the model computes"):
        check_agreement(linear, placed)


@pytest.mark.slow
def test_a_recorded_trace_through_the_command_line(routing_data, tmp_path):
    whole = read_trace(routing_data / "gpt_oss_20b_benchmarks.npz")
    trace = tmp_path / "trace.npz"
    write_trace(whole.select_layers(whole.layer_ids[::12]), trace)  # 2 of 24
    line = ["demo", "--trace", str(trace), "--nodes", "4", "--ranks-per-node", "2", "--json"]
    code = "from moe_locality.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, *line, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout)
    copies = next(row for row in found["rows"] if row["metric"] == "copies")
    assert copies["how"] == "simulated"
    assert copies["ratio"] < 0.8
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
