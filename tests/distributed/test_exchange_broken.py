"""A rank that leaves in the middle of an exchange: the others are told which, soon."""

import multiprocessing
import os
import signal
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from moe_locality.demo.launch import free_port
from moe_locality.dispatch import TokenDispatcher, desync
from moe_locality.errors import MoeLocalityError
from tests.distributed.fault_cases import check_named
from tests.launch import preload

WAIT_S = 6  # of an exchange, once all ranks are there
LIMIT_S = 120  # on a machine that does other things too


def leaves(how):
    if how == "hangs":
        os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(1)


def on_rank(rank, folder, victim, how, store):
    try:
        limit = timedelta(seconds=LIMIT_S)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=3, timeout=limit)
        dispatcher = TokenDispatcher(num_slots=6, num_ranks=3)
        x, slots = torch.randn(6, 8), torch.arange(6).reshape(6, 1) % 6
        dispatcher.dispatch(x, slots, torch.ones(6, 1))
        _set_pg_timeout(timedelta(seconds=WAIT_S), dist.group.WORLD)
        if rank == victim:
            leaves(how)
        try:
            for _ in range(3):
                dispatcher.dispatch(x, slots, torch.ones(6, 1))
        except MoeLocalityError as error:
            (folder / f"{how}-{rank}").write_text(str(error))
    except BaseException:
        traceback.print_exc()
    os._exit(0)


def test_the_survivors_are_told_which_rank_is_gone(tmp_path):
    """It ends; it hangs; or it ends and takes the store with it."""
    preload(deepspeed=False)
    context = multiprocessing.get_context("fork")
    cases = {
        "ends": (1, f"file://{tmp_path}/store1"),
        "hangs": (2, f"file://{tmp_path}/store2"),
        "took the store": (0, f"tcp://127.0.0.1:{free_port()}"),
    }
    ranks = [
        (how, rank, context.Process(target=on_rank, args=(rank, tmp_path, victim, how, store)))
        for how, (victim, store) in cases.items()
        for rank in range(3)
    ]
    for _, _, process in ranks:
        process.start()
    deadline = time.monotonic() + LIMIT_S
    waited = [(how, rank) for how, rank, _ in ranks if rank != cases[how][0]]
    for how, rank, process in ranks:
        if (how, rank) in waited:
            process.join(max(0.0, deadline - time.monotonic()))
    alive = [(how, rank) for how, rank, process in ranks if process.is_alive()]
    for _, _, process in ranks:
        process.kill()
        process.join()
    assert set(alive) <= {("hangs", 2)}, "survivors still wait"
    expected = {
        "ends": "The processes of ranks [1] have ended",
        "took the store": "rank 0 or the launcher, which holds it, has ended",
    }
    said = {(how, rank): (tmp_path / f"{how}-{rank}").read_text() for how, rank in waited}
    hung = [message for (how, _), message in said.items() if how == "hangs"]
    check_named(hung, "Ranks", 2, f"gave no sign within {desync.WAIT_S:g} s")
    for (how, rank), message in said.items():
        assert expected.get(how, "") in message, (how, rank, message)
        assert "another rank died or left before this one" in message
        assert f"token counts of layer 0, call 2 with ranks [0, 1, 2] broke off on rank {rank}" in (
            message
        )
        assert "The backend says: " in message
