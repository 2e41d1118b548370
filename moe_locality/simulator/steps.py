"""Which tokens are in which step: homes drawn at random, and batches of every rank."""

from __future__ import annotations

import heapq

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.trace.schema import RoutingTrace


def random_homes(trace: RoutingTrace, num_ranks: int, seed: int) -> dict[int, int]:
    """Request → rank: requests in random order, each to the rank with the fewest tokens so far."""
    requests, tokens = np.unique(trace.tokens_only("a simulation").request_id, return_counts=True)
    rng = np.random.default_rng(seed)
    ranks = [(0, place, rank) for place, rank in enumerate(rng.permutation(num_ranks).tolist())]
    heapq.heapify(ranks)
    homes: dict[int, int] = {}
    for index in rng.permutation(len(requests)):
        load, place, rank = heapq.heappop(ranks)
        homes[int(requests[index])] = rank
        heapq.heappush(ranks, (load + int(tokens[index]), place, rank))
    return homes


def draw_steps(
    home_rank: np.ndarray, num_ranks: int, batch_tokens: int, max_steps: int, seed: int
) -> list[np.ndarray]:
    """Tokens of each step: ``batch_tokens`` consecutive tokens of every rank that has any.

    As many steps as the tokens fill on average, at most ``max_steps`` of them, drawn at random. A
    rank with fewer tokens than that goes through them again.

    Returns:
        S arrays of token indices.
    """
    if batch_tokens < 1 or max_steps < 1:
        raise PlacementError(
            f"found batch_tokens {batch_tokens} and max_steps {max_steps}, expected at least 1"
        )
    order = np.argsort(home_rank, kind="stable")
    counts = np.bincount(home_rank, minlength=num_ranks)
    first = np.cumsum(counts) - counts
    steps = max(len(home_rank) // (num_ranks * batch_tokens), 1)
    chosen = np.arange(steps)
    if steps > max_steps:
        chosen = np.sort(np.random.default_rng(seed).permutation(steps)[:max_steps])
    having = np.flatnonzero(counts)
    found = []
    for step in chosen:
        place = step * batch_tokens + np.arange(batch_tokens)
        found.append(order[(first[having, None] + place % counts[having, None]).ravel()])
    return found
