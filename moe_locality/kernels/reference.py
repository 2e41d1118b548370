"""Every kernel in plain torch: the truth that the other backends are tested against.

See ``moe_locality.kernels.ops`` for the meaning and the shapes. Everything is deterministic:
gathers and sums over k in order, no scatter-add.
"""

import torch
from torch import Tensor


def row_map(slot_ids: Tensor, num_slots: int) -> dict[str, Tensor]:
    num_tokens, top_k = slot_ids.shape
    flat = slot_ids.reshape(-1)
    # a dropped route sorts behind every slot
    keys = torch.where(flat < 0, num_slots, flat).to(torch.int64)
    tokens_per_slot = torch.bincount(keys, minlength=num_slots + 1)[:num_slots]
    order = torch.argsort(keys, stable=True)
    kept = order[: int(tokens_per_slot.sum())]
    positions = torch.full((num_tokens * top_k,), -1, dtype=torch.int32, device=flat.device)
    rows = torch.arange(kept.numel(), dtype=torch.int32, device=flat.device)
    positions.index_copy_(0, kept, rows)
    return {
        "row_route": kept.to(torch.int32),
        "row_token": torch.div(kept, top_k, rounding_mode="floor").to(torch.int32),
        "positions": positions.view(num_tokens, top_k),
        "tokens_per_slot": tokens_per_slot,
    }


def permute(x: Tensor, row_token: Tensor) -> Tensor:
    return x.index_select(0, row_token)


def permute_backward(grad_rows: Tensor, positions: Tensor) -> Tensor:
    total = _gather(grad_rows, positions[:, 0]).to(_accumulator(grad_rows.dtype))
    for k in range(1, positions.shape[1]):
        total += _gather(grad_rows, positions[:, k])
    return total.to(grad_rows.dtype)


def combine(rows: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    total = _weighted(rows, positions, weights, 0)
    for k in range(1, positions.shape[1]):
        total += _weighted(rows, positions, weights, k)
    return total.to(rows.dtype)


def combine_backward(
    grad: Tensor,
    rows: Tensor | None,
    row_route: Tensor,
    positions: Tensor,
    weights: Tensor,
    need_rows: bool,
) -> tuple[Tensor | None, Tensor | None]:
    wide = grad.to(_accumulator(grad.dtype, weights.dtype))
    grad_rows = grad_weights = None
    if need_rows:
        top_k = positions.shape[1]
        row_token = torch.div(row_route, top_k, rounding_mode="floor")
        row_weight = weights.reshape(-1).index_select(0, row_route)
        grad_rows = (wide.index_select(0, row_token) * row_weight[:, None]).to(grad.dtype)
    if rows is not None:
        columns = [
            (_gather(rows, positions[:, k]) * wide).sum(dim=1) for k in range(positions.shape[1])
        ]
        grad_weights = torch.stack(columns, dim=1).to(weights.dtype)
    return grad_rows, grad_weights


def _accumulator(*dtypes: torch.dtype) -> torch.dtype:
    wide = torch.float32
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype)
    return wide


def _weighted(rows: Tensor, positions: Tensor, weights: Tensor, k: int) -> Tensor:
    wide = _gather(rows, positions[:, k]).to(_accumulator(rows.dtype, weights.dtype))
    return wide.mul_(weights[:, k : k + 1])


def _gather(rows: Tensor, positions: Tensor) -> Tensor:
    """Return ``rows[positions]``, zero where the position is -1 (never 0 * an infinite row)."""
    if rows.shape[0] == 0:
        return rows.new_zeros(positions.shape[0], rows.shape[1])
    picked = rows.index_select(0, positions.clamp_min(0))
    dropped = positions < 0
    if picked.device.type == "cpu" and not dropped.any():  # elsewhere, asking costs a wait
        return picked
    return picked.masked_fill_(dropped[:, None], 0)
