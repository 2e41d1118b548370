"""A rank that leaves in the middle of an exchange: the others are told what that means, soon."""

import multiprocessing
import os
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_locality.dispatch import TokenDispatcher
from moe_locality.errors import MoeLocalityError

LIMIT_S = 60


def on_rank(rank, folder):
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=LIMIT_S),
        )
        dispatcher = TokenDispatcher(num_slots=4, num_ranks=2)
        x, slots = torch.randn(6, 8), torch.arange(6).reshape(6, 1) % 4
        dispatcher.dispatch(x, slots, torch.ones(6, 1))
        if rank == 1:
            os._exit(1)
        try:
            for _ in range(3):
                dispatcher.dispatch(x, slots, torch.ones(6, 1))
        except MoeLocalityError as error:
            (folder / "message").write_text(str(error))
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def test_the_survivor_is_told_that_another_rank_is_gone(tmp_path):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=on_rank, args=(rank, tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(LIMIT_S / 2)
    alive = [process for process in ranks if process.is_alive()]
    for process in alive:
        process.kill()
    assert not alive, "the survivor still waits"
    message = (tmp_path / "message").read_text()
    assert "another rank died or left before this one" in message
    assert "The backend says: " in message
