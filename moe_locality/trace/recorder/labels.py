"""Labels of the tokens of a forward pass: request, position, stage, domain.

``annotate`` gives them for all forward passes inside a context. A forward pass routes T tokens in
the order in which the model flattens them; labels come per sequence (B of them) or per token (T of
them) and are spread over the tokens.

Without labels, the arguments of a transformers model say them: ``model.generate`` passes one cache
object to all its forward passes, which are the prefill and the decode steps of the same requests,
one per row of the batch. The attention mask tells padding, the length of the cache the stage, and a
cache that was cut back that draft tokens were rejected.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_locality.errors import TraceError
from moe_locality.trace.merge import STAGE_CODES
from moe_locality.trace.schema import DECODE, PREFILL, TRAIN, UNKNOWN

GENERATE = "generate"
"""Stage of a whole ``generate()``: its first forward pass is prefill, the others are decode."""

Axes = tuple[int, int]
"""(B, S) of tokens that lie in sequences; (S, B) in models that put the sequence first."""

Given = dict[str, Any]
"""Arguments of a forward pass by name."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Annotation:
    """What ``annotate`` was given, as arrays; None = not given."""

    request_ids: np.ndarray | None = None
    """int64 [B] or [T]."""
    domains: tuple[str, ...] | None = None
    """One name for all tokens, or B or T names."""
    stage: str | None = None
    positions: np.ndarray | None = None
    """int64: [] or [B] for the first token of each sequence; [B, S] or [T] for every token."""
    mask: np.ndarray | None = None
    """bool [B, S] or [T]; rows that are False are not recorded (padding)."""
    drafts: int = 0
    """How many tokens at the end of each sequence of a prefill are accepted drafts: decode."""
    found: Any = None
    """The Pass that a model's arguments belong to, until its block ends."""
    explicit: Annotation | None = None
    """What ``annotate`` said, where a model's arguments were added to it."""

    @property
    def num_labels(self) -> int | None:
        """Entries of the per-sequence or per-token labels, None where there are none."""
        if self.request_ids is not None:
            return len(self.request_ids)
        return len(self.domains) if self.domains is not None and len(self.domains) > 1 else None


_EMPTY = Annotation()
_CURRENT: ContextVar[Annotation] = ContextVar("moe_locality_annotation", default=_EMPTY)


def current_annotation() -> Annotation:
    """Return the annotation in force here, an empty one outside ``annotate``."""
    return _CURRENT.get()


@contextlib.contextmanager
def annotate(
    request_ids: Any = None,
    domains: str | Sequence[str] | None = None,
    stage: str | None = None,
    positions: Any = None,
    mask: Any = None,
) -> Iterator[None]:
    """Label the tokens of the forward passes inside, for every recorder of this thread.

    Contexts nest: what the inner one does not give is taken from the outer one. B sequences of S
    tokens, T = B * S tokens. Arrays may be lists, numpy arrays or torch tensors (a tensor on a GPU
    is copied to the host here, which waits for it).

    Args:
        request_ids: non-negative integers, [B] (one per sequence) or [T] (one per token).
        domains: one name for all tokens, or B or T names.
        stage: "train", "prefill", "decode", "unknown", or "generate": the first forward pass inside
            is prefill, every later one is decode.
        positions: position in the request; a number or [B] for the first token of each sequence,
            or [B, S] or [T] for every token. Default: decode goes on where the last prefill or
            decode of the request ended, everything else starts at 0. Later forward passes inside
            one "decode" or "generate" context go on, too.
        mask: bool [B, S] or [T]; tokens that are False (padding) are left out. With stage
            "generate" it is the mask of the first forward pass.

    Raises:
        TraceError: a label has an impossible type, shape or value.
    """
    given = _checked(request_ids, domains, stage, positions, mask)
    token = _CURRENT.set(dataclasses.replace(_CURRENT.get(), **given))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def _checked(request_ids, domains, stage, positions, mask) -> dict[str, Any]:
    """The labels that are given, as an Annotation holds them."""
    requests = _integers(request_ids, "request_ids")
    if requests is not None and (requests.ndim != 1 or not len(requests) or requests.min() < 0):
        raise TraceError(
            f"found request_ids of shape {requests.shape}, expected a non-empty list of "
            "non-negative integers: give one per sequence or one per token"
        )
    if domains is not None:
        domains = (domains,) if isinstance(domains, str) else tuple(domains)
        if not domains or not all(isinstance(name, str) for name in domains):
            raise TraceError(
                f"found domains {domains!r}, expected a name or a list of names: give strings"
            )
        domains = tuple(str(name) for name in domains)
        if requests is not None and len(domains) not in (1, len(requests)):
            raise TraceError(
                f"found {len(domains)} domains for {len(requests)} request_ids, expected one name "
                "or as many names as request_ids"
            )
    if stage is not None and stage != GENERATE and stage not in STAGE_CODES:
        raise TraceError(
            f"found stage {stage!r}, expected one of {[*STAGE_CODES, GENERATE]}: correct the name"
        )
    positions = _integers(positions, "positions")
    if positions is not None and (positions.ndim > 2 or (positions < 0).any()):
        raise TraceError(
            f"found positions of shape {positions.shape}, expected non-negative integers: one "
            "number, [B], [B, S] or [T]"
        )
    labels = {"request_ids": requests, "domains": domains, "stage": stage, "positions": positions}
    labels["mask"] = None if mask is None else _numpy(mask).astype(bool)
    return {name: label for name, label in labels.items() if label is not None}


