"""Pair-swap search for the experts of one layer: O(1) gains, a hard cap on block loads, kicks.

Counting how many nodes a token visits is the connectivity (km1) of a hypergraph whose vertices are
experts and whose edges are tokens; the search uses its pair form, the co-activation matrix, and
leaves the exact count to its caller. All numbers are integers held in float64, so sums are exact
and a seed gives the same result everywhere. Shapes: T tokens, K picks, E experts, B blocks (nodes,
or ranks of one node), S starts.
"""

import numba
import numpy as np


@numba.njit(cache=True)
def count_pairs(ids, num_experts):
    """Return ([E, E] float64 tokens that pick both, zero diagonal; [E] picks) of ids [T, K]."""
    pairs = np.zeros((num_experts, num_experts))
    load = np.zeros(num_experts)
    for token in range(ids.shape[0]):
        for first in range(ids.shape[1]):
            e = ids[token, first]
            if e < 0:
                continue
            load[e] += 1
            for second in range(first):
                f = ids[token, second]
                if f >= 0:
                    pairs[e, f] += 1
                    pairs[f, e] += 1
    return pairs, load


@numba.njit(cache=True)
def count_visits(ids, block_of, home_block):
    """Blocks that the tokens visit besides their home, summed over tokens.

    ``home_block`` [T], or empty: every block touched counts (then the expectation over uniform
    homes is (M - 1) / M of it).
    """
    num_blocks = block_of.max() + 1
    if home_block.size:
        num_blocks = max(num_blocks, home_block.max() + 1)
    seen = np.full(num_blocks, -1, dtype=np.int64)
    total = 0
    for token in range(ids.shape[0]):
        if home_block.size:
            seen[home_block[token]] = token
        for pick in range(ids.shape[1]):
            e = ids[token, pick]
            if e >= 0 and seen[block_of[e]] != token:
                seen[block_of[e]] = token
                total += 1
    return total


@numba.njit(cache=True)
def _next(state):
    """splitmix64 (Steele, Lea, Flood 2014): state [1] uint64 in, 32 random bits out."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((z ^ (z >> np.uint64(31))) >> np.uint64(33))


@numba.njit(cache=True)
def _swap(weight, load, block_of, near, block_load, e, f):
    """Exchange the blocks of e and f and keep ``near`` and ``block_load`` up to date."""
    a, b = block_of[e], block_of[f]
    for g in range(len(block_of)):
        change = weight[g, f] - weight[g, e]
        near[g, a] += change
        near[g, b] -= change
    block_load[a] += load[f] - load[e]
    block_load[b] += load[e] - load[f]
    block_of[e], block_of[f] = b, a


@numba.njit(cache=True)
def _descend(weight, load, cap, block_of, near, block_load, state):
    """Swap until no swap helps: first less load above the cap, then more weight inside blocks."""
    n = len(block_of)
    order = np.arange(n)
    improved = True
    while improved:
        improved = False
        for i in range(n - 1, 0, -1):
            j = _next(state) % (i + 1)
            order[i], order[j] = order[j], order[i]
        for e in order:
            a = block_of[e]
            best_f, best_excess, best_gain = -1, 0.0, 0.0
            for f in range(n):
                b = block_of[f]
                if b == a:
                    continue
                shift = load[f] - load[e]
                excess = (
                    max(block_load[a] + shift - cap, 0.0)
                    + max(block_load[b] - shift - cap, 0.0)
                    - max(block_load[a] - cap, 0.0)
                    - max(block_load[b] - cap, 0.0)
                )
                if excess > best_excess:
                    continue
                gain = near[e, b] - near[e, a] + near[f, a] - near[f, b] - 2 * weight[e, f]
                if excess < best_excess or gain > best_gain:
                    best_f, best_excess, best_gain = f, excess, gain
            if best_f >= 0:
                _swap(weight, load, block_of, near, block_load, e, best_f)
                improved = True


@numba.njit(cache=True)
def _score(weight, pin, load, cap, block_of, block_load):
    """(load above the cap, weight inside blocks): smaller, then larger, is better."""
    inside = 0.0
    for e in range(len(block_of)):
        inside += pin[e, block_of[e]]
        for f in range(e):
            if block_of[f] == block_of[e]:
                inside += weight[e, f]
    excess = 0.0
    for b in range(len(block_load)):
        excess += max(block_load[b] - cap, 0.0)
    return excess, inside


@numba.njit(cache=True)
def search(weight, pin, load, cap, starts, kicks, seed):
    """Improve each start by swaps and kicks; block sizes stay as they are in the start.

    Args:
        weight: [E, E] gain of having both experts in one block (symmetric, zero diagonal).
        pin: [E, B] gain of having the expert in that block.
        load: [E]; cap: most load that a block should hold. A start above it is brought down as far
            as swaps can, and never up.
        starts: [S, E] block of each expert.
        kicks: disturbances per start; each is undone unless it ends at least as well.

    Returns:
        [S, E] blocks, [S] load above the cap, [S] weight inside blocks.
    """
    num_starts, n = starts.shape
    found = starts.copy()
    excesses, insides = np.zeros(num_starts), np.zeros(num_starts)
    state = np.array([np.uint64(seed)])
    for s in range(num_starts):
        block_of = found[s].copy()
        near, block_load = _prepare(weight, pin, load, block_of)
        _descend(weight, load, cap, block_of, near, block_load, state)
        excess, inside = _score(weight, pin, load, cap, block_of, block_load)
        for _ in range(kicks):
            old_block, old_near, old_load = block_of.copy(), near.copy(), block_load.copy()
            for _ in range(2 + _next(state) % 3):
                e, f = _next(state) % n, _next(state) % n
                if block_of[e] != block_of[f]:
                    _swap(weight, load, block_of, near, block_load, e, f)
            _descend(weight, load, cap, block_of, near, block_load, state)
            new = _score(weight, pin, load, cap, block_of, block_load)
            if new[0] > excess or (new[0] == excess and new[1] < inside):
                block_of, near, block_load = old_block, old_near, old_load
            else:
                excess, inside = new
        found[s] = block_of
        excesses[s], insides[s] = excess, inside
    return found, excesses, insides


@numba.njit(cache=True)
def _prepare(weight, pin, load, block_of):
    """(near [E, B]: weight between an expert and a block; [B] block loads)."""
    near = pin.copy()
    block_load = np.zeros(pin.shape[1])
    for e in range(len(block_of)):
        block_load[block_of[e]] += load[e]
        for f in range(len(block_of)):
            near[e, block_of[f]] += weight[e, f]
    return near, block_load
