"""A rank that dies, or goes its own way, inside a training step: every other rank ends, soon, with
a message; what was saved before stays whole.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import moe_locality
from moe_locality.placement import PlacementPlan
from moe_locality.trace import read_trace
from tests.launch import run_ranks

WORLD, VICTIM = 4, 2
EXPERTS, WIDTH, LAYERS = 8, 16, 2
WAIT_S = 15  # of the process group: how long a rank waits for one that still lives
END_S = 60  # all ranks have ended by then, on a machine that does other things too
BROKEN = "another rank died or left before this one"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        expert = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.moe = nn.ModuleList(
            moe_locality.MoE(
                WIDTH, expert, num_experts=EXPERTS, ep_size=WORLD, k=3, drop_tokens=False
            )
            for _ in range(LAYERS)
        )
        self.skipped: tuple[int, ...] = ()

    def forward(self, x):
        for number, layer in enumerate(self.moe):
            if number not in self.skipped:
                x = x + layer(x)[0]
        return x.square().mean()


def start(exchange="hierarchical", trace=None):
    section = {
        "dispatch": {"exchange": exchange},
        "cluster": {"num_nodes": 2, "ranks_per_node": 2},
    }
    if trace is not None:
        section["trace"] = {"path": str(trace), "shard_tokens": 64}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "moe_locality": section,
    }
    net = Net()
    return moe_locality.initialize(
        model=net, model_parameters=list(net.parameters()), config=config
    )[0]


def batch(step, rank):
    """Ranks have different numbers of tokens; one has none in some steps."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn((5 * rank * step) % 60, WIDTH, generator=generator)


def train(engine, steps, rank):
    losses = []
    for step in steps:
        loss = engine(batch(step, rank)).nan_to_num()
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def end_together(fault, folder: Path, *args, world: int = WORLD) -> tuple[dict[int, dict], float]:
    """Run ``fault(rank, folder, *args)`` on all ranks, of which some die or fail.

    Returns what each surviving rank said, and the seconds from the fault until all had ended.
    """
    import deepspeed as _  # noqa: F401  imported once, shared by the forked ranks

    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=one_rank, args=(fault, rank, world, folder, args), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    wait_until = time.monotonic() + 120 + END_S
    for process in ranks:
        process.join(max(0.0, wait_until - time.monotonic()))
    ended = time.time()
    alive = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    assert not alive, f"ranks {alive} still wait"
    said = {
        rank: json.loads((folder / f"said-{rank}").read_text())
        for rank in range(world)
        if (folder / f"said-{rank}").exists()
    }
    return said, ended - (folder / "fault").stat().st_mtime


def one_rank(fault, rank, world, folder, args):
    said = {"error": None, "text": "", "result": None}
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LOCAL_SIZE=str(world))
        torch.set_num_threads(1)
        from tests.launch import _init_deepspeed

        limit = timedelta(seconds=WAIT_S)
        store = f"file://{folder}/store"
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=world, timeout=limit
        )
        _init_deepspeed(limit)
        said["result"] = fault(rank, folder, *args)
    except BaseException as error:
        said.update(error=type(error).__name__, text=str(error), trace=traceback.format_exc())
    (folder / f"said-{rank}").write_text(json.dumps(said))
    os._exit(0)


def note_fault(folder):
    (folder / "fault").touch()


def dies_in_a_step(rank, folder, exchange, where):
    engine = start(exchange, folder / "trace")
    train(engine, range(1, 4), rank)
    engine.save_checkpoint(str(folder / "checkpoint"), tag="before")
    dist.barrier()
    if rank == VICTIM:
        layer = engine.module.moe[0 if where == "backward" else 1].deepspeed_moe

        def at_the_expert(module, args, output):
            note_fault(folder)
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
    said, seconds = end_together(dies_in_a_step, tmp_path, exchange, where)
    assert sorted(said) == [rank for rank in range(WORLD) if rank != VICTIM]
    assert seconds < END_S
    for rank, words in said.items():
        assert words["error"] == "MoeLocalityError", (rank, words)
        assert BROKEN in words["text"], (rank, words)
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

    def __init__(self, folder=None, last=None):
        self.count, self.folder, self.last = 0, folder, last

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if event == "call" and code.co_name in self.NAMES:
            self.count += code.co_filename.endswith("distributed_c10d.py")
            if self.count == self.last:
                note_fault(self.folder)
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
        with Collectives(folder, first.count - 1):
            moe_locality.relabel(engine, plan_of(2), timeout_s=5)
    moe_locality.relabel(engine, plan_of(2), timeout_s=5)
    train(engine, range(4, 6), rank)


def test_a_rank_killed_while_experts_move_ends_all_and_the_checkpoint_is_whole(tmp_path, straight):
    said, seconds = end_together(dies_in_relabel, tmp_path)
    assert sorted(said) == [rank for rank in range(WORLD) if rank != VICTIM]
    assert seconds < END_S
    assert all(words["error"] is not None for words in said.values()), said
    went_on = run_ranks(losses_from_the_checkpoint, WORLD, tmp_path, deepspeed=True)
    for found, expected in zip(went_on, straight, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def skips_a_layer(rank, folder, exchange):
    engine = start(exchange)
    train(engine, range(1, 3), rank)
    dist.barrier()
    if rank == VICTIM:
        note_fault(folder)
        engine.module.skipped = (0,)
    return train(engine, range(3, 6), rank)


@pytest.mark.parametrize("exchange", ["flat", "hierarchical"])
def test_a_rank_that_skips_a_layer_leaves_nobody_waiting(tmp_path, exchange):
    """The backend ends some ranks itself when counts meet rows; no rank goes on or waits."""
    said, seconds = end_together(skips_a_layer, tmp_path, exchange)
    assert seconds < END_S
    assert all(words["error"] is not None for words in said.values()), said
    assert all(words["result"] is None for words in said.values())


def test_ranks_with_different_numbers_of_tokens_train(straight):
    counts = {len(batch(step, rank)) for step in range(1, 6) for rank in range(WORLD)}
    assert 0 in counts
    assert len(counts) > 8
    assert all(torch.tensor(found).isfinite().all() for found in straight)
