"""Importer of SGLang's expert-distribution dumps.

``expert_distribution_recorder_*.pt``, written by ``/dump_expert_distribution_record`` (sgl-project/
sglang, python/sglang/srt/eplb/expert_distribution.py), one file or a directory of them. What
``--expert-distribution-recorder-mode`` makes of it:

* ``stat``, ``stat_approx``: ``{"rank", "logical_count" [steps, layers, E], ...}``: a trace of
  counts. Steps without any pick (the unused end of the buffer) are left out.
* ``per_pass``: ``{"records": [{"forward_pass_id", "rank", "global_physical_count" [layers, P]}],
  "last_physical_to_logical_map" [layers, P]}``: a trace of counts, the ranks of a pass added up.
* ``per_token``: the records also hold ``topk_ids_of_layer [layers, tokens, 8]`` (-1 beyond K),
  ``positions``, ``extend_seq_lens`` and ``forward_mode`` (1 prefill, 2 decode): a trace of tokens.

The dumps hold *physical* ids; they become logical by ``last_physical_to_logical_map``, the map at
the end of the recording, so switch rebalancing off while you record. Request ids are not recorded:
in prefill ``extend_seq_lens`` cuts a pass into requests, and a piece (or a decoded token) belongs
to the request of its rank that its first position continues, the oldest where several do: a guess,
which confuses requests of equal length. Layers without any pick are dense ones and are left out.
Ranks of tensor parallelism without attention data parallelism record the same tokens: such a copy
is left out, with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace.reading import ImportOptions, is_count
from moe_locality.trace.schema import DECODE, PREFILL, UNKNOWN, RoutingTrace
from moe_locality.trace.torchfile import read_torch_file

_log = logging.getLogger(__name__)
_STAGES = {1: PREFILL, 2: DECODE}


def parts(paths: Sequence[Path], options: ImportOptions) -> Iterator[RoutingTrace]:
    """Yield the trace of one or more dumps of one recording; each file is held in memory.

    Raises:
        TraceError: a file is damaged, is no such dump, or does not fit the others.
    """
    dumps = []
    total = sum(path.stat().st_size for path in paths)
    for number, path in enumerate(paths):
        if options.report is not None:
            options.report(sum(p.stat().st_size for p in paths[:number]), total)
        content = read_torch_file(path)
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
        per_token = "topk_ids_of_layer" in records[0][1]
        yield (_from_tokens if per_token else _from_passes)(paths[0], records, options)
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        if isinstance(error, TraceError):
            raise
        raise _strange(paths[0], f"{type(error).__name__} {error}") from error


def _records(path: Path, content: dict[str, Any]) -> list[tuple[Path, dict[str, Any], np.ndarray]]:
    records, table = content.get("records"), content.get("last_physical_to_logical_map")
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise _strange(path, f"the keys {sorted(map(str, content))[:8]}")
    table = _whole(path, "last_physical_to_logical_map", table, 2)
    if table.size == 0 or table.min() < 0:
        raise _strange(path, "an empty or negative last_physical_to_logical_map")
    return [(path, record, table) for record in records]


def _whole(path: Path, name: str, value: Any, ndim: int) -> np.ndarray:
    array = np.asarray(value)
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
    counts = [_whole(path, "logical_count", c["logical_count"], 3) for path, c in dumps]
    if len({count.shape[1:] for count in counts}) > 1:
        raise _strange(dumps[0][0], "dumps with different layers or experts")
    return _load_trace(dumps[0][0], np.concatenate(counts), None, options)


def _load_trace(
    path: Path, counts: np.ndarray, step: np.ndarray | None, options: ImportOptions
) -> RoutingTrace:
    """A trace of the counts [S, L, E] without empty steps and layers."""
    if counts.size == 0 or counts.min() < 0 or not counts.any():
        raise _strange(path, "no count above 0, or one below")
    if options.num_experts not in (None, counts.shape[2]):
        raise TraceError(
            f"{path}: found counts of {counts.shape[2]} experts, expected {options.num_experts} as "
            "asked: leave num_experts out"
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


def _from_passes(
    path: Path, records: list[tuple[Path, dict[str, Any], np.ndarray]], options: ImportOptions
) -> RoutingTrace:
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
    return _load_trace(path, np.stack([of_pass[n] for n in sorted(of_pass)]), step, options)


def _number(path: Path, record: dict[str, Any], name: str) -> int:
    value = record.get(name)
    if not is_count(value):
        raise _strange(path, f"{name} {value!r} in a record")
    return value


# -- tokens --


def _from_tokens(
    path: Path, records: list[tuple[Path, dict[str, Any], np.ndarray]], options: ImportOptions
) -> RoutingTrace:
    blocks, positions, stages, requests, ranks, steps = [], [], [], [], [], []
    open_requests: dict[int, dict[int, list[int]]] = {}
    experts, next_request = 0, [0]
    seen: dict[Any, int] = {}
    copies: set[int] = set()
    for file, record, table in records:
        ids = _logical(file, record, table)
        rank, step = _number(file, record, "rank"), _number(file, record, "forward_pass_id")
        position = _whole(file, "positions", record.get("positions"), 1)
        if len(position) != len(ids) or (len(position) and position.min() < 0):
            raise _strange(file, f"{len(position)} positions for {len(ids)} tokens")
        key = (step, ids.tobytes(), position.tobytes())
        if seen.setdefault(key, rank) != rank:
            copies.add(rank)
            continue
        experts = max(experts, int(table.max()) + 1)
        stage = _STAGES.get(record.get("forward_mode"), UNKNOWN)  # type: ignore[arg-type]
        lengths = _pieces(file, record, len(ids))
        waiting = open_requests.setdefault(rank, {})
        requests.append(_assign(position, lengths, waiting, next_request))
        blocks.append(ids)
        positions.append(position)
        stages.append(np.full(len(ids), stage))
        ranks.append(np.full(len(ids), rank))
        steps.append(np.full(len(ids), step))
    if copies:
        _log.warning("%s: left out tokens of ranks %s, copies of another's", path, sorted(copies))
    if len({block.shape[1] for block in blocks}) > 1:
        raise _strange(path, "records with different layers")
    width = max(block.shape[2] for block in blocks)
    blocks = [
        np.pad(b, ((0, 0), (0, 0), (0, width - b.shape[2])), constant_values=-1) for b in blocks
    ]
    ids = np.concatenate(blocks)
    layers, columns = (ids >= 0).any(axis=(0, 2)), (ids >= 0).any(axis=(0, 1))
    if not layers.any():
        raise _strange(path, "no pick in any layer")
    return RoutingTrace(
        model=options.model or "",
        num_experts=options.num_experts or experts,
        layer_ids=np.flatnonzero(layers),
        expert_ids=ids[:, layers][:, :, columns],
        request_id=np.concatenate(requests),
        position=np.concatenate(positions),
        stage=np.concatenate(stages),
        rank=np.concatenate(ranks),
        step=np.concatenate(steps),
    )


def _logical(path: Path, record: dict[str, Any], table: np.ndarray) -> np.ndarray:
    """[tokens, layers, K] logical ids of a record, -1 = none."""
    ids = _whole(path, "topk_ids_of_layer", record["topk_ids_of_layer"], 3)
    if len(ids) != len(table) or (ids.size and not -1 <= ids.min() <= ids.max() < table.shape[1]):
        raise _strange(path, f"picks of shape {ids.shape} outside a map of shape {table.shape}")
    logical = np.take_along_axis(table, np.maximum(ids, 0).reshape(len(ids), -1), axis=1).reshape(
        ids.shape
    )
    return np.where(ids < 0, -1, logical).transpose(1, 0, 2)


def _pieces(path: Path, record: dict[str, Any], num_tokens: int) -> list[int]:
    """Lengths of the pieces of requests in a pass; decode has one token of each."""
    lengths = record.get("extend_seq_lens")
    if lengths is None:
        return [1] * num_tokens
    lengths = _whole(path, "extend_seq_lens", lengths, 1).tolist()
    if sum(lengths) > num_tokens or any(n < 0 for n in lengths):
        raise _strange(path, f"pieces of {sum(lengths)} tokens in a pass of {num_tokens}")
    return [*lengths, *[1] * (num_tokens - sum(lengths))]  # what is left is padding or decode


def _assign(
    position: np.ndarray,
    lengths: list[int],
    waiting: dict[int, list[int]],
    next_request: list[int],
) -> np.ndarray:
    """Request of each token; ``waiting``: next position → requests that are there."""
    requests, first = [], 0
    left: list[tuple[int, int]] = []
    for length in lengths:
        if not length:
            continue
        start = int(position[first])
        if start and waiting.get(start):
            request = waiting[start].pop(0)
        else:
            request = next_request[0]
            next_request[0] += 1
        requests.append(np.full(length, request, np.int64))
        first += length
        left.append((int(position[first - 1]) + 1, request))
    for place, request in left:  # only now: a pass holds each request once
        waiting.setdefault(place, []).append(request)
    return np.concatenate(requests) if requests else np.zeros(0, np.int64)
