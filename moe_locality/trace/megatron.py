"""Importer of the routing records of Megatron-LM (``--moe-routing-trace-path``).

One file ``router_trace_rank{rank}.jsonl`` per rank, one object per forward pass of a router::

    {"step": 0, "stage": "pre_dispatch", "block": "decoder", "layer": 3, "rank": 0,
     "num_tokens": 128, "topk": 8, "top_indices": [[12, 45, ...], ...]}

(megatron/core/transformer/moe/router_trace.py of NVIDIA/Megatron-LM.) What the format does not say,
and what is made of it:

* request boundaries: every forward pass (micro-batch) of a rank is one request, the row of a token
  its position;
* prefill or decode: the stage is unknown ("stage" there is the place of the hook);
* several records of a layer in one step are its micro-batches, in the order of the file. Activation
  recomputation runs routers twice and cannot be told from them;
* layers are numbered within the rank's pipeline stage: read only ranks of one stage together;
* multi-token-prediction layers (``"block": "mtp"``), whose numbers clash: left out, and warned of.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace.reading import ImportOptions, guess_num_experts, in_parts, json_lines, named
from moe_locality.trace.schema import RoutingTrace

_log = logging.getLogger(__name__)
_NUMBERS = ("step", "layer", "rank", "num_tokens", "topk")

Pass = tuple[int, int, dict[int, np.ndarray]]
"""A forward pass: rank, step, and its picks [T, K] by layer."""


def parts(paths: Sequence[Path], options: ImportOptions) -> Iterator[RoutingTrace]:
    """Yield the trace of one or more ranks of one pipeline stage in parts; TraceError where a line
    is no such record, or the layers of a step do not cover the same tokens. A last step that was
    cut off is left out, with a warning."""
    layers, top_k, highest = _measure(paths, options)
    num_experts = options.num_experts or guess_num_experts(paths[0], highest, top_k)
    passes = (one for path in paths for one in _passes(path, options, 1))
    first = 0
    for block in in_parts(passes, lambda one: sum(table.size for table in one[2].values())):
        lengths = [len(picks[layers[0]]) for _, _, picks in block]
        tables = [np.stack([picks[layer] for layer in layers], axis=1) for _, _, picks in block]
        with named(paths[0]):
            yield RoutingTrace(
                model=options.model or "",
                num_experts=num_experts,
                layer_ids=np.array(layers),
                expert_ids=np.concatenate(tables),
                request_id=first + np.repeat(np.arange(len(block)), lengths),
                position=np.concatenate([np.arange(length) for length in lengths]),
                rank=np.repeat([rank for rank, _, _ in block], lengths),
                step=np.repeat([step for _, step, _ in block], lengths),
            )
        first += len(block)


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


def _passes(path: Path, options: ImportOptions, number: int) -> Iterator[Pass]:
    """Yield the forward passes of a file, a step at a time; its micro-batches follow each other."""
    left_out = 0

    def records() -> Iterator[tuple[tuple[int, int], int, np.ndarray]]:
        nonlocal left_out
        for line, record in json_lines(path, options, (number, 2)):
            picks = _picks(f"{path}, line {line}", record)
            if record["block"] == "mtp":
                left_out += 1
            else:
                yield (record["rank"], record["step"]), record["layer"], picks

    layers: set[int] = set()  # all that the file has shown so far
    lacking, held = "", iter(())
    for (rank, step), group in itertools.groupby(records(), key=lambda record: record[0]):
        if lacking:  # only the last step of a file may be cut off
            raise TraceError(
                f"{lacking}, expected each layer equally often: the file is damaged; record again"
            )
        tables: dict[int, list[np.ndarray]] = {}
        for _, layer, picks in group:
            tables.setdefault(layer, []).append(picks)
        layers |= tables.keys()
        passes = _split(path, rank, step, tables, layers)
        if len({len(tables.get(layer, ())) for layer in layers}) > 1:
            lacking, held = f"{path}: found that step {step} lacks records of some layers", passes
        else:
            yield from passes
    if left_out and number == 0:
        _log.warning(
            "%s: left out %d records of multi-token-prediction layers (their numbers clash with "
            "decoder layers)",
            path,
            left_out,
        )
    kept = list(held)
    if lacking and number == 0:
        _log.warning("%s; it is the last one: kept its %d complete passes", lacking, len(kept))
    yield from kept


def _split(
    path: Path, rank: int, step: int, tables: dict[int, list[np.ndarray]], layers: set[int]
) -> Iterator[Pass]:
    """Yield the micro-batches of a step that every layer has."""
    for i in range(min(len(tables.get(layer, ())) for layer in layers)):
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
