"""The example model on several ranks, and its script under DeepSpeed's own launcher."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moe_locality
from examples.lm import data, training
from examples.lm.evaluation import compare_evaluations, evaluate_requests, read_evaluation
from examples.lm.model import build_model, preset
from moe_locality.demo.launch import free_port, launch_command, launch_environment
from moe_locality.placement.plan import PlacementPlan
from moe_locality.trace import PREFILL, TRAIN, read_trace
from tests.fork_launcher import forked_command
from tests.launch import run_ranks, skip_without_expert_parallelism
from tests.tolerances import LOGITS, LOSS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "train_lm.py"
STEPS = 4


def train_on(rank, world_size, layer, homes):
    """Train a little and evaluate; the global batch is the same for every number of ranks."""
    # the balance loss is of each rank's own tokens, so it depends on how requests are dealt
    config = preset("tiny", num_experts=4, aux_loss_coef=0.0)
    train, held_out = data.build_requests(
        seq_len=config.max_seq_len, train_per_domain=16, held_out_per_domain=4
    )
    moe_class = None
    if layer == "locality":
        from moe_locality import MoE as moe_class
    model = build_model(config, moe_class, ep_size=world_size, ep_rank=rank)
    per_rank = 8 // world_size
    settings = {
        "train_micro_batch_size_per_gpu": per_rank,
        "optimizer": {"type": "SGD", "params": {"lr": 0.3}},  # Adam would hide a wrong scale
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    engine = training.build_engine(model, settings, layer)
    dealt = {"rank": rank, "num_ranks": world_size, "per_rank": per_rank, "homes": homes}
    losses = []
    for batch in data.train_batches(train, steps=STEPS, **dealt):
        inputs, targets = training.as_tensors(batch, engine.device)
        output = engine(inputs, targets)
        engine.backward(output.loss)
        engine.step()
        losses += training.all_reduced_mean([output.lm_loss])
    return losses, evaluate_requests(engine, data.eval_batches(held_out, **dealt))


@pytest.fixture(scope="module")
def one_rank():
    return run_ranks(train_on, 1, "stock", None, deepspeed=True)[0]


@pytest.mark.parametrize("layer", ["stock", "locality"])
def test_two_ranks_compute_what_one_rank_does(one_rank, layer):
    (losses, rows), (_, nothing) = run_ranks(train_on, 2, layer, None, deepspeed=True)
    rtol, atol = LOSS["float32"]
    np.testing.assert_allclose(losses, one_rank[0], rtol=rtol, atol=atol)
    rtol, atol = LOGITS["float32"]
    np.testing.assert_allclose(rows["last_logits"], one_rank[1]["last_logits"], rtol, atol)
    assert rows["request_id"].tolist() == one_rank[1]["request_id"].tolist()
    assert np.bincount(rows["rank"]).tolist() == [8, 8]
    assert nothing is None
    assert losses[-1] < losses[0]


def test_homes_decide_the_rank_and_not_the_result(one_rank):
    homes = {int(request): int(request) % 4 // 2 for request in range(80)}  # two domains a rank
    (losses, rows), _ = run_ranks(train_on, 2, "locality", homes, deepspeed=True)
    rtol, atol = LOSS["float32"]
    np.testing.assert_allclose(losses, one_rank[0], rtol=rtol, atol=atol)
    assert rows["rank"].tolist() == [homes[int(request)] for request in rows["request_id"]]
    found = compare_evaluations(rows, one_rank[1])
    assert found["max_logit_difference"] < 1e-4


def swap(rank, world_size, swapped):
    sys.path.insert(0, str(ROOT / "examples"))
    import swap_layer

    losses, model = swap_layer.train(swap=swapped, steps=4)
    return losses, isinstance(model.moe, moe_locality.MoE)


def test_the_three_lines_leave_the_losses_as_they_were():
    before, after = (run_ranks(swap, 2, swapped, deepspeed=True) for swapped in (False, True))
    assert [ours for _, ours in before] == [False, False]
    assert [ours for _, ours in after] == [True, True]
    rtol, atol = LOSS["float32"]
    for (stock, _), (ours, _) in zip(before, after, strict=True):
        np.testing.assert_allclose(ours, stock, rtol=rtol, atol=atol)
        assert len(set(stock)) == 4  # the model moves


def launch(script: Path, *arguments: str, command=launch_command) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(2, script, list(arguments)),
        env={**launch_environment(), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )


COUNTS_THREADS_AT_THE_END = """
import contextlib
import sys
from pathlib import Path
from typing import Any
sys.path.insert(0, {examples!r})
import {module}

def threads_of_gloo():
    count = 0
    for file in Path("/proc/self/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            name, _, facts = file.read_text().rpartition(")")
            ending = int(facts.split()[6]) & 4  # PF_EXITING: joined, and still in the list
            count += "gloo" in name and not ending
    return count

end = {module}.end_distributed

def end_distributed():
    before = threads_of_gloo()
    end()
    print(f"threads of gloo: some {{before > 0}}, then {{threads_of_gloo()}}", flush=True)

