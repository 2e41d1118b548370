"""TokenDispatcher: the object a layer talks to. Two verbs, ``dispatch`` and ``combine``.

What combine needs from dispatch travels in the handle, so several steps may be in flight. Each verb
comes as a call and as a start (``dispatch_async``, ``combine_async``) whose ``wait()`` gives the
result: what is computed between the two runs while rows travel. The first half knows no autograd;
the second is one autograd function for each direction, so the graph sees one node for each.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_locality.compat import take_default_timeout
from moe_locality.config import DispatchConfig
from moe_locality.dispatch.codec import codec_of
from moe_locality.dispatch.deepep import DeepEPPlan, DeepEPTransport
from moe_locality.dispatch.exchange import Link
from moe_locality.dispatch.flat import FixedTransport, FlatTransport, StepPlan
from moe_locality.dispatch.hierarchical import HierarchicalTransport, Rails, TwoStagePlan
from moe_locality.dispatch.notes import introduce
from moe_locality.dispatch.place import Place
from moe_locality.dispatch.traffic import StageClock, TrafficCounter
from moe_locality.errors import ConfigError, TopologyError
from moe_locality.kernels import ops
from moe_locality.topology.cluster import ClusterTopology

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
AnyPlan = StepPlan | TwoStagePlan | DeepEPPlan
_said_lossy: set[str] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchHandle:
    """What :meth:`TokenDispatcher.combine` needs from the dispatch.

    ``plan``: the splits and orders of the step; give it to a later dispatch of the same routes to
    use it again. ``weights``: those of the routes, where combine uses them. ``num_tokens``: T.
    ``top_k``: K.
    """

    plan: AnyPlan
    weights: Tensor
    num_tokens: int
    top_k: int


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
    """A dispatch or a combine on its way; :meth:`wait` gives its result, as often as asked."""

    def __init__(self, finish: Callable[[], Result]) -> None:
        self._finish: Callable[[], Result] | None = finish
        self._result: Any = None

    def wait(self) -> Result:
        """Return the result. Collective: all ranks wait for the same things in the same order."""
        if self._finish is not None:
            finish, self._finish = self._finish, None
            self._result = finish()
        return self._result


def check_dispatch_config(config: DispatchConfig) -> None:
    """Say in the log, once, where ``config`` asks for something lossy."""
    lossy = {
        name: value
        for name, value in (
            ("payload", config.payload),
            ("combine_payload", config.combine_payload),
        )
        if value != "none"
    }
    said = ", ".join(f"dispatch.{name}={value}" for name, value in lossy.items())
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
        rails: where this rank stands among the nodes, for the hierarchical exchange. With
            ``exchange: auto`` they decide: two stages where they are given.
        kernels: backend of the local kernels.
        place: which layer this is, told to the other ranks with the counts; layers without one are
            numbered in the order of their first dispatch.
    """

    def __init__(
        self,
        ep_group: Any = None,
        topology: ClusterTopology | None = None,
        *,
        num_slots: int,
        num_ranks: int | None = None,
        config: DispatchConfig | None = None,
        comm: Any = None,
        kernels: ops.Backend = "auto",
        rails: Rails | None = None,
        place: Place | None = None,
    ) -> None:
        config = config or DispatchConfig()
        check_dispatch_config(config)
        ops.check_backend(kernels)
        ranks = group_ranks(ep_group, num_ranks)
        if num_slots % len(ranks):
            raise TopologyError(
                f"found {num_slots} slots for {len(ranks)} ranks, expected a multiple: every rank "
                "holds the same number of experts"
            )
        self.num_slots = num_slots
        self.place = place or Place()
        clock = StageClock(config.timing)
        self.traffic = TrafficCounter(ranks=ranks, topology=topology, clock=clock)
        self.transport = make_transport(
            config,
            group=ep_group,
            size=len(ranks),
            rails=rails,
            num_slots=num_slots,
            comm=comm or torch.distributed,
            kernels=kernels,
            traffic=self.traffic,
            place=self.place,
        )
        if len(ranks) > 1:
            introduce()
            if ep_group is not None:
                take_default_timeout(ep_group)

    def dispatch(
        self,
        x: Tensor,
        slot_ids: Tensor,
        weights: Tensor,
        plan: AnyPlan | None = None,
    ) -> DispatchOutput:
        """Send each token to the slots of its routes.

        Args:
            x: ``[T, D]``. slot_ids: ``[T, K]`` integer, -1 where a route is dropped.
            weights: ``[T, K]``, for :meth:`combine` (that of a dropped route is not used).
            plan: of an earlier dispatch of the same ``slot_ids`` (on every rank): nothing is sorted
                and no counts are exchanged.

        Raises:
            ConfigError: the plan is for another number of routes.
        """
        return self.dispatch_async(x, slot_ids, weights, plan).wait()

    def dispatch_async(
        self,
        x: Tensor,
        slot_ids: Tensor,
        weights: Tensor,
        plan: AnyPlan | None = None,
    ) -> Pending[DispatchOutput]:
        """Begin :meth:`dispatch`: rows travel until ``wait()``, which gives its output.

        In two stages, the rows between the nodes travel meanwhile; those inside go on in ``wait``.
        """
        if plan is not None and plan.shape != tuple(slot_ids.shape):
            raise ConfigError(
                f"found a plan for routes {plan.shape} and routes {tuple(slot_ids.shape)}, "
                "expected the plan of the same routes: leave it out"
            )
        self.place.enter(self.traffic.ranks)
        transport: Any = self.transport  # its plans are its own
        travelling = weights if transport.weights_travel else None
        with torch.no_grad():
            started = transport.start_dispatch(x, slot_ids, travelling, plan)

        def finish() -> DispatchOutput:
            made, rows, arrived = _finish_dispatch(x, travelling, transport, started)
            self.traffic.load += rows.shape[0]
            return DispatchOutput(
                rows=rows,
                tokens_per_local_expert=made.tokens_per_local_expert,
                handle=DispatchHandle(
                    plan=made,
                    weights=weights if arrived is None else arrived,
                    num_tokens=x.shape[0],
                    top_k=slot_ids.shape[1],
                ),
            )

        return Pending(finish)

    def combine(self, expert_out: Tensor, handle: DispatchHandle) -> Tensor:
        """Bring the experts' results back and add them up per token, by their weights.

        ``expert_out [R, D]`` in the order of ``DispatchOutput.rows`` gives ``[T, D]`` in its dtype.
        """
        return self.combine_async(expert_out, handle).wait()

    def combine_async(self, expert_out: Tensor, handle: DispatchHandle) -> Pending[Tensor]:
        """Begin :meth:`combine`: results travel until ``wait()``, which gives its output."""
        transport: Any = self.transport
        plan, weights = handle.plan, handle.weights
        with torch.no_grad():
            started = transport.start_combine(expert_out, weights, plan)
        return Pending(lambda: _finish_combine(expert_out, weights, transport, started, plan))


