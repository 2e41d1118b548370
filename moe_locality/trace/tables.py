"""Importers of the generic layouts of docs/formats.md: JSON with an object per token and a header,
CSV with a row per token and layer, or per pick.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from moe_locality.errors import TraceError
from moe_locality.trace import reading
from moe_locality.trace.reading import PART_PICKS, ImportOptions
from moe_locality.trace.schema import DECODE, MAX_EXPERTS, PREFILL, UNKNOWN, RoutingTrace

Tokens = Iterator[tuple[str, Any]]


def json_parts(path: Path, options: ImportOptions) -> Iterator[RoutingTrace]:
    """Yield the trace of a file in parts; TraceError names the line or token that does not fit."""
    header, lines = header_of(path)
    tokens: Any = header.get("tokens")
    if not lines and not isinstance(tokens, list):
        raise TraceError(
            f"found no list named tokens in {path}, expected an object with num_experts, "
            "layer_ids and tokens: see docs/formats.md"
        )
    if lines and not header:
        raise TraceError(f"found no line in {path}, expected one JSON object per line")
    if lines and "num_experts" not in header and "layer_ids" not in header:
        raise TraceError(
            f"found {sorted(header)[:8]} as the keys of the first line of {path}, expected a "
            "header with num_experts and layer_ids: see docs/formats.md, or name the format"
        )

    def tokens_of(number: int) -> Tokens:
        if not lines:
            return ((f"{path}, token {i}", record) for i, record in enumerate(tokens))
        records = reading.json_lines(path, options, (number, 2))
        return ((f"{path}, line {line}", record) for line, record in islice(records, 1, None))

    yield from token_parts(path, header, tokens_of, options)


def header_of(path: Path) -> tuple[dict[str, Any], bool]:
    """Return what a file says of all its tokens, and whether it has an object per line: by its
    name, else where the first line is one by itself that holds no tokens."""
    suffix = path.suffix.lower()
    if suffix != ".json":
        try:
            first = next(reading.json_lines(path, ImportOptions()), (0, {}))[1]
            if suffix == ".jsonl" or (first and "tokens" not in first):
                return first, True
        except TraceError:
            if suffix == ".jsonl":
                raise
    content = reading.whole_json(path)
    return content if isinstance(content, dict) else {}, False


def token_parts(
    path: Path, header: dict[str, Any], tokens_of: Callable[[int], Tokens], options: ImportOptions
) -> Iterator[RoutingTrace]:
    """Yield traces of (place, token): of ``tokens_of(0)`` to check, ``tokens_of(1)`` to convert."""
    layer_ids = header.get("layer_ids")
    if not isinstance(layer_ids, list) or not all(reading.is_count(layer) for layer in layer_ids):
        raise TraceError(
            f"found layer_ids {layer_ids!r} in the header of {path}, expected a list of layer "
            "numbers"
        )
    top_k = header.get("top_k", options.top_k or 1)
    if not reading.is_count(top_k) or top_k > MAX_EXPERTS:
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
        "num_experts": given if given else reading.guess_num_experts(path, highest, top_k),
        "layer_ids": np.array(layer_ids, np.int64),
    }
    rows = max(PART_PICKS // max(len(layer_ids) * top_k, 1), 1)
    tokens = tokens_of(1)
    yield _token_trace(path, common, list(islice(tokens, rows)), top_k)  # if it has no token too
    while block := list(islice(tokens, rows)):
        yield _token_trace(path, common, block, top_k)


def _token_trace(
    path: Path, common: dict[str, Any], tokens: list[tuple[str, Any]], top_k: int
) -> RoutingTrace:
    domain = sorted({str(r["domain"]) for _, r in tokens if r.get("domain") is not None})
    place = {name: i for i, name in enumerate(domain)}
    ids = np.full((len(tokens), len(common["layer_ids"]), top_k), -1, np.int64)
    for row, (_, record) in enumerate(tokens):
        for layer, picks in enumerate(record["expert_ids"]):
            ids[row, layer, : len(picks)] = picks
    stages = [reading.stage_code(where, r.get("stage")) for where, r in tokens]
    with reading.named(path):
        return RoutingTrace(
            **common,
            domain=tuple(domain),
            expert_ids=ids,
            request_id=np.array([r["request_id"] for _, r in tokens], np.int64),
            position=np.array([r["position"] for _, r in tokens], np.int64),
            stage=np.array(stages, np.int64),
            domain_id=np.array([place.get(str(r.get("domain")), -1) for _, r in tokens], np.int64),
        )


def _check_token(where: str, record: Any, num_layers: int) -> tuple[int, int]:
    """Check one token; return the most picks that it has in a layer, and its highest id."""
    if not isinstance(record, dict):
        raise TraceError(f"{where}: found a {type(record).__name__}, expected an object per token")
    for name in ("request_id", "position"):
        if not reading.is_count(record.get(name)):
            raise TraceError(
                f"{where}: found {name} {record.get(name)!r}, expected a number of at least 0"
            )
    reading.stage_code(where, record.get("stage"))
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


WIDE = ("request_id", "position", "layer", "expert_ids")
LONG = ("position", "layer", "expert")
SORT_BYTES = 1 << 26
"""A file of picks that is sorted by token is read in blocks; up to this size it may be unsorted."""
BLOCK_BYTES = 1 << 23
_ALIASES = {
    "request": "request_id",
    "token": "position",
    "expert_id": "expert",
    "rank": "k",
    "slot": "k",
    "expert_weight": "weight",
    "phase": "stage",
}


def cells(line: str) -> list[str]:
    """Cells of a line of CSV, without blanks and quotes."""
    return [cell.strip().strip('"') for cell in line.strip().lstrip("\ufeff").split(",")]


def csv_parts(path: Path, options: ImportOptions) -> Iterator[RoutingTrace]:
    """Yield the trace of a CSV file in parts."""
    columns = cells(next(reading.text_lines(path, ImportOptions()), (1, ""))[1])
    if "expert" in (_ALIASES.get(name, name) for name in columns):
        yield from _long_parts(path, columns, options)
        return
    absent = [name for name in WIDE if name not in columns]
    if absent:
        raise _unreadable(path, f"column {absent[0]!r} is missing", WIDE)
    layer_ids = sorted({row["layer"] for _, row in _rows(path, options, 0)})
    yield from token_parts(
        path,
        {"layer_ids": layer_ids},
        lambda number: _tokens(path, layer_ids, options, number + 1),
        options,
    )


# -- a row per token and layer --


def _rows(path: Path, options: ImportOptions, number: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line, row) with the numbers of each row read."""
    lines = reading.text_lines(path, options, (number, 3))
    try:
        reader = csv.DictReader((text for _, text in lines), strict=True)
        for row in reader:
            numbers = {name: int(row[name]) for name in WIDE[:3]}
            picks = [int(i) for i in row["expert_ids"].split()]
            yield reader.line_num, {**row, **numbers, "picks": picks}
    except (ValueError, TypeError, AttributeError, KeyError, csv.Error) as error:
        if isinstance(error, TraceError):
            raise
        raise _unreadable(path, str(error), WIDE) from error


