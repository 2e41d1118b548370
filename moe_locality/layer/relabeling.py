"""Put a placement without replicas into router and experts of a live model: the same function.

Such a placement is a permutation: the expert of slot s, and the router row that names it, move to
slot s. Experts that change rank travel point to point inside the expert-parallel group; the others
move on their rank. The weights are then those of a plain DeepSpeed model with another numbering,
which ``slot_to_logical`` of each layer states.

All checks run, and all ranks agree on them, before anything moves.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moe_locality import compat
from moe_locality.errors import ConfigError, MoeLocalityError, PlacementError
from moe_locality.layer.agreement import all_agree, all_succeed
from moe_locality.layer.relocate import (
    TIMEOUT_S,
    MoveReport,
    RolledBackError,
    layer_shards,
    move_experts,
    signals_deferred,
)
from moe_locality.layer.state import (
    StateSource,
    check_between_steps,
    check_no_gradients,
    check_state_moves,
    current_order,
    gate_rows,
    has_auto_ep,
    is_engine,
    layout_of,
    moe_modules,
    no_state,
    plan_rows,
    set_slot_to_logical,
    state_source,
)
from moe_locality.placement.plan import PlacementPlan, check_is_permutation


@dataclass(frozen=True, slots=True)
class Target:
    """A layer, its new slot order ([E], or [P] with replicas), its EP group (None: ep_size 1)."""

    name: str
    module: Any
    slot_to_logical: np.ndarray
    group: dist.ProcessGroup | None


def relabel(
    model_or_engine: Any,
    plan: PlacementPlan,
    *,
    group: dist.ProcessGroup | None = None,
    weights_only: bool = False,
    timeout_s: float = TIMEOUT_S,
) -> MoveReport:
    """Put the experts of every MoE layer into the slots that ``plan`` names, in place.

    Collective: every rank of the default process group calls it with the same plan. The function
    that the model computes stays the same; the same plan again moves nothing.

    Args:
        model_or_engine: a model with DeepSpeed MoE layers (ours or stock), before
            ``deepspeed.initialize``; or the engine, at ZeRO stage 0, 1 or 2 in fp32, bf16 or fp16:
            fp32 masters and moments then move along.
        plan: its ``layer_ids`` are the transformer layers of the model that have experts.
        group: EP group of this rank, needed only where neither the layers nor DeepSpeed know one
            yet and ``ep_size`` is neither 1 nor the number of ranks.
        weights_only: move the weights of a model that has its groups, and no optimizer state. Only
            where there is none: an engine that trains this model would be corrupted.

    Raises:
        PlacementError: the plan does not fit, has replicas, or differs between ranks.
        ConfigError: optimizer state that cannot move (ZeRO, fp32 masters), pending gradients, or a
            group that is missing. All errors rise on all ranks, and nothing has moved then.
    """
    engine = model_or_engine if is_engine(model_or_engine) else None

    def prepare() -> tuple[list[Target], StateSource]:
        model = model_or_engine if engine is None else engine.module
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(
                f"found a {type(model).__name__}, expected a torch module or a DeepSpeed engine"
            )
        if has_auto_ep(model):
            raise ConfigError(
                "found layers of DeepSpeed AutoEP, expected deepspeed.moe.layer.MoE: place their "
                "experts with moe_locality.apply(engine, plan=plan)"
            )
        targets = plan_targets(model, plan, group)
        for target in targets:
            check_no_gradients(target.module.deepspeed_moe, target.name)
        if engine is not None:
            check_between_steps(engine)
            return targets, state_source(engine)
        _check_bare(targets, weights_only)
        return targets, no_state

    digest = plan.digest() if isinstance(plan, PlacementPlan) else repr(plan)
    report = relabel_to(prepare, digest, timeout_s=timeout_s)
    if engine is not None:
        if getattr(engine, "moe_locality", None) is None:
            engine.moe_locality_plan = plan
        else:
            engine.moe_locality.plan = plan
    return report


def plan_of(engine: Any) -> PlacementPlan | None:
    """Return the plan that an engine follows: that of its last relabel, or of its start."""
    runtime = getattr(engine, "moe_locality", None)
    return getattr(engine, "moe_locality_plan", None) if runtime is None else runtime.plan


def relabel_to(prepare: Any, digest: str, *, timeout_s: float = TIMEOUT_S) -> MoveReport:
    """Check on every rank, agree (or all raise), then move. ``prepare() -> (targets, state)`` calls
    no collectives."""

    def check() -> tuple[list[Target], StateSource, list[Any]]:
        targets, state = prepare()
        for target in targets:
            check_state_moves(target.module, state, target.name)
        return targets, state, [facts_of(target, state) for target in targets]

    targets, state, facts = all_succeed(check)
    agree_on_layers(digest, facts)
    with signals_deferred():
        return _move_layers(targets, state, timeout_s)


def agree_on_layers(plan_digest: str, facts: list[Any]) -> None:
    """Raise PlacementError on all ranks unless all have one plan and like layers. Collective."""
    all_agree("plans", plan_digest)
    all_agree("models or placements", hashlib.sha256(repr(facts).encode()).hexdigest())


def facts_of(target: Target, state: StateSource = no_state) -> tuple[Any, ...]:
    """Return what must be the same on all ranks for a layer."""
    module = target.module
    experts = module.deepspeed_moe.experts.deepspeed_experts
    orders = (current_order(module).tolist(), target.slot_to_logical.tolist())
    return target.name, *orders, layout_of(experts[0], state)


def _move_layers(targets: list[Target], state: StateSource, timeout_s: float) -> MoveReport:
    """Move layer after layer; each is finished, or rolled back."""
    report = MoveReport()
    for number, target in enumerate(targets):
        try:
            move_experts(
                partial(layer_shards, target.module, state),
                current_order(target.module),
                target.slot_to_logical,
                num_ranks=target.module.ep_size,
                group=target.group,
                report=report,
                name=target.name,
                timeout_s=timeout_s,
            )
        except RolledBackError as error:
            failure = PlacementError(
                f"{target.name}: moving its experts failed ({error}): this layer is in its old "
                f"order again, {number} layers before it are in the new order and "
                f"{len(targets) - number - 1} after it in the old one, on all ranks: relabel again "
                "to finish, or continue training as it is"
            )
            if error.stop is not None:
                raise error.stop from failure
            raise failure from error
        set_slot_to_logical(target.module, target.slot_to_logical)
    report.log("relabelled")
    return report


def plan_targets(
    model: torch.nn.Module, plan: PlacementPlan, group: dist.ProcessGroup | None = None
) -> list[Target]:
    """Match the rows of ``plan`` with the MoE layers of ``model``.
    PlacementError: it does not fit."""
    check_is_permutation(plan)
    layers = moe_modules(model)
    check_one_ep_size(layers)
    sizes = sorted({module.num_experts for _, module in layers})
    if len(sizes) > 1:
        raise PlacementError(
            f"found MoE layers with different numbers of experts ({sizes}), expected one number: a "
            "plan has the same experts in every layer; this model cannot be placed"
        )
    plan.check_fits(num_experts=sizes[0] if sizes else None)
    rows = plan_rows(model, plan)
    for name, module in layers:
        if getattr(module.deepspeed_moe, "replicas", None) is not None:
            raise PlacementError(
                f"{name or 'the model'}: found a layer with replicas, expected one slot per "
                "expert: replicas do not move; save a checkpoint, start anew with the other plan, "
                "and load it"
            )
        # with one rank per EP group every order is on that rank: the plan's ranks do not matter
        plan.check_fits(num_ranks=module.ep_size if module.ep_size > 1 else None)
    orders = [plan.physical_to_logical_map[row].astype(np.int64) for row in rows]
    targets = targets_for(layers, orders, group)
    check_tied_stay(model, targets, [current_order(target.module) for target in targets])
    return targets


def targets_for(
    layers: Sequence[tuple[str, Any]],
    orders: Sequence[np.ndarray],
    group: dist.ProcessGroup | None = None,
) -> list[Target]:
    """Return a target for each of the named layers, with the slot order of its place."""
    return [
        Target(name or "the model", module, order, find_group(module, group))
        for (name, module), order in zip(layers, orders, strict=True)
    ]


def check_one_ep_size(layers: Sequence[tuple[str, Any]]) -> None:
    """Raise PlacementError where two layers spread their experts over different ranks."""
    sizes = sorted({module.ep_size for _, module in layers} - {1})
    if len(sizes) > 1:
        raise PlacementError(
            f"found MoE layers with different ep_size ({sizes}), expected one: a plan has one "
            "number of ranks for all layers, so this model cannot be placed; give its layers one "
            "ep_size, or run it without a plan"
        )


def tied_layers(model: torch.nn.Module) -> dict[str, str]:
    """Return the MoE layers that share a tensor of router or experts, with its owners in words."""
    owners: dict[int, dict[str, str]] = {}  # of a tensor: place -> name of its MoE layer
    inside: set[int] = set()
    for name, module in moe_modules(model):
        layer, inner = name or "the model", module.deepspeed_moe
        places = {f"the router of {layer}": [*gate_rows(inner.gate).values()]}
        experts: Any = inner.experts.deepspeed_experts
        for number, expert in enumerate(experts):
            places[f"expert {number} of {layer}"] = [*expert.buffers(), *expert.parameters()]
        for place, tensors in places.items():
            for tensor in tensors:
                owners.setdefault(_memory_of(tensor), {})[place] = layer
        inside.update(map(id, inner.gate.modules()), map(id, inner.experts.modules()))
    for name, module in model.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for leaf, tensor in tensors if id(module) not in inside else ():
            if _memory_of(tensor) in owners:
                owners[_memory_of(tensor)].setdefault(f"{name}.{leaf}", "")
    found: dict[str, str] = {}
    for places in owners.values():
        for layer in places.values() if len(places) > 1 else ():
            found.setdefault(layer, " = ".join(places))
    found.pop("", None)
    return found


def _memory_of(tensor: torch.Tensor) -> int:
    return tensor.data_ptr() or id(tensor)  # parts of ZeRO-3 and meta tensors have no address


def check_tied_stay(
    model: torch.nn.Module, targets: list[Target], current: Sequence[np.ndarray]
) -> None:
    """Raise PlacementError where a layer that shares tensors would get another order than now."""
    pairs = zip(targets, current, strict=True)
    moved = {target.name for target, order in pairs if (target.slot_to_logical != order).any()}
    instead = "give a plan that leaves this layer in the order it has"
    refuse_tied(model, "and a plan that moves them", instead, layers=moved)


def refuse_tied(
    model: torch.nn.Module,
    why: str,
    instead: str,
    error: type[MoeLocalityError] = PlacementError,
    layers: set[str] | None = None,
) -> None:
    """Raise ``error`` where a layer (one of ``layers``) shares a tensor with another place."""
    for name, places in tied_layers(model).items():
        if layers is None or name in layers:
            raise error(
                f"{name}: found tensors that several places share ({places}) {why}, expected "
                "experts and router of each layer to be its own: moved for one place they would "
                f"be wrong for the other. Untie them (a copy for each layer), or {instead}"
            )


def find_group(module: Any, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the EP group of a layer: its own, the one given, DeepSpeed's, or all ranks.
    ConfigError: there is none, or one of another size."""
    if module.ep_size == 1:
        return None
    name = module.expert_group_name
    if not dist.is_initialized():
        raise ConfigError(
            f"found a layer with ep_size {module.ep_size} and no process group, expected one: call "
            "deepspeed.init_distributed() before relabel"
        )
    found = module.deepspeed_moe.ep_group or group or compat.expert_parallel_group(name)
    if found is None and dist.get_world_size() == module.ep_size:
        found = dist.group.WORLD
    if found is None:
        raise ConfigError(
            f"found no expert-parallel group {name!r} on {dist.get_world_size()} ranks, expected "
            "one: give relabel(..., group=...), register groups first, or relabel the engine after "
            "deepspeed.initialize"
        )
    if dist.get_world_size(found) != module.ep_size:
        raise ConfigError(
            f"found an expert-parallel group of {dist.get_world_size(found)} ranks, expected "
            f"ep_size {module.ep_size}: give the group of this rank's experts"
        )
    return found


def _check_bare(targets: list[Target], weights_only: bool) -> None:
    """Refuse a bare module that an engine may be training: its optimizer state could not move."""
    for target in targets:
        if any(hasattr(parameter, "ds_id") for parameter in target.module.parameters()):
            raise ConfigError(
                f"{target.name}: found parameters partitioned by ZeRO stage 3, expected whole "
                "ones: DeepSpeed's MoE layers do not run under stage 3; use a lower stage"
            )
        if target.module.deepspeed_moe.ep_group is not None and not weights_only:
            raise ConfigError(
                f"{target.name}: found a model that is already part of an engine (its expert "
                "groups are set), expected the engine, whose optimizer state has to move with the "
                "experts: call relabel(engine, plan); for a model without an optimizer pass "
                "weights_only=True"
            )
