"""The commands from end to end, on a synthetic trace with a known structure and on a real one."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moe_locality.cli import app
from moe_locality.placement import PlacementPlan, evaluate
from moe_locality.trace import read_trace, write_trace
from tests.unit.made_trace import DOMAINS, make_trace

CLUSTER = ("--nodes", "4", "--ranks-per-node", "2")
LOOSE = (*CLUSTER, "--max-imbalance", "2")  # so few requests differ: domains stay whole


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def answer(*words):
    """The JSON object of a command that must succeed."""
    found = run(*words, "--json")
    assert found.exit_code == 0, found.stdout + found.stderr
    (line,) = found.stdout.splitlines()
    return json.loads(line)


def refusal(*words, code=1):
    """The error of a command that must fail with ``code``; also told in one line without --json."""
    found = run(*words, "--json")
    assert found.exit_code == code, found.stdout + found.stderr
    error = json.loads(found.stdout)["error"]
    plain = run(*words)
    assert plain.exit_code == code
    assert plain.stdout == ""
    assert error["message"] in plain.stderr
    assert "Traceback" not in plain.stderr
    return error


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trace file, and a plan made from it on 4 nodes x 2 ranks."""
    folder = tmp_path_factory.mktemp("flow")
    write_trace(make_trace(), folder / "trace.npz")
    placed = answer("place", folder / "trace.npz", *LOOSE, "-o", folder / "plan.json")
    return folder, placed


def test_place_finds_the_structure_and_says_so(made):
    folder, placed = made
    plan = PlacementPlan.read(folder / "plan.json")
    assert (plan.num_nodes, plan.ranks_per_node, plan.num_experts) == (4, 2, 16)
    assert placed["digest"] == plan.digest()
    assert placed["costs"]["copies"] < 0.75 * placed["linear"]["copies"]
    assert placed["costs"]["node_imbalance"] < 1.3
    node_of = plan.node_of_rank[plan.rank_of_slot]
    for row in plan.physical_to_logical_map:
        for node in range(4):
            assert len(set(row[node_of == node] % len(DOMAINS))) == 1


def test_the_same_seed_gives_the_same_plan_byte_for_byte(made, tmp_path):
    folder, placed = made
    again = answer("place", folder / "trace.npz", *LOOSE, "-o", tmp_path / "p.json")
    assert (tmp_path / "p.json").read_bytes() == (folder / "plan.json").read_bytes()
    assert again["digest"] == placed["digest"]


def test_evaluate_agrees_with_place_and_knows_in_sample(made):
    folder, placed = made
    found = answer("evaluate", folder / "trace.npz", "--plan", folder / "plan.json")
    for name in ("copies", "picks", "node_imbalance", "rank_imbalance"):
        assert found[name] == pytest.approx(placed["costs"][name], rel=1e-12)
    assert found["in_sample"] is True
    assert found["num_tokens"] == 960
    assert len(found["per_layer"]["copies"]) == 3
    assert found["linear"]["copies"] == pytest.approx(placed["linear"]["copies"])


def test_group_predicts_from_what_the_trace_holds(made, tmp_path):
    """Without --predict it asked for a prefill that traces of a training do not have [F5]"""
    folder, homes = made[0], tmp_path / "homes.json"
    trace = dataclasses.replace(read_trace(folder / "trace.npz"), stage=None)
    write_trace(trace, tmp_path / "trained")
    words = ("--plan", folder / "plan.json", "-o", homes)
    assert answer("group", tmp_path / "trained", *words)["predict"] == "first:32"
    assert answer("group", folder / "trace.npz", *words)["predict"] == "prefill"


def test_evaluate_a_plan_made_from_all_requests_is_in_sample_on_some_of_them(made, tmp_path):
    """The part that was held out has another content hash than the trace: it passed for unseen."""
    trace, plan = made[0] / "trace.npz", tmp_path / "plan.json"
    some = ("--held-out", "0.3")
    assert answer("evaluate", trace, "--plan", made[0] / "plan.json", *some)["in_sample"] is True
    answer("place", trace, *LOOSE, *some, "-o", plan)
    assert answer("evaluate", trace, "--plan", plan, *some)["in_sample"] is False
    assert answer("evaluate", trace, "--plan", plan, *some, "--seed", 1)["in_sample"] is True
    compared = answer("compare", trace, "--plan", plan, *some, "--seed", 1)
    assert any("Made from these same requests" in note for note in compared["notes"])


