"""The table of targets and the choice of a cap: pure parts of the placement figures."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from placement_cases import best_cap
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


@pytest.mark.parametrize(("edge", "expected"), [(1.0, 1.05), (1.05, 1.05), (1.07, 1.06), (2, 1.08)])
def test_the_cap_with_the_fewest_copies_that_keeps_the_limit_is_chosen(edge, expected):
    def costs_of(cap):
        return SimpleNamespace(node_imbalance=1.04 if cap <= edge else 1.1, copies=2 - cap)

    goal = SimpleNamespace(limit="node_imbalance", metric="copies_vs_linear")
    cap, _ = best_cap(costs_of, goal, (1.05, 1.06, 1.08), 1.05)
    assert cap == expected
