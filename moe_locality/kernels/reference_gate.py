"""The gate in plain torch: scores, group limits, top-k with ties to the lower id, its derivative.

See ``moe_locality.kernels.ops`` for the shapes. Arithmetic is in fp32, or fp64 for fp64 logits.
"""

import torch
from torch import Tensor

from moe_locality.kernels.types import GateSpec

TINY = 1e-20
"""Least denominator of the renormalization (DeepSeek-V3's): only underflowed weights meet it."""


def gate(logits: Tensor, bias: Tensor | None, spec: GateSpec) -> tuple[Tensor, Tensor]:
    wide = _widen(logits)
    scores = _scores(wide, spec)
    ids = _pick(selection_keys(wide, scores, bias, spec), spec)
    weights = scores.gather(1, ids)
    if spec.renormalize:
        weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(TINY)
    return ids.to(torch.int32), weights * spec.scale


def gate_backward(grad_weights: Tensor, logits: Tensor, ids: Tensor, spec: GateSpec) -> Tensor:
    scores = _scores(_widen(logits), spec)
    index = ids.to(torch.int64)
    picked = scores.gather(1, index)
    grad = grad_weights.to(scores.dtype) * spec.scale
    if spec.renormalize:
        total = picked.sum(dim=1, keepdim=True)
        inner = (grad * picked).sum(dim=1, keepdim=True)
        # below TINY the denominator is a constant, so only the first term is left
        grad = torch.where(total > TINY, (grad - inner / total) / total, grad / TINY)
    if spec.score == "sigmoid":
        local = grad * picked * (1 - picked)
        return torch.zeros_like(scores).scatter(1, index, local).to(logits.dtype)
    inner = (grad * picked).sum(dim=1, keepdim=True)
    return (torch.zeros_like(scores).scatter(1, index, grad) - inner).mul(scores).to(logits.dtype)


def selection_keys(wide: Tensor, scores: Tensor, bias: Tensor | None, spec: GateSpec) -> Tensor:
    """Return what experts are compared by, ``[T, E]``.

    Without bias and sums of groups, scores rise with the logits, and the logits know no rounding of
    the exponential: then every backend picks the same experts, bit for bit.
    """
    if bias is not None:
        return scores + bias.to(scores.dtype)
    if spec.num_groups > 1 and spec.group_score == "top2":
        return scores
    return wide


def _widen(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _scores(wide: Tensor, spec: GateSpec) -> Tensor:
    return wide.sigmoid() if spec.score == "sigmoid" else torch.softmax(wide, dim=1)


def _pick(keys: Tensor, spec: GateSpec) -> Tensor:
    if spec.num_groups > 1:
        grouped = keys.view(len(keys), spec.num_groups, keys.shape[1] // spec.num_groups)
        best = min(2 if spec.group_score == "top2" else 1, grouped.shape[2])
        group_keys = grouped.topk(best, dim=2).values.sum(dim=2)
        winners = _largest(group_keys, spec.top_groups)
        allowed = torch.zeros_like(group_keys, dtype=torch.bool).scatter(1, winners, True)
        # experts in reach first, each with its own key: two sorts, the second one stable
        order = torch.sort(keys, dim=1, descending=True, stable=True).indices
        reach = allowed.repeat_interleave(grouped.shape[2], dim=1).gather(1, order)
        first = torch.sort(reach.to(torch.uint8), dim=1, descending=True, stable=True).indices
        return order.gather(1, first[:, : spec.top_k])
    return _largest(keys, spec.top_k)


def _largest(keys: Tensor, count: int) -> Tensor:
    """The ids of the ``count`` largest keys of each row; topk would break ties at will."""
    return torch.sort(keys, dim=1, descending=True, stable=True).indices[:, :count]
