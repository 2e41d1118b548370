"""Reports of what every rank sent to every rank: rows, bytes and messages, forward and backward.

Rows are routed copies of tokens (or their gradients); bytes are their payload as it travels, after
coding. A message is the non-empty set of rows of one rank for another in one exchange. The counts
that precede an exchange (8 bytes per slot, and a header of 24 per rank) are not included. A rank's
rows to itself are counted as ``same_rank``: they cost a copy, not a link. What is counted while
rows travel is in ``transport``; here the ranks gather it.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import nn

from moe_locality.dispatch.transport import ALL_KINDS, LINKS, TrafficCounter
from moe_locality.errors import TopologyError
from moe_locality.topology.cluster import ClusterTopology


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

    Returns plain data, the same on every rank: ``ranks`` (G global ranks), ``rows``, ``bytes`` and
    ``messages`` ``{kind: [G][G]}`` (row = sender, column = receiver), ``by_link``
    ``{kind: {same_rank, same_node, cross_node}}`` in bytes, ``rows_by_link`` in rows and
    ``messages_by_link`` (all None without a topology), ``load [G]`` (rows that the experts of each
    rank worked on), ``stage_us {stage: [G]}`` (empty unless ``dispatch.timing`` is on), and
    ``per_layer``: the same per layer, with its ``name``.

    Raises:
        TopologyError: a counter names a rank outside ``group``, or the topology is too small.
    """
    mine = [(name, _counted(counter)) for name, counter in counters(model)]
    topology = topology or next((c.topology for _, c in counters(model) if c.topology), None)
    ranks, everyone = _gather(mine, group)
    names = [name for name, _ in max(everyone, key=len)]
    by_layer = itertools.zip_longest(*everyone)
    sent = [[(rank, own[1]) for rank, own in enumerate(layer) if own] for layer in by_layer]
    total = _report(ranks, itertools.chain(*sent), topology)
    layers = [
        {"name": name, **_report(ranks, layer, topology)}
        for name, layer in zip(names, sent, strict=True)
    ]
    return {"ranks": list(ranks), **total, "per_layer": layers}


def _counted(counter: TrafficCounter) -> dict[str, Any]:
    matrices = {name: np.array(list(getattr(counter, name).values())) for name in _MATRICES}
    times = counter.clock.stage_us()
    return {"ranks": counter.ranks, "load": counter.load, "stage_us": times, **matrices}


