"""What moe_locality keeps beside a running DeepSpeed engine: ``engine.moe_locality``."""

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from moe_locality.config import MoeLocalityConfig
from moe_locality.dispatch.flat import check_overflow
from moe_locality.dispatch.traffic import reset_traffic, traffic_report
from moe_locality.placement.plan import PlacementPlan
from moe_locality.topology.cluster import ClusterTopology

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class LocalityRuntime:
    """Configuration, placement, cluster and recorder of an engine.

    ``topology`` is None with AutoEP, whose layers count no traffic. ``recorder`` is None where the
    section has no ``trace``, ``online`` where it has no ``online``.
    """

    model: nn.Module
    config: MoeLocalityConfig
    plan: PlacementPlan | None = None
    topology: ClusterTopology | None = None
    recorder: Any = None
    online: Any = None

    def traffic_report(self, group: Any = None) -> dict[str, Any]:
        """Gather what every rank sent; see ``moe_locality.dispatch.traffic_report``. Collective."""
        return traffic_report(self.model, self.topology, group)

    def reset_traffic(self) -> None:
        """Count from zero again."""
        reset_traffic(self.model)

    def check_overflow(self) -> None:
        """Raise on all ranks where routes found no row in the buffers of ``dispatch.capacity``, for
        what no step checks: the replays of a CUDA graph. Collective; waits for the device.
        """
        check_overflow(self.model)

    def close(self) -> None:
        """Write what the recorder still holds. Called by ``engine.destroy``; the recorder itself
        sees to the end of the process.
        """
        online, self.online = self.online, None
        if online is not None:
            online.close()
        recorder, self.recorder = self.recorder, None
        if recorder is not None:
            recorder.close()


def attach_runtime(engine: Any, runtime: LocalityRuntime) -> None:
    """Hang ``runtime`` on the engine, start its recorder, and let the engine drive it."""
    engine.moe_locality = runtime
    online = runtime.config.online
    if online is not None and online.enabled:
        from moe_locality.layer.online import attach_online

        runtime.online = attach_online(engine, online, runtime.topology)
    trace = runtime.config.trace
    if trace is not None and trace.enabled:
        from moe_locality.trace import recorder

        runtime.recorder = recorder.attach(runtime.model, trace, model=type(runtime.model).__name__)
        after_each_step(engine, runtime.recorder.step)
    if runtime.online is not None or runtime.recorder is not None:
        _close_with(engine, runtime)


def after_each_step(engine: Any, callback: Callable[[], object]) -> None:
    """Call ``callback()`` after every optimizer step (the last micro-batch of an accumulation).

    ``engine.step`` is wrapped once; the callbacks run in the order in which they were given.
    """
    callbacks = vars(engine).get("moe_locality_after_step")
    if callbacks is not None:
        callbacks.append(callback)
        return
    callbacks = engine.moe_locality_after_step = [callback]
    original = engine.step

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        # counted, not asked for: with managed_gradient_accumulation=false the engine knows that a
        # call ends an accumulation only while it runs
        before = engine.global_steps
        result = original(*args, **kwargs)
        if engine.global_steps > before:
            for call in tuple(callbacks):
                call()
        return result

    engine.step = step


def _close_with(engine: Any, runtime: LocalityRuntime) -> None:
    original = engine.destroy

    @functools.wraps(original)
    def destroy(*args: Any, **kwargs: Any) -> Any:
        runtime.close()
        return original(*args, **kwargs)

    engine.destroy = destroy
