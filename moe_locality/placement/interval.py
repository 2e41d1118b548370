"""How far a ratio of copies depends on which requests were recorded: a jackknife over requests.

Source: the delete-a-group jackknife, Kott, "The delete-a-group jackknife", Journal of Official
Statistics 17 (2001).
"""

from __future__ import annotations

import math

import numpy as np

from moe_locality.placement.frame import make_frame
from moe_locality.placement.objective import Homes, max_over_mean, traffic_matrix
from moe_locality.placement.plan import PlacementPlan
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import RoutingTrace

NUM_BLOCKS = (5, 10, 15, 20)
T_975 = {4: 2.776, 9: 2.262, 14: 2.145, 19: 2.093}
"""97.5 % points of Student's t by degrees of freedom."""


def request_blocks(trace: RoutingTrace, seed: int = 0) -> np.ndarray | None:
    """[T] block of every token, whole requests together; None where there are too few requests."""
    if trace.request_id is None or len(trace.request_ids) < NUM_BLOCKS[0]:
        return None
    requests, number = np.unique(trace.request_id, return_inverse=True)
    count = max(n for n in NUM_BLOCKS if n <= len(requests))
    block = np.random.default_rng(seed).permutation(len(requests)) % count
    return block[number]


def copies_of_blocks(
    trace: RoutingTrace,
    plan: PlacementPlan,
    topology: ClusterTopology | None,
    homes: Homes,
    blocks: np.ndarray | None,
) -> np.ndarray | None:
    """[B] copies of each block, summed over its tokens and all layers; None without blocks."""
    if blocks is None or trace.expert_ids is None:
        return None
    totals = []
    for block in range(int(blocks.max()) + 1):
        rows = blocks == block
        part = homes[rows] if isinstance(homes, np.ndarray) else homes
        visits = make_frame(trace.take(rows), plan, topology, part).node_visits()
        totals.append(visits.sum() - np.trace(visits.sum(axis=0)))
    return np.array(totals, dtype=np.float64)


def ratio_interval(first: np.ndarray | None, last: np.ndarray | None) -> tuple[float, float] | None:
    """95 % interval of sum(last) / sum(first) over [B] blocks, by leaving out one at a time.

    None where it cannot be said: no blocks, or nothing left in ``first`` without one of them.
    """
    if first is None or last is None or first.sum() == 0:
        return None
    without = first.sum() - first
    if (without <= 0).any():
        return None
    return _around(last.sum() / first.sum(), (last.sum() - last) / without)


def _around(value: float, left_out: np.ndarray) -> tuple[float, float]:
    """95 % interval of a value, from the [B] values without one block each."""
    count = len(left_out)
    spread = math.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())
    reach = T_975[count - 1] * spread
    return float(value - reach), float(value + reach)


def expected_change(
    trace: RoutingTrace,
    base: PlacementPlan,
    plan: PlacementPlan,
    topology: ClusterTopology | None,
    homes: Homes,
    blocks: np.ndarray,
) -> dict[str, tuple[float, float, float] | None]:
    """(change, low, high) of costs from ``base``, requests anywhere, to ``plan`` with ``homes``.

    Shares of the base, -0.2 is a fifth less, with their 95 % interval over the blocks of requests;
    copies, picks, node_imbalance and rank_imbalance. None: the base has nothing to change.
    """
    both = ((base, None), (plan, homes))
    copies = [copies_of_blocks(trace, some, topology, at, blocks) for some, at in both]
    traffic = [_traffic_of_blocks(trace, some, topology, at, blocks) for some, at in both]
    node = plan.node_of_rank
    remote = node[:, None] != node
    picks = [(some * remote).sum(axis=(1, 2, 3)) for some in traffic]
    found: dict[str, tuple[float, float, float] | None] = {}
    for name, (first, last) in (("copies", copies), ("picks", picks)):
        reach = ratio_interval(first, last)
        if reach is None or first is None or last is None:
            found[name] = None
        else:
            found[name] = float(last.sum() / first.sum() - 1), reach[0] - 1, reach[1] - 1
    on_node = (node[:, None] == np.arange(plan.num_nodes)).astype(np.float64)
    for name, onto in (("node_imbalance", on_node), ("rank_imbalance", np.eye(len(node)))):
        loads = [some.sum(axis=2) @ onto for some in traffic]  # [B, L, nodes or ranks]
        total, without = (
            np.divide(*(max_over_mean(some).mean(axis=-1) for some in reversed(kept)))
            for kept in (
                [some.sum(axis=0) for some in loads],
                [some.sum(axis=0) - some for some in loads],
            )
        )
        low, high = _around(total, without)
        found[name] = float(total - 1), low - 1, high - 1
    return found


def _traffic_of_blocks(trace, plan, topology, homes, blocks) -> np.ndarray:
    """[B, L, G, G] ``traffic_matrix`` of each block."""
    parts = [trace.take(blocks == block) for block in range(int(blocks.max()) + 1)]
    return np.stack([traffic_matrix(part, plan, topology, homes, per_layer=True) for part in parts])
