"""TokenDispatcher: what a layer calls to send tokens to their experts and back.

:func:`run_moe` is the whole way of the routed tokens, in the two verbs of :class:`TokenDispatcher`,
``dispatch`` and ``combine``. What combine needs from dispatch is in the handle, so several steps
may be in flight. Each verb has a blocking form and an asynchronous one whose ``wait()`` gives the
result; work done between the two overlaps with the exchange. Each verb is one node of the autograd
graph.
"""

import contextlib
import functools
import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_locality.compat import take_default_timeout
from moe_locality.config import DispatchConfig
from moe_locality.dispatch.deepep import DeepEPTransport
from moe_locality.dispatch.desync import CallPosition, announce_process
from moe_locality.dispatch.flat import FlatTransport
from moe_locality.dispatch.hierarchical import HierarchicalTransport, Rails, pays
from moe_locality.dispatch.transport import (
    AllToAllGroup,
    Collectives,
    Combined,
    Dispatched,
    DispatchMetadata,
    StageClock,
    TrafficCounter,
    Transport,
)
from moe_locality.errors import ConfigError, TopologyError
from moe_locality.kernels import ops
from moe_locality.placement.plan import PlacementPlan
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.topology.groups import built_groups

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
AnyTransport = Transport[DispatchMetadata]
RunExperts = Callable[[Tensor, tuple[int, ...]], Tensor]
"""(rows [R, D] ordered by local expert, tokens_per_local_expert [e]) -> results [R, D]"""
_said_lossy: set[str] = set()
_Arguments = ParamSpec("_Arguments")
_OLD_NAMES = {"plan": "metadata", "weights": "topk_weights"}


def _warn_renamed(old: str, new: str) -> None:
    warnings.warn(
        f"{old} is now {new}; the old name goes in the next version",
        DeprecationWarning,
        stacklevel=3,
    )


def _accept_old_names(verb: Callable[_Arguments, Result]) -> Callable[_Arguments, Result]:
    """Let ``verb`` take its arguments by their names of the last version, with a warning."""

    @functools.wraps(verb)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Result:
        for old in _OLD_NAMES.keys() & kwargs.keys():
            _warn_renamed(f"the argument {old!r}", repr(_OLD_NAMES[old]))
            kwargs[_OLD_NAMES[old]] = kwargs.pop(old)
        return verb(*args, **kwargs)

    return call


