"""ClusterTopology: which rank is on which node, and how fast the two tiers of links are.

No torch, no collectives. A *node* is a server; a *rank* is a process (one per accelerator).
Bandwidths are what one rank can send, in one direction, in units of 10^9 bytes/s; latencies are
per message.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_locality.errors import TopologyError
from moe_locality.topology import sources

if TYPE_CHECKING:
    from moe_locality.config import ClusterConfig

# Defaults of a common cluster; configs/clusters/2x8_ib.yaml says where they are from.
INTRA_NODE_GBPS, INTER_NODE_GBPS = 450.0, 50.0
INTRA_NODE_LATENCY_US, INTER_NODE_LATENCY_US = 3.4, 14.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterTopology:
    """The node of every rank and the figures of the two link tiers.

    ``rank_to_node[r]`` is the node of rank r; the ranks of a node need not be consecutive, and
    nodes may hold different numbers of ranks (``ranks_per_node`` then raises).

    Raises:
        TopologyError: a node without ranks, a doubled name, or a figure that cannot be.
    """

    rank_to_node: tuple[int, ...]
    node_names: tuple[str, ...] = ()
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
        for field in ("intra_node_gbps", "inter_node_gbps"):
            _check_figure(field, getattr(self, field), above_zero=True)
        for field in ("intra_node_latency_us", "inter_node_latency_us"):
            _check_figure(field, getattr(self, field), above_zero=False)

    @property
    def num_nodes(self) -> int:
        return len(self.node_names)

    @property
    def num_ranks(self) -> int:
        return len(self.rank_to_node)

    @property
    def is_even(self) -> bool:
        """Whether every node holds the same number of ranks."""
        return len({self.rank_to_node.count(node) for node in range(self.num_nodes)}) == 1

    @property
    def ranks_per_node(self) -> int:
        """Ranks of each node.

        Raises:
            TopologyError: the nodes hold different numbers of ranks.
        """
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

    def local_index(self, rank: int) -> int:
        """Return the position of a rank among the ranks of its node."""
        return self.rank_to_node[:rank].count(self.node_of(rank))

    def restrict(self, ranks: Sequence[int]) -> "ClusterTopology":
        """Return the topology of some ranks alone.

        Rank ``ranks[i]`` becomes rank i; nodes keep their order and names.
        """
        if len(set(ranks)) != len(ranks):
            raise TopologyError(f"found a rank twice in {list(ranks)}, expected each once")
        nodes = [self.node_of(rank) for rank in ranks]
        kept = sorted(set(nodes))
        return self._like(
            tuple(kept.index(node) for node in nodes), tuple(self.node_names[node] for node in kept)
        )

    def describe(self) -> str:
        """Return one line for messages, such as ``2 nodes: a 4, b 2 ranks``."""
        if self.is_even:
            return f"{self.num_nodes} nodes x {self.num_ranks // self.num_nodes} ranks"
        counts = (
            f"{name} {self.rank_to_node.count(node)}" for node, name in enumerate(self.node_names)
        )
        return f"{self.num_nodes} nodes: {', '.join(counts)} ranks"

    def tiers(self) -> dict[str, float]:
        """Return the four link figures, as keyword arguments of the constructors."""
        return {
            "intra_node_gbps": self.intra_node_gbps,
            "inter_node_gbps": self.inter_node_gbps,
            "intra_node_latency_us": self.intra_node_latency_us,
            "inter_node_latency_us": self.inter_node_latency_us,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for reports; ``ClusterTopology(**d)`` gives it back."""
        return {
            "rank_to_node": list(self.rank_to_node),
            "node_names": list(self.node_names),
            **self.tiers(),
        }

    def _like(self, rank_to_node: tuple[int, ...], names: tuple[str, ...]) -> "ClusterTopology":
        return ClusterTopology(rank_to_node=rank_to_node, node_names=names, **self.tiers())

    # -- sources; every one takes the tier figures as keyword arguments ----------------------------

    @classmethod
    def uniform(cls, num_nodes: int, ranks_per_node: int, **tiers: float) -> "ClusterTopology":
        """Build ``num_nodes`` nodes of ``ranks_per_node`` consecutive ranks."""
        if num_nodes < 1 or ranks_per_node < 1:
            raise TopologyError(
                f"found {num_nodes} nodes x {ranks_per_node} ranks, expected at least 1 of each"
            )
        ranks = range(num_nodes * ranks_per_node)
        return cls._of((tuple(rank // ranks_per_node for rank in ranks), ()), tiers)

    @classmethod
    def from_node_names(cls, names: Iterable[str], **tiers: float) -> "ClusterTopology":
        """Build from one node name per rank; nodes are numbered by their first rank."""
        return cls._of(sources.shape_of_names(list(names)), tiers)

    @classmethod
    def from_hostfile(
        cls,
        path: str | Path,
        include: str | None = None,
        exclude: str | None = None,
        **tiers: float,
    ) -> "ClusterTopology":
        """Read DeepSpeed's hostfile.

        ``include`` and ``exclude`` are the launcher's strings (``host:0,2@host2``).
        """
        return cls._of(sources.shape_of_hostfile(path, include, exclude), tiers)

    @classmethod
    def from_yaml(cls, path: str | Path, **tiers: float) -> "ClusterTopology":
        """Read a cluster file (schema: docs/cluster.md); arguments win over its tiers."""
        shape, figures = sources.read_cluster_yaml(path)
        try:
            return cls._of(shape, {**figures, **tiers})
        except TopologyError as error:
            raise TopologyError(f"{path}: {error}") from error

    @classmethod
    def from_env(
        cls, environ: Mapping[str, str] | None = None, **tiers: float
    ) -> "ClusterTopology":
        """Read MOE_LOCALITY_RANKS_PER_NODE or what deepspeed, torchrun, Open MPI or Slurm set."""
        return cls._of(sources.read_env(os.environ if environ is None else environ), tiers)

    @classmethod
    def from_mpi(cls, comm: Any = None, **tiers: float) -> "ClusterTopology":
        """Ask MPI which ranks share memory.

        Collective over ``comm``, an mpi4py communicator (default: the world).
        """
        return cls._of(sources.read_mpi(comm), tiers)

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

    @classmethod
    def _of(cls, shape: sources.Shape, tiers: Mapping[str, float]) -> "ClusterTopology":
        return cls(rank_to_node=shape[0], node_names=shape[1], **tiers)


def _check_figure(name: str, value: float, *, above_zero: bool) -> None:
    fine = math.isfinite(value) and (value > 0 if above_zero else value >= 0)
    if not fine:
        expected = "a number above 0" if above_zero else "a number of at least 0"
        raise TopologyError(f"found {name}={value}, expected {expected}")
