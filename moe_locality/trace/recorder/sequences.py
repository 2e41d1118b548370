"""What the arguments of a transformers model say about its tokens: padding, requests, stages.

``model.generate`` passes one cache object to all its forward passes: they are the prefill and the
decode steps of the same requests, one per row of the batch. The attention mask tells padding, the
length of the cache the stage, and a cache that was cut back that draft tokens were rejected.
"""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_locality.trace.recorder.labels import GENERATE, Annotation


@dataclass(slots=True, kw_only=True, eq=False)
class Generation:
    """The requests that one cache belongs to, one per row of the batch."""

    request_ids: np.ndarray
    next_position: np.ndarray
    """int64 [B], tokens of the request so far, without padding and rejected drafts."""
    ended: np.ndarray
    """bool [B], the row had its end-of-sequence token: padding follows."""


@dataclass(slots=True, kw_only=True, eq=False)
class Pass:
    """One forward pass with a cache, until it is known which of its tokens stay in the cache."""

    cache: Any
    generation: Generation
    keep: np.ndarray
    """bool [B, S], False: padding."""
    end: int
    """Length of the cache when the pass has run."""
    may_reject: bool

    def settle(self, annotation: Annotation) -> Annotation:
        """Leave out the tokens that were cut off the cache, and note where the requests are."""
        kept = self.keep
        rejected = self.end - int(self.cache.get_seq_length()) if self.may_reject else 0
        if 0 < rejected < kept.shape[1]:
            kept = kept.copy()
            kept[:, -rejected:] = False
            annotation = dataclasses.replace(annotation, mask=kept)
        self.generation.next_position = self.generation.next_position + kept.sum(1)
        return dataclasses.replace(annotation, found=None)


class Sequences:
    """Finds labels in the arguments of forward passes; knows the caches that are in use."""

    def __init__(self, new_requests: Callable[[int], np.ndarray]) -> None:
        self._new_requests = new_requests
        self._known: weakref.WeakKeyDictionary[Any, Generation] = weakref.WeakKeyDictionary()

    def labels(self, module: Any, given: dict[str, Any], explicit: Annotation) -> Annotation:
        """Return ``explicit`` with what it leaves open filled in from a forward pass's arguments.

        ``given`` holds the arguments by name. On a GPU this waits for mask and positions.
        """
        shape = _tokens_shape(given)
        if shape is None or explicit.stage == "decode" or explicit.positions is not None:
            return explicit
        cache: Any = given.get("past_key_values")
        if not hasattr(cache, "get_seq_length") or module.training:
            return _without_cache(given, shape, explicit, self._new_requests)
        past = int(cache.get_seq_length())
        keep = _mask_of(given, shape, past, explicit)
        rows = shape[0]
        explicit_ids = _widened(explicit.request_ids, rows)
        if explicit_ids is not None and len(explicit_ids) != rows:
            return explicit  # one id per token: packed by hand
        generation = self._known.get(cache)
        if generation is None or past == 0 or len(generation.request_ids) != rows:
            generation = self._known[cache] = Generation(
                request_ids=self._new_requests(rows) if explicit_ids is None else explicit_ids,
                next_position=_seen_before(given, rows, past),
                ended=np.zeros(rows, bool),
            )
        drafts = _drafts(given, shape[1], past)
        decodes = past > 0 and (shape[1] == 1 or drafts == shape[1])
        if decodes and shape[1] == 1:
            keep = keep & ~_padding_after_end(module, given, generation)[:, None]
        within = np.maximum(np.cumsum(keep, axis=1) - 1, 0)
        stage = explicit.stage if explicit.stage not in (None, GENERATE) else None
        logits = given.get("logits_to_keep")
        return Annotation(
            request_ids=generation.request_ids if explicit_ids is None else explicit_ids,
            domains=_widened(explicit.domains, rows),
            stage=stage or ("decode" if decodes else "prefill"),
            drafts=drafts if stage is None and not decodes else 0,
            positions=generation.next_position[:, None] + within,
            mask=None if keep.all() else keep,
            found=Pass(
                cache=cache,
                generation=generation,
                keep=keep,
                end=past + shape[1],
                may_reject=shape[1] > 1 and not (isinstance(logits, int) and logits == 1),
            ),
            explicit=explicit,
        )

    def returned(self, module: Any, output: Any, given: dict[str, Any], ids: np.ndarray) -> None:
        """Note a cache that a forward pass made itself: a loop by hand goes on with it."""
        cache, shape = getattr(output, "past_key_values", None), _tokens_shape(given)
        if module.training or shape is None or len(ids) != shape[0]:
            return
        if hasattr(cache, "get_seq_length") and cache not in self._known:
            self._known[cache] = Generation(
                request_ids=ids,
                next_position=_mask_of(given, shape, 0, Annotation()).sum(1),
                ended=np.zeros(shape[0], bool),
            )


