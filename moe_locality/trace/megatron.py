"""Importer of the routing records of Megatron-LM (``--moe-routing-trace-path``).

One file ``router_trace_rank{rank}.jsonl`` per rank, one object per forward pass of a router::

    {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 3, "rank": 0,
     "num_tokens": 128, "topk": 8, "top_indices": [[12, 45, ...], ...]}

(megatron/core/transformer/moe/router_trace.py of NVIDIA/Megatron-LM.) What the format does not say,
and what is made of it:

* request boundaries: every forward pass (micro-batch) of a rank is one request, the row of a token
  its position;
* prefill or decode: the stage is unknown ("stage" there is the place of the hook);
* the number of experts and the model: arguments of the importer;
* several records of a layer in one step are its micro-batches, in the order of the file. Activation
  recomputation runs routers twice and cannot be told from micro-batches: switch it off for a
  recording;
* layers are numbered within the rank's pipeline stage: read only ranks of one stage together;
* multi-token-prediction layers (``"block": "mtp"``) have clashing numbers and are left out, with a
  warning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace.reading import PART_PICKS, ImportOptions, guess_num_experts, json_lines
from moe_locality.trace.schema import RoutingTrace

_log = logging.getLogger(__name__)
_NUMBERS = ("step", "layer", "rank", "num_tokens", "topk")

Pass = tuple[int, int, dict[int, np.ndarray]]
"""A forward pass: rank, step, and its picks [T, K] by layer."""


def parts(paths: Sequence[Path], options: ImportOptions) -> Iterator[RoutingTrace]:
    """Yield the trace of one or more ranks of one pipeline stage in parts.

    Raises:
        TraceError: a line is no such record, or the layers of a step do not cover the same tokens.
        A last step that was cut off is left out, with a warning.
    """
    layers, top_k, highest = _measure(paths, options)
    num_experts = options.num_experts or guess_num_experts(paths[0], highest, top_k)
    block: list[Pass] = []
    picks, requests = 0, 0
    for path in paths:
        for one in _passes(path, options, 1):
            block.append(one)
            picks += sum(table.size for table in one[2].values())
            if picks > PART_PICKS:
                yield _to_trace(paths[0], block, layers, num_experts, options, requests)
                block, picks, requests = [], 0, requests + len(block)
    if block:
        yield _to_trace(paths[0], block, layers, num_experts, options, requests)


def _measure(paths: Sequence[Path], options: ImportOptions) -> tuple[list[int], int, int]:
    """Check all files; return their layers, picks per token and highest id."""
    layers: list[int] | None = None
    top_k, highest = 0, -1
    for path in paths:
        for _, step, picks in _passes(path, options, 0):
            layers = sorted(picks) if layers is None else layers
            if sorted(picks) != layers:
                raise TraceError(
                    f"{path}: found layers {sorted(picks)} in step {step}, expected {layers} as in "
                    "the first: import the ranks of each pipeline stage on their own"
                )
            widths = {table.shape[1] for table in picks.values()} | ({top_k} if top_k else set())
            if len(widths) > 1:
                raise TraceError(
                    f"{path}: found topk {sorted(widths)} in step {step}, expected the same in all"
                )
            top_k = widths.pop()
            highest = max(highest, *(int(t.max(initial=-1)) for t in picks.values()))
    if layers is None:
        raise TraceError(
            f"found no complete decoder record in {paths[0]}, expected at least one step: record "
            "again with --moe-routing-trace-path"
        )
    return layers, top_k, highest


def _to_trace(
    path: Path,
    passes: list[Pass],
    layers: list[int],
    num_experts: int,
    options: ImportOptions,
    first_request: int,
) -> RoutingTrace:
    lengths = [len(picks[layers[0]]) for _, _, picks in passes]
    tables = [np.stack([picks[layer] for layer in layers], axis=1) for _, _, picks in passes]
    try:
        return RoutingTrace(
            model=options.model or "",
            num_experts=num_experts,
            layer_ids=np.array(layers),
            expert_ids=np.concatenate(tables),
            request_id=first_request + np.repeat(np.arange(len(passes)), lengths),
            position=np.concatenate([np.arange(length) for length in lengths]),
            rank=np.repeat([rank for rank, _, _ in passes], lengths),
            step=np.repeat([step for _, step, _ in passes], lengths),
        )
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error


def _passes(path: Path, options: ImportOptions, number: int) -> Iterator[Pass]:
    """Yield the forward passes of a file, a step at a time."""
    left_out, layers = 0, set()
    step: tuple[int, int] | None = None
    tables: dict[int, list[np.ndarray]] = {}
    for line, record in json_lines(path, options, (number, 2)):
        picks = _picks(f"{path}, line {line}", record)
        if record["block"] == "mtp":
            left_out += 1
            continue
        begun = record["rank"], record["step"]
        if step is not None and step != begun:
            yield from _split(path, (*step, tables), layers, is_last=False, loud=number == 0)
            tables = {}
        step = begun
        tables.setdefault(record["layer"], []).append(picks)
        layers.add(record["layer"])
    if left_out and number == 0:
        _log.warning(
            "%s: left out %d records of multi-token-prediction layers (their numbers clash with "
            "decoder layers)",
            path,
            left_out,
        )
    if step is not None:
        yield from _split(path, (*step, tables), layers, is_last=True, loud=number == 0)


def _split(
    path: Path,
    found: tuple[int, int, dict[int, list[np.ndarray]]],
    layers: set[int],
    *,
    is_last: bool,
    loud: bool,
) -> Iterator[Pass]:
    """Yield the micro-batches of one step; ``layers``: all that the file has shown so far."""
    rank, step, tables = found
    counts = {len(tables.get(layer, ())) for layer in layers}
    if len(counts) > 1:
        text = f"{path}: found that step {step} lacks records of some layers"
        if not is_last:
            raise TraceError(
                f"{text}, expected each layer equally often: the file is damaged; record again"
            )
        if loud:
            _log.warning("%s; it is the last one: kept its %d complete passes", text, min(counts))
    for i in range(min(counts)):
        picks = {layer: tables[layer][i] for layer in layers}
        shapes = sorted({block.shape for block in picks.values()})
        if len(shapes) > 1:
            raise TraceError(
                f"{path}: found layers of step {step} with different token counts {shapes}, "
                "expected the same tokens in each"
            )
        yield rank, step, picks


def _picks(where: str, record: dict[str, Any]) -> np.ndarray:
    for name in _NUMBERS:
        if type(record.get(name)) is not int or not 0 <= record[name] < 2**31:
            raise TraceError(
                f"{where}: found {name} {record.get(name)!r}, expected a number of at least 0 "
                "(Megatron-LM routing record)"
            )
    if record.get("block") not in ("decoder", "mtp"):
        raise TraceError(
            f"{where}: found block {record.get('block')!r}, expected 'decoder' or 'mtp'"
        )
    shape = (record["num_tokens"], record["topk"])
    try:
        picks = np.array(record["top_indices"])
    except (KeyError, ValueError, OverflowError) as error:
        raise TraceError(f"{where}: found no table of numbers in top_indices ({error})") from error
    if picks.size == 0 and 0 in shape and shape[1] < 2**15:
        return np.zeros(shape, np.int64)
    if picks.shape != shape or picks.dtype.kind not in "iu":
        raise TraceError(
            f"{where}: found top_indices of shape {picks.shape}, expected whole numbers of shape "
            f"{shape} (num_tokens, topk)"
        )
    return picks
