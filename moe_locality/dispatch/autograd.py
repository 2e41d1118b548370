"""The two autograd functions of the exchange: a whole dispatch, and a whole combine.

A transport's forward comes in two halves, so that other work can be done while rows travel. The
first half runs before the function is applied and knows no autograd; the function takes its result
in, so the graph sees one node for each direction.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Dispatch(torch.autograd.Function):
    """``(x [T, D], weights [T, K] or None)`` to the rows of the local experts ``[R, D]`` and the
    weights where they are used (None where that is this rank).

    Backward sends the gradients of both back in one exchange.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor | None, transport: Any, started: Any, keep: list
    ) -> tuple[Tensor, Tensor | None]:
        plan, rows, arrived = transport.finish_dispatch(started, x)
        ctx.transport, ctx.plan = transport, plan
        keep.append(plan)
        return rows, arrived

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_weights: Tensor | None) -> tuple:
        if not ctx.needs_input_grad[1]:
            grad_weights = None
        grads = ctx.transport.dispatch_backward(grad_rows.contiguous(), grad_weights, ctx.plan)
        return *grads, None, None, None


class Combine(torch.autograd.Function):
    """``(expert_out [R, D], weights)`` to the weighted sums of the tokens ``[T, D]``."""

    @staticmethod
    def forward(
        ctx: Any, expert_out: Tensor, weights: Tensor, transport: Any, started: Any, plan: Any
    ) -> Tensor:
        out, rows = transport.finish_combine(started, expert_out, weights, plan)
        ctx.transport, ctx.plan = transport, plan
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        rows, weights = ctx.saved_tensors
        grads = ctx.transport.combine_backward(
            grad.contiguous(), rows, weights, ctx.plan, ctx.needs_input_grad[0]
        )
        return *grads, None, None, None


def dispatch(x: Tensor, weights: Tensor | None, transport: Any, started: Any) -> tuple:
    """Finish a dispatch; return (plan, rows, weights where they are used)."""
    keep: list = []
    apply: Any = Dispatch.apply
    rows, arrived = apply(x, weights, transport, started, keep)
    return keep[0], rows, arrived


def combine(expert_out: Tensor, weights: Tensor, transport: Any, started: Any, plan: Any) -> Tensor:
    """Finish a combine."""
    apply: Any = Combine.apply
    return apply(expert_out, weights, transport, started, plan)
