"""The table of targets and the choice of a cap: pure parts of the placement figures."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_locality.placement import evaluate, solve
from tests.unit.placement.cases import random_trace

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from placement_cases import Goal, Parts, asked, cluster
from placement_rows import Row, target_table

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
