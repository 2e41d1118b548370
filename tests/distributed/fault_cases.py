"""Shared by the tests of faults: a small model in an engine, and ranks of which some die."""

import faulthandler
import gc
import json
import multiprocessing
import os
import re
import signal
import time
import traceback
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import moe_locality
from tests.launch import init_deepspeed, preload

WORLD, VICTIM = 4, 2
EXPERTS, WIDTH, LAYERS = 8, 16, 2
WAIT_S = 20  # of the process group: how long a rank waits for one that still lives
LIMIT_S = 240  # all ranks have ended by then, on a machine that does other things too


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


def start_ranks(fault, folder: Path, *args, world: int = WORLD) -> list:
    """Run ``fault(rank, folder, *args)`` on all ranks, of which some die or fail."""
    preload(deepspeed=True)
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=one_rank, args=(fault, rank, world, folder, args), daemon=True)
        for rank in range(world)
    ]
    gc.freeze()
    for process in ranks:
        process.start()
    gc.unfreeze()
    return ranks


def end_of(ranks: list, folder: Path) -> dict[int, dict]:
    """What each surviving rank said, when all have ended."""
    wait_until = time.monotonic() + LIMIT_S
    for process in ranks:
        process.join(max(0.0, wait_until - time.monotonic()))
    alive = [rank for rank, process in enumerate(ranks) if process.is_alive()]
    for process in ranks:
        process.kill()
        process.join()
    assert not alive, f"ranks {alive} still wait"
    return {
        rank: json.loads((folder / f"said-{rank}").read_text())
        for rank in range(len(ranks))
        if (folder / f"said-{rank}").exists()
    }


def end_together(fault, folder: Path, *args) -> dict[int, dict]:
    """As ``start_ranks`` and ``end_of``."""
    return end_of(start_ranks(fault, folder, *args), folder)


def one_rank(fault, rank, world, folder, args):
    said = {"error": None, "text": "", "result": None}
    faulthandler.disable()  # the backend may end this process
    try:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", LOCAL_SIZE=str(world))
        torch.set_num_threads(1)
        limit = timedelta(seconds=WAIT_S)
        store = f"file://{folder}/store"
        dist.init_process_group(
            "gloo", init_method=store, rank=rank, world_size=world, timeout=limit
        )
        init_deepspeed(limit)
        said["result"] = fault(rank, folder, *args)
    except BaseException as error:
        said.update(error=type(error).__name__, text=str(error), trace=traceback.format_exc())
    (folder / f"said-{rank}").write_text(json.dumps(said))
    os._exit(0)


def check_named(texts: Iterable[str], before: str, rank: int, after: str) -> None:
    """All texts have ``before [...] after`` with this rank in the list. Others that were late, on a
    machine that stands still for seconds, may be in it too; they themselves name the rank alone.
    """
    words = re.compile(rf"{re.escape(before)} \[([\d, ]+)\] {re.escape(after)}")
    named = []
    for text in texts:
        found = words.search(text)
        assert found, text
        named.append(found[1].split(", "))
    assert all(str(rank) in ranks for ranks in named), named
    assert [str(rank)] in named, named
