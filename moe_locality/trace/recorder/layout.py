"""How the tokens of a forward pass lie in sequences, and labels spread over them.

A forward pass routes T tokens in the order in which the model flattens them. Labels are given per
sequence (B of them) or per token (T of them).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.trace.recorder.annotation import GENERATE, Annotation


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the T tokens of one forward pass lie in sequences.

    num_sequences * length = num_tokens. ``sequence_first``: token t belongs to sequence
    t % num_sequences ([S, B, D] models), else to t // length ([B, S, D] models).
    """

    num_sequences: int
    length: int
    sequence_first: bool = False

    @property
    def num_tokens(self) -> int:
        return self.num_sequences * self.length

    def per_sequence(self, values: np.ndarray) -> np.ndarray:
        """Spread [B] over the tokens: [T]."""
        if self.sequence_first:
            return np.tile(values, self.length)
        return np.repeat(values, self.length)

    def offsets(self) -> np.ndarray:
        """int64 [T], index of each token within its sequence."""
        count = np.arange(self.length, dtype=np.int64)
        if self.sequence_first:
            return np.repeat(count, self.num_sequences)
        return np.tile(count, self.num_sequences)

    def by_sequence(self, values: np.ndarray) -> np.ndarray:
        """Bring [B, S'] or [B * S'] in the order of the tokens to [B, S'], or [1, S'] to itself."""
        if values.ndim == 2:
            return values
        if self.sequence_first:
            return values.reshape(-1, self.num_sequences).T
        return values.reshape(self.num_sequences, -1)

    def per_token(self, values: np.ndarray, name: str) -> np.ndarray:
        """Flatten [B, S], [1, S] or [T] into the order of the tokens: [T]."""
        if values.ndim == 2 and values.shape[1] == self.length:
            if values.shape[0] in (1, self.num_sequences):
                full = np.broadcast_to(values, (self.num_sequences, self.length))
                return (full.T if self.sequence_first else full).reshape(-1)
        elif values.ndim == 1 and len(values) == self.num_tokens:
            return values
        raise TraceError(
            f"found {name} of shape {values.shape}, expected [{self.num_tokens}] or "
            f"[{self.num_sequences}, {self.length}], the tokens of this forward pass"
        )


def layout_of(
    num_tokens: int,
    shape: tuple[int, int] | None,
    annotation: Annotation,
    sequence_first: bool = False,
) -> Layout:
    """Return how ``num_tokens`` lie in sequences.

    ``shape`` holds the first two axes of a [B, S, D] (or [S, B, D]) input where one was seen.
    Without it the annotation's labels say B; without those all tokens count as one sequence.

    Raises:
        TraceError: the annotation has neither B nor T labels.
    """
    labels = annotation.num_labels
    if shape is not None and shape[0] * shape[1] == num_tokens:
        length, count = shape if sequence_first else (shape[1], shape[0])
        if labels is None or labels in (count, num_tokens):
            return Layout(num_sequences=count, length=length, sequence_first=sequence_first)
        expected = f"{count} (one per sequence) or {num_tokens} (one per token)"
    else:
        if labels is None:
            return Layout(num_sequences=1, length=num_tokens)
        if num_tokens % labels == 0:
            return Layout(
                num_sequences=labels,
                length=num_tokens // labels,
                sequence_first=sequence_first,
            )
        expected = f"a divisor of {num_tokens}, the tokens of this forward pass"
    raise TraceError(
        f"found {labels} labels in annotate(), expected {expected}: give one request id (domain) "
        "per sequence or one per token"
    )


def check_fits(annotation: Annotation, layout: Layout, first_forward: bool) -> None:
    """Raise TraceError where positions or mask do not fit the tokens (shapes only, no copies)."""
    positions = annotation.positions
    if positions is not None and positions.ndim and first_forward:
        fits = positions.shape in (
            (layout.num_sequences,),
            (layout.num_tokens,),
            (layout.num_sequences, layout.length),
            (1, layout.length),
        )
        if not fits:
            layout.per_token(positions, "positions")
    if annotation.mask is not None and (first_forward or annotation.stage != GENERATE):
        layout.per_token(annotation.mask, "a mask")
