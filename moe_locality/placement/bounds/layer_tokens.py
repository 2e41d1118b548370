"""The tokens of one layer as patterns of vertices: what bounds and partitioners work on.

Vertices are the experts 0 .. E - 1 and, where homes are given, pins E + m for homes on node m.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTokens:
    """The tokens of a layer as patterns of vertices: experts, and pins E + m for homes on node m.

    ``members`` and ``tokens`` have one entry for each number of vertices in a pattern.
    """

    num_experts: int
    num_nodes: int
    num_tokens: int
    has_homes: bool
    members: list[np.ndarray]
    tokens: list[np.ndarray]
    load: np.ndarray  # [n], 0 for pins

    @staticmethod
    def of(
        ids: np.ndarray, num_experts: int, num_nodes: int, home_node: np.ndarray | None
    ) -> LayerTokens:
        picks, load = as_vertices(ids, num_experts, num_nodes, home_node)
        size = (picks >= 0).sum(axis=1)
        members, tokens = [], []
        for count in np.unique(size[size > 0]):
            rows, counts = _unique_rows(picks[size == count][:, -int(count) :])
            members.append(rows)
            tokens.append(counts.astype(np.float64))
        return LayerTokens(
            num_experts=num_experts,
            num_nodes=num_nodes,
            num_tokens=max(len(picks), 1),
            has_homes=home_node is not None,
            members=members,
            tokens=tokens,
            load=load,
        )

    @property
    def num_vertices(self) -> int:
        return self.num_experts + (self.num_nodes if self.has_homes else 0)

    @property
    def node_size(self) -> int:
        return self.num_vertices // self.num_nodes

    def as_copies(self, blocks: float, visits: float | None = None) -> float:
        """Copies per token from nodes touched per token (the home among them, if given).

        visits: share of the tokens that touch any; None: from the patterns.
        """
        if not self.has_homes:
            return blocks * (self.num_nodes - 1) / self.num_nodes
        if visits is None:
            visits = sum(float(t.sum()) for t in self.tokens) / self.num_tokens
        return max(blocks - visits, 0.0)

    def blocks_of(self, copies: float) -> float:
        """Nodes touched per token (the home among them, if given) from copies per token."""
        if not self.has_homes:
            return copies * self.num_nodes / (self.num_nodes - 1)
        return copies + sum(float(t.sum()) for t in self.tokens) / self.num_tokens

    def fewest_blocks(self) -> float:
        """Nodes touched per token if every token's vertices were packed as tightly as nodes are."""
        sizes = [-(-rows.shape[1] // self.node_size) for rows in self.members]
        total = sum(s * float(t.sum()) for s, t in zip(sizes, self.tokens, strict=True))
        return total / self.num_tokens

    def fixed_pairs(self) -> np.ndarray:
        """[n, n]: pins are on different nodes; the rest is open (nan)."""
        fixed = np.full((self.num_vertices, self.num_vertices), np.nan)
        fixed[self.num_experts :, self.num_experts :] = 0.0
        np.fill_diagonal(fixed, 1.0)
        return fixed

    def relaxation(
        self,
        max_imbalance: float,
        fixed: np.ndarray | None = None,
        cost: np.ndarray | None = None,
    ) -> Any:
        """The relaxation of this layer, see ``make_relaxation``."""
        from moe_locality.placement.bounds.relaxation import make_relaxation

        return make_relaxation(
            self.members,
            self.tokens,
            self.num_vertices,
            self.num_nodes,
            num_tokens=self.num_tokens,
            cost=cost,
            fixed=self.fixed_pairs() if fixed is None else fixed,
            load=self.load,
            max_imbalance=max_imbalance,
        )


def as_vertices(
    ids: np.ndarray, num_experts: int, num_nodes: int, home_node: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """([T, k] vertices in rising order, -1 first where there is none; [n] load of each)."""
    picks = np.sort(np.asarray(ids, dtype=np.int64), axis=1)
    load = np.bincount(picks[picks >= 0], minlength=num_experts).astype(np.float64)
    picks[:, 1:][picks[:, 1:] == picks[:, :-1]] = -1  # an expert picked twice is one vertex
    if home_node is not None:
        pin = np.where((picks >= 0).any(axis=1), num_experts + home_node, -1)
        picks = np.concatenate([picks, pin[:, None]], axis=1)
        load = np.concatenate([load, np.zeros(num_nodes)])
    return np.sort(picks, axis=1), load


def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Different rows of rising vertex numbers, and how often each occurs."""
    base, width = int(rows.max()) + 1, rows.shape[1]
    if width * np.log2(base + 1) >= 63:
        return np.unique(rows, axis=0, return_counts=True)
    powers = base ** np.arange(width, dtype=np.int64)[::-1]
    keys, counts = np.unique(rows @ powers, return_counts=True)
    return keys[:, None] // powers % base, counts
