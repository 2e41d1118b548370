"""The demo without its runs: whose directory it takes, when runs agree, what the report says."""

import json
import socket
from dataclasses import replace

import numpy as np
import pytest

from moe_locality import demo
from moe_locality.compare import Candidate, Run, compare_plans
from moe_locality.demo import MARKER, launch, run_demo
from moe_locality.demo.checks import GAP_TOLERANCE, check_agreement, check_prediction
from moe_locality.demo.model import balance_line, flips_line
from moe_locality.errors import ConfigError, MoeLocalityError
from moe_locality.figures import TradeoffData, draw
from moe_locality.placement import evaluate, solve
from moe_locality.topology import ClusterTopology
from moe_locality.trace import read_trace, write_trace
from tests.unit.made_trace import make_trace


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def make(folder, *names):
    """What a demo leaves, without its runs."""
    with demo._own_directory(folder, None):
        fill(folder, *names)


@pytest.mark.parametrize("marker", [None, "", "{}", '{"made": 3}'])
def test_files_of_others_are_left_and_the_directory_refused(tmp_path, marker):
    """It used to delete wandb/, record/, plan.json ... in any directory. [B1]"""
    fill(tmp_path, "wandb/offline-run-1/run-1.wandb", "plan.json", "record/notes.txt")
    if marker is not None:
        (tmp_path / MARKER).write_text(marker)
    before = content(tmp_path)
    with pytest.raises(ConfigError, match=r"--out: found files in .*nothing was changed"):
        run_demo(out=tmp_path, quiet=True)
    assert content(tmp_path) == before


def test_a_link_to_nothing_is_no_directory(tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"--out: found the link to nothing .*expected a direc"):
        run_demo(out=str(tmp_path / "out"), quiet=True)


def test_a_demo_replaces_what_a_demo_made_and_nothing_else(tmp_path):
    """Also what somebody else put into its wandb folder stays. [B1]"""
    out = tmp_path / "new" / "demo"
    make(out, "record/trace/part-0", "wandb/a/run.wandb", "report.html")
    fill(out, "wandb/mine/run.wandb", "notes.txt")
    make(out, "record/trace/part-1", "plan.json")
    assert {name for name, held in content(out).items() if held is not None} == {
        *("record/trace/part-1", "plan.json", "wandb/mine/run.wandb", "notes.txt", MARKER)
    }
    fill(out, "record/mine.txt")
    before = content(out)
    with pytest.raises(ConfigError, match=r"record/mine.txt, which no demo noted as its own"):
        run_demo(out=out, quiet=True)
    assert content(out) == before


def test_what_a_failed_demo_made_is_replaced_too(tmp_path):
    def stopped():
        with demo._own_directory(tmp_path, None):
            fill(tmp_path, "record/log.txt")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    make(tmp_path)
    assert content(tmp_path).keys() == {MARKER}


def test_the_demo_on_a_trace_never_deletes_that_trace(tmp_path):
    """`--trace X/record/trace --out X` used to delete its input. [B1]"""
    with demo._own_directory(tmp_path, None):
        write_trace(make_trace(), tmp_path / "record" / "trace")
    for given in (tmp_path / "record" / "trace", tmp_path / "record" / ".." / "record" / "trace"):
        with pytest.raises(ConfigError, match=r"--trace: found .* among what the demo replaces"):
            run_demo(out=str(tmp_path), trace=str(given), quiet=True)
    assert read_trace(tmp_path / "record" / "trace").same_content(make_trace())


# -- flips --

N, S, L, K, E = 6, 5, 3, 2, 8


def rows(seed=0, step=None):
    rng = np.random.default_rng(seed)
    picks = np.sort(rng.permuted(np.tile(np.arange(E), (N, S, L, 1)), axis=3)[..., :K], axis=3)
    made = {
        "request_id": np.arange(20, 20 + N),
        "rank": np.zeros(N, dtype=np.int32),
        "loss": rng.random(N, dtype=np.float32),
        "token_loss": rng.random((N, S), dtype=np.float32),
        "last_logits": rng.random((N, 4), dtype=np.float32),
        "picks": picks.astype(np.int16),
        "gap": rng.random((N, S, L), dtype=np.float32) + 0.1,
    }
    return made if step is None else {**made, "step": np.full(N, step)}


def run_of(folder, name):
    """A run with 6 requests and three training steps, all of whose rows may be changed."""
    steps = [rows(seed, seed) for seed in (1, 2, 3)]
    (folder / name).mkdir(exist_ok=True)
    np.savez(
        folder / name / "continued.npz",
        **{key: np.concatenate([part[key] for part in steps]) for key in steps[0]},
    )
    losses = tuple({"step": step, "loss": 3.0 - step / 10} for step in (1, 2, 3))
    return Run(name=name, path=folder / name, steps=losses, evaluation=rows())


