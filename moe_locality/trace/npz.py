"""The .npz form of a routing trace: one file, the arrays named in docs/formats.md."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.files import replace_file

if TYPE_CHECKING:
    from moe_locality.trace.schema import RoutingTrace

FORMAT_VERSION = 1

_ARRAYS: dict[str, tuple[str, ...]] = {
    "tokens": ("request_id", "position", "expert_ids", "expert_weights", "rank", "step"),
    "load": ("expert_load", "tokens", "rank", "step_id"),
}
"""Arrays with an entry per row that only one kind of trace has, or not every trace."""
_NEEDED = {"request_id", "position", "expert_ids", "expert_load"}
_FIELDS = {"tokens": "step_tokens", "step_id": "step"}
"""Field of a trace, where an array has another name."""

_ZIP_END = b"PK\x05\x06"
_MAX_ZIP_END_BYTES = 22 + 65_535  # the end record and the longest comment


def read_npz(path: str | PathLike[str], trace_class: type[RoutingTrace]) -> RoutingTrace:
    """Read a trace from an .npz file (``RoutingTrace.from_npz``); nothing in it is ever unpickled.
    TraceError where it is absent, damaged, of another layout, or breaks an invariant."""
    try:
        arrays = np.load(path, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("the file holds a single array, expected an .npz archive")
        with arrays:
            _check_directory(Path(path), arrays.zip)
            return trace_class(**_fields(arrays))
    except Exception as error:  # hostile bytes: whatever the parser meets becomes one message
        if isinstance(error, FileNotFoundError):
            raise TraceError(
                f"found no file {path}, expected a routing trace (.npz): check the path"
            ) from error
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TraceError(
            f"found that {path} cannot be read as a routing trace: {detail}; expected the .npz "
            "layout of docs/formats.md: restore or convert the file"
        ) from error


def _check_directory(path: Path, archive: zipfile.ZipFile | None) -> None:
    """Find damage that hides an optional array: its name and place have no checksum."""
    if archive is None:
        return
    for entry in archive.infolist():
        archive.open(entry).close()  # compares the two copies of the name
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - _MAX_ZIP_END_BYTES, 0))
        end = file.read()
    total = struct.unpack_from("<H", end, end.rfind(_ZIP_END) + 10)[0]
    if total not in (len(archive.infolist()), 0xFFFF):
        raise ValueError(f"found {len(archive.infolist())} arrays where the archive counts {total}")


def write_npz(trace: RoutingTrace, path: str | PathLike[str]) -> None:
    """Write a trace as one compressed .npz file (so must its name end), whole or not at all."""
    if Path(path).suffix != ".npz":
        raise TraceError(f"found {path}, expected a file name that ends in .npz")
    arrays: dict[str, Any] = {
        "format_version": np.int32(FORMAT_VERSION),
        "kind": trace.kind,
        "model": trace.model,
        "model_type": trace.model_type,
        "num_experts": np.int32(trace.num_experts),
        "top_k": np.int32(trace.top_k),
        "layer_ids": trace.layer_ids,
        "domain": np.array(trace.domain, dtype=str),
        "domain_group": np.array(trace.groups, dtype=str),
        "domain_id": trace.domain_id,
        "phase": trace.stage,
    }
    for name in _ARRAYS[trace.kind]:
        if (value := getattr(trace, _FIELDS.get(name, name))) is not None:
            arrays[name] = value
    if trace.kind == "tokens" and trace.num_experts <= 255:
        # 255 is no expert here: it stands for "no pick", as in the Parquet shards
        arrays["expert_ids"] = arrays["expert_ids"].astype(np.uint8)
    try:
        replace_file(path, lambda file: np.savez_compressed(file, **arrays))
    except OSError as error:
        raise TraceError(
            f"found that {path} cannot be written ({error.strerror or error}), expected a writable "
            "place: give another path"
        ) from error


def _fields(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    def needed(name: str) -> np.ndarray:
        if name not in arrays:
            raise ValueError(f"array {name!r} is missing")
        return arrays[name]

    version = int(_scalar(needed("format_version"), "iu"))
    if version != FORMAT_VERSION:
        raise ValueError(f"found format_version {version}, expected {FORMAT_VERSION}")
    kind = str(_scalar(needed("kind"), "U"))
    if kind not in _ARRAYS:
        raise ValueError(f"found kind {kind!r}, expected 'tokens' or 'load'")
    num_experts, top_k = (int(_scalar(needed(name), "iu")) for name in ("num_experts", "top_k"))
    fields: dict[str, Any] = {
        "model": str(_scalar(needed("model"), "U")),
        "model_type": str(_scalar(arrays.get("model_type", np.array("")), "U")),
        "num_experts": num_experts,
        "layer_ids": needed("layer_ids"),
        "domain": _names(arrays.get("domain")),
        "domain_group": _names(arrays.get("domain_group")),
        "domain_id": arrays.get("domain_id"),
        "stage": needed("phase"),
    }
    for name in _ARRAYS[kind]:
        if name in arrays or name in _NEEDED:
            fields[_FIELDS.get(name, name)] = needed(name)
    if kind == "load":
        return {**fields, "load_top_k": top_k}
    ids = fields["expert_ids"] = _signed(fields["expert_ids"], num_experts)
    if ids.ndim == 3 and ids.shape[2] != top_k:
        raise ValueError(f"found {ids.shape[2]} picks per token, expected top_k = {top_k}")
    return fields


def _scalar(array: np.ndarray, kinds: str) -> Any:
    if array.shape != () or array.dtype.kind not in kinds:
        raise ValueError(
            f"found a {array.dtype} of shape {array.shape} where one value is expected"
        )
    return array[()]


def _names(array: np.ndarray | None) -> tuple[str, ...]:
    if array is None or array.size == 0:
        return ()
    if array.ndim != 1 or array.dtype.kind != "U":
        raise ValueError(
            f"found domain names as {array.dtype} of shape {array.shape}, expected a list of text"
        )
    return tuple(array.tolist())


def _signed(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """Unsigned ids: the largest value of the type, where it is no expert, means "no pick"."""
    if ids.dtype.kind != "u":
        return ids
    none = np.iinfo(ids.dtype).max
    if num_experts > none or not (ids == none).any():
        return ids
    if ids.max(initial=0, where=ids != none) > 32_767:
        raise ValueError("found expert ids above 32767")
    signed = ids.astype(np.int16)
    signed[ids == none] = -1
    return signed
