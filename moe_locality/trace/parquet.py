"""The shards of a trace directory (docs/formats.md): a Parquet file with one row per token and one
binary column per layer, and the settings of the trace in its metadata.

A shard is complete or absent: it is written under a temporary name and takes its own name only when
every byte is on disk. So is a trace of several shards: see ``replace_shards``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_locality.errors import TraceError
from moe_locality.files import replace_text
from moe_locality.trace.merge import LAYER_FIELDS, SCALARS, present
from moe_locality.trace.schema import RoutingTrace

FORMAT_VERSION = 1
META_KEY = b"moe_locality.trace"
CRC_KEY = b"moe_locality.trace.crc32"

_NEEDED = {
    "tokens": ("request_id", "position", "stage", "domain_id"),
    "load": ("stage", "domain_id"),
}
_LAYER_COLUMNS = {"tokens": "expert_ids", "load": "expert_load"}
_WEIGHTS = "expert_weights"
_SHARED = ("model", "model_type", "num_experts", "domain", "domain_group")
"""Fields that a trace and the metadata of its shards have under one name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardMeta:
    """What the key-value metadata of a shard says about its rows."""

    kind: str
    model: str
    num_experts: int
    top_k: int
    layer_ids: tuple[int, ...]
    domain: tuple[str, ...]
    domain_group: tuple[str, ...]
    rank: int | None
    columns: tuple[str, ...]
    """Names of all columns: a damaged name must not hide an optional one."""
    model_type: str = ""


def _stored(num_experts: int) -> dict[str, np.dtype]:
    """Type in a file of each per-layer field; the largest expert id means "no pick"."""
    return {
        "expert_ids": np.dtype("u1" if num_experts <= 255 else "<u2"),
        _WEIGHTS: np.dtype("<f2"),
        "expert_load": np.dtype("<i8"),
    }


def to_table(trace: RoutingTrace, rank: int | None) -> pa.Table:
    """Arrow table of a trace, metadata included."""
    scalars = present(trace, SCALARS).items()
    arrays: dict[str, pa.Array] = {name: pa.array(value) for name, value in scalars}
    stored = _stored(trace.num_experts)
    for prefix, block in present(trace, LAYER_FIELDS).items():
        width = pa.binary(block.shape[2] * stored[prefix].itemsize)
        for column, layer in enumerate(trace.layer_ids):
            content = np.ascontiguousarray(block[:, column].astype(stored[prefix], copy=False))
            arrays[f"{prefix}_{layer}"] = pa.FixedSizeBinaryArray.from_buffers(
                width, len(content), [None, pa.py_buffer(content)]
            )
    content = {name: getattr(trace, name) for name in ("kind", "top_k", *_SHARED)}
    content |= {"layer_ids": trace.layer_ids.tolist(), "rank": rank, "columns": [*arrays]}
    text = json.dumps({"format_version": FORMAT_VERSION, **content}, sort_keys=True).encode()
    schema = pa.schema(
        [pa.field(name, array.type, nullable=False) for name, array in arrays.items()],
        metadata={META_KEY: text, CRC_KEY: f"{zlib.crc32(text):08x}".encode()},
    )
    return pa.Table.from_arrays(list(arrays.values()), schema=schema)


