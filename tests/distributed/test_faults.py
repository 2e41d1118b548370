"""What goes wrong in a real run, some started by the real launcher: every rank ends, soon, with a
message that a stranger understands, and what was recorded so far stays readable.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

import moe_locality
from examples.lm.model import build_model, preset
from moe_locality.demo.launch import examples_folder, launch_command, launch_environment
from moe_locality.errors import MoeLocalityError
from moe_locality.placement import PlacementPlan
from moe_locality.trace import read_trace
from tests.launch import run_ranks

NUM_RANKS = 2
LIMIT_S = 180  # on a machine that does other things too
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


def finish(process: subprocess.Popen[str]) -> str:
    """Return the output; kill everything and fail where the launcher does not end in time."""
    try:
        output, _ = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"still running after {LIMIT_S} s:\n{output[-4000:]}")
    return output


def linear_plan(**changes: object) -> PlacementPlan:
    sizes: dict = {
        "num_experts": NUM_EXPERTS,
        "layer_ids": tuple(range(NUM_LAYERS)),
        "num_nodes": 1,
        "ranks_per_node": NUM_RANKS,
    }
    return PlacementPlan.linear(**{**sizes, **changes})


def plan_without_an_expert(folder: Path) -> Path:
    plan = folder / "plan.json"
    linear_plan().write(plan)
    content = json.loads(plan.read_text())
    content["physical_to_logical_map"][1][3] = 2  # expert 3 of layer 1 is nowhere, expert 2 twice
    plan.write_text(json.dumps(content))
    return plan


@pytest.mark.slow
def test_a_plan_without_an_expert_stops_all_ranks_of_a_launch(tmp_path):
    plan = plan_without_an_expert(tmp_path)
    process = start(tmp_path, "--layer", "locality", section={"plan": str(plan)})
    output = finish(process)
    assert process.returncode != 0, output[-4000:]
    assert len(re.findall("PlacementError: the plan.*layer 1", output)) == NUM_RANKS, output[-4000:]
    assert "progress 1 " not in output


def sections(folder: Path) -> dict[str, tuple[dict, str]]:
    """What is wrong with a section, and what every rank has to say about it."""
    (folder / "hostfile").write_text("worker-0 slots=two\n")
    (folder / "file").write_text("not a directory")
    plans = {"experts": linear_plan(num_experts=64)}
    plans["nodes"] = linear_plan(num_nodes=2, ranks_per_node=1)
    for name, plan in plans.items():
        plan.write(folder / f"{name}.json")
    nodes = {"plan": str(folder / "nodes.json"), "cluster": {"num_nodes": 1, "ranks_per_node": 2}}
    return {
        "hostfile": (
            {"cluster": {"hostfile": str(folder / "hostfile")}},
            "TopologyError.*hostfile.*line 1.*slots=two",
        ),
        "plan without an expert": (
            {"plan": str(plan_without_an_expert(folder))},
            "PlacementError: the plan.*layer 1",
        ),
        "plan of another model": (
            {"plan": str(folder / "experts.json")},
            "PlacementError.*64.*8",
        ),
        "plan for other nodes": (
            nodes,
            r"PlacementError: found a plan whose ranks lie on nodes \[0, 1\].*"
            r"expected \[0, 0\]",
        ),
        "trace folder": (
            {"trace": {"path": str(folder / "file" / "trace")}},
            "TraceError.*file.*trace",
        ),
    }


def refusals(rank, world, wrong):
    said = {}
    for name, (section, _) in wrong.items():
        config = {
            "train_micro_batch_size_per_gpu": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "moe_locality": section,
        }
        model = build_model(preset("tiny"), moe_locality.MoE, ep_size=world, ep_rank=rank)
        with pytest.raises(MoeLocalityError) as caught:
            moe_locality.initialize(
                model=model, model_parameters=list(model.parameters()), config=config
            )
        said[name] = f"{type(caught.value).__name__}: {caught.value}"
    return said


def test_what_is_wrong_with_a_section_stops_all_ranks_before_training(tmp_path):
    wrong = sections(tmp_path)
    for said in run_ranks(refusals, NUM_RANKS, wrong, deepspeed=True):
        for name, (_, words) in wrong.items():
            assert re.search(words, said[name], re.DOTALL), (name, said[name])


def rank_processes(launcher: psutil.Process) -> list[psutil.Process]:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        found = {}
        with contextlib.suppress(psutil.NoSuchProcess):  # what it asks of the system ends soon
            for child in launcher.children(recursive=True):
                found |= {word: child for word in child.cmdline() if "--local_rank=" in word}
        if len(found) == NUM_RANKS:
            return [found[f"--local_rank={rank}"] for rank in range(NUM_RANKS)]
        time.sleep(0.1)
    pytest.fail(f"the launcher did not start {NUM_RANKS} ranks")


def test_a_killed_rank_ends_the_run_and_the_trace_stays_readable(tmp_path):
    trace = tmp_path / "trace"
    section = {"trace": {"path": str(trace), "shard_tokens": 512}}
    process = start(tmp_path, "--layer", "locality", "--steps", "1000", section=section)
    try:
        survivor, victim = rank_processes(psutil.Process(process.pid))
        deadline = time.monotonic() + LIMIT_S
        while len(list(trace.glob("part-*.parquet"))) < 6:
            assert time.monotonic() < deadline, "the run recorded nothing"
            time.sleep(0.1)
        launcher = victim.parent()
        launcher.suspend()  # it ends the other rank when it sees this, perhaps before that one does
        victim.kill()
        deadline = time.monotonic() + LIMIT_S
        while survivor.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, "rank 0 goes on alone"
            time.sleep(0.1)
        launcher.resume()
        output = finish(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "rank 0 failed, all ranks are being ended (a broken connection means" in output
    assert "exits with return code" in output
    found = read_trace(trace)
    assert found.num_tokens >= 6 * 512 // NUM_RANKS
    assert found.num_experts == NUM_EXPERTS
    assert found.num_layers == NUM_LAYERS
