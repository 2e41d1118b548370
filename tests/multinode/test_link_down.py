"""A node whose link goes down in the middle of a training: every rank on both sides ends, soon,
with a message, and the launcher too.
"""

import time
from pathlib import Path

import pytest

from moe_locality.trace import read_trace
from tests.multinode.train_program import LIMIT_S

pytestmark = pytest.mark.multinode

PROGRAM = Path(__file__).with_name("train_program.py")
START_S = 200
# what the backend waits for, what ssh waits for, and the launcher's own goodbyes
END_S = LIMIT_S + 90


@pytest.mark.timeout(START_S + END_S + 60)
def test_all_ranks_end_when_a_link_goes_down(two_nodes, tmp_path):
    launch = two_nodes.start(PROGRAM, ["until-broken", str(tmp_path)])
    try:
        wait_for_step(tmp_path / "step", 5, launch)
        two_nodes.set_link(1, "down")
        cut = time.monotonic()
        done = two_nodes.finish(launch, END_S)
        while running := two_nodes.programs():  # beyond the cut nobody can tell the launcher
            assert time.monotonic() < cut + END_S, f"processes {running} have not ended"
            time.sleep(0.2)
    finally:
        two_nodes.end_launch(launch)
        two_nodes.set_link(1, "up")
    assert done.code not in (None, 0), done.output[-4000:]
    why = "broke off on rank {}, which mostly means that another rank died or left before this one"
    for rank in range(4):
        assert why.format(rank) in (tmp_path / f"log-{rank}").read_text(), done.output[-4000:]
    # a launcher that sees one rank end kills the others of its node, maybe before they raise
    errors = {int(f.name[-1]): f.read_text() for f in tmp_path.glob("error-?")}
    assert {rank // 2 for rank in errors} == {0, 1}, done.output[-4000:]
    for rank, text in errors.items():
        assert why.format(rank) in text
    trace = read_trace(tmp_path / "trace")
    assert trace.num_tokens > 0


def wait_for_step(file: Path, step: int, launch) -> None:
    deadline = time.monotonic() + START_S
    while not file.exists() or int(file.read_text() or 0) < step:
        assert launch.poll() is None, launch.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "the training did not begin"
        time.sleep(0.2)