def _tokens(path: Path, layer_ids: list[int], options: ImportOptions, number: int) -> Tokens:
    """Yield a record per token, as soon as all its layers are there."""
    waiting: dict[tuple[int, int], dict[str, Any]] = {}
    enough = max(PART_PICKS // max(len(layer_ids), 1), 1)
    complete = 0
    for line, row in _rows(path, options, number):
        key = (row["request_id"], row["position"])
        token = waiting.setdefault(key, {**row, "of_layer": {}})
        if row["layer"] in token["of_layer"]:
            text = f"line {line}: layer {row['layer']} of token {key} again"
            raise _unreadable(path, text, WIDE)
        token["of_layer"][row["layer"]] = row["picks"]
        complete += len(token["of_layer"]) == len(layer_ids)
        if complete >= enough:
            done = [k for k, t in waiting.items() if len(t["of_layer"]) == len(layer_ids)]
            for key in done:
                yield _record(path, waiting.pop(key), layer_ids)
            complete = 0
    for token in waiting.values():
        yield _record(path, token, layer_ids)


def _record(path: Path, token: dict[str, Any], layer_ids: list[int]) -> tuple[str, Any]:
    where = f"request {token['request_id']}, position {token['position']}"
    absent = [layer for layer in layer_ids if layer not in token["of_layer"]]
    if absent:
        raise TraceError(
            f"{path}: found no row for layer {absent[0]} of {where}, expected a row per token and "
            "layer: leave expert_ids empty for a token without picks"
        )
    labels = {name: token.get(name) or None for name in ("stage", "domain")}
    picks = [token["of_layer"][layer] for layer in layer_ids]
    return f"{path}, {where}", {**token, **labels, "expert_ids": picks}


# -- a row per pick --


def _long_parts(path: Path, columns: list[str], options: ImportOptions) -> Iterator[RoutingTrace]:
    names = [_ALIASES.get(name, name) for name in columns]
    absent = [name for name in LONG if name not in names]
    if absent or len(set(names)) != len(names):
        raise _unreadable(path, f"columns {columns}", LONG)
    whole = False
    try:
        layers, highest, top_k = _measure(path, names, options, whole)
    except _Unsorted as error:
        if path.stat().st_size > SORT_BYTES:
            raise TraceError(
                f"found that the picks in {path} are not sorted by request and position, expected "
                f"that of a file above {SORT_BYTES >> 20} MiB, which is read in blocks: sort it"
            ) from error
        whole = True
        layers, highest, top_k = _measure(path, names, options, whole)
    if not layers:
        raise _unreadable(path, "no row of a pick", LONG)
    layer_ids = np.array(sorted(layers))
    top_k = max(top_k, options.top_k or 1)
    num_experts = options.num_experts or reading.guess_num_experts(path, highest, top_k)
    if top_k > min(num_experts, MAX_EXPERTS):
        raise TraceError(
            f"{path}: found {top_k} picks of a token in a layer of {num_experts} experts, expected "
            "at most as many: correct the file or num_experts="
        )
    common = {"model": options.model or "", "num_experts": num_experts, "layer_ids": layer_ids}
    for block in _blocks(path, names, options, 1, whole):
        with reading.named(path):
            yield _pick_trace(block, common, top_k)


class _Unsorted(Exception):
    """The picks of a token do not follow each other, or tokens are not in order."""


def _measure(
    path: Path, names: list[str], options: ImportOptions, whole: bool
) -> tuple[set[int], int, int]:
    """(layers, highest expert, most picks of a token in a layer) of a file of picks."""
    layers: set[int] = set()
    highest, top_k = -1, 1
    for block in _blocks(path, names, options, 0, whole):
        present, layer = np.unique(block["layer"], return_inverse=True)
        layers |= set(present.tolist())
        highest = max(highest, int(block["expert"].max()))
        cells = (np.cumsum(_begins(_token_keys(block))) - 1) * len(present) + layer
        top_k = max(top_k, int(np.bincount(cells).max()))
    return layers, highest, top_k


def _blocks(path: Path, names: list[str], options: ImportOptions, number: int, whole: bool):
    """Yield dicts of columns, sorted by token, no token in two of them; _Unsorted where the file is
    not, and not to be read ``whole``."""
    kept: list[dict[str, np.ndarray]] = []
    last = -1
    for block in _batches(path, names, options, number):
        kept.append(block)
        if whole or not len(block["layer"]):
            continue
        block = _join(kept)
        token = _token_keys(block)
        if (token[1:] < token[:-1]).any() or token[0] < last:
            raise _Unsorted
        cut, last = int(np.searchsorted(token, token[-1])), int(token[-1])
        kept = [{name: column[cut:] for name, column in block.items()}]
        if cut:
            yield {name: column[:cut] for name, column in block.items()}
    if kept and sum(len(block["layer"]) for block in kept):
        rest = _join(kept)
        order = np.argsort(_token_keys(rest), kind="stable")
        yield {name: column[order] for name, column in rest.items()}


def _begins(keys: np.ndarray) -> np.ndarray:
    """bool, where the rows of another key begin."""
    return np.r_[True, keys[1:] != keys[:-1]]


def _join(blocks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _token_keys(block: dict[str, np.ndarray]) -> np.ndarray:
    """int64, rising with request and position."""
    return (block["request_id"] << 31) + block["position"]


def _batches(path: Path, names: list[str], options: ImportOptions, number: int):
    """Yield dicts of the columns as numpy arrays, checked; text as stage codes and names."""
    no_integers = {"stage": pa.string(), "domain": pa.string(), "weight": pa.float32()}
    types = {name: no_integers.get(name, pa.int64()) for name in names}
    size, done = max(path.stat().st_size, 1), 0
    try:
        reader = pacsv.open_csv(
            path,
            read_options=pacsv.ReadOptions(column_names=names, skip_rows=1, block_size=BLOCK_BYTES),
            convert_options=pacsv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )
        for batch in reader:
            done += batch.nbytes
            if options.report is not None:
                options.report(min(done, size) + number * size, 2 * size)
            yield _checked_batch(path, batch)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, TraceError):
            raise
        raise _unreadable(path, str(error).splitlines()[0], LONG) from error


def _checked_batch(path: Path, batch: Any) -> dict[str, np.ndarray]:
    block: dict[str, np.ndarray] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if column.null_count:
            raise _unreadable(path, f"an empty cell in column {name!r}", LONG)
        block[name] = np.asarray(column.to_numpy(zero_copy_only=False))
    block.setdefault("request_id", np.zeros(len(block["layer"]), np.int64))
    for name in ("request_id", *LONG):
        if len(block[name]) and not 0 <= block[name].min() <= block[name].max() < 2**31:
            raise _unreadable(path, f"column {name} outside 0..{2**31 - 1}", LONG)
    if "stage" in block:
        known, place = np.unique(block["stage"].astype(str), return_inverse=True)
        codes = [_stage_of(path, name) for name in known.tolist()]
        block["stage"] = np.array(codes, np.int64)[place]  # a block may have no row
    return block


def _stage_of(path: Path, text: str) -> int:
    code = int(text) if text.isdecimal() and len(text) < 4 else text
    aliases = {"": UNKNOWN, "prompt": PREFILL, "generation": DECODE}
    return reading.stage_code(str(path), aliases.get(text, code))


def _pick_trace(block: dict[str, np.ndarray], common: dict[str, Any], top_k: int) -> RoutingTrace:
    """A trace from rows of picks that are sorted by token."""
    token, layer_ids = _token_keys(block), common["layer_ids"]
    first = np.flatnonzero(_begins(token))
    row = np.cumsum(_begins(token)) - 1
    layer = np.searchsorted(layer_ids, block["layer"])
    order = np.lexsort((block.get("k", np.arange(len(token))), layer, row))
    cell = (row * len(layer_ids) + layer)[order]
    starts = np.flatnonzero(_begins(cell))
    place = np.arange(len(cell)) - np.repeat(starts, np.diff(np.r_[starts, len(cell)]))
    shape = (len(first), len(layer_ids), top_k)
    ids = np.full(shape, -1, np.int64)
    ids[row[order], layer[order], place] = block["expert"][order]
    weights = None
    if "weight" in block:
        weights = np.zeros(shape, np.float16)
        weights[row[order], layer[order], place] = block["weight"][order]
    domain_id, domain = None, ()
    if "domain" in block:
        names, index = np.unique(block["domain"][first].astype(str), return_inverse=True)
        domain = tuple(name for name in names.tolist() if name)
        domain_id = index - (len(names) - len(domain))  # the empty name sorts first: unknown, -1
    return RoutingTrace(
        **common,
        domain=domain,
        expert_ids=ids,
        expert_weights=weights,
        request_id=block["request_id"][first],
        position=block["position"][first],
        stage=block["stage"][first] if "stage" in block else None,
        domain_id=domain_id,
    )


def _unreadable(path: Path, detail: str, columns: tuple[str, ...]) -> TraceError:
    return TraceError(
        f"found that {path} cannot be read as a routing CSV: {detail}; expected the columns "
        f"{columns} and whole numbers: see docs/formats.md"
    )
