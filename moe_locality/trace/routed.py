"""Importers of the picks that serving engines return with a request (routing replay, "R3").

vLLM, ``--enable-return-routed-experts`` (vllm-project/vllm PR 28284; docs.vllm.ai, "Routed Experts
Return"): an array [tokens, layers, K] per completion, as

* ``.npy``: one request, what ``numpy.save(output.routed_experts)`` writes; ``.npz``: an array per
  request;
* responses of the server (``.json``, or ``.jsonl`` with one per line) with
  ``choices[i].routed_experts``: a base64 .npy file (PR 38939, 0.22 and later: prompt and answer,
  without its last token, which is not fed back; less the prompt rows that the request asked to
  omit, PR 51906), nested lists (0.21: the answer alone, with the prompt in
  ``prompt_routed_experts`` of the response), or ``{"data": base64, "shape": [...], "dtype":
  "int16"}``;
* a JSON list of arrays as nested lists, [tokens][layers][K] each, or one such array.

SGLang, ``return_routed_experts`` (sgl-project/sglang PR 12162): ``meta_info.routed_experts`` of a
response of ``/generate`` is base64 of little-endian int32 [prompt + answer - 1, layers, K], flat.
The response has no K: pass ``top_k``. Responses are one JSON object, a JSON list, or a line each.

Every completion is a request, in the order of the file. Layers that are zero throughout (dense
ones, for which both engines keep a row) are left out. The ids are logical. Model and number of
experts are arguments.
"""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace.reading import (
    PART_PICKS,
    ImportOptions,
    dense_layers,
    guess_num_experts,
    id_block,
    is_count,
    json_lines,
    whole_json,
)
from moe_locality.trace.schema import DECODE, PREFILL, UNKNOWN, RoutingTrace

_DTYPES = ("uint8", "int8", "uint16", "int16", "int32", "int64")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """The picks [tokens, layers, K] of one request; ``prompt``: how many tokens of it are prompt
    (None: unknown), ``start``: position of the first."""

    where: str
    ids: np.ndarray
    prompt: int | None = None
    start: int = 0


# -- what a file holds --


def array_file(path: Path, options: ImportOptions, number: int = 0) -> Iterator[Sequence]:
    """Yield the arrays of a .npy or .npz file; nothing in it is ever unpickled.

    Raises:
        TraceError: it is damaged, or an array has another shape.
    """
    try:
        content = np.load(path, allow_pickle=False)
        names = content.files if isinstance(content, np.lib.npyio.NpzFile) else [""]
        for name in names:
            where = f"{path}, array {name}" if name else str(path)
            yield Sequence(where=where, ids=id_block(where, content[name] if name else content))
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, SyntaxError) as error:
        if isinstance(error, TraceError):
            raise
        raise _unreadable(path, error) from error
    except Exception as error:  # a hostile header raises whatever its parser meets
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> TraceError:
    detail = str(error).splitlines()[0] if str(error) else type(error).__name__
    return TraceError(
        f"found that {path} cannot be read as arrays: {detail}; expected .npy or .npz with "
        "[tokens, layers, picks] per request: save it again"
    )


def responses(path: Path, options: ImportOptions, number: int) -> Iterator[tuple[str, Any]]:
    """Yield (place, response) of a JSON file: one object per line, or one object or list."""
    if _has_lines(path):
        for line, record in json_lines(path, options, (number, 2)):
            yield f"{path}, line {line}", record
        return
    content = whole_json(path)
    if isinstance(content, list) and all(isinstance(entry, dict) for entry in content):
        for place, entry in enumerate(content):
            yield f"{path}, entry {place}", entry
    else:
        yield str(path), content


def _has_lines(path: Path) -> bool:
    """Whether the first line is a JSON object by itself."""
    try:
        first = next(json_lines(path, ImportOptions()), None)
    except TraceError:
        return False
    return first is not None


