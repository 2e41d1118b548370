"""What goes wrong in a real run, started by the real launcher: every rank ends, soon, with a
message that a stranger understands, and what was recorded so far stays readable.
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from moe_locality.demo.launch import examples_folder, launch_command, launch_environment
from moe_locality.placement import PlacementPlan
from moe_locality.trace import read_trace

NUM_RANKS = 2
LIMIT_S = 90
NUM_EXPERTS, NUM_LAYERS = 8, 2  # of the preset "tiny"


def start(tmp_path: Path, *arguments: str, section: dict | None = None) -> subprocess.Popen[str]:
    extra: tuple[str, ...] = ()
    if section is not None:
        config = tmp_path / "ds_config.json"
        config.write_text(
            json.dumps(
                {
                    "train_micro_batch_size_per_gpu": 4,
                    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
                    "moe_locality": section,
                }
            )
        )
        extra = ("--deepspeed", "--deepspeed_config", str(config))
    script = examples_folder() / "train_lm.py"
    line = ["--preset", "tiny", "--out", str(tmp_path / "run"), *arguments, *extra]
    return subprocess.Popen(
        launch_command(NUM_RANKS, script, line),
        env=launch_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], limit_s: float = LIMIT_S) -> str:
    """Return the output; kill everything and fail where the launcher does not end in time."""
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {limit_s} s:\n{output[-4000:]}")
    return output


def failing_run(tmp_path: Path, *arguments: str, section: dict | None = None) -> str:
    process = start(tmp_path, *arguments, section=section)
    output = finish(process)
    assert process.returncode != 0, output[-4000:]
    return output


def linear_plan(**changes: object) -> PlacementPlan:
    sizes: dict = {
        "num_experts": NUM_EXPERTS,
        "layer_ids": tuple(range(NUM_LAYERS)),
        "num_nodes": 1,
        "ranks_per_node": NUM_RANKS,
    }
    return PlacementPlan.linear(**{**sizes, **changes})


def ranks_that_said(output: str, words: str) -> int:
    return len(re.findall(words, output))


def test_a_wrong_hostfile_stops_all_ranks(tmp_path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("worker-0 slots=two\n")
    section = {"cluster": {"hostfile": str(hostfile)}}
    output = failing_run(tmp_path, "--layer", "locality", section=section)
    assert ranks_that_said(output, r"TopologyError.*hostfile") == NUM_RANKS, output[-4000:]
    assert "slots=two" in output
    assert "line 1" in output


def test_a_plan_of_another_model_stops_all_ranks(tmp_path):
    plan = tmp_path / "plan.json"
    linear_plan(num_experts=64).write(plan)
    output = failing_run(tmp_path, "--layer", "locality", section={"plan": str(plan)})
    assert ranks_that_said(output, r"PlacementError.*64.*8") == NUM_RANKS, output[-4000:]


def test_a_plan_without_an_expert_stops_all_ranks(tmp_path):
    plan = tmp_path / "plan.json"
    linear_plan().write(plan)
    content = json.loads(plan.read_text())
    content["physical_to_logical_map"][1][3] = 2  # expert 3 of layer 1 is nowhere, expert 2 twice
    plan.write_text(json.dumps(content))
    output = failing_run(tmp_path, "--layer", "locality", section={"plan": str(plan)})
    assert ranks_that_said(output, r"PlacementError") == NUM_RANKS, output[-4000:]
    assert "layer 1" in output


def test_a_plan_for_other_nodes_stops_all_ranks(tmp_path):
    plan = tmp_path / "plan.json"
    linear_plan(num_nodes=2, ranks_per_node=1).write(plan)
    section = {"plan": str(plan), "cluster": {"num_nodes": 1, "ranks_per_node": 2}}
    output = failing_run(tmp_path, "--layer", "locality", section=section)
    words = r"PlacementError: found a plan for expert groups on nodes \[0, 1\].*expected \[0, 0\]"
    assert ranks_that_said(output, words) == NUM_RANKS, output[-4000:]


def test_an_unwritable_trace_folder_stops_all_ranks_before_training(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    section = {"trace": {"path": str(tmp_path / "file" / "trace")}}
    output = failing_run(tmp_path, "--layer", "locality", section=section)
    assert "TraceError" in output, output[-4000:]
    assert "progress 1 " not in output


def rank_process(launcher: psutil.Process, rank: int, limit_s: float = 60) -> psutil.Process:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        for child in launcher.children(recursive=True):
            if f"--local_rank={rank}" in child.cmdline():
                return child
        time.sleep(0.1)
    pytest.fail(f"the launcher started no rank {rank}")


def test_a_killed_rank_ends_the_run_and_the_trace_stays_readable(tmp_path):
    trace = tmp_path / "trace"
    section = {"trace": {"path": str(trace), "shard_tokens": 512}}
    process = start(tmp_path, "--layer", "locality", "--steps", "1000", section=section)
    try:
        victim = rank_process(psutil.Process(process.pid), 1)
        deadline = time.monotonic() + LIMIT_S
        while len(list(trace.glob("part-*.parquet"))) < 6:
            assert time.monotonic() < deadline, "the run recorded nothing"
            time.sleep(0.1)
        victim.kill()
        killed = time.monotonic()
        output = finish(process, limit_s=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert time.monotonic() - killed < 60
    assert "rank 0 failed, all ranks are being ended (a broken connection means" in output
    assert "exits with return code" in output
    found = read_trace(trace)
    assert found.num_tokens >= 6 * 512 // NUM_RANKS
    assert found.num_experts == NUM_EXPERTS
    assert found.num_layers == NUM_LAYERS