def _gather(mine: list, group: Any) -> tuple[tuple[int, ...], list[list]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return (0,), [mine]
    group = group if group is not None else torch.distributed.group.WORLD
    ranks = tuple(torch.distributed.get_process_group_ranks(group))
    everyone: list[Any] = [None] * len(ranks)
    torch.distributed.all_gather_object(everyone, mine, group=group)
    return ranks, everyone


_MATRICES = {"bytes": "by_link", "rows": "rows_by_link", "messages": "messages_by_link"}
"""What is counted per pair of ranks, and its name in the report when summed by link."""


def _report(
    ranks: tuple[int, ...],
    sent: Iterable[tuple[int, dict[str, Any]]],
    topology: ClusterTopology | None,
) -> dict[str, Any]:
    """The sums of what was counted, with the place of the rank that counted it."""
    size, place = len(ranks), {rank: i for i, rank in enumerate(ranks)}
    sums = {name: np.zeros((len(ALL_KINDS), size, size), dtype=np.int64) for name in _MATRICES}
    load, stage_us = np.zeros(size, dtype=np.int64), {}
    for sender, counted in sent:
        outside = [rank for rank in counted["ranks"] if rank not in place]
        if outside:
            raise TopologyError(
                f"found traffic to ranks {outside}, expected only ranks of the group "
                f"{list(ranks)}: ask for the report over the world"
            )
        columns = [place[rank] for rank in counted["ranks"]]
        for name, matrices in sums.items():
            matrices[:, sender, columns] += counted[name]
        load[sender] += counted["load"]
        for stage, us in counted["stage_us"].items():
            stage_us.setdefault(stage, np.zeros(size))[sender] += us
    links = None if topology is None else link_classes(ranks, topology)
    report: dict[str, Any] = {
        name: dict(zip(ALL_KINDS, matrices.tolist(), strict=True))
        for name, matrices in sums.items()
    }
    for name, key in _MATRICES.items():
        report[key] = None
        if links is not None:
            report[key] = {
                kind: {link: int(matrix[links == i].sum()) for i, link in enumerate(LINKS)}
                for kind, matrix in zip(ALL_KINDS, sums[name], strict=True)
            }
    report["load"] = load.tolist()
    report["stage_us"] = {stage: us.tolist() for stage, us in stage_us.items()}
    return report


def link_classes(ranks: Sequence[int], topology: ClusterTopology) -> np.ndarray:
    """Return ``[G, G]`` indices into ``LINKS``: what lies between each pair of ranks."""
    nodes = np.array([topology.node_of(rank) for rank in ranks])
    classes = np.where(nodes[:, None] == nodes[None, :], 1, 2)
    np.fill_diagonal(classes, 0)
    return classes


def local_traffic(
    counted: Iterable[tuple[str, TrafficCounter]], topology: ClusterTopology | None
) -> dict[str, Any]:
    """What the :func:`counters` of this rank counted, small enough to be gathered from many ranks
    every few steps: sums over the layers, by link; see :func:`joined_traffic`.
    """
    found: dict[str, Any] = {"layers": {}, "stage_us": {}, "resets": 0, "sent": {}}
    me = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    for name, counter in counted:
        where = topology or counter.topology
        found["layers"][name] = counter.load
        found["resets"] += counter.resets
        for stage, us in counter.clock.stage_us().items():
            found["stage_us"][stage] = found["stage_us"].get(stage, 0.0) + us
        links = None
        if where is not None:
            nodes = np.array([where.node_of(rank) for rank in counter.ranks])
            links = np.where(nodes == where.node_of(me), 1, 2)
            links[counter.ranks.index(me)] = 0
        for what, key in _MATRICES.items():
            for kind, counts in getattr(counter, what).items():
                if kind == "dispatch" and what != "messages":
                    row = found.setdefault(what, {})
                    for rank, count in zip(counter.ranks, counts.tolist(), strict=True):
                        row[rank] = row.get(rank, 0) + count
                if links is not None:
                    by_link = np.bincount(links, weights=counts, minlength=3).astype(np.int64)
                    sums = found["sent"].setdefault(key, {}).setdefault(kind, [0, 0, 0])
                    sums[:] = [a + b for a, b in zip(sums, by_link.tolist(), strict=True)]
    return found


def joined_traffic(everyone: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join what :func:`local_traffic` gave on every rank: the keys of :func:`traffic_report`, with
    the matrices of the dispatch alone and, per layer, the load and the ``ranks`` that have it.
    """
    ranks = range(len(everyone))
    names = dict.fromkeys(name for mine in everyone for name in mine["layers"])
    stages = dict.fromkeys(stage for mine in everyone for stage in mine["stage_us"])
    report: dict[str, Any] = {"ranks": list(ranks)}
    for what, key in _MATRICES.items():
        if what != "messages":
            rows = [mine.get(what, {}) for mine in everyone]
            report[what] = {"dispatch": [[row.get(rank, 0) for rank in ranks] for row in rows]}
        sent = [mine["sent"][key] for mine in everyone if key in mine["sent"]]
        report[key] = {
            kind: dict(zip(LINKS, np.sum([s[kind] for s in sent], axis=0).tolist(), strict=True))
            for kind in (sent[0] if sent else ())
        } or None
    layers = [
        {
            "name": name,
            "load": [mine["layers"].get(name, 0) for mine in everyone],
            "ranks": [rank for rank in ranks if name in everyone[rank]["layers"]],
        }
        for name in names
    ]
    report["load"] = np.sum([layer["load"] for layer in layers], axis=0).tolist() if layers else []
    report["per_layer"] = layers
    report["stage_us"] = {
        stage: [mine["stage_us"].get(stage, 0.0) for mine in everyone] for stage in stages
    }
    report["resets"] = sum(mine["resets"] for mine in everyone)
    return report
