"""Find ranks of an expert group that are out of step, and report which ones and where.

*Headers*: the n-th exchange of a rank meets the n-th exchange of every other rank of its group,
whichever layers they are for. So each rank sends, beside its counts, a header with the number of
its layer and how often it called that layer. Where they differ, all ranks raise
:class:`DesyncError`.

*Notes*: when an exchange fails, the connections are gone and the backend reports addresses, not
ranks. Each rank then leaves a note in the key-value store that says where it failed, and waits
briefly for the notes of its peers. This code must neither hang nor raise: the store may be
unreachable too.
"""

import contextlib
import hashlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_locality import compat
from moe_locality.errors import MoeLocalityError

HEADER = 3
"""Number of int64 values sent beside the counts: the sender's position code; 1 + the rank that an
earlier exchange found out of step (0: none); the position code of that rank."""

NO_REPORT = (0, 0)
_MARK = 0x4D4C  # first 16 bits of a code; rows or memory read as a header do not begin with it
_FAILED = 0x4D46  # those of a rank whose routes cannot be sent
_numbers: dict[tuple[int, ...], Iterator[int]] = defaultdict(itertools.count)
_positions: dict[tuple[int, ...], "weakref.WeakSet[CallPosition]"] = defaultdict(weakref.WeakSet)


class CallPosition:
    """The MoE layer that a dispatcher serves, and how often this rank has called it.

    ``number``: index of the layer in its model. Where it is unknown, layers are numbered in the
    order of their first call, which is the same on all ranks of a group. ``name`` is for messages.
    ``failure``: why this call cannot send its routes; its peers hear of it with the counts.
    """

    def __init__(self, number: int | None = None, name: str = "") -> None:
        self.number, self.name, self.calls, self.failure = number, name, 0, ""

    def enter(self, ranks: tuple[int, ...]) -> None:
        """Count one call over the group of ``ranks``."""
        if self.number is None:
            self.number = next(_numbers[ranks])
        _positions[ranks].add(self)
        self.calls += 1

    def code(self) -> int:
        """Return mark, layer number and calls packed into one positive int64."""
        mark = _FAILED if self.failure else _MARK
        return mark << 48 | ((self.number or 0) & 0xFFFF) << 32 | (self.calls & 0xFFFFFFFF)

    def __str__(self) -> str:
        return _position_text(self.number or 0, self.name, self.calls)


def _position_text(number: int, name: str, calls: int) -> str:
    named = f" ({name})" if name else ""
    return f"layer {number}{named}, call {calls}"


class DesyncError(MoeLocalityError):
    """Ranks of one group are at different layers or calls, or one cannot send its routes.

    ``codes``: position code of each rank that is known. ``report``: (1 + rank, code) of a rank at
    another position than this one, to forward to ranks that have not heard of it.
    """

    def __init__(self, message: str, codes: Mapping[int, int], report: tuple[int, int]) -> None:
        super().__init__(message)
        self.codes, self.report = dict(codes), report


def check_headers(
    headers: Sequence[Sequence[int]],
    ranks: Sequence[int],
    position: CallPosition,
    me: int,
    known: DesyncError | None = None,
) -> None:
    """Raise unless all ranks of an exchange are at the same position and report no other.

    ``headers [G][HEADER]``: one from each of ``ranks [G]``, this rank (``me``) included; all ranks
    get the same. ``known``: what an earlier exchange of this step found.

    Raises:
        DesyncError: on all ranks of the exchange; names ranks and their positions.
    """
    mine = headers[list(ranks).index(me)][0]
    same = all(code == mine and not told for code, told, _ in headers)
    if known is None and same and not position.failure:
        return
    codes = dict(known.codes) if known is not None else {}
    codes |= {rank: header[0] for rank, header in zip(ranks, headers, strict=True)}
    for code, told, theirs in headers:
        if told and _readable(code):
            codes.setdefault(told - 1, theirs)
    report = next(((rank + 1, code) for rank, code in codes.items() if code != mine), NO_REPORT)
    failed = sorted(rank for rank, code in codes.items() if code >> 48 == _FAILED)
    if failed:
        why = position.failure or "their routes name experts that do not exist: see their errors"
        raise DesyncError(f"ranks {failed} gave up in {position}: {why}", codes, report)
    raise DesyncError(_message(codes, _names(position)), codes, report)


def calls_so_far(ranks: tuple[int, ...]) -> str:
    """Return how often this rank called each layer of a group; ``""`` where equally often."""
    calls = sorted((layer.number or 0, layer.calls) for layer in _positions[ranks])
    if len({count for _, count in calls}) <= 1:
        return ""
    runs: list[list[int]] = []
    for number, count in calls:
        if runs and runs[-1][2] == count and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number, count])
    parts = (f"{a}-{b}: {n}" if a != b else f"{a}: {n}" for a, b, n in runs)
    return f"calls so far by layer: {', '.join(parts)}"


def all_calls() -> str:
    """Return how often this rank called its MoE layers: ``"3 calls of each MoE layer"``."""
    calls = sorted({layer.calls for group in _positions.values() for layer in group}) or [0]
    often = f"{calls[0]}" if len(calls) == 1 else f"{calls[0]} to {calls[-1]}"
    return f"{often} calls of each MoE layer"


def _readable(code: int) -> bool:
    return code >> 48 in (_MARK, _FAILED)


def _names(position: CallPosition) -> dict[int, str]:
    """Return the names of this rank's layers by number, where a number is that of one layer."""
    found: dict[int, set[str]] = defaultdict(set)
    for group in _positions.values():
        for other in group:
            found[other.number or 0].add(other.name)
    names = {number: next(iter(named)) for number, named in found.items() if len(named) == 1}
    return {**names, position.number or 0: position.name}


