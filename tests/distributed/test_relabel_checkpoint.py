"""Checkpoints of placed engines: what the files hold, and loads across placements."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer.checkpoint import wrap_checkpoints
from moe_locality.layer.relabeling import relabel
from moe_locality.layer.state import current_order
from tests import tolerances
from tests.distributed import relabel_nets as nets
from tests.launch import run_ranks

RTOL, ATOL = tolerances.LOGITS["float32"]
LOSS_RTOL, LOSS_ATOL = tolerances.LOSS["float32"]
EXPERT = "layer_{}_expert_{}_mp_rank_00_model_states.pt"
DENSE = "mp_rank_00_model_states.pt"


def placed_engine(rank, world, seed, kind="ours", **options):
    """An engine whose model got a plan before initialize (seed None: no plan)."""
    net = nets.build(kind, world, rank)
    plan = None if seed is None else nets.plan_of(world, seed)
    if plan is not None:
        relabel(net, plan)
    engine = nets.engine_of(net, **options)
    wrap_checkpoints(engine, plan)
    return engine


def close_losses(found, expected):
    np.testing.assert_allclose(found, expected, rtol=LOSS_RTOL, atol=LOSS_ATOL)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=ATOL)


def orders(engine):
    return [current_order(engine.module.moe1).tolist(), current_order(engine.module.moe2).tolist()]


def rows(plan):
    return plan.physical_to_logical_map.tolist()


def _files(rank, world, folder):
    plan = nets.plan_of(world, 1)
    engine = placed_engine(rank, world, 1)
    engine.save_checkpoint(folder, tag="t", client_state={"epoch": 3})
    truth = nets.build("stock", 1)  # expert e of the recipe, in logical order
    dense = torch.load(f"{folder}/t/{DENSE}", weights_only=True)
    assert dense["moe_locality"]["slot_to_logical"] == rows(plan)
    assert dense["epoch"] == 3
    for layer, name in enumerate(("moe1", "moe2")):
        order = plan.physical_to_logical_map[layer].astype(np.int64)
        moe = getattr(truth, name).deepspeed_moe
        gate = dense["module"][f"{name}.deepspeed_moe.gate.wg.weight"]
        assert torch.equal(gate, moe.gate.wg.weight[torch.from_numpy(order)])
        for slot in range(nets.EXPERTS):
            states = torch.load(f"{folder}/t/{EXPERT.format(layer, slot)}", weights_only=True)
            head = f"{name}.deepspeed_moe.experts.deepspeed_experts.{slot}."
            expert = moe.experts.deepspeed_experts[int(order[slot])].state_dict()
            assert nets.same_bits(states, {head + key: value for key, value in expert.items()})
    # a stock engine, which knows nothing of the plan, computes the same function
    stock = nets.engine_of(nets.build("stock", world, rank))
    with torch.no_grad():
        for parameter in stock.module.parameters():
            parameter.zero_()
    stock.load_checkpoint(folder, tag="t", load_module_only=True)
    close(nets.logits_of(stock.module, rank), nets.logits_of(engine.module, rank))


@pytest.mark.parametrize("world", [1, 2])
def test_files_hold_slots_and_a_stock_engine_computes_the_same(world, tmp_path):
    run_ranks(_files, world, str(tmp_path), deepspeed=True)


def _across(rank, world, folder):
    """A -> B -> stock -> A at stage 0: logits, and losses with the optimizer's state."""
    reference = placed_engine(rank, world, None, kind="stock")
    nets.train(reference, range(3), rank)
    first = placed_engine(rank, world, 1)
    nets.train(first, range(3), rank)
    first.save_checkpoint(folder, tag="A")

    second = placed_engine(rank, world, 2)
    path, client = second.load_checkpoint(folder, tag="A")
    assert path
    assert "moe_locality" not in client
    assert orders(second) == rows(nets.plan_of(world, 2))
    close(nets.logits_of(second.module, rank), nets.logits_of(reference.module, rank))
    close_losses(nets.train(second, (3, 4), rank), nets.train(reference, (3, 4), rank))
    second.save_checkpoint(folder, tag="B")

    stock = nets.engine_of(nets.build("stock", world, rank))
    stock.load_checkpoint(folder, tag="B")
    close(nets.logits_of(stock.module, rank), nets.logits_of(reference.module, rank))
    close_losses(nets.train(stock, (5, 6), rank), nets.train(reference, (5, 6), rank))
    stock.save_checkpoint(folder, tag="stock")

    last = placed_engine(rank, world, 1)
    last.load_checkpoint(folder, tag="stock")
    assert orders(last) == rows(nets.plan_of(world, 1))
    close(nets.logits_of(last.module, rank), nets.logits_of(reference.module, rank))
    close_losses(nets.train(last, (7, 8), rank), nets.train(reference, (7, 8), rank))

    free = placed_engine(rank, world, None)  # without a plan: the order of the file
    free.load_checkpoint(folder, tag="B")
    assert orders(free) == rows(nets.plan_of(world, 2))


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_goes_on_across_placements(world, tmp_path):
    run_ranks(_across, world, str(tmp_path), deepspeed=True)