class SlotMap:
    """The slot that serves each logical expert for the tokens of this rank.

    ``slot_of_expert [E]``; None where expert e is in slot e. Where experts have replicas, each rank
    has its own map; ``[E, X]`` slots in order of preference where the picks of a token decide (rule
    "visited", ``placement/serving.py``), with ``nodes [E, X]`` of these slots.
    """

    def __init__(
        self,
        slot_of_expert: np.ndarray | None = None,
        nodes: np.ndarray | None = None,
        home_node: int = 0,
    ) -> None:
        given = slot_of_expert
        if given is not None and nodes is None and (given == np.arange(len(given))).all():
            slot_of_expert = None  # nothing to look up
        self.slot_of_expert, self.nodes, self.home_node = slot_of_expert, nodes, home_node
        self._on: dict[tuple[str, torch.device], Tensor] = {}

    @classmethod
    def of(cls, slot_to_logical: np.ndarray) -> "SlotMap":
        """Return the map of a permutation ``[E]``: the expert of each slot."""
        return cls(np.argsort(slot_to_logical))

    @classmethod
    def of_plan(cls, plan: PlacementPlan, rank: int) -> "list[SlotMap]":
        """Return the map of each layer of ``plan`` for the tokens of a rank of the EP group."""
        choices, home = plan.slot_choices(rank), int(plan.node_of_rank[rank])
        number = np.cumsum(plan.physical_to_logical_map >= 0, axis=1) - 1  # without empty slots
        layers = np.arange(plan.num_layers)[:, None, None]
        found = np.where(choices >= 0, number[layers, choices], -1)
        if choices.shape[2] == 1:
            return [cls(some) for some in found[..., 0]]
        node_of_slot = plan.node_of_rank[plan.rank_of_slot].astype(np.int64)
        nodes = np.where(choices >= 0, node_of_slot[choices], -1)
        return [cls(*both, home) for both in zip(found.astype(np.int32), nodes, strict=True)]

    def renumbered(self, slots: np.ndarray) -> "SlotMap":
        """Return the map where slot p, on the same rank, has the number ``slots[p]``."""
        given = np.arange(len(slots)) if self.slot_of_expert is None else self.slot_of_expert
        found = np.where(given >= 0, slots[given], -1).astype(given.dtype)
        return SlotMap(found, self.nodes, self.home_node)

    def on(self, device: torch.device, table: str = "slot_of_expert") -> Tensor:
        """Return the map (or ``nodes``) as a tensor on ``device``."""
        if (table, device) not in self._on:
            self._on[table, device] = torch.from_numpy(getattr(self, table)).to(device)
        return self._on[table, device]

    def slot_ids(self, topk_ids: Tensor, kernels: ops.Backend = "auto") -> Tensor:
        """Map logical expert ids ``[T, K]`` (-1 = dropped) to slots, same shape and dtype."""
        if self.slot_of_expert is None:
            return topk_ids
        if self.nodes is not None:
            tables = (self.on(topk_ids.device), self.on(topk_ids.device, "nodes"))
            return ops.serve_visited(topk_ids, *tables, self.home_node, backend=kernels)
        slots = self.on(topk_ids.device).to(topk_ids.dtype)
        return torch.where(topk_ids < 0, topk_ids, slots[topk_ids.clamp_min(0).long()])


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchHandle:
    """What :meth:`TokenDispatcher.combine` needs from the dispatch: ``metadata``, which a later one
    of the same routes may use again, and ``topk_weights``, of the routes where combine uses them.
    """

    metadata: DispatchMetadata
    topk_weights: Tensor
    num_tokens: int  # T
    top_k: int  # K

    @property
    def plan(self) -> DispatchMetadata:
        """Deprecated name of ``metadata``."""
        _warn_renamed("DispatchHandle.plan", "metadata")
        return self.metadata

    @property
    def weights(self) -> Tensor:
        """Deprecated name of ``topk_weights``."""
        _warn_renamed("DispatchHandle.weights", "topk_weights")
        return self.topk_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchOutput:
    """The rows this rank's experts work on.

    ``rows [R, D]``: ordered by local expert, then source rank, then slot order at the source.
    ``tokens_per_local_expert [e]``: rows of each local expert; they sum to R.
    ``handle``: give it to :meth:`TokenDispatcher.combine`.
    """

    rows: Tensor
    tokens_per_local_expert: tuple[int, ...]
    handle: DispatchHandle


class Pending(Generic[Result]):
    """A dispatch or combine in progress; :meth:`wait` returns its result, repeatedly if asked."""

    def __init__(self, finish: Callable[[], Result]) -> None:
        self._finish: Callable[[], Result] | None = finish
        self._result: list[Result] = []

    def wait(self) -> Result:
        """Return the result. Collective: all ranks wait for the same things in the same order."""
        if self._finish is not None:
            finish, self._finish = self._finish, None
            self._result.append(finish())
        return self._result[0]


def warn_if_lossy(config: DispatchConfig) -> None:
    """Log a warning, once per kind, where ``config`` sends rows in a low-bit format."""
    payloads = {"payload": config.payload, "combine_payload": config.combine_payload}
    lossy = [f"dispatch.{name}={value}" for name, value in payloads.items() if value != "none"]
    said = ", ".join(lossy)
    if lossy and said not in _said_lossy:
        _said_lossy.add(said)
        logger.warning(
            "moe_locality: rows travel in a low-bit format (%s): lossy, the model computes with "
            "rounded rows; gradients travel in full",
            said,
        )