def _numpy(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu().numpy() if hasattr(value, "detach") else value)


def _integers(value: Any, name: str) -> np.ndarray | None:
    if value is None:
        return None
    array = _numpy(value)
    if array.dtype.kind not in "iu":
        raise TraceError(f"found {name} of type {array.dtype}, expected integers: convert them")
    return array.astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the T = num_sequences * length tokens of one forward pass lie in sequences: token t is in
    t % num_sequences if ``sequence_first`` ([S, B, D] models), else in t // length ([B, S, D])."""

    num_sequences: int
    length: int
    sequence_first: bool = False

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.length

    def flat(self, table: np.ndarray) -> np.ndarray:
        """Bring [B, S], or what is repeated to that, into the order of the tokens: [T]."""
        full = np.broadcast_to(table, (self.num_sequences, self.length))
        return (full.T if self.sequence_first else full).reshape(-1)

    def per_sequence(self, values: np.ndarray) -> np.ndarray:
        """Spread [B] over the tokens: [T], which stays as it is."""
        return self.flat(values[:, None]) if len(values) == self.num_sequences else values

    def offsets(self) -> np.ndarray:
        """int64 [T], index of each token within its sequence."""
        return self.flat(np.arange(self.length, dtype=np.int64))

    def by_sequence(self, values: np.ndarray) -> np.ndarray:
        """Bring [B, S'] or [B * S'] in the order of the tokens to [B, S'], or [1, S'] to itself."""
        if values.ndim == 2:
            return values
        if self.sequence_first:
            return values.reshape(-1, self.num_sequences).T
        return values.reshape(self.num_sequences, -1)

    def per_token(self, values: np.ndarray, name: str) -> np.ndarray:
        """Flatten [B, S], [1, S] or [T] into the order of the tokens: [T]."""
        if values.shape in ((1, self.length), (self.num_sequences, self.length)):
            return self.flat(values)
        if values.shape == (self.num_tokens,):
            return values
        raise TraceError(
            f"found {name} of shape {values.shape}, expected [{self.num_tokens}] or "
            f"[{self.num_sequences}, {self.length}], the tokens of this forward pass"
        )


def layout_of(
    num_tokens: int, shape: Axes | None, annotation: Annotation, sequence_first: bool = False
) -> Layout:
    """Return how ``num_tokens`` lie in sequences: by ``shape``, the first two axes of a [B, S, D]
    (or [S, B, D]) input where one was seen, else by the number of labels, else as one sequence.
    TraceError for neither B nor T labels."""
    labels = annotation.num_labels
    if shape is not None and shape[0] * shape[1] == num_tokens:
        length, count = shape if sequence_first else (shape[1], shape[0])
        fits = labels in (None, count, num_tokens)
        expected = f"{count} (one per sequence) or {num_tokens} (one per token)"
    else:
        count = labels or 1
        length, rest = divmod(num_tokens, count)
        fits = rest == 0
        expected = f"a divisor of {num_tokens}, the tokens of this forward pass"
    if not fits:
        raise TraceError(
            f"found {labels} labels in annotate(), expected {expected}: give one request id "
            "(domain) per sequence or one per token"
        )
    return Layout(num_sequences=count, length=length, sequence_first=sequence_first)


