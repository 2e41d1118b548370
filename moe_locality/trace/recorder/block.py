"""One block: the picks of all MoE layers in one forward pass, on their way to a shard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from moe_locality.trace.recorder.annotation import Annotation
from moe_locality.trace.recorder.layout import Layout


class Entry(NamedTuple):
    """Where the picks of one layer lie in the ring."""

    layer: int
    offset: int
    top_k: int
    slot_to_logical: np.ndarray | None
    """int [E + 1] lookup whose last entry is -1, or None where ids are logical already."""


@dataclass(slots=True)
class Block:
    """T tokens of one forward pass. ``entries`` grows while the layers run."""

    num_tokens: int
    annotation: Annotation
    told: Annotation
    """What the hooks came with; not ``annotation`` where that did not fit the tokens."""
    layout: Layout
    step: int
    training: bool
    thread: int
    """Identity of the thread that runs the forward pass."""
    recorded: bool
    """False: this step is not sampled, or the block was given up."""
    start: int = 0
    """Ring offset at which the block begins."""
    end: int = 0
    request_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64, one per sequence or per token; empty where the labels do not fit."""
    starts: np.ndarray | None = None
    """Where the requests go on, one position per request id; None: nothing is continued."""
    forward_index: int = 0
    layers_seen: set[int] = field(default_factory=set)
    entries: list[Entry] = field(default_factory=list)
    arrived: Any = None
    """CUDA event after which the picks are in host memory; None: they are."""


@dataclass(slots=True)
class Progress:
    """How far the forward passes inside one annotation have come."""

    annotation: Annotation
    forward_index: int = 0
    request_ids: np.ndarray | None = None
    """Numbers of sequences without request ids, kept for the rest of a generation."""


def logical_lookup(slot_to_logical: Any) -> np.ndarray:
    """Return int16 [E + 1] from a map [E]: index -1 ("no pick") gives -1."""
    return np.append(np.asarray(slot_to_logical), -1).astype(np.int16)
