"""The section "tracking": real trainings on gloo ranks, real offline wandb runs, read back."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import moe_locality
from moe_locality.compare import read_run
from moe_locality.demo.launch import launch_command, launch_environment
from moe_locality.errors import ConfigError
from moe_locality.layer.run_log import RunLog
from moe_locality.layer.state import moe_modules
from tests.distributed import relabel_nets as nets
from tests.fork_launcher import forked_command
from tests.launch import run_ranks
from tests.unit.test_tracking import ReadBack, offline  # noqa: F401  a fixture

ROOT = Path(__file__).parents[2]
WORLD, EVERY = 4, 2
LINKS = ("same_rank", "same_node", "cross_node")


def engine_of(rank, section, **changes):
    cluster = {"num_nodes": 2, "ranks_per_node": WORLD // 2}
    config = nets.config_of(gradient_accumulation_steps=2, moe_locality={"cluster": cluster})
    config["moe_locality"] |= section
    options = {"drop_tokens": True, "capacity_factor": 0.5} | changes
    net = nets.build("stock", WORLD, rank, **options)
    return moe_locality.initialize(
        model=net, model_parameters=list(net.parameters()), config=config
    )[0]


def train(engine, steps, rank):
    """Per optimizer step: losses of the micro-batches, the experts of each layer, the counters."""
    found, picked = [], []
    for number, moe in enumerate((engine.module.moe1, engine.module.moe2)):
        moe.deepspeed_moe.gate.register_forward_hook(
            lambda _gate, _args, output, number=number: picked.append((number, output[3].numpy()))
        )
    engine.train()
    for step in range(steps):
        losses = []
        if step == 5 and engine.moe_locality.recorder is not None:
            engine.moe_locality.recorder.flush()  # there are shards now, however slow the disk is
        for part in (0, 1):
            x, _ = nets.batch(2 * step + part, rank)
            loss = engine(x).square().mean() + 0.01 * engine.module.l_aux
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        used = [
            set(np.concatenate([ids.ravel() for n, ids in picked if n == number]).tolist()) - {-1}
            for number in (0, 1)
        ]
        kept = sum((ids >= 0).sum() for _, ids in picked)
        picks = sum(ids.size for _, ids in picked)
        picked.clear()
        report = engine.moe_locality.traffic_report()
        found.append((losses, used, kept, picks, report))
    return found


def _tracked(rank, world, folder):
    section = {
        "dispatch": {"exchange": "hierarchical", "timing": True},
        "trace": {"path": f"{folder}/trace", "shard_tokens": 40},
        "tracking": {
            "project": "locality",
            "name": "usual",
            "job_type": "baseline",
            "dir": f"{folder}/w",
            "run_dir": f"{folder}/run",
            "every_n_steps": EVERY,
        },
    }
    engine = engine_of(rank, section)
    directory = engine.moe_locality.log.tracker.directory
    found = train(engine, 7, rank)
    engine.destroy()
    assert engine.moe_locality.log is None
    return str(directory), found


def _bytes(report, link):
    return sum(kind[link] for kind in report["by_link"].values())


def test_a_training_logs_what_its_layers_counted(offline, tmp_path):  # noqa: F811
    """The section "tracking" was checked and ignored: a training logged nothing. Every [C1]
    n-th step has a line whose values are those of the layers' own counters, over all ranks.
    """
    per_rank = run_ranks(_tracked, WORLD, str(tmp_path), deepspeed=True)
    assert [directory for directory, _ in per_rank[1:]] == ["None"] * (WORLD - 1)
    back = ReadBack(tmp_path / "w" / "wandb" / per_rank[0][0].rsplit("/", 1)[1])
    run = back.of("run")[0]
    assert (run.project, run.run_group, run.display_name, run.job_type) == (
        *("locality", "Net", "usual", "baseline"),
    )
    config = back.config()
    assert config["ds_config"]["gradient_accumulation_steps"] == 2
    assert (config["model"], config["num_ranks"], config["plan"]) == ("Net", WORLD, None)
    metrics = {m.glob_name or m.name: m.step_metric for m in back.of("metric")}
    assert {metrics[f] for f in ("traffic/*", "load/*", "quality/*", "time/*")} == {"step"}
    lines = [line for line in back.history() if "traffic/copies" in line]
    assert [line["step"] for line in lines] == [2, 4, 6]
    nothing = {"by_link": {}, "per_layer": [{"load": [0] * WORLD}] * 2, "stage_us": {}}
    for line in lines:
        done = line["step"]
        steps = [rank[1][done - 1] for rank in per_rank]
        now = steps[0][4]
        before = per_rank[0][1][done - EVERY - 1][4] if done > EVERY else nothing
        for link in LINKS:
            wanted = (_bytes(now, link) - _bytes(before, link)) / EVERY
            assert line[f"traffic/{link}_bytes"] == wanted > 0
        assert line["quality/loss"] == pytest.approx(np.mean([step[0] for step in steps]), rel=1e-6)
        load = np.array(
            [
                np.subtract(a["load"], b["load"])
                for a, b in zip(now["per_layer"], before["per_layer"], strict=True)
            ]
        )
        by_node = load.reshape(2, 2, -1).sum(axis=2)
        assert line["load/rank_imbalance"] == pytest.approx((load.max(1) / load.mean(1)).mean())
        wanted = (by_node.max(1) / by_node.mean(1)).mean()
        assert line["load/node_imbalance"] == pytest.approx(wanted)
        # of the last step alone
        last = per_rank[0][1][done - 2][4]
        crossed, earlier = (r["rows_by_link"]["dispatch"]["cross_node"] for r in (now, last))
        picks = sum(step[3] for step in steps)
        assert line["traffic/copies"] == pytest.approx((crossed - earlier) / (picks / 2))
        kept = sum(step[2] for step in steps)
        assert line["load/dropped_frac"] == pytest.approx(1 - kept / picks)
        assert 0 < line["load/dropped_frac"] < 1
        used = [set.union(*(step[1][layer] for step in steps)) for layer in (0, 1)]
        assert line["load/distinct"] == pytest.approx(sum(map(len, used)) / (2 * WORLD))
        for stage, us in now["stage_us"].items():
            spent = np.mean(us) - np.mean(before["stage_us"].get(stage, 0))
            assert line[f"time/{stage.replace(' ', '_')}_us"] == pytest.approx(spent / EVERY)
        assert line["time/step_us"] > 0
        assert line["trace/dropped_tokens"] == 0
    assert lines[-1]["trace/recorded_tokens"] > 0
    assert back.summary()["steps"] == 7
    assert (
        back.summary()["total/dispatch/cross_node_bytes"]
        == (per_rank[0][1][5][4]["by_link"]["dispatch"]["cross_node"])
    )
    assert back.of("exit")[0].exit_code == 0
    (artifact,) = [a for a in back.of("artifact") if a.type == "trace"]
    refs = {entry.ref for entry in artifact.manifest.contents}
    there = {path.resolve().as_uri() for path in (tmp_path / "trace").glob("*.parquet")}
    assert refs
    assert refs <= there
    _check_directory(tmp_path / "run", per_rank[0][1][5][4], lines)


def _check_directory(folder, report, lines):
    run = read_run(folder)
    assert [(step["step"], step["steps"]) for step in run.steps] == [(2, 2), (4, 2), (6, 2)]
    assert [step["loss"] for step in run.steps] == [line["quality/loss"] for line in lines]
    for key in ("ranks", "by_link", "rows_by_link", "messages_by_link", "load"):
        assert run.traffic[key] == report[key], key
    for key in ("bytes", "rows"):
        assert run.traffic[key]["dispatch"] == report[key]["dispatch"]
    assert run.summary["ds_config"]["moe_locality"]["tracking"]["every_n_steps"] == EVERY
    assert run.summary["steps"] == run.traffic["steps"] == 6


def _off(rank, world, folder):
    from deepspeed.runtime.engine import DeepSpeedEngine

    for tracking in ("auto", {"enabled": False, "run_dir": f"{folder}/run"}):
        engine = engine_of(rank, {"tracking": tracking})
        assert engine.moe_locality.log is None
        for name in ("step", "backward", "destroy"):
            assert getattr(engine, name).__func__ is getattr(DeepSpeedEngine, name)
        assert not any(m.deepspeed_moe.gate._forward_hooks for _, m in moe_modules(engine.module))


def _refused(rank, world, folder):
    tracking = {"tracking": {"run_dir": f"{folder}/file/run", "mode": "disabled"}}
    with pytest.raises(ConfigError, match="cannot write the run directory"):
        engine_of(rank, tracking)
    with pytest.raises(ConfigError, match=r"found the section tracking on ranks \[1\] and not on"):
        engine_of(rank, tracking if rank == 1 else {})
    # one rank that is asked is enough: rank 0
    engine = engine_of(rank, {"tracking": {"mode": "disabled"}} if rank == 0 else {})
    assert isinstance(engine.moe_locality.log, RunLog)


def _resets_and_failures(rank, world, folder):
    tracking = {"mode": "disabled", "run_dir": f"{folder}/run", "every_n_steps": 2}
    engine = engine_of(rank, {"tracking": tracking})
    train(engine, 3, rank)
    engine.moe_locality.reset_traffic()
    found = train(engine, 3, rank)
    if rank == 0:
        run = read_run(f"{folder}/run")
        assert [s["step"] for s in run.steps] == [2, 4, 6]
        assert run.traffic["by_link"] == found[-1][4]["by_link"]
        assert run.traffic["steps"] == 3
        wanted = _bytes(found[0][4], "cross_node")  # of one step
        assert run.steps[1]["traffic/cross_node_bytes"] == wanted
        engine.moe_locality.log.config = engine.moe_locality.log.config.model_copy(
            update={"run_dir": f"{folder}/file/gone"}  # as a disk that went away
        )
    train(engine, 2, rank)
    assert engine.global_steps == 8
    engine.destroy()


@pytest.mark.parametrize("case", [_off, _refused, _resets_and_failures])
def test_tracking_is_off_refused_on_all_ranks_or_goes_on(case, tmp_path):
    """Without the section nothing is wrapped or hooked; what rank 0 cannot start is an [C1]
    error on all ranks; a disk that goes away does not end the training; a reset of the counters
    is not a negative number of bytes.
    """
    (tmp_path / "file").write_text("")
    run_ranks(case, WORLD, str(tmp_path), deepspeed=True)


def _pipeline(rank, world, folder):
    import deepspeed
    from deepspeed.moe.layer import MoE as Stock
    from deepspeed.pipe import PipelineModule

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = Stock(8, nets._expert(), num_experts=4, k=1)

        def forward(self, x):
            return x + self.moe(x)[0]

    deepspeed.utils.logger.setLevel("WARNING")
    layers = [torch.nn.Linear(8, 8), Block(), Block(), torch.nn.Linear(8, 8)]
    net = PipelineModule(
        layers, num_stages=2, loss_fn=torch.nn.functional.mse_loss, partition_method="uniform"
    )
    tracking = {"mode": "disabled", "run_dir": f"{folder}/run", "every_n_steps": 1}
    config = nets.config_of(gradient_accumulation_steps=2, moe_locality={"tracking": tracking})
    engine = moe_locality.initialize(
        model=net, model_parameters=list(net.parameters()), config=config
    )[0]
    data = iter([tuple(torch.randn(4, 8) for _ in range(2)) for _ in range(6)])
    losses = [engine.train_batch(data).item() for _ in range(3)]
    engine.destroy()
    if rank == 0:
        run = read_run(f"{folder}/run")
        assert [step["loss"] for step in run.steps] == pytest.approx(losses)
        assert len(run.traffic["per_layer"]) == 2  # one of each stage
        assert run.steps[-1]["traffic/same_rank_bytes"] > 0


def test_a_pipeline_is_tracked_by_its_train_batch(tmp_path):
    """The hook was on engine.step, which a pipeline refuses to run. [C1]"""
    run_ranks(_pipeline, 2, str(tmp_path), deepspeed=True)


SCRIPT = """
import sys
import deepspeed
import torch
import moe_locality
from moe_locality.compat import avoid_cpu_jit
from tests.distributed import relabel_nets as nets