def test_group_then_evaluate_brings_tokens_home(made, tmp_path):
    folder, _ = made
    trace, plan, homes = folder / "trace.npz", folder / "plan.json", tmp_path / "homes.json"
    costs = {}
    for predict in ("prefill", "first:3", "oracle"):
        grouped = answer("group", trace, "--plan", plan, "--predict", predict, "-o", homes)
        content = json.loads(homes.read_text())
        assert sorted(map(int, content)) == list(range(80))
        assert set(content.values()) <= set(range(8))
        assert grouped["requests_per_rank"] == [10] * 8
        found = answer("evaluate", trace, "--plan", plan, "--homes", homes)
        assert found["copies"] == pytest.approx(grouped["costs"]["copies"])
        costs[predict] = found["copies"]
        assert isinstance(found["total_copies"], int)
        assert found["total_copies"] / (960 * 3) == pytest.approx(found["copies"])
    uniform = answer("evaluate", trace, "--plan", plan)["copies"]
    # A domain has another node in every layer: only a joint plan lines them up, see below.
    assert costs["oracle"] <= costs["prefill"] < uniform


def test_joint_homes_and_held_out_requests(made, tmp_path):
    folder, _ = made
    plan = tmp_path / "joint.json"
    found = answer(
        *("place", folder / "trace.npz", *LOOSE, "--homes", "joint", "--held-out", "0.3"),
        *("-o", plan),
    )
    assert found["held_out_homes"] == "prefill"
    assert found["held_out"]["copies"] < 0.5 * found["linear"]["copies"]
    assert found["held_out"]["num_tokens"] == 24 * 12
    assert found["costs"]["num_tokens"] == 56 * 12
    provenance = json.loads(plan.read_text())["provenance"]
    assert provenance["held_out"] == 0.3
    assert provenance["drawn_from"] == read_trace(folder / "trace.npz").content_hash()
    all_of_it = answer("evaluate", folder / "trace.npz", "--plan", plan)
    assert all_of_it["in_sample"] is True
    unseen = answer("evaluate", folder / "trace.npz", "--plan", plan, "--held-out", "0.3")
    assert unseen["in_sample"] is False
    assert unseen["num_tokens"] == 24 * 12


def test_import_then_analyze_gives_the_same_as_the_npz(made, tmp_path):
    folder, _ = made
    imported = answer("import", folder / "trace.npz", "--out", tmp_path / "t")
    assert imported["requests"] == 80
    assert list((tmp_path / "t").glob("*.parquet"))
    first = answer("analyze", folder / "trace.npz")
    second = answer("analyze", tmp_path / "t", "--report", tmp_path / "a.html")
    assert first["trace"]["content_hash"] == second["trace"]["content_hash"]
    assert first["load"] == second["load"]
    text = (tmp_path / "a.html").read_text()
    assert "Routing of synthetic/strided" in text
    assert "(synthetic trace)" in text


def test_compare_plans_with_report(made, tmp_path):
    folder, placed = made
    page = tmp_path / "c.html"
    found = answer(
        "compare", folder / "trace.npz", "--plan", folder / "plan.json", "--report", page
    )
    assert found["names"] == ["linear", "plan"]
    rows = {row["metric"]: row for row in found["rows"]}
    copies = rows["copies"]
    assert copies["ours"] == pytest.approx(placed["costs"]["copies"])
    assert copies["ratio"] == pytest.approx(copies["ours"] / copies["baseline"])
    assert copies["interval"][0] < copies["ratio"] < copies["interval"][1]
    assert copies["how"] == "simulated"
    assert any("In-sample" in note for note in found["notes"])
    text = page.read_text()
    assert "Simulated (predicted by replaying the trace) on a synthetic trace" in text
    plain = run("compare", folder / "trace.npz", "--plan", folder / "plan.json")
    assert "Side by side" in plain.stdout
    assert "95 % interval" in plain.stdout


