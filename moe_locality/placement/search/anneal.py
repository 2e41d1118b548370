"""Experts of one layer to blocks by annealing: picked together, placed together, blocks level.

Counting how many nodes a token visits is the connectivity (km1) of a hypergraph whose vertices are
experts and whose edges are tokens; this search uses its pair form, the co-activation matrix, and
leaves the exact count to ``polish`` and to its caller. What it makes large is the weight inside
blocks less a price on the load to expect of the busiest block (``cap``). A price asks for level
where it is cheap; a cap on every block, the same promise, forbids a swap that fills one block while
the others have room. Simulated annealing over swaps (Kirkpatrick, Gelatt, Vecchi 1983) with O(1)
gains; block sizes stay as they are in the start.

Shapes: E experts, B blocks (nodes, or ranks of one node), S samples.
"""

from __future__ import annotations

import numba
import numpy as np

from moe_locality.placement.search import kernels
from moe_locality.placement.search.cap import Noise, samples_of

HOT, COLD = 0.3, 0.012
"""First and last heat, in weight per expert."""


def anneal(
    weight: np.ndarray,
    pin: np.ndarray,
    load: np.ndarray,
    noise: Noise | None,
    price: float,
    limit: float,
    start: np.ndarray,
    steps: int,
    seed: int,
    hot: float = HOT,
) -> np.ndarray:
    """[E] blocks with much weight inside and little load to expect of the busiest one.

    Args:
        weight: [E, E] gain of having both experts in one block (symmetric, zero diagonal).
        pin: [E, B] gain of having the expert in that block.
        load: [E] picks.
        noise: how loads vary (None: not at all).
        price: gain that one pick less to expect on the busiest block is worth.
        limit: picks to expect there beyond which it is ``kernels.STEEP`` times dearer, on top.
        start: [E] block of each expert; found as it is where nothing better is met.
        steps: swaps tried. hot: the first heat; a low one keeps most of the start.
    """
    scale = (np.abs(weight).sum() / 2 + pin.sum()) / max(len(load), 1)
    covariance, unit, draws = samples_of(noise, pin.shape[1])
    start = np.ascontiguousarray(start, dtype=np.int64)
    return _anneal(
        weight, pin, load, covariance, unit, draws, float(price), float(limit), start, steps,
        max(hot * scale, 1e-9), max(COLD * scale, 1e-9), seed,
    )  # fmt: skip


@numba.njit(nogil=True, cache=True)
def _anneal(weight, pin, load, cov, unit, draws, price, limit, start, steps, hot, cold, seed):
    n = len(start)
    block_of, best = start.copy(), start.copy()
    near = pin.copy()
    for e in range(n):
        for f in range(n):
            near[e, block_of[f]] += weight[e, f]
    sums, level = kernels.start_levels(load, cov, unit, draws, limit, block_of)
    mean = load.sum() / len(draws)
    score, highest = 0.0, 0.0
    state = np.array([np.uint64(seed)])
    heat, ratio = hot, kernels.cooling(hot, cold, steps)
    for step in range(steps):
        if step % kernels.CHUNK == 0 and step:
            heat = max(heat * ratio, cold)
        e, f = kernels.next_pair(state, n)
        a, b = block_of[e], block_of[f]
        if a == b:
            continue
        gain = near[e, b] - near[e, a] + near[f, a] - near[f, b] - 2 * weight[e, f]
        allowed = gain + heat * kernels.luck(state)
        if price > 0:
            new = kernels.try_swap(
                load, cov, unit, draws, limit, sums, mean, level + allowed / price, a, b, e, f
            )
            if new == np.inf:
                continue
            gain -= price * (new - level)
            level = new
        elif allowed < 0:
            continue
        kernels.swap_near(near, weight, a, b, e, f)
        block_of[e], block_of[f] = b, a
        score += gain
        if score > highest:
            highest = score
            best[:] = block_of
    return best
