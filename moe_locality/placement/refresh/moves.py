"""Compiled moves of a refresh: the best pair swap of any layer, again and again, up to a budget.

Items are slots (without replicas: one per expert), or whole groups of experts. Shapes: L layers, N
items, B blocks (nodes), G ranks, E experts (of groups: groups).
"""

import numba
import numpy as np

EXCESS_WEIGHT = 1.0
"""Pairs on one node that a swap may cost per pick that it takes from above a cap. With much more,
few swaps all go into balance and copies rise; with much less, none do."""


@numba.njit(nogil=True, cache=True)
def swap_best(weight, pin, load, item, block_of, rank_of, block_cap, rank_cap, most):
    """Swap items between blocks, always the pair with the largest gain in any layer.

    The gain is weight inside blocks plus ``EXCESS_WEIGHT`` times the load that comes down to the
    caps. No swap raises the load above the caps or puts an expert twice on a rank. Ties go to the
    first layer, then to the first pair.

    Args:
        weight: [L, N, N] gain of having both items in one block (symmetric, zero diagonal).
        pin: [L, N, B] gain of having the item in that block.
        load: [L, N]; item: [L, N] expert of each slot.
        block_of, rank_of: [L, N], changed in place: a swap exchanges the places of two items.
        block_cap, rank_cap: [L].
        most: swaps that the budget pays for.

    Returns:
        number of swaps done.
    """
    layers, num = load.shape
    num_ranks = rank_of.max() + 1
    near = np.empty(pin.shape)
    block_load = np.zeros((layers, pin.shape[2]))
    rank_load = np.zeros((layers, num_ranks))
    has = np.zeros((layers, num_ranks, item.max() + 1), dtype=np.bool_)
    pair = np.full((layers, 2), -1, dtype=np.int64)
    score = np.zeros(layers)
    for layer in range(layers):
        _fill(weight[layer], pin[layer], block_of[layer], near[layer])
        for i in range(num):
            block_load[layer, block_of[layer, i]] += load[layer, i]
            rank_load[layer, rank_of[layer, i]] += load[layer, i]
            has[layer, rank_of[layer, i], item[layer, i]] = True
    done, stale = 0, -1
    while done < most:
        for layer in range(layers):
            if stale < 0 or layer == stale:
                score[layer] = _find(
                    weight[layer],
                    near[layer],
                    load[layer],
                    item[layer],
                    (block_of[layer], rank_of[layer]),
                    (block_load[layer], rank_load[layer]),
                    (block_cap[layer], rank_cap[layer]),
                    has[layer],
                    pair[layer],
                )
        stale = np.argmax(score)
        if score[stale] <= 0:
            break
        i, j = pair[stale]
        _move(weight[stale], load[stale], block_of[stale], near[stale], block_load[stale], i, j)
        _exchange(item[stale], rank_of[stale], rank_load[stale], load[stale], has[stale], i, j)
        done += 1
    return done


@numba.njit(nogil=True, cache=True)
def _move(weight, load, block_of, near, block_load, i, j):
    """Exchange the blocks of two items."""
    a, b = block_of[i], block_of[j]
    for k in range(len(load)):
        change = weight[k, j] - weight[k, i]
        near[k, a] += change
        near[k, b] -= change
    shift = load[j] - load[i]
    block_load[a] += shift
    block_load[b] -= shift
    block_of[i], block_of[j] = b, a


@numba.njit(nogil=True, cache=True)
def level_best(load, item, rank_of, node_of_rank, whole_nodes, most):
    """Swap slots so that the busiest ranks do less: always in the least level layer that can gain.

    Args:
        load, item, rank_of: [L, N] as in ``swap_best``.
        node_of_rank: [G]; whole_nodes: exchange inside a node only.
        most: swaps that the budget pays for.

    Returns:
        number of swaps done.
    """
    layers, num = load.shape
    num_ranks = len(node_of_rank)
    rank_load = np.zeros((layers, num_ranks))
    has = np.zeros((layers, num_ranks, item.max() + 1), dtype=np.bool_)
    for layer in range(layers):
        for i in range(num):
            rank_load[layer, rank_of[layer, i]] += load[layer, i]
            has[layer, rank_of[layer, i], item[layer, i]] = True
    uneven = np.empty(layers)
    for layer in range(layers):
        uneven[layer] = rank_load[layer].max() / max(rank_load[layer].mean(), 1e-300)
    done = 0
    while done < most:
        layer = np.argmax(uneven)
        if uneven[layer] <= 0:
            break
        i, j = _find_level(
            load[layer],
            item[layer],
            rank_of[layer],
            rank_load[layer],
            has[layer],
            node_of_rank,
            whole_nodes,
        )
        if i < 0:
            uneven[layer] = -1.0  # nothing left to gain in this layer
            continue
        _exchange(item[layer], rank_of[layer], rank_load[layer], load[layer], has[layer], i, j)
        uneven[layer] = rank_load[layer].max() / max(rank_load[layer].mean(), 1e-300)
        done += 1
    return done


