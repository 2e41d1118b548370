"""Importers: routing records of other programs become a RoutingTrace.

The format is found from the content, not from the name; ``FORMATS`` lists what is known, each
described in docs/formats.md and in the module that reads it.
"""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace import llamacpp, megatron, routed, sglang, tables
from moe_locality.trace.io import write_trace
from moe_locality.trace.merge import concat
from moe_locality.trace.parquet import make_directory, replace_shards, shard_files
from moe_locality.trace.reading import ImportOptions, Report, is_count, text_lines, whole_json
from moe_locality.trace.schema import RoutingTrace

FORMATS = {
    "npz": "arrays of this package",
    "json": "generic JSON, one object or one per line",
    "csv": "generic CSV, a row per token and layer or per pick",
    "megatron": "Megatron-LM router_trace_rank*.jsonl, a file or the directory",
    "vllm": "vLLM routed experts: .npy, .npz, or responses in JSON",
    "sglang": "SGLang responses with routed_experts in JSON",
    "sglang-dump": "SGLang expert_distribution_recorder_*.pt, a file or the directory; or its "
    "logical_count in JSON",
    "slime": "slime rollouts with routed experts (.pt)",
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
_ZIP, _NUMPY = b"PK\x03\x04", b"\x93NUMPY"

Paths = str | PathLike[str] | Sequence[str | PathLike[str]]
Listed = list[tuple[Path, str, str | None]]
"""(file, name, domain)"""


def import_trace(
    path: Paths,
    *,
    format: str | None = None,
    model: str | None = None,
    num_experts: int | None = None,
    top_k: int | None = None,
    num_layers: int | None = None,
    layers: Collection[int] | None = None,
    table: str | PathLike[str] | None = None,
    report: Report | None = None,
) -> RoutingTrace:
    """Read a foreign trace into memory.

    Args:
        path: a file, several, or a directory of them: one trace. Request ids are the numbers that
            the files are called by where all are, domains the folders in the directory.
        format: a name in ``FORMATS``; None: found from the content.
        model, num_experts, top_k, num_layers: what the file does not say. Without ``num_experts``
            there, the highest id seen plus one is taken, with a warning, for experts that were
            never picked leave no mark.
        layers: transformer layers to take; None: all that hold picks.
        table: CSV with the columns name and request_id or domain, or JSON {name: {"request_id",
            "domain"} or domain}; the names are those of files, arrays or responses.
        report: called now and then with (bytes read, bytes in all).

    Raises:
        TraceError: the format is unknown, or the content does not fit it; the message names file
        and line. A request among others that is damaged is left out, with a warning.
    """
    said = {"model": model, "num_experts": num_experts, "top_k": top_k, "num_layers": num_layers}
    options = _options(**said, layers=layers, table=table, report=report)
    return concat(list(_parts(path, format, options)))


def _options(
    layers: Collection[int] | None = None,
    table: str | PathLike[str] | None = None,
    **options: Any,
) -> ImportOptions:
    return ImportOptions(
        **options,
        layers=None if layers is None else tuple(layers),
        table=None if table is None else _read_table(Path(table)),
    )


def import_to(
    path: Paths,
    out: str | PathLike[str],
    *,
    format: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Import a foreign trace into a directory of shards (or an .npz file) without holding it whole.

    Returns what was imported as plain data: ``model``, ``kind``, ``tokens``, ``requests``,
    ``layers``, ``num_experts``, ``top_k``, ``domains``, ``parts``, ``content_hash`` (None where
    there were several parts: it needs the whole trace) and ``left_out``, what could not be read.

    Line formats and sorted CSV take memory for one part of about two million picks at a time;
    arrays, dumps and single JSON objects are read whole. Nothing appears in ``out`` before the last
    part is written. ``options`` are the other arguments of ``import_trace``.

    Raises:
        TraceError: as ``import_trace``; or ``out`` holds another trace and ``overwrite`` is False.
    """
    given, place = _options(**options), Path(out)
    parts = _parts(path, format, given)
    summary: dict[str, Any] = {}
    single = place.suffix == ".npz" and not place.is_dir()
    if single or (place.is_dir() and shard_files(place) and not overwrite):
        (trace,) = _counted([concat(list(parts))], summary)
        write_trace(trace, place, overwrite=overwrite)
    else:
        replace_shards(make_directory(place), _counted(parts, summary))
    return {**summary, "left_out": given.left_out}


def _counted(parts: Iterable[RoutingTrace], summary: dict[str, Any]) -> Iterator[RoutingTrace]:
    """Yield the parts of an import; ``summary`` says after the last what they are together."""
    last: RoutingTrace | None = None
    number = tokens = 0
    requests, domains = np.zeros(0, np.int64), set()
    for last in parts:
        number += 1
        tokens += last.num_tokens
        requests = np.union1d(requests, last.request_ids)
        domains |= set(last.domain)
        yield last
    assert last is not None
    summary |= {
        "model": last.model,
        "kind": last.kind,
        "tokens": tokens,
        "requests": len(requests),
        "layers": last.num_layers,
        "num_experts": last.num_experts,
        "top_k": last.top_k,
        "domains": sorted(domains),
        "parts": number,
        "content_hash": last.content_hash() if number == 1 else None,
    }


def find_format(path: Paths) -> str:
    """Return the name in ``FORMATS`` that the content of the (first) file fits, else TraceError."""
    place = _listed(path)[0][0]
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
    if line.startswith(_ZIP):
        return _zip_format(path)
    if line.startswith(_NUMPY):
        return "vllm", ""
    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return None, f"bytes that cannot be read as text ({error})"
    if text[:1] in ("{", "["):
        return _json_format(path, text)
    cells = tables.cells(text)
    if cells == llamacpp.HEADER or (len(cells) == 2 and all(c.isdecimal() for c in cells)):
        return "llamacpp", ""
    return ("csv", "") if len(cells) > 1 else (None, f"a first line {text[:60]!r}")


def _zip_format(path: Path) -> tuple[str | None, str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickles = [archive.read(name) for name in names if name.endswith("data.pkl")]
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError) as error:
        return None, f"a damaged archive ({error})"
    if any(pickles):  # looked at for a word; nothing of it is unpickled
        return ("slime" if b"rollout_routed_experts" in pickles[-1] else "sglang-dump"), ""
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
    if "logical_count" in first:
        return "sglang-dump", ""
    return _responses_format(first) or "json", ""


def _responses_format(response: dict) -> str | None:
    choices = response.get("choices")
    spots = [response, *(choices if isinstance(choices, list) else [])]
    spots = [spot for spot in spots if isinstance(spot, dict)]
    marks = ("meta_info", "sglext", "sgl_ext")
    if any(isinstance(spot.get(mark), dict) for spot in spots for mark in marks):
        return "sglang"
    if "choices" in response or "routed_experts" in response:
        return "vllm"
    return None


_REQUESTS = {
    "vllm": routed.vllm_responses,
    "sglang": routed.sglang_responses,
    "slime": routed.slime_samples,
}
"""Formats of requests with their picks: files of these are read as one."""
_RUNS = {"megatron": megatron.parts, "sglang-dump": sglang.parts}
"""Formats with a file per rank of a run, and without names of requests."""


def _listed(path: Paths) -> Listed:
    """Every file that is named, or in a named directory: the folder inside it is the domain."""
    given = [path] if isinstance(path, (str, PathLike)) else list(path)
    listed: Listed = []
    for place in map(Path, given):
        if not place.exists():
            raise TraceError(
                f"found nothing at {place}, expected a trace to import: check the path"
            )
        if not place.is_dir():
            listed.append((place, place.stem, None))
            continue
        inside = [p for p in sorted(place.rglob("*")) if p.suffix.lower() in _BY_SUFFIX]
        ranks = [p for p in inside if p.match("router_trace_rank*.jsonl")]
        for file in ranks or inside:
            folder = file.relative_to(place).parent
            name = (folder / file.stem).as_posix()
            listed.append((file, name, folder.as_posix() if folder.parts else None))
        if not inside:
            raise TraceError(
                f"found a directory {place} without router_trace_rank*.jsonl, .pt, .npy, .npz, "
                ".json or .csv files, expected some of one format; a directory of part-*.parquet "
                "shards is a trace already"
            )
    if not listed:
        raise TraceError("found no file to import, expected at least one: name it")
    return listed


def _parts(path: Paths, format: str | None, options: ImportOptions) -> Iterator[RoutingTrace]:
    if format is not None and format not in FORMATS:
        raise TraceError(f"found format {format!r}, expected one of: {', '.join(FORMATS)}")
    files = _listed(path)
    folder = Path(path) if isinstance(path, (str, PathLike)) and Path(path).is_dir() else None
    if format == "megatron" and folder and not any(folder.rglob("router_trace_rank*.jsonl")):
        raise TraceError(f"found no router_trace_rank*.jsonl in {folder}, expected at least one")
    formats = [find_format(file) if format is None else format for file, _, _ in files]
    if set(formats) <= set(_REQUESTS):
        sources = []
        for (file, name, domain), found in zip(files, formats, strict=True):
            arrays = found == "vllm" and _first_line(file).startswith((_ZIP, _NUMPY))
            read = routed.array_file if arrays else _REQUESTS[found]
            sources.append(routed.Source(path=file, read=read, name=name, domain=domain))
        return routed.parts(sources, options)
    if len(set(formats)) > 1:
        raise TraceError(
            f"found files of the formats {', '.join(sorted(set(formats)))}, expected one: import "
            "them apart, or name the format"
        )
    found, places = formats[0], [file for file, _, _ in files]
    if found in _RUNS:
        if options.table is not None:
            raise TraceError(f"table: found one for {found}, which names no requests: leave it out")
        parts = _RUNS[found](places, options)
    elif len(files) == 1 and not folder and options.table is None:
        parts = _FILES[found](places[0], options)
    else:
        parts = _joined(files, found, options, folder)
    return (part.filter(layers=options.layers) for part in parts)


def _joined(
    files: Listed, found: str, options: ImportOptions, folder: Path | None
) -> Iterator[RoutingTrace]:
    """Yield several files of one format as one trace: requests are numbered on, or by the table."""
    traces: list[tuple[RoutingTrace, Path, str, str | None]] = []
    alone = replace(options, report=None)
    errors = []
    for place, (file, name, domain) in enumerate(files):
        if options.report is not None:
            options.report(place, len(files))
        try:
            traces.append((concat(list(_FILES[found](file, alone))), file, name, domain))
        except TraceError as error:
            errors.append(error)
    if not traces:
        where = f"found a directory {folder} without a file of format {found}: " if folder else ""
        raise TraceError(f"{where}{errors[0]}") from errors[0]
    for error in errors:
        options.leave_out(error)
    experts = max(trace.num_experts for trace, *_ in traces)
    if any(trace.num_experts < experts for trace, *_ in traces):
        _check_experts({file: trace.num_experts for trace, file, *_ in traces}, found, options)
    first = 0
    for trace, _, name, domain in traces:
        request, label = (options.table or {}).get(name, (None, None))
        part = trace.evolve(num_experts=experts)
        if part.kind == "tokens":
            ids, place = np.unique(part.tokens_only("import").request_id, return_inverse=True)
            if request is None:
                request, first = first, first + len(ids)
            elif len(ids) > 1:
                raise TraceError(
                    f"found {len(ids)} requests in {name}, expected one, for the table gives it "
                    f"request id {request}: leave that out"
                )
            part = part.evolve(request_id=request + place.astype(np.int64))
        if (label := label or domain) is not None and not part.domain:
            part = part.evolve(domain=(label,), domain_id=np.zeros(part.num_rows, np.int32))
        yield part


def _check_experts(experts: dict[Path, int], found: str, options: ImportOptions) -> None:
    """Raise TraceError where files say different numbers of experts; others were guessed."""
    said: dict[Path, int | None] = {}
    if found == "npz":
        said |= experts
    elif found == "json" and options.num_experts is None:
        said |= {file: tables.header_of(file)[0].get("num_experts") for file in experts}
    if len({number for number in said.values() if number}) > 1:
        words = ", ".join(f"{number} in {file}" for file, number in said.items() if number)
        raise TraceError(
            f"found different numbers of experts ({words}), expected one, for a trace has one: "
            "import files of other models, or of layers of another size, into a directory of their "
            "own"
        )


def _read_table(path: Path) -> dict[str, tuple[int | None, str | None]]:
    """Name → (request id, domain) of a CSV or JSON table."""
    if path.suffix.lower() == ".json":
        content = whole_json(path)
        rows = content.items() if isinstance(content, dict) else ()
    else:
        reader = csv.DictReader([text for _, text in text_lines(path, ImportOptions())])
        columns = set(reader.fieldnames or ())
        if "name" not in columns or not columns & {"request_id", "domain"}:
            raise TraceError(
                f"found the columns {reader.fieldnames} in {path}, expected name and request_id or "
                "domain: see docs/formats.md"
            )
        rows = [(row["name"], row) for row in reader]
    table: dict[str, tuple[int | None, str | None]] = {}
    for name, row in rows:
        row = {"domain": row} if isinstance(row, str) else row
        request = row.get("request_id") if isinstance(row, dict) else ""
        if isinstance(request, str) and request.strip().isdecimal():
            request = int(request)
        known = request in (None, "") or is_count(request)
        if not isinstance(row, dict) or name in table or not known:
            raise TraceError(
                f"found {row!r} for {name!r} in {path}, expected one entry per name, with a whole "
                "number as request_id or a text as domain: correct it"
            )
        table[name] = (request if is_count(request) else None, row.get("domain") or None)
    if not table:
        raise TraceError(f"found no entry in the table {path}, expected names and their labels")
    return table


def _first_line(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.readline()
    except OSError as error:
        raise TraceError(f"found that {path} cannot be read: {error.strerror}") from error


def _read_npz(path: Path, options: ImportOptions) -> list[RoutingTrace]:
    trace = RoutingTrace.from_npz(path)
    if options.num_experts not in (None, trace.num_experts):
        raise TraceError(
            f"{path}: found {trace.num_experts} experts, expected {options.num_experts} as asked: "
            "leave num_experts= out"
        )
    return [trace if options.model is None else trace.evolve(model=options.model)]


_FILES: dict[str, Callable[[Path, ImportOptions], Iterable[RoutingTrace]]] = {
    "npz": _read_npz,
    "json": tables.json_parts,
    "csv": tables.csv_parts,
    "llamacpp": llamacpp.parts,
}
"""Formats whose files are read one by one."""
