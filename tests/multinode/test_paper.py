"""launch/paper.sh over a hostfile: a recording is decoded on nodes, with times of their links."""

import json

import pytest

from benchmarks._nodes import ROOT, Nodes
from moe_locality.trace import write_trace
from tests.launch import skip_without_expert_parallelism
from tests.unit.made_trace import make_trace

LIMIT_S = 240

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(LIMIT_S + 60)]


def test_launch_paper_decodes_a_recording_on_the_nodes_of_a_hostfile(two_nodes: Nodes, tmp_path):
    """[F17.7] The rows that the links carry are those that recording and plans say."""
    skip_without_expert_parallelism()
    write_trace(make_trace(tokens_per_request=16), tmp_path / "trace.npz")
    words = ["--trace", str(tmp_path / "trace.npz"), "--out", str(tmp_path / "out")]
    words += ["--width", "32", "--new-tokens", "5"]
    done = two_nodes.finish(two_nodes.start(ROOT / "launch" / "paper.sh", words), LIMIT_S)
    assert done.code == 0, done.output[-6000:]
    found = json.loads((tmp_path / "out" / "paper.json").read_text())
    assert (found["nodes"], found["ranks_per_node"], found["timed"]) == (2, 2, True)
    assert len(found["conditions"]) == 5
    for facts in found["conditions"].values():
        counted = facts["decode rows across nodes per token"]
        assert counted == pytest.approx(facts["predicted rows per token"])
        assert facts["decode step, median"] > 0
    assert (tmp_path / "out" / "report.html").exists()
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*"))
