"""Counts the rows that an exchange moves: per layer and rank, exact integers, plain numpy.

A row is one token on its way to an expert (dispatch); combine moves as many back. The two exchanges
are those of ``moe_locality.dispatch``, and the counts are those of its traffic counters:

* ``flat``: a row per pick, from the home rank to the rank of the slot.
* ``hierarchical``: first a row per (token, node with a pick), from the home rank to the rank of the
  same local index on that node (its *rail*; on the home node that is the home rank itself), then a
  row per pick from the rail to the rank of the slot.

Shapes: T tokens, L layers, K picks, G ranks, M nodes, P slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.placement.frame import Frame

EXCHANGES = ("flat", "hierarchical")
_CHUNK_PICKS = 1 << 21


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCounts:
    """int64 [..., L, G] rows of one direction, and what the experts of a rank compute.

    local: from a rank to itself. inside: between ranks of a node. across: between nodes.
    computed: rows that arrive at experts. distinct: slots with any row.
    """

    local: np.ndarray
    inside_sent: np.ndarray
    inside_received: np.ndarray
    across_sent: np.ndarray
    across_received: np.ndarray
    computed: np.ndarray
    distinct: np.ndarray

    def rows_by_link(self) -> dict[str, int]:
        """Rows of all layers and ranks by what they cross, named as the traffic counters do."""
        return {
            "same_rank": int(self.local.sum()),
            "same_node": int(self.inside_sent.sum()),
            "cross_node": int(self.across_sent.sum()),
        }


def stack(counts: list[RowCounts]) -> RowCounts:
    """[S, L, G] from S counts of [L, G]."""
    names = RowCounts.__slots__
    return RowCounts(**{n: np.stack([getattr(one, n) for one in counts]) for n in names})


def count_rows(frame: Frame, tokens: np.ndarray | slice, exchange: str) -> RowCounts:
    """Rows of some tokens of a frame with homes.

    Raises:
        PlacementError: the exchange is unknown, or hierarchical on nodes of unequal size.
    """
    if exchange not in EXCHANGES:
        raise PlacementError(
            f"exchange: found {exchange!r}, expected one of {', '.join(EXCHANGES)}: correct it"
        )
    assert frame.ids is not None
    assert frame.home_rank is not None
    home = frame.home_rank[tokens]
    ids = frame.ids[tokens]
    rails = None if exchange == "flat" else _rails(frame.node_of_rank)
    step = max(_CHUNK_PICKS // max(ids.shape[0] * ids.shape[2], 1), 1)
    blocks = [
        _count_layers(frame, ids[:, first : first + step], home, first, rails)
        for first in range(0, frame.num_layers, step)
    ]
    names = RowCounts.__slots__
    return RowCounts(**{n: np.concatenate([getattr(b, n) for b in blocks]) for n in names})


def count_all(frame: Frame, exchange: str) -> RowCounts:
    """Rows of all tokens of the frame, counted in parts that are added up; ``distinct`` has no
    meaning here.
    """
    assert frame.ids is not None
    tokens = len(frame.ids)
    step = max(_CHUNK_PICKS // max(frame.ids.shape[1] * frame.ids.shape[2], 1), 1)
    parts = [
        count_rows(frame, slice(first, first + step), exchange) for first in range(0, tokens, step)
    ]
    together = stack(parts)
    return RowCounts(**{n: getattr(together, n).sum(axis=0) for n in RowCounts.__slots__})


def _rails(node_of_rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(local index of each rank [G], rank at [node, local index])."""
    nodes = int(node_of_rank.max()) + 1
    members = [np.flatnonzero(node_of_rank == node) for node in range(nodes)]
    if len({len(found) for found in members}) != 1:
        raise PlacementError(
            f"found nodes of {[len(found) for found in members]} ranks, expected the same number "
            "on each for the hierarchical exchange: use the flat one"
        )
    table = np.stack(members)
    local = np.empty(len(node_of_rank), dtype=np.int64)
    local[table] = np.arange(table.shape[1])
    return local, table


def _count_layers(frame: Frame, ids: np.ndarray, home: np.ndarray, first: int, rails) -> RowCounts:
    """Rows of the layers ``first``, ``first + 1``, ... whose picks are ids [n, l, K]."""
    layers, ranks = ids.shape[1], frame.num_ranks
    layer = np.arange(layers)[None, :, None]
    there = ids >= 0
    expert = np.where(there, ids, 0).astype(np.int64)
    slots = frame.served_slot[first : first + layers]
    home = home[:, None, None]
    slot = slots[layer, home if frame.has_replicas else 0, expert]
    server = slot // (frame.num_slots // ranks)
    node = frame.node_of_rank[server].astype(np.int64)
    home_node = frame.node_of_rank[home]
    count = _Counter(layers, ranks)
    source = np.broadcast_to(home, server.shape)
    if rails is None:
        count.move(there & (server == source), there & (node == home_node), there, source, server)
    else:
        local, table = rails
        where = np.sort(np.where(there, node, -1), axis=2)
        visit = where >= 0
        visit[:, :, 1:] &= where[:, :, 1:] != where[:, :, :-1]
        stays = visit & (where == home_node)
        rail = table[np.maximum(where, 0), local[home]]
        count.move(stays, stays, visit, source, rail)
        rail = table[node, local[home]]
        count.move(there & (server == rail), there, there, rail, server)
    used = (np.broadcast_to(layer, slot.shape) * frame.num_slots + slot)[there]
    served = np.bincount(used, minlength=layers * frame.num_slots) > 0
    return RowCounts(
        **count.rows,
        computed=count.per_rank(there, server),
        distinct=served.reshape(layers, ranks, -1).sum(axis=2),
    )


class _Counter:
    """Adds up rows by layer and rank."""

    def __init__(self, layers: int, ranks: int) -> None:
        self.shape = (layers, ranks)
        names = ("local", "inside_sent", "inside_received", "across_sent", "across_received")
        self.rows = {name: np.zeros(self.shape, dtype=np.int64) for name in names}

    def move(
        self,
        on_rank: np.ndarray,
        on_node: np.ndarray,
        there: np.ndarray,
        source: np.ndarray,
        target: np.ndarray,
    ) -> None:
        """Count rows [n, l, K]: which exist, which stay on the node, which even on the rank."""
        inside, across = on_node & ~on_rank, there & ~on_node
        self.rows["local"] += self.per_rank(on_rank, source)
        self.rows["inside_sent"] += self.per_rank(inside, source)
        self.rows["inside_received"] += self.per_rank(inside, target)
        self.rows["across_sent"] += self.per_rank(across, source)
        self.rows["across_received"] += self.per_rank(across, target)

    def per_rank(self, mask: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """[l, G] how often each rank occurs where ``mask``."""
        layers, ranks = self.shape
        key = (rank + np.arange(layers)[None, :, None] * ranks)[mask]
        return np.bincount(key, minlength=layers * ranks).reshape(layers, ranks)