class TokenDispatcher:
    """Sends tokens to the slots of an EP group and brings the results back.

    Slot p is on rank ``p // (num_slots / num_ranks)`` of the group. All ranks of the group call the
    same methods in the same order; a rank may have no tokens, and a slot none either.

    Args:
        ep_group: process group, or None for the world.
        topology: node of every (global) rank, for the traffic report.
        num_slots: P, a multiple of ``num_ranks``.
        num_ranks: size of the group when it is not to be asked for (1 without a process group).
        comm: module with ``all_to_all_single``; ``torch.distributed`` by default.
        rails: position of this rank among the nodes, for the hierarchical exchange. With
            ``exchange: auto`` they decide: two stages where they are given.
        kernels: backend of the local kernels.
        position: which layer this is, sent to the other ranks with the counts; layers without one
            are numbered in the order of their first dispatch.
        slot_map: the slot of each logical expert, for :func:`run_moe`; identity by default.
        traffic: a counter of these ranks that goes on counting; a new one by default.
    """

    def __init__(
        self,
        ep_group: "ProcessGroup | None" = None,
        topology: ClusterTopology | None = None,
        *,
        num_slots: int,
        num_ranks: int | None = None,
        config: DispatchConfig | None = None,
        comm: Collectives | None = None,
        kernels: ops.Backend = "auto",
        rails: Rails | None = None,
        position: CallPosition | None = None,
        slot_map: SlotMap | None = None,
        traffic: TrafficCounter | None = None,
    ) -> None:
        config = config or DispatchConfig()
        warn_if_lossy(config)
        ops.check_backend(kernels)
        ranks = group_ranks(ep_group, num_ranks)
        if num_slots % len(ranks):
            raise TopologyError(
                f"found {num_slots} slots for {len(ranks)} ranks, expected a multiple: every rank "
                "holds the same number of experts"
            )
        self.num_slots = num_slots
        self.position = position or CallPosition()
        self.slot_map = slot_map or SlotMap()
        self.kernels: ops.Backend = kernels
        clock = StageClock(config.timing)
        self.traffic = traffic or TrafficCounter(ranks=ranks, topology=topology, clock=clock)
        self.transport = self._make_transport(config, ep_group, rails, comm or torch.distributed)
        if len(ranks) > 1:
            announce_process()
            if ep_group is not None:
                take_default_timeout(ep_group)

    @_accept_old_names
    def dispatch(
        self,
        x: Tensor,
        slot_ids: Tensor,
        topk_weights: Tensor,
        metadata: DispatchMetadata | None = None,
    ) -> DispatchOutput:
        """Send each token to the slots of its routes.

        Args:
            x: ``[T, D]``. slot_ids: ``[T, K]`` integer, -1 where a route is dropped.
            topk_weights: ``[T, K]``, for :meth:`combine` (that of a dropped route is not used).
            metadata: ``handle.metadata`` of an earlier dispatch of the same ``slot_ids`` (on every
                rank): nothing is sorted and no counts are exchanged.

        Raises:
            ConfigError: the metadata is of another number of routes, or of another transport.
        """
        return self.dispatch_async(x, slot_ids, topk_weights, metadata).wait()

    @_accept_old_names
    def dispatch_async(
        self,
        x: Tensor,
        slot_ids: Tensor,
        topk_weights: Tensor,
        metadata: DispatchMetadata | None = None,
    ) -> Pending[DispatchOutput]:
        """Begin :meth:`dispatch`: rows travel until ``wait()``, which gives its output.

        In two stages, the rows between the nodes travel meanwhile; those inside go on in ``wait``.
        """
        if metadata is not None:
            self._check_metadata(metadata, slot_ids)
        self.position.enter(self.traffic.ranks)
        transport = self.transport
        sent_weights = topk_weights if transport.sends_weights else None
        with torch.no_grad():
            receive = transport.start_dispatch(x, slot_ids, sent_weights, metadata)

        def finish() -> DispatchOutput:
            with torch.no_grad():
                received = receive()
            apply: Any = _Dispatch.apply
            rows, arrived = apply(x, sent_weights, transport, received)
            made = received[0]
            self.traffic.load += rows.shape[0]
            handle = DispatchHandle(
                metadata=made,
                topk_weights=topk_weights if arrived is None else arrived,
                num_tokens=x.shape[0],
                top_k=slot_ids.shape[1],
            )
            counts = made.tokens_per_local_expert
            return DispatchOutput(rows=rows, tokens_per_local_expert=counts, handle=handle)

        return Pending(finish)

    def checked(self, topk_ids: Tensor) -> Tensor:
        """Return logical ids that name experts.

        Where one does not, the exchange of counts will raise on all ranks of the group, and nothing
        is sent. Nothing is checked on a GPU, which would be waited for, or where no counts travel.

        Raises:
            ConfigError: an id is too large, and this rank is the whole group.
        """
        self.position.failure = ""
        config = self.transport.config
        uncounted = config.capacity or isinstance(self.transport, DeepEPTransport)
        if uncounted or topk_ids.is_cuda or not topk_ids.numel():
            return topk_ids
        known, largest = self.slot_map.slot_of_expert, int(topk_ids.max())
        count = self.num_slots if known is None else len(known)
        if largest < count:
            return topk_ids
        failure = (
            f"found expert {largest} in the routes, expected at most {count - 1}: look at what "
            "picks the experts"
        )
        if len(self.traffic.ranks) == 1:
            raise ConfigError(failure)
        self.position.failure = failure
        return torch.full_like(topk_ids, -1)

    def combine(self, expert_out: Tensor, handle: DispatchHandle) -> Tensor:
        """Bring the experts' results back and add them up per token, by their weights: ``expert_out
        [R, D]`` in the order of ``DispatchOutput.rows`` gives ``[T, D]`` in its dtype.
        """
        return self.combine_async(expert_out, handle).wait()

    def combine_async(self, expert_out: Tensor, handle: DispatchHandle) -> Pending[Tensor]:
        """Begin :meth:`combine`: results travel until ``wait()``, which gives its output."""
        transport, metadata, weights = self.transport, handle.metadata, handle.topk_weights
        with torch.no_grad():
            receive = transport.start_combine(expert_out, weights, metadata)
        apply: Any = _Combine.apply
        return Pending(lambda: apply(expert_out, weights, transport, receive, metadata))

    def _make_transport(
        self,
        config: DispatchConfig,
        group: "ProcessGroup | None",
        rails: Rails | None,
        comm: Collectives,
    ) -> AnyTransport:
        """Return the transport that ``config`` asks for. ConfigError: that is not possible here,
        BackendUnavailable: DeepEP is asked for and is not installed."""
        traffic, ranks = self.traffic, self.traffic.ranks
        common = (config, self.num_slots, self.kernels, traffic.clock)
        part = functools.partial(AllToAllGroup, comm=comm, counter=traffic, position=self.position)
        whole = part(process_group=group, ranks=ranks)
        flat = config.exchange == "flat" or (config.exchange == "auto" and rails is None)
        if config.exchange == "deepep" and len(ranks) > 1:
            made: Transport[Any] = DeepEPTransport(*common, group)
        elif config.capacity or flat or len(ranks) == 1:
            made = FlatTransport(*common, whole)
        elif rails is None:
            raise ConfigError(
                "dispatch.exchange is 'hierarchical' and the expert groups of the nodes were "
                "not made: start with moe_locality.initialize, or use 'flat'"
            )
        else:
            across = part(process_group=rails.inter_group, ranks=rails.inter_ranks)
            inside = part(process_group=rails.intra_group, ranks=rails.intra_ranks)
            made = HierarchicalTransport(*common, rails, across, inside)
        # a transport only gets metadata that it made: dispatch checks metadata_type
        return cast("AnyTransport", made)

    def _check_metadata(self, metadata: DispatchMetadata, slot_ids: Tensor) -> None:
        expected = self.transport.metadata_type
        if not isinstance(metadata, expected):
            raise ConfigError(
                f"found dispatch metadata of type {type(metadata).__name__}, expected "
                f"{expected.__name__}: give the metadata of an earlier dispatch of this dispatcher"
            )
        if metadata.shape != tuple(slot_ids.shape):
            raise ConfigError(
                f"found metadata of routes {metadata.shape} and routes {tuple(slot_ids.shape)}, "
                "expected the metadata of the same routes: leave it out"
            )