def check_fits(annotation: Annotation, layout: Layout, first_forward: bool) -> None:
    """Raise TraceError where positions or mask do not fit the tokens."""
    positions = annotation.positions
    known = ((), (layout.num_sequences,))
    if positions is not None and positions.shape not in known and first_forward:
        layout.per_token(positions, "positions")
    _mask(annotation, layout, first_forward)


REMEMBERED_REQUESTS = 65_536
"""How many requests a PositionBook knows; the one that was seen longest ago is forgotten first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLabels:
    """Labels of the tokens of one forward pass; T entries each."""

    request_id: np.ndarray
    position: np.ndarray
    stage: int | np.ndarray
    """One for all tokens, or [T]."""
    domains: tuple[str, ...] | None
    """None: unknown. One name: all tokens. Else aligned with ``domain_index``."""
    domain_index: np.ndarray | None
    keep: np.ndarray | None
    """bool [T], None = all."""


class PositionBook:
    """The next position of the requests in generation: decode goes on where prefill ended."""

    def __init__(self) -> None:
        self._next: OrderedDict[int, int] = OrderedDict()

    def starts(self, request_ids: np.ndarray) -> np.ndarray:
        """int64 [n], the next position of each request; 0 for one that is not known."""
        return np.array([self._next.get(i, 0) for i in request_ids.tolist()], np.int64)

    def advance(
        self,
        annotation: Annotation,
        layout: Layout,
        request_ids: np.ndarray,
        starts: np.ndarray | None,
        first: bool,
    ) -> None:
        """Note where a prefill or decode ended; ``starts`` and ``request_ids`` as in ``spread``."""
        ends = _positions(annotation, layout, request_ids, starts)
        if len(request_ids) == layout.num_sequences and layout.length:
            ends = layout.by_sequence(ends)[:, -1]
        keep = _mask(annotation, layout, first)
        if keep is not None and len(ends) == len(keep):
            request_ids, ends = request_ids[keep], ends[keep]
        for request, end in zip(request_ids.tolist(), ends.tolist(), strict=True):
            self._next[request] = end + 1
            self._next.move_to_end(request)
        while len(self._next) > REMEMBERED_REQUESTS:
            self._next.popitem(last=False)


def generates(annotation: Annotation) -> bool:
    """Whether positions of these forward passes matter to later ones."""
    return annotation.stage in ("prefill", "decode", GENERATE)


def continues(annotation: Annotation, forward_index: int) -> bool:
    """Whether a forward pass goes on where an earlier one ended, rather than where it is told."""
    if annotation.stage == "decode":
        return forward_index > 0 or annotation.positions is None
    return annotation.stage == GENERATE and forward_index > 0


def spread(
    annotation: Annotation,
    layout: Layout,
    *,
    request_ids: np.ndarray,
    starts: np.ndarray | None,
    training: bool,
    forward_index: int,
) -> BlockLabels:
    """Return the labels of every token of one forward pass, the ``forward_index``-th inside this
    annotation, from 0. ``request_ids``: int64, one per sequence or one per token; ``starts``: the
    position of the first token of each of them where it ``continues``, else None."""
    domains, index = annotation.domains, None
    if domains is not None and len(domains) > 1:
        index = layout.per_sequence(np.arange(len(domains)))
    stage = STAGE_CODES.get(annotation.stage or "", TRAIN if training else UNKNOWN)
    if annotation.stage == GENERATE:
        stage = PREFILL if forward_index == 0 else DECODE
    if annotation.drafts:
        late = layout.offsets() >= layout.length - annotation.drafts
        stage = np.where(late, DECODE, stage).astype(np.uint8)
    position = _positions(annotation, layout, request_ids, starts)
    return BlockLabels(
        request_id=layout.per_sequence(request_ids),
        position=position.astype(np.int32),
        stage=stage,
        domains=domains,
        domain_index=index,
        keep=_mask(annotation, layout, forward_index == 0),
    )


def _mask(annotation: Annotation, layout: Layout, first: bool) -> np.ndarray | None:
    """bool [T] in the order of the tokens, None = all."""
    if annotation.mask is None or (annotation.stage == GENERATE and not first):
        return None
    return layout.per_token(annotation.mask, "a mask")


def _positions(
    annotation: Annotation, layout: Layout, request_ids: np.ndarray, starts: np.ndarray | None
) -> np.ndarray:
    """Return the position of every token in its request: int64 [T]."""
    given = annotation.positions if starts is None else starts
    if given is not None and given.ndim and given.shape != (layout.num_sequences,):
        if starts is None:
            return layout.per_token(given, "positions")
        return running_count(request_ids) + given
    if given is None and len(request_ids) == layout.num_tokens > layout.num_sequences:
        return running_count(request_ids)
    within = layout.offsets()
    mask = annotation.mask
    if mask is not None and mask.size == layout.num_tokens:  # the n-th unmasked token is at n
        table = np.cumsum(layout.by_sequence(mask), axis=1) - 1
        within = layout.per_token(np.maximum(table, 0), "a mask")
    if given is None:
        return within
    return within + (int(given) if given.ndim == 0 else layout.per_sequence(given))


def running_count(values: np.ndarray) -> np.ndarray:
    """int64 [T], how often each value occurred before: [7, 7, 3, 7] gives [0, 1, 0, 2]."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    index = np.arange(len(values))
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    result = np.empty(len(values), np.int64)
    result[order] = index - np.maximum.accumulate(np.where(first, index, 0))
    return result