def vllm_responses(path: Path, options: ImportOptions, number: int) -> Iterator[Sequence]:
    """Yield the completions of responses of vLLM, see the head of this file."""
    for where, response in responses(path, options, number):
        if isinstance(response, list):
            yield from _nested(where, response)
            continue
        if not isinstance(response, dict):
            raise TraceError(f"{where}: found a {type(response).__name__}, expected a response")
        choices = response.get("choices", [response])
        if not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
            raise TraceError(f"{where}: found no list of objects in choices, expected a response")
        prompt = response.get("prompt_routed_experts")
        for place, choice in enumerate(choices):
            spot = f"{where}, choice {place}"
            found = choice.get("routed_experts")
            if found is None:
                raise TraceError(
                    f"{spot}: found no routed_experts, expected them: start vLLM with "
                    "--enable-return-routed-experts"
                )
            answer = _decoded(spot, found)
            if prompt is None:
                yield _with_usage(spot, answer, response)
                continue
            head = _decoded(spot, prompt)
            if head.shape[1:] != answer.shape[1:] and len(answer):
                raise TraceError(
                    f"{spot}: found {head.shape[1:]} layers and picks in the prompt and "
                    f"{answer.shape[1:]} in the answer, expected the same"
                )
            both = np.concatenate([head, answer]) if len(answer) else head
            yield Sequence(where=spot, ids=both, prompt=len(head))


def _nested(where: str, content: list[Any]) -> Iterator[Sequence]:
    """Arrays as nested lists: [tokens][layers][K], or a list of such."""
    depth, probe = 0, content
    while isinstance(probe, list) and probe and depth < 5:
        depth, probe = depth + 1, probe[0]
    for place, entry in enumerate(content if depth == 4 else [content]):
        yield Sequence(
            where=f"{where}, request {place}", ids=id_block(f"{where}, request {place}", entry)
        )


def _decoded(where: str, value: Any) -> np.ndarray:
    """Picks [tokens, layers, K] from any of the encodings."""
    if isinstance(value, dict):
        shape, dtype = value.get("shape"), value.get("dtype")
        if not isinstance(shape, list) or not all(is_count(n) for n in shape):
            raise TraceError(f"{where}: found shape {shape!r}, expected three numbers")
        if dtype not in _DTYPES:
            raise TraceError(f"{where}: found dtype {dtype!r}, expected one of {_DTYPES}")
        raw = np.frombuffer(_base64(where, value.get("data"), np.dtype(dtype).itemsize), dtype)
        if len(shape) != 3 or int(np.prod(shape, dtype=object)) != raw.size:
            raise TraceError(f"{where}: found {raw.size} numbers for the shape {shape}")
        return id_block(where, raw.reshape(shape))
    if isinstance(value, str):
        try:
            content = np.load(io.BytesIO(_base64(where, value, 1)), allow_pickle=False)
        except Exception as error:  # hostile bytes raise whatever the parser meets
            if isinstance(error, TraceError):
                raise
            raise TraceError(
                f"{where}: found no .npy file in the base64 text ({error}), expected vLLM's "
                "routed_experts; SGLang's are imported with format 'sglang'"
            ) from error
        return id_block(where, content)
    return id_block(where, value)


def _base64(where: str, text: Any, itemsize: int) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True)
    except (ValueError, TypeError) as error:
        raise TraceError(f"{where}: found no base64 text ({error}), expected picks") from error
    if len(raw) % itemsize:
        raise TraceError(f"{where}: found {len(raw)} bytes, expected a multiple of {itemsize}")
    return raw


def _with_usage(where: str, ids: np.ndarray, response: dict[str, Any]) -> Sequence:
    """Prompt and answer in one array; ``usage`` tells them apart, and what was omitted in front."""
    usage = response.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    prompt, answer = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not is_count(prompt) or not is_count(answer) or len(response.get("choices", [0])) > 1:
        return Sequence(where=where, ids=ids)
    start = max(prompt + answer - 1 - len(ids), 0)
    return Sequence(where=where, ids=ids, prompt=max(prompt - start, 0), start=start)


