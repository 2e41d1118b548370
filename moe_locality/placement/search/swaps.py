"""Pair-swap search for the experts of one layer: O(1) gains, a hard cap on block loads, kicks.

Counting how many nodes a token visits is the connectivity (km1) of a hypergraph whose vertices are
experts and whose edges are tokens; this search uses its pair form, the co-activation matrix, and
leaves the exact count to ``polish`` and to its caller. Counts are integers held in float64, so
sums are exact and a seed gives the same result everywhere. Shapes: T tokens, K picks, E experts, B
blocks (nodes, or ranks of one node), S starts.
"""

from __future__ import annotations

import numba
import numpy as np

SLACK = 1e-6
"""Picks: loads above a cap by less are not above it (roots of variances are rounded)."""

_SWEEPS = 1000
_NO_COVARIANCE = np.zeros((0, 0))


@numba.njit(nogil=True, cache=True)
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


@numba.njit(nogil=True, cache=True)
def count_pattern_visits(ids, home_block, count, block_of, num_blocks):
    """``count_visits`` over patterns of picks [N, K] that occur ``count`` [N] times; float64."""
    seen = np.full(num_blocks, -1, dtype=np.int64)
    total = 0.0
    for row in range(ids.shape[0]):
        if home_block.size:
            seen[home_block[row]] = row
        for pick in range(ids.shape[1]):
            e = ids[row, pick]
            if e >= 0 and seen[block_of[e]] != row:
                seen[block_of[e]] = row
                total += count[row]
    return total


