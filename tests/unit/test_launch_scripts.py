"""launch/*.sh: the command line that each prints, and that it does what it prints."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_locality.demo.launch import free_port
from moe_locality.placement import PlacementPlan, evaluate, solve
from moe_locality.topology import ClusterTopology
from moe_locality.trace import read_trace
from tests.fork_launcher import CLIENT, server_address
from tests.launch import skip_without_expert_parallelism

ROOT = Path(__file__).parents[2]
PASSED_ON = ("PYTHONPATH", "DS_ACCELERATOR", "OMP_NUM_THREADS", "WANDB_MODE", "WANDB_SILENT")
SCRIPTS = ("record", "place", "train", "compare", "generate", "serve", "paper")
TRAIN = str(ROOT / "examples/train_lm.py")


def environment(**variables):
    """Variables of a script, with a PATH on which there is no nvidia-smi."""
    bin_folder = str(Path(sys.executable).parent)
    environ = {"PATH": f"{bin_folder}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
    environ |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {**environ, **variables}


def run(script, *arguments, cwd=ROOT, limit_s=300, **variables):
    """Run a script; return the finished process."""
    return subprocess.run(
        ["bash", str(ROOT / "launch" / f"{script}.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=limit_s,
        cwd=cwd,
        env=environment(**variables),
    )


def printed(script, *arguments, cwd=ROOT, **variables):
    """Return the commands that a dry run prints, split into words; comments are left out."""
    done = run(script, "--dry-run", *arguments, cwd=cwd, **variables)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return [shlex.split(line) for line in lines if not line.startswith("#")]


def option(words, name):
    """Return the value that argparse takes: the last one."""
    return words[len(words) - 1 - words[::-1].index(name) + 1]


def test_without_a_hostfile_the_ranks_are_on_this_machine():
    for script in ("record", "train", "compare"):
        for words in printed(script, "--ranks", "2")[:2]:
            if words[0] == "deepspeed":
                assert words[:4] == ["deepspeed", "--num_accelerators", "2", TRAIN]


def test_with_a_hostfile_it_goes_to_the_launcher():
    for script in ("record", "train", "compare"):
        words = printed(script, "--hostfile", "launch/hostfile.example")[0]
        assert words[:4] == ["deepspeed", "--hostfile", "launch/hostfile.example", TRAIN]
    (words,) = printed("place", "--hostfile", "launch/hostfile.example")
    assert words[:3] == ["moe-locality", "place", "traces/baseline"]
    assert option(words, "--hostfile") == "launch/hostfile.example"


def test_what_each_script_runs():
    (record,) = printed("record")
    assert option(record, "--layer") == "stock"
    assert option(record, "--trace") == "traces/baseline"
    (train,) = printed("train", "--plan", "my plan.json")
    assert option(train, "--layer") == "locality"
    assert option(train, "--plan") == "my plan.json"
    (place,) = printed("place", "--nodes", "2", TRACE="t", PLAN="p.json")
    assert place == ["moe-locality", "place", "t", "-o", "p.json", "--nodes", "2"]
    (place,) = printed("place", "--nodes", "2", "--trace", "t", "--plan", "p.json")
    assert place == ["moe-locality", "place", "t", "-o", "p.json", "--nodes", "2"]


def test_serve_runs_the_command_on_every_rank():
    arguments = ("in.jsonl", "--model", "my model", "--out", "o")
    (words,) = printed("serve", "--ranks", "2", "--plan", "p.json", *arguments)
    module = ["--no_local_rank", "--module", "moe_locality.cli", "serve"]
    assert words == [
        "deepspeed",
        "--num_accelerators",
        "2",
        *module,
        *arguments[:3],
        *("--plan", "p.json", "--out", "o"),
    ]
    for out in (("--out=o",), ("-o", "o"), ("-oo",)):  # with a directory it drains
        asked = ("--plan=p.json", "--ranks=2", *arguments[:3], *out)
        assert printed("serve", *asked) == [words]
    done = run("serve", *arguments[:3], "--out=")
    assert "--out needs a directory" in done.stderr
    example = str(ROOT / "examples/paper_decoder.py")
    (words,) = printed("paper", "--ranks", "2", "--trace", "t.npz", "--num-nodes", "2")
    assert words[3:] == [example, *("--out", "runs/paper", "--num-nodes", "2", "--trace", "t.npz")]
    done = run("serve", "--", "mine.py")
    assert done.returncode == 2
    assert "REQUESTS" in done.stderr


def test_generate_runs_the_example_or_a_users_script():
    """The ranks are those of the launcher; what it does with them is in test_examples.py."""
    example = str(ROOT / "examples/hf_generate.py")
    (words,) = printed("generate", "--ranks", "2", "--num-nodes", "2", "--model", "my model")
    assert words[:4] == ["deepspeed", "--num_accelerators", "2", example]
    assert words[4:] == ["--out", "runs/hf_generate", "--num-nodes", "2", "--model", "my model"]
    (words,) = printed("generate", "--hostfile", "launch/hostfile.example", "--out", "o")
    assert words[1:] == ["--hostfile", "launch/hostfile.example", example, "--out", "o"]
    (words,) = printed("generate", "--ranks", "2", "--", "mine.py", "--plan", "p")
    assert words == ["deepspeed", "--num_accelerators", "2", "mine.py", "--plan", "p"]
    done = run("generate", "--out", "o", "--", "mine.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert "give it after --" in done.stderr


def test_compare_runs_the_usual_order_under_our_layer():
    """It ran DeepSpeed's layer, which counts no bytes, against the plan [F4]."""
    linear, placed, compare = printed("compare", "--steps", "9", OUT="runs/x")
    assert option(linear, "--layer") == option(placed, "--layer") == "locality"
    assert option(linear, "--deepspeed_config") == option(placed, "--deepspeed_config")
    assert option(placed, "--plan") == "plan.json"
    assert "--plan" not in linear
    assert option(linear, "--steps") == option(placed, "--steps") == "9"
    folders = ["runs/x/linear", "runs/x/placed"]
    assert [option(linear, "--out"), option(placed, "--out")] == folders
    assert compare == ["moe-locality", "compare", *folders]
    stock, *same, second = printed("compare", "--steps", "9", "--stock", OUT="runs/x")
    assert same == [linear, placed, compare]
    assert option(stock, "--layer") == "stock"
    assert second == ["moe-locality", "compare", "runs/x/stock", "runs/x/placed"]


