"""Which replica serves which home: a pure function of the plan, so all ranks agree without
talking.
"""

import numpy as np


def choose_serving_slots(
    logical_to_physical_map: np.ndarray,
    rank_of_slot: np.ndarray,
    node_of_rank: np.ndarray,
    expert_load: np.ndarray | None,
) -> np.ndarray:
    """[L, G, E] int32: the slot that serves expert e for tokens whose home is rank g.

    Same rank, else same node, else any; among several the one on the least loaded rank, ties to the
    lowest slot. Loads assume that homes are spread evenly; experts are decided in falling order of
    ``expert_load`` ([L, E], None or an all-zero row = all equal), after everything that leaves no
    choice. Integer arithmetic throughout.
    """
    layers, experts, _ = logical_to_physical_map.shape
    table = np.repeat(logical_to_physical_map[:, None, :, 0], len(node_of_rank), axis=1).astype(
        np.int32
    )
    if logical_to_physical_map.shape[2] == 1:
        return table
    for layer in range(layers):
        load = np.ones(experts, dtype=np.int64)
        if expert_load is not None and expert_load[layer].any():
            load = expert_load[layer].astype(np.int64)
        _choose_layer(
            logical_to_physical_map[layer], rank_of_slot, node_of_rank, load, table[layer]
        )
    return table


def _choose_layer(slots_of, rank_of_slot, node_of_rank, load, table) -> None:
    """Fill ``table`` [G, E] of one layer. Unit of rank_load: tokens of one home rank, so it stays
    integer.
    """
    num_ranks, num_nodes = len(node_of_rank), int(node_of_rank.max()) + 1
    rank_load = np.zeros(num_ranks, dtype=np.int64)
    replicated = np.flatnonzero(slots_of[:, 1] >= 0)
    single = np.flatnonzero(slots_of[:, 1] < 0)
    np.add.at(rank_load, rank_of_slot[slots_of[single, 0]], load[single] * num_ranks)
    choices: list[
        tuple[int, np.ndarray, np.ndarray]
    ] = []  # expert, home ranks, slots to choose from
    for expert in replicated[np.argsort(-load[replicated], kind="stable")]:
        slots = slots_of[expert][slots_of[expert] >= 0]
        ranks = rank_of_slot[slots]
        for node in range(num_nodes):
            homes = np.flatnonzero(node_of_rank == node)
            on_node = slots[node_of_rank[ranks] == node]
            if len(on_node) == 0:
                choices.append((expert, homes, slots))
                continue
            host_of = dict(zip(rank_of_slot[on_node].tolist(), on_node.tolist(), strict=True))
            for home in homes.tolist():
                if home in host_of or len(on_node) == 1:
                    slot = host_of.get(home, int(on_node[0]))
                    table[home, expert] = slot
                    rank_load[rank_of_slot[slot]] += load[expert]
                else:
                    choices.append((expert, np.array([home]), on_node))
    for expert, homes, slots in choices:
        slot = slots[np.argmin(rank_load[rank_of_slot[slots]])]  # first minimum = lowest slot
        table[homes, expert] = slot
        rank_load[rank_of_slot[slot]] += load[expert] * len(homes)
