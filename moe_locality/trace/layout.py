"""The inside of a shard: Arrow columns and metadata of a routing trace (docs/formats.md)."""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moe_locality.trace.schema import RoutingTrace

FORMAT_VERSION = 1
META_KEY = b"moe_locality.trace"
CRC_KEY = b"moe_locality.trace.crc32"

SCALARS = {
    "request_id": pa.int64(),
    "position": pa.int32(),
    "stage": pa.uint8(),
    "domain_id": pa.int32(),
    "rank": pa.int32(),
    "step": pa.int64(),
    "step_tokens": pa.int64(),
}
"""Columns with one number per row, and their types."""

_NEEDED = {
    "tokens": ("request_id", "position", "stage", "domain_id"),
    "load": ("stage", "domain_id"),
}
_LAYER_COLUMNS = {"tokens": "expert_ids", "load": "expert_load"}
_WEIGHTS = "expert_weights"


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

    def to_json(self) -> bytes:
        """UTF-8 JSON with sorted keys and the format version."""
        content: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        return json.dumps({"format_version": FORMAT_VERSION, **content}, sort_keys=True).encode()

    @classmethod
    def from_json(cls, text: bytes) -> ShardMeta:
        """Parse; raises ValueError, KeyError or TypeError for anything malformed."""
        content = json.loads(text)
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(
                f"found format_version {version!r}, expected {FORMAT_VERSION}: read it with the "
                "version of moe_locality that wrote it"
            )
        rank = content["rank"]
        return cls(
            kind=str(content["kind"]),
            model=str(content["model"]),
            num_experts=int(content["num_experts"]),
            top_k=int(content["top_k"]),
            layer_ids=tuple(int(i) for i in content["layer_ids"]),
            domain=tuple(str(name) for name in content["domain"]),
            domain_group=tuple(str(name) for name in content["domain_group"]),
            rank=None if rank is None else int(rank),
            columns=tuple(str(name) for name in content["columns"]),
        )


def id_dtype(num_experts: int) -> np.dtype:
    """Stored type of an expert id: the largest value means "no pick"."""
    return np.dtype("u1") if num_experts <= 255 else np.dtype("<u2")


def to_table(trace: RoutingTrace, rank: int | None) -> pa.Table:
    """Arrow table of a trace, metadata included."""
    arrays: dict[str, pa.Array] = {
        name: pa.array(value, type=kind)
        for name, kind in SCALARS.items()
        if (value := getattr(trace, name)) is not None
    }
    if trace.expert_ids is not None:
        blocks = [("expert_ids", trace.expert_ids, id_dtype(trace.num_experts))]
        if trace.expert_weights is not None:
            blocks.append((_WEIGHTS, trace.expert_weights, np.dtype("<f2")))
    else:
        blocks = [("expert_load", np.asarray(trace.expert_load), np.dtype("<i8"))]
    for prefix, block, dtype in blocks:
        for column, layer in enumerate(trace.layer_ids):
            content = np.ascontiguousarray(block[:, column].astype(dtype, copy=False))
            width = pa.binary(block.shape[2] * dtype.itemsize)
            arrays[f"{prefix}_{layer}"] = pa.FixedSizeBinaryArray.from_buffers(
                width, len(content), [None, pa.py_buffer(content)]
            )
    meta = ShardMeta(
        kind=trace.kind,
        model=trace.model,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        layer_ids=tuple(int(i) for i in trace.layer_ids),
        domain=trace.domain,
        domain_group=trace.domain_group,
        rank=rank,
        columns=tuple(arrays),
    )
    text = meta.to_json()
    schema = pa.schema(
        [pa.field(name, array.type, nullable=False) for name, array in arrays.items()],
        metadata={META_KEY: text, CRC_KEY: f"{zlib.crc32(text):08x}".encode()},
    )
    return pa.Table.from_arrays(list(arrays.values()), schema=schema)