def test_arguments_of_the_user_win_and_pass_unchanged():
    (words,) = printed("record", "--out", "elsewhere", "--seed", "3", "a b", "$HOME")
    assert option(words, "--out") == "elsewhere"
    assert words[-4:] == ["--seed", "3", "a b", "$HOME"]
    (words,) = printed("train", DEEPSPEED_ARGS="--include a:0,1 --no_ssh_check")
    assert words[1:6] == ["--num_accelerators", "4", "--include", "a:0,1", "--no_ssh_check"]
    (words,) = printed("train", CONFIG="mine.json")
    assert option(words, "--deepspeed_config") == "mine.json"


@pytest.mark.parametrize("script", ["record", "train", "compare"])
def test_the_files_and_flags_of_the_command_exist(script):
    source = Path(TRAIN).read_text(encoding="utf-8")
    for words in printed(script, "--ranks", "2")[:2]:
        assert Path(option(words, "--deepspeed_config")).is_file()
        flags = [word for word in words[words.index(TRAIN) :] if word.startswith("--")]
        for flag in flags:
            assert flag == "--deepspeed_config" or f'"{flag}"' in source, flag


def test_mistakes_stop_before_anything_runs(tmp_path):
    done = run("train", "--hostfile", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no hostfile nowhere" in done.stderr
    done = run("compare", PLAN=str(tmp_path / "none.json"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "make one with launch/place.sh" in done.stderr
    assert "--hostfile needs a file" in run("train", "--hostfile").stderr
    for arguments, why in (
        (["--"], "found no script after --"),
        (["--lr", "1", "--", "my.py"], "found --lr 1 before --"),
        (["--plan", "none.json", "--", "my.py"], "there is no plan none.json"),
        (["--hostfile", "none", "--", "my.py"], "there is no hostfile none"),
    ):
        done = run("train", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert why in done.stderr
    for arguments, why in (
        (["my.py", "--lr", "1"], "found no --deepspeed_config FILE"),
        (["my.py", "--deepspeed_config"], "found no --deepspeed_config FILE"),
        (["my.py", "--deepspeed_config", "none.json"], "there is no ds_config none.json"),
    ):
        done = run("record", "--", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")
        assert why in done.stderr
    assert "expected no script" in run("place", "--", "my.py").stderr


def test_compare_gives_a_users_script_one_configuration_per_run(tmp_path):
    """The script runs in the usual order, with the plan and, asked for, DeepSpeed's layer [F4]."""
    (tmp_path / "ds.json").write_text("{}")
    arguments = ["--plan", "p", "--", "mine.py", "--deepspeed_config", "ds.json"]
    first, second, table = printed("compare", *arguments, OUT="o", cwd=tmp_path)
    assert first[3:] == ["mine.py", "--deepspeed_config", "o/linear/ds_config.json"]
    assert second[3:] == ["mine.py", "--deepspeed_config", "o/placed/ds_config.json"]
    assert table == ["moe-locality", "compare", "o/linear", "o/placed"]
    stock, *_, last = printed("compare", "--stock", *arguments, OUT="o", cwd=tmp_path)
    assert stock[3:] == ["mine.py", "--deepspeed_config", "o/stock/ds_config.json"]
    assert last == ["moe-locality", "compare", "o/stock", "o/placed"]
    # an option that a script has no use for is not taken without a word
    done = run("train", "--stock", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "found --stock before --" in done.stderr


def test_they_run_from_any_directory(tmp_path):
    """They refused every directory but the top one of this package [F4]."""
    for script in ("record", "train", "compare"):
        for words in printed(script, "--ranks", "2", cwd=tmp_path):
            if words[0] == "deepspeed":
                assert words[3] == TRAIN
                assert Path(option(words, "--deepspeed_config")).is_file()
    (words,) = printed("place", "--nodes", "2", cwd=tmp_path)
    assert words[:2] == ["moe-locality", "place"]


def test_a_users_script_gets_its_arguments_unchanged(tmp_path):
    """They ran the example only; what follows ``--`` is a script and its arguments now [F4]."""
    (tmp_path / "ds.json").write_text("{}")
    mine = ["my_train.py", "--lr", "1e-3", "--out", "there", "a b", "$HOME", "--", "--plan"]
    (words,) = printed("train", "--ranks", "2", "--", *mine, cwd=tmp_path)
    assert words == ["deepspeed", "--num_accelerators", "2", *mine]
    for given, expected in (
        (["--deepspeed_config", "ds.json"], ["--deepspeed_config", "o/ds_config.json"]),
        (["--deepspeed_config=ds.json"], ["--deepspeed_config=o/ds_config.json"]),
        (["--deepspeed", "ds.json"], ["--deepspeed", "o/ds_config.json"]),
        (
            ["--deepspeed", "--deepspeed_config", "ds.json"],
            ["--deepspeed", "--deepspeed_config", "o/ds_config.json"],
        ),
    ):
        (words,) = printed("train", "--plan", "p", "--out", "o", "--", *mine, *given, cwd=tmp_path)
        assert words[3:] == [*mine, *expected]


OWN_SCRIPT = """
import argparse, json, os
import deepspeed, torch
from deepspeed.moe.layer import MoE
import moe_locality
from moe_locality.compat import avoid_cpu_jit, end_distributed

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int)
parser.add_argument("--local_rank", type=int)
deepspeed.add_config_arguments(parser)
args = parser.parse_args()
avoid_cpu_jit()
deepspeed.init_distributed(verbose=False)
torch.manual_seed(0)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        expert = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8))
        self.moe = MoE(8, expert, num_experts=4, ep_size=2, k=2, capacity_factor=2.0)

    def forward(self, x):
        output, aux, _ = self.moe(x)
        return output.square().mean() + 0.01 * aux

from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split
model = Net()
engine, *_ = moe_locality.initialize(
    args=args, model=model,
    model_parameters=split({"params": list(model.parameters()), "name": "parameters"}),
)
for step in range(args.steps):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    engine.backward(engine(x.view(4, 4, 8)))
    engine.step()
if engine.global_rank == 0:
    placed = engine.moe_locality.plan is not None
    found = json.dumps({"steps": args.steps, "placed": placed})
    print(f"MY OWN: {found}", flush=True)  # in one piece: other ranks write there too
engine.destroy()
del engine, model
end_distributed()
"""


def stand_in(folder):
    """Write ``deepspeed --num_accelerators N --master_port P SCRIPT`` that forks its ranks."""
    given = f"[{server_address()!r}, sys.argv[2], *sys.argv[4:]]"
    script = f"#!{sys.executable} -IS\nimport sys\nsys.argv[1:] = {given}\n{CLIENT}"
    folder.mkdir()
    (folder / "deepspeed").write_text(script)
    (folder / "deepspeed").chmod(0o755)


@pytest.mark.slow
def test_a_users_script_records_is_placed_and_trained(tmp_path):
    """The four steps of the README with a script and a directory that are not ours [F4]. The first
    run is started by DeepSpeed's launcher, the others are forked.
    """
    (tmp_path / "mine.py").write_text(OWN_SCRIPT)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "moe_locality": {
            "cluster": {"num_nodes": 2, "ranks_per_node": 1},
            "trace": {"enabled": False, "path": "never", "weights": True},
        },
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    own = ["--", "mine.py", "--steps", "6", "--deepspeed_config", "ds.json"]
    port = {"DEEPSPEED_ARGS": f"--master_port {free_port()}"}

    done = run("record", "--ranks", "2", "--trace", "t", *own, cwd=tmp_path, **port)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'MY OWN: {"steps": 6, "placed": false}' in done.stdout
    written = json.loads((tmp_path / "runs/baseline/ds_config.json").read_text())
    assert written["moe_locality"]["trace"] == {"enabled": True, "path": "t", "weights": True}
    assert written["optimizer"] == config["optimizer"]

    arguments = ["--trace", "t", "--nodes", "2", "--ranks-per-node", "1", "--method", "linear"]
    done = run("place", *arguments, "--plan", "p.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stand_in(tmp_path / "bin")
    port["PATH"] = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin"
    done = run("compare", "--ranks", "2", "--plan", "p.json", *own, cwd=tmp_path, **port)
    assert done.returncode == 0, done.stdout + done.stderr
    ours = [line for line in done.stdout.splitlines() if line.startswith("MY OWN")]
    assert ours == [f'MY OWN: {{"steps": 6, "placed": {placed}}}' for placed in ("false", "true")]
    # the run directories are read by compare, with the bytes of both, also of so few steps
    assert "traffic/cross_node_bytes" in done.stdout
    assert json.loads((tmp_path / "ds.json").read_text()) == config


@pytest.mark.slow
def test_generate_saves_bytes_and_writes_the_same_texts(tmp_path):
    """The whole example: train a little, record, place, generate without and with the plan."""
    skip_without_expert_parallelism()
    sizes = ["--train-steps", "90", "--requests", "32", "--new-tokens", "4", "--num-nodes", "2"]
    port = {"DEEPSPEED_ARGS": f"--master_port {free_port()}"}
    # a minute of two cores; where other jobs run, several
    done = run("generate", "--ranks", "4", "--out", "o", *sizes, cwd=tmp_path, limit_s=540, **port)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "o/summary.json").read_text())
    usual, placed = found["bytes"]
    assert 0 < placed < 0.95 * usual
    assert (found["requests"], found["parted"]) == (32, {})
    plan = PlacementPlan.read(tmp_path / "o/plan.json")
    assert (plan.num_nodes, plan.ranks_per_node, plan.num_experts) == (2, 2, 16)
    # what was counted is what is predicted
    before, after = (read_trace(tmp_path / "o" / name) for name in ("usual", "placed"))
    linear = solve(before, ClusterTopology.uniform(2, 2), method="linear")
    costs = [evaluate(before, linear, homes="trace"), evaluate(after, plan, homes="trace")]
    assert found["rows"] == [cost.total_copies for cost in costs]
    assert f"bytes across nodes: {usual:,} in the usual order" in done.stdout


def test_record_says_when_a_script_records_nothing(tmp_path):
    """A script that does not call initialize leaves no trace; that is said [F4]."""
    (tmp_path / "mine.py").write_text("print('hello')")
    (tmp_path / "ds.json").write_text("{}")
    arguments = ["--ranks", "1", "--", "mine.py", "--deepspeed_config", "ds.json"]
    done = run("record", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert "found nothing new in traces/baseline" in done.stderr
    (tmp_path / "ds.json").write_text("{")
    done = run("record", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert "ds.json is not valid JSON" in done.stderr


def test_place_runs_the_line_that_it_prints(tmp_path):
    from moe_locality.trace import RoutingTrace, write_trace

    tokens, layers, experts, top_k = 60, 2, 8, 2
    generator = np.random.default_rng(0)
    ids = generator.permuted(
        np.tile(np.arange(experts, dtype=np.int16), (tokens, layers, 1)), axis=2
    )
    trace = RoutingTrace(
        model="m",
        num_experts=experts,
        layer_ids=np.arange(layers, dtype=np.int32),
        domain=("code",),
        expert_ids=np.ascontiguousarray(ids[:, :, :top_k]),
        request_id=np.repeat(np.arange(tokens // 6, dtype=np.int64), 6),
        position=np.tile(np.arange(6, dtype=np.int32), tokens // 6),
        stage=np.zeros(tokens, dtype=np.uint8),
        domain_id=np.zeros(tokens, dtype=np.int32),
    )
    write_trace(trace, tmp_path / "trace")
    (tmp_path / "hosts").write_text("a slots=2\nb slots=2\n")
    plan = tmp_path / "plan.json"
    done = run(
        "place",
        "--hostfile",
        str(tmp_path / "hosts"),
        "--method",
        "linear",  # no search: nothing to compile for numba
        TRACE=str(tmp_path / "trace"),
        PLAN=str(plan),
    )
    assert done.returncode == 0, done.stderr
    assert shlex.split(done.stdout.splitlines()[0])[:2] == ["moe-locality", "place"]
    written = PlacementPlan.read(plan)
    assert (written.num_nodes, written.ranks_per_node, written.num_experts) == (2, 2, experts)


JOB = """#!/bin/sh
for turn in first again; do  # a job that starts removes the file of the one before
  for _ in $(seq 600); do [ -e out/drain ] && break; sleep 0.1; done
  rm out/drain || exit 1
done
exit 3
"""


def test_serve_script_drains_at_a_signal_before_its_ranks_have_begun(tmp_path):
    """A signal that came while it started the ranks ended it, and left them alone."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "deepspeed").write_text(JOB)
    (tmp_path / "bin" / "deepspeed").chmod(0o755)
    early = tmp_path / "early"  # bash reads it first
    early.write_text("trap '[[ $BASH_COMMAND != ranks_pid=* ]] || kill -TERM $$' DEBUG\n")
    found = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "BASH_ENV": str(early)}
    done = run("serve", "--ranks", "2", "requests", "--out", "out", cwd=tmp_path, **found)
    assert (done.returncode, done.stdout.count("draining: ")) == (3, 1), done.stderr


def test_the_scripts_are_short_and_strict():
    for script in SCRIPTS:
        path = ROOT / "launch" / f"{script}.sh"
        lines = path.read_text(encoding="utf-8").splitlines()
        assert lines[0] == "#!/usr/bin/env bash"
        assert "set -euo pipefail" in lines
        assert len(lines) < 40
        assert os.access(path, os.X_OK)
    for path in (ROOT / "launch").glob("*.sh"):
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