def run_moe(
    dispatcher: TokenDispatcher,
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    run_experts: RunExperts,
    *,
    overlap_fn: Callable[[], object] | None = None,
    stage: Callable[[str], AbstractContextManager[object]] = contextlib.nullcontext,
) -> Tensor:
    """Send routed tokens through their experts: ``x [T, D]`` to ``[T, D]``, with autograd.

    Slots are looked up in ``dispatcher.slot_map``, ``dispatcher.traffic`` counts. Collective over
    the EP group.

    Args:
        topk_ids: ``[T, K]`` integer logical expert ids, -1 where a route is dropped.
        topk_weights: ``[T, K]`` of the sum over a token's experts.
        run_experts: runs the local experts, see :data:`RunExperts`.
        overlap_fn: called while the results travel back.
        stage: ``stage("dispatch")`` and ``stage("combine")`` give context managers that are entered
            around the two exchanges, such as timers.
    """
    with stage("dispatch"):
        ids = dispatcher.checked(topk_ids)
        slot_ids = dispatcher.slot_map.slot_ids(ids, dispatcher.kernels)
        routed = dispatcher.dispatch(x, slot_ids, topk_weights)
    expert_out = run_experts(routed.rows, routed.tokens_per_local_expert)
    with stage("combine"):
        results = dispatcher.combine_async(expert_out, routed.handle)
        if overlap_fn is not None:
            overlap_fn()
        return results.wait()


