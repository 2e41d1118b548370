"""Which experts a node should hold besides its own: greedy on the copies that a replica saves."""

from __future__ import annotations

import numba
import numpy as np

from moe_locality.placement import counting


@numba.njit(cache=True)
def count_lonely(ids, block_of, is_local, home_node, node, num_blocks):
    """[E] tokens for which expert e is the only pick that sends them to another node.

    Tokens of ids [T, K] whose home is ``node`` (all, when ``home_node`` is empty); picks of experts
    with ``is_local`` need no other node. A replica of e on ``node`` saves that many copies.
    """
    gain = np.zeros(len(block_of))
    picks = np.zeros(num_blocks, dtype=np.int64)
    only = np.zeros(num_blocks, dtype=np.int64)
    for token in range(ids.shape[0]):
        if home_node.size and home_node[token] != node:
            continue
        for pick in range(ids.shape[1]):
            e = ids[token, pick]
            if e >= 0 and not is_local[e]:
                picks[block_of[e]] += 1
                only[block_of[e]] = e
        for pick in range(ids.shape[1]):
            e = ids[token, pick]
            if e >= 0:
                if picks[block_of[e]] == 1 and not is_local[e]:
                    gain[only[block_of[e]]] += 1
                picks[block_of[e]] = 0
    return gain


def choose(
    ids: np.ndarray,
    block_of: np.ndarray,
    load: np.ndarray,
    home_node: np.ndarray,
    slots_per_node: int,
    cap: float,
) -> list[list[int]]:
    """The replicas of each node: again and again the one that saves most copies.

    A replica of expert e on node n takes the picks of e by homes on n from the own node of e. A
    node that has no candidate below the cap takes the one that adds least load, after all others
    are done. A node that holds every expert stops there.
    """
    num_nodes = int(block_of.max()) + 1
    local_load = _picks_of_homes(ids, load, home_node, num_nodes)  # [M, E]
    is_local = block_of == np.arange(num_nodes)[:, None]
    node_load = np.bincount(block_of, weights=load, minlength=num_nodes)
    room = min(slots_per_node, len(load)) - is_local.sum(axis=1)
    extra: list[list[int]] = [[] for _ in range(num_nodes)]
    gain = np.stack(
        [
            count_lonely(ids, block_of, is_local[n], home_node, n, num_nodes)
            for n in range(num_nodes)
        ]
    )
    while room.any():
        open_pair = ~is_local & (room > 0)[:, None]
        fits = open_pair & (node_load[:, None] + local_load <= cap)
        if fits.any():
            best = np.where(fits, gain, -1.0).ravel()
            node, expert = divmod(int(np.argmax(best)), len(load))
        else:
            after = np.where(open_pair, node_load[:, None] + local_load, np.inf).ravel()
            node, expert = divmod(int(np.argmin(after)), len(load))
        extra[node].append(expert)
        is_local[node, expert] = True
        room[node] -= 1
        node_load[node] += local_load[node, expert]
        node_load[block_of[expert]] -= local_load[node, expert]
        gain[node] = count_lonely(ids, block_of, is_local[node], home_node, node, num_nodes)
    return extra


def _picks_of_homes(ids, load, home_node, num_nodes) -> np.ndarray:
    """[M, E] picks of each expert by tokens at home on each node; evenly split without homes."""
    if not home_node.size:
        return np.tile(load / num_nodes, (num_nodes, 1))
    return counting.picks_by_home(ids[:, None], len(load), home_node, num_nodes)[0].astype(float)


def load_share(nodes: list[list[int]], num_experts: int) -> np.ndarray:
    """[E] share of an expert's load that one of its replicas serves, about: 1 / replicas."""
    counts = np.bincount(np.concatenate([np.array(m) for m in nodes]), minlength=num_experts)
    return 1 / np.maximum(counts, 1)
