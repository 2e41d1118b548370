"""Every kernel in plain torch: the truth that the other backends are tested against.

See ``moe_locality.kernels.ops`` for the meaning and the shapes. Everything is deterministic:
gathers and sums over k in order, no scatter-add.
"""

import torch
from torch import Tensor

from moe_locality.kernels import reference_cpu
from moe_locality.kernels.reference_gate import gate, gate_backward
from moe_locality.kernels.reference_map import row_map

__all__ = ["combine", "combine_backward", "gate", "gate_backward", "gather", "permute", "row_map"]


def gather(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index)


def permute(
    x: Tensor,
    row_token: Tensor,
    row_route: Tensor,
    positions: Tensor,
    weights: Tensor | None,
    slot_offsets: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    del positions  # the inverse of row_token, for kernels that read each token once
    rows = pick_rows(x, row_token) if slot_offsets is not None else x.index_select(0, row_token)
    return rows, None if weights is None else _route_weights(weights, row_route)


def combine(
    rows: Tensor, positions: Tensor, weights: Tensor | None, row_values: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    if reference_cpu.can_sum(rows, weights):
        total = reference_cpu.weighted_sums(rows, positions, weights)
    else:
        total = _weighted(rows, positions, weights, 0)
        for k in range(1, positions.shape[1]):
            total += _weighted(rows, positions, weights, k)
    values = None
    if row_values is not None:
        values = pick_rows(row_values[:, None], positions.reshape(-1)).view(positions.shape)
    return total.to(rows.dtype), values


def combine_backward(
    grad: Tensor,
    rows: Tensor | None,
    row_token: Tensor,
    row_route: Tensor,
    positions: Tensor,
    weights: Tensor,
    need_rows: bool,
    slot_offsets: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    grad_rows = grad_weights = None
    fast = reference_cpu.can_sum(grad, weights)
    wide = grad if fast else grad.to(_accumulator(grad.dtype, weights.dtype))
    if need_rows:
        row_weight = _route_weights(weights, row_route)[:, None]
        if fast:  # a sum of one
            grad_rows = reference_cpu.weighted_sums(grad, row_token[:, None], row_weight)
        else:
            take = pick_rows if slot_offsets is not None else gather
            grad_rows = (take(wide, row_token) * row_weight).to(grad.dtype)
    if rows is not None and fast:
        grad_weights = reference_cpu.row_products(rows, positions, grad)
    elif rows is not None:
        columns = [
            (pick_rows(rows, positions[:, k]) * wide).sum(dim=1) for k in range(positions.shape[1])
        ]
        grad_weights = torch.stack(columns, dim=1).to(weights.dtype)
    return grad_rows, grad_weights


def _route_weights(weights: Tensor, row_route: Tensor) -> Tensor:
    return pick_rows(weights.reshape(-1, 1), row_route).view(-1)


def _accumulator(*dtypes: torch.dtype) -> torch.dtype:
    wide = torch.float32
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype)
    return wide


def _weighted(rows: Tensor, positions: Tensor, weights: Tensor | None, k: int) -> Tensor:
    dtypes = (rows.dtype,) if weights is None else (rows.dtype, weights.dtype)
    wide = pick_rows(rows, positions[:, k]).to(_accumulator(*dtypes))
    return wide if weights is None else wide.mul_(weights[:, k : k + 1])


def pick_rows(rows: Tensor, positions: Tensor) -> Tensor:
    """Return ``rows[positions]``, zero where the position is -1 (never 0 * an infinite row)."""
    if rows.shape[0] == 0:
        return rows.new_zeros(positions.shape[0], rows.shape[1])
    picked = rows.index_select(0, positions.clamp_min(0))
    dropped = positions < 0
    if picked.device.type == "cpu" and not dropped.any():  # elsewhere, asking costs a wait
        return picked
    return picked.masked_fill_(dropped[:, None], 0)
