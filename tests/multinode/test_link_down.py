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
        wait_for_ends(tmp_path, cut + END_S)
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


def wait_for_ends(folder: Path, deadline: float) -> None:
    """The ranks beyond the cut cannot tell the launcher; their process ids are on the same disk."""
    pids = [int(file.read_text()) for file in folder.glob("pid-?")]
    assert len(pids) == 4
    while alive := [pid for pid in pids if runs(pid)]:
        assert time.monotonic() < deadline, f"processes {alive} have not ended"
        time.sleep(0.2)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