def _read(path: Path, layers: Collection[int] | None) -> tuple[RoutingTrace, ShardMeta]:
    """As ``read_shard``; whatever is wrong raises some exception."""
    file = pq.ParquetFile(path, page_checksum_verification=True)
    meta = _metadata(file.schema_arrow)
    if sorted(file.schema_arrow.names) != sorted(meta.columns):
        odd = sorted(set(file.schema_arrow.names) ^ set(meta.columns))
        raise ValueError(f"the columns differ from those in the metadata: {odd[:3]}")
    if absent := [name for name in _NEEDED[meta.kind] if name not in meta.columns]:
        raise ValueError(f"column {absent[0]!r} is missing")
    scalars = [name for name in SCALARS if name in meta.columns]
    chosen = [i for i in meta.layer_ids if layers is None or i in layers]
    prefixes = [_LAYER_COLUMNS[meta.kind]]
    if any(name.startswith(_WEIGHTS) for name in meta.columns):
        prefixes.append(_WEIGHTS)
    names = [f"{prefix}_{layer}" for prefix in prefixes for layer in chosen]
    table = file.read(columns=[*scalars, *names])
    arrays: dict[str, np.ndarray] = {}
    for name in scalars:
        arrays[name] = _column(table, name, pa.from_numpy_dtype(SCALARS[name])).to_numpy()
    if meta.rank is not None and "rank" not in arrays:
        arrays["rank"] = np.full(table.num_rows, meta.rank, np.int32)
    for prefix in prefixes:
        arrays[prefix] = _layers(table, prefix, chosen, meta)
    fields: dict[str, Any] = {name: getattr(meta, name) for name in _SHARED}
    fields["load_top_k"] = meta.top_k if meta.kind == "load" else 0
    fields |= {"layer_ids": np.array(chosen, np.int32), **arrays}
    return RoutingTrace(**fields), meta


def _metadata(schema: pa.Schema) -> ShardMeta:
    keys = schema.metadata or {}
    if META_KEY not in keys:
        raise ValueError(f"the metadata key {META_KEY.decode()!r} is missing")
    text = keys[META_KEY]
    if keys.get(CRC_KEY, b"").decode() != f"{zlib.crc32(text):08x}":
        raise ValueError("the checksum of the metadata does not fit")
    content = {"model_type": "", **json.loads(text)}
    version = content["format_version"]
    if version != FORMAT_VERSION:
        raise ValueError(
            f"found format_version {version!r}, expected {FORMAT_VERSION}: read it with the "
            "version of moe_locality that wrote it"
        )
    if content["kind"] not in _LAYER_COLUMNS:
        raise ValueError(f"found kind {content['kind']!r}, expected 'tokens' or 'load'")
    fields: dict[str, Any] = {name: content[name] for name in ShardMeta.__slots__}
    fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
    return ShardMeta(**fields)


def _column(table: pa.Table, name: str, expected: pa.DataType) -> pa.ChunkedArray:
    column = table.column(name)
    if column.type != expected or column.null_count:
        raise ValueError(
            f"column {name!r} has type {column.type} and {column.null_count} nulls, expected "
            f"{expected} without"
        )
    return column


def _layers(table: pa.Table, prefix: str, layers: Sequence[int], meta: ShardMeta) -> np.ndarray:
    """Collect the binary columns of all layers into one array [rows, L, width]."""
    stored = _stored(meta.num_experts)[prefix]
    width = meta.num_experts if prefix == "expert_load" else meta.top_k
    dtype = np.int16 if prefix == "expert_ids" else stored.newbyteorder("=")
    result = np.empty((table.num_rows, len(layers), width), dtype)
    for place, layer in enumerate(layers):
        column = _column(table, f"{prefix}_{layer}", pa.binary(width * stored.itemsize))
        start = 0
        for chunk in column.chunks:
            stop = start + len(chunk)
            content = np.frombuffer(chunk.buffers()[1] or b"", stored)[chunk.offset * width :]
            result[start:stop, place] = content[: len(chunk) * width].reshape(-1, width)
            start = stop
    if prefix == "expert_ids" and stored.itemsize == 1:
        result[result == 255] = -1  # a stored 0xFFFF is -1 as int16 already
    return result


TMP_PREFIX = ".tmp-"
MANIFEST = ".manifest.json"
"""There only while a trace is being put in the place of another, or after that was interrupted."""

_NAME = re.compile(r"part-(\d{5,})-(\d{5,})\.parquet")


