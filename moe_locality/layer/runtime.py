"""What moe_locality keeps beside a running DeepSpeed engine: ``engine.moe_locality``."""

import atexit
import functools
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import nn

from moe_locality.config import MoeLocalityConfig
from moe_locality.dispatch.desync import all_calls, announce_departure
from moe_locality.dispatch.flat import check_overflow
from moe_locality.dispatch.traffic import reset_traffic, traffic_report
from moe_locality.errors import MoeLocalityError
from moe_locality.layer.vote import agree_on_failure
from moe_locality.placement.plan import PlacementPlan
from moe_locality.topology.cluster import ClusterTopology

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class LocalityRuntime:
    """Configuration, placement, cluster and recorder of an engine.

    ``topology`` is None with AutoEP, whose layers count no traffic. ``recorder`` is None where the
    section has no ``trace``, ``online`` where it has no ``online``, ``log`` where no ``tracking``.
    """

    model: nn.Module
    config: MoeLocalityConfig
    plan: PlacementPlan | None = None
    topology: ClusterTopology | None = None
    recorder: Any = None
    online: Any = None
    log: Any = None

    def traffic_report(self, group: Any = None) -> dict[str, Any]:
        """Gather what every rank sent; see ``moe_locality.dispatch.traffic_report``. Collective."""
        report = traffic_report(self.model, self.topology, group)
        if not report["per_layer"]:
            logger.warning(
                "moe_locality: nothing was counted: AutoEP's layers, DeepSpeed's padded dispatch "
                "and layers that have not run yet count no traffic"
            )
        return report

    def reset_traffic(self) -> None:
        """Count from zero again."""
        reset_traffic(self.model)
        if self.log is not None:
            self.log.reset_traffic()

    def check_overflow(self) -> None:
        """Raise on all ranks where routes found no row in the buffers of ``dispatch.capacity``, for
        what no step checks: the replays of a CUDA graph. Collective; waits for the device.
        """
        check_overflow(self.model)

    def close(self) -> None:
        """Write what recorder and tracking still hold. Called by ``engine.destroy`` and at the end
        of the process; not collective.
        """
        online, self.online = self.online, None
        if online is not None:
            online.close()
        recorder, self.recorder = self.recorder, None
        report = None if recorder is None else recorder.close()
        log, self.log = self.log, None
        if log is not None:
            atexit.unregister(self.close)
            failed = sys.exc_info()[0] is not None or getattr(sys, "last_value", None) is not None
            trace = self.config.trace
            log.close(None if trace is None else trace.path, report, failed=failed)


def attach_runtime(
    engine: Any, runtime: LocalityRuntime, ds_config: dict[str, Any] | None = None
) -> None:
    """Hang ``runtime`` on the engine, start its recorder, and let the engine drive it."""
    engine.moe_locality = runtime
    online = runtime.config.online
    if online is not None and online.enabled:
        from moe_locality.layer.online import attach_online

        runtime.online = attach_online(engine, online, runtime.topology)
    trace = runtime.config.trace
    if trace is not None and trace.enabled:
        from moe_locality.trace import recorder

        runtime.recorder = recorder.attach(engine, trace, model=type(runtime.model).__name__)
        after_each_step(engine, runtime.recorder.step)
    if runtime.config.tracking is not None and runtime.config.tracking.enabled:
        _attach_log(engine, runtime, ds_config)
    if (runtime.online, runtime.recorder, runtime.log) != (None, None, None):
        _close_with(engine, runtime)


def _attach_log(engine: Any, runtime: LocalityRuntime, ds_config: dict[str, Any] | None) -> None:
    """Start the log of a training. Collective: what rank 0 cannot start is an error on all."""
    from moe_locality.layer.run_log import RunLog

    config, topology = runtime.config, runtime.topology
    failure: MoeLocalityError | None = None
    try:
        runtime.log = RunLog(
            engine,
            config.tracking,  # pyright: ignore[reportArgumentType]  asked for, so it is there
            facts={
                "model": type(runtime.model).__name__,
                "ds_config": ds_config,
                "cluster": None if topology is None else topology.describe(),
                "num_ranks": dist.get_world_size() if dist.is_initialized() else 1,
            },
            plan=runtime.plan,
            plan_file=config.plan,
            topology=topology,
        )
    except MoeLocalityError as error:
        failure = error
    agree_on_failure(failure)
    log = runtime.log
    atexit.register(runtime.close)

    def after_step() -> None:
        if runtime.log is not None:
            log.step(runtime.recorder, runtime.online)

    after_each_step(engine, after_step)
    if isinstance(engine, PipelineEngine):
        return  # its train_batch has the loss
    original = engine.backward

    @functools.wraps(original)
    def backward(loss: Any, *args: Any, **kwargs: Any) -> Any:
        log.saw_loss(loss)
        return original(loss, *args, **kwargs)

    engine.backward = backward


def after_each_step(engine: Any, callback: Callable[[], object]) -> None:
    """Call ``callback()`` after every optimizer step (the last micro-batch of an accumulation).

    ``engine.step`` (``train_batch`` of a pipeline) is wrapped once; the callbacks run in the order
    in which they were given.
    """
    callbacks = vars(engine).get("moe_locality_after_step")
    if callbacks is not None:
        callbacks.append(callback)
        return
    callbacks = engine.moe_locality_after_step = [callback]
    name = "train_batch" if isinstance(engine, PipelineEngine) else "step"
    original = getattr(engine, name)

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

    setattr(engine, name, step)


def _close_with(engine: Any, runtime: LocalityRuntime) -> None:
    original = engine.destroy

    @functools.wraps(original)
    def destroy(*args: Any, **kwargs: Any) -> Any:
        runtime.close()
        announce_departure(f"destroyed its engine after {all_calls()}")
        return original(*args, **kwargs)

    engine.destroy = destroy
