"""Which copy of an expert serves a pick: the two rules.

``home``: the copy on the home rank of the token, else one on its home node, else the least loaded
one; a table made with the plan. ``visited``: between home node and load comes a node that the token
visits anyway, so that fewer copies of the token travel. What a token visits is known from its picks
alone: its home node, then the nodes of its experts that have one node, then those of the others in
rising order of their ids, each as it is decided. Neither the order of the picks nor the row of the
token matters, and nothing is drawn or counted: whoever knows layer, home rank and picks knows the
slots, so what is counted is what was predicted.

Shapes: L MoE layers, E experts, P slots, G ranks, M nodes, X most nodes of one expert.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np

from moe_locality.errors import PlacementError

RULES = ("home", "visited")
MOST_NODES = 62  # nodes of a token are bits of an int64
_NEVER = np.iinfo(np.int64).max


def count_on_nodes(table: np.ndarray, node_of_slot: np.ndarray, num_experts: int) -> np.ndarray:
    """[L, E, M] int64: slots of each expert on each node, from the experts of the slots [L, P]."""
    on_node = np.zeros((len(table), num_experts, int(node_of_slot.max()) + 1), dtype=np.int64)
    where = (np.arange(len(table))[:, None], np.maximum(table, 0), node_of_slot[None])
    np.add.at(on_node, where, table >= 0)
    return on_node


def order_nodes(held: np.ndarray, first: np.ndarray) -> np.ndarray:
    """[L, M, E, X] int64, padded with -1: the nodes that may serve expert e for homes on node m,
    the preferred one first: the home node alone where it holds e, else the node ``first``
    [L, M, E], then the others that hold e, by number. ``held`` [L, E, M] bool.
    """
    layers, experts, nodes = held.shape
    width = max(int(held.sum(axis=2).max()), 1)
    number = np.broadcast_to(np.arange(nodes), (layers, nodes, experts, nodes))
    key = np.where(held[:, None], number, nodes)
    key = np.where(number == first[..., None], -1, key)
    order = np.argsort(key, axis=3, kind="stable")[..., :width]
    order = np.where(np.take_along_axis(key, order, axis=3) < nodes, order, -1)
    at_home = held.transpose(0, 2, 1)[..., None] & (np.arange(width) > 0)
    return np.where(at_home, -1, order)


def check_choices(choices: np.ndarray, held: np.ndarray) -> None:
    """Raise PlacementError unless ``choices`` [L, M, E, X] name nodes that hold the experts: each
    once, the home node alone where it is one of them, one node at least.
    """
    layers, experts, nodes = held.shape
    shape = choices.shape
    if choices.ndim != 4 or shape[:3] != (layers, nodes, experts) or choices.max() >= nodes:
        raise PlacementError(
            f"serving_nodes: found {shape} with nodes up to {choices.max(initial=-1)}, expected "
            f"({layers}, {nodes}, {experts}, X) with nodes below {nodes}: make the plan again"
        )
    named = (choices[..., None] == np.arange(nodes)).sum(axis=3)  # [L, M, E, M]
    at_home = held.transpose(0, 2, 1)
    home = np.eye(nodes, dtype=bool)[None, :, None]
    wrong = (named > held[:, None]).any(axis=3) | (choices[..., 0] < 0)
    wrong |= ((choices[..., 1:] >= 0) & (choices[..., :-1] < 0)).any(axis=3)
    wrong |= at_home & (named != home).any(axis=3)
    if wrong.any():
        layer, node, expert = np.argwhere(wrong)[0]
        raise PlacementError(
            f"serving_nodes: row {layer}: expert {expert} is served for homes on node {node} by "
            f"nodes {choices[layer, node, expert].tolist()}, expected some of "
            f"{np.flatnonzero(held[layer, expert]).tolist()}: make the plan again"
        )


def pack_choices(choices: np.ndarray, held: np.ndarray) -> list[list[int]]:
    """The lists of the experts that have several nodes, a flat row per layer, for a file."""
    many = held.sum(axis=2) > 1
    return [
        part[:, some].transpose(1, 0, 2).ravel().tolist()
        for part, some in zip(choices, many, strict=True)
    ]


def unpack_choices(rows: Sequence[Sequence[int]], held: np.ndarray) -> np.ndarray:
    """[L, M, E, X] from the rows of a file; raises PlacementError where they are no lists of
    integers, or of another length.
    """
    layers, experts, nodes = held.shape
    many = held.sum(axis=2) > 1
    size = many.sum(axis=1) * nodes
    try:
        flat = [np.array([operator.index(n) for n in row], dtype=np.int64) for row in rows]
        both = list(zip(flat, size.tolist(), strict=True))
        width = max((len(row) // max(n, 1) for row, n in both), default=1)
        if any(len(row) != n * width for row, n in both):
            raise ValueError
    except (TypeError, ValueError) as error:
        raise PlacementError(
            "serving_nodes: found rows that do not fit the map, expected one row of integers per "
            f"layer, with as many nodes for each of {nodes} home nodes and each expert that has "
            "several nodes: make the plan again"
        ) from error
    wide = np.full((layers, nodes, experts, max(width, 1)), -1, dtype=np.int64)
    wide[..., 0] = held.argmax(axis=2)[:, None]
    for row, part, some in zip(flat, wide, many, strict=True):
        if some.any():
            part[:, some] = row.reshape(int(some.sum()), nodes, width).transpose(1, 0, 2)
    return wide


def slots_on_nodes(
    table: np.ndarray, served_slot: np.ndarray, node_of_slot: np.ndarray, node_of_rank: np.ndarray
) -> np.ndarray:
    """[G, M, E] int32: the slot of one layer that serves expert e on node n for homes on rank g, -1
    where n lacks e.

    ``table`` [P] the experts of the slots; ``served_slot`` [G, E] the slots of the rule ``home``.
    They stand where they are on that node; else the copies there take turns by home node.
    """
    experts, nodes = served_slot.shape[1], int(node_of_rank.max()) + 1
    on_node = count_on_nodes(table[None], node_of_slot, experts)[0].T  # [M, E]
    order = np.lexsort((np.arange(len(table)), node_of_slot, table, table < 0))  # empty: last
    first = np.zeros((experts, nodes), dtype=np.int64)
    first.ravel()[1:] = np.cumsum(on_node.T.ravel())[:-1]
    turn = np.arange(nodes)[:, None, None] % np.maximum(on_node, 1)  # [home node, M, E]
    at = np.minimum(first.T + turn, len(table) - 1)
    found = np.where(on_node > 0, order[at], -1)[node_of_rank]
    rank, expert = np.indices(served_slot.shape)
    found[rank, node_of_slot[served_slot], expert] = served_slot
    return found.astype(np.int32)


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
    layers, experts, _ = slots_of.shape
    load = np.zeros((layers, experts), np.int64) if expert_load is None else expert_load
    load = np.where(load.any(axis=1, keepdims=True), load, 1)  # no load at all: evenly loaded
    rank_of = np.where(slots_of >= 0, rank_of_slot[slots_of], -1)  # [L, E, X]
    node_of = np.where(slots_of >= 0, node_of_rank[rank_of], -1)
    on_node = (node_of[..., None] == np.arange(node_of_rank.max() + 1)).sum(axis=2)  # [L, E, M]
    served_node = choose_serving_nodes(on_node > 0, load)
    table = np.empty((layers, len(node_of_rank), experts), dtype=np.int32)
    rank_load = np.zeros(table.shape[:2], dtype=np.int64)
    open_choice = np.zeros(table.shape, dtype=bool)
    layer, expert = np.indices((layers, experts))
    for home, home_node in enumerate(node_of_rank):
        node = served_node[:, home_node]
        own = rank_of == home
        fits = node_of == node[..., None]
        pick = np.where(own.any(axis=2), own.argmax(axis=2), fits.argmax(axis=2))
        slot = slots_of[layer, expert, pick]
        table[:, home] = slot
        open_choice[:, home] = (on_node[layer, expert, node] > 1) & ~own.any(axis=2)
        sure = ~open_choice[:, home]
        np.add.at(rank_load, (layer[sure], rank_of_slot[slot[sure]]), load[sure])
    places = (slots_of, rank_of, node_of)
    _choose_ranks(*places, load, node_of_rank, table, rank_load, open_choice, served_node)
    return table


def choose_serving_nodes(held: np.ndarray, load: np.ndarray) -> np.ndarray:
    """[L, M, E] int64: the node that serves expert e for homes on node m.

    ``held`` [L, E, M] bool, the nodes that hold each expert; ``load`` [L, E] int64 tokens per
    expert; unit of the node loads: tokens of one home node.
    """
    layers, _, nodes = held.shape
    rows = np.arange(layers)
    served = np.where(held, np.arange(nodes), held.argmax(axis=2)[..., None])  # [L, E, M]
    copies = held.sum(axis=2)
    own = held * load[..., None]
    node_load = (own * np.where(copies == 1, nodes, 1)[..., None]).sum(axis=1)  # [L, M]
    # replicated experts first, in falling order of load (then of number), in every layer
    order = np.lexsort((-load, copies == 1))
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


def _choose_ranks(
    slots_of, rank_of, node_of, load, node_of_rank, table, rank_load, open_choice, served_node
) -> None:
    """Decide the open choices in falling order of load: a remote node as one, local ranks alone."""
    rows, some = np.arange(len(load)), open_choice.any(axis=1)
    order = np.lexsort((-load, ~some))
    for place in range(int(some.sum(axis=1).max(initial=0))):
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
                slot, far = slots_of[at, e, pick], remote[at]
                table[at, home, e] = slot
                table[at[far, None], homes, e[far, None]] = slot[far, None]
                rank_load[at, rank_of[at, e, pick]] += load[at, e] * np.where(far, len(homes), 1)
