"""All ranks agree: on a value, on whether a step worked. Who does not answer within a time limit is
named.
"""

import contextlib
import pickle
from collections import defaultdict
from collections.abc import Sequence
from datetime import timedelta
from itertools import count
from typing import Any

import torch.distributed as dist

from moe_locality import compat
from moe_locality.errors import MoeLocalityError, PlacementError

_numbers = count()
_HALFWAY = "Experts may lie in either order now: end this job and go on from the last checkpoint"
_BEFORE = "Nothing was changed yet: look at the output of these ranks"


class LostRanks(PlacementError):
    """Ranks gave no answer within the time limit: they ended, or hang. The job cannot go on."""


def vote(value: Any, what: str, timeout_s: float, advice: str = _HALFWAY) -> list[Any]:
    """Return every rank's value (plain data that pickles). Collective over all ranks.

    ``what`` and ``advice`` begin and end the message where ranks do not answer.

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
        raise LostRanks(_message([0], what, timeout_s, advice)) from error
    if me == 0 and number:
        _forget(store, f"moe_locality/vote/{number - 1}", world)
    lost = [rank for rank, answer in enumerate(found) if answer is None]
    if lost:
        raise LostRanks(_message(lost, what, timeout_s, advice))
    return [pickle.loads(answer) for answer in found]


def agree_on_failure(failure: Exception | None) -> None:
    """Raise the first rank's error on all ranks; do nothing where no rank has one. Collective.

    For checks before anything changes; ranks may wait as long as for any collective.

    Raises:
        LostRanks: some rank did not come here in time.
    """
    mine = None if failure is None else (type(failure), str(failure))
    found = vote(mine, "checking on all ranks", _patience_s(), _BEFORE)
    if failure is not None:
        raise failure
    failed = [(rank, item) for rank, item in enumerate(found) if item is not None]
    if not failed:
        return
    rank, (kind, message) = failed[0]
    ours = kind if issubclass(kind, MoeLocalityError) else PlacementError
    raise ours(f"found by ranks {[r for r, _ in failed]}, as rank {rank} says: {message}")


def agree(what: str, value: str) -> None:
    """Raise PlacementError on all ranks unless ``value`` is the same on all of them. Collective."""
    ranks_with: dict[str, list[int]] = defaultdict(list)
    for rank, found in enumerate(vote(value, f"comparing {what}", _patience_s(), _BEFORE)):
        ranks_with[found].append(rank)
    if len(ranks_with) == 1:
        return
    largest = max(ranks_with.values(), key=len)
    parts = [f"{found[:12]} on ranks {ranks}" for found, ranks in ranks_with.items()]
    others = sorted(rank for ranks in ranks_with.values() if ranks is not largest for rank in ranks)
    raise PlacementError(
        f"found different {what} on the ranks ({'; '.join(parts)}), expected one: ranks {others} "
        f"differ from ranks {largest}; nothing was moved: give every rank the same"
    )


def _patience_s() -> float:
    """How long a collective waits on this job."""
    running = dist.is_available() and dist.is_initialized()
    return compat.default_timeout().total_seconds() if running else 0.0


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


def _message(ranks: Sequence[int], what: str, timeout_s: float, advice: str) -> str:
    return (
        f"{what}: found no answer from ranks {list(ranks)} within {timeout_s:g} s, expected one "
        f"from every rank: they ended or hang. {advice}"
    )