class Generation:
    """The requests of one cache, one per row of the batch. ``next_position``: int64 [B], their
    tokens so far without padding and rejected drafts; ``ended``: bool [B], the end token came."""

    def __init__(self, request_ids: np.ndarray, next_position: np.ndarray) -> None:
        self.request_ids, self.next_position = request_ids, next_position
        self.ended = np.zeros(len(request_ids), bool)


@dataclass(slots=True, eq=False)
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

    def labels(self, module: Any, given: Given, explicit: Annotation) -> Annotation:
        """Return ``explicit`` with what it leaves open filled in from what a forward pass is given;
        on a GPU this waits for mask and positions."""
        shape = _tokens_shape(given)
        if shape is None or explicit.stage == "decode" or explicit.positions is not None:
            return explicit
        cache = _cache_of(given)
        if cache is None or module.training:
            return self._without_cache(given, shape, explicit)
        past = int(cache.get_seq_length())
        keep = _mask_of(given, shape, past, explicit)
        rows, length = shape
        explicit_ids = _widened(explicit.request_ids, rows)
        if explicit_ids is not None and len(explicit_ids) != rows:
            return explicit  # one id per token: packed by hand
        generation = self._known.get(cache)
        if generation is None or past == 0 or len(generation.request_ids) != rows:
            ids = self._new_requests(rows) if explicit_ids is None else explicit_ids
            generation = self._known[cache] = Generation(ids, _seen_before(given, rows, past))
        drafts = _drafts(given, length, past)
        decodes = past > 0 and (length == 1 or drafts == length)
        if decodes and length == 1:
            keep = keep & ~_padding_after_end(module, given, generation)[:, None]
        within = np.maximum(np.cumsum(keep, axis=1) - 1, 0)
        stage = explicit.stage if explicit.stage not in (None, GENERATE) else None
        logits = given.get("logits_to_keep")
        may_reject = length > 1 and not (isinstance(logits, int) and logits == 1)
        return Annotation(
            request_ids=generation.request_ids if explicit_ids is None else explicit_ids,
            domains=_widened(explicit.domains, rows),
            stage=stage or ("decode" if decodes else "prefill"),
            drafts=drafts if stage is None and not decodes else 0,
            positions=generation.next_position[:, None] + within,
            mask=None if keep.all() else keep,
            found=Pass(cache, generation, keep, past + length, may_reject),
            explicit=explicit,
        )

    def _without_cache(self, given: Given, shape: Axes, explicit: Annotation) -> Annotation:
        """Padding and packed sequences (positions that begin again inside a row)."""
        if explicit.stage == GENERATE:
            return explicit
        keep = _mask_of(given, shape, 0, explicit)
        found: dict[str, Any] = {} if keep.all() else {"mask": keep}
        positions: Any = given.get("position_ids")
        is_table = isinstance(positions, torch.Tensor) and positions.ndim == 2
        if is_table and explicit.request_ids is None:
            requests, within = _packed(np.broadcast_to(positions.cpu().numpy(), shape), keep)
            if requests is not None:
                numbers = self._new_requests(int(requests.max()) + 1)[requests].reshape(-1)
                found = {"mask": None, "request_ids": numbers, "positions": within, **found}
        return dataclasses.replace(explicit, **found, explicit=explicit) if found else explicit

    def returned(self, module: Any, output: Any, given: Given, ids: np.ndarray) -> None:
        """Note a cache that a forward pass made itself: a loop by hand goes on with it."""
        cache, shape = _cache_of(getattr(output, "__dict__", {})), _tokens_shape(given)
        if module.training or shape is None or len(ids) != shape[0]:
            return
        if cache is not None and cache not in self._known:
            keep = _mask_of(given, shape, 0, Annotation())
            self._known[cache] = Generation(ids, keep.sum(1))


