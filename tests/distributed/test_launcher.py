"""DeepSpeed's real launcher, twice on one machine: the nodes of a hostfile without the machines."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moe_locality.demo.launch import free_port

ROOT = Path(__file__).parents[2]

PROGRAM = """
import json, sys
import torch.distributed as dist
from moe_locality.topology import ClusterTopology, discover_topology

dist.init_process_group("gloo")
found, told = discover_topology(), ClusterTopology.from_env()
if dist.get_rank() == 0:
    with open(sys.argv[-1], "w") as file:
        json.dump([found.to_dict(), told.to_dict()], file)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_launchers_on_one_machine_are_two_nodes(tmp_path):
    (tmp_path / "hostfile").write_text("nodeA slots=1\nnodeB slots=1\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "hostfile"]
    launcher += ["--no_ssh", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    nodes = [
        subprocess.Popen(
            [*launcher, "--node_rank", str(node), "program.py", "answer.json"],
            cwd=tmp_path,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]
    try:
        for node in nodes:
            output, _ = node.communicate(timeout=200)
            assert node.returncode == 0, output
    finally:
        for node in nodes:
            node.kill()
    found, told = json.loads((tmp_path / "answer.json").read_text())
    host = socket.gethostname()
    assert found["rank_to_node"] == told["rank_to_node"] == [0, 1]
    assert found["node_names"] == [f"{host}#0", f"{host}#1"]
