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
_CHUNK_PICKS = 1 << 20
MATRIX_ENTRIES = 1 << 18
"""Up to so many (layer, rank, rank) the pairs of ranks are counted, beyond that each rank alone."""


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
    server = (slot // (frame.num_slots // ranks)).astype(np.int64)
    count = _Counter(layers, frame.node_of_rank)
    if rails is None:
        count.move(there, home, server)
    else:
        local, table = rails
        node = frame.node_of_rank[server].astype(np.int64)
        rail = table[node, local[home]]
        count.move(there, rail, server)
        visited = np.sort(np.where(there, rail, -1), axis=2)  # a rail of a token is a node
        visit = visited >= 0
        visit[:, :, 1:] &= visited[:, :, 1:] != visited[:, :, :-1]
        count.move(visit, home, visited)
    used = slot + layer * frame.num_slots
    used[~there] = layers * frame.num_slots
    calls = np.bincount(used.ravel(), minlength=layers * frame.num_slots + 1)[:-1]
    calls = calls.reshape(layers, ranks, -1)
    return RowCounts(**count.rows, computed=calls.sum(axis=2), distinct=(calls > 0).sum(axis=2))


class _Counter:
    """Adds up rows by layer and rank."""

    def __init__(self, layers: int, node_of_rank: np.ndarray) -> None:
        self.layers, self.ranks = layers, len(node_of_rank)
        self.node_of_rank = node_of_rank
        names = ("local", "inside_sent", "inside_received", "across_sent", "across_received")
        self.rows = {name: np.zeros((layers, self.ranks), dtype=np.int64) for name in names}

    def move(self, there: np.ndarray, source: np.ndarray, target: np.ndarray) -> None:
        """Count rows [n, l, K] from rank to rank, where ``there``."""
        if self.layers * self.ranks**2 <= MATRIX_ENTRIES:
            self._by_matrix(there, source, target)
            return
        source = np.broadcast_to(source, there.shape)
        on_node = there & (self.node_of_rank[source] == self.node_of_rank[target])
        on_rank = there & (source == target)
        inside, across = on_node & ~on_rank, there & ~on_node
        self.rows["local"] += self.per_rank(on_rank, source)
        self.rows["inside_sent"] += self.per_rank(inside, source)
        self.rows["inside_received"] += self.per_rank(inside, target)
        self.rows["across_sent"] += self.per_rank(across, source)
        self.rows["across_received"] += self.per_rank(across, target)

    def _by_matrix(self, there: np.ndarray, source: np.ndarray, target: np.ndarray) -> None:
        """The same from one count of all pairs of ranks."""
        layers, ranks = self.layers, self.ranks
        key = source * ranks + target
        key += np.arange(layers)[None, :, None] * ranks**2
        key[~there] = layers * ranks**2
        pairs = np.bincount(key.ravel(), minlength=layers * ranks**2 + 1)[:-1]
        pairs = pairs.reshape(layers, ranks, ranks)
        same_rank = np.eye(ranks, dtype=bool)
        same_node = self.node_of_rank[:, None] == self.node_of_rank[None]
        self.rows["local"] += pairs[:, same_rank]
        for name, links in (("inside", same_node & ~same_rank), ("across", ~same_node)):
            part = pairs * links
            self.rows[f"{name}_sent"] += part.sum(axis=2)
            self.rows[f"{name}_received"] += part.sum(axis=1)

    def per_rank(self, mask: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """[l, G] how often each rank occurs where ``mask``."""
        key = (rank + np.arange(self.layers)[None, :, None] * self.ranks)[mask]
        counts = np.bincount(key, minlength=self.layers * self.ranks)
        return counts.reshape(self.layers, self.ranks)
