"""``attach``: a recorder from a path or the configuration; ``NullRecorder`` where it is off."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from moe_locality.config import TraceConfig
from moe_locality.trace.recorder.core import RoutingRecorder
from moe_locality.trace.recorder.handle import RecorderReport


class NullRecorder:
    """A recorder that records nothing, so that callers need not ask whether recording is on."""

    def step(self) -> None:
        """Do nothing."""

    def replayed(self) -> None:
        """Do nothing."""

    def drain(self) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def close(self) -> RecorderReport:
        """Report nothing recorded and nothing lost."""
        return self.report()

    def report(self) -> RecorderReport:
        """Report nothing recorded and nothing lost."""
        return RecorderReport(
            recorded_tokens=0, dropped_tokens=0, skipped_forwards=0, shards=0, failure=None
        )

    def __enter__(self) -> NullRecorder:
        return self

    def __exit__(self, *_exc: object) -> None:
        """Do nothing."""


def attach(
    model: torch.nn.Module,
    path_or_config: str | os.PathLike[str] | TraceConfig,
    /,
    *,
    layer_ids: Sequence[int] | None = None,
    routers: Any = None,
    **options: Any,
) -> RoutingRecorder | NullRecorder:
    """Record the routing of ``model`` from now on; ``close()`` the recorder at the end.

    Args:
        model: a model, or a DeepSpeed engine: rows then carry the number of its optimizer step.
        path_or_config: a directory, or the ``trace`` section of the configuration.
        layer_ids, routers: as in ``RoutingRecorder.attach``.
        options: arguments of RoutingRecorder (``model="name"`` among them); they win over the
            configuration.

    Returns:
        The recorder; a NullRecorder where the configuration says ``enabled: false``.

    Raises:
        TraceError: the directory cannot be written, or the model has no MoE layer.
    """
    if isinstance(path_or_config, TraceConfig):
        if not path_or_config.enabled:
            return NullRecorder()
        options = {**path_or_config.model_dump(exclude={"enabled"}), **options}
    else:
        options = {"path": path_or_config, **options}
    engine: Any = model
    if hasattr(engine, "global_steps") and isinstance(engine.module, torch.nn.Module):
        model = engine.module
        options.setdefault("global_step", lambda: engine.global_steps)
    recorder = RoutingRecorder(options.pop("path"), **options)
    try:
        recorder.attach(model, layer_ids=layer_ids, routers=routers)
    except BaseException:
        recorder.close()
        raise
    return recorder
