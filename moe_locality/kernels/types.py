"""What the kernels take and give: the map of the rows, and what a gate is."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moe_locality.errors import ConfigError

MAX_NODES = 63
"""Nodes of a cluster that a token's bitmask (one int64) can name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMap:
    """Where each kept route goes when routes are sorted by slot, stable in (token, k).

    N is the number of rows: of the kept routes and the padding between the slots or, with a static
    ``num_rows``, exactly that, whatever the routes are.

    ``row_route [N] int32``: the flat route ``t * K + k`` of each row, -1 where a row has none.
    ``row_token [N] int32``: its token ``t``, -1 where a row has none.
    ``positions [T, K] int32``: the row of each route, -1 where it is dropped.
    ``tokens_per_slot [P] int64``: kept routes of each slot.

    Only from maps of :func:`moe_locality.kernels.ops.row_map`, not of plain index lists:

    ``slot_offsets [P + 1] int32``: first row of each slot; its padding lies behind its routes, and
    the last entry is the number of rows in use. ``slot_offsets[1:]`` is what grouped GEMMs want.
    ``routed_per_slot [P] int32``: routes of each slot before capacity and overflow took some.
    ``overflow [1] int32``: kept routes that found no row in a static ``num_rows`` (dropped).
    ``node_mask [T] int64``: bit m is set where a kept route of the token goes to node m.
    ``tokens_per_node [M] int64``: tokens with a kept route to each node, each counted once.
    ``padded``: some rows may have no route.
    """

    row_route: Tensor
    row_token: Tensor
    positions: Tensor
    tokens_per_slot: Tensor
    slot_offsets: Tensor
    routed_per_slot: Tensor
    overflow: Tensor
    node_mask: Tensor | None = None
    tokens_per_node: Tensor | None = None
    padded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSpec:
    """How a router's logits become K expert ids and K weights.

    ``score``: softmax over all experts, or sigmoid of each. ``num_groups``, ``top_groups``: only
    experts of the best ``top_groups`` groups of consecutive experts may be picked; a group's score
    is the sum of its two best (``top2``: DeepSeek-V3, arXiv 2412.19437, section 2.1.2) or its best
    (``max``: DeepSeek-V2, arXiv 2405.04434, section 2.2.2). ``renormalize``: the K weights of a
    token sum to one. ``scale``: factor on the weights, last.
    """

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["top2", "max"] = "top2"
    renormalize: bool = False
    scale: float = 1.0

    def check(self, num_experts: int) -> None:
        """Raise ConfigError where this gate cannot work on ``num_experts`` experts."""
        problem = ""
        if self.score not in ("softmax", "sigmoid"):
            problem = f"score={self.score!r}, expected softmax or sigmoid"
        elif self.group_score not in ("top2", "max"):
            problem = f"group_score={self.group_score!r}, expected top2 or max"
        elif self.num_groups < 1 or num_experts % self.num_groups:
            problem = f"{num_experts} experts in {self.num_groups} groups, expected equal groups"
        elif not 1 <= self.top_groups <= self.num_groups:
            problem = f"top_groups={self.top_groups}, expected 1 to {self.num_groups}"
        else:
            reachable = num_experts // self.num_groups * self.top_groups
            if not 1 <= self.top_k <= reachable:
                problem = f"top_k={self.top_k}, expected 1 to {reachable}, the experts in reach"
        if problem:
            raise ConfigError(f"found a gate with {problem}: correct the gate")
