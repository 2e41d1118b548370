"""The command place: what it takes, what it refuses, and that a refusal leaves no plan behind."""

import dataclasses
import json

import numpy as np
import pytest

from moe_locality.placement import PlacementPlan, evaluate, solve
from moe_locality.topology import ClusterTopology
from moe_locality.trace import TRAIN, RoutingTrace, read_trace, write_trace
from tests.unit.made_trace import make_trace
from tests.unit.test_cli_flow import CLUSTER, answer, refusal, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trace of two domains, one of the others, and a plan from the first."""
    place = tmp_path_factory.mktemp("place")
    trace = make_trace(num_requests=200, seed=3)
    write_trace(trace.filter(domains=["code", "math"]), place / "old.npz")
    write_trace(trace.filter(domains=["chat", "law"]), place / "new.npz")
    solve(read_trace(place / "old.npz"), ClusterTopology.uniform(2, 2)).write(place / "plan.json")
    return place


def test_a_start_is_improved_with_few_moves_on_its_own_cluster(folder, tmp_path):
    out = tmp_path / "p.json"
    words = ("place", folder / "new.npz", "--start", folder / "plan.json", "-o", out)
    found = answer(*words, "--move-budget", "0.25", "--max-imbalance", "1.5", "--held-out", "0.3")
    old, new = PlacementPlan.read(folder / "plan.json"), PlacementPlan.read(out)
    assert (new.num_nodes, new.ranks_per_node) == (2, 2)
    start = found["start"]
    assert start["digest"] == old.digest()
    assert found["held_out"]["copies"] < start["costs"]["copies"]
    assert 0 < start["moved_share"] <= 0.25
    moved = round(start["moved_share"] * new.physical_to_logical_map.size)
    assert start["moved_slots"] == moved == new.provenance["moved_slots"]
    _, test = read_trace(folder / "new.npz").split(0.7, 0)
    assert start["costs"]["copies"] == pytest.approx(evaluate(test, old).copies)
    few = answer(*words, "--max-imbalance", "1.5")["start"]  # the default: 2 % of the slots
    assert few["moved_slots"] <= 0.02 * new.physical_to_logical_map.size
    told = run(*words, "--max-imbalance", "1.5")
    assert "slots moved" in told.stderr + told.stdout


def test_objective_home_cap_and_groups_reach_the_solver(folder, tmp_path):
    trace, out = folder / "old.npz", tmp_path / "p.json"
    cap = ("--max-imbalance", "1.05")
    words = ("place", trace, "--nodes", "2", "--ranks-per-node", "2", *cap, "-o", out)
    for options, arguments in (
        (("--homes", "joint", "--objective", "picks"), {"homes": "joint", "objective": "picks"}),
        (
            ("--homes", "joint", "--max-home-imbalance", "1.5"),
            {"homes": "joint", "max_home_imbalance": 1.5},
        ),
        (("--expert-groups", "4"), {"expert_groups": 4}),
        (("--objective", "rank_copies"), {"objective": "rank_copies"}),
        (("--one-layout",), {"one_layout": True}),
        (
            ("--redundant-experts", "4", "--redundant-per-layer", "--serving-rule", "home"),
            {
                "num_redundant_experts": 4,
                "redundant_per_layer": True,
                "serving_rule": "home",
            },
        ),
    ):
        arguments = {**arguments, "max_imbalance": 1.05}
        judged = answer(*words, *options)["judged"]
        plan = solve(read_trace(trace), ClusterTopology.uniform(2, 2), **arguments)
        if judged["kept"] == "linear":  # whole groups can gain nothing here: the domains cut them
            fit, unseen = read_trace(trace).split(0.7, 0)
            plan = solve(fit, ClusterTopology.uniform(2, 2), **arguments)
            assert judged["after"]["copies"] == pytest.approx(evaluate(unseen, plan).copies)
        else:
            assert PlacementPlan.read(out).digest() == plan.digest(), options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--move-budget", "0.1"), "found --move-budget without --start"),
        (("--start", "PLAN", "--move-budget", "1.5"), "--move-budget: found 1.5"),
        (("--start", "PLAN", "--redundant-experts", "4"), "found 4 for a plan with 0"),
        (("--start", "PLAN", "--homes", "joint"), "found --start with --homes joint"),
        (("--start", "PLAN", *CLUSTER), "refresh on the cluster of the plan"),
        (("--start", "PLAN", "--serving-rule", "visited"), "improve with 'home', which it keeps"),
        (("--start", "GONE"), "cannot read the plan"),
        ((*CLUSTER, "--objective", "speed"), "--objective: found 'speed'"),
        ((*CLUSTER, "--objective", "picks"), "use --homes joint"),
        (
            (*CLUSTER, "--homes", "joint", "--max-home-imbalance", "0.9"),
            "--max-home-imbalance: found",
        ),
        ((*CLUSTER, "--expert-groups", "3"), "expected a divisor of the 16 experts"),
        ((*CLUSTER, "--redundant-experts", "3"), "= 19 slots, expected a multiple of the 8 ranks"),
        ((*CLUSTER, "--redundant-experts", "120"), "found 17 slots per rank for 16 experts"),
        (("--nodes", "17", "--ranks-per-node", "1"), "found 17 nodes for 16 experts"),
        (("--nodes", "3", "--ranks-per-node", "1"), "expected a multiple of the 3 ranks"),
        ((*CLUSTER, "--max-imbalance", "nan"), "--max-imbalance: found nan"),
    ],
)
def test_options_that_cannot_be_are_named_and_nothing_is_written(folder, tmp_path, words, message):
    names = {"PLAN": folder / "plan.json", "GONE": tmp_path / "gone.json"}
    words = [names.get(word, word) for word in words]
    error = refusal("place", folder / "new.npz", *words, "-o", tmp_path / "p.json")
    assert message in error["message"]
    assert list(tmp_path.iterdir()) == []


BAD_TRACES = {
    "k > experts": (lambda a: a | {"num_experts": np.int32(1)}, "found 2 picks per token among 1"),
    "an id too large": (lambda a: a | {"expert_ids": _with(a, 99)}, "found expert id 99"),
    "an id that is -1 by overflow": (
        lambda a: a | {"expert_ids": _with(a, -32768)},
        "found expert id -32768",
    ),
    "ids that are NaN": (
        lambda a: a | {"expert_ids": _with(a.copy(), np.nan, float)},
        "dtype float64, expected integers",
    ),
    "an expert twice": (
        lambda a: a | {"expert_ids": np.zeros_like(a["expert_ids"])},
        "twice among the picks of token 0",
    ),
    "a layer missing": (
        lambda a: a | {"expert_ids": a["expert_ids"][:, :2]},
        "expected [T, L, K] with L = 3",
    ),
    "no tokens": (
        lambda a: {k: v[:0] if k in PER_TOKEN else v for k, v in a.items()},
        "empty trace",
    ),
    "no picks": (
        lambda a: a | {"expert_ids": np.full(a["expert_ids"].shape, -1, np.int16)},
        "found an empty trace",
    ),
}


def _with(arrays, value, dtype=np.int32):
    ids = arrays["expert_ids"].astype(dtype)
    ids[5, 1, 1] = value
    return ids


PER_TOKEN: set[str] = set()


@pytest.mark.parametrize("name", list(BAD_TRACES))
def test_a_bad_trace_is_named_and_nothing_is_written(folder, tmp_path, name):
    change, message = BAD_TRACES[name]
    with np.load(folder / "new.npz") as file:
        arrays = dict(file)
    tokens = len(arrays["expert_ids"])
    PER_TOKEN.update(k for k, v in arrays.items() if v.ndim and len(v) == tokens)
    np.savez(tmp_path / "bad.npz", **change(arrays))
    error = refusal("place", tmp_path / "bad.npz", *CLUSTER, "-o", tmp_path / "p.json")
    assert message in error["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


def test_a_start_without_one_of_the_layers_is_refused(folder, tmp_path):
    plan = PlacementPlan.read(folder / "plan.json")
    part = dataclasses.replace(
        plan,
        layer_ids=plan.layer_ids[:2],
        physical_to_logical_map=plan.physical_to_logical_map[:2],
        expert_load=None,
    )
    part.write(tmp_path / "part.json")
    words = ("place", folder / "new.npz", "--start", tmp_path / "part.json")
    error = refusal(*words, "-o", tmp_path / "p.json")
    assert "layer ids" in error["message"]
    assert not (tmp_path / "p.json").exists()


def test_a_plan_that_cannot_be_written_whole_leaves_the_old_one(folder, tmp_path, monkeypatch):
    out = tmp_path / "p.json"
    out.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    words = ("place", folder / "old.npz", "--nodes", "2", "--ranks-per-node", "2", "-o", out)
    assert "No space left" in refusal(*words, "--method", "linear")["message"]
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    assert out.read_text() == "old"


def level_trace(num_requests=100):
    """Each domain picks the experts of one node of the usual order, all of them equally often."""
    request, token = np.divmod(np.arange(num_requests * 12), 12)
    first = 4 * (request % 4)
    ids = np.stack([first + token % 4, first + (token + 1) % 4], axis=1)
    return RoutingTrace(
        model="synthetic/level",
        num_experts=16,
        layer_ids=np.arange(2),
        expert_ids=np.repeat(ids[:, None], 2, axis=1).astype(np.int16),
        request_id=request,
        position=token.astype(np.int32),
        stage=np.full(len(ids), TRAIN, np.uint8),
        domain=("a", "b", "c", "d"),
        domain_id=(request % 4).astype(np.int32),
    )


@pytest.mark.parametrize("words", [(), ("--method", "balance"), ("--held-out", "0.3")])
@pytest.mark.parametrize("replicas", [0, 8])
def test_the_usual_order_is_kept_where_nothing_is_gained(tmp_path, words, replicas):
    """A plan was written whatever it was worth, +0.8 % copies on one trace [F7]."""
    trace = level_trace()
    write_trace(trace, tmp_path / "t.npz")
    out = tmp_path / "p.json"
    line = ("place", tmp_path / "t.npz", *CLUSTER, "-o", out, *words)
    line += ("--redundant-experts", replicas) if replicas else ()
    found = answer(*line)
    judged = found["judged"]
    plan = PlacementPlan.read(out)
    if judged["gained"]:  # replicas of what another node has too can save copies
        assert replicas
        assert judged["interval"][judged["goal"]][1] < 0
        return
    assert (judged["gained"], judged["kept"], judged["requests"]) == (False, "linear", 30)
    assert (plan.physical_to_logical_map == np.arange(16)).all()
    assert plan.provenance["method"] == "linear"
    assert plan.provenance["judged"]["change"] == judged["change"]
    own = evaluate(trace, plan).copies
    if not found["held_out"]:
        assert found["costs"]["copies"] == pytest.approx(own)
    assert found["digest"] == plan.digest()
    assert "wrote the usual order" in run(*line).stdout


def test_a_gain_is_judged_on_a_split_and_the_plan_is_from_all_requests(folder, tmp_path):
    """Costs were shown on the requests that the plan was made from [F7]."""
    out, cluster = tmp_path / "p.json", ClusterTopology.uniform(2, 2)
    words = ("place", folder / "old.npz", "--nodes", "2", "--ranks-per-node", "2", "-o", out)
    words += ("--max-imbalance", "1.05")  # the usual order is more level than that
    found = answer(*words)
    trace = read_trace(folder / "old.npz")
    assert PlacementPlan.read(out).digest() == solve(trace, cluster, max_imbalance=1.05).digest()
    judged = found["judged"]
    assert (judged["gained"], judged["kept"], judged["against"]) == (True, "plan", "linear")
    fit, unseen = trace.split(0.7, 0)
    before = evaluate(unseen, solve(fit, cluster, method="linear"))
    after = evaluate(unseen, solve(fit, cluster, max_imbalance=1.05))
    for name in ("copies", "node_imbalance", "rank_imbalance"):
        change = getattr(after, name) / getattr(before, name) - 1
        assert judged["change"][name] == pytest.approx(change, abs=1e-6)
        low, high = judged["interval"][name]
        assert low <= judged["change"][name] <= high
    assert judged["after"]["copies"] == pytest.approx(after.copies)
    told = run(*words).stdout
    assert f"copies {judged['change']['copies']:+.1%}" in told
    assert "a plan from 70 requests, judged on 30 others" in told


def test_what_cannot_be_judged_is_written_and_says_so(folder, tmp_path):
    """A trace of few requests gives a plan without a word about new ones before [F7]."""
    out = tmp_path / "p.json"
    write_trace(level_trace(12), tmp_path / "few.npz")
    load = read_trace(folder / "old.npz").load()[None]
    counts = RoutingTrace(model="counts", num_experts=16, layer_ids=np.arange(3), expert_load=load)
    write_trace(counts, tmp_path / "counts.npz")
    for name, words, reason in (
        ("few", (), "found 4 requests to judge on, expected at least 5"),
        ("counts", ("--method", "eplb"), "a trace of counts does not tell requests apart"),
    ):
        line = ("place", tmp_path / f"{name}.npz", *CLUSTER, "-o", out, *words)
        judged = answer(*line)["judged"]
        assert (judged["gained"], judged["kept"]) == (None, "plan")
        assert reason in judged["reason"]
        assert f"not judged on new requests: {reason}" in run(*line).stdout


def test_a_peer_and_a_start_are_written_as_asked_and_say_what_they_bring(folder, tmp_path):
    """Nothing said that a plan asked for by name may gain nothing [F7]."""
    write_trace(level_trace(), tmp_path / "t.npz")
    out = tmp_path / "p.json"
    line = ("place", tmp_path / "t.npz", *CLUSTER, "-o", out, "--method", "round_robin")
    judged = answer(*line)["judged"]
    assert (judged["gained"], judged["kept"]) == (False, "plan")
    assert judged["change"]["copies"] > 0
    assert PlacementPlan.read(out).provenance["method"] == "round_robin"
    assert "nothing is gained for sure: the usual order may be as good" in run(*line).stdout
    line = ("place", folder / "old.npz", "--start", folder / "plan.json", "-o", out)
    judged = answer(*line)["judged"]
    assert (judged["kept"], judged["against"]) == ("plan", "start")
    assert "against the plan to improve" in run(*line).stdout


def test_a_start_with_homes_is_judged_with_its_homes(folder, tmp_path):
    """No slot had moved, and "copies -20.4%" was what the homes saved, not the plan."""
    trace = read_trace(folder / "old.npz")
    solve(trace, ClusterTopology.uniform(2, 2), homes="joint").write(tmp_path / "joint.json")
    line = ("place", folder / "old.npz", "--start", tmp_path / "joint.json", "--move-budget", "0")
    found = answer(*line, "-o", tmp_path / "p.json")
    assert found["start"]["moved_slots"] == 0
    judged = found["judged"]
    assert judged["before"] == judged["after"]
    assert (judged["change"]["copies"], judged["gained"]) == (0, False)


def test_replicas_say_what_memory_they_take(folder, tmp_path):
    """What replicas cost was not said [F7]."""
    line = ("place", folder / "old.npz", *CLUSTER, "-o", tmp_path / "p.json")
    line += ("--redundant-experts", "8", "--method", "eplb")
    assert answer(*line)["extra_expert_weights"] == 0.5
    assert "replicas: +50.0% of the expert weights" in run(*line).stdout
    found = answer(*line, "--bound", "--bound-seconds", "60")["certificate"]
    assert 0 < found["bound"] < found["found"]
    assert found["max_imbalance"] is None


def test_experts_that_only_divide_with_replicas_are_placed(folder, tmp_path):
    """The caps were compared with a layout without replicas, which there is none of here: "found 16
    experts + 0 redundant = 16 slots" for an option that said 2.
    """
    line = ("place", folder / "old.npz", "--nodes", "3", "--ranks-per-node", "1")
    found = answer(*line, "--redundant-experts", "2", "-o", tmp_path / "p.json")
    assert [point["chosen"] for point in found["curve"]].count(True) == 1
    assert PlacementPlan.read(tmp_path / "p.json").num_slots == 18


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_ctrl_c_is_told_in_words_and_as_json(folder, tmp_path, monkeypatch, as_json):
    """The option parser ended with code 130 and no word, without the JSON object, before [A5]."""

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_locality.placement.solve", stopped)
    line = ("place", folder / "old.npz", *CLUSTER, "-o", tmp_path / "p.json", *as_json)
    found = run(*line)
    assert found.exit_code == 130
    if as_json:
        assert json.loads(found.stdout)["error"]["message"] == "interrupted"
    else:
        assert "moe-locality: interrupted" in found.stderr
    assert list(tmp_path.iterdir()) == []
