"""The expert weights of one transformers experts module, spread over the ranks of an EP group.

transformers keeps the experts of a layer in stacked parameters ``[E, ...]``, DTensors of which each
rank holds E / G consecutive rows. A *row* here is one expert of such a tensor. Rows stay where the
plan puts them for the whole run; ``order [E]`` is the logical expert in each row.

Where experts have replicas, each expert has one row, which the optimizer trains, and further copies
that are fetched from it (:class:`_FetchCopies`); gradients of all copies are added to that row.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from moe_locality.compat import compute_on_shards, remove_parameters
from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer.agreement import gather_answers
from moe_locality.layer.expert_store import other_parameters, stored_parameters
from moe_locality.topology.groups import exchange_objects

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RowExchange:
    """Which rows this rank sends to each rank of the group, and where those that arrive belong.

    ``sent``: positions among the rows of this rank, rank after rank. ``placed [n]``: position,
    among the rows that arrive (rank after rank), of each row that is wanted here. ``wanted[g]``:
    the rows, numbered over the group, that rank g wants, in its order.
    """

    def __init__(
        self, wanted: Sequence[np.ndarray], rows_per_rank: int, group: "ProcessGroup"
    ) -> None:
        me, self.group = dist.get_rank(group), group
        sent = [rows[rows // rows_per_rank == me] - me * rows_per_rank for rows in wanted]
        mine = wanted[me] // rows_per_rank
        arrival = np.argsort(mine, kind="stable")
        self.sent = torch.from_numpy(np.concatenate(sent).astype(np.int64))
        self.sent_splits = [len(rows) for rows in sent]
        self.received_splits: list[int] = np.bincount(mine, minlength=len(wanted)).tolist()
        self.placed = torch.from_numpy(np.argsort(arrival).astype(np.int64))

    @classmethod
    def reordering(cls, current: np.ndarray, target: np.ndarray, group: Any) -> "RowExchange":
        """Of rows with the experts ``current [E]``, to become those with ``target [E]``."""
        wanted = np.argsort(current)[target].reshape(dist.get_world_size(group), -1)
        return cls(list(wanted), wanted.shape[1], group)

    def fetch(self, rows: Tensor) -> Tensor:
        """Return the rows that are wanted here ``[n, ...]`` from the own ``rows [E / G, ...]``."""
        sent = rows.index_select(0, self.sent.to(rows.device))
        arrived = rows.new_empty(sum(self.received_splits), *rows.shape[1:])
        dist.all_to_all_single(
            arrived, sent, self.received_splits, self.sent_splits, group=self.group
        )
        del sent  # room for what follows
        return arrived.index_select(0, self.placed.to(rows.device))

    @torch.no_grad()
    def reorder(self, rows: Tensor) -> Tensor:
        """:meth:`fetch` as many rows as there are, of any type."""
        as_bytes = rows.contiguous().reshape(len(rows), -1).view(torch.uint8)
        return self.fetch(as_bytes).view(rows.dtype).reshape(rows.shape)

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


class RowLayout:
    """Rows and slots of a layer whose plan has replicas, seen from one rank.

    Each expert has its one row on a rank that has a slot for it, as far as possible: every rank has
    E / G rows, so some may have it on a rank that does not serve them.

    ``order [E]``: the expert in each row. ``slots [P]``: the new number of each slot of the plan: a
    rank's slots whose experts have their row there come first. ``own``: rows (from 0 on this rank)
    of those slots. ``wanted [G]``: the rows that the other slots of each rank copy.
    """

    def __init__(self, slot_to_logical: np.ndarray, num_ranks: int, rank: int) -> None:
        from scipy.optimize import linear_sum_assignment

        by_rank = slot_to_logical.reshape(num_ranks, -1)
        num_experts = int(slot_to_logical.max()) + 1
        rows_per_rank = num_experts // num_ranks
        absent = np.ones((num_experts, num_ranks), dtype=np.int64)
        for holder, experts in enumerate(by_rank):
            absent[experts, holder] = 0
        _, row_of = linear_sum_assignment(np.repeat(absent, rows_per_rank, axis=1))
        self.order, self.slots = np.argsort(row_of), np.empty(by_rank.size, dtype=np.int64)
        self.wanted: list[np.ndarray] = []
        for holder, experts in enumerate(by_rank):
            rows = row_of[experts]
            here = rows // rows_per_rank == holder
            order = np.concatenate([np.flatnonzero(here), np.flatnonzero(~here)])
            first = holder * len(experts)
            self.slots[first + order] = first + np.arange(len(experts))
            self.wanted.append(rows[~here])
            if holder == rank:
                self.own = rows[here] - rank * rows_per_rank


def stored(experts: nn.Module) -> nn.Module:
    """Drop FSDP's gathered copies: they are other tensors than those that are trained and saved."""
    if isinstance(experts, FSDPModule):
        experts.reshard()
    return experts


