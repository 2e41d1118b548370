"""What each kernel means, as loops over Python numbers and float64: slow, and readable."""

from collections import defaultdict

import torch
from torch import Tensor

from moe_locality.kernels.backends import GateSpec, RowMap

NUMERIC = ("row_route", "row_token", "positions", "tokens_per_slot", "slot_offsets")
NUMERIC += ("routed_per_slot", "overflow", "node_mask", "tokens_per_node")


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


def row_map(
    ids: Tensor,
    num_slots: int,
    slot_of_expert=None,
    keep=None,
    capacity=None,
    alignment=1,
    num_rows=None,
    node_of_slot=None,
    num_nodes=0,
) -> dict[str, list]:
    """The fields of RowMap as lists."""
    top_k = ids.shape[1]
    by_slot = defaultdict(list)
    slot_of_route = {}
    for route, expert in enumerate(ids.reshape(-1).tolist()):
        if expert < 0 or (keep is not None and not bool(keep.reshape(-1)[route])):
            continue
        slot = expert if slot_of_expert is None else int(slot_of_expert[expert])
        if slot >= 0:
            by_slot[slot].append(route)
            slot_of_route[route] = slot
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
        # padding counts the routes that found no row too: the layout is fixed before the cut
        padded = -(-len(routes) // alignment) * alignment
        end = offsets[-1] + padded
        end = end if num_rows is None else min(end, num_rows)
        rows += [-1] * (end - len(rows))
        offsets.append(end)
    rows += [-1] * ((num_rows or 0) - len(rows))
    made = {
        "row_route": rows,
        "row_token": [route // top_k for route in rows],
        "positions": positions,
        "tokens_per_slot": counts,
        "slot_offsets": offsets,
        "routed_per_slot": [len(by_slot[slot]) for slot in range(num_slots)],
        "overflow": [lost],
    }
    if node_of_slot is not None:
        nodes = [
            {int(node_of_slot[slot_of_route[r]]) for r in range(t * top_k, (t + 1) * top_k)
             if positions[r] >= 0}
            for t in range(len(ids))
        ]  # fmt: skip
        made["node_mask"] = [sum(1 << node for node in found) for found in nodes]
        made["tokens_per_node"] = [sum(m in found for found in nodes) for m in range(num_nodes)]
    return made


def assert_map(found: RowMap, wanted: dict[str, list]) -> None:
    for name in NUMERIC:
        tensor = getattr(found, name)
        got = None if tensor is None else tensor.reshape(-1).tolist()
        assert got == wanted.get(name), name


def gate(logits: Tensor, spec: GateSpec, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ids and weights, chosen in float64 with ties to the lower id."""
    wide = logits.double()
    scores = wide.sigmoid() if spec.score == "sigmoid" else torch.softmax(wide, dim=1)
    keys = scores if bias is None else scores + bias.double()
    size = logits.shape[1] // spec.num_groups
    all_ids, all_weights = [], []
    for row, score in zip(keys.tolist(), scores.tolist(), strict=True):
        groups = [sorted(row[g * size : (g + 1) * size])[::-1] for g in range(spec.num_groups)]
        best = [sum(g[: 2 if spec.group_score == "top2" else 1]) for g in groups]
        order = sorted(range(spec.num_groups), key=lambda g, best=best: (-best[g], g))
        reach = [e for g in order[: spec.top_groups] for e in range(g * size, (g + 1) * size)]
        ids = sorted(reach, key=lambda e, row=row: (-row[e], e))[: spec.top_k]
        weights = [score[e] for e in ids]
        if spec.renormalize:
            weights = [w / max(sum(weights), 1e-20) for w in weights]
        all_ids.append(ids)
        all_weights.append([w * spec.scale for w in weights])
    shape = (len(logits), spec.top_k)
    ids = torch.tensor(all_ids, dtype=torch.int32).view(shape)
    return ids, torch.tensor(all_weights, dtype=torch.float64).view(shape)


def combine(rows: Tensor, positions: Tensor, weights: Tensor | None) -> Tensor:
    """The weighted sums in float64."""
    out = torch.zeros(positions.shape[0], rows.shape[1], dtype=torch.float64)
    for t, places in enumerate(positions.tolist()):
        for k, row in enumerate(places):
            if row >= 0:
                factor = 1.0 if weights is None else float(weights[t, k])
                out[t] += factor * rows[row].double()
    return out
