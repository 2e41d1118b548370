"""Count what every rank sends to every rank: rows and bytes, forward and backward.

Rows are routed copies of tokens (or their gradients); bytes are their payload. The counts that
precede each exchange (8 bytes per slot) are not included. A rank's rows to itself are counted too,
as ``same_rank``: they cost a copy, not a link.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch.distributed
from torch import Tensor, nn

from moe_locality.errors import TopologyError
from moe_locality.topology.cluster import ClusterTopology

KINDS = ("dispatch", "combine", "dispatch_grad", "combine_grad")
ALL_KINDS = (*KINDS, "routing")
"""``routing``: slots and weights (and their gradients) that travel with the rows of the
hierarchical exchange; the flat one sends none."""
LINKS = ("same_rank", "same_node", "cross_node")


class TrafficCounter:
    """``rows[kind][i]`` and ``bytes[kind][i]`` (int64): sent by this rank to ``ranks[i]``.

    ``ranks``: global ranks of the EP group, in its order.
    """

    def __init__(self, *, ranks: Sequence[int], topology: ClusterTopology | None = None) -> None:
        self.ranks = tuple(ranks)
        self.topology = topology
        self.reset()

    def reset(self) -> None:
        """Set all counts to zero."""
        self.rows = {kind: np.zeros(len(self.ranks), dtype=np.int64) for kind in ALL_KINDS}
        self.bytes = {kind: np.zeros(len(self.ranks), dtype=np.int64) for kind in ALL_KINDS}

    def count(self, kind: str, splits: Sequence[int], rows: Tensor) -> None:
        """Add one exchange: ``splits[i]`` rows like those of ``rows [*, D]`` to ``ranks[i]``."""
        self.add(kind, slice(None), splits, rows)

    def add(self, kind: str, where: Any, splits: Sequence[int], rows: Tensor) -> None:
        """Add one exchange with the ranks at the positions ``where``."""
        sent = np.asarray(splits, dtype=np.int64)
        self.rows[kind][where] += sent
        self.bytes[kind][where] += sent * (math.prod(rows.shape[1:]) * rows.element_size())

    def among(self, ranks: Sequence[int]) -> "SubgroupCounter":
        """Return a counter for exchanges among some of the ranks; it adds to this one."""
        return SubgroupCounter(self, [self.ranks.index(rank) for rank in ranks])


class SubgroupCounter:
    """Counts exchanges among some ranks of a :class:`TrafficCounter`, into it."""

    def __init__(self, whole: TrafficCounter, positions: list[int]) -> None:
        self.whole = whole
        self.positions = np.array(positions)

    def count(self, kind: str, splits: Sequence[int], rows: Tensor) -> None:
        """Add one exchange: ``splits[i]`` rows to the i-th rank of the subgroup."""
        self.whole.add(kind, self.positions, splits, rows)


def counters(model: nn.Module) -> Iterator[tuple[str, TrafficCounter]]:
    """Yield (module name, counter) of every layer that has dispatched something."""
    for name, module in model.named_modules():
        counter = getattr(module, "traffic", None)
        if isinstance(counter, TrafficCounter):
            yield name, counter


def reset_traffic(model: nn.Module) -> None:
    """Set the counts of every layer of ``model`` to zero."""
    for _, counter in counters(model):
        counter.reset()


def traffic_report(
    model: nn.Module, topology: ClusterTopology | None = None, group: Any = None
) -> dict[str, Any]:
    """Gather the counts of all ranks of ``group`` (the world by default). Collective.

    Returns plain data, the same on every rank: ``ranks`` (G global ranks), ``rows`` and ``bytes``
    ``{kind: [G][G]}`` (row = sender, column = receiver), ``by_link``
    ``{kind: {same_rank, same_node, cross_node}}`` in bytes and ``rows_by_link`` in rows (both None
    without a topology), and ``per_layer``: the same per layer, with its ``name``.

    Raises:
        TopologyError: a counter names a rank outside ``group``, or the topology is too small.
    """
    mine = [(name, counter.ranks, counter.rows, counter.bytes) for name, counter in counters(model)]
    topology = topology or next((c.topology for _, c in counters(model) if c.topology), None)
    ranks, everyone = _gather(mine, group)
    names = [name for name, *_ in max(everyone, key=len)] if everyone else []
    layers = []
    for index, name in enumerate(names):
        entries = [layer[index] if index < len(layer) else None for layer in everyone]
        layers.append({"name": name, **_matrices(entries, ranks, topology)})
    return {"ranks": list(ranks), **_sum_layers(layers, ranks, topology), "per_layer": layers}


def _gather(mine: list, group: Any) -> tuple[tuple[int, ...], list[list]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return (0,), [mine]
    group = group if group is not None else torch.distributed.group.WORLD
    ranks = tuple(torch.distributed.get_process_group_ranks(group))
    everyone: list[Any] = [None] * len(ranks)
    torch.distributed.all_gather_object(everyone, mine, group=group)
    return ranks, everyone


def _matrices(entries: list, ranks: tuple[int, ...], topology: ClusterTopology | None) -> dict:
    place = {rank: i for i, rank in enumerate(ranks)}
    rows, sizes = _zeros(ranks), _zeros(ranks)
    for sender, entry in enumerate(entries):
        if entry is None:
            continue
        _, receivers, sent_rows, sent_bytes = entry
        outside = [rank for rank in receivers if rank not in place]
        if outside:
            raise TopologyError(
                f"found traffic to ranks {outside}, expected only ranks of the group "
                f"{list(ranks)}: ask for the report over the world"
            )
        columns = [place[rank] for rank in receivers]
        for kind in ALL_KINDS:
            rows[kind][sender, columns] += sent_rows[kind]
            sizes[kind][sender, columns] += sent_bytes[kind]
    return _report(rows, sizes, ranks, topology)


def _sum_layers(
    layers: list[dict], ranks: tuple[int, ...], topology: ClusterTopology | None
) -> dict:
    rows, sizes = _zeros(ranks), _zeros(ranks)
    for layer in layers:
        for kind in ALL_KINDS:
            rows[kind] += np.asarray(layer["rows"][kind])
            sizes[kind] += np.asarray(layer["bytes"][kind])
    return _report(rows, sizes, ranks, topology)


def _zeros(ranks: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {kind: np.zeros((len(ranks), len(ranks)), dtype=np.int64) for kind in ALL_KINDS}


def _report(
    rows: dict[str, np.ndarray],
    sizes: dict[str, np.ndarray],
    ranks: tuple[int, ...],
    topology: ClusterTopology | None,
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "rows": {kind: matrix.tolist() for kind, matrix in rows.items()},
        "bytes": {kind: matrix.tolist() for kind, matrix in sizes.items()},
        "by_link": None,
        "rows_by_link": None,
    }
    if topology is not None:
        links = link_classes(ranks, topology)
        for key, matrices in (("by_link", sizes), ("rows_by_link", rows)):
            report[key] = {
                kind: {link: int(matrix[links == i].sum()) for i, link in enumerate(LINKS)}
                for kind, matrix in matrices.items()
            }
    return report


def link_classes(ranks: Sequence[int], topology: ClusterTopology) -> np.ndarray:
    """Return ``[G, G]`` indices into ``LINKS``: what lies between each pair of ranks."""
    nodes = np.array([topology.node_of(rank) for rank in ranks])
    classes = np.where(nodes[:, None] == nodes[None, :], 1, 2)
    np.fill_diagonal(classes, 0)
    return classes