class ExpertRows:
    """The rows of one experts module, and how its slots run.

    ``order [E]``: the logical expert in each row. ``kept``: copies that forward passes without
    gradients use again, until the rows change (torch counts what is written in place).
    ``forward``: of transformers' experts: (rows [R, D], local ids [R, 1], weights [R, 1]).
    """

    def __init__(
        self, experts: nn.Module, forward: Callable[..., Tensor], order: np.ndarray, group: Any
    ) -> None:
        self.experts, self.forward, self.order, self.group = experts, forward, order, group
        self.name = ""
        self.kept: dict[str, Any] = {}
        self._stacked: dict[str, DTensor] = {}
        self._versions: list[int] = []
        self._own: Tensor | None = None
        self._exchange: RowExchange | None = None
        self._holds_once = False

    def hold_once(self) -> None:
        """Let passes without gradients compute on the rows, not on copies of FSDP2."""
        if isinstance(stored(self.experts), FSDPModule) and not self._holds_once:
            compute_on_shards(self.experts)
            self._holds_once = True

    def parameters(self) -> dict[str, DTensor]:
        """Return the stacked parameters of the module that are split over the EP group.

        What all experts share, such as a norm of their outputs, is not among them. ConfigError:
        rows could not follow the experts: a tensor is not split over them, or split further.
        """
        found: dict[str, DTensor] = {}
        module, num_experts = stored(self.experts), len(self.order)
        for key, tensor in (*module.named_parameters(), *module.named_buffers()):
            is_split = isinstance(tensor, DTensor)
            if is_split and (tensor.device_mesh.mesh_dim_names or ("",))[-1] == "ep":
                found[key] = tensor
                if len(tensor.to_local()) * tensor.device_mesh.size(-1) != num_experts:
                    raise ConfigError(
                        f"found {self.name}.{key} split over several copies of its expert group, "
                        "expected ep_size = fsdp_size * tp_size: a plan, or a low-bit store, needs "
                        "every expert whole on one rank; raise ep_size, or leave it out"
                    )
            elif tensor.ndim and len(tensor) == num_experts:
                raise ConfigError(
                    f"found {self.name}.{key} {list(tensor.shape)}, which transformers does not "
                    "split over the experts, expected only stacked parameters [E, ...]: this model "
                    "takes no plan and no low-bit store; leave it out"
                )
        return found

    @property
    def is_identity(self) -> bool:
        return bool((self.order == np.arange(len(self.order))).all())

    def place(self, slot_to_logical: np.ndarray, others: Sequence[DTensor] = ()) -> np.ndarray:
        """Move the experts where their slots are; return the new number ``[P]`` of each slot.

        Collective over the group; one tensor at a time. ``others``: tensors with a row for each
        expert, such as moments, which move with the parameters.
        """
        size, order = dist.get_world_size(self.group), slot_to_logical
        slots = np.arange(len(order))
        self._own = self._exchange = None
        found = self.parameters()
        if len(order) > len(self.order):
            layout = RowLayout(order, size, dist.get_rank(self.group))
            order, slots = layout.order, layout.slots
            self._own = torch.from_numpy(layout.own)
            self._exchange = RowExchange(layout.wanted, len(order) // size, self.group)
        if (order != self.order).any():
            exchange = RowExchange.reordering(self.order, order, self.group)
            with torch.no_grad():
                for tensor in (*found.values(), *others):
                    tensor.to_local().copy_(exchange.reorder(tensor.to_local()))
            for name, tensor in stored_parameters(self.experts).items():
                self.experts.add_module(name, tensor.moved(exchange.fetch))
        self.kept.clear()
        self.order, self._stacked = order, found
        return slots

    def run(self, rows: Tensor, tokens_per_slot: tuple[int, ...]) -> Tensor:
        """Run the slots of this rank on ``rows [R, D]``, which are ordered by slot."""
        if self._own is None:
            return self._run(rows, tokens_per_slot, torch.arange(len(tokens_per_slot)))
        own, copies = len(self._own), self._copies()
        number, first = len(tokens_per_slot) - own, sum(tokens_per_slot[:own])
        results = self._run(rows[:first], tokens_per_slot[:own], self._own)
        if number == 0:  # connected with the graph: other ranks send gradients for the rows here
            return results + 0 * sum(c.sum() for c in copies.values() if isinstance(c, Tensor))
        with other_parameters(self.experts, copies, number):
            more = self._run(rows[first:], tokens_per_slot[own:], torch.arange(number))
        return torch.cat([results, more])

    def _run(self, rows: Tensor, tokens_per_slot: tuple[int, ...], row_of_slot: Tensor) -> Tensor:
        if rows.shape[0] == 0 and not torch.is_grad_enabled():
            return rows
        if rows.shape[0] == 0:  # connected with the graph, for the exchanges of the backward pass
            row = rows.new_zeros(1, rows.shape[1]) + rows.sum(0, keepdim=True)
            first = torch.zeros(1, 1, dtype=torch.long, device=rows.device)
            return self.forward(row, first, torch.ones_like(first, dtype=rows.dtype))[:0]
        ids = torch.repeat_interleave(row_of_slot, torch.tensor(tokens_per_slot))
        ids = ids.to(rows.device)[:, None]
        return self.forward(rows, ids, torch.ones_like(ids, dtype=rows.dtype))

    def let_go_of_parameters(self) -> dict[str, Tensor]:
        """Return the rows of this rank by parameter; neither FSDP2 nor the module has them then."""
        found = self.parameters()
        remove_parameters(self.experts, found)
        self.kept.clear()
        self._stacked = {}
        return {name: parameter.to_local() for name, parameter in found.items()}

    def _copies(self) -> dict[str, Any]:
        """Return the parameters of the slots that are copies. Collective over the group."""
        assert self._exchange is not None
        if stored := stored_parameters(self.experts):
            fetch = self._exchange.fetch
            self.kept = self.kept or {name: own.moved(fetch) for name, own in stored.items()}
            return self.kept
        versions = [parameter._version for parameter in self._stacked.values()]
        if self.kept and versions == self._versions and not torch.is_grad_enabled():
            return self.kept
        parameters: dict[str, Any] = self.experts._parameters
        fetch_copies: Any = _FetchCopies.apply
        copies = fetch_copies(self._exchange, *(parameters[key] for key in self._stacked))
        found = dict(zip(self._stacked, copies, strict=True))
        self.kept, self._versions = {} if torch.is_grad_enabled() else found, versions
        return found


# -- state dicts in logical order -----------------------------------------------------------------
#
# What leaves a model and its optimizer has expert e in row e, and what enters is taken so: any
# checkpoint is a plain one, and another plan may be used when training goes on. Rows travel between
# the ranks for it, one tensor at a time, so reading and writing state dicts is collective.

_STATE_DICT_TIMEOUT_S = 60.0
_watched: "weakref.WeakSet[ExpertRows]" = weakref.WeakSet()
_placed: "weakref.WeakSet[ExpertRows]" = weakref.WeakSet()
_watching: list[Any] = []
_numbers = count()
# optimizers of experts by numbers that are the same on all ranks: they step in the same order
_followed: "weakref.WeakValueDictionary[int, torch.optim.Optimizer]" = weakref.WeakValueDictionary()


def all_ranks_are_here(what: str) -> None:
    """Raise where only some ranks read or write a state dict, instead of waiting for ever."""
    advice = (
        f"With a plan, {what} is collective: call it on every rank. The optimizer of a Trainer is "
        "saved by rank 0 alone, without the experts of the others: set save_only_model=True, and "
        "save it with transformers.distributed.checkpoint.save_optimizer_distributed"
    )
    gather_answers(None, what, _STATE_DICT_TIMEOUT_S, advice)


@torch.no_grad()
def _reordered(rows: ExpertRows, tensor: DTensor, leaving: bool) -> DTensor:
    """Return it in logical order (``leaving``), or in that of the rows. Takes room for two rows."""
    logical = np.arange(len(rows.order))
    current, target = (rows.order, logical) if leaving else (logical, rows.order)
    exchange = RowExchange.reordering(current, target, rows.group)
    return DTensor.from_local(
        exchange.reorder(tensor.to_local()),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def keep_checkpoints_logical(rows: ExpertRows, first: bool) -> None:
    """Let ``state_dict`` and ``load_state_dict`` of a module see its experts in logical order. Both
    become collective; the ``first`` module of a model checks that all ranks are there. A second
    call changes nothing.
    """
    if rows in _placed:
        return

    def reordered(state: dict[str, Any], prefix: str, leaving: bool) -> None:
        if first:
            all_ranks_are_here("state_dict()" if leaving else "load_state_dict()")
        if rows.is_identity:
            return
        for key, parameter in rows.parameters().items():
            value = state.get(prefix + key)
            if value is None:
                continue
            if not isinstance(value, DTensor) or value.placements != parameter.placements:
                raise PlacementError(
                    f"found {prefix}{key} as {type(value).__name__}, expected a DTensor that is "
                    "split as the model's, to put its experts in the order of the plan: load it "
                    "with torch.distributed.checkpoint, or before moe_locality.apply"
                )
            state[prefix + key] = _reordered(rows, value, leaving)

    def after_save(_module: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        reordered(state, prefix, leaving=True)

    def before_load(_module: Any, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
        rows.kept.clear()
        reordered(state, prefix, leaving=False)

    rows.experts.register_state_dict_post_hook(after_save)
    rows.experts.register_load_state_dict_pre_hook(before_load)
    _placed.add(rows)


def watch_optimizers(rows: ExpertRows) -> None:
    """Follow every optimizer that holds these experts from its first step on."""
    _watched.add(rows)  # torch.distributed.checkpoint makes a step itself before it loads
    if not _watching:
        _watching.append(register_optimizer_step_pre_hook(_before_step))


def _before_step(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    for rows in _placed:
        rows.kept.clear()
    if _is_followed(optimizer):
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) in stepped for rows in _watched for p in stored(rows.experts).parameters()):
        follow_optimizer(optimizer)


def _is_followed(optimizer: torch.optim.Optimizer) -> bool:
    return any(known is optimizer for known in _followed.values())


def followed_optimizers() -> list[torch.optim.Optimizer]:
    """Return the optimizers that are followed and that live on all ranks. Collective."""
    alive = dict(_followed.items())  # items() holds them: between a key and its value one may end
    everywhere = set(alive).intersection(*exchange_objects(list(alive)))
    return [alive[number] for number in sorted(everywhere)]


def tensors_beside(
    rows: ExpertRows, optimizers: list[torch.optim.Optimizer] | None = None
) -> list[DTensor]:
    """Return the gradients and moments (of ``optimizers``; None: of all that this rank follows) of
    an experts module: they move with its parameters. PlacementError: one keeps its state otherwise.
    """
    found, optimizers = [], list(_followed.values()) if optimizers is None else optimizers
    for parameter in rows.parameters().values():
        if isinstance(parameter.grad, DTensor):
            found.append(parameter.grad)
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.ndim:
                    found.append(_split_as(parameter, rows, key, value))
    return found


def _rows_of(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, ExpertRows | None]]:
    """Return the parameters of an optimizer, numbered as in its state dict, with their rows."""
    order_of = {id(parameter): rows for rows in _placed for parameter in rows.parameters().values()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [(p, order_of.get(id(p))) for p in parameters]


def follow_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Let the state dict of an optimizer hold the moments in the order of the logical experts.
    ConfigError: it already has moments, in logical order, of experts that lie otherwise.
    """
    if _is_followed(optimizer):
        return
    placed = [parameter for parameter, rows in _rows_of(optimizer) if rows is not None]
    states = [state for p in placed if (state := optimizer.state.get(p))]
    if any(float(state.get("step", 1)) for state in states):  # Adagrad's has no steps at first
        raise ConfigError(
            f"found a {type(optimizer).__name__} whose state was loaded before its first step, "
            "while a plan orders the experts: the moments are those of other experts; load them "
            "with transformers.distributed.checkpoint.load_optimizer_distributed, or call "
            "moe_locality.apply(model, optimizer=optimizer) before load_state_dict"
        )
    _followed[next(_numbers)] = optimizer

    def reordered(state_dict: dict[str, Any], leaving: bool) -> dict[str, Any]:
        owners = _rows_of(optimizer)
        if all(rows is None for _, rows in owners):
            return state_dict
        what = "the optimizer's " + ("state_dict()" if leaving else "load_state_dict()")
        all_ranks_are_here(what)
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        found = dict(state_dict["state"])
        for number, (parameter, rows) in zip(numbers, owners, strict=True):
            if rows is None or rows.is_identity or number not in found:
                continue
            found[number] = state = dict(found[number])
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim:
                    state[key] = _reordered(rows, _split_as(parameter, rows, key, value), leaving)
        return {**state_dict, "state": found}

    optimizer.register_state_dict_post_hook(lambda _, state: reordered(state, leaving=True))
    optimizer.register_load_state_dict_pre_hook(lambda _, state: reordered(state, leaving=False))


def _split_as(parameter: Any, rows: ExpertRows, key: str, value: Tensor) -> DTensor:
    if isinstance(value, DTensor) and value.placements == parameter.placements:
        return value
    raise PlacementError(
        f"found optimizer state {key!r} {list(value.shape)} of {rows.name}, expected a DTensor "
        "that is split as the experts: with a plan, use an optimizer that keeps its state so, "
        "such as torch.optim.AdamW, and torch.distributed.checkpoint to load it"
    )