def _message(codes: Mapping[int, int], names: Mapping[int, str]) -> str:
    at: dict[int, list[int]] = defaultdict(list)
    for rank, code in sorted(codes.items()):
        at[code if _readable(code) else 0].append(rank)
    parts, most = [], max(len(ranks) for ranks in at.values())
    for code, ranks in at.items():
        where = "another exchange than that of counts (a backward pass, or other rows)"
        if code:
            number, calls = code >> 32 & 0xFFFF, code & 0xFFFFFFFF
            where = _position_text(number, names.get(number, ""), calls)
        parts.append(f"ranks {ranks} at {where}")
    odd = sorted(rank for ranks in at.values() if len(ranks) < most for rank in ranks)
    suspects = odd or sorted(codes)
    return (
        f"found ranks of one expert-parallel group at different MoE layers: {'; '.join(parts)}. "
        "Expected every rank to run every MoE layer, in the same order and equally often, also "
        f"where it has no tokens. Look for what ranks {suspects} did differently in this step: a "
        "layer left out, repeated or called in another order, or other settings of activation "
        "checkpointing"
    )


WAIT_S = 3.0
"""Seconds to wait for the notes of other ranks, unless their process is known to have ended."""

_POLL_S = 0.05
_asked: Counter[str] = Counter()
_announced: set[int] = set()


def announce_process() -> None:
    """Publish machine and process id once: ranks of the machine can see when this one has ended."""
    with contextlib.suppress(Exception):  # only used to explain a failure
        store = compat.default_store()
        if id(store) not in _announced:
            _announced.add(id(store))
            who = json.dumps([_machine(), os.getpid()])
            store.set(f"moe_locality/process/{dist.get_rank()}", who)


def announce_departure(text: str) -> None:
    """Publish that this rank makes no more exchanges, for ranks that wait in one.

    While the interpreter shuts down (``DeepSpeedEngine.__del__`` may lead here) nothing is
    published; other ranks see that this process has ended.
    """
    _within(
        WAIT_S, lambda: compat.default_store().set(f"moe_locality/left/{dist.get_rank()}", text)
    )


def ask_ranks(ranks: Collection[int], group_ranks: Sequence[int], text: str) -> str:
    """Leave a note with ``text``, where this rank failed, and return what those of others say.

    ``ranks``, those of the failed exchange, fail together, so this rank waits for their notes, at
    most :data:`WAIT_S` seconds; of all others of the group, only notes that exist already count.
    """
    answer = _within(2 * WAIT_S + 1, lambda: _ask(ranks, group_ranks, text))
    return answer or (
        "The key-value store, over which ranks tell where they stand, does not answer: rank 0 or "
        "the launcher, which holds it, has ended, or the link to it is down."
    )


def _within(limit_s: float, call: Callable[[], str | None]) -> str | None:
    """Return what ``call`` returns; None where it fails, or takes longer than ``limit_s``."""
    if sys.is_finalizing():  # a thread that is started never runs
        return None
    answer: list[str | None] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            answer.append(call())

    # a thread: a store call has no limit of its own when the link is down
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    return answer[0] if answer else None


def _ask(ranks: Collection[int], group_ranks: Sequence[int], text: str) -> str:
    store, me = compat.default_store(), dist.get_rank()
    scope = hashlib.sha256(repr(tuple(group_ranks)).encode()).hexdigest()[:16]
    key = f"moe_locality/broken/{scope}/{_asked[scope]}"
    _asked[scope] += 1
    store.set(f"{key}/{me}", json.dumps([text, None]))
    missing, gone = [rank for rank in ranks if rank != me], set()
    deadline = time.monotonic() + WAIT_S
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not store.check([f"{key}/{rank}"])]
        gone |= {rank for rank in missing if _has_ended(store, rank)}
        if gone.issuperset(missing):
            break
        time.sleep(_POLL_S)
    store.set(f"{key}/{me}", json.dumps([text, missing]))
    notes = _notes(store, key, group_ranks)
    deadline += WAIT_S
    # all answered: one of them may wait for a rank that is not in this rank's exchange
    while not missing and time.monotonic() < deadline:
        if all(notes[rank][1] is not None for rank in ranks):
            break
        time.sleep(_POLL_S)
        notes = _notes(store, key, group_ranks)
    absent = {rank for _, lost in notes.values() for rank in lost or ()} - notes.keys()
    ended = [rank for rank in sorted(absent) if rank in gone or _has_ended(store, rank)]
    keys = {rank: f"moe_locality/left/{rank}" for rank in sorted(absent)}
    left = {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}
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
    if ended:
        parts.append(
            f"The processes of ranks {ended} have ended: read their output first (gloo's 'data "
            "size doesn't match' there: some rank left out an MoE layer or its backward pass)."
        )
    parts += [f"Rank {rank} {text}." for rank, text in left.items()]
    if silent := [rank for rank in absent if rank not in ended]:
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
    at: dict[str, list[int]] = defaultdict(list)
    for rank, (text, _) in sorted(notes.items()):
        at[text].append(rank)
    if len(at) > 1:
        stood = "; ".join(f"ranks {ranks} in {text}" for text, ranks in at.items())
        parts.append(f"It broke off on {stood}.")
    return " ".join(parts)


def _machine() -> str:
    """Return an id of this host, boot and PID namespace; ``""`` where it is unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _has_ended(store: Any, rank: int) -> bool:
    """Return whether the process of ``rank`` runs on this machine and has ended for certain."""
    key = f"moe_locality/process/{rank}"
    if not store.check([key]):
        return False
    machine, pid = json.loads(store.get(key))
    if not machine or machine != _machine():
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError as error:
        return isinstance(error, FileNotFoundError)
