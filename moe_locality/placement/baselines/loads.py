"""Placements that do not look at co-activation: linear, round robin, and EPLB from loads alone.

EPLB here is our own code of the published description (DeepSeek-V3, arXiv 2412.19437, section 3.4,
and the README of deepseek-ai/EPLB): experts are packed onto nodes by load, the busiest get
replicas inside their node, and the replicas are packed onto the ranks. Each function returns, for
one layer, the experts of each rank: ``list[list[int]]`` with equal lengths and no expert twice on
a rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RankLists = list[list[int]]


def linear(num_experts: int, num_ranks: int, num_slots: int) -> RankLists:
    """Slot p holds expert p, then from the first expert again."""
    slots = np.arange(num_slots) % num_experts
    return slots.reshape(num_ranks, -1).tolist()


def round_robin(num_experts: int, num_ranks: int, num_slots: int) -> RankLists:
    """Expert e on rank e mod G; replicas go on in that order, past ranks that hold the expert."""
    held: RankLists = [list(range(rank, num_experts, num_ranks)) for rank in range(num_ranks)]
    per_rank = num_slots // num_ranks
    for index in range(num_slots - num_experts):
        open_ranks = [r for r in range(num_ranks) if len(held[r]) < per_rank]
        rank = min(open_ranks, key=lambda r: len(held[r]))
        expert = index % num_experts
        while expert in held[rank]:
            expert = (expert + 1) % num_experts
        held[rank].append(expert)
    return held


def pack(loads: Sequence[float], num_packs: int) -> list[list[int]]:
    """Put items into packs of equal size, heaviest first, each into the lightest pack with room."""
    size = len(loads) // num_packs
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    sums = [0.0] * num_packs
    for item in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        pick = min((p for p in range(num_packs) if len(packs[p]) < size), key=lambda p: sums[p])
        packs[pick].append(item)
        sums[pick] += loads[item]
    return packs


def replicate(loads: np.ndarray, num_slots: int, most: int) -> np.ndarray:
    """[n] replicas of each expert: one each, then again and again for the largest load per replica.

    ``most`` bounds the replicas of one expert, so that they fit on different ranks.
    """
    counts = np.ones(len(loads), dtype=np.int64)
    for _ in range(num_slots - len(loads)):
        share = np.where(counts < most, loads / counts, -1.0)
        counts[int(np.argmax(share))] += 1
    return counts


def pack_replicas(loads: np.ndarray, counts: np.ndarray, num_ranks: int) -> RankLists:
    """Replicas onto ranks of equal size, heaviest first, never twice on a rank.

    When the only ranks with room hold the expert already, an expert that such a rank lacks is moved
    there from a full rank to make room (there always is one, see the pigeonhole in the code).
    """
    size = int(counts.sum()) // num_ranks
    share = loads / counts
    held: RankLists = [[] for _ in range(num_ranks)]
    sums = np.zeros(num_ranks)
    order = sorted(range(len(loads)), key=lambda e: (-share[e], e))
    for expert in (e for e in order for _ in range(int(counts[e]))):
        room = [r for r in range(num_ranks) if len(held[r]) < size]
        fine = [r for r in room if expert not in held[r]]
        if fine:
            rank = min(fine, key=lambda r: sums[r])
        else:
            # counts <= num_ranks, so some full rank lacks the expert; it holds `size` experts and
            # the open rank at most size - 2 others, so one of them can move there
            open_rank = room[0]
            rank = min(
                (r for r in range(num_ranks) if expert not in held[r]), key=lambda r: sums[r]
            )
            moved = min(
                (e for e in held[rank] if e not in held[open_rank]), key=lambda e: (share[e], e)
            )
            held[rank].remove(moved)
            held[open_rank].append(moved)
            sums[rank] -= share[moved]
            sums[open_rank] += share[moved]
        held[rank].append(expert)
        sums[rank] += share[expert]
    return held


def eplb(
    load: np.ndarray,
    nodes: int,
    ranks_per_node: int,
    num_slots: int,
    group_of: np.ndarray | None = None,
) -> RankLists:
    """Balance by loads: hierarchical where groups divide evenly over the nodes, else global.

    Args:
        load: [E] tokens per expert.
        group_of: [E] group of each expert; a group stays on one node. None: every expert alone.

    Returns:
        the experts of each rank, the ranks of a node consecutive.
    """
    experts, ranks = len(load), nodes * ranks_per_node
    groups = np.arange(experts) if group_of is None else np.asarray(group_of)
    num_groups = int(groups.max()) + 1
    per_node = num_slots // nodes
    hierarchical = num_groups % nodes == 0 and per_node // ranks_per_node <= experts // nodes
    if not hierarchical:
        counts = replicate(load, num_slots, ranks)
        return pack_replicas(load, counts, ranks)
    held: RankLists = []
    group_load = np.bincount(groups, weights=load, minlength=num_groups)
    for members in pack(group_load.tolist(), nodes):
        local = np.flatnonzero(np.isin(groups, members))
        counts = replicate(load[local], per_node, ranks_per_node)
        for rank in pack_replicas(load[local], counts, ranks_per_node):
            held.append([int(local[i]) for i in rank])
    return held


def eplb_global(load: np.ndarray, num_ranks: int, num_slots: int) -> RankLists:
    """The global policy of EPLB: the busiest get replicas, on any rank of any node."""
    return pack_replicas(load, replicate(load, num_slots, num_ranks), num_ranks)


def add_hottest(nodes: list[list[int]], load: np.ndarray, slots_per_node: int) -> list[list[int]]:
    """Fill every node's open slots with the most loaded experts that it lacks."""
    order = np.argsort(-load, kind="stable").tolist()
    full = []
    for members in nodes:
        lacking = [e for e in order if e not in members]
        full.append([*members, *lacking[: slots_per_node - len(members)]])
    return full


def pack_node(
    load: np.ndarray, members: Sequence[int], num_ranks: int, num_slots: int
) -> RankLists:
    """The experts of a node on its ranks, level by load; slots that are left get more replicas."""
    local = np.array(sorted(members))
    packed = pack_replicas(load[local], replicate(load[local], num_slots, num_ranks), num_ranks)
    return [[int(local[i]) for i in rank] for rank in packed]
