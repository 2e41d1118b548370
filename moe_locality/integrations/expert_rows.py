"""The expert weights of one transformers experts module, spread over the ranks of an EP group.

transformers keeps the experts of a layer in stacked parameters ``[E, ...]``, DTensors of which each
rank holds E / G consecutive rows. A *row* here is one expert of such a tensor. Rows stay where the
plan puts them for the whole run; ``order [E]`` is the logical expert in each row. What leaves the
model (state dicts of model and optimizer) is in the order of the logical experts, and what enters
is taken in that order, so checkpoints are plain ones.

Where experts have replicas, each expert has one row, which the optimizer trains, and further copies
that are fetched from it (:func:`fetch_copies`); gradients of all copies are added to that row.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer.agreement import gather_answers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class RowExchange:
    """Which rows this rank sends to each rank of the group, and where those that arrive belong.

    ``sent``: positions among the rows of this rank, rank after rank. ``placed [n]``: position,
    among the rows that arrive (rank after rank), of each row that is wanted here.
    """

    sent: Tensor
    sent_splits: list[int]
    received_splits: list[int]
    placed: Tensor
    group: "ProcessGroup"

    @classmethod
    def of(
        cls, wanted: Sequence[np.ndarray], rows_per_rank: int, group: "ProcessGroup"
    ) -> "RowExchange":
        """``wanted[g]``: the rows, numbered over the group, that rank g wants, in its order."""
        me = dist.get_rank(group)
        owners = [rows // rows_per_rank for rows in wanted]
        sent = [
            rows[owner == me] - me * rows_per_rank
            for rows, owner in zip(wanted, owners, strict=True)
        ]
        mine = owners[me]
        arrival = np.argsort(mine, kind="stable")
        return cls(
            sent=torch.from_numpy(np.concatenate(sent).astype(np.int64)),
            sent_splits=[len(rows) for rows in sent],
            received_splits=np.bincount(mine, minlength=len(wanted)).tolist(),
            placed=torch.from_numpy(np.argsort(arrival).astype(np.int64)),
            group=group,
        )

    def fetch(self, rows: Tensor) -> Tensor:
        """Return the rows that are wanted here ``[n, ...]`` from the own ``rows [E / G, ...]``."""
        sent = rows.index_select(0, self.sent.to(rows.device))
        arrived = rows.new_empty(sum(self.received_splits), *rows.shape[1:])
        dist.all_to_all_single(
            arrived, sent, self.received_splits, self.sent_splits, group=self.group
        )
        return arrived.index_select(0, self.placed.to(rows.device))

    def give_back(self, gradients: Tensor, num_rows: int) -> Tensor:
        """Send gradients ``[n, ...]`` to the owners; return the sums for the own rows."""
        ordered = torch.empty_like(gradients)
        ordered[self.placed.to(gradients.device)] = gradients
        arrived = gradients.new_empty(len(self.sent), *gradients.shape[1:])
        dist.all_to_all_single(
            arrived, ordered, self.sent_splits, self.received_splits, group=self.group
        )
        sums = gradients.new_zeros(num_rows, *gradients.shape[1:])
        return sums.index_add_(0, self.sent.to(gradients.device), arrived)


class _FetchCopies(torch.autograd.Function):
    """One node for all parameters of a module: all ranks then send gradients in one order."""

    @staticmethod
    def forward(ctx: Any, exchange: RowExchange, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.num_rows = exchange, len(parameters[0])
        return tuple(exchange.fetch(rows) for rows in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needed = zip(grads, ctx.needs_input_grad[1:], strict=True)
        return None, *(
            ctx.exchange.give_back(grad.contiguous(), ctx.num_rows) if need else None
            for grad, need in needed
        )


def fetch_copies(rows: dict[str, Tensor], exchange: RowExchange) -> dict[str, Tensor]:
    """Return copies ``[n, ...]`` of rows of other ranks, with autograd. Collective.

    ``rows``: the parameters of an experts module, ``[E / G, ...]`` each.
    """
    apply: Any = _FetchCopies.apply
    return dict(zip(rows, apply(exchange, *rows.values()), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLayout:
    """Rows and slots of a layer whose plan has replicas, seen from one rank.

    ``order [E]``: the expert in each row. ``slots [P]``: the new number of each slot of the plan: a
    rank's slots whose experts have their row there come first. ``own``: rows (from 0 on this rank)
    of those slots. ``wanted [G]``: the rows that the other slots of each rank copy.
    """

    order: np.ndarray
    slots: np.ndarray
    own: np.ndarray
    wanted: list[np.ndarray]


def layout_rows(slot_to_logical: np.ndarray, num_ranks: int, rank: int) -> RowLayout:
    """Give each expert its one row on a rank that has a slot for it, as far as possible.

    Every rank has E / G rows, so some experts may have their row on a rank that does not serve
    them.
    """
    from scipy.optimize import linear_sum_assignment

    by_rank = slot_to_logical.reshape(num_ranks, -1)
    num_experts = int(slot_to_logical.max()) + 1
    rows_per_rank = num_experts // num_ranks
    absent = np.ones((num_experts, num_ranks), dtype=np.int64)
    for holder, experts in enumerate(by_rank):
        absent[experts, holder] = 0
    _, row_of = linear_sum_assignment(np.repeat(absent, rows_per_rank, axis=1))
    slots, wanted, own = np.empty(slot_to_logical.size, dtype=np.int64), [], np.empty(0, np.int64)
    for holder, experts in enumerate(by_rank):
        rows = row_of[experts]
        here = rows // rows_per_rank == holder
        order = np.concatenate([np.flatnonzero(here), np.flatnonzero(~here)])
        first = holder * len(experts)
        slots[first + order] = first + np.arange(len(experts))
        wanted.append(rows[~here])
        if holder == rank:
            own = rows[here] - rank * rows_per_rank
    return RowLayout(order=np.argsort(row_of), slots=slots, own=own, wanted=wanted)


def expert_parameters(experts: nn.Module, name: str) -> dict[str, DTensor]:
    """Return the stacked parameters of an experts module that are split over the EP group.

    Raises:
        ConfigError: a parameter or buffer is not split by experts, so it could not be moved.
    """
    found: dict[str, DTensor] = {}
    tensors = [*experts.named_parameters(), *experts.named_buffers()]
    for key, tensor in tensors:
        if isinstance(tensor, DTensor) and (tensor.device_mesh.mesh_dim_names or ())[-1:] == (
            "ep",
        ):
            found[key] = tensor
        elif tensor.ndim:
            raise ConfigError(
                f"found {name}.{key} {list(tensor.shape)}, which transformers does not split over "
                "the experts, expected only stacked parameters [E, ...]: a plan cannot be applied "
                "to this model; leave it out"
            )
    return found


@torch.no_grad()
def in_order(
    tensor: DTensor, current: np.ndarray, target: np.ndarray, group: "ProcessGroup"
) -> DTensor:
    """Return a DTensor like ``tensor``, whose row p holds expert ``target[p]``. Collective.

    ``current [E]``: the expert in each row of ``tensor``; both are permutations. Needs room for
    two copies of the own rows.
    """
    local = tensor.to_local()
    sources = np.argsort(current)[target]
    wanted = list(sources.reshape(dist.get_world_size(group), -1))
    exchange = RowExchange.of(wanted, len(local), group)
    as_bytes = local.contiguous().reshape(len(local), -1).view(torch.uint8)
    moved = exchange.fetch(as_bytes).view(local.dtype).reshape(local.shape)
    return DTensor.from_local(
        moved,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


@dataclass(eq=False, slots=True, kw_only=True, weakref_slot=True)
class RowOrder:
    """Which expert each row of an experts module holds: ``order [E]``, over ``group``.

    ``kept``: copies that forward passes without gradients use again, until the rows change.
    """

    experts: nn.Module
    name: str
    order: np.ndarray
    group: "ProcessGroup"
    kept: dict[str, Tensor] = field(default_factory=dict)

    def relayed(self, tensor: DTensor, leaving: bool) -> DTensor:
        """Return ``tensor`` in logical order (``leaving``), or in that of the rows. Collective."""
        logical = np.arange(len(self.order))
        current, target = (self.order, logical) if leaving else (logical, self.order)
        return in_order(tensor, current, target, self.group)

    @property
    def is_identity(self) -> bool:
        return bool((self.order == np.arange(len(self.order))).all())


def all_ranks_are_here(what: str) -> None:
    """Raise where only some ranks read or write a state dict, instead of waiting for ever."""
    advice = (
        f"With a plan, {what} is collective: call it on every rank. The optimizer of a Trainer is "
        "saved by rank 0 alone, without the experts of the others: set save_only_model=True, and "
        "save it with transformers.distributed.checkpoint.save_optimizer_distributed"
    )
    gather_answers(None, what, _STATE_DICT_TIMEOUT_S, advice)


def keep_checkpoints_logical(rows: RowOrder, first: bool) -> None:
    """Let ``state_dict`` and ``load_state_dict`` of a module see its experts in logical order.

    Both become collective; the ``first`` module of a model checks that all ranks are there.
    """

    def reordered(state: dict[str, Any], prefix: str, leaving: bool) -> None:
        if first:
            all_ranks_are_here("state_dict()" if leaving else "load_state_dict()")
        if rows.is_identity:
            return
        parameters: Any = rows.experts.named_parameters()
        for key, parameter in parameters:
            value = state.get(prefix + key)
            if value is None:
                continue
            if not isinstance(value, DTensor) or value.placements != parameter.placements:
                raise PlacementError(
                    f"found {prefix}{key} as {type(value).__name__}, expected a DTensor that is "
                    "split as the model's, to put its experts in the order of the plan: load it "
                    "with torch.distributed.checkpoint, or before moe_locality.apply"
                )
            state[prefix + key] = rows.relayed(value, leaving)

    def after_save(_module: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        reordered(state, prefix, leaving=True)

    def before_load(_module: Any, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        rows.kept.clear()
        reordered(state, prefix, leaving=False)

    rows.experts.register_state_dict_post_hook(after_save)
    rows.experts.register_load_state_dict_pre_hook(before_load)
    _placed.add(rows)
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_before_step))


_STATE_DICT_TIMEOUT_S = 60.0
_placed: "weakref.WeakSet[RowOrder]" = weakref.WeakSet()
_watching: list[Any] = []
_FOLLOWED = "moe_locality_follows_rows"


def _before_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Find the optimizers that train placed experts: at their first step, before they have state.

    torch.distributed.checkpoint makes such a step itself before it loads.
    """
    for rows in _placed:
        rows.kept.clear()
    if _FOLLOWED in vars(optimizer):
        return
    found = _rows_of(optimizer)
    if any(optimizer.state.get(parameter) for parameter, rows in found if rows is not None):
        raise ConfigError(
            f"found a {type(optimizer).__name__} whose state was loaded before its first step, "
            "while a plan orders the experts: the moments are those of other experts; load them "
            "with transformers.distributed.checkpoint.load_optimizer_distributed, or call "
            "moe_locality.apply(model, optimizer=optimizer) before load_state_dict"
        )
    if any(rows is not None for _, rows in found):
        keep_optimizer_logical(optimizer)
    setattr(optimizer, _FOLLOWED, True)


