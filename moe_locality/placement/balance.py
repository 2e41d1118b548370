"""Balance from loads alone: replicas and ranks of every layer, fast enough for every few steps.

The start is EPLB's rule (DeepSeek-V3, arXiv 2412.19437, section 3.4, as in baselines.py): replicas
one by one to the largest load per replica, which makes that largest share as small as it can be,
then longest processing time first (Graham 1969) onto ranks of equal size. From there the busiest
rank exchanges experts with other ranks while that lowers the larger load of the two. A swap never
raises the busiest load, so no layer ends worse than EPLB's.

Rank loads in ``balance`` assume that the replicas of an expert share its load evenly, as EPLB does.
A plan serves a token from the nearest replica instead; ``most_level`` chooses by that rule. Shapes:
L layers, E experts, G ranks, S slots per rank, R ranks of one packing.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.placement.costs import imbalance, traffic_matrix
from moe_locality.placement.count_kernels import compiled
from moe_locality.placement.counting import over_layers
from moe_locality.placement.plan import PlacementPlan
from moe_locality.trace.schema import RoutingTrace

_ENOUGH = 1.0 + 1e-9  # of the lower bound: nothing left that a swap could gain
_MOST_SWAPS = 4096
_LAYERS_PER_THREAD = 8


def balance(
    load: np.ndarray,
    num_nodes: int,
    ranks_per_node: int,
    num_slots: int,
    group_of: np.ndarray | None = None,
) -> np.ndarray:
    """Experts of each rank, int32 [L, G, S], with a small largest rank load in every layer: the
    ranks of a node consecutive; no expert twice on a rank, each at least once. Raises
    PlacementError where slots and experts do not fit the ranks, or the groups leave a node with
    fewer experts than a rank has slots.

    Args:
        load: [L, E] tokens per expert, not negative.
        num_slots: slots of a layer over all ranks, a multiple of the ranks.
        group_of: [E] group of each expert: equal groups that stay whole on one node, as many on
            each. None: any expert on any rank.
    """
    load = np.ascontiguousarray(load, dtype=np.float64)
    num_ranks, experts = num_nodes * ranks_per_node, load.shape[1]
    size = num_slots // num_ranks
    if num_slots % num_ranks or not experts <= num_slots <= experts * num_ranks:
        raise PlacementError(
            f"found {num_slots} slots for {experts} experts on {num_ranks} ranks, expected a "
            "multiple of the ranks, at least one slot per expert and no rank with more slots than "
            "experts: change the number of redundant experts"
        )
    if not np.isfinite(load).all() or (load < 0).any():
        raise PlacementError("found a load that is negative or not a number: correct the counts")
    table = np.empty((len(load), num_ranks, size), dtype=np.int32)
    if group_of is None:
        divides = experts % num_nodes == 0 and size <= experts // num_nodes
        alone = np.arange(experts) if divides else np.zeros(0, dtype=np.int64)
        fill = partial(_balance_anywhere, load, num_nodes, alone, table)
    elif size > experts // num_nodes:
        raise PlacementError(
            f"found {size} slots per rank, but groups leave {experts // num_nodes} experts for a "
            "node, and a rank holds an expert once: use fewer redundant experts, or no groups"
        )
    else:
        groups = np.asarray(group_of, dtype=np.int64)
        fill = partial(_balance_groups, load, num_nodes, groups, table)
    over_layers(fill, len(load), least=_LAYERS_PER_THREAD)
    return table


def rank_loads(load: np.ndarray, table: np.ndarray) -> np.ndarray:
    """[L, G] float64 load of each rank when the replicas of an expert share evenly."""
    result = np.empty(table.shape[:2])
    for layer, held in enumerate(table):
        counts = np.bincount(held.ravel(), minlength=load.shape[1])
        result[layer] = (load[layer] / np.maximum(counts, 1))[held].sum(axis=1)
    return result


def most_level(trace: RoutingTrace, plan: PlacementPlan, other: PlacementPlan) -> np.ndarray:
    """[L, P] the map of ``plan`` with the layers of ``other`` that have the lower
    ``rank_imbalance`` in ``evaluate``; both have the layers of the trace in its order.
    """
    level, others = (
        imbalance(traffic_matrix(trace, some, per_layer=True).sum(axis=1)) for some in (plan, other)
    )
    maps = (other.physical_to_logical_map, plan.physical_to_logical_map)
    return np.where((others < level)[:, None], *maps)


@compiled
def _balance_anywhere(load, num_nodes, alone, table, first, last):
    """Fill some layers; ``alone`` [E] (or empty): every expert as a group of its own."""
    other = np.empty(table.shape[1:], dtype=np.int32)
    for layer in range(first, last):
        best = pack_experts(load[layer], table[layer], True)
        # EPLB packs node by node where it can, which is better on some layers
        if alone.size and pack_nodes(load[layer], num_nodes, alone, other, False, False) < best:
            pack_nodes(load[layer], num_nodes, alone, table[layer], False, True)


@compiled
def _balance_groups(load, num_nodes, group_of, table, first, last):
    """Fill some layers with whole groups on each node."""
    other = np.empty(table.shape[1:], dtype=np.int32)
    for layer in range(first, last):
        plain = pack_nodes(load[layer], num_nodes, group_of, table[layer], False, True)
        if pack_nodes(load[layer], num_nodes, group_of, other, True, True) < plain:
            table[layer] = other


@compiled
def pack_nodes(load, num_nodes, group_of, held, level_nodes, level_ranks):
    """Groups onto nodes, then each node by itself; return the largest rank load.

    ``level_nodes``, ``level_ranks``: also swap groups between nodes, experts between ranks.
    """
    num_groups = group_of.max() + 1
    group_load = np.bincount(group_of, load, num_groups)
    groups = np.empty((num_nodes, num_groups // num_nodes), dtype=np.int32)
    pack_experts(group_load, groups, level_nodes)
    node_of_group = np.empty(num_groups, dtype=np.int64)
    for node in range(num_nodes):
        node_of_group[groups[node]] = node
    per_node = held.shape[0] // num_nodes
    node_of = node_of_group[group_of]
    largest = 0.0
    for node in range(num_nodes):
        members = np.flatnonzero(node_of == node)
        ranks = held[node * per_node : (node + 1) * per_node]
        largest = max(largest, pack_experts(load[members], ranks, level_ranks))
        for rank in range(per_node):
            for slot in range(held.shape[1]):
                ranks[rank, slot] = members[ranks[rank, slot]]
    return largest


@compiled
def pack_experts(load, held, improve):
    """Fill held [R, S] with replicas of the experts and return the largest rank load."""
    num_ranks, size = held.shape
    counts = _replicate(load, num_ranks * size, num_ranks)
    share = load / counts
    has = np.zeros((num_ranks, len(load)), dtype=np.bool_)
    sums = _place(share, counts, held, has)
    if improve:
        _swap_down(share, held, has, sums)
    return sums.max()


@compiled
def _replicate(load, num_slots, most):
    """[E] replicas: one each, then one by one for the largest load per replica, up to ``most``."""
    counts = np.ones(len(load), dtype=np.int64)
    share = load.copy()
    for _ in range(num_slots - len(load)):
        e = np.argmax(share)
        counts[e] += 1
        share[e] = load[e] / counts[e] if counts[e] < most else -1.0
    return counts


@compiled
def _place(share, counts, held, has):
    """Replicas in falling order of share, each to the lightest open rank that lacks the expert."""
    num_ranks, size = held.shape
    used = np.zeros(num_ranks, dtype=np.int64)
    sums = np.zeros(num_ranks)
    order = np.argsort(-share, kind="mergesort")  # stable: equal shares in order of the experts
    for e in order:
        for _ in range(counts[e]):
            best = -1
            for r in range(num_ranks):
                if used[r] < size and not has[r, e] and (best < 0 or sums[r] < sums[best]):
                    best = r
            if best < 0:
                best = _make_room(share, held, has, used, sums, e)
            held[best, used[best]] = e
            has[best, e] = True
            used[best] += 1
            sums[best] += share[e]
    return sums


@compiled
def _make_room(share, held, has, used, sums, e):
    """All open ranks hold ``e``: move an expert there from a full rank, and return that rank.

    There always is one: the full rank holds as many experts as the open one has slots, and the open
    one has a slot left and holds ``e``, which the full rank lacks.
    """
    size = held.shape[1]
    room, full = -1, -1
    for r in range(held.shape[0]):
        if used[r] < size and room < 0:
            room = r
        if not has[r, e] and (full < 0 or sums[r] < sums[full]):
            full = r
    slot = -1
    for s in range(used[full]):
        f = held[full, s]
        if not has[room, f] and (slot < 0 or share[f] < share[held[full, slot]]):
            slot = s
    f = held[full, slot]
    held[full, slot] = held[full, used[full] - 1]
    held[room, used[room]] = f
    used[full] -= 1
    used[room] += 1
    has[full, f], has[room, f] = False, True
    sums[full] -= share[f]
    sums[room] += share[f]
    return full


@compiled
def _swap_down(share, held, has, sums):
    """Exchange experts of the busiest rank while that lowers the larger load of the two ranks."""
    num_ranks, size = held.shape
    bound = max(sums.sum() / num_ranks, share.max())
    for _ in range(_MOST_SWAPS):
        top = np.argmax(sums)
        if sums[top] <= bound * _ENOUGH:
            return
        best, rank, mine, theirs = sums[top] * (1 - 1e-12), -1, 0, 0
        for r in range(num_ranks):
            if max((sums[top] + sums[r]) / 2, bound) >= best:
                continue  # even a perfect exchange with this rank is no better
            for i in range(size):
                e = held[top, i]
                if has[r, e]:
                    continue
                for j in range(size):
                    change = share[e] - share[held[r, j]]
                    larger = max(sums[top] - change, sums[r] + change)
                    if larger < best and not has[top, held[r, j]]:
                        best, rank, mine, theirs = larger, r, i, j
        if rank < 0:
            return
        e, f = held[top, mine], held[rank, theirs]
        held[top, mine], held[rank, theirs] = f, e
        has[top, e], has[top, f] = False, True
        has[rank, e], has[rank, f] = True, False
        sums[top] += share[f] - share[e]
        sums[rank] += share[e] - share[f]
