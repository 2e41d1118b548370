"""The example language model trained on two nodes, started by DeepSpeed's launcher over pdsh: with
a plan and once per node it learns what it learns with the usual order and every pick by itself, and
the links between the nodes carry the rows that the plan predicts.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks._nodes import ROOT, Nodes
from moe_locality.placement import PlacementPlan, evaluate, solve
from moe_locality.topology import ClusterTopology
from moe_locality.trace import RoutingTrace, read_trace
from tests.tolerances import LOSS

PROGRAM = ROOT / "examples" / "train_lm.py"
CONFIG = ROOT / "configs" / "ds_cpu_demo.json"
LIMIT_S = 240
RTOL, ATOL = LOSS["float32"]
TOPOLOGY = ClusterTopology.uniform(2, 2)

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(2 * LIMIT_S + 60)]


def train(nodes: Nodes, out: Path, *options: str) -> None:
    """Four steps and the evaluation, whose routing alone is recorded."""
    arguments = ["--preset", "tiny", "--layer", "locality", "--deepspeed_config", str(CONFIG)]
    arguments += ["--trace", str(out / "trace"), "--trace-from", "1000", "--out", str(out)]
    done = nodes.finish(nodes.start(PROGRAM, [*arguments, *options]), LIMIT_S)
    assert done.code == 0, done.output[-6000:]
    assert "evaluation loss" in done.output


@pytest.fixture(scope="module")
def runs(two_nodes: Nodes, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("training")
    usual, placed = folder / "usual", folder / "placed"
    train(two_nodes, usual, "--exchange", "flat")
    plan = solve(read_trace(usual / "trace"), TOPOLOGY, seed=0)
    plan.write(folder / "plan.json")
    train(two_nodes, placed, "--exchange", "hierarchical", "--plan", str(folder / "plan.json"))
    return usual, placed


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def rows_sent(out: Path) -> int:
    return read_json(out / "traffic.json")["rows_by_link"]["dispatch"]["cross_node"]


def test_the_losses_are_those_of_the_usual_placement(runs):
    usual, placed = ([json.loads(line) for line in (out / "metrics.jsonl").open()] for out in runs)
    assert [entry.get("step") for entry in placed] == [1, 2, 3, 4, None]
    losses = [[entry["loss"] for entry in run[:4]] for run in (usual, placed)]
    assert losses[0][3] < losses[0][0]
    np.testing.assert_allclose(*losses, rtol=RTOL, atol=ATOL)
    evaluated = [np.load(out / "evaluation.npz") for out in runs]
    assert len(evaluated[0]["loss"]) == 64
    assert (evaluated[0]["request_id"] == evaluated[1]["request_id"]).all()
    mine = [found["loss"] for found in evaluated]
    np.testing.assert_allclose(*mine, rtol=RTOL, atol=ATOL)


def test_the_rows_between_the_nodes_are_the_predicted_ones(runs):
    usual, placed = runs
    trace: RoutingTrace = read_trace(usual / "trace")
    linear = PlacementPlan.linear(trace.num_experts, trace.layer_ids, 2, 2)
    before = evaluate(trace, linear, homes="trace")
    assert rows_sent(usual) == before.total_picks
    plan = PlacementPlan.read(placed.parent / "plan.json")
    assert (plan.physical_to_logical_map != linear.physical_to_logical_map).any()
    after = evaluate(read_trace(placed / "trace"), plan, homes="trace")
    assert rows_sent(placed) == after.total_copies
    assert rows_sent(placed) < rows_sent(usual)
