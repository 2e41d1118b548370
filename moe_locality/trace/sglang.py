"""Importer of SGLang's expert-distribution dumps.

``expert_distribution_recorder_*.pt``, written by ``/dump_expert_distribution_record`` (sgl-project/
sglang, python/sglang/srt/eplb/expert_distribution.py), one file or a directory of them. What
``--expert-distribution-recorder-mode`` makes of it:

* ``stat``, ``stat_approx``: ``{"rank", "logical_count" [steps, layers, E], ...}``: a trace of
  counts. Steps without any pick (the unused end of the buffer) are left out.
* ``per_pass``: ``{"records": [{"forward_pass_id", "rank", "global_physical_count" [layers, P]}],
  "last_physical_to_logical_map" [layers, P]}``: a trace of counts, the ranks of a pass added up.
* ``per_token``: the records also hold ``topk_ids_of_layer [layers, tokens, 8]`` (-1 beyond K),
  ``positions``, ``extend_seq_lens`` and ``forward_mode`` (1 prefill, 2 decode, 5 verification of
  draft tokens): a trace of tokens.

The dumps hold *physical* ids; they become logical by the map at the end of the recording. Request
ids are not recorded: in prefill ``extend_seq_lens`` cuts a pass into requests, and a piece (or a
decoded token) belongs to the request of its rank that its first position continues, the oldest
where several do: a guess. Of draft tokens, of idle passes and of layers of different sizes see
docs/formats.md. Layers without any pick, dense ones, are left out, and with a warning copies: ranks
of tensor parallelism without attention data parallelism record the same tokens.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace import reading
from moe_locality.trace.reading import ImportOptions
from moe_locality.trace.schema import DECODE, MAX_EXPERTS, PREFILL, UNKNOWN, RoutingTrace

_log = logging.getLogger(__name__)
_VERIFY = 5
_STAGES = {1: PREFILL, 2: DECODE, _VERIFY: DECODE}

Records = list[tuple[Path, dict[str, Any], np.ndarray]]
"""(file, record of a forward pass, logical expert of each slot [layers, P])"""


def parts(paths: Sequence[Path], options: ImportOptions) -> Iterator[RoutingTrace]:
    """Yield the trace of one or more dumps of one recording; each file is held in memory.
    TraceError where one is damaged, no such dump, or does not fit the others."""
    dumps = []
    total = sum(path.stat().st_size for path in paths)
    for number, path in enumerate(paths):
        if options.report is not None:
            options.report(sum(p.stat().st_size for p in paths[:number]), total)
        with open(path, "rb") as file:
            is_json = file.read(64).lstrip().startswith(b"{")
        content = reading.whole_json(path) if is_json else reading.read_torch_file(path)
        if not isinstance(content, dict):
            raise _strange(path, f"a {type(content).__name__}")
        dumps.append((path, content))
    try:
        if all("logical_count" in content for _, content in dumps):
            yield _from_counts(dumps, options)
            return
        records = [record for path, content in dumps for record in _records(path, content)]
        if not records:
            raise _strange(paths[0], "no record of a forward pass")
        per_token = any("topk_ids_of_layer" in record for _, record, _ in records)
        yield (_from_tokens if per_token else _from_passes)(paths[0], records, options)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        if isinstance(error, TraceError):
            raise
        raise _strange(paths[0], f"{type(error).__name__} {error}") from error


def _records(path: Path, content: dict[str, Any]) -> Records:
    records, table = content.get("records"), content.get("last_physical_to_logical_map")
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise _strange(path, f"the keys {sorted(map(str, content))[:8]}")
    table = _whole(path, "last_physical_to_logical_map", table, 2)
    if table.size == 0 or table.min() < 0:
        raise _strange(path, "an empty or negative last_physical_to_logical_map")
    if table.max() >= MAX_EXPERTS:
        raise _strange(path, f"the expert {table.max()} (of {MAX_EXPERTS} at most)")
    return [(path, record, table) for record in records]


def _whole(path: Path, name: str, value: Any, ndim: int) -> np.ndarray:
    array = np.asarray(value)
    if array.size == 0 and array.ndim == ndim:  # an empty list has no type of its own
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.ndim != ndim:
        raise TraceError(
            f"{path}: found {name} as {array.dtype} of shape {array.shape}, expected whole numbers "
            f"with {ndim} dimensions (SGLang expert-distribution dump)"
        )
    return array.astype(np.int64)


def _strange(path: Path, found: str) -> TraceError:
    return TraceError(
        f"{path}: found {found}, expected an SGLang expert-distribution dump with logical_count, "
        "or with records and last_physical_to_logical_map"
    )


# -- counts --


def _from_counts(dumps: list[tuple[Path, dict[str, Any]]], options: ImportOptions) -> RoutingTrace:
    counts = []
    for path, content in dumps:
        table = content["logical_count"]
        if isinstance(table, list):
            table = _even(path, table, options)
        counts.append(_whole(path, "logical_count", table, 3))
    if len({count.shape[1:] for count in counts}) > 1:
        raise _strange(dumps[0][0], "dumps with different layers or experts")
    return _load_trace(dumps[0][0], np.concatenate(counts), None, options)


def _even(path: Path, table: list[Any], options: ImportOptions) -> Any:
    """Counts [layers][E] or [steps][layers][E] as the latter; layers not asked for are zero."""
    has_steps = any(isinstance(cell, list) for row in table for cell in row)
    steps = table if has_steps else [table]
    chosen = _chosen(options, max(map(len, steps)))
    sizes = {
        layer: len(row)
        for step in steps
        for layer, row in enumerate(step)
        if chosen[layer] and any(row)
    }
    none = [0] * reading.one_size(str(path), sizes)
    return [[row if layer in sizes else none for layer, row in enumerate(step)] for step in steps]


def _chosen(options: ImportOptions, num_layers: int) -> np.ndarray:
    """bool [layers], those asked for."""
    chosen = np.isin(np.arange(num_layers), np.array(options.layers or (), np.int64))
    return chosen if chosen.any() else ~chosen


def _num_experts(records: Records, layers: np.ndarray) -> int:
    """Experts of each of the layers (bool [L]), which the maps tell."""
    sizes = np.max([table.max(axis=1) for _, _, table in records], axis=0) + 1
    of_layer = {int(i): int(sizes[i]) for i in np.flatnonzero(layers)}
    return reading.one_size(str(records[0][0]), of_layer)


def _load_trace(
    path: Path, counts: np.ndarray, step: np.ndarray | None, options: ImportOptions
) -> RoutingTrace:
    """A trace of the counts [S, L, E] without empty steps and layers."""
    if counts.size == 0 or counts.min() < 0 or not counts.any():
        raise _strange(path, "no count above 0, or one below")
    if options.num_experts not in (None, counts.shape[2]):
        raise TraceError(
            f"{path}: found counts of {counts.shape[2]} experts, expected {options.num_experts} as "
            "asked: leave num_experts= out"
        )
    steps = counts.any(axis=(1, 2))
    layers = counts.any(axis=(0, 2))
    return RoutingTrace(
        model=options.model or "",
        num_experts=counts.shape[2],
        layer_ids=np.flatnonzero(layers),
        expert_load=counts[steps][:, layers],
        step=np.flatnonzero(steps) if step is None else step[steps],
        load_top_k=options.top_k or 0,
    )


def _from_passes(path: Path, records: Records, options: ImportOptions) -> RoutingTrace:
    experts = 1 + max(int(table.max()) for _, _, table in records)
    of_pass: dict[int, np.ndarray] = {}
    seen: set[tuple[int, int]] = set()
    for file, record, table in records:
        number, rank = _number(file, record, "forward_pass_id"), _number(file, record, "rank")
        if (number, rank) in seen:
            raise _strange(file, f"forward pass {number} of rank {rank} twice")
        seen.add((number, rank))
        count = _whole(file, "global_physical_count", record["global_physical_count"], 2)
        if count.shape != table.shape:
            raise _strange(file, f"counts of shape {count.shape} for a map of {table.shape}")
        logical = of_pass.setdefault(number, np.zeros((len(table), experts), np.int64))
        if len(logical) != len(table):
            raise _strange(file, "dumps with different layers")
        np.add.at(logical, (np.arange(len(table))[:, None], table), count)
    step = np.array(sorted(of_pass))
    counts = np.stack([of_pass[number] for number in step])
    counts[:, ~_chosen(options, counts.shape[1])] = 0
    experts = _num_experts(records, np.any(counts, axis=(0, 2)))
    return _load_trace(path, counts[:, :, :experts], step, options)


def _number(path: Path, record: dict[str, Any], name: str) -> int:
    value = record.get(name)
    if not reading.is_count(value):
        raise _strange(path, f"{name} {value!r} in a record")
    return value


# -- tokens --


def _from_tokens(path: Path, records: Records, options: ImportOptions) -> RoutingTrace:
    blocks: list[np.ndarray] = []
    rows: list[dict[str, np.ndarray]] = []
    open_requests: dict[int, _Requests] = {}
    numbers, num_rows = itertools.count(), 0
    seen: dict[Any, int] = {}
    copies: set[int] = set()
    drafts = _draft_tokens(records)
    for file, record, table in records:
        ids = _logical(file, record, table)
        rank, step = _number(file, record, "rank"), _number(file, record, "forward_pass_id")
        position = _whole(file, "positions", record.get("positions"), 1)
        if len(position) != len(ids) or (len(position) and position.min() < 0):
            raise _strange(file, f"{len(position)} positions for {len(ids)} tokens")
        if not len(ids):
            continue
        key = (step, ids.tobytes(), position.tobytes())
        if seen.setdefault(key, rank) != rank:
            copies.add(rank)
            continue
        mode = record.get("forward_mode")
        verify = mode == _VERIFY
        lengths = _pieces(file, record, len(ids), drafts if verify else 1)
        held = open_requests.setdefault(rank, _Requests(numbers))
        labels = {"stage": _STAGES.get(mode, UNKNOWN), "rank": rank, "step": step}  # type: ignore[arg-type]
        columns = {name: np.full(len(ids), value) for name, value in labels.items()}
        request = held.assign(position, lengths, num_rows, verify)
        rows.append({**columns, "position": position, "request_id": request})
        blocks.append(ids)
        num_rows += len(ids)
    if not blocks:
        raise _strange(path, "no token in any forward pass")
    kept = np.ones(num_rows, bool)
    for held in open_requests.values():
        kept[held.rejected()] = False
    if copies:
        _log.warning("%s: left out tokens of ranks %s, copies of another's", path, sorted(copies))
    if len({block.shape[1] for block in blocks}) > 1:
        raise _strange(path, "records with different layers")
    width = max(block.shape[2] for block in blocks)
    blocks = [
        np.pad(b, ((0, 0), (0, 0), (0, width - b.shape[2])), constant_values=-1) for b in blocks
    ]
    ids = np.concatenate(blocks)[kept]
    ids[:, ~_chosen(options, ids.shape[1])] = -1
    picked = ids >= 0
    layers, columns = np.any(picked, axis=(0, 2)), np.any(picked, axis=(0, 1))
    if not layers.any():
        raise _strange(path, "no pick in any layer")
    return RoutingTrace(
        model=options.model or "",
        num_experts=options.num_experts or _num_experts(records, layers),
        layer_ids=np.flatnonzero(layers),
        expert_ids=ids[:, layers][:, :, columns],
        **{n: np.concatenate([row[n] for row in rows])[kept] for n in rows[0]},  # type: ignore[arg-type]
    )


def _logical(path: Path, record: dict[str, Any], table: np.ndarray) -> np.ndarray:
    """[tokens, layers, K] logical ids of a record, -1 = none."""
    ids = _whole(path, "topk_ids_of_layer", record["topk_ids_of_layer"], 3)
    if len(ids) != len(table) or (ids.size and not -1 <= ids.min() <= ids.max() < table.shape[1]):
        raise _strange(path, f"picks of shape {ids.shape} outside a map of shape {table.shape}")
    logical = table[np.arange(len(table))[:, None, None], np.maximum(ids, 0)]
    return np.where(ids < 0, -1, logical).transpose(1, 0, 2)


def _draft_tokens(records: Records) -> int:
    """Tokens of a request in a pass that verifies drafts: the largest number that cuts all such
    passes into pieces of a least position, first, and those that follow it without a gap."""
    passes = [
        _whole(file, "positions", record.get("positions"), 1)
        for file, record, _ in records
        if record.get("forward_mode") == _VERIFY and record.get("extend_seq_lens") is None
    ]
    passes = [position for position in passes if len(position)]
    most = int(np.gcd.reduce([len(position) for position in passes])) if passes else 1
    for number in range(most, 1, -1):
        if most % number:
            continue
        pieces = np.concatenate([position.reshape(-1, number) for position in passes])
        steps = np.diff(np.sort(pieces, axis=1), axis=1)
        if (steps <= 1).all() and (pieces[:, 1:] > pieces[:, :1]).all():
            return number
    return 1


def _pieces(path: Path, record: dict[str, Any], num_tokens: int, size: int) -> list[int]:
    """Lengths of the pieces of requests in a pass; decode has one token, verification ``size``."""
    lengths = record.get("extend_seq_lens")
    if lengths is None:
        return [size] * (num_tokens // size) + [1] * (num_tokens % size)
    lengths = _whole(path, "extend_seq_lens", lengths, 1).tolist()
    if sum(lengths) > num_tokens or any(n < 0 for n in lengths):
        raise _strange(path, f"pieces of {sum(lengths)} tokens in a pass of {num_tokens}")
    return [*lengths, *[1] * (num_tokens - sum(lengths))]  # what is left is padding or decode


class _Requests:
    """The requests of a rank that go on. ``waiting``: position → those that may begin their next
    piece there, the oldest first; ``places``: request → these positions; ``drafts``: request →
    (row, positions) of its last piece where that was one of drafts."""

    def __init__(self, numbers: Iterator[int]) -> None:
        self.numbers = numbers
        self.waiting: dict[int, list[int]] = {}
        self.places: dict[int, list[int]] = {}
        self.drafts: dict[int, tuple[int, np.ndarray]] = {}
        self.dropped: list[np.ndarray] = []

    def assign(
        self, position: np.ndarray, lengths: list[int], first_row: int, verify: bool
    ) -> np.ndarray:
        """Request of each token of a pass; ``first_row``: number of its first token."""
        requests, first = [], 0
        left: list[tuple[int, list[int]]] = []
        for length in filter(None, lengths):
            piece = position[first : first + length]
            request = self._of(int(piece[0]))
            requests.append(np.full(length, request, np.int64))
            if verify:
                self.drafts[request] = (first_row + first, piece)
                last = min(piece.max(), piece[0] + length - 1)  # drafts have no gap
                left.append((request, list(range(int(piece[0]) + 1, int(last) + 2))))
            else:
                left.append((request, [int(piece[-1]) + 1]))
            first += length
        for request, places in left:  # only now: a pass holds each request once
            self.places[request] = places
            for place in places:
                self.waiting.setdefault(place, []).append(request)
        return np.concatenate(requests) if requests else np.zeros(0, np.int64)

    def _of(self, start: int) -> int:
        if not start or not self.waiting.get(start):
            return next(self.numbers)
        request = self.waiting[start][0]
        for place in self.places.pop(request):
            self.waiting[place].remove(request)
        self._drop(request, start)
        return request

    def _drop(self, request: int, next_start: int) -> None:
        row, piece = self.drafts.pop(request, (0, np.zeros(0, np.int64)))
        _, place, count = np.unique(piece, return_inverse=True, return_counts=True)
        self.dropped.append(row + np.flatnonzero((piece >= next_start) | (count[place] > 1)))

    def rejected(self) -> np.ndarray:
        """Rows of draft tokens that were rejected, or of which that cannot be told."""
        for request, (_, piece) in list(self.drafts.items()):
            self._drop(request, int(piece[0]) + 1)
        return np.concatenate([np.zeros(0, np.int64), *self.dropped]).astype(np.int64)
