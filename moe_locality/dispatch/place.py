"""Where a rank stands among the MoE layers, told with the counts of every exchange.

The n-th exchange of a rank meets the n-th of every other rank of its group, whatever layers they
are for. So each rank sends, beside the counts for another rank, a header that names the layer and
how often it was called; where the headers differ, a rank skipped a layer or took another order.
"""

import itertools
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from moe_locality.errors import MoeLocalityError

HEADER = 3
"""int64 values that travel beside the counts for a rank: the code of the sender's place; one more
than the rank that it found elsewhere in an exchange before this one (0: none); that rank's code."""

NO_REPORT = (0, 0)
_MARK = 0x4D4C  # what a code begins with: memory or rows read as a header do not
_numbers: dict[tuple[int, ...], Iterator[int]] = defaultdict(itertools.count)
_places: dict[tuple[int, ...], "weakref.WeakSet[Place]"] = defaultdict(weakref.WeakSet)


class Place:
    """Which layer a dispatcher serves, and how often it was called on this rank.

    ``number``: that of the layer in its model; where it is not known, layers are numbered in the
    order of their first call, which is the same on all ranks of a group. ``name`` is for messages.
    """

    def __init__(self, number: int | None = None, name: str = "") -> None:
        self.number, self.name, self.calls = number, name, 0

    def enter(self, ranks: tuple[int, ...]) -> None:
        """Note a call over the group of ``ranks``."""
        if self.number is None:
            self.number = next(_numbers[ranks])
        _places[ranks].add(self)
        self.calls += 1

    def code(self) -> int:
        """This place as one positive int64: mark, number of the layer, calls."""
        return _MARK << 48 | ((self.number or 0) & 0xFFFF) << 32 | (self.calls & 0xFFFFFFFF)

    def __str__(self) -> str:
        named = f" ({self.name})" if self.name else ""
        return f"layer {self.number or 0}{named}, call {self.calls}"


class RanksApart(MoeLocalityError):
    """Ranks of one group stand at different layers. ``codes``: of the ranks whose place is known;
    ``report``: a rank that stands elsewhere than this one, and its code, for other ranks.
    """

    def __init__(self, message: str, codes: Mapping[int, int], report: tuple[int, int]) -> None:
        super().__init__(message)
        self.codes, self.report = dict(codes), report


def check_headers(
    headers: Sequence[Sequence[int]],
    ranks: Sequence[int],
    place: Place,
    me: int,
    known: RanksApart | None = None,
) -> None:
    """Raise unless all ranks of an exchange stand at one place and know of no other.

    ``headers [G][HEADER]`` from ``ranks [G]`` (this one, ``me``, too); ``known``: what an exchange
    before this one found. All ranks of the exchange see the same headers, so all raise or none.

    Raises:
        RanksApart: names the ranks and their places.
    """
    mine = headers[list(ranks).index(me)][0]
    if known is None and all(code == mine and not told for code, told, _ in headers):
        return
    codes = dict(known.codes) if known is not None else {}
    codes |= {rank: header[0] for rank, header in zip(ranks, headers, strict=True)}
    for code, told, theirs in headers:
        if told and _readable(code):
            codes.setdefault(told - 1, theirs)
    report = next(((rank + 1, code) for rank, code in codes.items() if code != mine), NO_REPORT)
    raise RanksApart(_message(codes, _names(place)), codes, report)


def calls_so_far(ranks: tuple[int, ...]) -> str:
    """Say how often this rank called the layers of a group, where not all as often: ``""`` or
    ``"layers 0-3: 5 calls, 4: 4 calls"``.
    """
    calls = sorted((place.number or 0, place.calls) for place in _places[ranks])
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
    """Say how often this rank called its MoE layers: ``"3 calls of each MoE layer"``."""
    calls = sorted({place.calls for places in _places.values() for place in places}) or [0]
    often = f"{calls[0]}" if len(calls) == 1 else f"{calls[0]} to {calls[-1]}"
    return f"{often} calls of each MoE layer"


def _readable(code: int) -> bool:
    return code >> 48 == _MARK


def _names(place: Place) -> dict[int, str]:
    """Names of this rank's layers by number, where a number stands for one layer."""
    found: dict[int, set[str]] = defaultdict(set)
    for places in _places.values():
        for other in places:
            found[other.number or 0].add(other.name)
    names = {number: next(iter(named)) for number, named in found.items() if len(named) == 1}
    return {**names, place.number or 0: place.name}


def _message(codes: Mapping[int, int], names: Mapping[int, str]) -> str:
    at: dict[int, list[int]] = defaultdict(list)
    for rank, code in sorted(codes.items()):
        at[code if _readable(code) else 0].append(rank)
    parts, most = [], max(len(ranks) for ranks in at.values())
    for code, ranks in at.items():
        if code:
            number, calls = code >> 32 & 0xFFFF, code & 0xFFFFFFFF
            name = f" ({names[number]})" if names.get(number) else ""
            where = f"layer {number}{name}, call {calls}"
        else:
            where = "another exchange than that of counts (a backward pass, or other rows)"
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
