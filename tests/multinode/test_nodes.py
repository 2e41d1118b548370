"""The nodes themselves: what they need, what they count, and that none is left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import _nodes
from benchmarks._nodes import Nodes

pytestmark = pytest.mark.multinode

OWNER = """
import subprocess
from benchmarks._nodes import Nodes
nodes = Nodes(2, slots=1, mbit_per_s=100).__enter__()
sleeper = subprocess.Popen([*nodes.enter(1), "sleep", "3000"])
print(nodes.switch, *nodes.namespaces, nodes.folder, sleeper.pid, flush=True)
input()
"""


def test_a_machine_without_the_tools_says_which(monkeypatch):
    monkeypatch.setattr(_nodes, "PATH", "/nowhere")
    if os.geteuid() == 0:
        assert "pdsh (Debian: apt install iproute2 openssh-server pdsh)" in _nodes.why_not()
    else:
        assert "root" in _nodes.why_not()


def fetch(nodes: Nodes) -> list[dict[str, int]]:
    """Bring 2 MB from node1 to node0; return what the links counted meanwhile."""
    before = nodes.link_bytes()
    ssh = ["ssh", *nodes._ssh_options(), "-p", str(_nodes.SSH_PORT), "node1"]
    command = [*nodes.enter(0), *ssh, "head -c 2000000 /dev/urandom"]
    sent = subprocess.run(command, capture_output=True, check=True).stdout
    assert len(sent) == 2_000_000
    after = nodes.link_bytes()
    return [{key: a[key] - b[key] for key in a} for a, b in zip(after, before, strict=True)]


def test_frames_carry_their_headers(can_have_nodes):
    with Nodes(2, slots=1, frame_bytes=1500) as nodes:
        sent = fetch(nodes)[1]["sent"]
    payload, frame = 1448, 1514  # TCP's share of 1500 bytes; with the Ethernet header
    assert 2_000_000 * frame / payload < sent < 2_030_000 * frame / payload


def test_the_links_count_what_passes_between_nodes(two_nodes):
    grown = fetch(two_nodes)
    for there, here in ((1, 0), (0, 1)):  # what one sends the other receives, but for odd packets
        assert abs(grown[there]["sent"] - grown[here]["received"]) < 5_000
    assert 2_000_000 < grown[1]["sent"] < 2_200_000
    assert grown[0]["sent"] < 200_000


def test_what_a_killed_owner_left_is_removed_and_the_living_stay(two_nodes):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env={**os.environ, "PYTHONPATH": str(_nodes.ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        *names, folder, sleeper = owner.stdout.readline().split()
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    assert len(names) == 3
    assert all((_nodes.NETNS / name).exists() for name in names)
    assert is_running(sleeper)
    assert set(names) <= set(_nodes.remove_leftovers())
    for name in names:
        assert not (_nodes.NETNS / name).exists()
        assert not (_nodes.HOSTS / name).exists()
    assert not Path(folder).exists()
    assert not is_running(sleeper)
    assert all((_nodes.NETNS / name).exists() for name in two_nodes.namespaces)


def test_nothing_is_left_after_an_error_inside(can_have_nodes):
    nodes = Nodes(2, slots=1)
    made = [*nodes.namespaces, nodes.switch]

    def fail_inside():
        with nodes:
            assert all((_nodes.NETNS / name).exists() for name in made)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert not any((_nodes.NETNS / name).exists() for name in made)
    assert not nodes.folder.exists()


def is_running(pid: str) -> bool:
    try:
        return " Z " not in Path("/proc", pid, "stat").read_text()
    except OSError:
        return False
