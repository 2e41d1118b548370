"""Comparisons: plans on a trace, run directories, the report of both, and the run in wandb."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moe_locality.commands.output import Result, present, published
from moe_locality.commands.reports import _track
from moe_locality.commands.reports import compare as compare_command
from moe_locality.compare import (
    Candidate,
    Comparison,
    Row,
    compare_plans,
    compare_runs,
    made_from,
    read_run,
    track_comparison,
)
from moe_locality.config import TrackingConfig
from moe_locality.dispatch.transport import KINDS, LINKS
from moe_locality.errors import ConfigError, PlacementError
from moe_locality.figures import LayersData, LossData, TradeoffData, TrafficData
from moe_locality.placement import PlacementPlan, evaluate
from moe_locality.report import comparison_report, render_html, trace_figures, trace_report
from moe_locality.tracking import Tracker, start_tracking
from tests.unit.made_trace import make_trace
from tests.unit.test_tracking import ReadBack, offline  # noqa: F401  a fixture


def plans(trace):
    """The linear plan, and one that puts the experts of a domain on one node (the known answer)."""
    layers = [int(i) for i in trace.layer_ids]
    linear = PlacementPlan.linear(trace.num_experts, layers, 4, 2, model=trace.model)
    order = np.argsort(np.arange(trace.num_experts) % 4, kind="stable")
    table = np.tile(order, (len(layers), 1))
    known = PlacementPlan.from_dict(
        {**linear.to_dict(), "physical_to_logical_map": table.tolist(), "provenance": {}}
    )
    return linear, known


@pytest.fixture(scope="module")
def trace():
    return make_trace()


@pytest.fixture(scope="module")
def found(trace):
    linear, known = plans(trace)
    homes = {int(r): 2 * (int(r) % 4) for r in trace.request_ids}
    return compare_plans(
        trace,
        [
            Candidate(name="linear", plan=linear),
            Candidate(name="by domain", plan=known),
            Candidate(name="by domain", plan=known, homes=homes),
        ],
    )


def test_rows_are_the_costs_of_evaluate(trace, found):
    linear, known = plans(trace)
    homes = {int(r): 2 * (int(r) % 4) for r in trace.request_ids}
    costs = [evaluate(trace, linear), evaluate(trace, known), evaluate(trace, known, homes=homes)]
    assert found.names == ("linear", "by domain", "by domain, homes assigned")
    for row in found.rows:
        assert row.values == tuple(getattr(cost, row.metric) for cost in costs)
        assert row.how == "simulated"
    copies = found.row("copies")
    assert copies.ratios[0] == 1.0
    assert copies.ratios[2] == pytest.approx(costs[2].copies / costs[0].copies)
    assert copies.ratios[2] < 0.25


def test_the_interval_holds_the_ratio_of_many_more_requests():
    big = make_trace(num_requests=2_000, seed=7)
    linear, known = plans(big)
    pair = [Candidate(name="linear", plan=linear), Candidate(name="known", plan=known)]
    truth = compare_plans(big, pair).row("copies").ratios[1]
    hits, widths = 0, []
    for seed in range(20):
        row = compare_plans(make_trace(num_requests=60, seed=seed), pair).row("copies")
        low, high = row.interval
        assert low < row.ratios[1] < high
        hits += low <= truth <= high
        widths.append(high - low)
    assert hits >= 16  # 95 % of 20, with room for chance
    low, high = compare_plans(big, pair).row("copies").interval
    assert high - low < 0.5 * np.mean(widths)


def test_a_plan_against_itself_has_ratio_one_and_no_width(trace):
    linear, _ = plans(trace)
    pair = [Candidate(name="a", plan=linear), Candidate(name="b", plan=linear)]
    row = compare_plans(trace, pair).row("copies")
    assert row.ratios == (1.0, 1.0)
    assert row.interval == pytest.approx((1.0, 1.0))


def test_too_few_requests_give_no_interval(trace):
    linear, known = plans(trace)
    few = trace.filter(requests=[0, 1, 2, 3])
    pair = [Candidate(name="a", plan=linear), Candidate(name="b", plan=known)]
    assert compare_plans(few, pair).row("copies").interval is None


def test_the_traffic_figure_holds_the_copies_of_the_costs(trace, found):
    (figure,) = [f for f in found.figures if isinstance(f, TrafficData)]
    before, after = figure.crossing()
    assert before == pytest.approx(found.row("copies").values[0])
    assert after == pytest.approx(found.row("copies").values[2])
    (layers,) = [f for f in found.figures if isinstance(f, LayersData)]
    assert list(layers.values) == list(found.names)
    (tradeoff,) = [f for f in found.figures if isinstance(f, TradeoffData)]
    assert [p.is_baseline for p in tradeoff.points] == [True, False, False]


def test_names_must_differ(trace):
    linear, known = plans(trace)
    pair = [Candidate(name="a", plan=linear), Candidate(name="a", plan=known)]
    with pytest.raises(PlacementError, match="expected one or more with different names"):
        compare_plans(trace, pair)


def test_in_sample_is_known_for_solved_plans_and_not_for_fixed_ones(trace):
    linear, known = plans(trace)

    def told(method, **source):
        content = known.to_dict()
        content["provenance"] = {"method": method, **source}
        return PlacementPlan.from_dict(content)

    mark = trace.content_hash()
    assert made_from(told("coactivation", trace=mark), trace)
    assert made_from(told("eplb", trace="part of it", drawn_from=mark), trace)
    assert not made_from(told("coactivation", trace="another"), trace)
    assert not made_from(told("round_robin", trace=mark), trace)
    assert not made_from(linear, trace)
    # the rest of a trace of which "part" was not held out
    assert made_from(told("coactivation", trace="whole"), trace, ("whole", "part"))
    assert made_from(told("eplb", trace="?", drawn_from="whole"), trace, ("whole", "part"))
    assert not made_from(told("eplb", trace="part", drawn_from="whole"), trace, ("whole", "part"))
    assert not made_from(told("eplb", trace="another"), trace, ("whole", "part"))
    assert not made_from(told("linear", trace="whole"), trace, ("whole", "part"))


def test_a_ratio_to_nothing_is_not_known():
    row = Row(metric="m", unit="", how="measured", values=(0.0, 2.0))
    assert row.ratios == (None, None)
    assert row.to_dict(("a", "b"))["ratio"] is None
    row = Row(metric="m", unit="", how="measured", values=(None, 2.0))
    assert row.ratios == (None, None)


def test_the_report_of_a_comparison_says_it_in_words(found):
    page = render_html(comparison_report(found, command="moe-locality compare t --plan p"))
    less = 1 - found.row("copies").ratios[2]
    assert f"{less:.1%} fewer copies of tokens cross nodes (predicted)" in page
    assert "moe-locality compare t --plan p" in page
    assert "by domain, homes assigned" in page
    assert "Layer by layer" in page


def test_the_report_of_a_trace_shows_load_and_domains():
    trace = make_trace(num_requests=600)
    data = trace_report(trace, seed=3)
    titles = [figure.title for figure in data.figures]
    assert titles[0] == "Expert load by domain"
    assert titles[1].startswith("How far domains differ")
    assert data.synthetic
    (load, similarity) = data.figures
    assert load.panels == ("early: layer 1", "middle: layer 3", "late: layer 5")
    assert load.ratio.mean(axis=2) == pytest.approx(1, rel=1e-12)
    own = load.ratio[0, load.domains.index("code"), 0::4].mean()
    assert own > 2.5  # the experts of its own domain
    assert np.all(np.diag(similarity.matrix) < similarity.matrix[~np.eye(4, dtype=bool)].min())
    assert similarity.basis.seed == 3
    assert "moe-locality place" in data.next_steps[0]


def test_many_domains_are_cut_and_said():
    import dataclasses

    trace = make_trace(num_requests=26)
    names = tuple(f"topic {i}" for i in range(13))
    trace = dataclasses.replace(
        trace, domain=names, domain_id=(trace.request_id % 13).astype(np.int32)
    )
    from moe_locality.analysis import analyze

    (load, *_) = trace_figures(trace, analyze(trace))
    assert len(load.domains) == 10
    assert "The 10 largest of 13 domains are shown." in load.basis.sentence()


# -- runs ----------------------------------------------------------------------------------------


def traffic(scale: int) -> dict:
    """A traffic report of 4 ranks on 2 nodes, in the layout of dispatch.traffic."""
    rows = (np.arange(16).reshape(4, 4) + 1) * 10
    far = np.arange(4)[:, None] // 2 != np.arange(4)[None] // 2
    rows[far] *= scale
    links = np.where(far, 2, 1)
    np.fill_diagonal(links, 0)
    return {
        "ranks": [0, 1, 2, 3],
        "rows": {kind: rows.tolist() for kind in KINDS},
        "bytes": {kind: (rows * 8).tolist() for kind in KINDS},
        "by_link": {
            kind: {link: int((rows * 8)[links == i].sum()) for i, link in enumerate(LINKS)}
            for kind in KINDS
        },
        "per_layer": [],
    }


def write_run(path, *, scale=2, loss=3.0, plan=None):
    path.mkdir(parents=True)
    lines = [
        {"kind": "step", "step": i + 1, "loss": loss + 1 / (i + 1), "step_s": 0.5 if i < 5 else 0.1}
        for i in range(12)
    ]
    lines.append({"kind": "eval", "eval_loss": loss})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "traffic.json").write_text(json.dumps(traffic(scale)))
    summary = {"seed": 4, "eval_s": 2.0, "eval_loss_by_domain": {"code": loss, "law": loss + 1}}
    (path / "summary.json").write_text(json.dumps(summary))
    rows = {"request_id": np.arange(3), "loss": np.full(3, loss, np.float32)}
    np.savez_compressed(path / "evaluation.npz", **rows)
    if plan is not None:
        plan.write(path / "plan.json")
    return path


def run_plan():
    return PlacementPlan.linear(8, [1, 3], 2, 2, model="m")


def test_two_runs_side_by_side(tmp_path):
    first = read_run(write_run(tmp_path / "baseline", scale=4))
    second = read_run(write_run(tmp_path / "placed", scale=1, plan=run_plan()))
    found = compare_runs(first, second)
    assert found.names == ("baseline", "placed")
    rows = {row.metric: row for row in found.rows}
    assert rows["traffic/cross_node_bytes"].ratios[1] == pytest.approx(0.25)
    far = sum(link["cross_node"] for link in traffic(4)["by_link"].values())
    assert rows["traffic/cross_node_bytes"].values[0] == far
    assert rows["traffic/dispatch_cross_node_bytes"].values[0] == far / 4
    assert rows["quality/eval_loss"].values == (3.0, 3.0)
    assert rows["quality/train_loss"].values[0] == pytest.approx(3 + 1 / 12)
    assert rows["time/step_us"].values == pytest.approx((1e5, 1e5))
    assert rows["load/balancedness"].better == "higher"
    assert all(row.how == "measured" for row in found.rows)
    (matrix,) = [f for f in found.figures if isinstance(f, TrafficData)]
    assert matrix.node_of == (0, 0, 1, 1)
    assert matrix.crossing()[0] * 1e6 == pytest.approx(far / 4)
    (curves,) = [f for f in found.figures if isinstance(f, LossData)]
    assert len(curves.runs["baseline"][0]) == 12
    assert "n = 24 steps; seed 4" in curves.basis.sentence()
    assert found.tables[0].rows == (("code", 3.0, 3.0), ("law", 4.0, 4.0))
    page = render_html(comparison_report(found))
    assert "75.0% fewer bytes cross nodes (measured)" in page
    assert "The held-out loss differs by 0 nats per token." in page


def test_runs_that_differ_in_more_than_the_placement_are_compared_with_a_note(tmp_path):
    """The loss of step 12 stood beside that of step 4 of another cluster, without a word."""
    first, second = (read_run(write_run(tmp_path / name)) for name in ("a", "b"))
    assert not any("differ" in note or "step" in note for note in compare_runs(first, second).notes)
    told = {"cluster": "1 nodes x 2 ranks", "num_ranks": 2, "model": "m"}
    first = replace(first, summary=first.summary | told)
    told = {"cluster": "2 nodes x 1 ranks", "num_ranks": 2, "model": "m"}
    second = replace(second, summary=second.summary | told, steps=second.steps[:4])
    found = compare_runs(first, second)
    assert found.notes[-2:] == (
        "The runs differ in cluster: a has 1 nodes x 2 ranks, b 2 nodes x 1 ranks.",
        "The runs have lines up to step 12 and 4: losses are those of the last step that both "
        "have.",
    )
    (loss,) = [row for row in found.rows if row.metric == "quality/train_loss"]
    assert loss.values == (3 + 1 / 4, 3 + 1 / 4)


def test_what_a_run_lacks_is_left_out_and_said(tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (first / "traffic.json").unlink()
    found = compare_runs(read_run(first), read_run(second))
    assert found.row("traffic/cross_node_bytes") is None
    assert found.row("quality/eval_loss") is not None
    assert "a has no traffic.json; it is left out of the comparison." in found.notes
    assert not [f for f in found.figures if isinstance(f, TrafficData)]


def test_runs_of_the_same_name_stay_apart(tmp_path):
    first = read_run(write_run(tmp_path / "x" / "run"))
    second = read_run(write_run(tmp_path / "y" / "run"))
    assert compare_runs(first, second).names == ("run", "run (2)")


def test_compare_runs_says_why_a_short_run_has_no_lines(tmp_path):
    """A training of fewer steps than tracking.every_n_steps has a summary alone [F6]."""
    short = tmp_path / "short"
    short.mkdir()
    (short / "summary.json").write_text('{"model": "m", "steps": 0}')
    whole = read_run(write_run(tmp_path / "whole"))
    for pair in ((read_run(short), whole), (whole, read_run(short))):
        with pytest.raises(ConfigError, match=r"short ended before .* tracking\.every_n_steps"):
            compare_runs(*pair)


def test_a_crash_may_cut_the_last_line_only(tmp_path, caplog):
    path = write_run(tmp_path / "a")
    log = path / "metrics.jsonl"
    log.write_text(log.read_text() + '{"step": 13, "lo')
    assert len(read_run(path).steps) == 12
    assert "left out the last line" in caplog.text
    log.write_text('{"step": 1, "lo\n' + log.read_text())
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 1 is not JSON"):
        read_run(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("traffic.json", "{", r"cannot read .*traffic\.json"),
        ("summary.json", "[]", "holds a list, expected an object"),
        ("evaluation.npz", "no zip", r"cannot read .*evaluation\.npz"),
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path, name, content, message):
    path = write_run(tmp_path / "a")
    (path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_run(path)


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="found nothing to compare"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="found no directory"):
        read_run(tmp_path / "gone")


def test_a_comparison_in_wandb_is_read_back(offline, tmp_path, found, trace):  # noqa: F811
    plan = tmp_path / "plan.json"
    plans(trace)[1].write(plan)
    settings = offline.model_copy(update={"job_type": "compare"})
    with start_tracking(settings, run_config=found.to_dict()) as tracker:
        track_comparison(tracker, found, files=[plan])
        folder = tracker.directory
    back = ReadBack(folder)
    assert back.of("run")[0].job_type == "compare"
    assert back.of("run")[0].run_group == "exp1"
    tables = [json.loads(p.read_text()) for p in (folder / "files").rglob("*.table.json")]
    by_head = {tuple(table["columns"][:2]): table for table in tables}
    rows = {row[0]: row for row in by_head["metric", "unit"]["data"]}
    assert rows["copies"][3:6] == pytest.approx(list(found.row("copies").values))
    assert len(by_head["plan", "layer"]["data"]) == 3 * 3
    assert len(list((folder / "files").rglob("*.png"))) == len(found.figures)
    assert [a.type for a in back.of("artifact") if a.type == "plan"] == ["plan"]
    (summary,) = [line for line in back.history() if "comparison/copies/ratio" in line]
    assert summary["comparison/copies/ratio"] == pytest.approx(found.row("copies").ratios[2])


def test_tracking_that_is_off_draws_nothing(found, monkeypatch):
    def fail(*_):
        raise AssertionError("drew a figure for nobody")

    monkeypatch.setattr("moe_locality.compare.draw", fail)
    track_comparison(Tracker(), found)


def test_the_command_compares_runs_with_report_and_wandb(offline, tmp_path):  # noqa: F811
    first, second = write_run(tmp_path / "a", scale=3), write_run(tmp_path / "b", scale=1)
    result = compare_command(
        first=first,
        second=second,
        plan=None,
        baseline="linear",
        homes=None,
        nodes=2,
        held_out=0.0,
        report=tmp_path / "r.html",
        seed=0,
        wandb="locality",
        wandb_mode="offline",
        wandb_dir=str(tmp_path / "w"),
        group="exp1",
    )
    assert result.payload["names"] == ["a", "b"]
    assert "Dispatched bytes between ranks" in (tmp_path / "r.html").read_text()
    back = ReadBack(result.then().payload["wandb"])
    assert {a.type for a in back.of("artifact")} >= {"report"}
    assert isinstance(offline, TrackingConfig)


def test_a_comparison_says_what_was_compared(offline, tmp_path, trace):  # noqa: F811
    """wandb got no scalars, no ds_config, no plan and no model of what was compared, and [F10]
    the commit of whatever folder the command was started in.
    """
    made = plans(trace)[1]
    for name in "ab":
        path = write_run(tmp_path / name)
        facts = {"model": "lm", "ds_config": {"zero_optimization": {"stage": 1}}, "commit": name}
        (path / "summary.json").write_text(json.dumps(facts))
    made.write(tmp_path / "b" / "plan.json")
    found = compare_runs(read_run(tmp_path / "a"), read_run(tmp_path / "b"))
    folder = _track(offline, found, [])
    back = ReadBack(folder)
    config = back.config()
    assert config["commit"] == {"a": "a", "b": "b"}
    assert config["compared"]["b"] == {**facts, "plan": made.digest()}
    assert "plan" not in config["compared"]["a"]
    (line,) = [h for h in back.history() if "comparison/traffic/cross_node_bytes/ours" in h]
    row = found.row("traffic/cross_node_bytes")
    assert line["comparison/traffic/cross_node_bytes/ours"] == row.values[1]
    plan_pair = [Candidate(name="linear", plan=plans(trace)[0]), Candidate(name="p", plan=made)]
    sources = compare_plans(trace, plan_pair).sources
    assert (sources["p"]["plan"], sources["p"]["model"]) == (made.digest(), made.model)
    back = ReadBack(_track(offline, compare_plans(trace, plan_pair), []))
    assert back.config()["commit"] is None


def test_without_network_the_comparison_is_printed_and_the_run_is_offline(tmp_path):
    """With a key and without network the command failed after 90 s and printed nothing. [F10]
    Now it prints first, publishes after, and what cannot be published is a warning.
    """
    pair = [str(write_run(tmp_path / name)) for name in "ab"]
    environment = {
        **os.environ,
        **{f"WANDB_{name}_DIR": str(tmp_path / "home") for name in ("CACHE", "DATA", "CONFIG")},
        "WANDB_API_KEY": "0" * 40,
        "WANDB_BASE_URL": "http://127.0.0.1:9",  # the discard port: refused
        "WANDB_INIT_TIMEOUT": "2",
    }
    options = ["--wandb", "p", "--wandb-mode", "online", "--wandb-dir", str(tmp_path / "w")]
    command = [sys.executable, "-m", "moe_locality.cli", "compare", *pair, *options]
    pipes: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    forms = [
        (form, subprocess.Popen([*command, *form], env=environment, **pipes))
        for form in ([], ["--json"])
    ]
    for form, process in forms:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert "wandb could not start an online run" in errors
        if form:
            folder = json.loads(output)["wandb"]
        else:
            table, _, folder = output.rpartition("wandb: ")
            assert "traffic/cross_node_bytes" in table
        assert list(Path(folder.strip()).glob("run-*.wandb"))


def test_what_cannot_be_published_is_a_warning_after_the_result(capfd):
    """Whatever goes wrong while publishing, the result was printed before, and is JSON. [F10]"""
    for error in (RuntimeError("no room"), KeyboardInterrupt()):

        def publish(error=error):
            raise error

        shown = []
        payload = {"rows": [1], "wandb": None}

        def then(payload=payload, publish=publish):
            return published(payload, publish)

        result = Result(payload=payload, show=shown.append, then=then)
        present(result, as_json=False)
        assert len(shown) == 1
        present(result, as_json=True)
        out, err = capfd.readouterr()
        assert json.loads(out) == {"rows": [1], "wandb": None}
        assert err.count("warning: the result could not be published") == 2


def test_nodes_must_divide_the_ranks_of_the_runs(tmp_path):
    from typer.testing import CliRunner

    from moe_locality.cli import app

    pair = [str(write_run(tmp_path / name)) for name in "ab"]
    done = CliRunner().invoke(app, ["compare", *pair, "--nodes", "3"])
    assert done.exit_code == 1
    assert "found 3 nodes for 4 ranks, expected a divisor" in done.stderr


def test_an_empty_comparison_has_no_rows_to_find():
    assert Comparison(names=("a",), rows=()).row("copies") is None