@dataclass(kw_only=True, eq=False)
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

    directory: str | os.PathLike[str] = field(kw_only=False)
    rank: int | None = 0
    model: str
    num_experts: int
    top_k: int
    layer_ids: Sequence[int] | np.ndarray
    domain: Sequence[str] = ()
    domain_group: Sequence[str] = ()
    weights: bool = False
    model_type: str = ""

    def __post_init__(self) -> None:
        self.directory = make_directory(self.directory)
        self.domain, self.domain_group = tuple(self.domain), tuple(self.domain_group)
        self.sequence = next_sequence(self.directory, self.rank or 0)

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
            begin, known = tuple(domain[: len(self.domain)]), self.domain
            if begin != known:
                raise TraceError(
                    f"found a domain table that begins {begin}, expected it to begin with {known}: "
                    "append new names, ids that are written must keep their meaning"
                )
            self.domain, self.domain_group = tuple(domain), tuple(domain_group or ())
        if (columns.get(_WEIGHTS) is not None) != self.weights:
            raise TraceError(
                f"found {'no ' if self.weights else ''}expert_weights, expected the opposite: this "
                f"writer was made with weights={self.weights}, and a trace has them everywhere or "
                "nowhere"
            )
        trace = RoutingTrace(
            model=self.model,
            model_type=self.model_type,
            num_experts=self.num_experts,
            layer_ids=np.asarray(self.layer_ids, np.int32),
            domain=tuple(self.domain),
            domain_group=tuple(self.domain_group),
            **columns,  # type: ignore[arg-type]
        )
        if trace.kind == "tokens" and trace.top_k != self.top_k:
            raise TraceError(
                f"found {trace.top_k} picks per token, expected top_k = {self.top_k} of this "
                "writer: pad missing picks with -1"
            )
        directory = Path(self.directory)
        path, self.sequence = write_shard(trace, directory, self.rank, self.sequence)
        return path


def make_directory(directory: str | os.PathLike[str]) -> Path:
    """Return the directory, made if absent, writable; ends an interrupted replacement in it."""
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
        f"found that the trace cannot be written to {directory} ({error.strerror or error}), "
        "expected a writable directory with free space: free space, change its permissions, or "
        "give another path"
    )


def shard_files(directory: Path) -> dict[Path, tuple[int, ...]]:
    """Shards of a directory in the order of rank and sequence, each with its ``file_identity``."""
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
    ordered = sorted(named, key=lambda name: tuple(map(int, _NAME.fullmatch(name).groups())))  # type: ignore[union-attr]
    return {named[name]: file_identity(named[name]) for name in ordered}


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


def missing_sequences(paths: Iterable[Path]) -> list[str]:
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
    statistics: Any = [*present(trace, SCALARS)]  # a list is documented, the stubs want a bool
    try:
        with open(temporary, "xb") as file:
            pq.write_table(
                to_table(trace, rank),
                file,
                compression="zstd",
                use_dictionary=False,
                write_statistics=statistics,
                write_page_checksum=True,
            )
            file.flush()
            os.fsync(file.fileno())
        while True:
            path = directory / shard_name(rank or 0, sequence)
            sequence += 1
            try:
                os.link(temporary, path)  # a rename would overwrite a name that is taken
                break
            except FileExistsError:
                continue
            except OSError:  # no hard links on this file system
                if not path.exists():
                    os.rename(temporary, path)
                    break
        sync_directory(directory)
    except OSError as error:
        raise _unwritable(directory, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path, sequence


def replace_shards(directory: Path, parts: Iterable[RoutingTrace]) -> None:
    """Write a trace, one shard per part, in the place of all shards that are in a directory.

    Whoever reads finds the old trace or the new one, whole, wherever the writing stops: the new
    shards are written aside; a manifest, put there by one rename, says from that moment on which
    count; then they take their names, and it is removed. The next ``make_directory`` ends what was
    interrupted. TraceError where the disk refuses; whatever ``parts`` raises goes through."""
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
    """Read one shard, or some of its layers; a TraceError names the file where it is damaged."""
    try:
        return _read(path, layers)
    except Exception as error:  # hostile bytes: whatever the parser meets becomes one message
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, KeyError):
            detail = f"the key {detail} of the metadata is missing"
        raise TraceError(
            f"found a damaged or foreign shard {path}: {detail}; expected a Parquet shard written "
            "by moe_locality: restore the file, remove it, or read with strict=False to leave it "
            "out"
        ) from error
