"""Run a function on several gloo ranks: real processes, real collectives, a time limit, the first
failure in full.

``run_ranks(fn, world_size, *args)`` forks one process per rank (fork: a spawned child imports
torch again, which takes tens of seconds on a small machine), joins them into a process group over
a ``file://`` store and calls ``fn(rank, world_size, *args)``. It returns the list of the ranks'
return values (they must pickle; a tensor does not outlive its process: return arrays).
"""

import contextlib
import gc
import importlib
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from queue import Empty
from typing import Any


def _rank_main(fn, rank, world_size, args, store, queue, deepspeed, timeout_s):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world_size)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        limit = timedelta(seconds=timeout_s)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=limit
        )
        if deepspeed:
            init_deepspeed(limit)
        result = fn(rank, world_size, *args)
        queue.put((rank, True, result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
        queue.close()
        queue.join_thread()  # else the process ends before its traceback is sent
        os._exit(1)
    # no atexit handlers of the parent's libraries in a forked child
    queue.close()
    queue.join_thread()
    os._exit(0)


def skip_without_expert_parallelism():
    """Skip a test, or a module of tests, where transformers lets nobody name an exchange."""
    import pytest

    found = pytest.importorskip("transformers.distributed.expert_parallel")
    if not hasattr(found, "EPImplementationInterface"):
        pytest.skip("transformers before 5.23", allow_module_level=True)


def init_deepspeed(limit):
    import deepspeed
    import deepspeed.ops

    # DeepSpeed's CPU backend would compile this op at the first collective (minutes), and hang on
    # a stale lock
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="gloo", verbose=False, timeout=limit, auto_mpi_discovery=False
    )


def preload(deepspeed: bool) -> None:
    """Import here, once, what every forked rank needs: ``torch._dynamo``, which comes with the
    layer and with every optimizer, or Muon, which DeepSpeed asks each optimizer about, take a rank
    seconds each.
    """
    ours = ["dispatch.dispatcher", "kernels.reference", "topology.groups", "placement.solve"]
    theirs = ["torch._dynamo"]
    if deepspeed:
        ours += [f"layer.{name}" for name in ("checkpoint", "convert", "relocate", "replicas")]
        theirs += [
            "deepspeed.ops",
            "deepspeed.runtime.engine",
            "deepspeed.module_inject.auto_ep_layer",
            "deepspeed.runtime.zero.muon.muon_optimizer",
            "torch.utils.cpp_extension",
            "transformers.modeling_utils",
            "transformers.models.auto.modeling_auto",
        ]
    for name in (*(f"moe_locality.{name}" for name in ours), *theirs):
        with contextlib.suppress(ImportError):  # another DeepSpeed may have other modules
            importlib.import_module(name)


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    deepspeed: bool = False,
    timeout_s: float = 120.0,
) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on every rank; with ``deepspeed=True`` its comm layer
    is up too.

    Raises:
        AssertionError: a rank failed (with its traceback), did not answer within ``timeout_s``
        seconds, or did not end after its answer.
    """
    preload(deepspeed)
    context = mp.get_context("fork")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        ranks = [
            context.Process(
                target=_rank_main,
                args=(fn, rank, world_size, args, store, queue, deepspeed, timeout_s),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        gc.freeze()  # collections in a rank would walk, and copy, all that was imported here
        for process in ranks:
            process.start()
        gc.unfreeze()
        try:
            return _collect(queue, ranks, world_size, timeout_s)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(queue, ranks, world_size, timeout_s):
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    while len(results) < world_size:
        late = time.monotonic() > deadline
        # asked before the queue is read: what a rank said has left it before it ends
        dead = [r for r, p in enumerate(ranks) if p.exitcode is not None and r not in results]
        try:
            rank, fine, value = queue.get(timeout=0.2)
        except Empty:
            if dead or late:
                why = f"ranks {dead} died" if dead else f"no answer within {timeout_s} s"
                raise AssertionError(
                    f"{why}; answered: {sorted(results)} of {world_size}"
                ) from None
            continue
        if not fine:
            raise AssertionError(f"rank {rank} failed:\n{value}")
        results[rank] = value
    deadline = time.monotonic() + timeout_s
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    codes, said = [process.exitcode for process in ranks], ""
    if codes != [0] * world_size:
        with contextlib.suppress(Empty):
            said = queue.get(timeout=1)[2]
        raise AssertionError(f"all ranks answered and ended with {codes} (None: not yet)\n{said}")
    return [results[rank] for rank in range(world_size)]
