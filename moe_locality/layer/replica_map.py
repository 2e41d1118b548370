"""Which slots hold the same expert, as arrays: pure functions, no tensors, no ranks.

A layer has P slots on G ranks, P / G consecutive slots per rank; ``slot_to_logical[p]`` is the
logical expert of slot p. An expert in several slots (on as many ranks) has *replicas*.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


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


def source_slots(current: np.ndarray, target: np.ndarray, num_ranks: int) -> np.ndarray:
    """Return [P] the slot of ``current [S]`` that each slot of ``target [P]`` is copied from.

    One on the same rank where there is one, else the lowest.
    """
    sources = first_slots(current)[target]
    per_rank, new_per_rank = len(current) // num_ranks, len(target) // num_ranks
    for slot, expert in enumerate(target):
        first = slot // new_per_rank * per_rank
        here = np.flatnonzero(current[first : first + per_rank] == expert)
        if len(here):
            sources[slot] = first + here[0]
    return sources
