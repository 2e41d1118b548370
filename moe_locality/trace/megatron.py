"""Reader of the routing records of Megatron-LM (``--moe-routing-trace-path``).

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

import json
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace.schema import RoutingTrace

_log = logging.getLogger(__name__)
_NUMBERS = ("step", "layer", "rank", "num_tokens", "topk")


def read_ranks(
    paths: Sequence[Path], *, model: str | None = None, num_experts: int | None = None
) -> RoutingTrace:
    """Read the files of one or more ranks of one pipeline stage.

    Raises:
        TraceError: a line is no such record, or the layers of a step do not cover the same tokens.
        A last step that was
            cut off is left out, with a warning.
    """
    passes: list[tuple[int, int, dict[int, np.ndarray]]] = []
    for path in paths:
        passes += _passes(path)
    if not passes:
        raise TraceError(
            f"found no complete decoder record in {paths[0]}, expected at least one step: record "
            "again with --moe-routing-trace-path"
        )
    layers = sorted(passes[0][2])
    for _, step, picks in passes:
        if sorted(picks) != layers:
            raise TraceError(
                f"found layers {sorted(picks)} in step {step}, expected {layers} as in the first: "
                "import the ranks of each pipeline stage on their own"
            )
    lengths = [len(picks[layers[0]]) for _, _, picks in passes]
    ids = np.concatenate(
        [np.stack([picks[layer] for layer in layers], axis=1) for _, _, picks in passes]
    )
    try:
        return RoutingTrace(
            model=model or "",
            num_experts=num_experts or guess_num_experts(paths[0], ids),
            layer_ids=np.array(layers),
            expert_ids=ids,
            request_id=np.repeat(np.arange(len(passes)), lengths),
            position=np.concatenate([np.arange(length) for length in lengths]),
            rank=np.repeat([rank for rank, _, _ in passes], lengths),
            step=np.repeat([step for _, step, _ in passes], lengths),
        )
    except TraceError as error:
        raise TraceError(f"{paths[0]}: {error}") from error


def _passes(path: Path) -> list[tuple[int, int, dict[int, np.ndarray]]]:
    """Forward passes of a file: (rank, step, picks [T, K] by layer)."""
    found: dict[tuple[int, int], dict[int, list[np.ndarray]]] = defaultdict(
        lambda: defaultdict(list)
    )
    num_mtp = 0
    for line, record in read_lines(path):
        where = f"{path}, line {line}"
        picks = _picks(where, record)
        if record["block"] == "mtp":
            num_mtp += 1
            continue
        found[record["rank"], record["step"]][record["layer"]].append(picks)
    if num_mtp:
        _log.warning(
            "%s: left out %d records of multi-token-prediction layers (their numbers clash with "
            "decoder layers)",
            path,
            num_mtp,
        )
    layers = {layer for parts in found.values() for layer in parts}
    result = []
    for number, ((rank, step), parts) in enumerate(found.items()):
        counts = {len(parts[layer]) if layer in parts else 0 for layer in layers}
        if len(counts) > 1:
            text = f"{path}: found that step {step} lacks records of some layers"
            if number + 1 < len(found):
                raise TraceError(
                    f"{text}, expected each layer equally often: the file is damaged; record again"
                )
            _log.warning("%s; it is the last one: kept its %d complete passes", text, min(counts))
        for i in range(min(counts)):
            picks = {layer: parts[layer][i] for layer in layers}
            if len({block.shape for block in picks.values()}) > 1:
                raise TraceError(
                    f"{path}: found layers of step {step} with different token counts "
                    f"{sorted({block.shape for block in picks.values()})}, expected the same "
                    "tokens in each"
                )
            result.append((rank, step, picks))
    return result


def _picks(where: str, record: dict[str, Any]) -> np.ndarray:
    for name in _NUMBERS:
        if type(record.get(name)) is not int or record[name] < 0:
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
    if picks.size == 0 and 0 in shape:
        return np.zeros(shape, np.int64)
    if picks.shape != shape or picks.dtype.kind not in "iu":
        raise TraceError(
            f"{where}: found top_indices of shape {picks.shape}, expected whole numbers of shape "
            f"{shape} (num_tokens, topk)"
        )
    return picks


def read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Objects of a JSON-lines file with their line numbers; empty lines are skipped.

    Raises:
        TraceError: a line is no JSON object; the message names it.
    """
    records = []
    try:
        with open(path, encoding="utf-8") as file:
            for line, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    record = json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise TraceError(
                        f"{path}, line {line}: found no JSON ({error}), expected one object per "
                        "line: correct or remove the line"
                    ) from error
                if not isinstance(record, dict):
                    raise TraceError(
                        f"{path}, line {line}: found a {type(record).__name__}, expected an object"
                    )
                records.append((line, record))
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(
            f"found that {path} cannot be read as text ({error}), expected JSON lines in UTF-8"
        ) from error
    return records


def guess_num_experts(path: Path, ids: np.ndarray) -> int:
    """Highest id + 1, with a warning: experts that were never picked leave no mark in the file."""
    guess = max(int(ids.max(initial=-1)) + 1, ids.shape[2])
    _log.warning(
        "%s does not say how many experts a layer has; taking %d, the highest id seen plus one: "
        "pass num_experts if the model has more",
        path,
        guess,
    )
    return guess
