"""Labels of every token of a forward pass: request, position, stage, domain."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from moe_locality.trace.recorder.annotation import GENERATE, STAGES, Annotation
from moe_locality.trace.recorder.layout import Layout
from moe_locality.trace.schema import DECODE, PREFILL, TRAIN, UNKNOWN

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
        known = self._next
        return np.array([known.get(i, 0) for i in request_ids.tolist()], np.int64)

    def advance(
        self,
        annotation: Annotation,
        layout: Layout,
        request_ids: np.ndarray,
        starts: np.ndarray | None,
        first: bool,
    ) -> None:
        """Note where a prefill or decode ended; ``starts`` and ``request_ids`` as in ``spread``."""
        position = _positions(annotation, layout, request_ids, starts)
        if len(request_ids) == layout.num_sequences:
            ends = layout.by_sequence(position)[:, -1] if layout.length else position
        else:
            ends = position
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
    """Return the labels of every token of one forward pass.

    Args:
        request_ids: int64, one per sequence or one per token.
        starts: position of the first token of each of them where it ``continues``, else None.
        forward_index: which forward pass inside this annotation it is, from 0.
    """
    domains, index = annotation.domains, None
    if domains is not None and len(domains) > 1:
        index = _per_token(np.arange(len(domains)), layout)
    stage = STAGES.get(annotation.stage or "", TRAIN if training else UNKNOWN)
    if annotation.stage == GENERATE:
        stage = PREFILL if forward_index == 0 else DECODE
    if annotation.drafts:
        late = layout.offsets() >= layout.length - annotation.drafts
        stage = np.where(late, DECODE, stage).astype(np.uint8)
    position = _positions(annotation, layout, request_ids, starts)
    return BlockLabels(
        request_id=_per_token(request_ids, layout),
        position=position.astype(np.int32),
        stage=stage,
        domains=domains,
        domain_index=index,
        keep=_mask(annotation, layout, forward_index == 0),
    )


def _per_token(values: np.ndarray, layout: Layout) -> np.ndarray:
    return layout.per_sequence(values) if len(values) == layout.num_sequences else values


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
