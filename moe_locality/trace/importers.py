"""Importers: routing records of other programs become a RoutingTrace.

Known formats, by suffix; the generic ones are described in docs/formats.md:

* ``.npz``: the array layout of this package.
* ``.jsonl``: either the generic layout (first line a header, then one object per token) or what
  Megatron-LM writes with ``--moe-routing-trace-path`` (see ``moe_locality.trace.megatron``). A
  directory of ``router_trace_rank*.jsonl`` files is read as the ranks of one run.
* ``.json``: one object, the header's keys and ``"tokens"``: a list of the same objects as in
  ``.jsonl``.
* ``.csv``: one row per token and layer.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace import megatron
from moe_locality.trace.npz import read_npz
from moe_locality.trace.schema import STAGE_NAMES, UNKNOWN, RoutingTrace

_log = logging.getLogger(__name__)
_STAGE_CODES = {name: code for code, name in STAGE_NAMES.items()}


def import_trace(
    path: str | PathLike[str], *, model: str | None = None, num_experts: int | None = None
) -> RoutingTrace:
    """Read a foreign trace; the suffix of the file says which format it is.

    Args:
        model, num_experts: what the file does not say (Megatron-LM and CSV have neither). Without
            ``num_experts`` there, the highest id seen plus one is taken, with a warning, for
            experts that were never picked leave no mark.

    Raises:
        TraceError: the suffix is unknown, or the content does not fit the format; the message names
        file and line.
    """
    place = Path(path)
    if not place.exists():
        raise TraceError(f"found nothing at {place}, expected a trace to import: check the path")
    if place.is_dir():
        files = sorted(place.glob("router_trace_rank*.jsonl"))
        if not files:
            raise TraceError(
                f"found a directory {place} without router_trace_rank*.jsonl files, expected a "
                "file or a directory that Megatron-LM wrote; a directory of part-*.parquet shards "
                "is a trace already"
            )
        return megatron.read_ranks(files, model=model, num_experts=num_experts)
    readers: dict[str, Callable[..., RoutingTrace]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".npz": _read_npz,
    }
    reader = readers.get(place.suffix.lower())
    if reader is None:
        raise TraceError(
            f"found a file {place} of unknown format, expected one of: {', '.join(readers)}: "
            "convert it to one of these (docs/formats.md)"
        )
    return reader(place, model=model, num_experts=num_experts)


def _read_npz(path: Path, *, model: str | None, num_experts: int | None) -> RoutingTrace:
    trace = read_npz(path)
    if num_experts not in (None, trace.num_experts):
        raise TraceError(
            f"found num_experts = {trace.num_experts} in {path}, expected {num_experts} as asked: "
            "leave it out"
        )
    return trace if model is None else trace.evolve(model=model)


def _read_jsonl(path: Path, *, model: str | None, num_experts: int | None) -> RoutingTrace:
    records = megatron.read_lines(path)
    if not records:
        raise TraceError(f"found no line in {path}, expected one JSON object per line")
    first = records[0][1]
    if "top_indices" in first:
        return megatron.read_ranks([path], model=model, num_experts=num_experts)
    if "num_experts" not in first and "layer_ids" not in first:
        raise TraceError(
            f"found {sorted(first)[:8]} as the keys of the first line of {path}, expected a header "
            "with num_experts and layer_ids, or Megatron-LM's records with top_indices: see "
            "docs/formats.md"
        )
    tokens = ((f"{path}, line {line}", record) for line, record in records[1:])
    return _from_tokens(path, first, tokens, model, num_experts)


def _read_json(path: Path, *, model: str | None, num_experts: int | None) -> RoutingTrace:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TraceError(
            f"found that {path} cannot be read as JSON: {error}; expected one object: correct the "
            "file"
        ) from error
    tokens = content.get("tokens") if isinstance(content, dict) else None
    if not isinstance(tokens, list):
        raise TraceError(
            f"found no list named tokens in {path}, expected an object with num_experts, layer_ids "
            "and tokens: see docs/formats.md"
        )
    named = ((f"{path}, token {i}", record) for i, record in enumerate(tokens))
    return _from_tokens(path, content, named, model, num_experts)


def _from_tokens(
    path: Path,
    header: Mapping[str, Any],
    records: Iterable[tuple[str, Any]],
    model: str | None,
    num_experts: int | None,
) -> RoutingTrace:
    layer_ids = header.get("layer_ids")
    if not isinstance(layer_ids, list) or not all(_is_count(layer) for layer in layer_ids):
        raise TraceError(
            f"found layer_ids {layer_ids!r} in the header of {path}, expected a list of layer "
            "numbers"
        )
    tokens = list(records)
    top_k = header.get("top_k", 1)
    if not _is_count(top_k):
        raise TraceError(f"found top_k {top_k!r} in the header of {path}, expected a number")
    for where, record in tokens:
        top_k = max(top_k, _check_token(where, record, len(layer_ids)))
    domain = sorted({str(r["domain"]) for _, r in tokens if r.get("domain") is not None})
    place = {name: i for i, name in enumerate(domain)}
    ids = np.full((len(tokens), len(layer_ids), top_k), -1, np.int64)
    for row, (_, record) in enumerate(tokens):
        for layer, picks in enumerate(record["expert_ids"]):
            ids[row, layer, : len(picks)] = picks
    given = num_experts or header.get("num_experts")
    try:
        return RoutingTrace(
            model=str(model or header.get("model", "")),
            num_experts=given if given else megatron.guess_num_experts(path, ids),
            layer_ids=np.array(layer_ids, np.int64),
            domain=tuple(domain),
            expert_ids=ids,
            request_id=_numbers(tokens, "request_id"),
            position=_numbers(tokens, "position"),
            stage=np.array([_stage(where, r) for where, r in tokens], np.int64),
            domain_id=np.array([place.get(str(r.get("domain")), -1) for _, r in tokens], np.int64),
        )
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error


def _numbers(tokens: list[tuple[str, Any]], name: str) -> np.ndarray:
    return np.array([record[name] for _, record in tokens], np.int64)


def _check_token(where: str, record: Any, num_layers: int) -> int:
    """Check one token and return the most picks that it has in a layer."""
    if not isinstance(record, dict):
        raise TraceError(f"{where}: found a {type(record).__name__}, expected an object per token")
    for name in ("request_id", "position"):
        if not _is_count(record.get(name)):
            raise TraceError(
                f"{where}: found {name} {record.get(name)!r}, expected a number of at least 0"
            )
    picks = record.get("expert_ids")
    if not isinstance(picks, list) or len(picks) != num_layers:
        found = len(picks) if isinstance(picks, list) else type(picks).__name__
        raise TraceError(
            f"{where}: found {found} lists in expert_ids, expected {num_layers} (one per layer)"
        )
    for layer in picks:
        if not isinstance(layer, list) or not all(_is_count(i) or i == -1 for i in layer):
            raise TraceError(f"{where}: found picks {layer!r}, expected a list of expert numbers")
    return max(map(len, picks), default=0)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _stage(where: str, record: Mapping[str, Any]) -> int:
    stage = record.get("stage", UNKNOWN)
    code = _STAGE_CODES.get(stage) if isinstance(stage, str) else stage
    if code not in STAGE_NAMES or isinstance(code, bool):
        raise TraceError(
            f"{where}: found stage {stage!r}, expected one of {sorted(_STAGE_CODES)} or its code"
        )
    return int(code)  # type: ignore[arg-type]


def _read_csv(path: Path, *, model: str | None, num_experts: int | None) -> RoutingTrace:
    """Columns request_id, position, layer, expert_ids (numbers joined by spaces), and optionally
    stage, domain.
    """
    rows: dict[tuple[int, int], dict[str, Any]] = {}
    layers: set[int] = set()
    needed = ("request_id", "position", "layer", "expert_ids")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            absent = [name for name in needed if name not in (reader.fieldnames or ())]
            if absent:
                raise ValueError(f"column {absent[0]!r} is missing")
            for row in reader:
                key = (int(row["request_id"]), int(row["position"]))
                layer, picks = int(row["layer"]), [int(i) for i in row["expert_ids"].split()]
                token = rows.setdefault(key, {**row, "picks": {}})
                if layer in token["picks"]:
                    raise ValueError(f"line {reader.line_num}: layer {layer} of token {key} again")
                token["picks"][layer] = picks
                layers.add(layer)
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        raise TraceError(
            f"found that {path} cannot be read as a routing CSV: {error}; expected the columns "
            f"{needed} and whole numbers: see docs/formats.md"
        ) from error
    layer_ids = sorted(layers)
    tokens = []
    for (request, position), row in rows.items():
        absent = [layer for layer in layer_ids if layer not in row["picks"]]
        if absent:
            raise TraceError(
                f"{path}: found no row for layer {absent[0]} of request {request}, position "
                f"{position}, expected a row per token and layer: leave expert_ids empty for a "
                "token without picks"
            )
        record = {
            "request_id": request,
            "position": position,
            "expert_ids": [row["picks"][layer] for layer in layer_ids],
        }
        for name in ("stage", "domain"):
            if row.get(name):
                record[name] = row[name]
        tokens.append((f"{path}, request {request}, position {position}", record))
    return _from_tokens(path, {"layer_ids": layer_ids}, tokens, model, num_experts)