def named_arguments(module: Any, args: tuple[Any, ...], kwargs: Given) -> Given:
    """The arguments of ``module.forward`` by name; positional ones, too, where they have names."""
    if not args:
        return kwargs
    parameters = inspect.signature(module.forward).parameters.values()
    names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _cache_of(named: Given) -> Any:
    """The cache among arguments or outputs; transformers 5.24 renamed it ``cache``."""
    found = (named.get(name) for name in ("cache", "past_key_values"))
    return next((cache for cache in found if hasattr(cache, "get_seq_length")), None)


def _tokens_shape(given: Given) -> Axes | None:
    """(B, S) of the tokens that run; those of the decoder where there is one."""
    for name in ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds"):
        value: Any = given.get(name)
        if isinstance(value, torch.Tensor) and value.ndim >= 2:
            if value.is_meta or (value.is_cuda and torch.cuda.is_current_stream_capturing()):
                return None
            return int(value.shape[0]), int(value.shape[1])
    return None


def _mask_of(given: Given, shape: Axes, past: int, explicit: Annotation) -> np.ndarray:
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


def _attention_mask(given: Given) -> Any:
    of_decoder = any(given.get(f"decoder_{n}") is not None for n in ("input_ids", "inputs_embeds"))
    return given.get("decoder_attention_mask" if of_decoder else "attention_mask")


def _seen_before(given: Given, rows: int, past: int) -> np.ndarray:
    """int64 [B], tokens without padding in a cache that no pass before has shown."""
    mask: Any = _attention_mask(given)
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape[0] == rows:
        return (mask[:, :past] != 0).sum(1).cpu().numpy().astype(np.int64)
    return np.full(rows, past, np.int64)


def _drafts(given: Given, length: int, past: int) -> int:
    """How many tokens at the end are drafts (the first of a later pass is not, yet it decodes):
    assisted generation asks for the logits of the last token before them and of each draft."""
    logits = given.get("logits_to_keep")
    if not isinstance(logits, int) or not 1 < logits <= length:
        return 0
    return logits if past else logits - 1


def _padding_after_end(module: Any, given: Given, generation: Generation) -> np.ndarray:
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


def _packed(positions: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """Number of the request and position in it, [B, S]; None where no row holds two requests."""
    row, values = np.nonzero(keep)[0], positions[keep]
    goes_on = (row[1:] == row[:-1]) & (values[1:] > values[:-1])
    begins = np.concatenate([[True], ~goes_on])[: len(row)]
    counts = np.bincount(row[begins], minlength=len(keep))
    numbers = np.maximum(counts, 1)  # a row without a token has a number, too
    first = np.cumsum(numbers) - numbers
    requests, within = np.repeat(first[:, None], keep.shape[1], axis=1), np.zeros_like(keep, int)
    requests[keep] += np.cumsum(begins) - 1 - (np.cumsum(counts) - counts)[row]
    within[keep] = running_count(requests[keep])
    return (requests if (counts > 1).any() else None), within


def _widened(values: Any, rows: int) -> Any:
    """Repeat labels of B prompts for B * n rows: several samples or beams of each prompt."""
    if values is None or rows % len(values):
        return values
    if isinstance(values, np.ndarray):
        return np.repeat(values, rows // len(values), axis=0)
    if len(values) == 1:  # one name for all
        return values
    return tuple(name for name in values for _ in range(rows // len(values)))
