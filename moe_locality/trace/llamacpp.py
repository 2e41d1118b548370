"""Importer of the expert log of llama.cpp's ``moe-trace`` example (ggml-org/llama.cpp PR 28544):
CSV, one row ``layer,expert`` for every routed pick, with or without that header, of one prompt and
a greedy continuation. The rows of a layer of one micro-batch follow each other, token by token, the
K picks of a token in the order of the router. What the format does not say, and what is made of it:

* K: the greatest common divisor of the lengths of the runs of one layer, which is K where single
  tokens were decoded; else give ``top_k``;
* tokens: a layer that does not rise begins the next micro-batch. All layers of a micro-batch have
  the same tokens but the last, where llama.cpp computes only the tokens whose output is asked for:
  its picks belong to the last tokens, the others have none;
* stages: the trailing micro-batches of one token are decode, the others prefill;
* requests: logs that were put into one file are told apart by their headers, and where several
  tokens follow a single one: a prompt after a continuation.

Early versions wrote wrong prefill rows (docs/formats.md): tokens show experts twice, and the import
fails. A log with the columns position (or token), layer and expert is the generic CSV.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace import reading
from moe_locality.trace.reading import PART_PICKS, ImportOptions
from moe_locality.trace.schema import DECODE, PREFILL, RoutingTrace

HEADER = ["layer", "expert"]


def parts(path: Path, options: ImportOptions) -> Iterator[RoutingTrace]:
    """Yield the trace of a file in parts; the numbers are held in memory, 8 bytes per pick.
    TraceError where the rows are no such log, or do not fit a K."""
    rows, headers = _read(path, options)
    layer_ids = np.unique(rows[:, 0])
    starts = np.flatnonzero(np.r_[True, rows[1:, 0] != rows[:-1, 0]])
    starts = np.union1d(starts, np.array(headers, np.int64))
    lengths = np.diff(np.r_[starts, len(rows)])
    top_k = _picks_per_token(path, lengths, len(layer_ids), options)
    tokens = lengths // top_k
    layer = rows[starts, 0]
    begins = np.r_[True, layer[1:] <= layer[:-1]] | np.isin(starts, headers)
    batch = np.cumsum(begins) - 1
    size = np.zeros(batch[-1] + 1, np.int64)
    np.maximum.at(size, batch, tokens)
    short = np.flatnonzero((tokens != size[batch]) & (layer != layer_ids[-1]))
    if len(short):
        run = short[0]
        raise TraceError(
            f"{path}, pick {starts[run] + 1}: found {tokens[run]} tokens in layer {layer[run]} and "
            f"{size[batch[run]]} in another layer of the same micro-batch, expected the same: give "
            "the right top_k=, or record again"
        )
    highest = int(rows[:, 1].max())
    num_experts = options.num_experts or reading.guess_num_experts(path, highest, top_k)
    ids = np.full((int(size.sum()), len(layer_ids), top_k), -1, np.int64)
    last = np.cumsum(size)[batch]  # picks of a run belong to the last tokens of its micro-batch
    column = np.searchsorted(layer_ids, layer)
    for run in range(len(starts)):
        picks = rows[starts[run] : starts[run] + lengths[run], 1].reshape(-1, top_k)
        ids[last[run] - tokens[run] : last[run], column[run]] = picks
    begins_log = np.isin(starts[begins], headers) | np.r_[True, (size[1:] > 1) & (size[:-1] == 1)]
    firsts = np.flatnonzero(begins_log)
    stage = np.repeat(np.concatenate([_stages(s) for s in np.split(size, firsts[1:])]), size)
    request = np.repeat(np.cumsum(begins_log) - 1, size)
    position = np.arange(len(ids)) - np.searchsorted(request, request)
    step = max(PART_PICKS // max(len(layer_ids) * top_k, 1), 1)
    for first in range(0, len(ids), step):
        part = slice(first, first + step)
        with reading.named(path, f" (read with top_k = {top_k})"):
            yield RoutingTrace(
                model=options.model or "",
                num_experts=num_experts,
                layer_ids=layer_ids,
                expert_ids=ids[part],
                request_id=request[part],
                position=position[part],
                stage=stage[part],
            )


def _read(path: Path, options: ImportOptions) -> tuple[np.ndarray, list[int]]:
    """int32 [picks, 2]: layer and expert; and the picks before which a header stands."""
    numbers, headers = array("i"), set()
    for line, text in reading.text_lines(path, options):
        cells = text.strip().split(",")
        if [cell.strip().lower() for cell in cells] == HEADER:
            headers.add(len(numbers) // 2)
            continue
        try:
            layer, expert = (int(cell) for cell in cells)
            if not (0 <= layer < 2**31 and 0 <= expert < 2**31):
                raise ValueError("a number below 0 or above 2**31 - 1")
        except ValueError as error:
            if not text.strip():
                continue
            raise TraceError(
                f"{path}, line {line}: found {text.strip()[:80]!r} ({error}), expected a layer and "
                "an expert, as llama.cpp's moe-trace writes them"
            ) from error
        numbers.extend((layer, expert))
    if not numbers:
        raise TraceError(f"found no pick in {path}, expected rows of layer and expert")
    picks = np.array(numbers, np.int32).reshape(-1, 2)
    return picks, sorted(header for header in headers if header < len(picks))


def _picks_per_token(
    path: Path, lengths: np.ndarray, num_layers: int, options: ImportOptions
) -> int:
    found = int(np.gcd.reduce(lengths))
    if options.top_k is None and num_layers == 1:
        raise TraceError(
            f"found a single layer in {path}, where tokens cannot be told apart: give top_k="
        )
    top_k = options.top_k or found
    if found % top_k or top_k > 1024:
        raise TraceError(
            f"found runs of {sorted(set(lengths.tolist()))[:8]} picks in {path}, expected multiples"
            f" of top_k = {top_k} (at most 1024): give the right one"
        )
    return top_k


def _stages(size: np.ndarray) -> np.ndarray:
    """Stage of each micro-batch: the trailing ones of a single token are decode."""
    several = np.flatnonzero(size > 1)
    first = int(several[-1]) + 1 if len(several) else 1
    return np.where(np.arange(len(size)) < first, PREFILL, DECODE)