def flip(found, place, gap=1e-6):
    """Another pick at (request, token, layer), at a gap."""
    held = set(found["picks"][place].tolist())
    found["picks"][place] = sorted([*list(held)[:1], min(set(range(E)) - held)])
    found["gap"][place] = gap


@pytest.fixture
def pair(tmp_path):
    first, second = run_of(tmp_path, "linear"), run_of(tmp_path, "placed")
    for at in ((2, 1, 1),):  # the tie is one in both runs
        first.evaluation["gap"][at] = 1e-6
    return first, second


def test_runs_without_a_flip_agree_within_rounding(pair):
    first, second = pair
    second.evaluation["loss"] += np.float32(1e-6)
    found = check_agreement(first, second)
    assert (found.flips, found.flipped_requests, found.train_steps) == (0, 0, 3)
    assert found.pairs == 4 * N * S * L
    assert found.max_loss_difference == pytest.approx(1e-6, rel=0.2)
    second.evaluation["loss"][3] += 1e-3
    with pytest.raises(MoeLocalityError, match="must not change what the model computes"):
        check_agreement(first, second)


def test_a_flipped_near_tie_is_told_from_a_fault(pair):
    """A tie that rounding decides ended the demo: a request with one may differ after it. [A3]"""
    first, second = pair
    flip(second.evaluation, (2, 1, 1))
    flip(second.evaluation, (2, 1, 2), gap=0.4)  # a later layer of the same token
    flip(second.evaluation, (2, 4, 2), gap=0.3)  # a later layer of a later token
    second.evaluation["loss"][2] += 0.01
    second.evaluation["token_loss"][2, 1:] += 0.05
    second.evaluation["last_logits"][2] += 0.1
    found = check_agreement(first, second)
    assert (found.flips, found.near_ties, found.flipped_requests) == (3, 1, 1)
    assert found.max_gap == pytest.approx(2e-6)
    assert found.max_loss_difference == 0
    assert found.max_loss_difference_after_flips == pytest.approx(0.01, rel=1e-3)
    assert "3 of 360 (token, layer) pairs, 1 of them near-ties" in flips_line(
        {"placed": {name: getattr(found, name) for name in found.__slots__}}
    )


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ((2, 1, 1), "a flip of experts that are far apart"),
        ((2, 1, 0), "an earlier layer: the near-tie behind it explains nothing"),
        ((2, 0, 2), "an earlier token"),
        ((2, 3, 1), "a later token, but the same layer: it has not seen the flip"),
        ((4, 3, 2), "another request"),
    ],
)
def test_a_flip_that_no_near_tie_explains_is_an_error(pair, place, what):
    first, second = pair
    flip(second.evaluation, (2, 1, 1))
    flip(second.evaluation, place, gap=2 * GAP_TOLERANCE)
    with pytest.raises(MoeLocalityError, match="must not change what the model computes"):
        check_agreement(first, second)


def test_tokens_before_a_flip_and_other_requests_must_agree(pair):
    first, second = pair
    flip(second.evaluation, (2, 1, 1))
    second.evaluation["token_loss"][2, 0] += 0.01
    with pytest.raises(MoeLocalityError, match="must not change"):
        check_agreement(first, second)
    second.evaluation["token_loss"][2, 0] -= 0.01
    check_agreement(first, second)
    second.evaluation["last_logits"][3] += 0.01
    with pytest.raises(MoeLocalityError, match="must not change"):
        check_agreement(first, second)


def test_many_near_ties_are_an_error(pair):
    first, second = pair
    for request in range(2):
        first.evaluation["gap"][request, 0, 0] = 1e-6
        flip(second.evaluation, (request, 0, 0))
    with pytest.raises(MoeLocalityError, match="near_ties=2"):
        check_agreement(first, second)


def test_training_losses_after_a_flip_are_compared_roughly(pair):
    """The weights differ from there on; before it nothing may. [A3]"""
    first, second = pair
    with np.load(second.path / "continued.npz") as held:
        changed = {name: held[name].copy() for name in held.files}
    place = (N, 0, 0)  # first request of step 2
    flip(changed, place)
    np.savez(second.path / "continued.npz", **changed)
    for run in pair:
        with np.load(run.path / "continued.npz") as held:
            given = {name: held[name].copy() for name in held.files}
        given["gap"][place] = 1e-6
        np.savez(run.path / "continued.npz", **given)

    def with_losses(*losses):
        steps = tuple({"step": i, "loss": loss} for i, loss in enumerate(losses, 1))
        return replace(second, steps=steps)

    found = check_agreement(first, with_losses(2.9, 2.801, 2.71))
    assert (found.flips, found.train_steps, found.train_steps_after_flips) == (1, 3, 2)
    assert found.max_train_loss_difference == 0
    assert found.max_train_loss_difference_after_flips == pytest.approx(0.01)
    for losses in ((2.901, 2.8, 2.7), (2.9, 2.8, 3.0)):
        with pytest.raises(MoeLocalityError, match="must not change"):
            check_agreement(first, with_losses(*losses))


