"""ClusterTopology: which rank is on which node, and how fast the two tiers of links are.

No torch, no collectives. A *node* is a server; a *rank* is a process (one per accelerator).
Bandwidths are what one rank can send, in one direction, in units of 10^9 bytes/s; latencies are
per message.

For one ``ep_size`` every rank is in one *EP group* (the ranks that share one set of experts) and in
one *EDP group* (the ranks that hold the same experts, in different EP groups). Inside an EP group,
the *intra-node groups* are its ranks of one node and the *inter-node groups* its ranks of equal
local index, one of each node: the two steps of a hierarchical exchange. Process groups sort their
ranks (``torch.distributed.new_group``), so the position of a rank in its EP group, which decides
the experts it holds, is its place in the sorted list. EDP groups are derived from those positions.
"""

import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from moe_locality.errors import TopologyError
from moe_locality.topology import sources

if TYPE_CHECKING:
    from moe_locality.config import ClusterConfig

logger = logging.getLogger(__name__)

# Defaults of a common cluster; configs/clusters/2x8_ib.yaml says where they are from.
INTRA_NODE_GBPS, INTER_NODE_GBPS = 450.0, 50.0
INTRA_NODE_LATENCY_US, INTER_NODE_LATENCY_US = 3.4, 14.0


@dataclass(frozen=True, slots=True)
class ClusterTopology:
    """The node of every rank and the figures of the two link tiers.

    ``rank_to_node[r]`` is the node of rank r; the ranks of a node need not be consecutive, and
    nodes may hold different numbers of ranks (``ranks_per_node`` then raises). TopologyError for a
    node without ranks, a doubled name, or a figure that cannot be."""

    rank_to_node: tuple[int, ...]
    node_names: tuple[str, ...] = ()
    _: KW_ONLY
    intra_node_gbps: float = INTRA_NODE_GBPS
    inter_node_gbps: float = INTER_NODE_GBPS
    intra_node_latency_us: float = INTRA_NODE_LATENCY_US
    inter_node_latency_us: float = INTER_NODE_LATENCY_US

    def __post_init__(self) -> None:
        nodes = tuple(int(node) for node in self.rank_to_node)
        object.__setattr__(self, "rank_to_node", nodes)
        found = sorted(set(nodes))
        if not nodes or found != list(range(len(found))):
            raise TopologyError(
                f"found ranks on nodes {found}, expected nodes 0 to M-1 with at least one rank "
                "each: number the nodes without gaps"
            )
        names = tuple(self.node_names) or tuple(f"node{node}" for node in found)
        object.__setattr__(self, "node_names", names)
        if len(names) != len(found) or len(set(names)) != len(names):
            raise TopologyError(
                f"found node names {', '.join(map(str, names))} for {len(found)} nodes, "
                "expected a different name for each"
            )
        for field, value in self.tiers().items():
            bandwidth = field.endswith("gbps")
            if not (math.isfinite(value) and (value > 0 if bandwidth else value >= 0)):
                expected = "a number above 0" if bandwidth else "a number of at least 0"
                raise TopologyError(f"found {field}={value}, expected {expected}")

    @property
    def num_nodes(self) -> int:
        return len(self.node_names)

    @property
    def num_ranks(self) -> int:
        return len(self.rank_to_node)

    @property
    def is_even(self) -> bool:
        """Whether every node holds the same number of ranks."""
        return len(set(Counter(self.rank_to_node).values())) == 1

    @property
    def ranks_per_node(self) -> int:
        """Ranks of each node; TopologyError where the nodes hold different numbers of ranks."""
        if not self.is_even:
            raise TopologyError(
                f"found uneven nodes ({self.describe()}), expected the same number of ranks on "
                "each: use --include or --exclude to take as many slots of every host"
            )
        return self.num_ranks // self.num_nodes

    def node_of(self, rank: int) -> int:
        """Return the node of a rank."""
        if not 0 <= rank < self.num_ranks:
            raise TopologyError(f"found rank {rank}, expected 0 to {self.num_ranks - 1}")
        return self.rank_to_node[rank]

    def ranks_of(self, node: int) -> tuple[int, ...]:
        """Return the ranks of a node, ascending."""
        if not 0 <= node < self.num_nodes:
            raise TopologyError(f"found node {node}, expected 0 to {self.num_nodes - 1}")
        return tuple(rank for rank, home in enumerate(self.rank_to_node) if home == node)

    def describe(self) -> str:
        """Return one line for messages, such as ``2 nodes: a 4, b 2 ranks``."""
        if self.is_even:
            return f"{self.num_nodes} nodes x {self.ranks_per_node} ranks"
        counts = (f"{name} {len(self.ranks_of(n))}" for n, name in enumerate(self.node_names))
        return f"{self.num_nodes} nodes: {', '.join(counts)} ranks"

    def tiers(self) -> dict[str, float]:
        """Return the four link figures, as keyword arguments of the constructors."""
        tiers = ("intra_node", "inter_node")
        names = [f"{tier}_{unit}" for unit in ("gbps", "latency_us") for tier in tiers]
        return {name: getattr(self, name) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for reports; ``ClusterTopology(**d)`` gives it back."""
        nodes = {"rank_to_node": list(self.rank_to_node), "node_names": list(self.node_names)}
        return {**nodes, **self.tiers()}

    # -- sources; every one takes the tier figures as keyword arguments ----------------------------

    @classmethod
    def uniform(cls, num_nodes: int, ranks_per_node: int, **tiers: float) -> Self:
        """Build ``num_nodes`` nodes of ``ranks_per_node`` consecutive ranks."""
        if num_nodes < 1 or ranks_per_node < 1:
            raise TopologyError(
                f"found {num_nodes} nodes x {ranks_per_node} ranks, expected at least 1 of each"
            )
        return cls(*sources.even_shape(num_nodes, ranks_per_node), **tiers)

    @classmethod
    def from_node_names(cls, names: Iterable[str], **tiers: float) -> Self:
        """Build from one node name per rank; nodes are numbered by their first rank."""
        return cls(*sources.shape_of_names(list(names)), **tiers)

    @classmethod
    def from_hostfile(
        cls,
        path: str | Path,
        include: str | None = None,
        exclude: str | None = None,
        **tiers: float,
    ) -> Self:
        """Read DeepSpeed's hostfile; filters are the launcher's strings (``host:0,2@host2``)."""
        return cls(*sources.shape_of_hostfile(path, include, exclude), **tiers)

    @classmethod
    def from_yaml(cls, path: str | Path, **tiers: float) -> Self:
        """Read a cluster file (schema: docs/cluster.md); arguments win over its tiers."""
        shape, figures = sources.read_cluster_yaml(path)
        try:
            return cls(*shape, **{**figures, **tiers})
        except TopologyError as error:
            raise TopologyError(f"{path}: {error}") from error

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **tiers: float) -> Self:
        """Read MOE_LOCALITY_RANKS_PER_NODE or what deepspeed, torchrun, Open MPI or Slurm set."""
        return cls(*sources.read_env(os.environ if environ is None else environ), **tiers)

    @classmethod
    def from_mpi(cls, comm: Any = None, **tiers: float) -> Self:
        """Ask MPI which ranks share memory. Collective over ``comm`` of mpi4py (default: world)."""
        return cls(*sources.read_mpi(comm), **tiers)

    @classmethod
    def from_config(cls, config: "ClusterConfig | ClusterTopology") -> "ClusterTopology":
        """Read what the ``cluster`` section of the configuration names."""
        if isinstance(config, ClusterTopology):
            return config
        if config.hostfile is not None:
            return cls.from_hostfile(config.hostfile)
        if config.file is not None:
            return cls.from_yaml(config.file)
        if config.num_nodes is None or config.ranks_per_node is None:
            raise TopologyError(
                "found an empty cluster section, expected hostfile, file, or num_nodes with "
                "ranks_per_node: leave the section out to ask the ranks for their host names"
            )
        return cls.uniform(config.num_nodes, config.ranks_per_node)


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
        return hashlib.sha256(json.dumps(astuple(self)).encode()).hexdigest()[:16]


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

    TopologyError where the groups do not fit the cluster, or ``mpu``, the model-parallel unit that
    ``deepspeed.initialize`` gets, splits the ranks further."""
    if order not in ("E+D", "D+E"):
        raise TopologyError(f"found order={order!r}, expected 'E+D' or 'D+E'")
    _refuse_model_parallelism(mpu)
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
    node_major = [rank for node in range(topology.num_nodes) for rank in topology.ranks_of(node)]
    neighbors = [node_major[start : start + size] for start in range(0, world, size)]
    ep_groups = neighbors if order == "E+D" else zip(*neighbors, strict=True)
    return layout_of(topology, ep_groups, order)


def layout_of(
    topology: ClusterTopology, ep_groups: Iterable[Sequence[int]], order: Order = "E+D"
) -> GroupLayout:
    """Return the layout of expert groups of one size that are given."""
    ep_groups = tuple(sorted(tuple(sorted(group)) for group in ep_groups))
    intra: list[tuple[int, ...]] = []
    inter: list[tuple[int, ...]] = []
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
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
        nodes = list(by_node)  # numbered by their first rank
        shapes[tuple(nodes.index(topology.rank_to_node[rank]) for rank in group)] = group
    if len(shapes) > 1:  # one plan serves all EP groups
        logger.warning(
            "EP groups lie on their nodes in different ways (%s): a placement plan fits only one "
            "of them well; number the ranks of each node consecutively",
            "; ".join(f"ranks {list(group)}: nodes {list(s)}" for s, group in shapes.items()),
        )
    return GroupLayout(
        ep_size=len(ep_groups[0]),
        order=order,
        ep_groups=ep_groups,
        edp_groups=tuple(tuple(sorted(ranks)) for ranks in zip(*ep_groups, strict=True)),
        intra_node_groups=tuple(sorted(intra)),
        inter_node_groups=tuple(sorted(inter)),
    )


def _refuse_model_parallelism(mpu: Any) -> None:
    """Refuse an ``mpu`` that splits the ranks: expert groups lie over consecutive ranks, which are
    then tensor-parallel peers with the same tokens. An EP group would send each token several
    times, and the EDP groups would average over ranks that are no data-parallel peers."""
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
