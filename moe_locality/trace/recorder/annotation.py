"""``annotate``: labels for the tokens of the forward passes inside a context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace.schema import DECODE, PREFILL, TRAIN, UNKNOWN

STAGES = {"prefill": PREFILL, "decode": DECODE, "train": TRAIN, "unknown": UNKNOWN}
GENERATE = "generate"
"""Stage of a whole ``generate()``: its first forward pass is prefill, the others are decode."""


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
    """The annotation in force here, an empty one outside ``annotate``."""
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
    outer = _CURRENT.get()
    own = _checked(request_ids, domains, stage, positions, mask)
    merged = Annotation(
        **{
            name: value if (value := getattr(own, name)) is not None else getattr(outer, name)
            for name in ("request_ids", "domains", "stage", "positions", "mask")
        }
    )
    token = _CURRENT.set(merged)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def _checked(request_ids, domains, stage, positions, mask) -> Annotation:
    requests = None
    if request_ids is not None:
        requests = _integers(request_ids, "request_ids")
        if requests.ndim != 1 or not len(requests) or requests.min() < 0:
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
    if stage is not None and stage != GENERATE and stage not in STAGES:
        raise TraceError(
            f"found stage {stage!r}, expected one of {[*STAGES, GENERATE]}: correct the name"
        )
    if positions is not None:
        positions = _integers(positions, "positions")
        if positions.ndim > 2 or (positions.size and positions.min() < 0):
            raise TraceError(
                f"found positions of shape {positions.shape}, expected non-negative integers: one "
                "number, [B], [B, S] or [T]"
            )
    if mask is not None:
        mask = _numpy(mask).astype(bool)
    return Annotation(
        request_ids=requests, domains=domains, stage=stage, positions=positions, mask=mask
    )


def _numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value)


def _integers(value: Any, name: str) -> np.ndarray:
    array = _numpy(value)
    if array.dtype.kind not in "iu":
        raise TraceError(f"found {name} of type {array.dtype}, expected integers: convert them")
    return array.astype(np.int64)
