"""Which replica serves which home: a pure function of the plan, so all ranks agree without
communication.

Shapes: L layers, E experts, P slots, G ranks, M nodes, X most replicas of one expert. All layers
are decided together, one choice at a time: a step is a few numpy calls on arrays of length L.
"""

import numpy as np


def choose_serving_slots(
    logical_to_physical_map: np.ndarray,
    rank_of_slot: np.ndarray,
    node_of_rank: np.ndarray,
    expert_load: np.ndarray | None,
) -> np.ndarray:
    """[L, G, E] int32: the slot that serves expert e for tokens whose home is rank g.

    Same rank, else same node, else the least loaded one: the least loaded node, and of several
    slots there the one on the least loaded rank; ties to the lowest node, then to the lowest slot.
    Loads assume that homes are spread evenly; experts are decided in falling order of
    ``expert_load`` ([L, E], None or an all-zero row = all equal), after everything that leaves no
    choice. Integer arithmetic throughout.
    """
    slots_of = np.asarray(logical_to_physical_map)
    num_ranks = len(node_of_rank)
    if slots_of.shape[2] == 1:
        return np.repeat(slots_of[:, None, :, 0], num_ranks, axis=1).astype(np.int32)
    load = _whole_loads(expert_load, slots_of.shape[:2])
    node_of_slot = node_of_rank[rank_of_slot]
    on_node = np.zeros((*slots_of.shape[:2], int(node_of_rank.max()) + 1), dtype=np.int64)
    layer, expert, copy = np.nonzero(slots_of >= 0)
    np.add.at(on_node, (layer, expert, node_of_slot[slots_of[layer, expert, copy]]), 1)
    served_node = choose_serving_nodes(on_node > 0, load)
    return _choose_slots(slots_of, served_node, on_node, load, rank_of_slot, node_of_rank)


def choose_serving_nodes(held: np.ndarray, load: np.ndarray) -> np.ndarray:
    """[L, M, E] int64: the node that serves expert e for homes on node m.

    Args:
        held: [L, E, M] bool, the nodes that hold each expert.
        load: [L, E] int64 tokens per expert; unit of the node loads: tokens of one home node.
    """
    layers, experts, nodes = held.shape
    rows = np.arange(layers)
    served = np.where(held, np.arange(nodes), held.argmax(axis=2)[..., None])  # [L, E, M]
    copies = held.sum(axis=2)
    own = held * load[..., None]
    node_load = (own * np.where(copies == 1, nodes, 1)[..., None]).sum(axis=1)  # [L, M]
    # replicated experts first, in falling order of load, in every layer
    order = np.lexsort((np.broadcast_to(np.arange(experts), copies.shape), -load, copies == 1))
    open_homes = ~held & (copies > 1)[..., None]
    for place in range(int((copies > 1).sum(axis=1).max(initial=0))):
        expert = order[:, place]
        for home in range(nodes):
            ask = np.flatnonzero(open_homes[rows, expert, home])
            if not len(ask):
                continue
            e = expert[ask]
            node = np.where(held[ask, e], node_load[ask], _NEVER).argmin(axis=1)
            served[ask, e, home] = node
            node_load[ask, node] += load[ask, e]
    return served.transpose(0, 2, 1)


_NEVER = np.iinfo(np.int64).max


def _choose_slots(slots_of, served_node, on_node, load, rank_of_slot, node_of_rank) -> np.ndarray:
    """[L, G, E]: the slot on the serving node; where it has several, by rank load."""
    layers, experts = slots_of.shape[:2]
    num_ranks = len(node_of_rank)
    rank_of = np.where(slots_of >= 0, rank_of_slot[slots_of], -1)  # [L, E, X]
    node_of = np.where(slots_of >= 0, node_of_rank[rank_of], -1)
    table = np.empty((layers, num_ranks, experts), dtype=np.int32)
    rank_load = np.zeros((layers, num_ranks), dtype=np.int64)
    open_choice = np.zeros((layers, num_ranks, experts), dtype=bool)
    layer, expert = np.indices((layers, experts))
    for home, home_node in enumerate(node_of_rank):
        node = served_node[:, home_node]
        fits = node_of == node[..., None]
        own = rank_of == home
        pick = np.where(own.any(axis=2), own.argmax(axis=2), fits.argmax(axis=2))
        slot = np.take_along_axis(slots_of, pick[..., None], axis=2)[..., 0]
        table[:, home] = slot
        several = on_node[layer, expert, node] > 1
        open_choice[:, home] = several & ~own.any(axis=2)
        sure = ~open_choice[:, home]
        np.add.at(rank_load, (layer[sure], rank_of_slot[slot[sure]]), load[sure])
    if open_choice.any():
        _choose_ranks(
            slots_of,
            rank_of,
            node_of,
            load,
            node_of_rank,
            table,
            rank_load,
            open_choice,
            served_node,
        )
    return table


def _choose_ranks(
    slots_of, rank_of, node_of, load, node_of_rank, table, rank_load, open_choice, served_node
) -> None:
    """Decide the open choices in falling order of load: a remote node as one, local ranks alone."""
    layers, _, _ = slots_of.shape
    rows = np.arange(layers)
    order = np.lexsort(
        (np.broadcast_to(np.arange(load.shape[1]), load.shape), -load, ~open_choice.any(axis=1))
    )
    for place in range(int(open_choice.any(axis=1).sum(axis=1).max())):
        expert = order[:, place]
        for home_node in range(int(node_of_rank.max()) + 1):
            homes = np.flatnonzero(node_of_rank == home_node)
            node = served_node[rows, home_node, expert]
            remote = node != home_node
            for position, home in enumerate(homes):
                ask = open_choice[rows, home, expert] & (~remote | (position == 0))
                at = np.flatnonzero(ask)
                if not len(at):
                    continue
                e = expert[at]
                fits = node_of[at, e] == node[at, None]
                there = np.where(fits, rank_load[at[:, None], rank_of[at, e]], _NEVER)
                pick = there.argmin(axis=1)
                ranks = rank_of[at, e, pick]
                far = remote[at]
                table[at, home, e] = slots_of[at, e, pick]
                shared = at[far]
                table[shared[:, None], homes[None, :], expert[shared][:, None]] = slots_of[
                    shared, expert[shared], pick[far]
                ][:, None]
                rank_load[at, ranks] += load[at, e] * np.where(far, len(homes), 1)


def _whole_loads(expert_load, shape) -> np.ndarray:
    """[L, E] int64; a layer without any load counts as evenly loaded."""
    if expert_load is None:
        return np.ones(shape, dtype=np.int64)
    load = np.asarray(expert_load).astype(np.int64)
    return np.where(load.any(axis=1, keepdims=True), load, 1)
