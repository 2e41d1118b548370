"""The hierarchical exchange: each token goes once to every node that it needs, then inside the node
its rows go to the ranks that hold the experts.

Stage one runs between the ranks of equal local index on every node (*rails*), stage two between the
ranks of a node. One packed row per (token, node) copy crosses nodes: the token, its slots on that
node and their weights. Stage two sorts rows into the order of the flat exchange, so the experts see
the same rows in the same order. With ``reduce_at_node``, the results of the experts of a node are
added up there in fp32 and one partial sum per node is sent back, so results agree with those of the
flat exchange within rounding. Without it, every result is sent back by itself, and outputs and
gradients are those of the flat exchange bit for bit. Backward mirrors it, with the gradients of the
weights packed behind those of the rows.

Shapes: M nodes of the EP group, g ranks of a node, e slots of a rank, Q = g*e slots of a node, N1
copies sent in stage one, R rows of the local experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from moe_locality.config import DispatchConfig
from moe_locality.dispatch.desync import DesyncError
from moe_locality.dispatch.flat import (
    block_order,
    expert_major_order,
    inverse,
    sort_routes,
    sums_of,
    trim,
)
from moe_locality.dispatch.transport import (
    AllToAllGroup,
    Combined,
    Dispatched,
    PendingCounts,
    PendingRows,
    Splits,
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
        members = [[i for i, other in enumerate(nodes) if other == node] for node in rails]
        self.members = tuple(map(tuple, members))
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


class WireFormat:
    """How parts ``[N, width]`` lie in a packed row: ``(width, dtype)`` of each part, in order.

    ``row_bytes``: of a packed row; ``extra_bytes``: those beyond its first part, which are the
    other parts and the padding. A single part travels as it is.
    """

    def __init__(self, parts: Sequence[tuple[int, torch.dtype]]) -> None:
        self.dtypes = [dtype for _, dtype in parts]
        sizes = [width * dtype.itemsize for width, dtype in parts]
        self._places: list[tuple[int, int, int]] = []  # start, end and end of the padding
        self.row_bytes = 0
        for size in sizes:
            start, stop = self.row_bytes, self.row_bytes + size
            self.row_bytes = stop if len(parts) == 1 else -(-stop // ALIGNMENT) * ALIGNMENT
            self._places.append((start, stop, self.row_bytes))
        self.extra_bytes = self.row_bytes - sizes[0]

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Return uint8 ``[N, row_bytes]`` of the parts."""
        if len(parts) == 1:
            return parts[0]
        buffer = parts[0].new_empty(len(parts[0]), self.row_bytes, dtype=torch.uint8)
        for part, (start, stop, end) in zip(parts, self._places, strict=True):
            buffer[:, start:stop].view(part.dtype).copy_(part)
            buffer[:, stop:end].zero_()
        return buffer

    def unpack(self, buffer: Tensor) -> list[Tensor]:
        """Return views of the parts; the inverse of :meth:`pack`."""
        if len(self.dtypes) == 1:
            return [buffer]
        found = zip(self._places, self.dtypes, strict=True)
        return [buffer[:, start:stop].view(dtype) for (start, stop, _), dtype in found]


def wire_format(*parts: Tensor | None) -> WireFormat:
    """Return the format of rows with these parts ``[N, width]``, None for one that is not there."""
    return WireFormat([(part.shape[1], part.dtype) for part in parts if part is not None])


@dataclass(frozen=True, slots=True, kw_only=True)
class InterNodeLayout(Splits):
    """How this rank's own tokens cross nodes (stage one); the splits ``[M]`` count copies.

    ``node_of_route [T, K]``: the node of each route, -1 where it is dropped. ``copies``: the map of
    (token, node) pairs by node; its ``positions [T, M]`` are the copies of each token.
    ``local_slots [N1, K]``: for each copy, the slot on its node of each route of the token, -1 for
    routes to other nodes. ``routes``: the kept routes by (node, slot on it), where results come
    back one by one and not as sums.
    """

    node_of_route: Tensor
    copies: RowMap
    local_slots: Tensor
    routes: RowMap | None


@dataclass(frozen=True, slots=True, kw_only=True)
class IntraNodeLayout(Splits):
    """How the copies that arrived on this rank are sent on inside the node (stage two); the splits
    ``[g]`` count rows.

    ``routes``: their routes by slot. ``by_expert [R]``: the received rows in the order of the
    experts (expert, then home rank of the token in the EP group, then token: the order of the flat
    exchange); ``by_source`` is its inverse.
    """

    routes: RowMap
    tokens_per_local_expert: tuple[int, ...]
    by_expert: Tensor
    by_source: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class HomewardLayout(Splits):
    """How results cross nodes one by one: the splits ``[M]`` count this rank's kept routes, and the
    rows that it has for the routes of others.

    ``routes``: as in :class:`InterNodeLayout`. ``by_home``: rows sorted by slot, in the order (home
    node, slot); ``from_home`` is its inverse.
    """

    routes: RowMap
    by_home: Tensor
    from_home: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class HierarchicalMetadata:
    """The layouts of a step; ``homeward`` is None where results come back as sums."""

    inter_node: InterNodeLayout
    intra_node: IntraNodeLayout
    homeward: HomewardLayout | None = None

    @property
    def home_map(self) -> RowMap:
        """The map of what comes back across nodes."""
        return self.inter_node.copies if self.homeward is None else self.homeward.routes

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
        keys = torch.where(dropped, -1, nodes * per_node + local)
        routes = sort_routes(keys, len(rail_of_slot), kernels)
    return InterNodeLayout(
        node_of_route=nodes,
        copies=copies,
        local_slots=local[token].masked_fill_(nodes[token] != node[:, None], -1).to(small),
        routes=routes,
        input_splits=(),
        output_splits=(),
    )