@numba.njit(nogil=True, cache=True)
def remote_nodes(ids, served_node, num_nodes):
    """[T] float64 copies of each token, summed over layers, expected over uniform home nodes.

    Args:
        ids: [T, L, K]; served_node: [L, H, E] node that serves an expert for homes on node h, or
            for all homes with H = 1.
    """
    tokens, layers, picks = ids.shape
    homes = served_node.shape[1]
    seen = np.full(num_nodes, -1, dtype=np.int64)
    found = np.zeros(tokens)
    mark = 0
    for token in range(tokens):
        total = 0
        for layer in range(layers):
            for home in range(homes):
                for pick in range(picks):
                    e = ids[token, layer, pick]
                    if e < 0:
                        continue
                    node = served_node[layer, home, e]
                    if seen[node] != mark:
                        seen[node] = mark
                        if homes == 1:
                            total += num_nodes - 1  # for all homes but those on that node
                        elif node != home:
                            total += 1
                mark += 1
        found[token] = total / num_nodes
    return found


@numba.njit(nogil=True, cache=True)
def _fill(weight, pin, block_of, near):
    """near [N, B]: pin, and the weight between an item and what is in each block."""
    near[:] = pin
    for i in range(len(block_of)):
        for j in range(len(block_of)):
            near[i, block_of[j]] += weight[i, j]


@numba.njit(nogil=True, cache=True)
def _over(first, second, shift, cap):
    """Change of the load above ``cap`` when ``shift`` moves from ``second`` to ``first``."""
    after = max(first + shift - cap, 0.0) + max(second - shift - cap, 0.0)
    return after - max(first - cap, 0.0) - max(second - cap, 0.0)


@numba.njit(nogil=True, cache=True)
def _find(weight, near, load, item, places, loads, caps, has, pair):
    """Write the best swap of a layer into ``pair``; return its score, 0 when none helps."""
    block_of, rank_of = places
    block_load, rank_load = loads
    best = 0.0
    level = block_load.max() <= caps[0] and rank_load.max() <= caps[1]
    for i in range(len(load)):
        a, r = block_of[i], rank_of[i]
        for j in range(i):
            b, s = block_of[j], rank_of[j]
            if a == b:
                continue
            gain = near[i, b] - near[i, a] + near[j, a] - near[j, b] - 2 * weight[i, j]
            if level and gain <= best:
                continue
            if has[s, item[i]] or has[r, item[j]]:
                continue
            shift = load[j] - load[i]
            over = _over(block_load[a], block_load[b], shift, caps[0])
            if r != s:
                over += _over(rank_load[r], rank_load[s], shift, caps[1])
            if over <= 0 and gain - EXCESS_WEIGHT * over > best:
                best = gain - EXCESS_WEIGHT * over
                pair[0], pair[1] = i, j
    return best


@numba.njit(nogil=True, cache=True)
def _find_level(load, item, rank_of, rank_load, has, node_of_rank, whole_nodes):
    """The swap of a slot of the busiest rank that leaves the smaller maximum of two ranks."""
    top = np.argmax(rank_load)
    best = rank_load[top] * (1 - 1e-9)
    first, second = -1, -1
    for i in range(len(load)):
        if rank_of[i] != top:
            continue
        for j in range(len(load)):
            r = rank_of[j]
            change = load[i] - load[j]
            if r == top or change <= 0:
                continue
            if whole_nodes and node_of_rank[r] != node_of_rank[top]:
                continue
            larger = max(rank_load[top] - change, rank_load[r] + change)
            if larger < best and not has[r, item[i]] and not has[top, item[j]]:
                best, first, second = larger, i, j
    return first, second


@numba.njit(nogil=True, cache=True)
def _exchange(item, rank_of, rank_load, load, has, i, j):
    """Exchange the ranks of two items."""
    r, s = rank_of[i], rank_of[j]
    has[r, item[i]], has[s, item[j]] = False, False
    has[s, item[i]], has[r, item[j]] = True, True
    rank_load[r] += load[j] - load[i]
    rank_load[s] += load[i] - load[j]
    rank_of[i], rank_of[j] = s, r
