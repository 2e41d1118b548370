"""State dicts in logical order, while the experts of a model stay where a plan put them.

What leaves a model and its optimizer has expert e in row e, and what enters is taken so: any
checkpoint is a plain one, and another plan may be used when training goes on. Rows travel between
the ranks for it, one tensor at a time, so reading and writing state dicts is collective.
"""

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.integrations.expert_rows import ExpertRows, expert_parameters, in_order, stored
from moe_locality.layer.agreement import gather_answers
from moe_locality.topology.groups import exchange_objects

_STATE_DICT_TIMEOUT_S = 60.0
_watched: "weakref.WeakSet[ExpertRows]" = weakref.WeakSet()
_placed: "weakref.WeakSet[ExpertRows]" = weakref.WeakSet()
_watching: list[Any] = []
_followed: "dict[int, weakref.ref[torch.optim.Optimizer]]" = {}
"""Optimizers of experts by their numbers, which are the same on all ranks: they step in the same
order."""


def all_ranks_are_here(what: str) -> None:
    """Raise where only some ranks read or write a state dict, instead of waiting for ever."""
    advice = (
        f"With a plan, {what} is collective: call it on every rank. The optimizer of a Trainer is "
        "saved by rank 0 alone, without the experts of the others: set save_only_model=True, and "
        "save it with transformers.distributed.checkpoint.save_optimizer_distributed"
    )
    gather_answers(None, what, _STATE_DICT_TIMEOUT_S, advice)


def _reordered(rows: ExpertRows, tensor: DTensor, leaving: bool) -> DTensor:
    """Return ``tensor`` in logical order (``leaving``), or in that of the rows. Collective."""
    logical = np.arange(len(rows.order))
    current, target = (rows.order, logical) if leaving else (logical, rows.order)
    return in_order(tensor, current, target, rows.group)


def keep_checkpoints_logical(rows: ExpertRows, first: bool) -> None:
    """Let ``state_dict`` and ``load_state_dict`` of a module see its experts in logical order.

    Both become collective; the ``first`` module of a model checks that all ranks are there. A
    second call changes nothing.
    """
    if rows in _placed:
        return

    def reordered(state: dict[str, Any], prefix: str, leaving: bool) -> None:
        if first:
            all_ranks_are_here("state_dict()" if leaving else "load_state_dict()")
        if rows.is_identity:
            return
        parameters = expert_parameters(rows.experts, rows.name, len(rows.order))
        for key, parameter in parameters.items():
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
    """Follow every optimizer that holds these experts from its first step on.

    torch.distributed.checkpoint makes such a step itself before it loads.
    """
    _watched.add(rows)
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
    return any(ref() is optimizer for ref in _followed.values())


def followed_optimizers() -> list[torch.optim.Optimizer]:
    """Return the optimizers that are followed and that live on all ranks. Collective."""
    alive = {number: ref() for number, ref in _followed.items()}
    numbers = [number for number, optimizer in alive.items() if optimizer is not None]
    everywhere = set(numbers).intersection(*exchange_objects(numbers))
    return [optimizer for number in sorted(everywhere) if (optimizer := alive[number]) is not None]


def tensors_beside(
    rows: ExpertRows, optimizers: list[torch.optim.Optimizer] | None = None
) -> list[DTensor]:
    """Return the gradients and moments of an experts module: they move with its parameters.

    optimizers: whose moments; None: of all that this rank follows.

    Raises:
        PlacementError: an optimizer keeps its state in another form.
    """
    found = []
    if optimizers is None:
        optimizers = [known for ref in _followed.values() if (known := ref()) is not None]
    for parameter in expert_parameters(rows.experts, rows.name, len(rows.order)).values():
        if isinstance(parameter.grad, DTensor):
            found.append(parameter.grad)
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.ndim:
                    found.append(_split_as(parameter, rows, key, value))
    return found


def _rows_of(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, ExpertRows | None]]:
    """Return the parameters of an optimizer, numbered as in its state dict, with their rows."""
    order_of = {
        id(parameter): rows
        for rows in _placed
        for parameter in expert_parameters(rows.experts, rows.name, len(rows.order)).values()
    }
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [(p, order_of.get(id(p))) for p in parameters]


def follow_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Let the state dict of an optimizer hold the moments in the order of the logical experts.

    Raises:
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
    _followed[len(_followed)] = weakref.ref(optimizer)

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
            found[number] = {
                key: _reordered(rows, _split_as(parameter, rows, key, value), leaving)
                if isinstance(value, Tensor) and value.ndim
                else value
                for key, value in found[number].items()
            }
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