def sglang_responses(path: Path, options: ImportOptions, number: int) -> Iterator[Sequence]:
    """Yield the completions of responses of SGLang's ``/generate``."""
    if options.top_k is None:
        raise TraceError(
            f"found SGLang responses in {path}, which do not say how many experts a token picks: "
            "pass top_k"
        )
    for where, response in responses(path, options, number):
        meta = response.get("meta_info") if isinstance(response, dict) else None
        if not isinstance(meta, dict) or "routed_experts" not in meta:
            raise TraceError(
                f"{where}: found no meta_info.routed_experts, expected a response to a request "
                "with return_routed_experts"
            )
        prompt, answer = meta.get("prompt_tokens"), meta.get("completion_tokens")
        if not is_count(prompt) or not is_count(answer) or not 1 < prompt + answer < 2**31:
            raise TraceError(
                f"{where}: found prompt_tokens {prompt!r} and completion_tokens {answer!r}, "
                "expected whole numbers that are 2 together at least"
            )
        flat = np.frombuffer(_base64(where, meta["routed_experts"], 4), "<i4")
        tokens = prompt + answer - 1
        if flat.size == 0 or flat.size % (tokens * options.top_k):
            raise TraceError(
                f"{where}: found {flat.size} picks for {tokens} tokens and top_k = "
                f"{options.top_k}, expected tokens x layers x top_k: give the right top_k"
            )
        ids = id_block(where, flat.reshape(tokens, -1, options.top_k))
        yield Sequence(where=where, ids=ids, prompt=prompt)


# -- what becomes of it --


def parts(
    path: Path,
    options: ImportOptions,
    source: Callable[[Path, ImportOptions, int], Iterable[Sequence]],
) -> Iterator[RoutingTrace]:
    """Yield the trace of a file in parts; ``source`` is one of the readers above.

    Raises:
        TraceError: the file is damaged, or its requests differ in layers or picks.
    """
    shape: tuple[int, int] | None = None
    dense = np.zeros(0, bool)
    highest = -1
    for sequence in source(path, options, 0):
        if not len(sequence.ids):
            continue
        if shape is None:
            shape = sequence.ids.shape[1:]
            dense = np.ones(shape[0], bool)
        if sequence.ids.shape[1:] != shape:
            raise TraceError(
                f"{sequence.where}: found {sequence.ids.shape[1:]} layers and picks, expected "
                f"{shape} as in the first request: import one model at a time"
            )
        dense &= dense_layers(sequence.ids)
        highest = max(highest, int(sequence.ids.max()))
    if shape is None or dense.all():
        raise TraceError(f"found no routed token in {path}, expected picks of at least one")
    layer_ids = np.flatnonzero(~dense)
    num_experts = options.num_experts or guess_num_experts(path, highest, shape[1])
    block: list[Sequence] = []
    size, first = 0, 0
    for sequence in source(path, options, 1):
        block.append(sequence)
        size += sequence.ids.size
        if size > PART_PICKS:
            yield _to_trace(path, block, first, layer_ids, num_experts, options)
            block, size, first = [], 0, first + len(block)
    if block:
        yield _to_trace(path, block, first, layer_ids, num_experts, options)


def _to_trace(
    path: Path,
    block: list[Sequence],
    first: int,
    layer_ids: np.ndarray,
    num_experts: int,
    options: ImportOptions,
) -> RoutingTrace:
    filled = [(first + i, one) for i, one in enumerate(block) if len(one.ids)]
    lengths = [len(one.ids) for _, one in filled]
    stages = [
        np.full(len(one.ids), UNKNOWN)
        if one.prompt is None
        else np.where(np.arange(len(one.ids)) < one.prompt, PREFILL, DECODE)
        for _, one in filled
    ]
    ids = [one.ids[:, layer_ids] for _, one in filled]
    empty = np.zeros((0, len(layer_ids), block[0].ids.shape[2]), np.int64)
    try:
        return RoutingTrace(
            model=options.model or "",
            num_experts=num_experts,
            layer_ids=layer_ids,
            expert_ids=np.concatenate([*ids, empty]),
            request_id=np.repeat([number for number, _ in filled], lengths).astype(np.int64),
            position=np.concatenate(
                [one.start + np.arange(len(one.ids)) for _, one in filled] or [np.zeros(0, int)]
            ),
            stage=np.concatenate(stages or [np.zeros(0, int)]),
        )
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error