def _rows_of(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, RowOrder | None]]:
    """Return the parameters of an optimizer, numbered as in its state dict, with their rows."""
    order_of = {id(p): rows for rows in _placed for p in rows.experts.parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [(p, order_of.get(id(p))) for p in parameters]


def keep_optimizer_logical(optimizer: torch.optim.Optimizer) -> None:
    """Let the state dict of an optimizer hold the moments in the order of the logical experts."""
    if getattr(optimizer, _FOLLOWED, None) == "hooked":
        return
    setattr(optimizer, _FOLLOWED, "hooked")

    def reordered(state_dict: dict[str, Any], leaving: bool) -> dict[str, Any]:
        what = "the optimizer's " + ("state_dict()" if leaving else "load_state_dict()")
        all_ranks_are_here(what)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        found = dict(state_dict["state"])
        for number, (parameter, rows) in zip(numbers, _rows_of(optimizer), strict=True):
            if rows is None or rows.is_identity or number not in found:
                continue
            found[number] = {
                key: _relayed_moment(rows, parameter, key, value, leaving)
                for key, value in found[number].items()
            }
        return {**state_dict, "state": found}

    optimizer.register_state_dict_post_hook(lambda _, state: reordered(state, leaving=True))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: reordered(state, leaving=False))


def _relayed_moment(rows: RowOrder, parameter: Any, key: str, value: Any, leaving: bool) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if isinstance(value, DTensor) and value.placements == parameter.placements:
        return rows.relayed(value, leaving)
    raise PlacementError(
        f"found optimizer state {key!r} {list(value.shape)} of {rows.name}, expected a DTensor "
        "that is split as the experts: with a plan, use an optimizer that keeps its state so, "
        "such as torch.optim.AdamW, and torch.distributed.checkpoint to load it"
    )
