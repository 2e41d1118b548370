"""The flat way across the ranks: every kept route is one row, sent once, straight to its expert."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_locality.dispatch import exchange, permute
from moe_locality.dispatch.permute import StepPlan
from moe_locality.dispatch.traffic import SubgroupCounter, TrafficCounter
from moe_locality.kernels import ops


class FlatTransport:
    """Exchanges rows over one EP group; holds no state of a step.

    ``group`` may be None for the world, ``num_ranks == 1`` means that nothing is exchanged.
    """

    def __init__(
        self,
        *,
        group: Any,
        num_ranks: int,
        comm: Any,
        kernels: ops.Backend,
        traffic: TrafficCounter | SubgroupCounter | None,
    ) -> None:
        self.group = group
        self.num_ranks = num_ranks
        self.comm = comm
        self.kernels: ops.Backend = kernels
        self.traffic = traffic

    def plan(self, slot_ids: Tensor, num_slots: int) -> StepPlan:
        """Sort the routes ``[T, K]`` and agree with the other ranks on the splits. Collective."""
        mapping = ops.row_map(slot_ids, num_slots, backend=self.kernels)
        received = mapping.tokens_per_slot.view(self.num_ranks, -1)
        if self.num_ranks > 1:
            received = exchange.exchange_counts(
                mapping.tokens_per_slot, self.num_ranks, group=self.group, comm=self.comm
            )
        return permute.plan_step(mapping, received, self.num_ranks)

    def dispatch(self, x: Tensor, plan: StepPlan, kind: str = "dispatch") -> Tensor:
        """Return the rows of the local experts, ``[T, D]`` to ``[R, D]``. Collective.

        ``kind`` is what the rows, and their gradients, are counted as.
        """
        return _apply(_FlatDispatch, x, self, plan, kind)

    def combine(self, expert_out: Tensor, weights: Tensor, plan: StepPlan) -> Tensor:
        """Return the weighted sums of the tokens, ``[R, D]`` to ``[T, D]``. Collective."""
        return _apply(_FlatCombine, expert_out, weights, self, plan)

    def to_experts(self, rows: Tensor, plan: StepPlan, kind: str) -> Tensor:
        """Send rows ordered by slot ``[N, D]``; return them ordered by local expert ``[R, D]``."""
        if self.traffic is not None:
            self.traffic.count(kind, plan.input_splits, rows)
        if self.num_ranks == 1:
            return rows
        rows = exchange.exchange_rows(
            rows, plan.input_splits, plan.output_splits, group=self.group, comm=self.comm
        )
        if plan.by_expert is None:
            return rows
        return ops.permute(rows, plan.by_expert, backend=self.kernels)

    def from_experts(self, rows: Tensor, plan: StepPlan, kind: str) -> Tensor:
        """The inverse of :meth:`to_experts`, ``[R, D]`` to ``[N, D]``."""
        if self.traffic is not None:
            self.traffic.count(kind, plan.output_splits, rows)
        if self.num_ranks == 1:
            return rows
        if plan.by_source is not None:
            rows = ops.permute(rows, plan.by_source, backend=self.kernels)
        return exchange.exchange_rows(
            rows, plan.output_splits, plan.input_splits, group=self.group, comm=self.comm
        )


def _apply(function: Any, *args: Any) -> Tensor:
    return function.apply(*args)


class _FlatDispatch(torch.autograd.Function):
    """Forward: permute, exchange, reorder. Backward: reorder, exchange, sum over a token's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, transport: FlatTransport, plan: StepPlan, kind: str) -> Tensor:
        ctx.transport, ctx.plan = transport, plan
        ctx.kind = "dispatch_grad" if kind == "dispatch" else kind
        rows = ops.permute(x, plan.row_map.row_token, backend=transport.kernels)
        return transport.to_experts(rows, plan, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None, None]:
        rows = ctx.transport.from_experts(grad_rows, ctx.plan, ctx.kind)
        kernels = ctx.transport.kernels
        grad = ops.permute_backward(rows, ctx.plan.row_map.positions, backend=kernels)
        return grad, None, None, None


class _FlatCombine(torch.autograd.Function):
    """Forward: reorder, exchange, weighted sum. Backward: weighted rows, exchange, reorder; and the
    gradient of the weights, which needs no exchange since the forward kept the rows.
    """

    @staticmethod
    def forward(
        ctx: Any, expert_out: Tensor, weights: Tensor, transport: FlatTransport, plan: StepPlan
    ) -> Tensor:
        ctx.transport, ctx.plan = transport, plan
        rows = transport.from_experts(expert_out, plan, "combine")
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights)
        return ops.combine(rows, plan.row_map.positions, weights, backend=transport.kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weights = ctx.saved_tensors
        grad_rows, grad_weights = ops.combine_backward(
            grad.contiguous(),
            rows,
            ctx.plan.row_map,
            weights,
            need_rows=ctx.needs_input_grad[0],
            backend=ctx.transport.kernels,
        )
        if grad_rows is not None:
            grad_rows = ctx.transport.to_experts(grad_rows, ctx.plan, "combine_grad")
        return grad_rows, grad_weights, None, None
