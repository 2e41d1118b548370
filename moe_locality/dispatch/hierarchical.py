"""The way in two stages: across nodes each token goes once to every node that it needs, inside the
node its rows go on to the ranks that hold the experts.

Stage one runs between the ranks of equal local index on every node (*rails*), stage two between the
ranks of a node. Each stage is a flat exchange: in the first the "experts" are nodes. With a row
travel the slots it is for and their weights, so that stage two can add up, in fp32, what the
experts of a node give; one partial sum per node goes back. The order of these sums differs from the
flat exchange, so results agree within rounding, not bit for bit.

Shapes: M nodes, g ranks of a node, e slots of a rank, N1 (R1) rows sent (received) in stage one.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_locality.dispatch.flat import FlatTransport
from moe_locality.dispatch.permute import StepPlan
from moe_locality.dispatch.traffic import TrafficCounter
from moe_locality.errors import ConfigError
from moe_locality.kernels import ops
from moe_locality.topology.cluster import ClusterTopology


@dataclass(frozen=True, slots=True, kw_only=True)
class Rails:
    """Where this rank stands among the nodes of its EP group.

    ``inter_group``, ``inter_ranks [M]``: the ranks of its local index, one on each node.
    ``intra_group``, ``intra_ranks [g]``: the ranks of its node. ``rail_of_slot [P]``: position in
    ``inter_ranks`` of the node of each slot. ``slot_in_node [P]``: each slot among those of its
    node.
    """

    inter_group: Any
    inter_ranks: tuple[int, ...]
    intra_group: Any
    intra_ranks: tuple[int, ...]
    rail_of_slot: tuple[int, ...]
    slot_in_node: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoStagePlan:
    """The plans of both stages; ``across.row_map.positions [T, M]`` are the rows of each token."""

    across: StepPlan
    inside: StepPlan

    @property
    def tokens_per_local_expert(self) -> tuple[int, ...]:
        return self.inside.tokens_per_local_expert


def find_rails(groups: Any, topology: ClusterTopology, num_slots: int) -> Rails:
    """Return the rails of this rank from the groups that were built for its cluster.

    Args:
        groups: ``moe_locality.topology.groups.ExpertParallelGroups``.

    Raises:
        ConfigError: the nodes of the EP group have different numbers of its ranks.
    """
    ranks: tuple[int, ...] = groups.ep_ranks
    nodes = [topology.node_of(rank) for rank in ranks]
    rails = {topology.node_of(rank): i for i, rank in enumerate(groups.inter_node_ranks)}
    members = {node: [r for r in ranks if topology.node_of(r) == node] for node in set(nodes)}
    if len({len(found) for found in members.values()}) != 1 or set(rails) != set(nodes):
        raise ConfigError(
            f"found an expert group on nodes {nodes} with rails {groups.inter_node_ranks}, "
            "expected as many of its ranks on every node: set dispatch.exchange to 'flat'"
        )
    slots_per_rank = num_slots // len(ranks)
    first = {rank: members[node].index(rank) for rank, node in zip(ranks, nodes, strict=True)}
    return Rails(
        inter_group=groups.inter_node_group,
        inter_ranks=tuple(groups.inter_node_ranks),
        intra_group=groups.intra_node_group,
        intra_ranks=tuple(groups.intra_node_ranks),
        rail_of_slot=tuple(rails[nodes[p // slots_per_rank]] for p in range(num_slots)),
        slot_in_node=tuple(
            first[ranks[p // slots_per_rank]] * slots_per_rank + p % slots_per_rank
            for p in range(num_slots)
        ),
    )


class HierarchicalTransport:
    """Two flat exchanges in a row; the same verbs as :class:`FlatTransport`. Holds no step."""

    def __init__(
        self, rails: Rails, *, comm: Any, kernels: ops.Backend, traffic: TrafficCounter | None
    ) -> None:
        self.rails = rails

        def stage(group: Any, ranks: tuple[int, ...]) -> FlatTransport:
            return FlatTransport(
                group=group,
                num_ranks=len(ranks),
                comm=comm,
                kernels=kernels,
                traffic=None if traffic is None else traffic.among(ranks),
            )

        self.across = stage(rails.inter_group, rails.inter_ranks)
        self.inside = stage(rails.intra_group, rails.intra_ranks)
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def plan(self, slot_ids: Tensor, num_slots: int) -> TwoStagePlan:
        """Agree on the splits of both stages for routes ``[T, K]`` (-1: dropped). Collective."""
        rail_of_slot, slot_in_node = self._on(slot_ids.device)
        num_nodes = len(self.rails.inter_ranks)
        known = slot_ids.clamp_min(0).long()
        rails = torch.where(slot_ids < 0, -1, rail_of_slot[known])  # [T, K]
        every = torch.arange(num_nodes, device=slot_ids.device)
        needed = (rails[:, :, None] == every).any(dim=1)  # [T, M]
        across = self.across.plan(torch.where(needed, every, -1), num_nodes)
        route = across.row_map.row_route.long()  # t * M + rail
        token, rail = route // num_nodes, route % num_nodes
        slots = torch.where(rails[token] == rail[:, None], slot_in_node[known[token]], -1)
        arrived = self.across.to_experts(slots, across, "routing")
        return TwoStagePlan(across=across, inside=self.inside.plan(arrived, num_slots // num_nodes))

    def dispatch(self, x: Tensor, plan: TwoStagePlan) -> Tensor:
        """Return the rows of the local experts, ``[T, D]`` to ``[R, D]``. Collective."""
        return self.inside.dispatch(self.across.dispatch(x, plan.across), plan.inside)

    def combine(self, expert_out: Tensor, weights: Tensor, plan: TwoStagePlan) -> Tensor:
        """Return the weighted sums of the tokens, ``[R, D]`` to ``[T, D]``. Collective."""
        arrived = self.across.dispatch(weights, plan.across, kind="routing")
        partial = self.inside.combine(expert_out, arrived, plan.inside)
        positions = plan.across.row_map.positions
        ones = torch.ones(positions.shape, dtype=torch.float32, device=partial.device)
        return self.across.combine(partial, ones, plan.across)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            self._tables[device] = (
                torch.tensor(self.rails.rail_of_slot, device=device),
                torch.tensor(self.rails.slot_in_node, device=device),
            )
        return self._tables[device]
