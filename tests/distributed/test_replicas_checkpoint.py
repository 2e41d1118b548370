"""Checkpoints of engines with replicas: what the files hold, and loads across placements."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_locality.errors import ConfigError
from tests.distributed import replica_nets as nets
from tests.distributed.moe_cases import quiet
from tests.launch import run_ranks
from tests.tolerances import LOGITS, LOSS

WORLD = 2
EXPERT = "layer_{}_expert_{}_mp_rank_00_model_states.pt"


def resumes(rank, world, folder, path):
    """The same slots: weights, masters, moments and losses go on bit for bit."""
    quiet()
    for stage, dtype in ((0, "float32"), (1, "bfloat16"), (2, "float32")):
        config = nets.config_of(stage, dtype)
        first = nets.engine_of(rank, world, config, path)
        nets.train(first, range(3), rank, dtype)
        first.save_checkpoint(f"{folder}/{stage}", tag="t")
        second = nets.engine_of(rank, world, config, path)
        _, client = second.load_checkpoint(f"{folder}/{stage}", tag="t")
        assert "moe_locality" not in client
        same_state(nets.state_by_slot(second), nets.state_by_slot(first))
        expected = nets.train(first, (3, 4), rank, dtype)
        assert nets.train(second, (3, 4), rank, dtype) == expected
        same_state(nets.state_by_slot(second), nets.state_by_slot(first))
        assert nets.check_replicas_agree(second)


def same_state(found, expected):
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        assert np.array_equal(found[key], values), key


def test_a_run_resumes_bit_for_bit(tmp_path):
    path = str(tmp_path / "plan.json")
    nets.plan_of(WORLD).write(path)
    run_ranks(resumes, WORLD, str(tmp_path), path, deepspeed=True, timeout_s=240)


def crosses(rank, world, folder, path, other, permuted):
    quiet()
    config = nets.config_of(1, "float32")
    saved = nets.engine_of(rank, world, config, path)
    nets.train(saved, range(2), rank)
    saved.save_checkpoint(folder, tag="replicas")
    expected = nets.loss_of(saved.module, rank)
    check_files(Path(folder, "replicas"), nets.local_weights(saved))

    for plan in (path, other, None, permuted):
        engine = nets.engine_of(rank, world, config, plan)
        if plan != path:
            with pytest.raises(ConfigError, match=r"with replicas loads.*load_module_only=True"):
                engine.load_checkpoint(folder, tag="replicas")
        blank(engine.module)
        engine.load_checkpoint(folder, tag="replicas", load_module_only=True)
        close(nets.loss_of(engine.module, rank), expected)
        after = nets.train(engine, range(2, 4), rank)  # masters are those of the weights
        assert all(np.isfinite(after))
        if plan == permuted:
            engine.save_checkpoint(folder, tag="permuted")
            moved = nets.loss_of(engine.module, rank)

    engine = nets.stock_engine_of(rank, world, config)
    blank(engine.module)
    engine.load_checkpoint(folder, tag="replicas", load_module_only=True)
    close(nets.loss_of(engine.module, rank), expected)

    runs = []
    for plan in (path, permuted):  # a router in the order of slots, and its masters
        engine = nets.engine_of(rank, world, config, plan)
        if plan == path:
            with pytest.raises(ConfigError, match=r"with no replicas.*load_module_only=True"):
                engine.load_checkpoint(folder, tag="permuted")
        engine.load_checkpoint(folder, tag="permuted", load_module_only=True)
        close(nets.loss_of(engine.module, rank), moved)
        runs.append(nets.train(engine, range(3), rank))
    np.testing.assert_allclose(*runs, *LOSS["float32"])


def refused_by_stock(rank, world, folder, path):
    """What a stock engine says to optimizer state of an engine with replicas, stage by stage."""
    quiet()
    for stage, dtype in ((0, "float32"), (1, "bfloat16"), (2, "float32")):
        config = nets.config_of(stage, dtype)
        saved = nets.engine_of(rank, world, config, path)
        nets.train(saved, range(1), rank, dtype)
        saved.save_checkpoint(folder, tag=f"{stage}")
        stock = nets.stock_engine_of(rank, world, config)
        with pytest.raises((ValueError, RuntimeError), match=r"parameter group|module-only"):
            stock.load_checkpoint(folder, tag=f"{stage}")


def test_stock_deepspeed_refuses_the_optimizer_state_of_replicas_at_every_stage(tmp_path):
    path = str(tmp_path / "plan.json")
    nets.plan_of(WORLD).write(path)
    run_ranks(refused_by_stock, WORLD, str(tmp_path), path, deepspeed=True)


def blank(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=LOGITS["float32"][0], atol=1e-5)


def check_files(folder, weights):
    """E files per layer, under logical numbers, with the bits that the slots hold."""
    names = sorted(path.name for path in folder.glob("layer_*"))
    assert names == sorted(EXPERT.format(n, e) for n in range(2) for e in range(nets.EXPERTS))
    for (layer, expert), state in weights.items():
        found = torch.load(folder / EXPERT.format(layer, expert), weights_only=True)
        head = f"moe{layer + 1}.deepspeed_moe.experts.deepspeed_experts.{expert}."
        assert set(found) == {head + name for name in state}
        for name, values in state.items():
            assert torch.equal(found[head + name], values)
    dense = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)
    entry = dense["moe_locality"]
    assert entry["slot_to_logical"] == [list(range(nets.EXPERTS))] * 2
    assert [len(slots) for slots in entry["replicas"]] == [nets.EXPERTS + WORLD] * 2


def test_weights_load_into_every_placement_and_into_stock_deepspeed(tmp_path):
    paths = [str(tmp_path / f"plan{number}.json") for number in range(3)]
    plans = [nets.plan_of(WORLD), nets.plan_of(WORLD, seed=5, extra_per_rank=2)]
    plans.append(nets.plan_of(WORLD, seed=2, extra_per_rank=0))
    assert plans[2].is_permutation
    for plan, path in zip(plans, paths, strict=True):
        plan.write(path)
    run_ranks(crosses, WORLD, str(tmp_path), *paths, deepspeed=True, timeout_s=240)
