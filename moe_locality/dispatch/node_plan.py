"""The pure arithmetic of a step in two stages: which copies go to which node, and what each node
does with them.

Shapes: M nodes of the EP group, g ranks of a node, e slots of a rank, Q = g*e slots of a node, N1
(R1) copies sent (received) in stage one, R rows of the local experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_locality.dispatch.permute import block_order, inverse, sort_routes, trim
from moe_locality.kernels import ops
from moe_locality.kernels.ops import RowMap


@dataclass(frozen=True, slots=True, kw_only=True)
class HomePlan:
    """What happens to this rank's own tokens.

    ``node_of_route [T, K]``: the node of each route, -1 where it is dropped. ``copies``: the map of
    (token, node) pairs by node; its ``positions [T, M]`` are the copies of each token.
    ``local_slots [N1, K]``: for each copy, the slot on its node of each route of the token, -1 for
    routes to other nodes. ``picks``: the kept routes by (node, slot on it), where rows come back
    one by one and not as sums. ``input_splits [M]``: copies to each node, ``output_splits``: from
    each.
    """

    node_of_route: Tensor
    copies: RowMap
    local_slots: Tensor
    picks: RowMap | None
    input_splits: tuple[int, ...] = ()
    output_splits: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePlan:
    """What happens to the copies that arrived on this node's rank.

    ``routes``: their routes by slot. ``input_splits [g]``: rows to each rank of the node,
    ``output_splits``: from each. ``by_expert [R]``: rows as they arrive, in the order of the
    experts (expert, then home rank of the token in the EP group, then token: the order of the flat
    exchange); ``by_source`` is its inverse. ``by_home``: rows sorted by slot, in the order (home
    node, slot); ``from_home`` is its inverse; both only where rows go home one by one, as
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
class TwoStagePlan:
    """The plan of a step in two stages. It can be used again for the same routes.

    ``pick_splits [M]``: this rank's kept routes by node, where rows come back one by one.
    """

    home: HomePlan
    node: NodePlan
    pick_splits: tuple[int, ...] = ()

    @property
    def tokens_per_local_expert(self) -> tuple[int, ...]:
        return self.node.tokens_per_local_expert

    @property
    def shape(self) -> tuple[int, int]:
        """(T, K) of the routes."""
        tokens, top_k = self.home.node_of_route.shape
        return tokens, top_k

    @property
    def node_mask(self) -> Tensor:
        """``[T] int64``: bit m is set where a kept route of the token goes to node m."""
        hits = self.home.copies.positions >= 0
        return (hits.long() << torch.arange(hits.shape[1], device=hits.device)).sum(dim=1)


def plan_home(
    slot_ids: Tensor,
    rail_of_slot: Tensor,
    slot_in_node: Tensor,
    num_nodes: int,
    *,
    one_by_one: bool,
    kernels: ops.Backend,
) -> HomePlan:
    """Return the plan of the tokens with routes ``[T, K]`` (-1: dropped), without splits."""
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
    picks = None
    if one_by_one:
        picks = sort_routes(
            torch.where(dropped, -1, nodes * per_node + local), len(rail_of_slot), kernels
        )
    return HomePlan(
        node_of_route=nodes,
        copies=copies,
        local_slots=local[token].masked_fill_(nodes[token] != node[:, None], -1).to(small),
        picks=picks,
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
    """Return how blocks that arrive by (rank of the node, slot, home node) are taken in the order
    (slot, home rank in the EP group): ``[g * e * M] int64``.

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


def plan_node(
    routes: RowMap,
    order: Tensor,
    received: Tensor,
    sent: list[int],
    got: list[int],
    *,
    num_nodes: int,
    num_ranks: int,
    one_by_one: bool,
) -> NodePlan:
    """Return the plan of a node's rank from the counts ``[Q * M]`` of both sides.

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
    return NodePlan(
        routes=trim(routes, sum(sent)),
        input_splits=tuple(sum(sent[i : i + size]) for i in range(0, len(sent), size)),
        output_splits=tuple(sum(got[i : i + size]) for i in range(0, len(got), size)),
        tokens_per_local_expert=tuple(sum(cells[i::slots]) for i in range(slots)),
        by_expert=by_expert,
        by_source=inverse(by_expert),
        **back,
    )


def gather_weight_grads(home: HomePlan, grads: Tensor) -> Tensor:
    """Return the gradient of the weights ``[T, K]`` from those of the copies ``[N1, K]``.

    The gradient of a route's weight comes from the copy on its node; a dropped route has zero.
    """
    nodes = home.node_of_route
    if not len(grads):
        return grads.new_zeros(nodes.shape)
    copy = home.copies.positions.gather(1, nodes.clamp_min(0)).long().clamp_min(0)
    return grads.gather(0, copy).masked_fill_(nodes < 0, 0)