folder, plan, fails = sys.argv[-3:]
avoid_cpu_jit()
deepspeed.init_distributed(verbose=False)
rank = torch.distributed.get_rank()
section = {"cluster": {"num_nodes": 2, "ranks_per_node": 1}, "plan": plan}
section["tracking"] = {"dir": folder + "/w", "run_dir": folder, "every_n_steps": 2}
if plan == "auto":
    section["cluster"] = {"num_nodes": 2, "ranks_per_node": 1}
net = nets.build("stock", 2, rank)
engine = moe_locality.initialize(
    model=net, model_parameters=list(net.parameters()), config=nets.config_of(moe_locality=section)
)[0]
for step in range(9):
    x, _ = nets.batch(step, rank)
    engine.backward(engine(x).square().mean())
    engine.step()
    if fails == "fails" and step == 4:
        raise RuntimeError("somebody's mistake")
"""


def script(tmp_path, folder, plan="auto", fails="no", command=launch_command):
    """Somebody's script, started by DeepSpeed's launcher; it never calls engine.destroy()."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = command(2, tmp_path / "script.py", [str(tmp_path / folder), str(plan), fails])
    env = {**launch_environment(), "PYTHONPATH": str(ROOT)}  # it imports tests.distributed
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def exits(folder):
    (found,) = (folder / "w" / "wandb").glob("offline-run-*")
    back = ReadBack(found)
    return [e.exit_code for e in back.of("exit")], back


