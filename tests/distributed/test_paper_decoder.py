"""examples/paper_decoder.py: the experiment of arXiv 2604.23150, by ranks that decode."""

import json
import subprocess
from pathlib import Path

import pytest

from moe_locality.demo.launch import launch_environment
from moe_locality.trace import write_trace
from tests.fork_launcher import forked_command
from tests.launch import skip_without_expert_parallelism
from tests.unit.made_trace import make_trace

ROOT = Path(__file__).parents[2]


def step(kind, tokens, rows, seconds):
    links = {"dispatch": [7, 7, rows], "combine": [7, 7, rows]}
    return {
        "kind": kind,
        "tokens": tokens,
        "rows": links,
        "bytes": {name: [4 * n for n in sums] for name, sums in links.items()},
        "seconds": seconds,
    }


def test_counted_takes_the_steps_in_which_no_rank_reads_a_prompt():
    pytest.importorskip("transformers")
    from examples import paper_decoder

    first = [step("prefill", 9, 90, 9.0), step("decode", 2, 3, 0.1), step("decode", 2, 1, 0.3)]
    other = [step("decode", 2, 50, 9.0), step("decode", 2, 5, 0.2), step("idle", 0, 1, 0.4)]
    found = paper_decoder.counted([{"steps": first}, {"steps": other}])
    assert found["decode rows across nodes per token"] == 2 * (3 + 5 + 1 + 1) / 6
    assert found[paper_decoder.BYTES] == 4 * found["decode rows across nodes per token"]
    assert found["largest sent by a rank"] == 4 * 2 * (5 + 1) / 2
    assert found[paper_decoder.STEP] == pytest.approx(200)  # where all requests decode
    assert found["full"] == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_paper_in_decoder_trains_records_and_decodes(tmp_path):
    """[F17.7] ``bench paper`` without a trace, with a model that has hardly learned; the second run
    takes the model that is there.
    """
    skip_without_expert_parallelism()
    from moe_locality.demo import paper

    words = ["--steps", "4", "--earlier", "24", "--served", "16", "--new-tokens", "4"]
    found = [paper.paper_in_decoder(tmp_path, nodes=n, arguments=words) for n in paper.NODES]
    assert "recording: " in (tmp_path / "ranks-2-nodes.log").read_text()
    assert "recording: " not in (tmp_path / "ranks-4-nodes.log").read_text()
    for nodes, one in zip(paper.NODES, found, strict=True):
        assert (tmp_path / f"report-{nodes}-nodes.html").exists()
        for facts in one["conditions"].values():
            counted = facts["decode rows across nodes per token"]
            assert counted == pytest.approx(facts["predicted rows per token"])
        (title, _, rows), told, last = paper.decoder_tables(one)
        assert f"{nodes} nodes" in title
        assert [name for name, *_ in rows] == list(one["conditions"])
        assert len(told[2]) >= 3
        assert len(last[2]) == len(paper.PAPER)


@pytest.mark.slow
def test_the_experiment_replays_a_recording_on_two_nodes(tmp_path):
    """[F17.7] The rows that the exchange counts are those that the recording and its plans say."""
    skip_without_expert_parallelism()
    script = ROOT / "examples" / "paper_decoder.py"
    trace = tmp_path / "trace.npz"
    write_trace(make_trace(tokens_per_request=16), trace)
    words = ["--out", str(tmp_path / "out"), "--trace", str(trace), "--num-nodes", "2"]
    done = subprocess.run(
        forked_command(2, script, [*words, "--width", "32", "--new-tokens", "5"]),
        env={**launch_environment(), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "bytes, but no times of links" in done.stdout
    found = json.loads((tmp_path / "out" / "paper.json").read_text())
    assert len(found["conditions"]) == 5
    for facts in found["conditions"].values():
        counted = facts["decode rows across nodes per token"]
        assert counted == pytest.approx(facts["predicted rows per token"])
    assert found["conditions"]["ours, predicted homes"]["moved"] > 0
    recipe = found["conditions"]["the paper's recipe"]
    assert recipe["changes"]["decode bytes across nodes per token"] < -30
    assert "decode step, median" not in recipe
    assert "in a running decoder" in (tmp_path / "out" / "report.html").read_text()
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*"))
