"""Rank lists of the expert groups of a cluster: pure functions, no torch, no collectives.

For one ``ep_size`` every rank is in one *EP group* (the ranks that share one set of experts) and
in one *EDP group* (the ranks that hold the same experts, in different EP groups). Inside an EP
group, the *intra-node groups* are its ranks of one node and the *inter-node groups* its ranks of
equal local index, one of each node: the two steps of a hierarchical exchange.

Process groups sort their ranks (``torch.distributed.new_group``), so the position of a rank in its
EP group, which decides the experts it holds, is its place in the sorted list. EDP groups are
derived from those positions and not from the order in which a group was put together.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moe_locality.errors import TopologyError
from moe_locality.topology.cluster import ClusterTopology

logger = logging.getLogger(__name__)

Order = Literal["E+D", "D+E"]
RankGroups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupLayout:
    """The expert groups of all ranks for one ``ep_size``; every list of ranks is ascending."""

    ep_size: int
    order: Order
    ep_groups: RankGroups
    edp_groups: RankGroups
    intra_node_groups: RankGroups
    inter_node_groups: RankGroups

    @property
    def num_ranks(self) -> int:
        return sum(map(len, self.ep_groups))

    def digest(self) -> str:
        """Return a hash of the content, to compare the layouts of two ranks."""
        content = [getattr(self, name) for name in self.__dataclass_fields__]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def group_of(groups: RankGroups, rank: int) -> tuple[int, ...]:
    """Return the group that holds a rank."""
    for group in groups:
        if rank in group:
            return group
    raise TopologyError(f"found rank {rank} in no group, expected it in one of {groups}")


def layout_groups(
    topology: ClusterTopology, ep_size: int, order: Order = "E+D", mpu: Any = None
) -> GroupLayout:
    """Lay out the expert groups of a cluster.

    ``"E+D"`` (DeepSpeed's default) makes EP groups of neighboring ranks: inside one node when they
    fit, of whole nodes when they do not. ``"D+E"`` (``use_data_before_expert_parallelism`` in the
    ds_config) makes EDP groups of neighboring ranks and lets EP groups stride over them. Neighbors
    are taken node by node, so the ranks of a node need not be consecutive; where they are, the
    groups are the ones that DeepSpeed makes itself.

    ``mpu`` is the model-parallel unit that ``deepspeed.initialize`` gets, if any.

    Raises:
        TopologyError: the groups do not fit the cluster, or ``mpu`` splits the ranks further.
    """
    if order not in ("E+D", "D+E"):
        raise TopologyError(f"found order={order!r}, expected 'E+D' or 'D+E'")
    _refuse_model_parallelism(mpu)
    _check_sizes(topology, ep_size, order)
    node_major = sorted(
        range(topology.num_ranks), key=lambda rank: (topology.rank_to_node[rank], rank)
    )
    if order == "E+D":
        ep_groups = _chunks(node_major, ep_size)
    else:
        ep_groups = list(zip(*_chunks(node_major, topology.num_ranks // ep_size), strict=True))
    ep_groups = tuple(sorted(tuple(sorted(group)) for group in ep_groups))
    intra, inter = _node_groups(topology, ep_groups)
    _warn_of_different_shapes(topology, ep_groups)
    return GroupLayout(
        ep_size=ep_size,
        order=order,
        ep_groups=ep_groups,
        edp_groups=tuple(tuple(sorted(ranks)) for ranks in zip(*ep_groups, strict=True)),
        intra_node_groups=intra,
        inter_node_groups=inter,
    )


def _chunks(ranks: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return [tuple(ranks[start : start + size]) for start in range(0, len(ranks), size)]


def _check_sizes(topology: ClusterTopology, ep_size: int, order: Order) -> None:
    world, per_node = topology.num_ranks, topology.ranks_per_node  # uneven nodes raise here
    if ep_size < 1 or world % ep_size:
        raise TopologyError(
            f"found ep_size={ep_size} for {world} ranks, expected a divisor of {world}: "
            "change ep_size or the number of ranks"
        )
    name, size = ("ep_size", ep_size) if order == "E+D" else ("EDP size", world // ep_size)
    if per_node % size and size % per_node:
        raise TopologyError(
            f"found {name} {size} on {topology.describe()}, expected a divisor or a multiple of "
            f"{per_node}: otherwise a group holds parts of nodes; change ep_size or use as many "
            "ranks of each node as fit"
        )


def _refuse_model_parallelism(mpu: Any) -> None:
    """Refuse an ``mpu`` that splits the ranks: its groups and ours would overlap wrongly.

    DeepSpeed lays expert groups over consecutive ranks, which are then tensor-parallel peers: they
    hold the same tokens, so an EP group would send each token several times, and the EDP groups
    would average over ranks that are no data-parallel peers.
    """
    if mpu is None:
        return
    for what, names in {
        "tensor": ("get_tensor_model_parallel_world_size", "get_model_parallel_world_size"),
        "pipeline": ("get_pipeline_model_parallel_world_size", "get_pipe_parallel_world_size"),
    }.items():
        ask = next((getattr(mpu, name) for name in names if hasattr(mpu, name)), None)
        size = ask() if ask is not None else 1
        if size > 1:
            raise TopologyError(
                f"found an mpu with {what}-parallel size {size}, expected 1: expert groups by node "
                f"are not supported together with {what} parallelism; leave moe_locality's groups "
                "out and let DeepSpeed make its own"
            )


def _node_groups(topology: ClusterTopology, ep_groups: RankGroups) -> tuple[RankGroups, RankGroups]:
    """Return the intra-node and the inter-node groups inside each EP group."""
    intra: list[tuple[int, ...]] = []
    inter: list[tuple[int, ...]] = []
    for group in ep_groups:
        by_node: dict[int, list[int]] = {}
        for rank in group:
            by_node.setdefault(topology.rank_to_node[rank], []).append(rank)
        sizes = {len(ranks) for ranks in by_node.values()}
        if len(sizes) > 1:
            raise TopologyError(
                f"found EP group {list(group)} with {sorted(sizes)} ranks per node, expected the "
                "same number on each of its nodes: change ep_size or the order"
            )
        intra += [tuple(ranks) for ranks in by_node.values()]
        inter += [tuple(sorted(ranks)) for ranks in zip(*by_node.values(), strict=True)]
    return tuple(sorted(intra)), tuple(sorted(inter))


def _warn_of_different_shapes(topology: ClusterTopology, ep_groups: RankGroups) -> None:
    """One plan serves all EP groups, so their positions should lie on nodes in the same way."""
    shapes = {_shape(topology, group): group for group in ep_groups}
    if len(shapes) > 1:
        logger.warning(
            "EP groups lie on their nodes in different ways (%s): a placement plan fits only one "
            "of them well; number the ranks of each node consecutively",
            "; ".join(f"ranks {list(group)}: nodes {list(s)}" for s, group in shapes.items()),
        )


def _shape(topology: ClusterTopology, group: Sequence[int]) -> tuple[int, ...]:
    """Return the node of each position of a group, nodes numbered by first appearance."""
    nodes = [topology.rank_to_node[rank] for rank in group]
    number = {node: index for index, node in enumerate(dict.fromkeys(nodes))}
    return tuple(number[node] for node in nodes)
