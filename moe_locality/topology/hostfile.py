"""DeepSpeed's hostfile, read the way ``deepspeed --hostfile`` reads it.

One host per line, ``name slots=N``. Slots are ranks here: one process per slot. Ranks are numbered
in the order of the file, consecutive per host.
"""

import re
from pathlib import Path

from moe_locality.errors import TopologyError

_LINE = re.compile(r"^(\S+)\s+slots=(\d+)")  # the start of the line only, as in DeepSpeed


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Return ``{host: number of slots}`` in the order of the file.

    Raises:
        TopologyError: the file cannot be read, holds no host, names one twice, or a line is not
            ``name slots=N``.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise TopologyError(f"cannot read the hostfile {path}: {why}: check the path") from error
    first_line: dict[str, int] = {}
    slots: dict[str, int] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.search(line)
        if match is None:
            raise TopologyError(
                f"{path}, line {number}: found {line!r}, expected 'name slots=N', "
                "for example 'worker-0 slots=8'"
            )
        host = match.group(1)
        if host in slots:
            raise TopologyError(
                f"{path}, line {number}: found {host!r} again (first in line {first_line[host]}), "
                "expected each host once: put all its slots on one line"
            )
        slots[host], first_line[host] = int(match.group(2)), number
    if not slots:
        raise TopologyError(
            f"{path}: found no host, expected at least one line such as 'worker-0 slots=8'"
        )
    return slots


def select_slots(
    slots: dict[str, int], include: str | None = None, exclude: str | None = None
) -> dict[str, list[int]]:
    """Return the slots that ``deepspeed --include`` or ``--exclude`` leaves.

    ``include`` and ``exclude`` are DeepSpeed's strings: ``host:0,2@host2`` means slots 0 and 2 of
    ``host`` and all of ``host2``. Hosts stay in the order of the hostfile. As in DeepSpeed, a
    filter drops the hosts without a slot left, and without a filter a host with ``slots=0`` stays:
    the launcher starts there, and no rank.

    Raises:
        TopologyError: both are given, a host or a slot is unknown, or nothing is left.
    """
    if include and exclude:
        raise TopologyError(
            f"found include={include!r} and exclude={exclude!r}, expected one of them: "
            "drop the other"
        )
    every = {host: list(range(count)) for host, count in slots.items()}
    if include:
        named = _parse_filter(include, every)
        left = {host: named[host] for host in every if host in named}
    elif exclude:
        named = _parse_filter(exclude, every)
        left = {
            host: [slot for slot in every[host] if slot not in named.get(host, ())]
            for host in every
        }
    else:
        left = every
    if include or exclude:
        left = {host: kept for host, kept in left.items() if kept}
    if not any(left.values()):
        chosen = f"include={include!r}, exclude={exclude!r}" if include or exclude else "slots=0"
        raise TopologyError(f"found no slot left after {chosen}, expected at least one")
    return left


def _parse_filter(text: str, every: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return ``{host: sorted slots}`` that a filter names; a bare host means all its slots."""
    named: dict[str, set[int]] = {}
    for part in text.split("@"):
        host, colon, listed = part.partition(":")
        if host not in every:
            raise TopologyError(
                f"found host {host!r} in {text!r}, expected one of the hostfile: {', '.join(every)}"
            )
        chosen = named.setdefault(host, set())
        if not colon:
            continue
        for slot in listed.split(","):
            if not slot.strip().isdecimal() or int(slot) not in every[host]:
                raise TopologyError(
                    f"found slot {slot!r} for host {host!r} in {text!r}, expected numbers "
                    f"0 to {len(every[host]) - 1}, written as {host}:0,1"
                )
            chosen.add(int(slot))
    return {host: sorted(chosen) if chosen else every[host] for host, chosen in named.items()}
