"""One shard of a trace directory: a Parquet file with one row per token and one binary column per
layer.

The layout is described in docs/formats.md. A shard is complete or absent: it is written under a
temporary name and takes its own name only when every byte is on disk. So is a trace of several
shards that ``replace_shards`` writes: a manifest, put in place by one rename, says from that moment
on which shards count; when all have their names it is removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from moe_locality.errors import TraceError
from moe_locality.files import replace_text
from moe_locality.trace.layout import SCALARS, ShardMeta, from_file, to_table
from moe_locality.trace.schema import RoutingTrace

TMP_PREFIX = ".tmp-"
MANIFEST = ".manifest.json"
"""There only while a trace is being put in the place of another, or after that was interrupted."""

_NAME = re.compile(r"part-(\d{5,})-(\d{5,})\.parquet")
_WEIGHTS = "expert_weights"


class ShardWriter:
    """Appends shards of one rank to a trace directory, each of them atomically.

    Sequence numbers go on after the shards of this rank that are already there; nothing is ever
    overwritten.

    Args:
        directory: made if absent.
        rank: number in the file name, and the ``rank`` of every row that does not bring its own;
            None: rows have no rank, the file name says 0.
        domain, domain_group: names known so far; ``write`` can bring a longer table.
        weights: whether every shard has ``expert_weights``.

    Raises:
        TraceError: the directory cannot be made or written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        rank: int | None = 0,
        model: str,
        num_experts: int,
        top_k: int,
        layer_ids: Sequence[int] | np.ndarray,
        domain: Sequence[str] = (),
        domain_group: Sequence[str] = (),
        weights: bool = False,
    ) -> None:
        self.directory = make_directory(directory)
        self.rank = rank
        self.model = model
        self.num_experts = num_experts
        self.top_k = top_k
        self.layer_ids = np.asarray(layer_ids, np.int32)
        self.domain = tuple(domain)
        self.domain_group = tuple(domain_group)
        self.weights = weights
        self.sequence = next_sequence(self.directory, rank or 0)

    def write(
        self,
        columns: Mapping[str, np.ndarray],
        *,
        domain: Sequence[str] | None = None,
        domain_group: Sequence[str] | None = None,
    ) -> Path:
        """Write one shard and return its path.

        Args:
            columns: ``expert_ids [T, L, K]`` (any integer type, -1 = no pick), ``request_id``,
                ``position``, and optionally ``stage``, ``domain_id``, ``rank``, ``step``,
                ``expert_weights``.
            domain, domain_group: the table as it is known now; it must begin with the one known
                before.

        Raises:
            TraceError: the columns break an invariant of RoutingTrace, or the disk refuses.
        """
        if domain is not None:
            self._grow(tuple(domain), tuple(domain_group or ()))
        if (columns.get(_WEIGHTS) is not None) != self.weights:
            raise TraceError(
                f"found {'no ' if self.weights else ''}expert_weights, expected the opposite: this "
                f"writer was made with weights={self.weights}, and a trace has them everywhere or "
                "nowhere"
            )
        trace = RoutingTrace(
            model=self.model,
            num_experts=self.num_experts,
            layer_ids=self.layer_ids,
            domain=self.domain,
            domain_group=self.domain_group,
            **columns,  # type: ignore[arg-type]
        )
        if trace.kind == "tokens" and trace.top_k != self.top_k:
            raise TraceError(
                f"found {trace.top_k} picks per token, expected top_k = {self.top_k} of this "
                "writer: pad missing picks with -1"
            )
        path, self.sequence = write_shard(trace, self.directory, self.rank, self.sequence)
        return path

    def _grow(self, domain: tuple[str, ...], domain_group: tuple[str, ...]) -> None:
        if domain[: len(self.domain)] != self.domain:
            raise TraceError(
                f"found a domain table that begins {domain[: len(self.domain)]}, expected it to "
                f"begin with {self.domain}: append new names, ids that are written must keep their "
                "meaning"
            )
        self.domain, self.domain_group = domain, domain_group


