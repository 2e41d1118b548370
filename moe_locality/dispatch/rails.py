"""Where a rank stands among the nodes of its EP group: facts of the cluster, no collective."""

from dataclasses import dataclass
from typing import Any

from moe_locality.errors import ConfigError
from moe_locality.topology.cluster import ClusterTopology


@dataclass(frozen=True, slots=True, kw_only=True)
class Rails:
    """Where this rank stands among the nodes of its EP group.

    ``inter_group``, ``inter_ranks [M]``: the ranks of its local index, one on each node.
    ``intra_group``, ``intra_ranks [g]``: the ranks of its node. ``rail_of_slot [P]``: position in
    ``inter_ranks`` of the node of each slot. ``slot_in_node [P]``: each slot among those of its
    node. ``members [M][g]``: position in the EP group of each rank of each node.
    """

    inter_group: Any
    inter_ranks: tuple[int, ...]
    intra_group: Any
    intra_ranks: tuple[int, ...]
    rail_of_slot: tuple[int, ...]
    slot_in_node: tuple[int, ...]
    members: tuple[tuple[int, ...], ...]


def nodes_are_even(ranks: tuple[int, ...], topology: ClusterTopology) -> bool:
    """Return whether every node of an EP group holds as many of its ranks."""
    nodes = [topology.node_of(rank) for rank in ranks]
    return len({nodes.count(node) for node in nodes}) == 1


def pays(ranks: tuple[int, ...], topology: ClusterTopology, num_slots: int, top_k: int) -> bool:
    """Return whether ``exchange: auto`` takes the two stages.

    The group spans several nodes, evenly, and either some node has several of its ranks (fewer and
    larger messages between nodes), or a token can have two picks on one remote node.
    """
    nodes = {topology.node_of(rank) for rank in ranks}
    if len(nodes) == 1 or not nodes_are_even(ranks, topology):
        return False
    return len(ranks) > len(nodes) or (top_k > 1 and num_slots > len(nodes))


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
    if not nodes_are_even(ranks, topology) or set(rails) != set(nodes):
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
        members=tuple(
            tuple(ranks.index(rank) for rank in members[node])
            for node in sorted(rails, key=lambda node: rails[node])
        ),
    )
