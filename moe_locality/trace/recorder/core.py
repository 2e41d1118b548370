"""``attach`` and the RoutingRecorder that it makes: records which experts every token of a model
picks, while the model runs.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.module_tracker import ModuleTracker

from moe_locality.config import TraceConfig
from moe_locality.errors import TraceError
from moe_locality.trace.parquet import ShardWriter, make_directory, next_sequence
from moe_locality.trace.recorder import hooks
from moe_locality.trace.recorder.assembler import Assembler, Forward
from moe_locality.trace.recorder.hooks import Hook, MoeLayer, Places
from moe_locality.trace.recorder.labels import (
    Annotation,
    Axes,
    Sequences,
    current_annotation,
    named_arguments,
)
from moe_locality.trace.recorder.writer import WriterThread


@dataclass(frozen=True, slots=True, kw_only=True)
class RecorderReport:
    """What became of the tokens."""

    recorded_tokens: int = 0
    """Tokens (rows) in complete shards."""
    dropped_tokens: int = 0
    """Tokens of sampled forward passes that are in no shard and will not be."""
    skipped_forwards: int = 0
    """Forward passes that were given up (labels that do not fit, writer too slow, ...)."""
    shards: int = 0
    failure: str | None = None
    """Why recording stopped before its time, None: it did not."""


@dataclass(slots=True, eq=False)
class Handle:
    """The hooks of one ``attach``; ``detach()`` removes them."""

    _recorder: RoutingRecorder
    _hooks: list[Any]
    modules: set[int]

    def detach(self) -> None:
        """Remove the hooks; the forward pass that is open is kept. Harmless when done before."""
        if self._hooks:
            self._recorder._finish()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.modules = set()


logger = logging.getLogger(__name__)

_OPEN: set[RoutingRecorder] = set()
_CLOSE_TIMEOUT_S = 120.0


class RoutingRecorder(AbstractContextManager["RoutingRecorder"]):
    """Records the routing of every MoE layer of a model into a directory of Parquet shards.

    A forward pass of the attached model gives one row per token: its picks in all layers, labelled
    by ``annotate``. A recorder never stops a training: after a failure (a full disk, say) it logs
    once, records no more, and ``close()`` reports what was lost; ``strict=True`` raises instead.
    The recomputation of activation checkpointing is not recorded. A forked child does not record.

    Bounds of memory per rank, L layers, K picks: device (and pinned host) ring
    L * K * 2 bytes * max(ring_tokens, twice the tokens of one forward pass); shard being filled
    shard_tokens * (L * K * 2 + 25) bytes, and about as much again while it is written. Weights
    double the factor 2 to 4. A process that is killed loses at most the shard being filled.

    Args:
        path: directory, made if absent; every rank writes its own shards into it.
        model: name of the model, kept in the trace; default: that of a transformers model.
        weights: also keep the router weights (float16).
        every_n_steps: record the steps whose number is a multiple of it. ``step()`` counts; until
            it is called for the first time, every forward pass counts as a step.
        global_step: returns the number of the step that runs, instead of both (an engine's
            ``global_steps``; ``attach(engine, ...)`` gives it).
        shard_tokens: tokens per shard.
        ring_tokens: tokens in flight between the model and the writer.
        rank: number of this process in file names and rows; default: torch.distributed's, else the
            environment variable RANK, else 0.
        strict: raise TraceError where a forward pass cannot be recorded.
        sequence_first: the model's hidden states are [S, B, D], not [B, S, D]. Default: found by
            comparing them with the token ids [B, S] that the attached model is given.
        max_wait_s: how long a forward pass may wait for a writer that is behind before its tokens
            are dropped (and counted); 0 = never wait.
        graph_replays: replays of a CUDA graph whose picks the device keeps until the next ``step``,
            ``drain`` or ``flush``, for every number of tokens that ran eagerly before: as many
            times L * T * K * 2 bytes (4 with weights). 0: what graphs replay is not recorded.
        first_request_id: requests are numbered from here where ``annotate`` gives no ids; the
            default is different for every rank and every run. Stages of one pipeline need the
            same: a DeepSpeed ``PipelineModule`` is known, for others give it.
        num_experts: record only the MoE layers with this many experts, for models whose layers
            differ (PR-MoE).

    Raises:
        TraceError: the directory cannot be written, or an argument is impossible.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        model: str = "",
        weights: bool = False,
        every_n_steps: int = 1,
        shard_tokens: int = 262_144,
        ring_tokens: int = 65_536,
        rank: int | None = None,
        strict: bool = False,
        sequence_first: bool | None = None,
        max_wait_s: float = 30.0,
        graph_replays: int = 0,
        first_request_id: int | None = None,
        num_experts: int | None = None,
        global_step: Callable[[], int] | None = None,
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("shard_tokens", shard_tokens, 1),
            ("ring_tokens", ring_tokens, 1),
            ("graph_replays", graph_replays, 0),
        ):
            if value < least:
                raise TraceError(f"found {name}={value}, expected at least {least}: correct it")
        self.path = make_directory(path)
        check_writable(self.path)
        self.rank = default_rank() if rank is None else rank
        self.model = model
        self._shard_tokens, self._num_experts, self._strict = shard_tokens, num_experts, strict
        self._finds_first_id, self._global_step = first_request_id is None, global_step
        if first_request_id is None:
            first_request_id = default_first_request_id(self.path, self.rank)
        self._assembler = Assembler(
            weights=weights,
            every_n_steps=every_n_steps,
            ring_tokens=ring_tokens,
            sequence_first=sequence_first,
            max_wait_s=max_wait_s,
            strict=strict,
            graph_replays=graph_replays,
            next_request_id=first_request_id,
            explicit_steps=global_step is not None,
        )
        self._layers: list[MoeLayer] = []
        self._layer_ids: list[int] = []
        self._handles: list[Handle] = []
        self._writer: WriterThread | None = None
        """None: nothing has been recorded."""
        self._tracker = ModuleTracker()
        self._shape: tuple[Places, Axes | None] = ((), None)
        self._labels: Annotation | None = None
        self._sequences: Sequences | None = None
        # whether the forward pass that runs is for other ranks only; whether another rank records
        self._idle = self._repeats = False
        self._running, self._closed = True, False
        self._failure: Exception | None = None
        _OPEN.add(self)

    # -- attaching ------------------------------------------------------------------------------

    def attach(
        self,
        module: torch.nn.Module,
        *,
        layer_ids: Sequence[int] | None = None,
        routers: Any = None,
    ) -> Handle:
        """Hook every MoE layer below ``module``; numbers go on from the layers attached before.

        Args:
            layer_ids: transformer layer index of each MoE layer, dense layers counted, in the order
                of ``named_modules()``; default: from their names (``layer_numbers``), or 0, 1, ...
            routers: for models that are not known: {class of the router: (number of experts,
                read)}, where read(module, args, output) gives ids [T, K], or (ids, weights).

        Raises:
            TraceError: there is no MoE layer, one is attached already, the ids do not fit, the
                layers have different numbers of experts, or recording has begun with other layers.
        """
        if self._closed or self._failure is not None:
            raise TraceError(
                f"found a recorder that is {'closed' if self._closed else 'failed'}, expected an "
                "open one: make a new RoutingRecorder"
            )
        layers = hooks.find_moe_layers(module, routers)
        attached = set().union(*(handle.modules for handle in self._handles))
        if attached & {id(layer.module) for layer in layers}:
            raise TraceError(
                f"found MoE layers of {type(module).__name__} that this recorder is attached to, "
                "expected new ones: detach the handle first"
            )
        if not attached and self._writer is None:
            self._layers, self._layer_ids = [], []
        layers = hooks.of_one_size(layers, self._layers, self._num_experts)
        dp_rank = hooks.pipeline_rank(module)
        if dp_rank is not None and self._finds_first_id and self._writer is None:
            self._assembler.next_request_id = default_first_request_id(self.path, dp_rank)
        first = self._number(module, layers, layer_ids)
        self._model_type = hooks.model_type_of(module)
        self.model = self.model or _name_of(module)
        places: dict[int, Places] = {}
        for index, layer in enumerate(layers, start=first):
            places[id(layer.module)] = (*places.get(id(layer.module), ()), index)
        made: list[Any] = []
        for layer in (layer for layer in layers if layer.depth == 0):
            of_layer = places[id(layer.module)]
            made += hooks.hook_layer(of_layer, layer, self._on_routes, self._on_shape)
        made += self._hook_forward(module)
        encoder = hooks.encoder_of(module, layers)
        if encoder is not None:
            made += self._hook_encoder(encoder)
        self._handles.append(Handle(self, made, set(places)))
        return self._handles[-1]

    def _number(self, module: Any, layers: list[MoeLayer], layer_ids: Sequence[int] | None) -> int:
        """Take the layers into the table, by default under the ids of their names or the next free
        ones, and return the number of the first."""
        if layer_ids is None:
            layer_ids = hooks.moe_layer_ids(module, [layer.name for layer in layers])
            if layer_ids is None or set(layer_ids) & set(self._layer_ids):
                free = max(self._layer_ids, default=-1) + 1
                layer_ids = range(free, free + len(layers))
        if self._writer is not None:  # a column of the trace cannot be added or changed any more
            sizes, known = ([layer.num_experts for layer in ls] for ls in (layers, self._layers))
            if sizes == known and not any(handle.modules for handle in self._handles):
                self._layers = layers
                return 0
            raise TraceError(
                f"found {len(layers)} more MoE layers after recording began with "
                f"{len(self._layers)}: attach all modules before the first forward pass, or use a "
                "second recorder with another directory"
            )
        first = len(self._layers)
        ids = list(layer_ids)
        taken = [*self._layer_ids, *ids]
        if len(ids) != len(layers) or len(set(taken)) != len(taken) or min(taken) < 0:
            raise TraceError(
                f"found layer_ids {ids} for {len(layers)} MoE layers (taken: {self._layer_ids}), "
                "expected one different non-negative number per layer"
            )
        self._layers = [*self._layers, *layers]
        self._layer_ids = [int(i) for i in taken]
        return first

    @property
    def layer_names(self) -> list[str]:
        """Module names of the MoE layers, in the order of the trace's layers."""
        return [layer.name for layer in self._layers]

    # -- hooks ----------------------------------------------------------------------------------

    def _on_shape(self, places: Places, shape: Axes | None) -> None:
        self._shape = (places, shape)

    def _on_routes(self, places: Places, module: torch.nn.Module, read: Any) -> None:
        if self._idle or not self._records():
            return
        try:
            if self._writer is None:
                self._start()
            of_layer, shape = self._shape
            shape = shape if of_layer == places else None
            annotation = current_annotation()
            if self._labels is not None and self._labels.explicit is annotation:
                annotation = self._labels
            self._assembler.add(places, module, read, shape, annotation)
        except Exception as error:  # noqa: BLE001  a training does not end because its recorder does
            self._fail(error)

    def _hook_forward(self, module: torch.nn.Module) -> list[Any]:
        """Hook the model that is called: its arguments label the tokens, its end ends a block."""
        self._repeats, idle_steps = hooks.repeats_tokens(module), hooks.IdleSteps(module)

        def begins(module, args, kwargs):
            self._idle, idle_steps.next = idle_steps.next, False
            if self._idle or not self._records():
                return
            self._end_block()
            if self._global_step is not None:
                self._assembler.step = self._global_step()
            axes = hooks.input_axes([*args, *kwargs.values()])
            self._assembler.forward, self._labels = Forward(type(module).__name__, axes), None
            self._guarded(self._read_labels, module, args, kwargs)

        return [
            idle_steps,
            module.register_forward_pre_hook(Hook(begins), with_kwargs=True),
            module.register_forward_hook(Hook(self._forward_ends), with_kwargs=True),
        ]

    def _hook_encoder(self, encoder: torch.nn.Module) -> list[Any]:
        """An encoder's tokens are not the decoder's: its pass inside the model's is a block."""
        outer: Annotation | None = None

        def begins(module, args, kwargs):
            nonlocal outer
            outer = self._labels
            if self._records():
                self._finish()
                self._labels = None
                self._guarded(self._read_labels, module, args, kwargs)

        def ends(*_args):
            if self._records():
                self._finish()
                self._labels = None if self._assembler.forward is None else outer

        return [
            encoder.register_forward_pre_hook(Hook(begins), with_kwargs=True),
            encoder.register_forward_hook(Hook(ends)),
        ]

    def _read_labels(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        given = named_arguments(module, args, kwargs)
        if not {"input_ids", "inputs_embeds", "decoder_input_ids"} & given.keys():
            return
        if self._writer is None:
            self._start()
        self._sequences = self._sequences or Sequences(self._assembler.new_requests)
        explicit = current_annotation()
        labels = self._sequences.labels(module, given, explicit)
        self._labels = labels if labels is not explicit else None

    def _forward_ends(self, module: torch.nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        idle, self._idle = self._idle, False
        if idle or not self._records():
            return
        self._assembler.forward, labels = None, self._labels
        if self._sequences is not None:
            given = named_arguments(module, args, kwargs)
            ids = self._assembler.open_requests()
            self._guarded(self._sequences.returned, module, output, given, ids)
        if labels is None or labels.found is None or not labels.found.may_reject:
            self._finish()  # else the next forward pass does: drafts may be rejected until then

    def _records(self) -> bool:
        """False after a failure or close, in a forked child, in backward (recomputation), and where
        another rank records the same tokens."""
        if self._failure is not None:
            if self._strict and not self._closed:
                raise TraceError(f"recording stopped: {self._failure}") from self._failure
            return False
        return self._running and not (self._repeats or self._tracker.is_bw)

    def _start(self) -> None:
        """Start the writer thread, which needs the final number of layers."""
        top_ks = [layer.top_k for layer in self._layers]
        top_k = None if None in top_ks else max(k for k in top_ks if k is not None)
        make = partial(
            ShardWriter,
            self.path,
            model=self.model,
            model_type=self._model_type,
            rank=self.rank,
            layer_ids=tuple(self._layer_ids),
            num_experts=self._layers[0].num_experts,
            weights=self._assembler.weights,
        )
        self._writer = WriterThread(make, top_k, self._shard_tokens, self._writer_failed)
        self._assembler.writer, self._assembler.layer_names = self._writer, self.layer_names

    # -- what the user calls ----------------------------------------------------------------------

    def step(self) -> None:
        """Say that a training step ended: forward passes from here on belong to the next step."""
        if not self._running:
            self._records()
            return
        self.drain()
        step = self._assembler.step + 1 if self._global_step is None else self._global_step()
        self._assembler.step, self._assembler.explicit_steps = step, True

    def replayed(self) -> None:
        """Label the replay of a CUDA graph that was just launched by the ``annotate`` around it;
        after every replay or none. Without it a replay has new requests and the capture's stage."""
        if self._running and self._writer is not None:
            self._assembler.replays.notes.append(current_annotation())

    def drain(self) -> None:
        """Take over what the replays of CUDA graphs recorded, as ``step``, ``flush`` and ``close``
        do; waits for the device if there is such a graph."""
        self._end_block()
        if self._running:
            self._guarded(self._assembler.drain)

    def flush(self) -> None:
        """Write everything recorded so far into a shard, full or not, and wait for it."""
        self.drain()
        if self._running and self._writer is not None and not self._writer.flush(_CLOSE_TIMEOUT_S):
            self._fail(TraceError(f"found the writer busy for {_CLOSE_TIMEOUT_S} s at flush()"))

    def close(self) -> RecorderReport:
        """Detach, write the rest, end the writer thread, and report. Harmless when done before.
        TraceError only with ``strict``: recording had failed, or failed now."""
        if self._closed:
            return self.report()
        with contextlib.suppress(TraceError):  # raised below, when all is written
            self.flush()
        for handle in self._handles:
            handle.detach()
        self._closed, self._running = True, False
        _OPEN.discard(self)
        if self._writer is not None and not self._writer.flush(_CLOSE_TIMEOUT_S, stop=True):
            self._fail(TraceError(f"found the writer busy for {_CLOSE_TIMEOUT_S} s at close()"))
        report = self.report()
        if report.failure or report.dropped_tokens:
            logger.error(
                "the routing trace in %s is incomplete: %d tokens recorded, %d lost, %d forward "
                "passes skipped. %s",
                self.path,
                report.recorded_tokens,
                report.dropped_tokens,
                report.skipped_forwards,
                report.failure or "",
            )
        if self._strict and self._failure is not None:
            raise TraceError(f"recording stopped: {self._failure}") from self._failure
        return report

    def report(self) -> RecorderReport:
        """Counts so far; exact after ``flush()`` and ``close()``."""
        written, lost, shards = self._writer.counts() if self._writer else (0, 0, 0)
        return RecorderReport(
            recorded_tokens=written,
            dropped_tokens=self._assembler.dropped_tokens + lost,
            skipped_forwards=self._assembler.skipped_blocks,
            shards=shards,
            failure=str(self._failure) if self._failure else None,
        )

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # -- trouble ----------------------------------------------------------------------------------

    def _finish(self) -> None:
        if self._running:
            self._guarded(self._assembler.finish)

    def _end_block(self) -> None:
        """Hand the open block over; throw that of a forward pass that raised away."""
        if self._assembler.forward is not None and self._running:
            self._assembler.forward = self._labels = None
            reason = "the forward pass before it did not come to its end"
            self._guarded(self._assembler.discard, reason)
        self._finish()

    def _guarded(self, action: Any, *args: Any) -> None:
        try:
            action(*args)
        except Exception as error:  # noqa: BLE001  as in _on_routes
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Stop recording; in the thread of the model ``strict`` raises."""
        self._writer_failed(error)
        if self._strict:
            raise error

    def _writer_failed(self, error: Exception) -> None:
        first, self._failure = self._failure is None, self._failure or error
        self._running = False  # before the log, which may take long while the model goes on
        if first:
            logger.error(
                "recording of the routing stops, the model goes on: %s", error, exc_info=error
            )


def default_rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def default_first_request_id(directory: Path, rank: int) -> int:
    """Bits 48-62 rank, 32-47 run (by the shards that are there), 0-31 requests of this run."""
    return (rank % 2**15) * 2**48 + (next_sequence(directory, rank) % 2**16) * 2**32


def check_writable(directory: Path) -> None:
    """Write a file and remove it: where a disk is read-only or full, that fails here and now."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe-") as file:
            file.write(b"moe_locality")
            file.flush()
    except OSError as error:
        raise TraceError(
            f"found that nothing can be written to {directory} ({error.strerror}), expected a "
            "writable directory with free space: give another path"
        ) from error


def _name_of(model: torch.nn.Module) -> str:
    """Under which name transformers loaded the model, else its type; "" for other models."""
    config = hooks.config_of(model)
    names = (getattr(config, name, None) for name in ("name_or_path", "model_type"))
    return next((name for name in names if isinstance(name, str) and name), "")


def _close_all() -> None:
    for recorder in list(_OPEN):
        with contextlib.suppress(TraceError):  # logged when it happened
            recorder.close()


def _forget_all() -> None:
    """In a forked child: the writer threads and their queues belong to the parent."""
    for recorder in _OPEN:
        recorder._running, recorder._closed = False, True
    _OPEN.clear()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


class NullRecorder(AbstractContextManager["NullRecorder"]):
    """A recorder that records nothing, so that callers need not ask whether recording is on."""

    def step(self) -> None:
        """Do nothing."""

    replayed = drain = flush = step

    def report(self) -> RecorderReport:
        """Report nothing recorded and nothing lost."""
        return RecorderReport()

    close = report

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