class _Dispatch(torch.autograd.Function):
    """``(x [T, D], weights [T, K] or None)`` to the experts' rows ``[R, D]``, and their weights
    where they are used (None where that is this rank)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor | None,
        transport: AnyTransport,
        received: Dispatched[DispatchMetadata],
    ) -> tuple[Tensor, Tensor | None]:
        ctx.transport = transport
        ctx.dispatch_metadata, rows, arrived = received
        return rows, arrived

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor | None) -> tuple:
        if not ctx.needs_input_grad[1]:
            grad_weights = None
        transport: AnyTransport = ctx.transport
        grads = transport.dispatch_backward(
            grad_rows.contiguous(), grad_weights, ctx.dispatch_metadata
        )
        return *grads, None, None


class _Combine(torch.autograd.Function):
    """``(expert_out [R, D], weights)`` to the weighted sums of the tokens ``[T, D]``."""

    @staticmethod
    def forward(
        ctx: Any,
        expert_out: Tensor,
        weights: Tensor,
        transport: AnyTransport,
        receive: Callable[[], Combined],
        metadata: DispatchMetadata,
    ) -> Tensor:
        out, rows = receive()
        ctx.transport, ctx.dispatch_metadata = transport, metadata
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        rows, weights = ctx.saved_tensors
        transport: AnyTransport = ctx.transport
        grads = transport.combine_backward(
            grad.contiguous(), rows, weights, ctx.dispatch_metadata, ctx.needs_input_grad[0]
        )
        return *grads, None, None, None


class ExchangingLayer:
    """What a layer of every front end has: the settings of its exchange, and the dispatcher.

    The first call makes the dispatcher; set ``dispatcher`` to None where a setting changes.
    ``traffic`` counts what was sent (None before the first call); the next dispatcher goes on with
    ``counter``, where it is set.
    """

    dispatch_config: DispatchConfig
    kernels: ops.Backend
    topology: ClusterTopology | None = None
    dispatcher: TokenDispatcher | None = None
    counter: TrafficCounter | None = None
    call_position: CallPosition

    @property
    def traffic(self) -> TrafficCounter | None:
        return self.dispatcher.traffic if self.dispatcher is not None else None

    def __getstate__(self) -> dict[str, Any]:
        # a copy makes its own dispatcher: groups and modules cannot be copied
        return {**self.__dict__, "dispatcher": None}

    def get_dispatcher(
        self,
        ep_group: "ProcessGroup | None",
        slot_map: SlotMap,
        *,
        num_slots: int,
        num_ranks: int,
        top_k: int,
        comm: Collectives | None = None,
    ) -> TokenDispatcher:
        """Return the dispatcher, with this map; in two stages where that is asked for or pays.

        Topology and rails are those of the groups that were built for these ranks, where any were.
        """
        if self.dispatcher is None:
            config, rails = self.dispatch_config, None
            ranks = group_ranks(ep_group, num_ranks)
            groups = built_groups(ranks, self.topology)
            if self.topology is None and groups is not None:
                self.topology = groups.topology
            if groups is not None and self.topology is not None and num_ranks > 1:
                where = (ranks, self.topology, num_slots, top_k)
                staged = config.exchange == "auto" and pays(*where)
                if staged or config.exchange == "hierarchical":
                    rails = Rails(groups, self.topology, num_slots)
            self.dispatcher = TokenDispatcher(
                ep_group,
                self.topology,
                num_slots=num_slots,
                num_ranks=num_ranks,
                config=config,
                comm=comm,
                kernels=self.kernels,
                position=self.call_position,
                rails=rails,
                traffic=self.counter,
            )
        self.dispatcher.slot_map = slot_map
        return self.dispatcher


def group_ranks(ep_group: "ProcessGroup | None", num_ranks: int | None) -> tuple[int, ...]:
    """Return the global ranks of a group in group order; ``(own rank,)`` for a group of one."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not running:
        if num_ranks not in (None, 1):
            raise TopologyError(
                f"found no process group, expected one of {num_ranks} ranks: call "
                "deepspeed.init_distributed (or moe_locality.initialize) first"
            )
        return (0,)
    if num_ranks == 1:
        return (torch.distributed.get_rank(),)
    group = ep_group if ep_group is not None else torch.distributed.group.WORLD
    ranks = tuple(torch.distributed.get_process_group_ranks(group))
    if num_ranks is not None and len(ranks) != num_ranks:
        raise TopologyError(
            f"found an expert-parallel group of {len(ranks)} ranks, expected ep_size={num_ranks}: "
            "let deepspeed.initialize make the groups, or give ep_size the size of the world"
        )
    return ranks
