"""Importers: routing records of other programs become a RoutingTrace.

The format is found from the content, not from the name; ``FORMATS`` lists what is known, each
described in docs/formats.md and in the module that reads it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace import generic, llamacpp, megatron, routed, sglang, tables
from moe_locality.trace.io import write_trace
from moe_locality.trace.merge import concat
from moe_locality.trace.npz import read_npz
from moe_locality.trace.reading import ImportOptions, Report, whole_json
from moe_locality.trace.schema import RoutingTrace
from moe_locality.trace.shards import make_directory, replace_shards, shard_paths

FORMATS = {
    "npz": "arrays of this package",
    "json": "generic JSON, one object or one per line",
    "csv": "generic CSV, a row per token and layer or per pick",
    "megatron": "Megatron-LM router_trace_rank*.jsonl, a file or the directory",
    "vllm": "vLLM routed experts: .npy, .npz, or responses in JSON",
    "sglang": "SGLang responses with routed_experts in JSON",
    "sglang-dump": "SGLang expert_distribution_recorder_*.pt, a file or the directory",
    "llamacpp": "llama.cpp moe-trace CSV",
}
"""Name of each format and what it is."""

_BY_SUFFIX = {
    ".npz": "npz",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".pt": "sglang-dump",
    ".npy": "vllm",
}


def import_trace(
    path: str | PathLike[str],
    *,
    format: str | None = None,
    model: str | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    report: Report | None = None,
) -> RoutingTrace:
    """Read a foreign trace into memory.

    Args:
        format: a name in ``FORMATS``; None: found from the content.
        model, num_experts, top_k: what the file does not say. Without ``num_experts`` there, the
            highest id seen plus one is taken, with a warning, for experts that were never picked
            leave no mark.
        report: called now and then with (bytes read, bytes in all).

    Raises:
        TraceError: the format is unknown, or the content does not fit it; the message names file
        and line.
    """
    options = ImportOptions(model=model, num_experts=num_experts, top_k=top_k, report=report)
    return concat(list(_parts(Path(path), format, options)))


def import_to(
    path: str | PathLike[str],
    out: str | PathLike[str],
    *,
    format: str | None = None,
    model: str | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    report: Report | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Import a foreign trace into a directory of shards (or an .npz file) without holding it whole.

    Returns what was imported as plain data: ``model``, ``kind``, ``tokens``, ``requests``,
    ``layers``, ``num_experts``, ``top_k``, ``domains``, ``parts``, and ``content_hash`` (None where
    there were several parts: it needs the whole trace).

    Line formats and sorted CSV take memory for one part of about two million picks at a time;
    arrays, dumps and single JSON objects are read whole. Nothing appears in ``out`` before the last
    part is written. The other arguments are those of ``import_trace``.

    Raises:
        TraceError: as ``import_trace``; or ``out`` holds another trace and ``overwrite`` is False.
    """
    options = ImportOptions(model=model, num_experts=num_experts, top_k=top_k, report=report)
    place = Path(out)
    parts = _parts(Path(path), format, options)
    single = place.suffix == ".npz" and not place.is_dir()
    if single or (place.is_dir() and shard_paths(place) and not overwrite):
        trace = concat(list(parts))
        write_trace(trace, place, overwrite=overwrite)
        return _Summary().add(trace).to_dict()
    summary = _Summary()
    replace_shards(make_directory(place), (summary.add(part).last for part in parts))
    return summary.to_dict()


class _Summary:
    """What the parts of an import are together."""

    def __init__(self) -> None:
        self.parts = self.tokens = 0
        self.requests = np.zeros(0, np.int64)
        self.domains: set[str] = set()

    def add(self, part: RoutingTrace) -> _Summary:
        self.parts += 1
        self.tokens += part.num_tokens
        self.requests = np.union1d(self.requests, part.request_ids)
        self.domains |= set(part.domain)
        self.last = part
        return self

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.last.model,
            "kind": self.last.kind,
            "tokens": self.tokens,
            "requests": len(self.requests),
            "layers": self.last.num_layers,
            "num_experts": self.last.num_experts,
            "top_k": self.last.top_k,
            "domains": sorted(self.domains),
            "parts": self.parts,
            "content_hash": self.last.content_hash() if self.parts == 1 else None,
        }


def find_format(path: str | PathLike[str]) -> str:
    """Return the name in ``FORMATS`` that the content of a file or directory fits.

    Raises:
        TraceError: nothing is there, or it fits none.
    """
    place = Path(path)
    if not place.exists():
        raise TraceError(f"found nothing at {place}, expected a trace to import: check the path")
    if place.is_dir():
        for pattern, name in (("router_trace_rank*.jsonl", "megatron"), ("*.pt", "sglang-dump")):
            if any(place.glob(pattern)):
                return name
        raise TraceError(
            f"found a directory {place} without router_trace_rank*.jsonl or .pt files, expected a "
            "file or a directory that Megatron-LM or SGLang wrote; a directory of part-*.parquet "
            "shards is a trace already"
        )
    found, strange = _content_format(place)
    found = found or _BY_SUFFIX.get(place.suffix.lower())  # its reader says best what is wrong
    if found is None:
        raise TraceError(
            f"found {strange} in {place}, a file of unknown format, expected one of: "
            f"{', '.join(FORMATS)}: see docs/formats.md, and name the format where it is not "
            "recognized"
        )
    return found


