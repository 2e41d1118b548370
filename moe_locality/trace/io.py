"""Reading and writing routing traces: a directory of Parquet shards, whole or piece by piece (for
sums over traces that are larger than memory), or one .npz file.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from os import PathLike
from pathlib import Path

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace import parquet
from moe_locality.trace.merge import OPTIONAL, SETTINGS, Findings, merge, settings
from moe_locality.trace.npz import write_npz
from moe_locality.trace.parquet import ShardWriter, read_shard
from moe_locality.trace.schema import RoutingTrace

Progress = Callable[[int, int, str], None]


__all__ = ["ShardWriter", "read_trace", "read_trace_report", "write_trace"]

_log = logging.getLogger(__name__)
_SHARD_TOKENS = 1_048_576
_READINGS = 5
"""How often a reading is begun again because another program replaced the trace meanwhile."""


def read_trace(
    path: str | PathLike[str], *, strict: bool = True, layers: Collection[int] | None = None
) -> RoutingTrace:
    """Read a trace directory or an .npz file.

    Args:
        strict: False: damaged shards and shards of another model are left out, and tokens that a
            pipeline stage lacks get -1; a warning is logged for each. ``read_trace_report`` also
            returns these.
        layers: transformer layer indices to read; other layers are not read from disk. None: all.

    Raises:
        TraceError: nothing readable is there, or (strict) a shard (named) is damaged or unfit.
    """
    trace, problems = read_trace_report(path, strict=strict, layers=layers)
    for problem in problems:
        _log.warning("%s: %s", path, problem)
    return trace


def read_trace_report(
    path: str | PathLike[str], *, strict: bool = False, layers: Collection[int] | None = None
) -> tuple[RoutingTrace, list[str]]:
    """Read like ``read_trace``; return also what was left out or repaired, in sentences."""
    place = Path(path)
    if place.suffix == ".npz" and not place.is_dir():
        return RoutingTrace.from_npz(place).filter(layers=layers), []
    for _ in range(_READINGS):
        findings = Findings(strict)
        files = _existing_shards(place, findings)
        try:
            found = _read_shards(place, files, findings, layers)
        except TraceError:
            if not parquet.replaced_since(files):
                raise
            continue
        if not parquet.replaced_since(files):
            return found, findings
    raise TraceError(
        f"found that the trace in {place} was replaced {_READINGS} times while it was being read, "
        "expected it to stay: read it when the program that writes it is done"
    )


def _read_shards(
    place: Path, shards: Collection[Path], findings: Findings, layers: Collection[int] | None
) -> RoutingTrace:
    parts: dict[Path, RoutingTrace] = {}
    for shard in shards:
        try:
            parts[shard] = read_shard(shard, layers)[0]
        except TraceError as error:
            findings.add(str(error))
    if not parts:
        raise TraceError(
            f"found no readable shard among {len(shards)} in {place}: {findings[-1]}; restore the "
            "files"
        )
    parts = _fitting(parts, findings)
    if layers is not None:
        parts = {shard: part for shard, part in parts.items() if part.num_layers} or parts
    try:
        trace, notes = merge(_even(parts, findings), strict=findings.strict)
    except TraceError as error:
        raise TraceError(f"{place}: {error}") from error
    findings += notes
    return trace.filter(layers=layers)


def write_trace(
    trace: RoutingTrace,
    path: str | PathLike[str],
    *,
    overwrite: bool = False,
    shard_tokens: int = _SHARD_TOKENS,
) -> None:
    """Write a trace as a directory of shards, or as one file when the path ends in .npz.

    A directory that already holds the same content is left as it is.

    Args:
        overwrite: replace a trace of other content. Wherever that is interrupted, and whoever reads
            meanwhile, the old trace or the new one is found, never a mix.
        shard_tokens: rows per shard.

    Raises:
        TraceError: another trace is there and ``overwrite`` is False, or it cannot be written.
    """
    place = Path(path)
    if place.suffix == ".npz" and not place.is_dir():
        kept = place.exists() and not overwrite
        if kept and not RoutingTrace.from_npz(place).same_content(trace):
            raise _occupied(place)
        write_npz(trace, place)
        return
    if shard_tokens < 1:
        raise TraceError(f"found shard_tokens {shard_tokens}, expected at least 1")
    directory = parquet.make_directory(place)
    if not overwrite and parquet.shard_files(directory):
        with contextlib.suppress(TraceError):  # what cannot be read is another trace
            if read_trace_report(directory, strict=True)[0].same_content(trace):
                return
        raise _occupied(directory)
    starts = range(0, max(trace.num_rows, 1), shard_tokens)
    rows = (np.arange(start, min(start + shard_tokens, trace.num_rows)) for start in starts)
    parquet.replace_shards(directory, (trace.take(r) if len(starts) > 1 else trace for r in rows))


def _occupied(place: Path) -> TraceError:
    return TraceError(
        f"found another trace in {place}, expected an empty place or the same content: give "
        "another path, or pass overwrite=True to replace it"
    )


def _existing_shards(place: Path, findings: Findings) -> dict[Path, tuple[int, ...]]:
    """Return the shards of a directory, or the one file named; note what is strange in them."""
    if not place.exists():
        raise TraceError(
            f"found nothing at {place}, expected a trace (a directory of part-*.parquet shards, or "
            "an .npz file): check the path"
        )
    if not place.is_dir():
        if place.suffix == ".parquet":
            return {place: parquet.file_identity(place)}
        raise TraceError(
            f"found a file {place}, expected a directory of shards or a name that ends in .npz: "
            "convert other formats with `moe-locality import`"
        )
    try:
        shards = parquet.shard_files(place)
        names = [path.name for path in sorted(place.glob("*.parquet"))]
    except OSError as error:
        raise TraceError(
            f"found that {place} cannot be listed ({error.strerror}), expected a readable "
            "directory: change its permissions"
        ) from error
    if not shards:
        raise TraceError(
            f"found no part-*.parquet shard in {place}, expected at least one: record a run into "
            "it, or check that the recorder was closed"
        )
    findings += [
        f"found no shard {name}, though a later one of this rank is there: its rows are missing"
        for name in parquet.missing_sequences(shards)
    ]
    findings += [
        f"found {name}, expected names like part-00000-00000.parquet: it was not read"
        for name in names
        if not parquet.is_shard(name) and not name.startswith(parquet.TMP_PREFIX)
    ]
    return shards


def _fitting(parts: dict[Path, RoutingTrace], findings: Findings) -> dict[Path, RoutingTrace]:
    """Keep the shards of the model that most rows belong to."""
    rows: Counter[tuple[str, str, int, int]] = Counter()
    for part in parts.values():
        rows[settings(part)] += max(part.num_rows, 1)
    expected = rows.most_common(1)[0][0]
    fitting = {}
    for shard, part in parts.items():
        if settings(part) == expected:
            fitting[shard] = part
            continue
        differing = ", ".join(
            f"{word} {found!r} (expected {want!r})"
            for word, found, want in zip(SETTINGS, settings(part), expected, strict=True)
            if found != want
        )
        findings.add(
            f"found that shard {shard} does not fit the others: {differing}: a directory holds one "
            "trace; move the shard away, or read with strict=False to leave it out"
        )
    return fitting


def _even(parts: dict[Path, RoutingTrace], findings: Findings) -> list[RoutingTrace]:
    """Make sure optional fields are in all shards or in none."""
    traces = list(parts.values())
    for field in OPTIONAL:
        lacking = [shard for shard, part in parts.items() if getattr(part, field) is None]
        if 0 < len(lacking) < len(parts):
            findings.add(
                f"found no {field} in shard {lacking[0]}, though other shards have it",
                ", expected it in all or in none: record with the same options, or read with "
                "strict=False to drop it everywhere",
                ": dropped it everywhere",
            )
            traces = [part.evolve(**{field: None}) for part in traces]
    return traces


def read_pieces(
    path: str | PathLike[str], *, max_bytes: int, progress: Progress | None = None
) -> Iterator[RoutingTrace]:
    """Yield a trace directory as traces of some rows and some layers each.

    Every (row, layer) is in exactly one piece. Repeated tokens and tokens that a pipeline stage
    lacks are not looked for, as ``read_trace`` does: that needs all rows at once.

    Args:
        max_bytes: about what the per-layer columns of a piece may take, as read and as decoded; a
            piece has at least one layer of one shard.
        progress: called with (pieces done, pieces in all, name of the shard).

    Raises:
        TraceError: nothing is there, or a shard is damaged, missing, or does not fit the first.
    """
    place = Path(path)
    if place.suffix == ".npz" and not place.is_dir():
        yield RoutingTrace.from_npz(place)
        return
    files = _existing_shards(place, Findings(strict=True))
    if missing := parquet.missing_sequences(files):
        raise TraceError(
            f"found no shard {missing[0]} in {place}, though a later one of this rank is there: "
            "restore it, or read what is left with read_trace(strict=False)"
        )
    work = _plan_pieces([*files], max_bytes)
    for done, (shard, layers) in enumerate(work):
        if progress is not None:
            progress(done, len(work), shard.name)
        piece = read_shard(shard, layers)[0]
        if parquet.replaced_since({shard: files[shard]}):
            raise TraceError(
                f"found that shard {shard} was replaced while the trace was being read, expected "
                "it to stay: read it when the program that writes it is done"
            )
        yield piece
    if progress is not None:
        progress(len(work), len(work), "")


def _plan_pieces(shards: list[Path], max_bytes: int) -> list[tuple[Path, tuple[int, ...]]]:
    """(shard, layers) of each piece; the shards are checked against each other on the way."""
    work: list[tuple[Path, tuple[int, ...]]] = []
    first: tuple[tuple, int] | None = None
    layer_sets: set[frozenset[int]] = set()
    for shard in shards:
        head, meta = read_shard(shard, ())
        found = settings(head)[:3], head.top_k
        first = first or found
        if found != first:
            raise TraceError(
                f"found that shard {shard} does not fit {shards[0].name}: {found[0]}, "
                f"expected {first[0]} (model, kind, experts) and the same top_k: a "
                "directory holds one trace; move the shard away"
            )
        ids, own = meta.layer_ids, frozenset(meta.layer_ids)
        if any(own != other and own & other for other in layer_sets):
            raise TraceError(
                f"found that shard {shard} has layers {sorted(own)}, expected those of another "
                "shard or none of them: move the shard away"
            )
        layer_sets.add(own)
        width = 2 * head.top_k if head.kind == "tokens" else 8 * head.num_experts
        width *= 1 if head.expert_weights is None else 2
        step = max(max_bytes // max(2 * width * head.num_rows, 1), 1)
        work += [(shard, ids[start : start + step]) for start in range(0, len(ids), step)]
    return work
