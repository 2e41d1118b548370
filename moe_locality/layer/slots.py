"""Which slot holds which expert, and how experts travel between slots: pure functions on arrays.

A layer has P slots on G ranks, P / G consecutive slots per rank; ``slot_to_logical[p]`` is the
logical expert of slot p. Without replicas, P is E and the array is a permutation. An expert in
several slots (on as many ranks) has *replicas*.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.placement.plan import PlacementPlan
from moe_locality.topology.cluster import ClusterTopology

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerReplicas:
    """The slots of one layer, seen from one rank of its EP group.

    ``slot_to_logical [P]``; ``ep_rank``, ``num_ranks``: this rank and the size of the group.
    """

    slot_to_logical: np.ndarray
    ep_rank: int
    num_ranks: int

    @property
    def slots_per_rank(self) -> int:
        return len(self.slot_to_logical) // self.num_ranks

    @property
    def local_experts(self) -> np.ndarray:
        """[P / G] the logical expert of each slot of this rank."""
        first = self.ep_rank * self.slots_per_rank
        return self.slot_to_logical[first : first + self.slots_per_rank]

    @cached_property
    def primary_slots(self) -> np.ndarray:
        """[E] the lowest slot of each expert: the one that is saved and counted."""
        return first_slots(self.slot_to_logical)

    @property
    def extra_local_slots(self) -> list[int]:
        """Slots of this rank, from 0, that hold an expert which a lower slot of the layer holds."""
        primary = self.primary_slots
        first = self.ep_rank * self.slots_per_rank
        return [j for j, e in enumerate(self.local_experts) if primary[e] != first + j]

    @cached_property
    def shared(self) -> list[tuple[int, list[int]]]:
        """By rising logical expert, the slots of this rank (from 0) whose experts are on other
        ranks too, with the ranks of all holders in slot order.

        The order is the same on all ranks, so exchanges between holders cannot cross.
        """
        found = []
        for local in np.argsort(self.local_experts, kind="stable").tolist():
            slots = np.flatnonzero(self.slot_to_logical == self.local_experts[local])
            if len(slots) > 1:
                found.append((local, (slots // self.slots_per_rank).tolist()))
        return found


def first_slots(slot_to_logical: np.ndarray) -> np.ndarray:
    """Return [E] the lowest slot that holds each of the experts 0..E-1."""
    experts, slots = np.unique(slot_to_logical, return_index=True)
    assert (experts == np.arange(len(experts))).all(), "an expert has no slot"
    return slots


def source_slots(current: np.ndarray, target: np.ndarray, num_ranks: int = 1) -> np.ndarray:
    """Return [P] the slot of ``current [S]`` that each slot of ``target [P]`` is copied from.

    One on the same rank where there is one, else the lowest. For two permutations:
    ``target[s] = current[sources[s]]``.
    """
    sources = first_slots(current)[target]
    per_rank, new_per_rank = len(current) // num_ranks, len(target) // num_ranks
    for slot, expert in enumerate(target if num_ranks > 1 else ()):
        first = slot // new_per_rank * per_rank
        here = np.flatnonzero(current[first : first + per_rank] == expert)
        if len(here):
            sources[slot] = first + here[0]
    return sources


def check_is_permutation(plan: PlacementPlan) -> None:
    """Raise PlacementError where the plan has replicas."""
    if not isinstance(plan, PlacementPlan):
        raise PlacementError(
            f"found a {type(plan).__name__}, expected a PlacementPlan: read one with "
            "PlacementPlan.read(path)"
        )
    if not plan.is_permutation:
        raise PlacementError(
            f"found a plan with {plan.num_redundant_experts} replicas, expected one slot per "
            "expert: weights in files and in a running engine hold every expert once, replicas are "
            "made at the start: give the plan and the checkpoint as it is to "
            "moe_locality.initialize (or apply), or make a plan with num_redundant_experts=0"
        )


def check_nodes(
    plan: PlacementPlan, topology: ClusterTopology, ep_groups: Sequence[Sequence[int]]
) -> None:
    """Raise where no expert group lies on nodes as the plan's ranks do; warn where only some do.

    Every rank sees all groups, so all ranks decide alike.
    """

    def pattern(nodes: Iterable[int]) -> list[int]:
        seen: dict[int, int] = {}
        return [seen.setdefault(int(node), len(seen)) for node in nodes]

    wanted = pattern(plan.node_of_rank)
    found = [pattern(topology.node_of(rank) for rank in ranks) for ranks in ep_groups]
    if wanted not in found:
        raise PlacementError(
            f"found a plan whose ranks lie on nodes {wanted} (one number per rank), expected "
            f"{found[0]} as the ranks of this cluster do ({topology.describe()}): make a plan for "
            "it with `moe-locality place`, or correct the cluster section (on one machine, "
            "cluster: {num_nodes, ranks_per_node} lets ranks stand for nodes)"
        )
    others = sum(nodes != wanted for nodes in found)
    if others:
        logger.warning(
            "moe_locality: %d of %d expert groups lie on nodes in another way than the plan's "
            "ranks; there it saves less",
            others,
            len(found),
        )


Step = tuple[tuple[int, int], ...]
"""Pairs (slot that is read, slot that is written): a rank reads the slots that it writes."""


def count_moved(current: np.ndarray, target: np.ndarray, num_ranks: int) -> int:
    """Return how many experts change rank between two permutations."""
    per_rank = len(current) // num_ranks
    return int((np.argsort(current) // per_rank != np.argsort(target) // per_rank).sum())


def plan_steps(current: np.ndarray, target: np.ndarray, num_ranks: int) -> list[Step]:
    """Return the steps from ``current`` to ``target``, both permutations of 0..E-1.

    A step touches at most two slots of a rank, and is done as a whole or not at all. First come the
    rounds: a rank sends at most one expert and receives at most one, into the slot that it has just
    freed. The rounds are the perfect matchings of a regular bipartite multigraph (König 1916): as
    many as the busiest rank has experts to send, which no schedule of this kind can beat. Then the
    ranks put their own slots in order, one swap per rank and step.
    """
    per_rank = len(current) // num_ranks
    holds = np.array(current, dtype=np.int64)  # what every slot holds, step after step
    new_rank = np.argsort(np.asarray(target)) // per_rank  # of each expert
    waiting: dict[tuple[int, int], deque[int]] = defaultdict(deque)
    for slot, expert in enumerate(holds.tolist()):
        waiting[slot // per_rank, int(new_rank[expert])].append(expert)
    counts = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    for (source, destination), experts in waiting.items():
        counts[source, destination] = len(experts) if source != destination else 0
    steps: list[Step] = []
    for partner in _matchings(counts):
        slot_of = np.argsort(holds)
        sent = {r: waiting[r, d].popleft() for r, d in enumerate(partner) if d != r}
        freed = {r: int(slot_of[expert]) for r, expert in sent.items()}
        steps.append(tuple((freed[r], freed[int(partner[r])]) for r in sent))
        for r, expert in sent.items():
            holds[freed[int(partner[r])]] = expert
    swaps: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    for slot, expert in enumerate(np.asarray(target).tolist()):
        other = int(np.flatnonzero(holds == expert)[0])  # on the same rank
        if other != slot:
            swaps[slot // per_rank].append((slot, other))
            holds[[slot, other]] = holds[[other, slot]]
    swapped = (tuple(filter(None, now)) for now in zip_longest(*swaps))
    return steps + [tuple(pair for a, b in now for pair in ((a, b), (b, a))) for now in swapped]


def reverse_step(step: Step) -> Step:
    """Return the step that undoes ``step``."""
    return tuple((written, read) for read, written in step)


def _matchings(counts: np.ndarray):
    """Yield, per round, the rank that each rank sends to (itself: it sends nothing).

    ``counts [G, G]`` has a zero diagonal, and row r sums up to what column r does: a rank receives
    as many experts as it sends. The diagonal fills every row up to the largest sum, so each round
    has a perfect matching.
    """
    from scipy.optimize import linear_sum_assignment

    left = counts + np.diag(counts.sum(1).max(initial=0) - counts.sum(1))
    while left.any():
        rows, partner = linear_sum_assignment(left == 0)
        left[rows, partner] -= 1
        yield partner


def count_moves(sources: Sequence[np.ndarray], slots_per_rank: int) -> dict[str, list[int]]:
    """Per layer, how many experts change their slot, and how many their rank.

    ``sources[layer][slot]`` is the old slot that the new one takes.
    """
    slots = np.arange(len(sources[0]) if sources else 0)
    ranks = slots // slots_per_rank
    return {
        "experts_moved_per_layer": [int((s != slots).sum()) for s in sources],
        "experts_changing_rank_per_layer": [
            int((s // slots_per_rank != ranks).sum()) for s in sources
        ],
    }