def named_arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``module.forward`` by name; positional ones, too, where they have names."""
    if not args:
        return kwargs
    names = [
        name
        for name, parameter in inspect.signature(module.forward).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _tokens_shape(given: dict[str, Any]) -> tuple[int, int] | None:
    """(B, S) of the tokens that run; those of the decoder where there is one."""
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds"):
        value: Any = given.get(name)
        if isinstance(value, torch.Tensor) and value.ndim >= 2:
            if value.is_meta or (value.is_cuda and torch.cuda.is_current_stream_capturing()):
                return None
            return int(value.shape[0]), int(value.shape[1])
    return None


def _mask_of(
    given: dict[str, Any], shape: tuple[int, int], past: int, explicit: Annotation
) -> np.ndarray:
    """bool [B, S], False = padding; all True where nothing says so."""
    if explicit.mask is not None and (explicit.stage != GENERATE or past == 0):
        wide = _widened(explicit.mask, shape[0])
        if wide.shape == shape:
            return wide
    mask: Any = _attention_mask(given)
    if isinstance(mask, dict):  # one per kind of attention, as for a static cache
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, torch.Tensor) or mask.shape[0] != shape[0]:
        return np.ones(shape, bool)
    if mask.ndim == 4 and mask.shape[2] == shape[1] and mask.shape[3] >= past + shape[1]:
        mask = mask[:, 0, :, past : past + shape[1]]
        if mask.is_floating_point():
            mask = mask == 0
        mask = mask.any(1)  # padding is what no token attends to
    elif mask.ndim == 2 and mask.shape[1] >= past + shape[1]:
        mask = mask[:, past : past + shape[1]]
    elif mask.ndim != 2 or mask.shape[1] != shape[1]:
        return np.ones(shape, bool)
    return (mask != 0).cpu().numpy()


def _attention_mask(given: dict[str, Any]) -> Any:
    of_decoder = any(given.get(f"decoder_{n}") is not None for n in ("input_ids", "inputs_embeds"))
    return given.get("decoder_attention_mask" if of_decoder else "attention_mask")


def _seen_before(given: dict[str, Any], rows: int, past: int) -> np.ndarray:
    """int64 [B], tokens without padding in a cache that no pass before has shown."""
    mask: Any = _attention_mask(given)
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[0] == rows:
        return (mask[:, :past] != 0).sum(1).cpu().numpy().astype(np.int64)
    return np.full(rows, past, np.int64)


def _drafts(given: dict[str, Any], length: int, past: int) -> int:
    """How many tokens at the end are drafts (the first of a later pass is not, yet it decodes).

    Assisted generation asks for the logits of the last token before the drafts and of each draft.
    """
    logits = given.get("logits_to_keep")
    if not isinstance(logits, int) or not 1 < logits <= length:
        return 0
    return logits if past else logits - 1


def _padding_after_end(module: Any, given: dict[str, Any], generation: Generation) -> np.ndarray:
    """bool [B]: the row ended earlier, and generate() gives it padding while others go on."""
    name = "decoder_input_ids" if given.get("decoder_input_ids") is not None else "input_ids"
    ids = given.get(name)
    settings = getattr(module, "generation_config", None) or getattr(module, "config", None)
    end = getattr(settings, "eos_token_id", None)
    if ids is None or end is None or len(generation.ended) == 1:
        return np.zeros(len(generation.ended), bool)
    ends = np.atleast_1d(np.asarray(end.cpu() if isinstance(end, torch.Tensor) else end))
    padding = getattr(settings, "pad_token_id", None)
    token = ids[:, -1].cpu().numpy()
    padded = generation.ended & (token == (ends[0] if padding is None else int(padding)))
    generation.ended = padded | np.isin(token, ends)
    return padded


def _without_cache(
    given: dict[str, Any],
    shape: tuple[int, int],
    explicit: Annotation,
    new_requests: Callable[[int], np.ndarray],
) -> Annotation:
    """Padding and packed sequences (positions that begin again inside a row)."""
    if explicit.stage == GENERATE:
        return explicit
    keep = _mask_of(given, shape, 0, explicit)
    mask = None if keep.all() else keep
    positions: Any = given.get("position_ids")
    if explicit.request_ids is None and isinstance(positions, torch.Tensor) and positions.ndim == 2:
        found = np.broadcast_to(positions.cpu().numpy(), shape)
        requests, within = _packed(found, keep)
        if requests is not None:
            numbers = new_requests(int(requests.max()) + 1)[requests]
            return dataclasses.replace(
                explicit,
                request_ids=numbers.reshape(-1),
                positions=within,
                mask=mask,
                explicit=explicit,
            )
    if mask is None:
        return explicit
    return dataclasses.replace(explicit, mask=mask, explicit=explicit)


def _packed(positions: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """Number of the request and position in it, [B, S]; None where no row holds two requests."""
    requests, within, count = np.zeros(keep.shape, np.int64), np.zeros(keep.shape, np.int64), 0
    packed = False
    for row, valid in enumerate(keep):
        place = np.flatnonzero(valid)
        values = positions[row, place]
        begins = np.concatenate([[True], values[1:] <= values[:-1]])[: len(place)]
        packed |= bool(begins.sum() > 1)
        number = np.cumsum(begins) - 1
        starts = np.flatnonzero(begins)
        requests[row, place] = count + number
        within[row, place] = np.arange(len(place)) - starts[number]
        requests[row, ~valid] = count
        count += max(len(starts), 1)
    return (requests if packed else None), within


def _widened(values: Any, rows: int) -> Any:
    """Repeat labels of B prompts for B * n rows: several samples or beams of each prompt."""
    if values is None or len(values) in (1, rows) or rows % len(values):
        if values is not None and len(values) == 1 and isinstance(values, np.ndarray):
            return np.repeat(values, rows, axis=0)
        return values
    if isinstance(values, tuple):
        return tuple(name for name in values for _ in range(rows // len(values)))
    return np.repeat(values, rows // len(values), axis=0)
