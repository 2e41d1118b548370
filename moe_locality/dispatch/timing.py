"""Times of the stages of the exchange, where they are asked for."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class StageClock:
    """Adds up what each stage takes; ``with clock("dispatch"): ...``. Off, it costs nothing much.

    On a GPU the time is that of the device (events on the current stream), read when asked for, so
    nothing waits meanwhile; on a CPU it is that of the process.
    """

    def __init__(self, enabled: bool = False, device_type: str | None = None) -> None:
        self.enabled = enabled
        self._cuda = torch.cuda.is_available() if device_type is None else device_type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Forget all times."""
        self._us: dict[str, float] = {}
        self._pending: list[tuple[str, Any, Any]] = []

    def __call__(self, stage: str) -> contextlib.AbstractContextManager[None]:
        return self._span(stage) if self.enabled else _OFF

    def stage_us(self) -> dict[str, float]:
        """Return the microseconds of each stage so far. Waits for the device."""
        for stage, start, stop in self._pending:
            stop.synchronize()
            self._add(stage, 1e3 * start.elapsed_time(stop))
        self._pending = []
        return dict(self._us)

    @contextlib.contextmanager
    def _span(self, stage: str) -> Iterator[None]:
        if self._cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            stop.record()
            self._pending.append((stage, start, stop))
        else:
            begin = time.perf_counter()
            yield
            self._add(stage, 1e6 * (time.perf_counter() - begin))

    def _add(self, stage: str, us: float) -> None:
        self._us[stage] = self._us.get(stage, 0.0) + us


_OFF = contextlib.nullcontext()
