"""The certificate of ``moe-locality place``: printed, in --json, and in the plan's provenance."""

import json
import signal

import numpy as np
import pytest
from typer.testing import CliRunner

from moe_locality.cli import app
from moe_locality.placement import PlacementPlan
from moe_locality.placement.bounds import lower
from moe_locality.trace import write_trace
from tests.unit.placement.cases import random_trace


@pytest.fixture
def trace(tmp_path):
    found = random_trace(np.random.default_rng(0), tokens=300, layers=2, experts=8, top_k=3)
    write_trace(found, tmp_path / "trace")
    return tmp_path / "trace"


def place(trace, out, *words, code=0):
    line = ["place", str(trace), "--nodes", "2", "--ranks-per-node", "2", "-o", str(out), *words]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == code, result.output
    return result


def test_place_says_how_far_the_plan_is_from_the_bound(trace, tmp_path):
    out = tmp_path / "plan.json"
    payload = json.loads(place(trace, out, "--json", "--bound-seconds", "1").stdout)
    found = payload["certificate"]
    assert 0 < found["bound"] <= found["found"] == pytest.approx(payload["costs"]["copies"])
    assert found["gap"] == pytest.approx(1 - found["bound"] / found["found"], abs=1e-5)
    assert found["homes"] == "uniform"
    assert json.loads(out.read_text())["provenance"]["certificate"] == found
    again = tmp_path / "again.json"
    shown = place(trace, again, "--bound-seconds", "1").stdout
    assert f"{found['bound']:.4f}" in shown
    assert "gap" in shown
    assert again.read_bytes() == out.read_bytes()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--bound-seconds", "0"),
        ("--redundant-experts", "4", "--homes", "joint", "--bound"),
    ],
)
def test_no_certificate_where_there_is_no_bound(trace, tmp_path, words):
    """The bound, most of the time that ``place`` took, was computed unasked [A5]."""
    payload = json.loads(place(trace, tmp_path / "plan.json", "--json", *words).stdout)
    assert payload["certificate"] is None
    shown = place(trace, tmp_path / "plan.json", *words).stdout
    assert ("no bound: there is none" in shown) == ("--bound" in words)


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_ctrl_c_during_the_bound_keeps_the_plan(trace, tmp_path, monkeypatch, as_json):
    """The plan was written after the bound, so that an interrupt lost it [A5]."""
    plain, out = tmp_path / "plain.json", tmp_path / "plan.json"
    place(trace, plain)
    at_signal = []

    def stopped(*args):
        at_signal.append(out.read_bytes())  # written before the bound begins
        signal.raise_signal(signal.SIGINT)
        return lower.coarse_bound(*args), 0

    monkeypatch.setattr(lower, "bound_layer", stopped)
    result = place(trace, out, "--bound", *as_json, code=130)
    assert at_signal[0] == out.read_bytes() == plain.read_bytes()
    assert PlacementPlan.read(out) == PlacementPlan.read(plain)
    words = f"interrupted: {out} is written, without a bound"
    if as_json:
        assert json.loads(result.stdout)["error"]["message"] == words
    else:
        assert words in result.stderr
        assert "node_imbalance" in result.stdout  # the plan was shown before the bound, too


def test_prove_says_how_many_layers_are_proved(trace, tmp_path):
    words = ("--prove", "--max-imbalance", "3", "--bound-seconds", "20")
    shown = place(trace, tmp_path / "plan.json", *words).stdout
    assert "2 of 2 layers are proved to be best" in shown.replace("\n", " ")
    plain = place(trace, tmp_path / "plain.json", "--bound-seconds", "0.1").stdout
    assert "proved" not in plain
