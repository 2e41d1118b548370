"""configs/*.json: valid for us, taken by DeepSpeed, and some training steps with each."""

import json
from pathlib import Path

import deepspeed
import deepspeed.runtime.zero.stage_1_and_2
import pytest
import torch
import torch._inductor.compile_fx  # an engine imports it (seconds): once here, for all ranks
from deepspeed.moe.layer import MoE

from moe_locality.config import SECTION, read_config
from tests.launch import run_ranks

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ["ds_cpu_demo", "ds_zero1_moe_locality", "ds_zero1_stock"]


def content(name):
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))


def test_the_files_are_the_ones_tested_here():
    assert sorted(path.stem for path in CONFIGS.glob("*.json")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_our_section_is_valid(name):
    config = read_config(CONFIGS / f"{name}.json")
    assert config.plan is None
    assert config.trace is None or not config.trace.enabled
    assert config.dispatch.payload == "none"  # lossy only where it was asked for


def test_the_two_zero1_files_differ_in_our_section_alone():
    ours = content("ds_zero1_moe_locality")
    assert ours.pop(SECTION)
    assert ours == content("ds_zero1_stock")


def test_the_section_in_the_readme_is_the_one_of_the_file():
    text = (CONFIGS / "README.md").read_text(encoding="utf-8")
    shown = text.split("```json\n")[1].split("```")[0]
    assert json.loads("{" + shown + "}")[SECTION] == content("ds_zero1_moe_locality")[SECTION]


def train_some_steps(rank, world, names):
    losses = {}
    for name in names:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        model.append(MoE(8, torch.nn.Linear(8, 8), 4, ep_size=world, k=2))
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=str(CONFIGS / f"{name}.json"),
        )
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(rank))
        x = x.to(next(engine.parameters()).dtype)
        steps = []
        for _ in range(5):
            loss = engine(x)[0].float().square().mean()
            engine.backward(loss)
            engine.step()
            steps.append(loss.item())
        losses[name] = (steps, engine.zero_optimization_stage(), str(x.dtype))
        engine.destroy()
    return losses


def test_deepspeed_trains_with_each():
    (losses, _) = run_ranks(train_some_steps, 2, NAMES, deepspeed=True)
    for name, (steps, stage, dtype) in losses.items():
        assert steps[-1] < steps[0], name
        assert stage == content(name)["zero_optimization"]["stage"]
        assert dtype == ("torch.bfloat16" if "bf16" in content(name) else "torch.float32")
    assert losses["ds_zero1_stock"] == losses["ds_zero1_moe_locality"]