def from_file(path: Path, layers: Collection[int] | None) -> tuple[RoutingTrace, ShardMeta]:
    """Read a trace, or some of its layers, from a file; whatever is wrong raises some exception."""
    file = pq.ParquetFile(path, page_checksum_verification=True)
    meta = _metadata(file.schema_arrow)
    if sorted(file.schema_arrow.names) != sorted(meta.columns):
        odd = sorted(set(file.schema_arrow.names) ^ set(meta.columns))
        raise ValueError(f"the columns differ from those in the metadata: {odd[:3]}")
    present = set(meta.columns)
    scalars = [name for name in SCALARS if name in present]
    absent = [name for name in _NEEDED[meta.kind] if name not in present]
    if absent:
        raise ValueError(f"column {absent[0]!r} is missing")
    chosen = [i for i in meta.layer_ids if layers is None or i in layers]
    prefixes = [_LAYER_COLUMNS[meta.kind]]
    if any(name.startswith(_WEIGHTS) for name in present):
        prefixes.append(_WEIGHTS)
    names = [f"{prefix}_{layer}" for prefix in prefixes for layer in chosen]
    table = file.read(columns=[*scalars, *names])
    arrays = {name: _scalar(table, name) for name in scalars}
    if meta.rank is not None and "rank" not in arrays:
        arrays["rank"] = np.full(table.num_rows, meta.rank, np.int32)
    for prefix in prefixes:
        arrays[prefix] = _layers(table, prefix, chosen, meta)
    trace = RoutingTrace(
        model=meta.model,
        num_experts=meta.num_experts,
        layer_ids=np.array(chosen, np.int32),
        domain=meta.domain,
        domain_group=meta.domain_group,
        load_top_k=meta.top_k if meta.kind == "load" else 0,
        **arrays,
    )
    return trace, meta


def _metadata(schema: pa.Schema) -> ShardMeta:
    keys = schema.metadata or {}
    if META_KEY not in keys:
        raise ValueError(f"the metadata key {META_KEY.decode()!r} is missing")
    text = keys[META_KEY]
    if keys.get(CRC_KEY, b"").decode() != f"{zlib.crc32(text):08x}":
        raise ValueError("the checksum of the metadata does not fit")
    meta = ShardMeta.from_json(text)
    if meta.kind not in _LAYER_COLUMNS:
        raise ValueError(f"found kind {meta.kind!r}, expected 'tokens' or 'load'")
    return meta


def _scalar(table: pa.Table, name: str) -> np.ndarray:
    column = table.column(name)
    if column.type != SCALARS[name] or column.null_count:
        raise ValueError(
            f"column {name!r} has type {column.type} and {column.null_count} nulls, expected "
            f"{SCALARS[name]} without"
        )
    return column.to_numpy()


def _layers(table: pa.Table, prefix: str, layers: Sequence[int], meta: ShardMeta) -> np.ndarray:
    """Collect the binary columns of all layers into one array [rows, L, width]."""
    stored, dtype, width = {
        "expert_ids": (id_dtype(meta.num_experts), np.dtype(np.int16), meta.top_k),
        "expert_weights": (np.dtype("<f2"), np.dtype(np.float16), meta.top_k),
        "expert_load": (np.dtype("<i8"), np.dtype(np.int64), meta.num_experts),
    }[prefix]
    result = np.empty((table.num_rows, len(layers), width), dtype)
    for place, layer in enumerate(layers):
        column = table.column(f"{prefix}_{layer}")
        if column.type != pa.binary(width * stored.itemsize) or column.null_count:
            raise ValueError(
                f"column '{prefix}_{layer}' has type {column.type} and {column.null_count} nulls, "
                f"expected fixed_size_binary[{width * stored.itemsize}] without"
            )
        start = 0
        for chunk in column.chunks:
            stop = start + len(chunk)
            content = np.frombuffer(chunk.buffers()[1] or b"", stored)[chunk.offset * width :]
            result[start:stop, place] = content[: len(chunk) * width].reshape(-1, width)
            start = stop
    if prefix == "expert_ids" and stored.itemsize == 1:
        result[result == 255] = -1  # a stored 0xFFFF is -1 as int16 already
    return result
