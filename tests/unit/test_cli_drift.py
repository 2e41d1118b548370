"""analyze --against and --windows, from end to end."""

import pytest

from moe_locality.analysis.drift import compare
from moe_locality.trace import write_trace
from tests.unit.made_trace import make_trace
from tests.unit.test_cli_flow import CLUSTER, answer, refusal, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An old trace of two domains, a new one of the other two, and a plan from the old one."""
    place = tmp_path_factory.mktemp("drift")
    trace = make_trace(num_requests=120)
    write_trace(trace.filter(domains=["code", "math"]), place / "old.npz")
    write_trace(trace.filter(domains=["chat", "law"]), place / "new")
    answer("place", place / "old.npz", *CLUSTER, "--max-imbalance", 1.05, "-o", place / "plan.json")
    return place


def test_against_another_trace(folder):
    found = answer(
        "analyze", folder / "old.npz", "--against", folder / "new", "--plan", folder / "plan.json"
    )["drift"]
    (entry,) = found["compared"]
    trace = make_trace(num_requests=120)
    expected = compare(
        trace.filter(domains=["code", "math"]), trace.filter(domains=["chat", "law"])
    )
    assert entry["js_bits"] == pytest.approx(expected.js_bits.tolist())
    assert entry["layers_drifted"] == 3
    assert entry["plan"]["copies_new"] > entry["plan"]["copies_old"]
    shown = run(
        "analyze", folder / "old.npz", "--against", folder / "new", "--plan", folder / "plan.json"
    )
    assert "Drift from this trace" in shown.stdout
    assert "copies become" in shown.stdout


def test_windows_of_one_trace(folder):
    found = answer("analyze", folder / "old.npz", "--windows", 3)["drift"]
    assert [entry["name"] for entry in found["compared"]] == ["window 2", "window 3"]
    assert [entry["layers_drifted"] for entry in found["compared"]] == [0, 0]
    assert "drift" not in answer("analyze", folder / "old.npz")


def test_options_that_do_not_go_together(folder):
    both = refusal("analyze", folder / "old.npz", "--against", folder / "new", "--windows", 2)
    assert "one of them" in both["message"]
    alone = refusal("analyze", folder / "old.npz", "--plan", folder / "plan.json")
    assert "--plan alone" in alone["message"]
    many = refusal("analyze", folder / "old.npz", "--windows", 999)
    assert "999 windows" in many["message"]
