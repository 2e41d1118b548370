"""What ranks tell each other over the key-value store when an exchange broke off.

The connections are gone then, and the backend names addresses, not ranks. So each rank leaves a
note of where it stood, and waits a moment for those of the ranks that it talked with: who leaves
none has ended, hangs, or is elsewhere. Nothing here may hang or raise: the store may be gone too.
"""

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch.distributed as dist

from moe_locality import compat

WAIT_S = 3.0
"""How long a rank waits for the notes of others; no longer for one that it sees to have ended."""

_POLL_S = 0.05
_asked: Counter[str] = Counter()
_introduced: set[int] = set()


def introduce() -> None:
    """Say once over the store where this rank's process runs, so that ranks of its node can see
    when it has ended. Waits for nobody.
    """
    with contextlib.suppress(Exception):  # of use in trouble only
        store = compat.default_store()
        if id(store) not in _introduced:
            _introduced.add(id(store))
            who = json.dumps([_machine(), os.getpid()])
            store.set(f"moe_locality/process/{dist.get_rank()}", who)


def leave(text: str) -> None:
    """Say over the store that this rank makes no more exchanges, for ranks that wait in one.

    Nothing is said while the interpreter shuts down, where ``DeepSpeedEngine.__del__`` may lead
    here: no thread starts any more then, and the others see that this process has ended.
    """
    if sys.is_finalizing():
        return

    def run() -> None:
        with contextlib.suppress(Exception):
            compat.default_store().set(f"moe_locality/left/{dist.get_rank()}", text)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAIT_S)


def ask(ranks: Collection[int], group_ranks: Sequence[int], text: str) -> str:
    """Leave a note with ``text`` and say what the other ranks noted.

    ``ranks``: those of the exchange that broke off; they break off together, so they are waited
    for, at most :data:`WAIT_S` seconds. Of the others of the group, what they noted before counts.
    """
    answer: list[str] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            answer.append(_ask(ranks, group_ranks, text))

    # the store has no time limit of its own for a link that is down
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(2 * WAIT_S + 1)
    if answer:
        return answer[0]
    return (
        "The key-value store, over which ranks tell where they stand, does not answer: rank 0 or "
        "the launcher, which holds it, has ended, or the link to it is down."
    )


def _ask(ranks: Collection[int], group_ranks: Sequence[int], text: str) -> str:
    store, me = compat.default_store(), dist.get_rank()
    scope = hashlib.sha256(repr(tuple(group_ranks)).encode()).hexdigest()[:16]
    key = f"moe_locality/broken/{scope}/{_asked[scope]}"
    _asked[scope] += 1
    store.set(f"{key}/{me}", json.dumps([text, None]))
    missing = [rank for rank in ranks if rank != me]
    ended: list[int] = []
    deadline = time.monotonic() + WAIT_S
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"{key}/{rank}"])]
        ended = [rank for rank in missing if _has_ended(store, rank)]
        if len(ended) == len(missing):
            break
        time.sleep(_POLL_S)
    store.set(f"{key}/{me}", json.dumps([text, missing]))
    notes = _notes(store, key, group_ranks)
    deadline += WAIT_S
    # all answered: one of them waited in vain for a rank that this one did not talk with
    while not missing and time.monotonic() < deadline:
        if all(notes[rank][1] is not None for rank in ranks):
            break
        time.sleep(_POLL_S)
        notes = _notes(store, key, group_ranks)
    absent = {rank for _, lost in notes.values() for rank in lost or ()} - notes.keys()
    ended = [rank for rank in sorted(absent) if rank in ended or _has_ended(store, rank)]
    left = {
        rank: store.get(f"moe_locality/left/{rank}").decode()
        for rank in sorted(absent)
        if store.check([f"moe_locality/left/{rank}"])
    }
    return _told(missing, sorted(absent), ended, left, notes)


def _notes(store: Any, key: str, ranks: Sequence[int]) -> dict[int, tuple[str, list[int] | None]]:
    here = [rank for rank in ranks if store.check([f"{key}/{rank}"])]
    return {rank: tuple(json.loads(store.get(f"{key}/{rank}"))) for rank in here}


def _told(
    missing: list[int],
    absent: list[int],
    ended: list[int],
    left: dict[int, str],
    notes: dict[int, tuple[str, list[int] | None]],
) -> str:
    parts = []
    silent = [rank for rank in absent if rank not in ended]
    if ended:
        parts.append(
            f"The processes of ranks {ended} have ended: read their output first (gloo's 'data "
            "size doesn't match' there: some rank left out an MoE layer or its backward pass)."
        )
    parts += [f"Rank {rank} {text}." for rank, text in left.items()]
    if silent:
        parts.append(
            f"Ranks {silent} gave no sign within {WAIT_S:g} s: they ended, hang, or do something "
            "else; look at them first."
        )
    if absent:
        parts.append(
            f"Expected ranks {absent} in this exchange too: every rank makes as many forward "
            "passes as the others (did their data end earlier?)."
        )
    for rank, (_, lost) in sorted(notes.items()):
        if lost and lost != missing:
            parts.append(f"Rank {rank} waited in vain for ranks {lost}.")
    at: dict[str, list[int]] = {}
    for rank, (text, _) in sorted(notes.items()):
        at.setdefault(text, []).append(rank)
    if len(at) > 1:
        stood = "; ".join(f"ranks {ranks} in {text}" for text, ranks in at.items())
        parts.append(f"It broke off on {stood}.")
    return " ".join(parts)


def _machine() -> str:
    """What processes that can see each other have in common; ``""`` where that is not known."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return (
                f"{socket.gethostname()} {file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
            )
    except OSError:
        return ""


def _has_ended(store: Any, rank: int) -> bool:
    """Whether the process of a rank of this node is gone for certain."""
    key = f"moe_locality/process/{rank}"
    if not store.check([key]):
        return False
    machine, pid = json.loads(store.get(key))
    if not machine or machine != _machine():
        return False
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True
    except OSError:
        return False