def counts_by_slot_and_home(
    routes: RowMap, arrived_splits: tuple[int, ...], top_k: int, num_slots: int
) -> Tensor:
    """Return ``[Q * M] int64``: rows of each slot of the node by the node of the token's home, of
    copies ``arrived_splits [M]`` from each node, in order.
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
    """Return the order ``[g * e * M] int64`` by (slot, home rank in the EP group) of blocks that
    come by (rank of the node, slot, home node). ``members``: those of :class:`Rails`.
    """
    homes = sorted(
        (place, local, node)
        for node, held in enumerate(members)
        for local, place in enumerate(held)
    )
    num_nodes = len(members)
    first = torch.tensor([local * slots_per_rank * num_nodes + node for _, local, node in homes])
    return (torch.arange(slots_per_rank)[:, None] * num_nodes + first).view(-1)


def hierarchical_metadata(
    across: InterNodeLayout,
    routes: RowMap,
    order: Tensor,
    num_ranks: int,
    received: Tensor,
    sent: list[int],
    got: list[int],
) -> HierarchicalMetadata:
    """Return the metadata of a step from its layout across nodes, the ``routes`` that go on inside
    the node, and the counts ``[Q * M]`` of both sides.

    ``order``: of :func:`blocks_by_expert`. ``received [g * e * M]`` by (rank, slot, home node).
    ``sent [Q * M]``, ``got``: both on the host.
    """
    num_nodes = len(across.input_splits)
    size = len(got) // num_ranks  # cells of a rank
    slots, by_slot = size // num_nodes, sums_of(got, num_nodes)
    by_expert = block_order(received, order, sum(got))
    inside = IntraNodeLayout(
        routes=trim(routes, sum(sent)),
        input_splits=sums_of(sent, size),
        output_splits=sums_of(got, size),
        tokens_per_local_expert=tuple(sum(by_slot[i::slots]) for i in range(slots)),
        by_expert=by_expert,
        by_source=inverse(by_expert),
    )
    if across.routes is None:
        return HierarchicalMetadata(inter_node=across, intra_node=inside)
    kept = across.routes.tokens_per_slot.view(num_nodes, -1).sum(dim=1).tolist()
    cells = torch.tensor(sent, device=received.device).view(-1, num_nodes)
    by_home = expert_major_order(cells, sum(sent))
    homeward = HomewardLayout(
        routes=trim(across.routes, sum(kept)),
        input_splits=tuple(kept),
        output_splits=tuple(sum(sent[node::num_nodes]) for node in range(num_nodes)),
        by_home=by_home,
        from_home=inverse(by_home),
    )
    return HierarchicalMetadata(inter_node=across, intra_node=inside, homeward=homeward)


def gather_weight_grads(layout: InterNodeLayout, grads: Tensor) -> Tensor:
    """Return gradients ``[T, K]`` from those of the copies ``[N1, K]``; zero for dropped routes."""
    nodes = layout.node_of_route
    if not len(grads):
        return grads.new_zeros(nodes.shape)
    copy = layout.copies.positions.gather(1, nodes.clamp_min(0)).long().clamp_min(0)
    return grads.gather(0, copy).masked_fill_(nodes < 0, 0)


@dataclass(eq=False)
class HierarchicalTransport(Transport[HierarchicalMetadata]):
    """Two all-to-alls in each direction: between nodes and inside the node."""

    metadata_type: ClassVar[type] = HierarchicalMetadata

    rails: Rails
    inter_node: AllToAllGroup
    intra_node: AllToAllGroup

    def __post_init__(self) -> None:
        super().__post_init__()
        config: DispatchConfig = self.config
        self.sends_weights = config.reduce_at_node  # results are then added up there
        self.slots_of_node = self.num_slots // self.inter_node.size
        self._tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def start_dispatch(
        self,
        x: Tensor,
        slot_ids: Tensor,
        topk_weights: Tensor | None,
        metadata: HierarchicalMetadata | None,
    ) -> Callable[[], Dispatched[HierarchicalMetadata]]:
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
            assert (metadata.homeward is None) == self.sends_weights
            layout = metadata.inter_node
        with self.clock("permute"):
            parts = [self.payload.permute(x, layout.copies)]
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
        extra = wire.extra_bytes
        pending = self.inter_node.start_rows(packed, layout, "dispatch", extra_bytes=extra)
        return partial(self._finish_dispatch, pending, wire, layout, metadata, x)

    def _raise_inside(
        self, desync: DesyncError, device: torch.device
    ) -> Dispatched[HierarchicalMetadata]:
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
    ) -> Dispatched[HierarchicalMetadata]:
        """Receive the copies of ``x`` and send their rows on to the ranks of their experts."""
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
            rows = self.intra_node.start_rows(rows, inside, "dispatch").wait()
        with self.clock("reorder"):
            rows = ops.permute(rows, inside.by_expert, backend=self.kernels)
            return metadata, self.payload.decode(rows, x), weights

    def dispatch_backward(
        self, grad_rows: Tensor, grad_weights: Tensor | None, metadata: HierarchicalMetadata
    ) -> tuple[Tensor, Tensor | None]:
        """Add the gradients of a token up on the node; they cross once, with those of weights."""
        across, inside = metadata.inter_node, metadata.intra_node
        rows = ops.permute(grad_rows, inside.by_source, backend=self.kernels)
        rows = self.intra_node.start_rows(rows, inside, "dispatch_grad").wait()
        if self.sends_weights:
            rows = ops.permute_backward(rows, inside.routes.positions, backend=self.kernels)
        parts = [rows] if grad_weights is None else [rows, grad_weights]
        wire = wire_format(*parts)
        pending = self._start_home(wire.pack(parts), metadata, "dispatch_grad", wire.extra_bytes)
        rows, *rest = wire.unpack(pending.wait())
        rows, positions = rows.contiguous(), metadata.home_map.positions
        grad = ops.permute_backward(rows, positions, backend=self.kernels)
        return grad, gather_weight_grads(across, rest[0]) if rest else None

    def start_combine(
        self, expert_out: Tensor, topk_weights: Tensor, metadata: HierarchicalMetadata
    ) -> Callable[[], Combined]:
        """Bring results to the node's entry rank; begin to send them, or sums, to their tokens."""
        inside, codec = metadata.intra_node, self.combine_payload
        with self.clock("reorder"):
            rows = codec.encode(ops.permute(expert_out, inside.by_source, backend=self.kernels))
        with self.clock("combine inside"):
            sent = rows = self.intra_node.start_rows(rows, inside, "combine").wait()
        if self.sends_weights:
            with self.clock("sum"):
                rows = codec.decode(rows, expert_out)
                positions = inside.routes.positions
                sent = ops.combine(rows, positions, topk_weights, backend=self.kernels)
                sent = codec.encode(sent)
        pending = self._start_home(sent, metadata, "combine")

        def finish() -> Combined:
            with self.clock("combine across"):
                arrived = pending.wait()
            with self.clock("sum"):
                arrived = codec.decode(arrived, expert_out)
                weights = None if self.sends_weights else topk_weights
                positions = metadata.home_map.positions
                out = ops.combine(arrived, positions, weights, backend=self.kernels)
                return out, rows if self.sends_weights else arrived

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
        across, inside, home = metadata.inter_node, metadata.intra_node, metadata.homeward
        if home is None:
            sent = ops.permute(grad, across.copies, backend=self.kernels)
            grad = self.inter_node.start_rows(sent, across, "combine_grad").wait()
        row_map = inside.routes if home is None else home.routes
        grad_rows, grad_weights = ops.combine_backward(
            grad, rows, row_map, topk_weights, need_rows=need_rows, backend=self.kernels
        )
        if grad_rows is None:
            return None, grad_weights
        if home is not None:
            arrived = self.inter_node.start_rows(grad_rows, home, "combine_grad").wait()
            grad_rows = ops.permute(arrived, home.from_home, backend=self.kernels)
        got = self.intra_node.start_rows(grad_rows, inside, "combine_grad").wait()
        return ops.permute(got, inside.by_expert, backend=self.kernels), grad_weights

    def _start_home(
        self, rows: Tensor, metadata: HierarchicalMetadata, kind: str, extra_bytes: int = 0
    ) -> PendingRows:
        """Send sums, or rows sorted by slot one by one, to the ranks of their tokens."""
        home = metadata.homeward
        if home is not None:
            rows = ops.permute(rows, home.by_home, backend=self.kernels)
        splits = home or metadata.inter_node
        return self.inter_node.start_rows(rows, splits, kind, extra_bytes=extra_bytes)

    def _metadata(
        self, across: InterNodeLayout, routes: RowMap, counts: PendingCounts
    ) -> HierarchicalMetadata:
        with self.clock("counts"):
            received, sent, got = counts.read()
        with self.clock("plan"):
            order, size = self._on(received.device)[2], self.intra_node.size
            return hierarchical_metadata(across, routes, order, size, received, sent, got)

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
