"""The flat way across the ranks: every kept route is one row, sent once, straight to its expert."""

from typing import Any

from torch import Tensor

from moe_locality.dispatch import permute
from moe_locality.dispatch.codec import Codec
from moe_locality.dispatch.exchange import Arriving, Link
from moe_locality.dispatch.permute import StepPlan
from moe_locality.dispatch.timing import StageClock
from moe_locality.kernels import ops


class FlatTransport:
    """Exchanges rows over one EP group; holds no state of a step.

    ``start_`` and ``finish_`` are the halves of a forward: rows travel between them. What a start
    returns, the finish takes. ``payload`` codes the rows of the dispatch, ``combine_payload`` those
    of the combine.
    """

    weights_travel = False

    def __init__(
        self,
        link: Link,
        *,
        num_slots: int,
        kernels: ops.Backend,
        payload: Codec,
        combine_payload: Codec,
        clock: StageClock,
    ) -> None:
        self.link = link
        self.num_slots = num_slots
        self.kernels: ops.Backend = kernels
        self.payload = payload
        self.combine_payload = combine_payload
        self.clock = clock

    def start_dispatch(
        self, x: Tensor, slot_ids: Tensor, weights: Tensor | None, plan: StepPlan | None
    ) -> tuple[StepPlan, Arriving]:
        """Sort the routes ``[T, K]``, agree with the other ranks on the splits while the rows are
        put in order, and send them. With a ``plan``, only the rows. Collective.
        """
        del weights  # they are used where the tokens are
        if plan is None:
            with self.clock("plan"):
                row_map = permute.sort_routes(slot_ids, self.num_slots, self.kernels)
                counts = self.link.start_counts(row_map.tokens_per_slot)
            with self.clock("permute"):
                rows = self.payload.permute(x, row_map, self.kernels)
            with self.clock("counts"):
                arrived, sent, got = counts.read()
                plan = permute.plan_step(row_map, arrived, self.link.size, sent, got)
        else:
            with self.clock("permute"):
                rows = self.payload.permute(x, plan.row_map, self.kernels)
        way = self.link.start_rows(rows, plan.input_splits, plan.output_splits, "dispatch")
        return plan, way

    def finish_dispatch(
        self, started: tuple[StepPlan, Arriving], x: Tensor
    ) -> tuple[StepPlan, Tensor, None]:
        """Return the plan and the rows of the local experts ``[R, D]``."""
        plan, way = started
        with self.clock("dispatch"):
            rows = way.wait()
        with self.clock("reorder"):
            order = (plan.by_expert, self.kernels)
            return plan, self.payload.decode(rows, x.shape[1], x.dtype, *order), None

    def dispatch_backward(
        self, grad_rows: Tensor, grad_weights: Tensor | None, plan: StepPlan
    ) -> tuple[Tensor, None]:
        """Return the gradient of the tokens ``[T, D]``. Collective."""
        del grad_weights
        rows = self._from_experts(grad_rows, plan, "dispatch_grad")
        grad = ops.permute_backward(rows, plan.row_map.positions, backend=self.kernels)
        return grad, None

    def start_combine(self, expert_out: Tensor, weights: Tensor, plan: StepPlan) -> Arriving:
        """Send the results of the experts ``[R, D]`` back. Collective."""
        del weights
        with self.clock("reorder"):
            rows = self.combine_payload.encode(self._take(expert_out, plan.by_source))
        return self.link.start_rows(rows, plan.output_splits, plan.input_splits, "combine")

    def finish_combine(
        self, started: Arriving, expert_out: Tensor, weights: Tensor, plan: StepPlan
    ) -> tuple[Tensor, Tensor]:
        """Return the weighted sums of the tokens ``[T, D]``, and the rows that were summed."""
        with self.clock("combine"):
            rows = started.wait()
        with self.clock("sum"):
            rows = self.combine_payload.decode(rows, expert_out.shape[1], expert_out.dtype)
            positions = plan.row_map.positions
            return ops.combine(rows, positions, weights, backend=self.kernels), rows

    def combine_backward(
        self, grad: Tensor, rows: Tensor | None, weights: Tensor, plan: StepPlan, need_rows: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the experts' results and of the weights. Collective.

        The gradient of the weights needs no exchange, since the forward kept the rows.
        """
        grad_rows, grad_weights = ops.combine_backward(
            grad, rows, plan.row_map, weights, need_rows=need_rows, backend=self.kernels
        )
        if grad_rows is not None:
            splits = (plan.input_splits, plan.output_splits)
            arrived = self.link.rows(grad_rows, *splits, "combine_grad")
            grad_rows = self._take(arrived, plan.by_expert)
        return grad_rows, grad_weights

    def _from_experts(self, rows: Tensor, plan: StepPlan, kind: str) -> Tensor:
        rows = self._take(rows, plan.by_source)
        return self.link.rows(rows, plan.output_splits, plan.input_splits, kind)

    def _take(self, rows: Tensor, order: Tensor | None) -> Tensor:
        return rows if order is None else ops.permute(rows, order, backend=self.kernels)


Transport = Any
"""A transport: :class:`FlatTransport` or another object with its methods."""
