"""The table of targets and the choice of a cap: pure parts of the placement figures."""

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_locality.placement import evaluate, solve
from tests.unit.placement.cases import random_trace

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from _results import append_rows, table_path
from placement_cases import Goal, Parts, asked, cluster
from placement_rows import Row, target_table
from placement_workloads import WORKLOADS, picks_of_step, workload_trace

CELL = ("trace", 4, 0.0)


def row(method="", **changes):
    given = {"case": "case", "metric": "copies_vs_linear", "value": -10.0, "cell": CELL}
    return Row(**{**given, "method": method, "imbalance": 1.05, **changes})


def test_the_table_holds_targets_with_their_verdict_and_the_peers_of_their_cell():
    lines = target_table(
        [
            row(target=-9.0),
            row(target=-11.0, case="missed"),
            row(target=-9.0, holds=False, case="unlevel"),
            row("eplb", value=-4.6, imbalance=1.033),
            row("seed, predicted homes", value=-31.7, imbalance=1.59, cell=("other", 4, 0.0)),
            row("ours"),
        ]
    ).splitlines()
    assert lines[0].split()[-1] == "homes"  # a column for each method that was run
    assert [line.split("  ")[0] for line in lines[1:]] == [
        f"{name}: copies_vs_linear" for name in ("case", "missed", "unlevel")
    ]
    for line, words in zip(lines[1:], ("met", "not met", "not met: balance"), strict=True):
        assert f"  1.0500     {words}" in line
        assert "-4.6 @ 1.033" in line  # of the same cell
        assert "1.590" not in line  # of another one
    assert target_table([row()]) == ""


def test_the_cap_is_asked_for_without_a_look_at_the_judged_requests():
    trace = random_trace(np.random.default_rng(0), tokens=400, layers=2, experts=8, top_k=2)
    data = Parts(name="made", train=trace, test=None)
    goal = Goal(trace="made", nodes=2, label="", target=0, options={}, slack=0.02, cap=None)
    cap = asked(data, goal)
    assert cap > 1.02
    train, test = trace.split(0.7, seed=0)
    level = evaluate(test, solve(train, cluster(2, 8), method="eplb")).node_imbalance
    assert cap == pytest.approx(level + 0.02)
    assert asked(data, replace(goal, most=1.07)) == 1.07
    assert asked(data, replace(goal, cap="auto")) == "auto"


def test_workloads_have_the_published_heat_and_distinct_picks():
    """[F9] Figures of the description at 4 ranks, 128 tokens a rank, two picks."""
    heat = {}
    for name in WORKLOADS:
        ids = workload_trace(name, range(3, 4)).expert_ids[:, 0]
        assert ids.tolist() == picks_of_step(name, 3, 0).tolist()
        assert (ids[:, 0] != ids[:, 1]).all()
        counts = np.bincount(ids.ravel(), minlength=16)
        heat[name] = counts.max() / counts.mean(), counts.std() / counts.mean()
    assert heat["W0_balanced"] == (1, 0)
    for name in ("W1_hot_expert_set", "W2_hot_rank", "W6_rotating_hotspot"):
        assert heat[name] == pytest.approx((3.3, 1.3), rel=0.07)
    assert heat["W5_zero_expert_rank"] == pytest.approx((2.156, 1.007), rel=0.1)
    homes = np.bincount(workload_trace("W4_source_ragged", range(2)).rank)
    assert homes.tolist() == [512, 256, 128, 128]


def test_append_rows_begins_a_line_and_table_path_refuses_a_folder(tmp_path):
    """A row was glued to a last line without an end; a folder failed after an hour's work."""
    one = {
        "benchmark": "b",
        "case": "c",
        "metric": "m",
        "value": 1,
        "unit": "u",
        "kind": "measured",
    }
    path = table_path(str(tmp_path / "rows.csv"))
    append_rows(path, [one])
    path.write_text(path.read_text().rstrip("\n"))
    append_rows(path, [one])
    with path.open(newline="") as file:
        assert [found["benchmark"] for found in csv.DictReader(file)] == ["b", "b"]
    with pytest.raises(argparse.ArgumentTypeError, match="expected a table"):
        table_path(str(tmp_path))
