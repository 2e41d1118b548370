"""Which replica serves whom while replicas are searched: the rule of ``choose_serving_nodes``,
compiled, whole or after a change of two experts.

Shapes: E experts, M nodes. ``held`` [M, E] bool: which node holds which expert; ``load`` [E] int64;
``order`` [E]: experts by falling load, equal loads by number.
"""

import numba
import numpy as np


@numba.njit(nogil=True, cache=True)
def serve(held, load, order, served):
    """Fill served [M, E] int64: the node that serves each expert for homes on each node."""
    copies_of = held.sum(axis=0)
    node_load = sure_loads(held, load, copies_of)
    for e in range(len(load)):
        _serve_sure(held, copies_of, e, served)
    for e in order:
        if 1 < copies_of[e] < len(held):
            _serve_shared(held, load, e, served, node_load)


@numba.njit(nogil=True, cache=True)
def serve_changed(held, load, order, copies_of, base, e, f, served, node_load, some):
    """``serve`` where only the nodes that hold e and f have changed.

    ``base`` [M]: the ``sure_loads``. ``some`` [E] is filled from the left with the experts that may
    be served otherwise than before; returns how many.
    """
    nodes, count = len(base), 0
    for x in (e, f):
        _serve_sure(held, copies_of, x, served)
        if not 1 < copies_of[x] < nodes:
            some[count] = x
            count += 1
    node_load[:] = base
    for x in order:
        if 1 < copies_of[x] < nodes:
            _serve_shared(held, load, x, served, node_load)
            some[count] = x
            count += 1
    return count


@numba.njit(nogil=True, cache=True)
def sure_loads(held, load, copies_of):
    """[M] int64 what the nodes serve before any replica is chosen; ``hold`` keeps it up to date."""
    base = np.zeros(len(held), dtype=np.int64)
    for e in range(len(load)):
        hold(held, load, copies_of, base, e, 1)
    return base


@numba.njit(nogil=True, cache=True)
def hold(held, load, copies_of, base, e, sign):
    """Add to base [M] what expert e loads its nodes with, or take it away (``sign`` -1)."""
    nodes = len(base)
    for n in range(nodes):
        if held[n, e]:
            base[n] += sign * load[e] * (nodes if copies_of[e] == 1 else 1)


@numba.njit(nogil=True, cache=True)
def _serve_sure(held, copies_of, e, served):
    """Homes on nodes that hold e, and all of them where one node does."""
    for n in range(len(held)):
        if held[n, e]:
            served[n, e] = n
            if copies_of[e] == 1:
                served[:, e] = n


@numba.njit(nogil=True, cache=True)
def _serve_shared(held, load, e, served, node_load):
    """Homes on the other nodes: each at the node with e that has the least load so far."""
    for home in range(len(held)):
        if held[home, e]:
            continue
        best = -1
        for n in range(len(held)):
            if held[n, e] and (best < 0 or node_load[n] < node_load[best]):
                best = n
        served[home, e] = best
        node_load[best] += load[e]


@numba.njit(nogil=True, cache=True)
def load_above(served, picks, cap):
    """Picks above the cap, summed over the nodes; picks [M, E] are those of homes on each node."""
    nodes, experts = served.shape
    node_load = np.zeros(nodes)
    for home in range(nodes):
        for e in range(experts):
            node_load[served[home, e]] += picks[home, e]
    above = 0.0
    for n in range(nodes):
        above += max(node_load[n] - cap, 0.0)
    return above
