"""Compiled loops over the picks of tokens: which node serves each of them, and sums by request.

Shapes: T tokens, L layers, K picks, E experts, R requests, G ranks, M nodes, H = M homes that are
served differently, or 1 where all are served alike (no replicas).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

_log = logging.getLogger(__name__)
_not_kept: list[str] = []


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function, and keep the code for later processes where numba finds a place for it:
    not where only root may write the package, under a user without a home directory.
    """
    try:
        return numba.njit(nogil=True, cache=not _not_kept)(function)
    except RuntimeError:
        _not_kept.append(function.__name__)  # the next ones do not try
        _log.warning(
            "found no directory for compiled functions, so every process compiles anew: set "
            "NUMBA_CACHE_DIR to one that you may write"
        )
    return numba.njit(nogil=True)(function)


@compiled
def choose_node(nodes, mask):
    """The first of the nodes (padded with -1) that the mask has, else the first one."""
    for node in nodes:
        if node < 0:
            break
        if mask >> node & 1:
            return node
    return nodes[0]


@compiled
def serve_token(row, home, choices, found, later):
    """Fill found [K] with the node that serves each pick of a token at home on node ``home``, -1
    for no pick; return the nodes visited, home included, as bits.

    ``choices`` [E, X]: nodes that may serve an expert for this home, padded with -1. ``later`` [K]
    is a work array.
    """
    mask, count = np.int64(1) << home, 0
    several = choices.shape[1] > 1
    for pick in range(len(row)):
        e = row[pick]
        if e < 0:
            found[pick] = -1
        elif several and choices[e, 1] >= 0:
            place = count  # rising ids
            while place > 0 and row[later[place - 1]] > e:
                later[place] = later[place - 1]
                place -= 1
            later[place] = pick
            count += 1
        else:
            found[pick] = choices[e, 0]
            mask |= np.int64(1) << choices[e, 0]
    for place in range(count):
        pick = later[place]
        found[pick] = choose_node(choices[row[pick]], mask)
        mask |= np.int64(1) << found[pick]
    return mask


@compiled
def serve_tokens(ids, home, choices, found):
    """Fill found [T, K] with the node that serves each pick of ids [T, K], -1 for none; ``home``
    [T] home node of the tokens, ``choices`` [M, E, X] of one layer.
    """
    later = np.empty(ids.shape[1], np.int64)
    for token in range(len(ids)):
        serve_token(ids[token], home[token], choices[home[token]], found[token], later)


@compiled
def remote_by_home(ids, request, num_requests, choices, num_nodes, by_pick):
    """[R, M] float64 whole numbers: what the tokens of a request send to other nodes, by home node.

    ``ids`` [T, L, K], -1 = no pick; ``request`` [T] below ``num_requests``; ``choices`` [L, H, E,
    X] nodes that may serve the expert for a home on node h, X = 1: the node that does. ``by_pick``:
    count every remote pick; else every remote node of a token once (copies).
    """
    tokens, layers, picks = ids.shape
    homes = choices.shape[1]
    cost = np.zeros((num_requests, num_nodes))
    seen = np.full(num_nodes, -1, dtype=np.int64)
    found, later = np.empty(picks, np.int64), np.empty(picks, np.int64)
    tick = 0
    for token in range(tokens):
        row = cost[request[token]]
        for layer in range(layers):
            for home in range(homes):
                tick += 1
                sent, local = 0, 0
                if choices.shape[3] > 1:
                    serve_token(ids[token, layer], home, choices[layer, home], found, later)
                else:
                    for pick in range(picks):
                        e = ids[token, layer, pick]
                        found[pick] = choices[layer, home, e, 0] if e >= 0 else -1
                for node in found:
                    if node < 0:
                        continue
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


@compiled
def picks_on_rank(ids, request, num_requests, holders, num_ranks):
    """[R, G] picks of a request whose expert has a replica on the rank; ``holders`` [L, E, C]: the
    ranks of each expert, -1 where there are fewer than C.
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


@compiled
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
