"""The local half of an MoE layer with autograd: gate, dispatch to the slots of this rank, combine.

One ``autograd.Function`` around each; they trace without graph breaks. With a map of static
``num_rows`` every shape is fixed and nothing waits for the device, so a forward and a backward can
be captured in a CUDA graph.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_locality.kernels import ops
from moe_locality.kernels.backends import GateSpec, RowMap


def topk_gate(
    logits: Tensor, spec: GateSpec, *, bias: Tensor | None = None, backend: ops.Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """:func:`moe_locality.kernels.ops.gate` whose weights have a gradient for the logits."""
    return _apply(_Gate, logits, bias, spec, backend)


def dispatch(x: Tensor, mapping: RowMap, *, backend: ops.Backend = "auto") -> Tensor:
    """Return the rows of the slots, ``[T, D]`` to ``[N, D]``; padding rows are zero."""
    return _apply(_Dispatch, x, *_parts(mapping), mapping.padded, backend)


def dispatch_with_weights(
    x: Tensor, weights: Tensor, mapping: RowMap, *, backend: ops.Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the rows and the weight of each, for experts that apply it: ``[N, D]`` and ``[N]``."""
    return _apply(_DispatchWeights, x, weights, *_parts(mapping), mapping.padded, backend)


def combine(
    rows: Tensor, mapping: RowMap, weights: Tensor | None = None, *, backend: ops.Backend = "auto"
) -> Tensor:
    """Return each token's rows, weighted and added up: ``[N, D]`` to ``[T, D]``.

    Without ``weights`` (``[T, K]``) it is a plain sum: the experts applied them.
    """
    if weights is None:
        return _apply(_Sum, rows, *_parts(mapping), mapping.padded, backend)
    return _apply(_Combine, rows, weights, *_parts(mapping), mapping.padded, backend)


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


def _parts(mapping: RowMap) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return mapping.row_token, mapping.row_route, mapping.positions, mapping.slot_offsets


def _map_of(parts: tuple[Tensor, ...], padded: bool) -> RowMap:
    """The fields that moving rows needs; the others of the map are not asked for."""
    token, route, positions, offsets = parts
    return RowMap(
        row_route=route,
        row_token=token,
        positions=positions,
        tokens_per_slot=route,
        slot_offsets=offsets,
        routed_per_slot=route,
        overflow=route,
        padded=padded,
    )


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor | None, spec: GateSpec, backend: Any):
        ids, weights = ops.gate(logits, spec, bias=bias, backend=backend)
        ctx.mark_non_differentiable(ids)
        ctx.save_for_backward(logits, ids)
        ctx.spec, ctx.backend = spec, backend
        return ids, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, grad_weights: Tensor):
        logits, ids = ctx.saved_tensors
        grad = ops.gate_backward(
            grad_weights.contiguous(), logits, ids, ctx.spec, backend=ctx.backend
        )
        return grad, None, None, None


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any):
        *parts, padded, backend = rest
        ctx.save_for_backward(parts[2])
        ctx.backend = backend
        return ops.permute(x, _map_of(tuple(parts), padded), backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor):
        (positions,) = ctx.saved_tensors
        grad = ops.permute_backward(grad_rows.contiguous(), positions, backend=ctx.backend)
        return grad, None, None, None, None, None, None


class _DispatchWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, *rest: Any):
        *parts, padded, backend = rest
        ctx.save_for_backward(parts[2])
        ctx.backend = backend
        mapping = _map_of(tuple(parts), padded)
        return ops.permute_with_weights(x, weights, mapping, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_row_weights: Tensor):
        (positions,) = ctx.saved_tensors
        grads = ops.permute_with_weights_backward(
            grad_rows.contiguous(), grad_row_weights.contiguous(), positions, backend=ctx.backend
        )
        return *grads, None, None, None, None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, *rest: Any):
        *parts, padded, backend = rest
        ctx.save_for_backward(*parts)
        ctx.padded, ctx.backend = padded, backend
        return ops.combine(rows, parts[2], None, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        mapping = _map_of(ctx.saved_tensors, ctx.padded)
        grad_rows = ops.permute(grad.contiguous(), mapping, backend=ctx.backend)
        return grad_rows, None, None, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, *rest: Any):
        *parts, padded, backend = rest
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights, *parts)
        ctx.padded, ctx.backend = padded, backend
        return ops.combine(rows, parts[2], weights, backend=backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        rows, weights, *parts = ctx.saved_tensors
        grads = ops.combine_backward(
            grad.contiguous(),
            rows,
            _map_of(tuple(parts), ctx.padded),
            weights,
            need_rows=ctx.needs_input_grad[0],
            backend=ctx.backend,
        )
        return *grads, None, None, None, None, None, None