def _content_format(path: Path) -> tuple[str | None, str]:
    """The format that the content fits, or None and what was found."""
    line = _first_line(path)
    if line.startswith(b"PK\x03\x04"):
        return _zip_format(path)
    if line.startswith(b"\x93NUMPY"):
        return "vllm", ""
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return None, f"bytes that cannot be read as text ({error})"
    if text[:1] in ("{", "["):
        return _json_format(path, text)
    cells = _cells(text)
    if cells == llamacpp.HEADER or (len(cells) == 2 and all(c.isdecimal() for c in cells)):
        return "llamacpp", ""
    return ("csv", "") if len(cells) > 1 else (None, f"a first line {text[:60]!r}")


def _zip_format(path: Path) -> tuple[str | None, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        return None, f"a damaged archive ({error})"
    if any(name.endswith("data.pkl") for name in names):
        return "sglang-dump", ""
    if {"kind.npy", "format_version.npy", "expert_ids.npy", "expert_load.npy"} & set(names):
        return "npz", ""
    if names and all(name.endswith(".npy") for name in names):
        return "vllm", ""
    return None, f"an archive of {names[:4]}"


def _json_format(path: Path, line: str) -> tuple[str | None, str]:
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        if path.suffix.lower() == ".jsonl":
            return "json", ""
        first = whole_json(path)
    if isinstance(first, list):
        entry = first[0] if first else None
        if isinstance(entry, list):
            return "vllm", ""
        return (_responses_format(entry) if isinstance(entry, dict) else None) or "json", ""
    if "top_indices" in first:
        return "megatron", ""
    return _responses_format(first) or "json", ""


def _responses_format(response: dict) -> str | None:
    if isinstance(response.get("meta_info"), dict):
        return "sglang"
    if "choices" in response or "routed_experts" in response:
        return "vllm"
    return None


def _cells(line: str) -> list[str]:
    return [cell.strip().strip('"') for cell in line.strip().lstrip("\ufeff").split(",")]


def _parts(path: Path, format: str | None, options: ImportOptions) -> Iterator[RoutingTrace]:
    found = find_format(path) if format is None else format
    if found not in FORMATS:
        raise TraceError(f"found format {format!r}, expected one of: {', '.join(FORMATS)}")
    if not path.exists():
        raise TraceError(f"found nothing at {path}, expected a trace to import: check the path")
    if path.is_dir() and found not in ("megatron", "sglang-dump"):
        raise TraceError(f"found a directory {path}, expected a file of format {found}")
    if found == "npz":
        return iter([_read_npz(path, options)])
    if found == "json":
        return generic.parts(path, options, lines=_one_object_per_line(path))
    if found == "csv":
        return tables.parts(path, _columns(path), options)
    if found == "megatron":
        return megatron.parts(_files(path, "router_trace_rank*.jsonl"), options)
    if found == "llamacpp":
        return llamacpp.parts(path, options)
    if found == "sglang-dump":
        return sglang.parts(_files(path, "*.pt"), options)
    if found == "sglang":
        return routed.parts(path, options, routed.sglang_responses)
    return routed.parts(
        path, options, routed.array_file if _is_binary(path) else routed.vllm_responses
    )


def _files(path: Path, pattern: str) -> list[Path]:
    files = sorted(path.glob(pattern)) if path.is_dir() else [path]
    if not files:
        raise TraceError(f"found no {pattern} in {path}, expected at least one: check the path")
    return files


def _first_line(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.readline()
    except OSError as error:
        raise TraceError(f"found that {path} cannot be read: {error.strerror}") from error


def _is_binary(path: Path) -> bool:
    return _first_line(path).startswith((b"PK\x03\x04", b"\x93NUMPY"))


def _columns(path: Path) -> list[str]:
    return _cells(_first_line(path).decode("utf-8", "replace"))


def _one_object_per_line(path: Path) -> bool:
    """Whether the first line is an object by itself that holds no tokens."""
    if path.suffix.lower() == ".json":
        return False
    if path.suffix.lower() == ".jsonl":
        return True
    try:
        first = json.loads(_first_line(path).decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and "tokens" not in first


def _read_npz(path: Path, options: ImportOptions) -> RoutingTrace:
    trace = read_npz(path)
    if options.num_experts not in (None, trace.num_experts):
        raise TraceError(
            f"found num_experts = {trace.num_experts} in {path}, expected {options.num_experts} as "
            "asked: leave it out"
        )
    return trace if options.model is None else trace.evolve(model=options.model)
