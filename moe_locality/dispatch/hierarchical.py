"""The hierarchical exchange: each token goes once to every node that it needs, then inside the node
its rows go to the ranks that hold the experts.

Stage one runs between the ranks of equal local index on every node (*rails*), stage two between the
ranks of a node. One packed row per (token, node) copy crosses nodes: the token, its slots on that
node and their weights. Stage two sorts rows into the order of the flat exchange, so the experts see
the same rows in the same order. With ``reduce_at_node``, the results of the experts of a node are
added up there in fp32 and one partial sum per node is sent back; the order of these sums differs
from the flat exchange, so results agree within rounding. Without it, every result is sent back by
itself, and outputs and gradients are those of the flat exchange bit for bit.

Backward mirrors it: the gradients of a token's rows are added up on the node and cross once, with
the gradients of the weights packed behind them.

In this order: the position of a rank among the nodes (:class:`Rails`), packed rows
(:class:`WireFormat`), the arithmetic of a step, the transport.

Shapes: M nodes of the EP group, g ranks of a node, e slots of a rank, Q = g*e slots of a node, N1
(R1) copies sent (received) in stage one, N2 rows of this rank's copies inside the node, R rows of
the local experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from moe_locality.dispatch.desync import DesyncError
from moe_locality.dispatch.flat import block_order, inverse, sort_routes, trim
from moe_locality.dispatch.transport import (
    AllToAllGroup,
    Codec,
    CombinedRows,
    DispatchedRows,
    PendingCounts,
    PendingRows,
    StageClock,
    Transport,
)
from moe_locality.errors import ConfigError
from moe_locality.kernels import ops
from moe_locality.kernels.ops import RowMap
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.topology.groups import ExpertParallelGroups


class Rails:
    """The position of this rank among the nodes of its EP group, from the groups that were built
    for its cluster.

    ``inter_group``, ``inter_ranks [M]``: the ranks of its local index, one on each node.
    ``intra_group``, ``intra_ranks [g]``: the ranks of its node. ``rail_of_slot [P]``: position in
    ``inter_ranks`` of the node of each slot. ``slot_in_node [P]``: each slot among those of its
    node. ``members [M][g]``: position in the EP group of each rank of each node.

    Raises:
        ConfigError: the nodes of the EP group have different numbers of its ranks.
    """

    def __init__(
        self, groups: ExpertParallelGroups, topology: ClusterTopology, num_slots: int
    ) -> None:
        ranks: tuple[int, ...] = groups.ep_ranks
        nodes = [topology.node_of(rank) for rank in ranks]
        rails = {topology.node_of(rank): i for i, rank in enumerate(groups.inter_node_ranks)}
        if not nodes_are_even(ranks, topology) or set(rails) != set(nodes):
            raise ConfigError(
                f"found an expert group on nodes {nodes} with rails {groups.inter_node_ranks}, "
                "expected as many of its ranks on every node: set dispatch.exchange to 'flat'"
            )
        self.inter_group, self.intra_group = groups.inter_node_group, groups.intra_node_group
        self.inter_ranks = tuple(groups.inter_node_ranks)
        self.intra_ranks = tuple(groups.intra_node_ranks)
        self.members = tuple(
            tuple(place for place, other in enumerate(nodes) if other == node)
            for node in sorted(rails, key=lambda node: rails[node])
        )
        size = num_slots // len(ranks)  # slots of a rank
        place_of = {place: i for held in self.members for i, place in enumerate(held)}
        self.rail_of_slot = tuple(rails[nodes[p // size]] for p in range(num_slots))
        self.slot_in_node = tuple(place_of[p // size] * size + p % size for p in range(num_slots))


def nodes_are_even(ranks: tuple[int, ...], topology: ClusterTopology) -> bool:
    """Return whether every node of an EP group holds as many of its ranks."""
    nodes = [topology.node_of(rank) for rank in ranks]
    return len({nodes.count(node) for node in nodes}) == 1


def pays(ranks: tuple[int, ...], topology: ClusterTopology, num_slots: int, top_k: int) -> bool:
    """Return whether ``exchange: auto`` takes the two stages.

    The group spans several nodes, evenly, and either some node has several of its ranks (fewer and
    larger messages between nodes), or a token can have two picks on one remote node.
    """
    nodes = {topology.node_of(rank) for rank in ranks}
    if len(nodes) == 1 or not nodes_are_even(ranks, topology):
        return False
    return len(ranks) > len(nodes) or (top_k > 1 and num_slots > len(nodes))


ALIGNMENT = 16


@dataclass(frozen=True, slots=True)
class WireFormat:
    """``parts``: (width, dtype) of each part of a row, in order."""

    parts: tuple[tuple[int, torch.dtype], ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of a packed row."""
        return self._starts()[-1]

    @property
    def extra_bytes(self) -> int:
        """Bytes of a packed row beyond its first part: the other parts, and the padding."""
        return self.row_bytes - self._sizes()[0]

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Return uint8 ``[N, row_bytes]`` of parts ``[N, width]``; one part travels as it is."""
        if len(self.parts) == 1:
            return parts[0]
        buffer = parts[0].new_empty(len(parts[0]), self.row_bytes, dtype=torch.uint8)
        starts, sizes = self._starts(), self._sizes()
        for part, start, size, stop in zip(parts, starts, sizes, starts[1:], strict=False):
            buffer[:, start : start + size].view(part.dtype).copy_(part)
            buffer[:, start + size : stop].zero_()
        return buffer

    def unpack(self, buffer: Tensor) -> list[Tensor]:
        """Return views of the parts; the inverse of :meth:`pack`."""
        if len(self.parts) == 1:
            return [buffer]
        found = zip(self.parts, self._starts(), self._sizes(), strict=False)
        return [buffer[:, start : start + size].view(dtype) for (_, dtype), start, size in found]

    def _sizes(self) -> list[int]:
        return [width * dtype.itemsize for width, dtype in self.parts]

    def _starts(self) -> list[int]:
        if len(self.parts) == 1:
            return [0, self._sizes()[0]]
        starts = [0]
        for size in self._sizes():
            starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        return starts


def wire_format(*parts: Tensor | None) -> WireFormat:
    """Return the format of rows with these parts ``[N, width]``, None for one that is not there."""
    return WireFormat(tuple((part.shape[1], part.dtype) for part in parts if part is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class InterNodeLayout:
    """How this rank's own tokens cross nodes (stage one).

    ``node_of_route [T, K]``: the node of each route, -1 where it is dropped. ``copies``: the map of
    (token, node) pairs by node; its ``positions [T, M]`` are the copies of each token.
    ``local_slots [N1, K]``: for each copy, the slot on its node of each route of the token, -1 for
    routes to other nodes. ``routes``: the kept routes by (node, slot on it), where results come
    back one by one and not as sums. ``input_splits [M]``: copies to each node, ``output_splits``:
    from each.
    """

    node_of_route: Tensor
    copies: RowMap
    local_slots: Tensor
    routes: RowMap | None
    input_splits: tuple[int, ...] = ()
    output_splits: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class IntraNodeLayout:
    """How the copies that arrived on this rank are sent on inside the node (stage two).

    ``routes``: their routes by slot. ``input_splits [g]``: rows to each rank of the node,
    ``output_splits``: from each. ``by_expert [R]``: the received rows in the order of the experts
    (expert, then home rank of the token in the EP group, then token: the order of the flat
    exchange); ``by_source`` is its inverse. ``by_home``: rows sorted by slot, in the order (home
    node, slot); ``from_home`` is its inverse; both only where results are sent back one by one, as
    ``home_splits [M]``.
    """

    routes: RowMap
    input_splits: tuple[int, ...]
    output_splits: tuple[int, ...]
    tokens_per_local_expert: tuple[int, ...]
    by_expert: Tensor
    by_source: Tensor
    by_home: Tensor | None = None
    from_home: Tensor | None = None
    home_splits: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class HierarchicalMetadata:
    """Both layouts of a step. A later dispatch of the same routes may use it again.

    ``route_splits [M]``: this rank's kept routes by node, where results come back one by one.
    """

    inter_node: InterNodeLayout
    intra_node: IntraNodeLayout
    route_splits: tuple[int, ...] = ()

    @property
    def tokens_per_local_expert(self) -> tuple[int, ...]:
        return self.intra_node.tokens_per_local_expert

    @property
    def shape(self) -> tuple[int, int]:
        """(T, K) of the routes."""
        tokens, top_k = self.inter_node.node_of_route.shape
        return tokens, top_k


def layout_inter_node(
    slot_ids: Tensor,
    rail_of_slot: Tensor,
    slot_in_node: Tensor,
    num_nodes: int,
    *,
    one_by_one: bool,
    kernels: ops.Backend,
) -> InterNodeLayout:
    """Return the layout of tokens with routes ``[T, K]`` (-1: dropped), still without splits."""
    known = slot_ids.clamp_min(0).long()
    dropped = slot_ids < 0
    nodes = rail_of_slot[known].masked_fill_(dropped, -1)  # [T, K]
    local = slot_in_node[known].masked_fill_(dropped, -1)
    every = torch.arange(num_nodes, device=slot_ids.device)
    needed = (nodes[:, :, None] == every).any(dim=1)  # [T, M]
    copies = sort_routes(torch.where(needed, every, -1), num_nodes, kernels)
    route = copies.row_route.long().clamp_min(0)  # t * M + node
    token, node = route // num_nodes, route % num_nodes
    per_node = len(rail_of_slot) // num_nodes
    small = torch.int16 if per_node <= torch.iinfo(torch.int16).max else torch.int32
    routes = None
    if one_by_one:
        routes = sort_routes(
            torch.where(dropped, -1, nodes * per_node + local), len(rail_of_slot), kernels
        )
    return InterNodeLayout(
        node_of_route=nodes,
        copies=copies,
        local_slots=local[token].masked_fill_(nodes[token] != node[:, None], -1).to(small),
        routes=routes,
    )


def counts_by_slot_and_home(
    routes: RowMap, arrived_splits: tuple[int, ...], top_k: int, num_slots: int
) -> Tensor:
    """Return ``[Q * M] int64``: rows of each slot of the node by the node of the token's home.

    ``arrived_splits [M]``: copies from each node, in order.
    """
    num_nodes = len(arrived_splits)
    device = routes.row_route.device
    ends = torch.tensor(arrived_splits, device=device).cumsum(0)
    copy = torch.div(routes.row_route.long(), top_k, rounding_mode="floor")
    home = torch.searchsorted(ends, copy, right=True)
    slots = torch.searchsorted(
        routes.slot_offsets[1:].long(), torch.arange(len(copy), device=device), right=True
    )
    used = slots < num_slots  # a static map has rows past the end
    cells = torch.where(used, slots * num_nodes + home, num_slots * num_nodes)
    return torch.bincount(cells, minlength=num_slots * num_nodes + 1)[:-1]


def blocks_by_expert(members: tuple[tuple[int, ...], ...], slots_per_rank: int) -> Tensor:
    """Return the order (slot, home rank in the EP group) of blocks that arrive in the order (rank
    of the node, slot, home node): ``[g * e * M] int64``.

    ``members [M][g]``: position in the EP group of each rank of each node.
    """
    num_nodes, per_node = len(members), len(members[0])
    homes = sorted(
        (members[node][local], local, node)
        for node in range(num_nodes)
        for local in range(per_node)
    )
    return torch.tensor(
        [
            (local * slots_per_rank + slot) * num_nodes + node
            for slot in range(slots_per_rank)
            for _, local, node in homes
        ]
    )


def layout_intra_node(
    routes: RowMap,
    order: Tensor,
    received: Tensor,
    sent: list[int],
    got: list[int],
    *,
    num_nodes: int,
    num_ranks: int,
    one_by_one: bool,
) -> IntraNodeLayout:
    """Return the layout inside the node from the counts ``[Q * M]`` of both sides.

    ``order``: of :func:`blocks_by_expert`. ``received [g * e * M]`` by (rank, slot, home node).
    ``sent [Q * M]``, ``got``: both on the host.
    """
    size = len(got) // num_ranks  # cells of a rank
    slots = size // num_nodes
    by_expert = block_order(received, order, sum(got))
    cells = [sum(got[i : i + num_nodes]) for i in range(0, len(got), num_nodes)]
    back: dict = {}
    if one_by_one:
        ours = torch.tensor(sent, device=received.device)
        homes = torch.arange(len(sent), device=received.device).view(-1, num_nodes).t().reshape(-1)
        by_home = block_order(ours, homes, sum(sent))
        splits = tuple(sum(sent[m::num_nodes]) for m in range(num_nodes))
        back = {"by_home": by_home, "from_home": inverse(by_home), "home_splits": splits}
    return IntraNodeLayout(
        routes=trim(routes, sum(sent)),
        input_splits=tuple(sum(sent[i : i + size]) for i in range(0, len(sent), size)),
        output_splits=tuple(sum(got[i : i + size]) for i in range(0, len(got), size)),
        tokens_per_local_expert=tuple(sum(cells[i::slots]) for i in range(slots)),
        by_expert=by_expert,
        by_source=inverse(by_expert),
        **back,
    )


def gather_weight_grads(layout: InterNodeLayout, grads: Tensor) -> Tensor:
    """Return the gradient of the weights ``[T, K]`` from those of the copies ``[N1, K]``.

    The gradient of a route's weight comes from the copy on its node; a dropped route has zero.
    """
    nodes = layout.node_of_route
    if not len(grads):
        return grads.new_zeros(nodes.shape)
    copy = layout.copies.positions.gather(1, nodes.clamp_min(0)).long().clamp_min(0)
    return grads.gather(0, copy).masked_fill_(nodes < 0, 0)


@dataclass(eq=False)
class HierarchicalTransport(Transport[HierarchicalMetadata]):
    """Two all-to-alls in each direction: between nodes (``inter_node``) and inside the node
    (``intra_node``).

    With ``reduce_at_node`` the weights are sent with the rows, and combine uses those that arrived.
    """

    metadata_type: ClassVar[type] = HierarchicalMetadata

    rails: Rails
    _: KW_ONLY
    inter_node: AllToAllGroup
    intra_node: AllToAllGroup
    num_slots: int
    kernels: ops.Backend
    payload: Codec
    combine_payload: Codec
    clock: StageClock
    reduce_at_node: bool = True

    def __post_init__(self) -> None:
        self.slots_of_node = self.num_slots // self.inter_node.size
        self.sends_weights = self.reduce_at_node
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def start_dispatch(
        self,
        x: Tensor,
        slot_ids: Tensor,
        topk_weights: Tensor | None,
        metadata: HierarchicalMetadata | None,
    ) -> Callable[[], DispatchedRows[HierarchicalMetadata]]:
        """Send each token to the nodes of its routes; the second stage runs in the finish."""
        counts = None
        if metadata is None:
            with self.clock("plan"):
                tables = self._on(slot_ids.device)[:2]
                layout = layout_inter_node(
                    *(slot_ids, *tables, self.inter_node.size),
                    one_by_one=not self.sends_weights,
                    kernels=self.kernels,
                )
                counts = self.inter_node.start_counts(layout.copies.tokens_per_slot)
        else:
            layout = metadata.inter_node
        with self.clock("permute"):
            parts = [self.payload.permute(x, layout.copies, self.kernels)]
            if metadata is None:
                parts.append(layout.local_slots)
            if topk_weights is not None:
                parts.append(topk_weights[layout.copies.row_token.clamp_min(0).long()])
            wire = wire_format(*parts)
            packed = wire.pack(parts)
        if counts is not None:
            try:
                with self.clock("counts"):
                    _, sent, got = counts.read()
            except DesyncError as desync:
                # all ranks of this rail know; the others of the node hear of it in the finish
                return partial(self._raise_inside, desync, x.device)
            layout = replace(
                layout,
                copies=trim(layout.copies, sum(sent)),
                input_splits=tuple(sent),
                output_splits=tuple(got),
            )
        splits, extra = (layout.input_splits, layout.output_splits), wire.extra_bytes
        pending = self.inter_node.start_rows(packed, *splits, "dispatch", extra_bytes=extra)
        return partial(self._finish_dispatch, pending, wire, layout, metadata, x)

    def _raise_inside(
        self, desync: DesyncError, device: torch.device
    ) -> DispatchedRows[HierarchicalMetadata]:
        """Raise ``desync`` on all ranks of the node: it is sent with the counts inside the node."""
        cells = self.slots_of_node * self.inter_node.size
        none = torch.zeros(cells, dtype=torch.int64, device=device)
        self.intra_node.start_counts(none, desync).read()
        raise desync

    def _finish_dispatch(
        self,
        pending: PendingRows,
        wire: WireFormat,
        layout: InterNodeLayout,
        metadata: HierarchicalMetadata | None,
        x: Tensor,
    ) -> DispatchedRows[HierarchicalMetadata]:
        """Receive the copies and send their rows on to the ranks of their experts.

        ``metadata``: None in the first step of its routes. ``x``: for its width and type.
        """
        with self.clock("dispatch across"):
            parts = wire.unpack(pending.wait())
        rows, weights = parts[0], parts[-1].contiguous() if self.sends_weights else None
        counts = None
        with self.clock("plan"):
            if metadata is None:
                local = parts[1].int()
                routes = sort_routes(local, self.slots_of_node, self.kernels)
                splits, top_k = layout.output_splits, local.shape[1]
                cells = counts_by_slot_and_home(routes, splits, top_k, self.slots_of_node)
                counts = self.intra_node.start_counts(cells)
            else:
                routes = metadata.intra_node.routes
        if counts is not None and routes.padded:
            # most rows of a map of fixed size are past the end: better to wait than to make them
            metadata = self._metadata(layout, routes, counts)
            routes = metadata.intra_node.routes
        with self.clock("permute"):
            rows = ops.permute(rows.contiguous(), routes, backend=self.kernels)
        if metadata is None:
            assert counts is not None
            metadata = self._metadata(layout, routes, counts)
        inside = metadata.intra_node
        with self.clock("dispatch inside"):
            splits = (inside.input_splits, inside.output_splits)
            rows = self.intra_node.start_rows(rows, *splits, "dispatch").wait()
        with self.clock("reorder"):
            rows = ops.permute(rows, inside.by_expert, backend=self.kernels)
            rows = self.payload.decode(rows, x.shape[1], x.dtype)
        return DispatchedRows(metadata, rows, weights)

    def dispatch_backward(
        self, grad_rows: Tensor, grad_weights: Tensor | None, metadata: HierarchicalMetadata
    ) -> tuple[Tensor, Tensor | None]:
        """Add the gradients of a token up on the node; they cross once, with those of weights."""
        across, inside = metadata.inter_node, metadata.intra_node
        rows = ops.permute(grad_rows, inside.by_source, backend=self.kernels)
        splits = (inside.output_splits, inside.input_splits)
        rows = self.intra_node.start_rows(rows, *splits, "dispatch_grad").wait()
        if not self.sends_weights:
            assert across.routes is not None
            rows = self._start_one_by_one(rows, metadata, "dispatch_grad").wait()
            return ops.permute_backward(rows, across.routes.positions, backend=self.kernels), None
        parts = [ops.permute_backward(rows, inside.routes.positions, backend=self.kernels)]
        if grad_weights is not None:
            parts.append(grad_weights)
        wire = wire_format(*parts)
        splits, extra = (across.output_splits, across.input_splits), wire.extra_bytes
        packed = wire.pack(parts)
        pending = self.inter_node.start_rows(packed, *splits, "dispatch_grad", extra_bytes=extra)
        rows, *rest = wire.unpack(pending.wait())
        rows = rows.contiguous()
        grad = ops.permute_backward(rows, across.copies.positions, backend=self.kernels)
        return grad, gather_weight_grads(across, rest[0]) if rest else None

    def start_combine(
        self, expert_out: Tensor, topk_weights: Tensor, metadata: HierarchicalMetadata
    ) -> Callable[[], CombinedRows]:
        """Bring the results back to the entry rank of the node, and begin to send sums (or the
        results one by one) to the ranks of the tokens.
        """
        across, inside, codec = metadata.inter_node, metadata.intra_node, self.combine_payload
        width, dtype = expert_out.shape[1], expert_out.dtype
        with self.clock("reorder"):
            rows = codec.encode(ops.permute(expert_out, inside.by_source, backend=self.kernels))
        with self.clock("combine inside"):
            splits = (inside.output_splits, inside.input_splits)
            rows = self.intra_node.start_rows(rows, *splits, "combine").wait()
        if self.sends_weights:
            with self.clock("sum"):
                rows = codec.decode(rows, width, dtype)
                positions = inside.routes.positions
                partial_sums = ops.combine(rows, positions, topk_weights, backend=self.kernels)
                coded = codec.encode(partial_sums)
            splits = (across.output_splits, across.input_splits)
            pending = self.inter_node.start_rows(coded, *splits, "combine")
        else:
            pending = self._start_one_by_one(rows, metadata, "combine")

        def finish() -> CombinedRows:
            with self.clock("combine across"):
                arrived = pending.wait()
            with self.clock("sum"):
                arrived = codec.decode(arrived, width, dtype)
                if self.sends_weights:
                    positions = across.copies.positions
                    out = ops.combine(arrived, positions, None, backend=self.kernels)
                    return CombinedRows(out, rows)
                assert across.routes is not None
                positions = across.routes.positions
                out = ops.combine(arrived, positions, topk_weights, backend=self.kernels)
                return CombinedRows(out, arrived)

        return finish

    def combine_backward(
        self,
        grad: Tensor,
        rows: Tensor | None,
        topk_weights: Tensor,
        metadata: HierarchicalMetadata,
        need_rows: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """As the interface says; the gradient of a token crosses once per node."""
        across, inside = metadata.inter_node, metadata.intra_node
        row_map = inside.routes if self.sends_weights else across.routes
        assert row_map is not None
        if self.sends_weights:
            sent = ops.permute(grad, across.copies, backend=self.kernels)
            splits = (across.input_splits, across.output_splits)
            grad = self.inter_node.start_rows(sent, *splits, "combine_grad").wait()
        grad_rows, grad_weights = ops.combine_backward(
            grad, rows, row_map, topk_weights, need_rows=need_rows, backend=self.kernels
        )
        if grad_rows is None:
            return None, grad_weights
        if not self.sends_weights:
            splits = (metadata.route_splits, inside.home_splits)
            arrived = self.inter_node.start_rows(grad_rows, *splits, "combine_grad").wait()
            assert inside.from_home is not None
            grad_rows = ops.permute(arrived, inside.from_home, backend=self.kernels)
        splits = (inside.input_splits, inside.output_splits)
        got = self.intra_node.start_rows(grad_rows, *splits, "combine_grad").wait()
        return ops.permute(got, inside.by_expert, backend=self.kernels), grad_weights

    def _start_one_by_one(
        self, rows: Tensor, metadata: HierarchicalMetadata, kind: str
    ) -> PendingRows:
        """Send rows sorted by slot back to the ranks of their tokens, each row by itself."""
        inside = metadata.intra_node
        assert inside.by_home is not None
        rows = ops.permute(rows, inside.by_home, backend=self.kernels)
        splits = (inside.home_splits, metadata.route_splits)
        return self.inter_node.start_rows(rows, *splits, kind)

    def _metadata(
        self, across: InterNodeLayout, routes: RowMap, counts: PendingCounts
    ) -> HierarchicalMetadata:
        with self.clock("counts"):
            received, sent, got = counts.read()
        with self.clock("plan"):
            inside = layout_intra_node(
                routes,
                self._on(received.device)[2],
                received,
                sent,
                got,
                num_nodes=self.inter_node.size,
                num_ranks=self.intra_node.size,
                one_by_one=not self.sends_weights,
            )
            splits: tuple[int, ...] = ()
            if across.routes is not None:
                per_node = across.routes.tokens_per_slot.view(self.inter_node.size, -1).sum(dim=1)
                splits = tuple(per_node.tolist())
                across = replace(across, routes=trim(across.routes, sum(splits)))
        return HierarchicalMetadata(inter_node=across, intra_node=inside, route_splits=splits)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._tables:
            slots_of_rank = self.slots_of_node // self.intra_node.size
            order = blocks_by_expert(self.rails.members, slots_of_rank)
            self._tables[device] = (
                torch.tensor(self.rails.rail_of_slot, device=device),
                torch.tensor(self.rails.slot_in_node, device=device),
                order.to(device),
            )
        return self._tables[device]
