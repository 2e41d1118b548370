"""Importer of the generic JSON layouts of docs/formats.md: one object per token, under a header."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace.reading import (
    PART_PICKS,
    ImportOptions,
    guess_num_experts,
    is_count,
    json_lines,
    stage_code,
    whole_json,
)
from moe_locality.trace.schema import RoutingTrace
from moe_locality.trace.validate import MAX_EXPERTS

Tokens = Iterator[tuple[str, Any]]


def parts(path: Path, options: ImportOptions, *, lines: bool) -> Iterator[RoutingTrace]:
    """Yield the trace of a ``.jsonl`` (``lines``) or ``.json`` file in parts.

    Raises:
        TraceError: the content does not fit the layout; the message names the line or token.
    """
    header = header_of(path, lines=lines)
    if not lines:
        tokens = header.get("tokens")
        if not isinstance(tokens, list):
            raise TraceError(
                f"found no list named tokens in {path}, expected an object with num_experts, "
                "layer_ids and tokens: see docs/formats.md"
            )
        yield from token_parts(
            path,
            header,
            lambda _: ((f"{path}, token {i}", record) for i, record in enumerate(tokens)),
            options,
        )
        return
    if not header:
        raise TraceError(f"found no line in {path}, expected one JSON object per line")
    if "num_experts" not in header and "layer_ids" not in header:
        raise TraceError(
            f"found {sorted(header)[:8]} as the keys of the first line of {path}, expected a "
            "header with num_experts and layer_ids: see docs/formats.md, or name the format"
        )

    def tokens_of(number: int) -> Tokens:
        records = json_lines(path, options, (number, 2))
        return ((f"{path}, line {line}", record) for line, record in islice(records, 1, None))

    yield from token_parts(path, header, tokens_of, options)


def header_of(path: Path, *, lines: bool) -> dict[str, Any]:
    """Return what a file says of all its tokens; a whole object holds the tokens as well."""
    content = next(json_lines(path, ImportOptions()), (0, {}))[1] if lines else whole_json(path)
    return content if isinstance(content, dict) else {}


def token_parts(
    path: Path,
    header: Mapping[str, Any],
    tokens_of: Callable[[int], Tokens],
    options: ImportOptions,
) -> Iterator[RoutingTrace]:
    """Yield traces of tokens given as (place, object).

    ``tokens_of(k)`` is called with k = 0 to check and measure, then with k = 1 to convert.
    """
    layer_ids = header.get("layer_ids")
    if not isinstance(layer_ids, list) or not all(is_count(layer) for layer in layer_ids):
        raise TraceError(
            f"found layer_ids {layer_ids!r} in the header of {path}, expected a list of layer "
            "numbers"
        )
    top_k = header.get("top_k", options.top_k or 1)
    if not is_count(top_k) or top_k > MAX_EXPERTS:
        raise TraceError(
            f"found top_k {top_k!r} in the header of {path}, expected a number up to {MAX_EXPERTS}"
        )
    highest = -1
    for where, record in tokens_of(0):
        widest, largest = _check_token(where, record, len(layer_ids))
        top_k, highest = max(top_k, widest), max(highest, largest)
    given = options.num_experts or header.get("num_experts")
    common = {
        "model": str(options.model or header.get("model", "")),
        "num_experts": given if given else guess_num_experts(path, highest, top_k),
        "layer_ids": np.array(layer_ids, np.int64),
    }
    rows = max(PART_PICKS // max(len(layer_ids) * top_k, 1), 1)
    tokens = tokens_of(1)
    first = True
    while (block := list(islice(tokens, rows))) or first:
        first = False
        yield _to_trace(path, common, block, len(layer_ids), top_k)


def _to_trace(
    path: Path, common: dict[str, Any], tokens: list[tuple[str, Any]], num_layers: int, top_k: int
) -> RoutingTrace:
    domain = sorted({str(r["domain"]) for _, r in tokens if r.get("domain") is not None})
    place = {name: i for i, name in enumerate(domain)}
    ids = np.full((len(tokens), num_layers, top_k), -1, np.int64)
    for row, (_, record) in enumerate(tokens):
        for layer, picks in enumerate(record["expert_ids"]):
            ids[row, layer, : len(picks)] = picks
    try:
        return RoutingTrace(
            **common,
            domain=tuple(domain),
            expert_ids=ids,
            request_id=_numbers(tokens, "request_id"),
            position=_numbers(tokens, "position"),
            stage=np.array([stage_code(where, r.get("stage")) for where, r in tokens], np.int64),
            domain_id=np.array([place.get(str(r.get("domain")), -1) for _, r in tokens], np.int64),
        )
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error


def _numbers(tokens: list[tuple[str, Any]], name: str) -> np.ndarray:
    return np.array([record[name] for _, record in tokens], np.int64)


def _check_token(where: str, record: Any, num_layers: int) -> tuple[int, int]:
    """Check one token; return the most picks that it has in a layer, and its highest id."""
    if not isinstance(record, dict):
        raise TraceError(f"{where}: found a {type(record).__name__}, expected an object per token")
    for name in ("request_id", "position"):
        if not is_count(record.get(name)):
            raise TraceError(
                f"{where}: found {name} {record.get(name)!r}, expected a number of at least 0"
            )
    stage_code(where, record.get("stage"))
    picks = record.get("expert_ids")
    if not isinstance(picks, list) or len(picks) != num_layers:
        found = len(picks) if isinstance(picks, list) else type(picks).__name__
        raise TraceError(
            f"{where}: found {found} lists in expert_ids, expected {num_layers} (one per layer)"
        )
    widest, highest = 0, -1
    for layer in picks:
        fine = isinstance(layer, list) and {int}.issuperset(map(type, layer))
        if not fine or (layer and not -1 <= min(layer) <= max(layer) < 2**63):
            raise TraceError(f"{where}: found picks {layer!r}, expected a list of expert numbers")
        if layer:
            widest, highest = max(widest, len(layer)), max(highest, *layer)
    return widest, highest