class _Dispatch(torch.autograd.Function):
    """``(x [T, D], weights [T, K] or None)`` to the rows of the local experts ``[R, D]`` and the
    weights where they are used (None where that is this rank).

    Backward sends the gradients of both back in one exchange.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor | None, transport: Any, started: Any, keep: list
    ) -> tuple[Tensor, Tensor | None]:
        plan, rows, arrived = transport.finish_dispatch(started, x)
        ctx.transport, ctx.plan = transport, plan
        keep.append(plan)
        return rows, arrived

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor | None) -> tuple:
        if not ctx.needs_input_grad[1]:
            grad_weights = None
        grads = ctx.transport.dispatch_backward(grad_rows.contiguous(), grad_weights, ctx.plan)
        return *grads, None, None, None


class _Combine(torch.autograd.Function):
    """``(expert_out [R, D], weights)`` to the weighted sums of the tokens ``[T, D]``."""

    @staticmethod
    def forward(
        ctx: Any, expert_out: Tensor, weights: Tensor, transport: Any, started: Any, plan: Any
    ) -> Tensor:
        out, rows = transport.finish_combine(started, expert_out, weights, plan)
        ctx.transport, ctx.plan = transport, plan
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        rows, weights = ctx.saved_tensors
        grads = ctx.transport.combine_backward(
            grad.contiguous(), rows, weights, ctx.plan, ctx.needs_input_grad[0]
        )
        return *grads, None, None, None


def _finish_dispatch(x: Tensor, weights: Tensor | None, transport: Any, started: Any) -> tuple:
    """Finish a dispatch; return (plan, rows, weights where they are used)."""
    keep: list = []
    apply: Any = _Dispatch.apply
    rows, arrived = apply(x, weights, transport, started, keep)
    return keep[0], rows, arrived


def _finish_combine(
    expert_out: Tensor, weights: Tensor, transport: Any, started: Any, plan: Any
) -> Tensor:
    """Finish a combine."""
    apply: Any = _Combine.apply
    return apply(expert_out, weights, transport, started, plan)


def make_transport(
    config: DispatchConfig,
    *,
    group: Any,
    size: int,
    rails: Rails | None,
    num_slots: int,
    comm: Any,
    kernels: ops.Backend,
    traffic: TrafficCounter,
    place: Place,
) -> FlatTransport | HierarchicalTransport | DeepEPTransport:
    """Return the way across ``size`` ranks that ``config`` asks for; the arguments are those of
    :class:`TokenDispatcher`.

    Raises:
        ConfigError: what is asked for cannot be here.
        BackendUnavailable: DeepEP is asked for and is not installed.
    """
    common: dict[str, Any] = {
        "num_slots": num_slots,
        "kernels": kernels,
        "payload": codec_of(config.payload),
        "combine_payload": codec_of(config.combine_payload),
        "clock": traffic.clock,
    }
    told: dict[str, Any] = {"comm": comm, "group_ranks": traffic.ranks, "place": place}
    if config.exchange == "deepep" and size > 1:
        if (config.payload, config.combine_payload) != ("none", "none"):
            raise ConfigError(
                f"found payload {config.payload!r} and combine_payload "
                f"{config.combine_payload!r} with exchange 'deepep', expected 'none': DeepEP "
                "moves the rows, and knows no such format of ours"
            )
        most = config.deepep_max_tokens_per_rank
        return DeepEPTransport(
            group=group, num_slots=num_slots, max_tokens=most, clock=traffic.clock
        )
    capacity, flat = config.capacity, config.exchange == "auto" and rails is None
    if capacity or flat or size == 1 or config.exchange == "flat":
        link = Link(group=group, size=size, counter=traffic, ranks=traffic.ranks, **told)
        if capacity:
            return FixedTransport(link, capacity=capacity, **common)
        return FlatTransport(link, **common)
    if rails is None:
        raise ConfigError(
            "dispatch.exchange is 'hierarchical' and the expert groups of the nodes were "
            "not made: start with moe_locality.initialize, or use 'flat'"
        )
    across, inside = (
        Link(group=part, size=len(part_of), counter=traffic.among(part_of), ranks=part_of, **told)
        for part, part_of in (
            (rails.inter_group, rails.inter_ranks),
            (rails.intra_group, rails.intra_ranks),
        )
    )
    return HierarchicalTransport(
        rails, across=across, inside=inside, reduce_at_node=config.reduce_at_node, **common
    )


def group_ranks(ep_group: Any, num_ranks: int | None) -> tuple[int, ...]:
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
