"""What each request would cost at home on each node: counts over its tokens, in one pass.

Shapes: T tokens, L layers, K picks, E experts, R requests, G ranks, M nodes, H = M homes that are
served differently, or 1 where all are served alike (no replicas).
"""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(nogil=True, cache=True)
def remote_by_home(ids, request, num_requests, served_node, num_nodes, by_pick):
    """[R, M] float64 whole numbers: what the tokens of a request send to other nodes, by home node.

    Args:
        ids: [T, L, K], -1 = no pick; request: [T] below ``num_requests``.
        served_node: [L, H, E] node that serves the expert for a home on node h.
        by_pick: count every remote pick; else every remote node of a token once (copies).
    """
    tokens, layers, picks = ids.shape
    homes = served_node.shape[1]
    cost = np.zeros((num_requests, num_nodes))
    seen = np.full(num_nodes, -1, dtype=np.int64)
    tick = 0
    for token in range(tokens):
        row = cost[request[token]]
        for layer in range(layers):
            for home in range(homes):
                tick += 1
                sent, local = 0, 0
                for pick in range(picks):
                    e = ids[token, layer, pick]
                    if e < 0:
                        continue
                    node = served_node[layer, home, e]
                    if by_pick or seen[node] != tick:
                        seen[node] = tick
                        sent += 1
                        if homes == 1:
                            row[node] -= 1
                        elif node == home:
                            local += 1
                if homes == 1:
                    for node in range(num_nodes):
                        row[node] += sent
                else:
                    row[home] += sent - local
    return cost


@numba.njit(nogil=True, cache=True)
def picks_on_rank(ids, request, num_requests, holders, num_ranks):
    """[R, G] picks of a request whose expert has a replica on the rank.

    ``holders`` [L, E, C]: the ranks of each expert, -1 where there are fewer than C.
    """
    tokens, layers, picks = ids.shape
    count = np.zeros((num_requests, num_ranks))
    for token in range(tokens):
        row = count[request[token]]
        for layer in range(layers):
            for pick in range(picks):
                e = ids[token, layer, pick]
                if e < 0:
                    continue
                for place in range(holders.shape[2]):
                    rank = holders[layer, e, place]
                    if rank < 0:
                        break
                    row[rank] += 1
    return count


@numba.njit(nogil=True, cache=True)
def expert_counts(ids, request, num_requests, num_experts):
    """[R, L, E] float32 picks of each expert by each request; tokens of request -1 do not count."""
    tokens, layers, picks = ids.shape
    count = np.zeros((num_requests, layers, num_experts), dtype=np.float32)
    for token in range(tokens):
        row = request[token]
        if row < 0:
            continue
        for layer in range(layers):
            for pick in range(picks):
                e = ids[token, layer, pick]
                if e >= 0:
                    count[row, layer, e] += 1
    return count


@numba.njit(nogil=True, cache=True)
def weighted_picks(ids, request, num_requests, weights):
    """[R, M] float64 sum of weights [M, L, E] over the picks of each request."""
    tokens, layers, picks = ids.shape
    nodes = weights.shape[0]
    total = np.zeros((num_requests, nodes))
    for token in range(tokens):
        row = total[request[token]]
        for layer in range(layers):
            for pick in range(picks):
                e = ids[token, layer, pick]
                if e >= 0:
                    for node in range(nodes):
                        row[node] += weights[node, layer, e]
    return total
