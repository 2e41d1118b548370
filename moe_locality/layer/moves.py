"""Which expert travels when, as arrays: pure functions, no tensors, no ranks.

A layer has E slots on G ranks, n = E / G consecutive slots per rank. ``current[s]`` and
``target[s]`` are the logical experts of slot s before and after.

Experts travel in rounds. In one round a rank sends at most one expert and receives at most one,
into the slot that it has just freed, so two experts per rank are on the way and no more.
After the rounds every expert is on its rank, and the ranks put their own slots in order. The rounds
are the perfect matchings of a regular bipartite multigraph (König 1916), so there are as many as
the busiest rank has experts to send, which no schedule of this kind can beat.
"""

from collections import defaultdict, deque
from dataclasses import dataclass

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.placement.plan import PlacementPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Moves:
    """Args:
    rounds: per round, the pairs (slot that is read, slot that is written), on two ranks.
    local: [E] after the rounds, slot s takes what slot ``local[s]`` of the same rank holds.
    """

    rounds: tuple[tuple[tuple[int, int], ...], ...]
    local: np.ndarray

    @property
    def num_travellers(self) -> int:
        """Experts that change rank."""
        return sum(len(pairs) for pairs in self.rounds)

    @property
    def is_empty(self) -> bool:
        return not self.rounds and bool((self.local == np.arange(len(self.local))).all())


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


def source_slots(current: np.ndarray, target: np.ndarray) -> np.ndarray:
    """[E] the slot that holds now what each slot shall hold: ``new[s] = old[source[s]]``."""
    return np.argsort(current)[np.asarray(target)]


def plan_moves(current: np.ndarray, target: np.ndarray, num_ranks: int) -> Moves:
    """Schedule the way from ``current`` to ``target`` (both permutations of 0..E-1)."""
    per_rank = len(current) // num_ranks
    holds = np.array(current, dtype=np.int64)  # what every slot holds, round after round
    home = np.argsort(np.asarray(target)) // per_rank  # rank that each expert shall be on
    waiting: dict[tuple[int, int], deque[int]] = defaultdict(deque)
    for slot, expert in enumerate(holds.tolist()):
        waiting[slot // per_rank, int(home[expert])].append(expert)
    counts = np.zeros((num_ranks, num_ranks), dtype=np.int64)
    for (source, destination), experts in waiting.items():
        counts[source, destination] = len(experts) if source != destination else 0
    rounds = []
    for partner in _matchings(counts):
        slot_of = np.argsort(holds)
        sent = {r: waiting[r, d].popleft() for r, d in enumerate(partner) if d != r}
        freed = {r: int(slot_of[expert]) for r, expert in sent.items()}
        pairs = tuple((freed[r], freed[int(partner[r])]) for r in sent)
        for r, expert in sent.items():
            holds[freed[int(partner[r])]] = expert
        rounds.append(pairs)
    return Moves(rounds=tuple(rounds), local=source_slots(holds, target))


Step = tuple[tuple[int, int], ...]
"""Pairs (slot that is read, slot that is written): a rank reads the slots that it writes."""


def plan_steps(moves: Moves, num_ranks: int) -> list[Step]:
    """Cut a schedule into steps that each touch at most two slots of a rank, all at once or not.

    A round is a step: a rank sends what one slot holds and receives what goes there. Then come the
    ranks' own swaps, one per rank and step. The pairs of a step the other way round undo it.
    """
    per_rank = len(moves.local) // num_ranks
    swaps: list[list[tuple[int, int]]] = []
    for rank in range(num_ranks):
        own = range(rank * per_rank, (rank + 1) * per_rank)
        at = {slot: slot for slot in own}  # where the content of each slot is now
        holds = {slot: slot for slot in own}
        mine = []
        for slot in own:
            other = at[int(moves.local[slot])]
            if other == slot:
                continue
            mine.append((slot, other))
            holds[slot], holds[other] = holds[other], holds[slot]
            at[holds[slot]], at[holds[other]] = slot, other
        swaps.append(mine)
    steps: list[Step] = list(moves.rounds)
    for number in range(max(map(len, swaps), default=0)):
        now = [mine[number] for mine in swaps if number < len(mine)]
        steps.append(tuple(pair for a, b in now for pair in ((a, b), (b, a))))
    return steps


def undone(step: Step) -> Step:
    """The step that takes everything back."""
    return tuple((written, read) for read, written in step)


def _matchings(counts: np.ndarray):
    """Yield, per round, the rank that each rank sends to (itself = it rests).

    ``counts [G, G]`` has a zero diagonal and equal row and column sums: what leaves a rank comes
    back as often. Rests fill every row up to the largest sum, so each round has a perfect matching.
    """
    from scipy.optimize import linear_sum_assignment

    left = counts + np.diag(counts.sum(1).max(initial=0) - counts.sum(1))
    while left.any():
        rows, partner = linear_sum_assignment(left == 0)
        left[rows, partner] -= 1
        yield partner
