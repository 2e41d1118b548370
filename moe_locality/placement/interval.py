"""How far a ratio of copies depends on which requests were recorded: a jackknife over requests.

Source: the delete-a-group jackknife, Kott, "The delete-a-group jackknife", Journal of Official
Statistics 17 (2001).
"""

from __future__ import annotations

import math

import numpy as np

from moe_locality.placement.frame import make_frame
from moe_locality.placement.objective import Homes
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
    count = len(first)
    without = first.sum() - first
    if (without <= 0).any():
        return None
    left_out = (last.sum() - last) / without
    spread = math.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())
    ratio, reach = last.sum() / first.sum(), T_975[count - 1] * spread
    return float(ratio - reach), float(ratio + reach)
