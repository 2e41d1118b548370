"""All ranks agree: on a value, or that a check passed. A rank that does not answer within a time
limit is named.

Answers travel over the process group's key-value store, which works when a collective has failed.
"""

import hashlib
import logging
import pickle
import re
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from moe_locality import compat
from moe_locality.config import MoeLocalityConfig, read_config
from moe_locality.errors import ConfigError, MoeLocalityError, PlacementError
from moe_locality.placement.plan import PlacementPlan
from moe_locality.topology.groups import exchange_objects

T = TypeVar("T")
Inputs = tuple[MoeLocalityConfig, PlacementPlan | None, T]
logger = logging.getLogger(__name__)
_numbers = count()
_HALFWAY = "Experts may lie in either order now: end this job and go on from the last checkpoint"
_BEFORE = "Nothing was changed yet: look at the output of these ranks"


class LostRanks(PlacementError):
    """Ranks gave no answer within the time limit: they exited or hang. The job cannot go on."""


def gather_answers(
    value: Any, what: str, timeout_s: float | None = None, advice: str = _HALFWAY
) -> list[Any]:
    """Return every rank's value (plain data that pickles). Collective over all ranks.

    The lowest rank waits for the others and publishes what it has, so all ranks get the same. It
    goes on when they have read it (:func:`~moe_locality.compat.forget_when_read`). LostRanks names
    those that did not answer within ``timeout_s`` (None: that of collectives), with ``what`` and
    ``advice`` as begin and end of the message."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    limit_s = compat.default_timeout().total_seconds() if timeout_s is None else timeout_s

    def no_answer(ranks: list[int]) -> LostRanks:
        return LostRanks(
            f"{what}: found no answer from ranks {ranks} within {limit_s:g} s, expected one from "
            f"every rank: they exited or hang. {advice}"
        )

    me, world, store = dist.get_rank(), dist.get_world_size(), compat.default_store()
    key = f"moe_locality/agreement/{next(_numbers)}"
    try:
        store.set(f"{key}/{me}", pickle.dumps(value))
        if me == 0:
            store.set(key, pickle.dumps(_collect(store, key, world, limit_s)))
        store.wait([key], timedelta(seconds=2 * limit_s + 5))
        found = pickle.loads(store.get(key))
        store.set(f"{key}/read/{me}", "")
    except RuntimeError as error:  # DistStoreError is one: the store is gone, or rank 0 is late
        raise no_answer([0]) from error
    lost = [rank for rank, answer in enumerate(found) if answer is None]
    if me == 0:
        here = [rank for rank in range(world) if rank not in lost]
        limit = min(timedelta(seconds=limit_s), compat.READ_LIMIT)
        # a rank that is late still reads it
        compat.forget_when_read(store, key, here, limit, forget=not lost)
    if lost:
        raise no_answer(lost)
    return [pickle.loads(answer) for answer in found]


def all_succeed(check: Callable[[], T]) -> T:
    """Return ``check()``; where it raises on a rank, raise on all ranks. Collective.

    For checks before anything changes. ``check`` calls no collective. The rank that failed raises
    its own error, the others the first one; LostRanks where some did not come here in time."""
    result, failure = None, None
    try:
        result = check()
    except Exception as error:  # noqa: BLE001  raised below, on all ranks
        failure = error
    mine = None if failure is None else (type(failure), str(failure))
    found = gather_answers(mine, "checking on all ranks", advice=_BEFORE)
    if failure is not None:
        raise failure
    failed = [(rank, item) for rank, item in enumerate(found) if item is not None]
    if failed:
        rank, (kind, message) = failed[0]
        ours = kind if issubclass(kind, MoeLocalityError) else PlacementError
        raise ours(f"found by ranks {[r for r, _ in failed]}, as rank {rank} says: {message}")
    return result  # pyright: ignore[reportReturnType]


def decided_by_first(mine: Any, decide: Callable[[list[Any]], T]) -> T:
    """Return what rank 0 decides on from what every rank gives; errors rise on all. Collective."""
    first = dist.get_rank() == 0
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(mine, gathered if first else None)
    decided = all_succeed(lambda: decide(gathered) if first else None)
    return exchange_objects(decided)[0]


def section_and_plan(
    config: MoeLocalityConfig | dict[str, Any] | str | Path | None,
    plan: PlacementPlan | str | Path | None = None,
) -> tuple[MoeLocalityConfig, PlacementPlan | None]:
    """Read the section, and the plan: the one given or its file, else that of the section."""
    section = read_config(config)
    plan = plan or section.plan
    found = PlacementPlan.read(plan) if isinstance(plan, (str, Path)) else plan
    if found is not None and not isinstance(found, PlacementPlan):
        raise PlacementError(
            f"found a {type(found).__name__} as the plan, expected a PlacementPlan or the path of "
            "one: PlacementPlan.from_dict(content) reads the content of such a file"
        )
    return section, found


def agree_on_inputs(read: Callable[[], Inputs[T]]) -> Inputs[T]:
    """Return ``read()``: section, plan, and what else a front end reads and checks. Collective.

    Every front end begins so: a file that is missing on one rank, or another one there, is an error
    (ConfigError, PlacementError) on all ranks. The path of the plan may differ, and ``tracking``.
    """
    section, plan, rest = all_succeed(read)
    text = section.model_dump_json(exclude={"plan", "tracking"})
    all_agree("moe_locality sections", hashlib.sha256(text.encode()).hexdigest(), ConfigError)
    all_agree("placement plans", "none" if plan is None else plan.digest())
    return section, plan, rest


def announce(layers: str, section: MoeLocalityConfig, placed: bool) -> None:
    """Say once per job which layers exchange through ours, and whether a plan placed them."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0:
        facts = (layers, section.dispatch.exchange, "a" if placed else "no")
        logger.warning("moe_locality: %s exchange through it (%s, %s plan)", *facts)


def all_agree(what: str, value: str, error: type[MoeLocalityError] = PlacementError) -> None:
    """Raise ``error`` on all ranks unless ``value`` is the same on all of them. Collective."""
    ranks_with: dict[str, list[int]] = defaultdict(list)
    for rank, found in enumerate(gather_answers(value, f"comparing {what}", advice=_BEFORE)):
        ranks_with[found].append(rank)
    if len(ranks_with) == 1:
        return
    largest = max(ranks_with.values(), key=len)
    parts = []
    for found, ranks in ranks_with.items():  # of a digest, the first characters say enough
        shown = found[:12] if re.fullmatch("[0-9a-f]{32,}", found) else found
        parts.append(f"{shown} on ranks {ranks}")
    others = sorted(rank for ranks in ranks_with.values() if ranks is not largest for rank in ranks)
    raise error(
        f"found different {what} on the ranks ({'; '.join(parts)}), expected one: ranks {others} "
        f"differ from ranks {largest}; nothing was moved: give every rank the same"
    )


def _collect(store: Any, key: str, world: int, timeout_s: float) -> list[bytes | None]:
    """Return every rank's answer; None for those that are missing when the time is over."""
    names = [f"{key}/{rank}" for rank in range(world)]
    try:
        store.wait(names, timedelta(seconds=timeout_s))
        here = [True] * world
    except RuntimeError:
        here = [store.check([name]) for name in names]
    return [store.get(name) if there else None for name, there in zip(names, here, strict=True)]