@pytest.mark.slow
def test_two_runs_of_somebodys_script_are_compared(offline, tmp_path):  # noqa: F811
    """Only the example's script wrote what `compare` reads. With "run_dir" any training [F6]
    does, and both wandb runs are closed at the end of the process.
    """
    plan = tmp_path / "reversed.json"
    made = nets.plan_of(2, 3)
    type(made)(
        layer_ids=made.layer_ids,
        num_experts=made.num_experts,
        num_nodes=2,
        ranks_per_node=1,
        physical_to_logical_map=made.physical_to_logical_map,
    ).write(plan)
    for folder, given, command in (
        ("usual", "auto", forked_command),
        ("placed", plan, launch_command),
    ):
        done = script(tmp_path, folder, given, command=command)
        assert done.returncode == 0, done.stdout + done.stderr
    assert exits(tmp_path / "usual")[0] == [0]
    codes, back = exits(tmp_path / "placed")
    assert codes == [0]
    (artifact,) = [a for a in back.of("artifact") if a.type == "plan"]
    digest = json.loads(artifact.metadata)["digest"]
    command = ["compare", str(tmp_path / "usual"), str(tmp_path / "placed"), "--json"]
    compared = subprocess.run(
        [sys.executable, "-m", "moe_locality.cli", *command],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
    found = json.loads(compared.stdout)
    rows = {row["metric"]: row for row in found["rows"]}
    assert rows["traffic/cross_node_bytes"]["unit"] == "bytes per step, all directions"
    for name, folder in (("baseline", "usual"), ("ours", "placed")):
        run = read_run(tmp_path / folder)
        wanted = _bytes(run.traffic, "cross_node") / 8
        assert rows["traffic/cross_node_bytes"][name] == wanted > 0
    assert rows["quality/train_loss"]["ratio"] == pytest.approx(1, rel=1e-4)
    assert rows["time/step_us"]["baseline"] > 0
    assert found["facts"]["plan of placed"] == digest[:12]


@pytest.mark.slow
def test_a_run_that_fails_is_closed_as_failed(offline, tmp_path):  # noqa: F811
    """A training that ends in an exception keeps its lines; its run says that it failed. [C1]"""
    done = script(tmp_path, "run", fails="fails")
    assert done.returncode != 0
    assert "somebody's mistake" in done.stdout + done.stderr
    codes, back = exits(tmp_path / "run")
    assert codes == [1]
    assert [line["step"] for line in back.history() if "step" in line] == [2, 4]
    assert [step["step"] for step in read_run(tmp_path / "run").steps] == [2, 4]