def make_directory(directory: str | os.PathLike[str]) -> Path:
    """Return the directory, made if absent and checked for write access; a replacement of its trace
    that was interrupted is brought to its end."""
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TraceError(
            f"found that the trace directory {path} cannot be made ({error.strerror}), expected a "
            "directory: give another path, or make it writable"
        ) from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise TraceError(
            f"found no permission to write to {path}, expected a writable directory: change its "
            "permissions (chmod u+wx) or give another path"
        )
    try:
        _finish(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def _unwritable(directory: Path, error: OSError) -> TraceError:
    return TraceError(
        f"found that the trace in {directory} cannot be written or replaced "
        f"({error.strerror or error}), expected a writable directory with free space: free space, "
        "change its permissions, or give another path"
    )


def shard_paths(directory: Path) -> list[Path]:
    """Shards of a directory in the order of rank and sequence; other files are not looked at."""
    return list(shard_files(directory))


def shard_files(directory: Path) -> dict[Path, tuple[int, ...]]:
    """The same, each with what tells its file from a later one of that name."""
    found = _shard_files(directory)
    while found != (again := _shard_files(directory)):  # listed while a trace was being replaced
        found = again
    return found


def _shard_files(directory: Path) -> dict[Path, tuple[int, ...]]:
    manifest = _manifest(directory)
    named = {path.name: path for path in directory.iterdir() if is_shard(path.name)}
    if manifest is not None:
        staging = directory / manifest["staging"]
        for name in _replaced(directory, manifest):
            named.pop(name, None)
        for name in manifest["shards"]:
            named[name] = staging / name if (staging / name).exists() else directory / name
    numbers = {name: tuple(map(int, _NAME.fullmatch(name).groups())) for name in named}  # type: ignore[union-attr]
    return {
        named[name]: file_identity(named[name]) for name in sorted(named, key=numbers.__getitem__)
    }


def file_identity(path: Path) -> tuple[int, ...]:
    """What tells a file from a later one of its name; empty where none is."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def replaced_since(files: Mapping[Path, tuple[int, ...]]) -> list[Path]:
    """Those of ``shard_files`` that are gone or have another file under their name now."""
    return [path for path, identity in files.items() if file_identity(path) != identity]


def is_shard(name: str) -> bool:
    """Whether a file has the name of a shard."""
    return _NAME.fullmatch(name) is not None


def missing_sequences(paths: Sequence[Path]) -> list[str]:
    """Names of shards that must once have been there: sequence numbers of a rank have no holes."""
    numbers: dict[int, set[int]] = {}
    for path in paths:
        if match := _NAME.fullmatch(path.name):
            numbers.setdefault(int(match[1]), set()).add(int(match[2]))
    return [
        shard_name(rank, sequence)
        for rank, present in sorted(numbers.items())
        for sequence in range(max(present))
        if sequence not in present
    ]


def shard_name(rank: int, sequence: int) -> str:
    """File name of a shard."""
    return f"part-{rank:05d}-{sequence:05d}.parquet"


def next_sequence(directory: Path, rank: int) -> int:
    """The first sequence number of ``rank`` after all that are in the directory."""
    matches = [_NAME.fullmatch(path.name) for path in directory.iterdir()]
    return max((int(m[2]) + 1 for m in matches if m and int(m[1]) == rank), default=0)


def write_shard(
    trace: RoutingTrace, directory: Path, rank: int | None, sequence: int
) -> tuple[Path, int]:
    """Write a trace as one shard; return its path and the sequence number that follows it."""
    temporary = directory / f"{TMP_PREFIX}{uuid.uuid4().hex}.parquet"
    try:
        with open(temporary, "xb") as file:
            pq.write_table(
                to_table(trace, rank),
                file,
                compression="zstd",
                use_dictionary=False,
                write_statistics=[  # pyright: ignore[reportArgumentType]  a list is documented
                    name for name in SCALARS if getattr(trace, name) is not None
                ],
                write_page_checksum=True,
            )
            file.flush()
            os.fsync(file.fileno())
        while True:
            path = directory / shard_name(rank or 0, sequence)
            sequence += 1
            if _publish(temporary, path):
                break
        sync_directory(directory)
    except OSError as error:
        raise TraceError(
            f"found that a shard cannot be written to {directory} ({error.strerror or error}), "
            "expected a writable directory with free space: free space, or give another path"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path, sequence


def _publish(temporary: Path, path: Path) -> bool:
    """Give the finished file its name unless the name is taken (a link fails there, a rename would
    overwrite).
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # no hard links on this file system
        if path.exists():
            return False
        os.rename(temporary, path)
    return True


def replace_shards(directory: Path, parts: Iterable[RoutingTrace]) -> None:
    """Write a trace, one shard per part, in the place of all shards that are in a directory.

    Whoever reads finds the old trace or the new one, whole, wherever the writing stops: the new
    shards are written aside; the manifest that names them is put there by one rename; then they
    take their names. The next ``make_directory`` ends what was interrupted after that rename.

    Raises:
        TraceError: the disk refuses. Whatever ``parts`` raises goes through.
    """
    staging = directory / f"{TMP_PREFIX}{uuid.uuid4().hex}"
    try:
        staging.mkdir()
        shards = [write_shard(part, staging, None, n)[0].name for n, part in enumerate(parts)]
        manifest = {
            "format_version": 1,
            "staging": staging.name,
            "shards": shards,
            "replaced": {p.name: identity for p, identity in shard_files(directory).items()},
        }
        sync_directory(directory)
        replace_text(directory / MANIFEST, json.dumps(manifest))
        sync_directory(directory)
        _finish(directory)
    except OSError as error:
        raise _unwritable(directory, error) from error
    finally:
        if (_manifest(directory) or {}).get("staging") != staging.name:
            shutil.rmtree(staging, ignore_errors=True)


def _finish(directory: Path) -> None:
    """Do what the manifest says, and remove it."""
    manifest = _manifest(directory)
    if manifest is None:
        return
    staging = directory / manifest["staging"]
    for name in manifest["shards"]:
        with contextlib.suppress(FileNotFoundError):  # it has its name already
            os.replace(staging / name, directory / name)
    for name in _replaced(directory, manifest) - set(manifest["shards"]):
        (directory / name).unlink(missing_ok=True)
    sync_directory(directory)
    (directory / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(staging, ignore_errors=True)


def _replaced(directory: Path, manifest: dict[str, Any]) -> set[str]:
    """Names that still stand for the old trace; another rank may have recorded under one since."""
    items = manifest["replaced"].items()
    return {name for name, old in items if file_identity(directory / name) == tuple(old)}


def _manifest(directory: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((directory / MANIFEST).read_bytes())
        names = [*content["shards"], *dict(content["replaced"])]
        if not all(map(is_shard, names)) or not re.fullmatch(r"\.tmp-\w+", content["staging"]):
            raise ValueError("names that are none of shards")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise TraceError(
            f"found a damaged {directory / MANIFEST} ({error!r}), expected the names of the shards "
            "that count: restore it, or write the trace again to another directory"
        ) from error
    return content


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_shard(path: Path, layers: Collection[int] | None = None) -> tuple[RoutingTrace, ShardMeta]:
    """Read one shard, or only some of its layers.

    Raises:
        TraceError: it is damaged, truncated or no shard at all; the message names the file.
    """
    try:
        return from_file(path, layers)
    except Exception as error:  # hostile bytes: whatever the parser meets becomes one message
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, KeyError):
            detail = f"the key {detail} of the metadata is missing"
        raise TraceError(
            f"found a damaged or foreign shard {path}: {detail}; expected a Parquet shard written "
            "by moe_locality: restore the file, remove it, or read with strict=False to leave it "
            "out"
        ) from error
