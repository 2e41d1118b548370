"""What each kernel means, as loops over Python numbers and float64: slow, and readable."""

from collections import defaultdict

import torch
from torch import Tensor

from moe_locality.kernels.ops import MAP_FIELDS, RowMap


def random_ids(tokens: int, top_k: int, experts: int, seed: int, drop: float = 0.15) -> Tensor:
    """``[T, K] int32``: distinct experts of each token while K <= E, some of them dropped (-1)."""
    generator = torch.Generator().manual_seed(seed)
    if top_k <= experts:
        ids = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k]
    else:
        ids = torch.randint(0, experts, (tokens, top_k), generator=generator)
    ids = ids.to(torch.int32)
    ids[torch.rand(tokens, top_k, generator=generator) < drop] = -1
    return ids


def serving_tables(experts: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """Slots ``[E, 3] int32`` and nodes ``[E, 3] int64``, -1 where an expert has fewer, and a home:
    one to three of six nodes for each expert, in any order.
    """
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.rand(experts, 6, generator=generator).argsort(dim=1)[:, :3]
    copies = torch.randint(1, 4, (experts, 1), generator=generator)
    nodes = torch.where(torch.arange(3) < copies, nodes, -1)
    slots = torch.where(nodes >= 0, nodes * experts + torch.arange(experts)[:, None], -1)
    return slots.int(), nodes, 5


def row_map(ids: Tensor, num_slots: int, capacity=None, num_rows=None) -> dict[str, list]:
    """The fields of RowMap as lists."""
    top_k = ids.shape[1]
    by_slot = defaultdict(list)
    for route, slot in enumerate(ids.reshape(-1).tolist()):
        if slot >= 0:
            by_slot[slot].append(route)
    rows, offsets, counts, lost = [], [0], [], 0
    positions = [-1] * ids.numel()
    for slot in range(num_slots):
        routes = by_slot[slot][:capacity]
        fit = len(routes) if num_rows is None else max(0, min(len(routes), num_rows - len(rows)))
        lost += len(routes) - fit
        counts.append(fit)
        for route in routes[:fit]:
            positions[route] = len(rows)
            rows.append(route)
        offsets.append(len(rows))
    rows += [-1] * ((num_rows or 0) - len(rows))
    return {
        "row_route": rows,
        "row_token": [route // top_k for route in rows],
        "positions": positions,
        "tokens_per_slot": counts,
        "slot_offsets": offsets,
        "routed_per_slot": [len(by_slot[slot]) for slot in range(num_slots)],
        "overflow": [lost],
    }


def assert_map(found: RowMap, wanted: dict[str, list]) -> None:
    for name in MAP_FIELDS:
        assert getattr(found, name).reshape(-1).tolist() == wanted[name], name


def combine(rows: Tensor, positions: Tensor, weights: Tensor | None) -> Tensor:
    """The weighted sums in float64."""
    out = torch.zeros(positions.shape[0], rows.shape[1], dtype=torch.float64)
    for t, places in enumerate(positions.tolist()):
        for k, row in enumerate(places):
            if row >= 0:
                factor = 1.0 if weights is None else float(weights[t, k])
                out[t] += factor * rows[row].double()
    return out