def test_the_prediction_is_exact_for_what_the_run_picked():
    """A pick that rounding flipped moves a row; as many picks may differ as were flipped. [A3]"""
    trace = make_trace().filter(requests=range(8))
    ids, length = trace.request_ids, int(trace.position.max()) + 1
    picks = np.zeros((len(ids), length, *trace.expert_ids.shape[1:]), np.int16)
    row = np.searchsorted(ids, trace.request_id)
    picks[row, trace.position] = np.sort(trace.expert_ids, axis=2)
    cluster = ClusterTopology.uniform(2, 2)
    plan = solve(trace, cluster, method="linear")
    evaluation = {"request_id": ids, "rank": np.arange(len(ids)) % 4, "picks": picks}

    def counted(picked):
        homes = dict(zip(ids.tolist(), evaluation["rank"].tolist(), strict=True))
        count = evaluate(trace.evolve(expert_ids=picked), plan, cluster, homes).total_picks
        traffic = {"dispatch": {"cross_node": count}}
        return {"rows_by_link": traffic, "by_link": traffic}

    def run(**changes):
        return Run(name="placed", path="", evaluation={**evaluation, **changes})

    same = check_prediction(
        replace(run(), traffic=counted(trace.expert_ids)), trace, plan, cluster, "picks"
    )
    assert same["predicted_rows"] == same["counted_rows"]
    flipped = picks.copy()
    other = set(range(trace.num_experts)) - set(flipped[0, 0, 0].tolist())
    near = trace.num_experts // 2
    there = flipped[0, 0, 0, 0] >= near
    flipped[0, 0, 0, 0] = min(e for e in other if (e >= near) != there)  # on the other node
    flipped[0, 0, 0].sort()
    moved = replace(run(picks=flipped), traffic=counted(flipped[row, trace.position]))
    found = check_prediction(moved, trace, plan, cluster, "picks", flips=1)
    assert abs(found["predicted_rows"] - found["counted_rows"]) == 1
    with pytest.raises(MoeLocalityError, match="1 picks differ from it"):
        check_prediction(moved, trace, plan, cluster, "picks")


# -- the cap --


def test_a_plan_above_its_cap_is_said_in_text_and_figure():
    """The figure showed the point right of the line, without a word. [A2]"""
    trace = make_trace()
    cluster = ClusterTopology.uniform(4, 2)
    plan = solve(trace, cluster, max_imbalance=1.3)
    expected = plan.provenance["expected_imbalance"]
    unlevel = trace.filter(domains=[trace.domain[0]])  # one domain: its experts are on one node
    candidates = [
        Candidate(name="linear", plan=solve(trace, cluster, method="linear")),
        Candidate(name="placed", plan=plan),
    ]
    found = compare_plans(unlevel, candidates, cluster)
    counted = found.row("node_imbalance").values[1]
    assert counted > 1.3
    (note,) = [note for note in found.notes if "above its cap" in note]
    assert f"{counted:.3f}" in note
    assert f"{expected:.3f} was expected" in note
    (figure,) = [figure for figure in found.figures if isinstance(figure, TradeoffData)]
    texts = [text.get_text() for text in draw(figure).axes[0].texts]
    assert "placed: above the cap" in texts
    kept = compare_plans(trace, candidates, cluster)
    assert not [note for note in kept.notes if "above its cap" in note]


def test_the_line_of_the_balance_says_whether_the_cap_was_kept():
    facts = {"cap": 1.05, "expected": 1.045, "counted": 1.077, "usual_order": 1.072}
    assert "1.077 placed, ABOVE the cap of 1.05 (1.045 was" in balance_line({"balance": facts})
    facts["counted"] = 1.04
    assert "1.040 placed, within the cap of 1.05" in balance_line({"balance": facts})


def test_the_marker_is_plain_json(tmp_path):
    make(tmp_path, "plan.json")
    assert json.loads((tmp_path / MARKER).read_text()) == {"made": ["plan.json"]}


def test_free_port_is_not_one_that_the_kernel_gives_out_or_that_is_taken(monkeypatch):
    """A port of the kernel's own range may be another connection's before the ranks bind it."""
    taken, free, *_ = ports = sorted({launch.free_port() for _ in range(50)})
    assert ports[0] >= 1024
    assert ports[-1] < 32_768  # where the kernel's own begin on Linux
    with socket.socket() as other:
        other.bind(("127.0.0.1", taken))
        other.listen()
        drawn = iter([taken - 10_000, free - 10_000])
        monkeypatch.setattr(launch.secrets, "randbelow", lambda count: next(drawn))
        assert launch.free_port() == free