def search(
    weight: np.ndarray,
    pin: np.ndarray,
    load: np.ndarray,
    cap: float,
    starts: np.ndarray,
    kicks: int,
    seed: int,
    covariance: np.ndarray | None = None,
    deviations: float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Improve each start by swaps and kicks; block sizes stay as they are in the start.

    Args:
        weight: [E, E] gain of having both experts in one block (symmetric, zero diagonal).
        pin: [E, B] gain of having the expert in that block.
        load: [E]; cap: most load that a block should hold. A start above it is brought down as far
            as swaps can, and never up.
        starts: [S, E] block of each expert.
        kicks: disturbances per start; each is undone unless it ends at least as well.
        covariance: [E, E] of the loads; then the cap holds for the load of a block plus
            ``deviations`` times the root of its covariance.

    Returns:
        [S, E] blocks, [S] load above the cap, [S] weight inside blocks.
    """
    if covariance is None or deviations == 0:
        covariance, deviations = _NO_COVARIANCE, 0.0
    starts = np.ascontiguousarray(starts, dtype=np.int64)
    return _search(
        weight, covariance, pin, load, float(cap), float(deviations), starts, kicks, seed
    )


@numba.njit(nogil=True, cache=True)
def next_random(state):
    """splitmix64 (Steele, Lea, Flood 2014): state [1] uint64 in, 31 random bits out."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.int64((z ^ (z >> np.uint64(31))) >> np.uint64(33))


@numba.njit(nogil=True, cache=True)
def shuffle(order, state):
    """Put ``order`` into a random order (Fisher and Yates)."""
    for i in range(len(order) - 1, 0, -1):
        j = next_random(state) % (i + 1)
        order[i], order[j] = order[j], order[i]


@numba.njit(nogil=True, cache=True)
def over(load, variance, deviations, cap):
    """Load above the cap, with so many standard deviations on top."""
    if deviations > 0:
        load += deviations * np.sqrt(max(variance, 0.0))
    return load - cap if load - cap > SLACK else 0.0


@numba.njit(nogil=True, cache=True)
def _swap(weight, cov, load, block_of, near, near_cov, block_load, block_var, e, f):
    """Exchange the blocks of e and f and keep the sums over blocks up to date."""
    a, b = block_of[e], block_of[f]
    n = len(block_of)
    for g in range(n):
        change = weight[g, f] - weight[g, e]
        near[g, a] += change
        near[g, b] -= change
    if len(cov):
        change = cov[e, e] + cov[f, f] - 2 * cov[e, f]
        block_var[a] += change - 2 * (near_cov[e, a] - near_cov[f, a])
        block_var[b] += change - 2 * (near_cov[f, b] - near_cov[e, b])
        for g in range(n):
            change = cov[g, f] - cov[g, e]
            near_cov[g, a] += change
            near_cov[g, b] -= change
    block_load[a] += load[f] - load[e]
    block_load[b] += load[e] - load[f]
    block_of[e], block_of[f] = b, a


@numba.njit(nogil=True, cache=True)
def change_of_excess(cov, load, cap, deviations, near_cov, block_load, block_var, a, b, e, f):
    """What swapping e of block a with f of block b adds to the load above the cap."""
    new = _excess_after(
        cov, load, cap, deviations, near_cov, block_load, block_var, a, b, e, f, np.inf
    )
    new -= over(block_load[a], block_var[a], deviations, cap) + over(
        block_load[b], block_var[b], deviations, cap
    )
    return new if abs(new) > SLACK else 0.0


@numba.njit(nogil=True, cache=True)
def _excess_after(cov, load, cap, deviations, near_cov, block_load, block_var, a, b, e, f, most):
    """Load of the blocks a and b above the cap once e of a and f of b are swapped.

    Infinite where the block that gets the heavier expert is above it by more than ``most`` already.
    """
    shift = load[f] - load[e]
    if shift < 0:
        a, b, e, f, shift = b, a, f, e, -shift
    var_a, var_b = block_var[a], block_var[b]
    if deviations > 0:
        own = cov[e, e] + cov[f, f] - 2 * cov[e, f]
        var_a += own - 2 * (near_cov[e, a] - near_cov[f, a])
        var_b += own - 2 * (near_cov[f, b] - near_cov[e, b])
    new = over(block_load[a] + shift, var_a, deviations, cap)
    if new > most:
        return np.inf
    return new + over(block_load[b] - shift, var_b, deviations, cap)


@numba.njit(nogil=True, cache=True)
def _descend(
    weight, cov, load, cap, deviations, block_of, near, near_cov, block_load, block_var, state
):
    """Swap until no swap helps: first less load above the cap, then more weight inside blocks."""
    n = len(block_of)
    order = np.arange(n)
    above = np.empty(len(block_load))  # load above the cap of each block
    for b in range(len(block_load)):
        above[b] = over(block_load[b], block_var[b], deviations, cap)
    for _ in range(_SWEEPS):
        improved = False
        shuffle(order, state)
        for e in order:
            a = np.uint64(block_of[e])  # unsigned: no test for an index from the end
            best_f, best_excess, best_gain = -1, 0.0, 0.0
            row, of_e = weight[e], near[e]
            for f in range(n):
                b = np.uint64(block_of[f])
                if b == a:
                    continue
                gain = of_e[b] - of_e[a] + near[f, a] - near[f, b] - 2 * row[f]
                full = above[a] + above[b]
                if gain <= best_gain and -full >= best_excess:
                    continue  # a swap takes away no more than what is above the cap
                most = full + (best_excess if best_excess < 0 else SLACK)
                excess = _excess_after(
                    cov, load, cap, deviations, near_cov, block_load, block_var, a, b, e, f, most
                )
                excess -= full
                if abs(excess) <= SLACK:
                    excess = 0.0
                if excess < best_excess or (excess == best_excess and gain > best_gain):
                    best_f, best_excess, best_gain = f, excess, gain
            if best_f >= 0:
                b = block_of[best_f]
                _swap(weight, cov, load, block_of, near, near_cov, block_load, block_var, e, best_f)
                above[a] = over(block_load[a], block_var[a], deviations, cap)
                above[b] = over(block_load[b], block_var[b], deviations, cap)
                improved = True
        if not improved:
            break


@numba.njit(nogil=True, cache=True)
def _score(weight, pin, cap, deviations, block_of, block_load, block_var):
    """(load above the cap, weight inside blocks): smaller, then larger, is better."""
    inside = 0.0
    for e in range(len(block_of)):
        inside += pin[e, block_of[e]]
        for f in range(e):
            if block_of[f] == block_of[e]:
                inside += weight[e, f]
    return total_excess(block_load, block_var, deviations, cap), inside


@numba.njit(nogil=True, cache=True)
def total_excess(block_load, block_var, deviations, cap):
    """Load above the cap, summed over the blocks."""
    excess = 0.0
    for b in range(len(block_load)):
        excess += over(block_load[b], block_var[b], deviations, cap)
    return excess


@numba.njit(nogil=True, cache=True)
def _search(weight, cov, pin, load, cap, deviations, starts, kicks, seed):
    num_starts, n = starts.shape
    found = starts.copy()
    excesses, insides = np.zeros(num_starts), np.zeros(num_starts)
    state = np.array([np.uint64(seed)])
    for s in range(num_starts):
        block_of = found[s].copy()
        near = _near(weight, pin, block_of)
        near_cov, block_load, block_var = block_sums(cov, load, block_of, pin.shape[1])
        _descend(
            weight, cov, load, cap, deviations, block_of, near, near_cov, block_load, block_var,
            state,
        )  # fmt: skip
        excess, inside = _score(weight, pin, cap, deviations, block_of, block_load, block_var)
        for _ in range(kicks):
            old = block_of.copy(), near.copy(), near_cov.copy(), block_load.copy(), block_var.copy()
            for _ in range(2 + next_random(state) % 3):
                e, f = next_random(state) % n, next_random(state) % n
                if block_of[e] != block_of[f]:
                    _swap(weight, cov, load, block_of, near, near_cov, block_load, block_var, e, f)
            _descend(
                weight, cov, load, cap, deviations, block_of, near, near_cov, block_load, block_var,
                state,
            )  # fmt: skip
            new = _score(weight, pin, cap, deviations, block_of, block_load, block_var)
            if new[0] > excess or (new[0] == excess and new[1] < inside):
                block_of, near, near_cov, block_load, block_var = old
            else:
                excess, inside = new
        found[s] = block_of
        excesses[s], insides[s] = excess, inside
    return found, excesses, insides


@numba.njit(nogil=True, cache=True)
def _near(weight, pin, block_of):
    """[E, B] weight between an expert and a block."""
    near = pin.copy()
    for e in range(len(block_of)):
        for f in range(len(block_of)):
            near[e, block_of[f]] += weight[e, f]
    return near


@numba.njit(nogil=True, cache=True)
def block_sums(cov, load, block_of, num_blocks):
    """([E, B] covariance of an expert with a block, [B] loads, [B] covariances of the blocks)."""
    near_cov = np.zeros((len(cov), num_blocks))
    block_load, block_var = np.zeros(num_blocks), np.zeros(num_blocks)
    for e in range(len(block_of)):
        block_load[block_of[e]] += load[e]
    if len(cov):
        for e in range(len(block_of)):
            for f in range(len(block_of)):
                near_cov[e, block_of[f]] += cov[e, f]
        for e in range(len(block_of)):
            block_var[block_of[e]] += near_cov[e, block_of[e]]
    return near_cov, block_load, block_var
