"""Work of a layer that is done while rows travel."""

from typing import Any

from torch import nn


class Once:
    """A module that may be called early; its output is kept for the call that asks for it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._early: list[Any] = []

    def run_early(self, *args: Any) -> None:
        """Call the module now, for the next call."""
        self._early.append(self.module(*args))

    def __call__(self, *args: Any) -> Any:
        return self._early.pop() if self._early else self.module(*args)
