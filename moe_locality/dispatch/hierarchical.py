"""The way in two stages: across nodes each token goes once to every node that it needs, inside the
node its rows go on to the ranks that hold the experts.

Stage one runs between the ranks of equal local index on every node (*rails*), stage two between the
ranks of a node. One packed row per copy crosses: the token, the slots it is for on that node, and
their weights. Stage two sorts rows into the order of the flat exchange, so the experts see the same
rows in the same order. Results of the experts of a node are added up there, in fp32, and one
partial sum per node goes home (``reduce_at_node``); the order of these sums differs from the flat
exchange, so results agree within rounding. Without it every result goes home by itself, and
outputs and gradients are those of the flat exchange bit for bit.

Backward mirrors it: the gradients of a token's rows are added up on the node and cross once, with
those of the weights packed behind them.

Shapes as in ``node_plan``; N2 rows of this rank's copies inside the node.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_locality.dispatch import node_plan
from moe_locality.dispatch.codec import Codec
from moe_locality.dispatch.exchange import Arriving, Link
from moe_locality.dispatch.node_plan import HomePlan, NodePlan, TwoStagePlan
from moe_locality.dispatch.permute import sort_routes, trim
from moe_locality.dispatch.place import RanksApart
from moe_locality.dispatch.rails import Rails, find_rails
from moe_locality.dispatch.timing import StageClock
from moe_locality.dispatch.wire import WireFormat, wire_format
from moe_locality.kernels import ops

__all__ = ["HierarchicalTransport", "Rails", "TwoStagePlan", "find_rails"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Started:
    """Packed copies on their way; ``plan`` is what is known of the step without them."""

    home: HomePlan
    plan: TwoStagePlan | None
    way: Arriving
    wire: WireFormat
    top_k: int


class HierarchicalTransport:
    """The same methods as :class:`~moe_locality.dispatch.flat.FlatTransport`. Holds no step.

    ``across``, ``inside``: the links of the two stages. With ``reduce_at_node`` the weights travel
    with the rows, and combine wants those that arrived.
    """

    def __init__(
        self,
        rails: Rails,
        *,
        across: Link,
        inside: Link,
        num_slots: int,
        kernels: ops.Backend,
        payload: Codec,
        combine_payload: Codec,
        clock: StageClock,
        reduce_at_node: bool = True,
    ) -> None:
        self.rails = rails
        self.across, self.inside = across, inside
        self.slots_of_node = num_slots // across.size
        self.kernels: ops.Backend = kernels
        self.payload, self.combine_payload = payload, combine_payload
        self.clock = clock
        self.weights_travel = reduce_at_node
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def start_dispatch(
        self, x: Tensor, slot_ids: Tensor, weights: Tensor | None, plan: TwoStagePlan | None
    ) -> tuple[TwoStagePlan | None, "_Started | RanksApart"]:
        """Send each token of ``x [T, D]`` to the nodes of its routes ``[T, K]``. Collective."""
        counts = None
        if plan is None:
            with self.clock("plan"):
                home = self._plan_home(slot_ids)
                counts = self.across.start_counts(home.copies.tokens_per_slot)
        else:
            home = plan.home
        with self.clock("permute"):
            parts = [self.payload.permute(x, home.copies, self.kernels)]
            if plan is None:
                parts.append(home.local_slots)
            if weights is not None:
                parts.append(weights[home.copies.row_token.clamp_min(0).long()])
            wire = wire_format(*parts)
            packed = wire.pack(parts)
        if counts is not None:
            try:
                with self.clock("counts"):
                    _, sent, got = counts.read()
            except RanksApart as apart:  # all of this rail know; the others of the node do not yet
                return None, apart
            home = replace(
                home,
                copies=trim(home.copies, sum(sent)),
                input_splits=tuple(sent),
                output_splits=tuple(got),
            )
        way = self.across.start_rows(
            packed,
            home.input_splits,
            home.output_splits,
            "dispatch",
            extra_bytes=wire.extra_bytes,
        )
        top_k = home.local_slots.shape[1]
        return plan, _Started(home=home, plan=plan, way=way, wire=wire, top_k=top_k)

    def finish_dispatch(
        self, started: tuple[TwoStagePlan | None, "_Started | RanksApart"], x: Tensor
    ) -> tuple[TwoStagePlan, Tensor, Tensor | None]:
        """Return the plan, the rows of the local experts ``[R, D]`` and, where they travel, the
        weights of the copies that arrived ``[R1, K]``. Collective.
        """
        plan, step = started
        if isinstance(step, RanksApart):
            cells = self.slots_of_node * self.across.size
            told = torch.zeros(cells, dtype=torch.int64, device=x.device)
            self.inside.start_counts(told, step).read()
            raise step
        with self.clock("dispatch across"):
            parts = step.wire.unpack(step.way.wait())
        rows, weights = parts[0], parts[-1].contiguous() if self.weights_travel else None
        counts = None
        with self.clock("plan"):
            if plan is None:
                routes = sort_routes(parts[1].int(), self.slots_of_node, self.kernels)
                splits = step.home.output_splits
                cells = node_plan.counts_by_slot_and_home(
                    routes, splits, step.top_k, self.slots_of_node
                )
                counts = self.inside.start_counts(cells)
            else:
                routes = plan.node.routes
        if counts is not None and routes.padded:
            # most rows of a map of fixed size are past the end: better to wait than to make them
            plan = self._plan_inside(step.home, routes, counts)
            routes = plan.node.routes
        with self.clock("permute"):
            rows = ops.permute(rows.contiguous(), routes, backend=self.kernels)
        if plan is None:
            assert counts is not None
            plan = self._plan_inside(step.home, routes, counts)
        node = plan.node
        with self.clock("dispatch inside"):
            rows = self.inside.rows(rows, node.input_splits, node.output_splits, "dispatch")
        with self.clock("reorder"):
            rows = ops.permute(rows, node.by_expert, backend=self.kernels)
            return plan, self.payload.decode(rows, x.shape[1], x.dtype), weights

    def dispatch_backward(
        self, grad_rows: Tensor, grad_weights: Tensor | None, plan: TwoStagePlan
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of the tokens ``[T, D]`` and of the weights ``[T, K]``. Collective.

        ``grad_weights [R1, K]``: of the weights that arrived; None where none is wanted.
        """
        home, node = plan.home, plan.node
        rows = ops.permute(grad_rows, node.by_source, backend=self.kernels)
        rows = self.inside.rows(rows, node.output_splits, node.input_splits, "dispatch_grad")
        if not self.weights_travel:
            assert home.picks is not None
            rows = self._home_one_by_one(rows, plan, "dispatch_grad").wait()
            return ops.permute_backward(rows, home.picks.positions, backend=self.kernels), None
        parts = [ops.permute_backward(rows, node.routes.positions, backend=self.kernels)]
        if grad_weights is not None:
            parts.append(grad_weights)
        wire = wire_format(*parts)
        arrived = self.across.rows(
            wire.pack(parts),
            home.output_splits,
            home.input_splits,
            "dispatch_grad",
            extra_bytes=wire.extra_bytes,
        )
        rows, *rest = wire.unpack(arrived)
        rows = rows.contiguous()
        grad = ops.permute_backward(rows, home.copies.positions, backend=self.kernels)
        return grad, node_plan.gather_weight_grads(home, rest[0]) if rest else None

    def start_combine(self, expert_out: Tensor, weights: Tensor, plan: TwoStagePlan):
        """Bring the results ``[R, D]`` back to the rank that sent them on, and begin to send sums
        (or the results) home. Collective. ``weights``: those that dispatch gave.
        """
        node, codec = plan.node, self.combine_payload
        with self.clock("reorder"):
            rows = codec.encode(ops.permute(expert_out, node.by_source, backend=self.kernels))
        with self.clock("combine inside"):
            rows = self.inside.rows(rows, node.output_splits, node.input_splits, "combine")
        if not self.weights_travel:
            return self._home_one_by_one(rows, plan, "combine"), None
        with self.clock("sum"):
            rows = codec.decode(rows, expert_out.shape[1], expert_out.dtype)
            partial = ops.combine(rows, node.routes.positions, weights, backend=self.kernels)
            coded = codec.encode(partial)
        splits = (plan.home.output_splits, plan.home.input_splits)
        return self.across.start_rows(coded, *splits, "combine"), rows

    def finish_combine(
        self, started, expert_out: Tensor, weights: Tensor, plan: TwoStagePlan
    ) -> tuple[Tensor, Tensor]:
        """Return the sums of the tokens ``[T, D]``, and the rows that the weights multiplied."""
        way, kept = started
        with self.clock("combine across"):
            arrived = way.wait()
        with self.clock("sum"):
            rows = self.combine_payload.decode(arrived, expert_out.shape[1], expert_out.dtype)
            if self.weights_travel:
                positions = plan.home.copies.positions
                return ops.combine(rows, positions, None, backend=self.kernels), kept
            assert plan.home.picks is not None
            positions = plan.home.picks.positions
            return ops.combine(rows, positions, weights, backend=self.kernels), rows

    def combine_backward(
        self,
        grad: Tensor,
        rows: Tensor | None,
        weights: Tensor,
        plan: TwoStagePlan,
        need_rows: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of the experts' results and of the weights. Collective."""
        home, node = plan.home, plan.node
        row_map = node.routes if self.weights_travel else home.picks
        assert row_map is not None
        if self.weights_travel:
            sent = ops.permute(grad, home.copies, backend=self.kernels)
            grad = self.across.rows(sent, home.input_splits, home.output_splits, "combine_grad")
        grad_rows, grad_weights = ops.combine_backward(
            grad, rows, row_map, weights, need_rows=need_rows, backend=self.kernels
        )
        if grad_rows is None:
            return None, grad_weights
        if not self.weights_travel:
            splits = (plan.pick_splits, node.home_splits)
            arrived = self.across.rows(grad_rows, *splits, "combine_grad")
            assert node.from_home is not None
            grad_rows = ops.permute(arrived, node.from_home, backend=self.kernels)
        got = self.inside.rows(grad_rows, node.input_splits, node.output_splits, "combine_grad")
        return ops.permute(got, node.by_expert, backend=self.kernels), grad_weights

    def _home_one_by_one(self, rows: Tensor, plan: TwoStagePlan, kind: str) -> Arriving:
        """Send rows sorted by slot of the node home, each by itself."""
        node = plan.node
        assert node.by_home is not None
        rows = ops.permute(rows, node.by_home, backend=self.kernels)
        return self.across.start_rows(rows, node.home_splits, plan.pick_splits, kind)

    def _plan_home(self, slot_ids: Tensor) -> HomePlan:
        rail_of_slot, slot_in_node, _ = self._on(slot_ids.device)
        return node_plan.plan_home(
            slot_ids,
            rail_of_slot,
            slot_in_node,
            self.across.size,
            one_by_one=not self.weights_travel,
            kernels=self.kernels,
        )

    def _plan_inside(self, home: HomePlan, routes, counts) -> TwoStagePlan:
        with self.clock("counts"):
            received, sent, got = counts.read()
        with self.clock("plan"):
            node: NodePlan = node_plan.plan_node(
                routes,
                self._on(received.device)[2],
                received,
                sent,
                got,
                num_nodes=self.across.size,
                num_ranks=self.inside.size,
                one_by_one=not self.weights_travel,
            )
            splits: tuple[int, ...] = ()
            if home.picks is not None:
                per_node = home.picks.tokens_per_slot.view(self.across.size, -1).sum(dim=1)
                splits = tuple(per_node.tolist())
                home = replace(home, picks=trim(home.picks, sum(splits)))
        return TwoStagePlan(home=home, node=node, pick_splits=splits)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._tables:
            slots_of_rank = self.slots_of_node // self.inside.size
            order = node_plan.blocks_by_expert(self.rails.members, slots_of_rank)
            self._tables[device] = (
                torch.tensor(self.rails.rail_of_slot, device=device),
                torch.tensor(self.rails.slot_in_node, device=device),
                order.to(device),
            )
        return self._tables[device]