def _same_placement(rank, world, folder, modes):
    for zero, precision in modes:
        tag = f"z{zero}{precision}"
        engine = placed_engine(rank, world, 1, zero=zero, precision=precision)
        nets.train(engine, range(2), rank)
        engine.save_checkpoint(folder, tag=tag)
        expected = nets.train(engine, (2, 3, 4), rank)
        again = placed_engine(rank, world, 1, zero=zero, precision=precision)
        again.load_checkpoint(folder, tag=tag)
        assert nets.train(again, (2, 3, 4), rank) == expected, tag
        adopts = placed_engine(rank, world, None, zero=zero, precision=precision)
        adopts.load_checkpoint(folder, tag=tag)
        assert orders(adopts) == rows(nets.plan_of(world, 1))
        close_losses(nets.train(adopts, (2, 3, 4), rank), expected)


def test_full_resume_at_the_same_placement(tmp_path):
    modes = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (0, "bf16")]
    run_ranks(_same_placement, 2, str(tmp_path), modes, deepspeed=True)


def _other_placement(rank, world, folder, modes):
    """Everything moves to the placement of the engine; or the weights alone, into a new run."""
    for zero, precision in modes:
        options = {"zero": zero, "precision": precision}
        tag = f"z{zero}{precision}"
        source = placed_engine(rank, world, 1, **options)
        nets.train(source, range(2), rank)
        source.save_checkpoint(folder, tag=tag)
        engine = placed_engine(rank, world, 2, **options)
        engine.load_checkpoint(folder, tag=tag)
        assert orders(engine) == rows(nets.plan_of(world, 2))
        assert nets.train(engine, (2, 3, 4), rank) == nets.train(source, (2, 3, 4), rank), tag
        engine = placed_engine(rank, world, 2, **options)
        engine.load_checkpoint(folder, tag=tag, load_module_only=True)
        assert orders(engine) == rows(nets.plan_of(world, 2))
        twin = placed_engine(rank, world, 1, **options)
        twin.load_checkpoint(folder, tag=tag, load_module_only=True)
        tolerance = tolerances.LOSS["float32" if precision == "fp32" else "bfloat16"]
        found, expected = (nets.train(e, range(3), rank) for e in (engine, twin))
        np.testing.assert_allclose(found, expected, *tolerance)
        stepped = placed_engine(rank, world, None, **options)  # its moments are in logical order
        nets.train(stepped, range(1), rank)
        with pytest.raises(ConfigError, match="has taken 1 steps"):
            stepped.load_checkpoint(folder, tag=tag, load_module_only=True)


def test_masters_and_moments_load_into_another_placement(tmp_path):
    modes = [(1, "fp32"), (2, "fp32"), (0, "bf16"), (2, "bf16")]
    run_ranks(_other_placement, 2, str(tmp_path), modes, deepspeed=True)


def _cannot_move(rank, world, folder):
    source = placed_engine(rank, world, 1, zero=2)
    source.save_checkpoint(folder, tag="t")
    zero = {"stage": 2, "round_robin_gradients": True}
    engine = placed_engine(rank, world, 2, zero_optimization=zero)
    before = nets.weights_of(engine.module)
    with pytest.raises(ConfigError, match=r"round_robin_gradients.*Nothing was loaded"):
        engine.load_checkpoint(folder, tag="t")
    assert nets.same_bits(nets.weights_of(engine.module), before)
    assert engine.global_steps == 0


def test_state_that_cannot_move_is_refused_before_anything_is_loaded(tmp_path):
    run_ranks(_cannot_move, 2, str(tmp_path), deepspeed=True)


def _disagree(rank, world, folder):
    engine = placed_engine(rank, world, 1)
    engine.save_checkpoint(folder, tag="t")
    other = nets.engine_of(nets.build("ours", world, rank))
    wrap_checkpoints(other, nets.plan_of(world, 1 + rank))
    with pytest.raises(PlacementError, match="different checkpoints or placements on the ranks"):
        other.load_checkpoint(folder, tag="t")
    if rank == 0:
        path = f"{folder}/t/{DENSE}"
        state = torch.load(path, weights_only=True)
        state["moe_locality"]["slot_to_logical"] = state["moe_locality"]["slot_to_logical"][:1]
        torch.save(state, path)
    dist.barrier()
    with pytest.raises(PlacementError, match="of another model"):
        engine.load_checkpoint(folder, tag="t")
    with pytest.raises(ConfigError, match="found the key 'moe_locality' in client_state"):
        engine.save_checkpoint(folder, client_state={"moe_locality": 1})


def test_ranks_that_disagree_and_damaged_entries_are_refused_everywhere(tmp_path):
    run_ranks(_disagree, 2, str(tmp_path), deepspeed=True, timeout_s=60)
