"""Medians, ratios and their intervals, the copies that shares are of, and the contract of peers."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Import a file of benchmarks/ as it imports its neighbors."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_a_median_lies_in_its_interval_and_the_interval_narrows(module):
    intervals = module("_intervals")
    generator = np.random.default_rng(1)
    few, many = (intervals.median(generator.normal(100, 5, n)) for n in (9, 900))
    for found in (few, many):
        assert found.low <= found.value <= found.high
    assert many.high - many.low < few.high - few.low
    same = intervals.median([3.0] * 7)
    assert (same.low, same.value, same.high) == (3, 3, 3)


def test_the_interval_holds_the_truth_about_95_times_in_a_hundred(module):
    intervals = module("_intervals")
    generator = np.random.default_rng(2)
    trials = 200
    found = [intervals.median(generator.normal(10, 1, 25), seed=n) for n in range(trials)]
    held = sum(estimate.low <= 10 <= estimate.high for estimate in found)
    assert 0.88 * trials <= held <= trials


def test_a_ratio_keeps_rounds_together(module):
    """What slows both sides of a round is not noise of the ratio."""
    intervals = module("_intervals")
    weather = np.random.default_rng(3).uniform(1, 9, 15)
    together = intervals.ratio(2 * weather, weather)
    assert together.value == together.low == together.high == 2
    apart = intervals.ratio(2 * weather, weather[::-1])
    assert apart.high - apart.low > 0.5
    with pytest.raises(ValueError, match="one of each side per round"):
        intervals.ratio([1, 2], [1])


def test_a_geometric_mean_of_ratios(module):
    intervals = module("_intervals")
    found = intervals.geometric_mean_ratio([([8.0] * 5, [1.0] * 5), ([2.0] * 5, [1.0] * 5)])
    assert found.value == pytest.approx(4)
    assert found.low == pytest.approx(found.high)
    with pytest.raises(ValueError, match="positive"):
        intervals.geometric_mean_ratio([([0.0], [1.0])])


@pytest.mark.parametrize("change", ["value", "shape", "nan"])
def test_a_peer_that_breaks_the_contract_is_not_timed(module, change):
    cases, peers = module("kernel_cases"), module("kernel_peers")
    case = cases.make_case("small", (5, 8, 3, 2), 0, device="cpu")
    wanted = cases.ours(case, "reference")()

    def make(_):
        out, *rest = wanted
        if change == "value":
            out = out + out.abs().max()
        if change == "nan":
            out = out.clone().fill_(float("nan"))
        return lambda: (out[:, :4] if change == "shape" else out, *rest)

    wrong = peers.Peer(name="wrong", distribution="torch", read_from="0", make=make)
    steps, facts = peers.prepare(wrong, [case], wanted)
    assert steps == []
    assert facts["left_out"].startswith("not comparable: its out")
    right = peers.Peer(
        name="right", distribution="torch", read_from="0", make=lambda _: lambda: wanted
    )
    assert len(peers.prepare(right, [case], wanted)[0]) == 1


def test_absent_peers_say_what_is_missing(module):
    cases, peers = module("kernel_cases"), module("kernel_peers")
    case = cases.make_case("small", (5, 8, 3, 2), 0, device="cpu")

    def make(_):
        return peers.import_alone("a_package_that_nobody_has.kernels")

    gone = peers.Peer(
        name="gone", distribution="a_package_that_nobody_has", read_from="1", make=make
    )
    steps, facts = peers.prepare(gone, [case], cases.ours(case, "reference")())
    assert steps == []
    assert facts["left_out"] == "absent: No module named 'a_package_that_nobody_has'"


def test_a_file_is_imported_without_its_parents(module, tmp_path, monkeypatch):
    peers = module("kernel_peers")
    inner = tmp_path / "outer_of_a_test" / "inner"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").write_text("raise RuntimeError('a large library is missing')\n")
    (inner / "kernels.py").write_text("NUMBER = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert peers.import_alone("outer_of_a_test.inner.kernels").NUMBER == 3
    assert "outer_of_a_test" not in sys.modules
    with peers.hidden("torch"), pytest.raises(ImportError):
        importlib.import_module("torch")
    assert sys.modules["torch"] is torch


def test_reports_compare_like_with_like(module):
    report = module("kernel_report")
    graph = {"captured": True, "samples_us": [1.0], "eager_samples_us": [5.0]}
    launched = {"captured": False, "samples_us": [9.0], "eager_samples_us": [9.0]}
    assert report.comparable(graph, graph) == ([1.0], [1.0])
    assert report.comparable(launched, graph) == ([9.0], [5.0])