{module}.end_distributed = end_distributed
{module}.{call}
"""


def counting(folder: Path, module: str, call: str = "main()") -> Path:
    """Write a script that runs an example and counts threads at its end."""
    script = folder / "counts.py"
    text = COUNTS_THREADS_AT_THE_END.format(examples=str(SCRIPT.parent), module=module, call=call)
    script.write_text(text)
    return script


def torchrun(num_ranks: int, script: Path, *arguments: Any) -> str:
    """Run a script under torchrun; return what the ranks said."""
    skip_without_expert_parallelism()
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks)]
    done = subprocess.run(
        [sys.executable, *launcher, "--master-port", str(free_port()), script, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count("threads of gloo: some True, then 0") == num_ranks, done.stdout
    return done.stdout


@pytest.mark.slow
def test_train_record_stop_resume_and_evaluate_under_the_launcher(tmp_path):
    """And both runs end clean: a thread of gloo that outlives its group may abort the process."""
    script = counting(tmp_path, "train_lm", "run()")
    checkpoint, trace = tmp_path / "checkpoint", tmp_path / "trace"
    common = ("--preset", "tiny", "--steps", "6", "--num-nodes", "2")

    first = launch(
        script,
        *(*common, "--layer", "stock", "--out", str(tmp_path / "whole")),
        *("--trace", str(trace), "--trace-from", "5", "--save-checkpoint", str(checkpoint)),
    )
    assert first.returncode == 0, first.stdout[-4000:]
    assert "progress 14 14 evaluation" in first.stdout  # 6 steps, 8 batches
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert (summary["steps_done"], summary["eval_requests"]) == (6, 64)
    recorded = read_trace(trace)
    assert np.bincount(recorded.stage, minlength=3).tolist() == [64 * 64, 0, 2 * 8 * 64]
    assert recorded.filter(stages=[PREFILL]).request_ids.min() == 4 * 64  # ids after the training's
    assert recorded.filter(stages=[TRAIN]).request_ids.max() < 4 * 64

    again = launch(
        script,
        *(*common, "--layer", "locality", "--out", str(tmp_path / "again"), "--eval-only"),
        *("--load-checkpoint", str(checkpoint), "--continue-steps", "2"),
        command=forked_command,
    )
    assert again.returncode == 0, again.stdout[-4000:]
    for run in (first, again):
        assert run.stdout.count("threads of gloo: some True, then 0") == 2
    rows = [read_evaluation(tmp_path / name / "evaluation.npz") for name in ("whole", "again")]
    found = compare_evaluations(*rows)
    assert found["max_logit_difference"] < 1e-4
    lines = (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert [entry["step"] for entry in steps if entry["kind"] == "step"] == [7, 8]
    traffic = json.loads((tmp_path / "again" / "traffic.json").read_text())
    picks = 2 * 64 * 64 * 2  # layers, requests, tokens of each, top-2
    assert sum(traffic["load"]) == picks
    # 2 nodes: a token crosses at most once to the one other node
    assert 0 < traffic["rows_by_link"]["dispatch"]["cross_node"] <= picks // 2


FAILS_ON_RANK_1 = """
import os, sys
sys.path.insert(0, {examples!r})
import train_lm
from lm import training

def fail(*args, **kwargs):
    raise RuntimeError("the disk of rank 1 is full")

if os.environ["RANK"] == "1":
    training.all_reduced_mean = fail
train_lm.run()
"""


@pytest.mark.slow
def test_a_failure_on_one_rank_ends_all_with_its_message(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text(FAILS_ON_RANK_1.format(examples=str(SCRIPT.parent)))
    done = launch(script, "--preset", "tiny", "--out", str(tmp_path / "run"))
    assert done.returncode != 0
    assert "the disk of rank 1 is full" in done.stdout
    assert "rank 1 failed, all ranks are being ended" in done.stdout


def test_a_plan_for_the_stock_layer_is_refused_before_anything_starts(capsys, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    import train_lm

    with pytest.raises(SystemExit) as stop:
        train_lm.main(["--plan", "plan.json"])
    assert stop.value.code == 2
    assert "--plan needs --layer locality" in capsys.readouterr().err
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_hf_train_trains_and_saves_what_one_process_does(tmp_path, monkeypatch):
    """Two ranks under torchrun with a plan, against a plain loop on both ranks' batches."""
    transformers = pytest.importorskip("transformers")
    skip_without_expert_parallelism()
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import hf_train

    order = np.random.default_rng(0).permuted(np.tile(np.arange(16), (3, 1)), axis=1)
    plan = PlacementPlan(
        layer_ids=(0, 1, 2),
        num_experts=16,
        num_nodes=2,
        ranks_per_node=1,
        physical_to_logical_map=order,
    )
    out, steps = tmp_path / "model", 4
    plan.write(tmp_path / "plan.json")
    sizes = ["--steps", str(steps), "--num-nodes", "2", "--plan", tmp_path / "plan.json"]
    printed = torchrun(2, counting(tmp_path, "hf_train"), "--out", out, *sizes)

    model, trained = (
        transformers.AutoModelForCausalLM.from_pretrained(path) for path in (out / "random", out)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    both = [hf_train.batches(None, steps + 1, 0, rank, 2) for rank in range(2)]
    losses = []
    for tokens in zip(*both, strict=True):
        optimizer.zero_grad()
        loss = sum(model(part, labels=part).loss for part in tokens) / 2
        losses.append(float(loss.detach()))
        if len(losses) <= steps:
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        found = sum(float(trained(part, labels=part).loss) for part in tokens) / 2
    printed = re.search(rf"step {steps} loss (\d+\.\d+)", printed)[1]
    assert float(printed) == pytest.approx(losses[steps - 1], rel=1e-4)
    assert found == pytest.approx(losses[steps], rel=1e-4)
    assert losses[steps] < losses[0] - 0.1
