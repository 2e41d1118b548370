"""A rank that dies, or goes its own way, inside a training step: every other rank ends, soon, with
a message; what was saved before stays whole.
"""

import sys

import pytest
import torch
import torch.distributed as dist

import moe_locality
from moe_locality.placement import PlacementPlan
from moe_locality.trace import read_trace
from tests.distributed.fault_cases import (
    EXPERTS,
    LAYERS,
    VICTIM,
    WORLD,
    batch,
    die,
    end_together,
    start,
    train,
)
from tests.launch import run_ranks

BROKEN = "another rank died or left before this one"


def dies_in_a_step(rank, folder, exchange, where):
    engine = start(exchange, folder / "trace")
    train(engine, range(1, 4), rank)
    engine.save_checkpoint(str(folder / "checkpoint"), tag="before")
    dist.barrier()
    if rank == VICTIM:
        layer = engine.module.moe[0 if where == "backward" else 1].deepspeed_moe

        def at_the_expert(module, args, output):
            if where == "forward":
                die()
            output.register_hook(die)

        for expert in layer.experts.deepspeed_experts:
            expert.register_forward_hook(at_the_expert)
    try:
        train(engine, range(4, 50), rank)
    finally:
        engine.moe_locality.close()


def losses_from_the_checkpoint(rank, world, folder):
    engine = start()
    path, _ = engine.load_checkpoint(str(folder / "checkpoint"), tag="before")
    assert path is not None
    return train(engine, range(4, 6), rank)


def uninterrupted(rank, world):
    return train(start(), range(1, 6), rank)[3:]


@pytest.fixture(scope="module")
def straight():
    """Losses of the last two of five steps that nothing interrupts."""
    return run_ranks(uninterrupted, WORLD, deepspeed=True)


@pytest.mark.parametrize(("exchange", "where"), [("flat", "forward"), ("hierarchical", "backward")])
def test_a_rank_killed_in_a_step_ends_all_and_nothing_is_lost(tmp_path, exchange, where, straight):
    said = end_together(dies_in_a_step, tmp_path, exchange, where)
    assert sorted(said) == [rank for rank in range(WORLD) if rank != VICTIM]
    for rank, words in said.items():
        assert words["error"] == "MoeLocalityError", (rank, words)
        assert BROKEN in words["text"], (rank, words)
        assert f"ranks [{VICTIM}]" in words["text"], (rank, words)
    trace = read_trace(tmp_path / "trace")
    tokens = [sum(len(batch(step, rank)) for step in range(1, 4)) for rank in said]
    assert trace.num_tokens >= sum(tokens)
    if where == "backward":
        went_on = run_ranks(losses_from_the_checkpoint, WORLD, tmp_path, deepspeed=True)
        assert went_on == straight


def plan_of(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(EXPERTS, generator=generator).tolist() for _ in range(LAYERS)]
    linear = PlacementPlan.linear(EXPERTS, range(LAYERS), 2, 2).to_dict()
    return PlacementPlan.from_dict({**linear, "physical_to_logical_map": rows})


class Collectives:
    """Counts this process's collectives, and dies at the given one."""

    NAMES = frozenset(
        {"all_reduce", "all_gather", "all_gather_object", "all_to_all", "all_to_all_single"}
        | {"broadcast", "broadcast_object_list", "barrier", "batch_isend_irecv"}
        | {"isend", "irecv", "send", "recv"}
    )

    def __init__(self, last=None):
        self.count, self.last = 0, last

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_name in self.NAMES:
            self.count += code.co_filename.endswith("distributed_c10d.py")
            if self.count == self.last:
                die()

    def __enter__(self):
        sys.setprofile(self)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)


def dies_in_relabel(rank, folder):
    engine = start()
    train(engine, range(1, 4), rank)
    with Collectives() as first:
        moe_locality.relabel(engine, plan_of(1))
    engine.save_checkpoint(str(folder / "checkpoint"), tag="before")
    dist.barrier()
    assert first.count > 2
    if rank == VICTIM:
        with Collectives(first.count - 1):
            moe_locality.relabel(engine, plan_of(2), timeout_s=2)
    moe_locality.relabel(engine, plan_of(2), timeout_s=2)
    train(engine, range(4, 6), rank)


def test_a_rank_killed_while_experts_move_ends_all_and_the_checkpoint_is_whole(tmp_path, straight):
    said = end_together(dies_in_relabel, tmp_path)
    assert sorted(said) == [rank for rank in range(WORLD) if rank != VICTIM]
    assert all(words["error"] is not None for words in said.values()), said
    went_on = run_ranks(losses_from_the_checkpoint, WORLD, tmp_path, deepspeed=True)
    for found, expected in zip(went_on, straight, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def test_ranks_with_different_numbers_of_tokens_train(straight):
    counts = {len(batch(step, rank)) for step in range(1, 6) for rank in range(WORLD)}
    assert 0 in counts
    assert len(counts) > 8
    assert all(torch.tensor(found).isfinite().all() for found in straight)
