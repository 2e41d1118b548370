"""Bundles of sequences for training, and homes of requests that arrive one by one.

Training gives every rank the same number of sequences in every step; within that, sequences go to
the rank whose node holds the experts they are expected to pick. No torch in here: the sampler has
the protocol of a ``torch.utils.data.DataLoader`` batch sampler.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.placement.homes.assign import domain_scores
from moe_locality.placement.plan import PlacementPlan


def make_bundles(
    homes: Mapping[Any, int] | Sequence[int] | np.ndarray, num_ranks: int
) -> list[list[int]]:
    """The sequence ids of each rank, rising: equal counts, as many as possible on their home rank.

    Counts differ by at most one; the surplus of a crowded rank, its highest ids, fills the others
    in order.

    Args:
        homes: sequence id → home rank (``assign_homes``, or the JSON of ``moe-locality group``,
            whose ids are text), or the home rank of sequence 0, 1, ...

    Raises:
        PlacementError: a home is not one of the ranks.
    """
    pairs = homes.items() if isinstance(homes, Mapping) else enumerate(homes)
    items = sorted((int(q), int(rank)) for q, rank in pairs)
    wrong = [(q, rank) for q, rank in items if not 0 <= rank < num_ranks]
    if wrong:
        raise PlacementError(
            f"found home rank {wrong[0][1]} for sequence {wrong[0][0]}, expected 0 to "
            f"{num_ranks - 1}: assign homes for this cluster"
        )
    bundles: list[list[int]] = [[] for _ in range(num_ranks)]
    for sequence, rank in items:
        bundles[rank].append(sequence)
    size, larger = divmod(len(items), num_ranks)
    # the fullest ranks keep the one more that some must have
    fullest = sorted(range(num_ranks), key=lambda r: (-len(bundles[r]), r))
    larger_ones = set(fullest[:larger])
    quota = [size + (rank in larger_ones) for rank in range(num_ranks)]
    each = list(zip(bundles, quota, strict=True))
    surplus = iter([s for own, most in each for s in own[most:]])
    return [sorted([*own[:most], *islice(surplus, max(most - len(own), 0))]) for own, most in each]


def domain_homes(
    domains: Sequence[str | None], plan: PlacementPlan, *, group_tokens: Sequence[int] | None = None
) -> np.ndarray:
    """[N] home rank of each sequence from its domain alone, the same number on every rank.

    Args:
        domains: [N] names; names that the plan does not know go where there is room.
        group_tokens: [N] tokens of each sequence (all equal by default); long ones weigh more.

    Raises:
        PlacementError: the plan has no domain profiles.
    """
    from moe_locality.placement.homes.capacitated import Capacities, assign

    score, _ = domain_scores(plan, list(domains), {})
    tokens = np.ones(len(domains)) if group_tokens is None else np.asarray(group_tokens)
    caps = Capacities(tokens=np.inf, even=True)
    return assign(score, tokens, plan.node_of_rank, caps).rank_of


class LocalityBatchSampler:
    """Batches of sequence indices for one rank; for ``DataLoader(batch_sampler=...)``.

    Every rank makes the same bundles from the same ``homes`` and seed, shuffles its own in each
    epoch, and yields as many batches of the same size as every other rank. What does not fill a
    batch on all ranks is left out of that epoch; another epoch leaves out others. Call
    ``set_epoch`` as with ``torch.utils.data.DistributedSampler``; ``state_dict`` and
    ``load_state_dict`` resume in the middle of an epoch.

    Args:
        homes: as in ``make_bundles``; the ids are indices of the data set.
        batch_size: sequences per rank and step.

    Raises:
        ConfigError: a batch or rank that cannot be, or too few sequences for one batch per rank.
    """

    def __init__(
        self,
        homes: Mapping[Any, int] | Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        rank: int,
        num_ranks: int,
        seed: int = 0,
        shuffle: bool = True,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < num_ranks:
            raise ConfigError(
                f"found batch_size {batch_size} and rank {rank} of {num_ranks}, expected a batch "
                "of at least 1 and a rank below num_ranks: correct them"
            )
        bundles = make_bundles(homes, num_ranks)
        self._mine = np.array(bundles[rank], dtype=np.int64)
        self._batches = min(len(bundle) for bundle in bundles) // batch_size
        if self._batches == 0:
            raise ConfigError(
                f"found {sum(map(len, bundles))} sequences for {num_ranks} ranks, expected at "
                f"least {batch_size} for each: use a smaller batch or more data"
            )
        self._batch_size, self._rank, self._seed = batch_size, rank, seed
        self._shuffle, self._epoch, self._first = shuffle, 0, 0
        told = (batch_size, seed, bool(shuffle), [len(bundle) for bundle in bundles])
        digest = hashlib.sha256(repr(told).encode())
        digest.update(np.array([s for bundle in bundles for s in bundle], dtype=np.int64).tobytes())
        self._digest = digest.hexdigest()

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of the next epoch; another one than the state's starts at its top."""
        if int(epoch) != self._epoch:
            self._epoch, self._first = int(epoch), 0

    def state_dict(self, batches: int) -> dict[str, Any]:
        """Return where a training stands, the same on every rank; for a checkpoint.

        Args:
            batches: those of this epoch that were trained on. Count them in the loop: workers of a
                ``DataLoader`` have asked for more.
        """
        return {"epoch": self._epoch, "batches": batches, "digest": self._digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken: the next pass yields the rest of that epoch.

        Raises:
            ConfigError: it was taken with other homes, batch size, seed or number of ranks.
        """
        if state["digest"] != self._digest or not 0 <= state["batches"] <= self._batches:
            raise ConfigError(
                "found the state of a sampler with other homes, batch_size, seed, shuffle or "
                "num_ranks, expected the same: make this one alike, or start its next epoch with "
                f"set_epoch({int(state['epoch']) + 1})"
            )
        self._epoch, self._first = int(state["epoch"]), int(state["batches"])

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[list[int]]:
        order = self._mine
        if self._shuffle:
            rng = np.random.default_rng((self._seed, self._epoch, self._rank))
            order = rng.permutation(order)
        first, self._first = self._first, 0
        for batch in range(first, self._batches):
            start = batch * self._batch_size
            yield order[start : start + self._batch_size].tolist()
