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
        errors = wait_for_errors(tmp_path, cut + END_S)
    finally:
        two_nodes.end_launch(launch)
        two_nodes.set_link(1, "up")
    assert done.code not in (None, 0), done.output[-4000:]
    assert sorted(errors) == [0, 1, 2, 3], done.output[-4000:]
    explained = [text for text in errors.values() if "another rank died or left" in text]
    assert len(explained) == 4, errors
    trace = read_trace(tmp_path / "trace")
    assert trace.num_tokens > 0


def wait_for_step(file: Path, step: int, launch) -> None:
    deadline = time.monotonic() + START_S
    while not file.exists() or int(file.read_text() or 0) < step:
        assert launch.poll() is None, launch.communicate()[0][-4000:]
        assert time.monotonic() < deadline, "the training did not begin"
        time.sleep(0.2)


def wait_for_errors(folder: Path, deadline: float) -> dict[int, str]:
    """The ranks beyond the cut cannot tell the launcher; their files are on the same disk."""
    while len(list(folder.glob("error-?"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.2)
    return {int(f.name.split("-")[1]): f.read_text() for f in folder.glob("error-?")}