def test_report_holds_trace_and_plans(made, tmp_path):
    folder, _ = made
    trace, plan, homes = folder / "trace.npz", folder / "plan.json", tmp_path / "homes.json"
    answer("group", trace, "--plan", plan, "-o", homes)
    page = tmp_path / "new" / "r.html"
    found = answer(
        *("report", trace, "--plan", plan, "--homes", homes, "--method", "eplb", "-o", page)
    )
    assert found["comparison"]["names"] == [
        "linear",
        "eplb (solved here)",
        "plan",
        "plan, homes assigned",
    ]
    assert found["bytes"] == page.stat().st_size
    assert len(found["figures"]) >= 4
    assert "http" not in page.read_text()


def test_bench_times_the_methods(made):
    folder, _ = made
    found = answer("bench", folder / "trace.npz", *LOOSE)
    rows = {row["method"]: row for row in found["rows"]}
    assert next(iter(rows)) == "linear"
    assert set(rows) == {"linear", "round_robin", "eplb", "coactivation"}
    assert rows["coactivation"]["copies"] == min(row["copies"] for row in rows.values())
    assert all(row["seconds"] > 0 for row in rows.values())
    assert found["judged_tokens"] == 24 * 12


@pytest.mark.parametrize(
    "words",
    [
        ("place", "trace.npz", *CLUSTER, "-o", "trace.npz"),
        ("group", "trace.npz", "--plan", "plan.json", "-o", "plan.json"),
        ("export", "plan.json", "--to", "vllm", "-o", "plan.json"),
        ("report", "trace.npz", "--out", "trace.npz"),
        ("analyze", "trace.npz", "--report", "trace.npz"),
        ("compare", "trace.npz", "--plan", "plan.json", "--report", "plan.json"),
        ("place", "trace.npz", "--hostfile", "plan.json", "-o", "plan.json"),
        ("analyze", "trace.npz", "--against", "plan.json", "--report", "plan.json"),
        ("simulate", "t", "--plan", "p", "--homes", "h", "--sweep", "k", "--figure", "h"),
    ],
    ids=lambda words: words[0],
)
def test_an_output_never_replaces_an_input(made, words, monkeypatch):
    """A plan, homes, a map or a report was written over the file it was made from. [B1]"""
    folder, _ = made
    monkeypatch.chdir(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "it is also an input" in refusal(*words)["message"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_demo_refuses_a_directory_of_others(made):
    folder, _ = made
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = refusal("demo", "--out", folder)
    assert found["message"].startswith("--out: found files in")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_demo_says_that_the_disk_is_full(made, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    words = ("demo", "--trace", made[0] / "trace.npz", *CLUSTER, "--out", tmp_path / "out")
    assert "cannot write the demo results" in refusal(*words)["message"]


def test_the_demo_on_a_trace_writes_its_report_and_answers_in_json(made, tmp_path, monkeypatch):
    folder, _ = made
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    found = answer(
        *("demo", "--trace", folder / "trace.npz", *CLUSTER, "--out", tmp_path / "demo"),
        *("--wandb-mode", "disabled"),
    )
    assert found["kind"] == "trace"
    assert Path(found["report"]).is_file()
    rows = {row["metric"]: row for row in found["rows"]}
    assert rows["copies"]["ratio"] < 0.9  # so few requests: the cap leaves little room


def test_clusters_from_a_file_and_from_a_hostfile_give_the_same_plan(made, tmp_path):
    folder, placed = made
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"w{i} slots=2\n" for i in range(4)))
    cap = ("--max-imbalance", "2")
    found = answer(
        "place", folder / "trace.npz", "--hostfile", hosts, *cap, "-o", tmp_path / "p.json"
    )
    assert found["digest"] == placed["digest"]


# -- what goes wrong ---------------------------------------------------------------------------


def changed_plan(made, path, **changes):
    content = json.loads((made[0] / "plan.json").read_text())
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_a_wrong_trace_file_is_named(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    error = refusal("place", path, *CLUSTER, "-o", tmp_path / "p.json")
    assert error["type"] == "TraceError"
    assert "notes.txt" in error["message"]
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_corrupt_plan_is_named(made, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text((made[0] / "plan.json").read_text()[:200])
    error = refusal("evaluate", made[0] / "trace.npz", "--plan", path)
    assert error["type"] == "PlacementError"
    assert str(path) in error["message"]


def test_a_plan_for_another_model_is_refused(made, tmp_path):
    path = changed_plan(made, tmp_path / "p.json", model="someone/else")
    for words in (
        ("evaluate", made[0] / "trace.npz", "--plan", path),
        ("group", made[0] / "trace.npz", "--plan", path, "-o", tmp_path / "h.json"),
        ("compare", made[0] / "trace.npz", "--plan", path),
        ("report", made[0] / "trace.npz", "--plan", path, "-o", tmp_path / "r.html"),
    ):
        error = refusal(*words)
        assert error["type"] == "PlacementError"
        assert "'someone/else'" in error["message"]
        assert "'synthetic/strided'" in error["message"]
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


def test_a_plan_of_another_size_is_refused(made, tmp_path):
    write_trace(make_trace(num_experts=32), tmp_path / "t.npz")
    error = refusal("evaluate", tmp_path / "t.npz", "--plan", made[0] / "plan.json")
    assert "experts per layer: found 16 in the plan, expected 32" in error["message"]


def test_a_plan_that_misses_an_expert_names_it(made, tmp_path):
    table = PlacementPlan.read(made[0] / "plan.json").physical_to_logical_map.copy()
    lost = int(table[1, 0])
    table[1, 0] = table[1, -1]
    path = changed_plan(made, tmp_path / "p.json", physical_to_logical_map=table.tolist())
    error = refusal("evaluate", made[0] / "trace.npz", "--plan", path)
    assert f"layer 3: expert {lost} has no slot" in error["message"]


def test_ranks_that_do_not_divide_the_experts_are_refused(made, tmp_path):
    error = refusal(
        *("place", made[0] / "trace.npz", "--nodes", "3", "--ranks-per-node", "2"),
        *("-o", tmp_path / "p.json"),
    )
    assert "multiple of the 6 ranks" in error["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "found no cluster"),
        (("--nodes", "2"), "found only --nodes"),
        (("--ranks-per-node", "2"), "found only --ranks-per-node"),
        ((*CLUSTER, "--hostfile", "h"), "found --nodes and --hostfile"),
        (
            ("--nodes", "1000000000000", "--ranks-per-node", "1"),
            "found 1,000,000,000,000 ranks, expected at most 1,048,576",
        ),
    ],
)
def test_the_cluster_must_be_named_once(made, tmp_path, options, message):
    error = refusal("place", made[0] / "trace.npz", *options, "-o", tmp_path / "p.json")
    assert error["type"] == "TopologyError"
    assert message in error["message"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--method", "magic"), "found 'magic', expected one of"),
        (("--homes", "nowhere"), "found 'nowhere', expected 'joint'"),
        (("--held-out", "1.5"), "--held-out: found 1.5"),
        (("--max-imbalance", "0.5"), "found 0.5, expected at least 1"),
        (("--bound-seconds", "1e300"), "--bound-seconds: found 1e+300"),
    ],
)
def test_wrong_values_of_place_are_named(made, tmp_path, words, message):
    error = refusal("place", made[0] / "trace.npz", *CLUSTER, "-o", tmp_path / "p.json", *words)
    assert message in error["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["place", "group", "report", "analyze", "compare"])
def test_an_unwritable_path_is_refused_before_the_work(made, tmp_path, command, monkeypatch):
    folder = made[0]
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "out.json"
    words = {
        "place": ("place", "TRACE", *CLUSTER, "-o", out),
        "group": ("group", "TRACE", "--plan", folder / "plan.json", "-o", out),
        "report": ("report", "TRACE", "-o", out),
        "analyze": ("analyze", "TRACE", "--report", out),
        "compare": ("compare", "TRACE", "--plan", folder / "plan.json", "--report", out),
    }[command]

    def fail(*_, **__):
        raise AssertionError("the trace was read before the output path was checked")

    monkeypatch.setattr("moe_locality.trace.read_trace", fail)
    error = refusal(*(folder / "trace.npz" if word == "TRACE" else word for word in words))
    assert error["type"] == "ConfigError"
    assert f"cannot write the {'plan' if command == 'place' else ''}" in error["message"]
    assert "is a file" in error["message"]
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "are damaged"),
        ("{", "are damaged"),
        ('{"0": "one"}', "a rank is not an integer"),
        ('{"0": 99}', "name rank 99, expected ranks 0 to 7"),
        ('{"0": 0}', "found none for 79 requests"),
    ],
)
def test_wrong_homes_are_refused(made, tmp_path, content, message):
    path = tmp_path / "homes.json"
    path.write_text(content)
    error = refusal(
        *("evaluate", made[0] / "trace.npz", "--plan", made[0] / "plan.json", "--homes", path)
    )
    assert error["type"] == "PlacementError"
    assert message in error["message"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("simulate", "TRACE", "--plan", "PLAN", "--batch-tokens", 10**9), "--batch-tokens: found"),
        (("export", "PLAN", "--to", "trtllm", "-o", "m", "--layers", "0-99999999999"), "65,536"),
        (
            ("export", "PLAN", "--to", "sglang", "-o", "m.json", "--num-hidden-layers", 10**12),
            "--num-hidden-layers: found 1000000000000, expected at most 65,536",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_lists_of_them(made, words, message):
    """They ended in a MemoryError, or in nothing for as long as there was memory."""
    files = {"TRACE": made[0] / "trace.npz", "PLAN": made[0] / "plan.json"}
    assert message in refusal(*(str(files.get(word, word)) for word in words))["message"]


def test_compare_needs_a_second_thing(made, tmp_path):
    trace, plan = made[0] / "trace.npz", made[0] / "plan.json"
    assert "neither a second run nor a plan" in refusal("compare", trace)["message"]
    assert "both runs and plans" in refusal("compare", trace, tmp_path, "--plan", plan)["message"]
    assert (
        "found 'loud'"
        in refusal("compare", trace, "--plan", plan, "--wandb", "p", "--wandb-mode", "loud")[
            "message"
        ]
    )
    assert (
        "--method or --homes without --plan"
        in refusal("report", trace, "--method", "eplb", "-o", tmp_path / "r.html")["message"]
    )


def test_counts_alone_are_analyzed_and_placed_by_eplb(tmp_path):
    trace = make_trace()
    counts = np.stack([trace.filter(requests=[r]).load() for r in range(80)])
    load = dataclasses.replace(
        trace,
        expert_ids=None,
        request_id=None,
        position=None,
        stage=np.full(80, 255, np.uint8),
        domain_id=(np.arange(80) % 4).astype(np.int32),
        expert_load=counts,
        load_top_k=2,
    )
    write_trace(load, tmp_path / "load.npz")
    plan = tmp_path / "p.json"
    found = answer("place", tmp_path / "load.npz", *CLUSTER, "--method", "eplb", "-o", plan)
    assert found["costs"]["copies"] is None
    assert found["costs"]["node_imbalance"] < 1.1
    run_plain = run("evaluate", tmp_path / "load.npz", "--plan", plan)
    assert run_plain.exit_code == 0, run_plain.stderr
    page = tmp_path / "r.html"
    answer("report", tmp_path / "load.npz", "--plan", plan, "-o", page)
    assert "Expert load by domain" in page.read_text()
    error = refusal("place", tmp_path / "load.npz", *CLUSTER, "-o", tmp_path / "q.json")
    assert "needs a trace of tokens" in error["message"]


def test_the_real_trace_of_gpt_oss_from_place_to_report(routing_data, tmp_path):
    whole = read_trace(routing_data / "gpt_oss_20b_benchmarks.npz")
    names = ("trace.npz", "plan.json", "homes.json", "r.html")
    trace, plan, homes, page = (tmp_path / name for name in names)
    write_trace(whole.select_layers(whole.layer_ids[::4]), trace)
    placed = answer("place", trace, *CLUSTER, "--held-out", "0.3", "-o", plan)
    assert placed["held_out"]["copies"] < 0.80 * placed["linear"]["copies"]
    assert placed["held_out"]["node_imbalance"] < 1.08
    unseen = ("--held-out", "0.3")
    found = answer("evaluate", trace, "--plan", plan, *unseen)
    assert found["copies"] == pytest.approx(placed["held_out"]["copies"])
    answer("group", trace, "--plan", plan, "--predict", "first:32", "-o", homes)
    housed = answer("evaluate", trace, "--plan", plan, "--homes", homes, *unseen)
    assert housed["copies"] < found["copies"]
    reported = answer("report", trace, "--plan", plan, "--homes", homes, *unseen, "-o", page)
    assert reported["comparison"]["notes"] == []
    assert page.stat().st_size < 2_000_000
    assert "Placement of openai/gpt-oss-20b" in page.read_text()


def test_evaluate_counts_for_the_transport_and_the_rule_of_another_engine(made):
    folder, _ = made
    words = ("evaluate", folder / "trace.npz", "--plan", folder / "plan.json")
    plan = PlacementPlan.read(folder / "plan.json")
    trace = read_trace(folder / "trace.npz")
    for transport in ("per_rank", "allgather"):
        done = answer(*words, "--transport", transport, "--batch-tokens", 8, "--rule", "in_turn")
        options = {"transport": transport, "batch_tokens": 8, "rule": "in_turn"}
        costs = evaluate(trace, plan, **options)
        found = done["crossing"], done["idle"], done["transport"]
        assert found == (costs.crossing, costs.idle, transport)
    assert done["crossing"] == done["linear"]["crossing"] == plan.num_nodes - 1
    told = run(*words, "--transport", "allgather")
    assert "crossing" in told.stdout
    assert "whatever the plan" in told.stdout


def test_export_writes_the_map_of_an_engine(made, tmp_path):
    folder, placed = made
    plan = PlacementPlan.read(folder / "plan.json")
    done = answer("export", folder / "plan.json", "--to", "vllm", "-o", tmp_path / "vllm.json")
    assert done["digest"] == placed["digest"]
    assert f"bake MODEL --plan {folder / 'plan.json'}" in "\n".join(done["launch"])
    rows = json.loads((tmp_path / "vllm.json").read_text())
    assert rows == plan.physical_to_logical_map.tolist()
    words = ("export", folder / "plan.json", "--to", "sglang", "-o", tmp_path / "sglang.json")
    assert "--num-hidden-layers" in refusal(*words)["message"]
    assert not (tmp_path / "sglang.json").exists()
    answer(*words, "--num-hidden-layers", 7)
    assert len(json.loads((tmp_path / "sglang.json").read_text())["physical_to_logical_map"]) == 7
    mixed = dataclasses.replace(plan, rank_to_node=(0, 1, 2, 3, 0, 1, 2, 3))
    mixed.write(tmp_path / "mixed.json")
    words = ("export", tmp_path / "mixed.json", "--to", "vllm", "-o", tmp_path / "vllm.json")
    told = "engines put consecutive ranks on a node"
    assert [told in answer(*words)["launch"][-1], told in done["launch"][-1]] == [True, False]


def test_import_of_an_engines_record_names_its_format(tmp_path):
    np.save(tmp_path / "routed.npy", np.array([[[3, 1], [0, 7]], [[1, 2], [2, 0]]], np.int16))
    words = ("import", tmp_path / "routed.npy", "--out", tmp_path / "trace", "--num-experts", 8)
    done = answer(*words)
    assert (done["format"], done["tokens"], done["layers"], done["top_k"]) == ("vllm", 2, 2, 2)
    assert read_trace(tmp_path / "trace").content_hash() == done["content_hash"]
    error = refusal(*words, "--format", "llamacpp")
    assert error["type"] == "TraceError"


def test_import_of_a_directory_with_a_table(tmp_path):
    """One file alone could be imported, and no layers be chosen. [E4]"""
    (tmp_path / "in").mkdir()
    for number in range(3):
        array = [[[0, 0], [3, 1], [0, 7], [number, 4]]] * (number + 1)
        np.save(tmp_path / "in" / f"r{number}.npy", np.array(array, np.int16))
    np.save(tmp_path / "in" / "zeros.npy", np.zeros((2, 4, 2), np.int16))
    (tmp_path / "t.csv").write_text("name,request_id,domain\nr0,7,law\nr1,8,law\nr2,9,math\n")
    words = ("import", tmp_path / "in", "--out", tmp_path / "trace", "--num-experts", 8)
    done = answer(*words, "--table", tmp_path / "t.csv", "--layers", "1,3", "--num-layers", 4)
    assert (done["tokens"], done["requests"], done["layers"]) == (6, 3, 2)
    assert done["domains"] == ["law", "math"]
    assert ["zeros.npy" in text for text in done["left_out"]] == [True]
    trace = read_trace(tmp_path / "trace")
    assert trace.layer_ids.tolist() == [1, 3]
    assert trace.request_id.tolist() == [7, 8, 8, 9, 9, 9]
    files = sorted((tmp_path / "in").glob("r*.npy"))
    done = answer("import", *files, *words[2:], "--overwrite")
    assert (done["requests"], done["layers"]) == (3, 3)
    assert "--layers '3-1'" in refusal(*words, "--layers", "3-1")["message"]


def test_simulate_counts_what_evaluate_counts_and_says_simulated(made, tmp_path):
    folder, _ = made
    words = (folder / "trace.npz", "--plan", folder / "plan.json")
    homes = tmp_path / "homes.json"
    answer("group", *words, "--predict", "oracle", "-o", homes)
    costs = answer("evaluate", *words, "--homes", homes)
    found = answer("simulate", *words, "--homes", homes, "--hidden", 64, "--compute-us", 100)
    assert found["how"] == "simulated"
    assert found["bytes"]["dispatch"]["cross_node"] == costs["total_copies"] * 128
    flat = answer("simulate", *words, "--homes", homes, "--hidden", 64, "--exchange", "flat")
    assert flat["bytes"]["dispatch"]["cross_node"] == costs["total_picks"] * 128
    assert found["speedup"] > 1
    assert 0 < found["share"] < 1
    shown = run("simulate", *words, "--sweep", "bandwidth", "--batch-tokens", 16)
    assert shown.exit_code == 0, shown.stderr
    assert "simulated" in shown.stdout.lower()
    assert "At least 2% faster at" in shown.stdout


def test_simulate_sweeps_with_a_figure(made, tmp_path):
    folder, _ = made
    words = ("simulate", folder / "trace.npz", "--plan", folder / "plan.json")
    for name in ("sweep.svg", "sweep.png"):
        found = answer(*words, "--sweep", "k", "--figure", tmp_path / name, "--batch-tokens", 16)
        assert [row["value"] for row in found["sweep"]["rows"]] == [1, 2]
        assert (tmp_path / name).stat().st_size > 1000
    assert "simulated" in (tmp_path / "sweep.svg").read_text()
    assert "both" in refusal(*words, "--figure", tmp_path / "x.svg")["message"]
    assert (
        ".svg or .png" in refusal(*words, "--sweep", "k", "--figure", tmp_path / "x.pdf")["message"]
    )
    assert "weather" in refusal(*words, "--sweep", "weather")["message"]


def test_simulate_on_a_larger_cluster_repeats_the_group(made, tmp_path):
    folder, _ = made
    words = ("simulate", folder / "trace.npz", "--plan", folder / "plan.json", "--batch-tokens", 8)
    cluster = tmp_path / "cluster.yaml"
    text = (
        "name: big\nnum_nodes: {}\nranks_per_node: 2\ntiers:\n"
        "  intra_node: {{gbps: 100, latency_us: 1}}\n  inter_node: {{gbps: 5, latency_us: 9}}\n"
    )
    cluster.write_text(text.format(4000))
    found = answer(*words, "--cluster", cluster)
    assert (found["groups"], found["cluster"]["inter_node_gbps"]) == (1000, 5)
    assert found["group_step_us"] >= found["step_us"]
    cluster.write_text(text.format(6))
    assert "a multiple of them" in refusal(*words, "--cluster", cluster)["message"]
