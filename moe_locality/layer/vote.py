"""All ranks agree on whether a step worked, and notice within a time limit who does not answer."""

import contextlib
import pickle
from collections.abc import Sequence
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist

from moe_locality import compat
from moe_locality.errors import PlacementError

_numbers = count()


class LostRanks(PlacementError):
    """Ranks gave no answer within the time limit: they ended, or hang. The job cannot go on."""


def vote(value: Any, what: str, timeout_s: float) -> list[Any]:
    """Return every rank's value (plain data that pickles). Collective over all ranks.

    It goes over the key-value store, so it works when a collective has just failed. The lowest
    rank waits for the others, so what it publishes is the same for all. Keys of a vote are deleted
    during the next one.

    Raises:
        LostRanks: some rank did not answer within ``timeout_s`` seconds; names the ranks.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    me, world, store, number = (
        dist.get_rank(),
        dist.get_world_size(),
        compat.default_store(),
        next(_numbers),
    )
    key = f"moe_locality/vote/{number}"
    try:
        store.set(f"{key}/{me}", pickle.dumps(value))
        if me == 0:
            store.set(key, pickle.dumps(_collect(store, key, world, timeout_s)))
        store.wait([key], timedelta(seconds=2 * timeout_s + 5))
        found = pickle.loads(store.get(key))
    except RuntimeError as error:  # DistStoreError is one: the store is gone, or rank 0 is late
        raise LostRanks(_message([0], what, timeout_s)) from error
    if me == 0 and number:
        _forget(store, f"moe_locality/vote/{number - 1}", world)
    lost = [rank for rank, answer in enumerate(found) if answer is None]
    if lost:
        raise LostRanks(_message(lost, what, timeout_s))
    return [pickle.loads(answer) for answer in found]


def _collect(store: Any, key: str, world: int, timeout_s: float) -> list[bytes | None]:
    """Every rank's answer; None for those that are not there when the time is over."""
    names = [f"{key}/{rank}" for rank in range(world)]
    try:
        store.wait(names, timedelta(seconds=timeout_s))
        here = [True] * world
    except RuntimeError:
        here = [store.check([name]) for name in names]
    return [store.get(name) if there else None for name, there in zip(names, here, strict=True)]


def _forget(store: Any, key: str, world: int) -> None:
    """All ranks have read a vote when they have sent the next."""
    for name in (key, *(f"{key}/{rank}" for rank in range(world))):
        with contextlib.suppress(RuntimeError):
            store.delete_key(name)


def _message(ranks: Sequence[int], what: str, timeout_s: float) -> str:
    return (
        f"{what}: found no answer from ranks {list(ranks)} within {timeout_s:g} s, expected one "
        "from every rank: they ended or hang. Experts may lie in either order now: end this job "
        "and go on from the last checkpoint"
    )
