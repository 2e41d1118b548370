"""launch/*.sh: the command line that each prints, and that place.sh does what it prints."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_locality.placement.plan import PlacementPlan

ROOT = Path(__file__).parents[2]
SCRIPTS = ("record", "place", "train", "compare")
TRAIN = "examples/train_lm.py"


def run(script, *arguments, cwd=ROOT, **variables):
    """Run a script with a PATH on which there is no nvidia-smi; return the finished process."""
    bin_folder = str(Path(sys.executable).parent)
    environ = {"PATH": f"{bin_folder}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        ["bash", str(ROOT / "launch" / f"{script}.sh"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**environ, **variables},
    )


def printed(script, *arguments, **variables):
    """Return the commands that a dry run prints, split into words."""
    done = run(script, "--dry-run", *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


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
    stock, placed, compare = printed("compare", "--steps", "9", OUT="runs/x")
    assert option(stock, "--layer") == "stock"
    assert option(placed, "--layer") == "locality"
    assert option(placed, "--plan") == "plan.json"
    assert option(stock, "--steps") == option(placed, "--steps") == "9"
    folders = ["runs/x/stock", "runs/x/placed"]
    assert [option(stock, "--out"), option(placed, "--out")] == folders
    assert compare == ["moe-locality", "compare", *folders]


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
    source = (ROOT / TRAIN).read_text(encoding="utf-8")
    for words in printed(script, "--ranks", "2")[:2]:
        assert (ROOT / option(words, "--deepspeed_config")).is_file()
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
    done = run("record", "--dry-run", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "from the top directory of moe_locality" in done.stderr
    assert "--hostfile needs a file" in run("train", "--hostfile").stderr


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
