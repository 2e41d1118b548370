"""TokenDispatcher: the object a layer talks to. Two verbs, ``dispatch`` and ``combine``.

What combine needs from dispatch travels in the handle, so several steps may be in flight.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed
from torch import Tensor

from moe_locality.config import DispatchConfig
from moe_locality.dispatch.flat import FlatTransport
from moe_locality.dispatch.hierarchical import HierarchicalTransport, Rails, TwoStagePlan
from moe_locality.dispatch.permute import StepPlan
from moe_locality.dispatch.traffic import TrafficCounter
from moe_locality.errors import ConfigError, TopologyError
from moe_locality.kernels import ops
from moe_locality.topology.cluster import ClusterTopology


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchHandle:
    """What :meth:`TokenDispatcher.combine` needs from the dispatch.

    ``plan``: the splits and orders of the step. ``num_tokens``: T. ``top_k``: K.
    """

    plan: StepPlan | TwoStagePlan
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


def check_dispatch_config(config: DispatchConfig) -> None:
    """Raise ConfigError where ``config`` asks for what this version does not have."""
    if config.payload != "none":
        raise ConfigError(
            f"dispatch.payload is {config.payload!r}, which is not available yet, expected 'none': "
            "change it"
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
        rails: where this rank stands among the nodes, for the hierarchical exchange.
        kernels: backend of the local kernels.
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
        self.traffic = TrafficCounter(ranks=ranks, topology=topology)
        self.transport: FlatTransport | HierarchicalTransport
        comm = comm or torch.distributed
        if config.exchange == "hierarchical" and len(ranks) > 1:
            if rails is None:
                raise ConfigError(
                    "dispatch.exchange is 'hierarchical' and the expert groups of the nodes were "
                    "not made: start with moe_locality.initialize, or use 'flat'"
                )
            self.transport = HierarchicalTransport(
                rails, comm=comm, kernels=kernels, traffic=self.traffic
            )
            return
        self.transport = FlatTransport(
            group=ep_group,
            num_ranks=len(ranks),
            comm=comm,
            kernels=kernels,
            traffic=self.traffic,
        )

    def dispatch(self, x: Tensor, slot_ids: Tensor) -> DispatchOutput:
        """Send each token to the slots of its routes.

        Args:
            x: ``[T, D]``. slot_ids: ``[T, K]`` integer, -1 where a route is dropped.
        """
        transport: Any = self.transport  # its plans are its own
        plan = transport.plan(slot_ids, self.num_slots)
        return DispatchOutput(
            rows=transport.dispatch(x, plan),
            tokens_per_local_expert=plan.tokens_per_local_expert,
            handle=DispatchHandle(plan=plan, num_tokens=x.shape[0], top_k=slot_ids.shape[1]),
        )

    def combine(self, expert_out: Tensor, weights: Tensor, handle: DispatchHandle) -> Tensor:
        """Bring the experts' results back and add them up per token.

        ``expert_out [R, D]`` in the order of ``DispatchOutput.rows``, ``weights [T, K]`` fp32 (the
        weight of a dropped route is not used); gives ``[T, D]`` in the dtype of ``expert_out``.
        """
        transport: Any = self.transport
        return transport.combine(expert_out, weights, handle.plan)


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
