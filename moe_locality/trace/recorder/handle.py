"""What a recorder gives back: a handle for the hooks of one ``attach``, and a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_locality.trace.recorder.core import RoutingRecorder


@dataclass(frozen=True, slots=True, kw_only=True)
class RecorderReport:
    """What became of the tokens."""

    recorded_tokens: int
    """Tokens (rows) in complete shards."""
    dropped_tokens: int
    """Tokens of sampled forward passes that are in no shard and will not be."""
    skipped_forwards: int
    """Forward passes that were given up (labels that do not fit, writer too slow, ...)."""
    shards: int
    failure: str | None
    """Why recording stopped before its time, None: it did not."""


class Handle:
    """The hooks of one ``attach``; ``detach()`` removes them."""

    def __init__(self, recorder: RoutingRecorder, hooks: list[Any], modules: set[int]) -> None:
        self._recorder = recorder
        self._hooks = hooks
        self.modules = modules

    def detach(self) -> None:
        """Remove the hooks; the forward pass that is open is kept. Harmless when done before."""
        if self._hooks:
            self._recorder._finish()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.modules = set()
