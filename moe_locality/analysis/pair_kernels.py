"""Compiled counting of picks and pairs of picks; apart from its front because it imports numba."""

import numba
import numpy as np

BLOCK_TOKENS = 8192
"""Tokens counted for one layer before the next layer: enough that the table of a layer pays for
being fetched, few enough that the block, copied layer by layer, stays in the last-level cache."""


@numba.njit(nogil=True, cache=True)
def add_pairs(ids, unit, first, last, pairs, load):
    """Count the layers ``first`` to ``last`` of ids [T, L, K] into pairs [L, E, E] and, by unit
    (request, say) [T] of the token, into load [L, U, E].

    A pair (e, f) is counted in pairs[e, f] or in pairs[f, e], whichever order the token has it in.
    Negative ids are no picks. Threads may share the tables when their layers differ.
    """
    tokens, picks = ids.shape[0], ids.shape[2]
    num = np.uint64(load.shape[2])
    part = np.empty((last - first, min(BLOCK_TOKENS, tokens), picks), ids.dtype)
    found = np.empty(picks, dtype=np.uint64)  # unsigned: no test for an index from the end
    for start in range(0, tokens, BLOCK_TOKENS):
        stop = min(start + BLOCK_TOKENS, tokens)
        for token in range(start, stop):  # rows of a layer lie far apart: one pass over all of them
            for layer in range(first, last):
                for pick in range(picks):
                    part[layer - first, token - start, pick] = ids[token, layer, pick]
        for layer in range(first, last):
            table = pairs[layer].ravel()
            for token in range(start, stop):
                row = load[layer, unit[token]]
                count = 0
                for pick in range(picks):
                    e = part[layer - first, token - start, pick]
                    if e >= 0:
                        found[count] = e
                        count += 1
                for i in range(count):
                    e = found[i]
                    row[e] += np.uint32(1)
                    for j in range(i):
                        table[e * num + found[j]] += np.uint32(1)
