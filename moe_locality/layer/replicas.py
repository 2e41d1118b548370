"""Give the layers of a model more slots than experts: placements with replicas.

Every rank of an EP group holds P / G expert modules, one for each of its slots. The model computes
the same function: the router keeps its E rows, in logical order, and each rank sends a token to
the replica that serves its own tokens (``placement/serving.py``).

Replicas are added before ``deepspeed.initialize``, so that optimizer, ZeRO and expert-data-parallel
groups see the parameters of all slots. The modules that a rank has stay the same objects and come
first; new ones follow.
"""

import copy
import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_locality import compat
from moe_locality.dispatch.dispatcher import SlotMap
from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer.agreement import all_succeed
from moe_locality.layer.relabeling import (
    Target,
    agree_on_layers,
    check_one_ep_size,
    facts_of,
    refuse_tied,
    targets_for,
)
from moe_locality.layer.relocate import wire_device
from moe_locality.layer.state import (
    LayerReplicas,
    check_no_gradients,
    current_order,
    moe_modules,
    packed,
    permute_gate,
    plan_rows,
    set_slot_to_logical,
    unpacked,
)
from moe_locality.placement.plan import PlacementPlan, source_slots

logger = logging.getLogger(__name__)

NOT_COUNTED = "ds_pipe_replicated"
"""DeepSpeed's mark of a parameter that another rank holds too: ZeRO leaves it out of the norm of
the gradients, so that each logical expert counts once.
"""


def add_replicas(
    model: nn.Module, plan: PlacementPlan, *, group: dist.ProcessGroup | None = None
) -> None:
    """Give every MoE layer of ``model`` the slots of ``plan``, in place. Collective.

    Experts are copied point to point inside the EP group, layer by layer; a rank needs room for the
    experts of one layer beside the model. The same plan again changes nothing.

    Args:
        model: with layers of ours (``apply`` swaps them), before ``deepspeed.initialize``.
        plan, group: see :func:`moe_locality.relabel`.

    Raises:
        PlacementError: the plan does not fit, or the model has other replicas already.
        ConfigError: the model is part of an engine, has gradients, or a group is missing. All
            errors rise on all ranks, and nothing has changed then.
    """

    def check() -> tuple[list[Target], list[Any]]:
        targets, facts = _targets(model, plan, group), []
        for target in targets:
            layer = target.module.deepspeed_moe
            trained = [p.requires_grad for p in layer.experts.deepspeed_experts[0].parameters()]
            facts.append((*facts_of(target), trained, layer.replicas is not None))
        return targets, facts

    targets, facts = all_succeed(check)
    agree_on_layers(plan.digest(), facts)
    maps: dict[int, list[SlotMap]] = {}
    for row, target in zip(plan_rows(model, plan), targets, strict=True):
        if target.module.deepspeed_moe.replicas is None:
            rank = dist.get_rank(target.group)
            maps[rank] = maps.get(rank) or SlotMap.of_plan(plan, rank)
            _build(target, maps[rank][row])
    facts = (plan.num_slots, plan.num_experts, len(targets))
    logger.info("moe_locality: up to %d slots for %d experts in %d MoE layers", *facts)


def has_replicas(model: nn.Module) -> bool:
    """Return whether a layer of the model has more slots than experts."""
    return any(replicas_of(module) is not None for _, module in moe_modules(model))


def replicas_of(module: Any) -> LayerReplicas | None:
    """Return the slots of a layer that has replicas, None for any other."""
    return getattr(module.deepspeed_moe, "replicas", None)


def with_new_parameters(model: nn.Module, given: Any) -> Any:
    """Add the parameters of replicas to those that are trained.

    ``given``: what ``deepspeed.initialize`` takes as ``model_parameters``, collected before there
    were replicas: parameters or groups of them (dicts); or a torch optimizer, which is changed in
    place. A new parameter follows that of its name in the rank's last earlier expert, in its group.
    ConfigError: an optimizer that has state already."""
    followers = _followers(model)
    if isinstance(given, torch.optim.Optimizer):
        groups = given.param_groups
    else:
        items = list(given)
        if not any(isinstance(item, dict) for item in items):
            return _extended(items, followers, {id(p) for p in items})
        given = groups = [dict(group) for group in items]
        for group in groups:
            one = isinstance(group["params"], Tensor)
            group["params"] = [group["params"]] if one else list(group["params"])
    known = {id(p) for group in groups for p in group["params"]}
    if all(id(p) in known for new in followers.values() for p in new):
        return given
    if getattr(given, "state", None):
        raise ConfigError(
            "found an optimizer that has taken steps, and a plan with replicas, expected a new "
            "optimizer: make it after the replicas were added, with moe_locality.apply"
        )
    for group in groups:
        group["params"] = _extended(group["params"], followers, known)
    return given


def _followers(model: nn.Module) -> dict[int, list[Tensor]]:
    """For a parameter (by id) of a rank's last earlier expert, those of its name in new ones."""
    found: dict[int, list[Tensor]] = {}
    for _, module in moe_modules(model):
        if replicas_of(module) is not None:
            experts = list(module.deepspeed_moe.experts.deepspeed_experts)
            earlier = module.num_experts // module.ep_size
            for name, parameter in experts[earlier - 1].named_parameters():
                found[id(parameter)] = [new.get_parameter(name) for new in experts[earlier:]]
    return found


def _extended(
    parameters: Iterable[Tensor], followers: dict[int, list[Tensor]], known: set[int]
) -> list[Tensor]:
    extended: list[Tensor] = []
    for parameter in parameters:
        extended.append(parameter)
        extended += [p for p in followers.get(id(parameter), ()) if id(p) not in known]
    return extended


def _targets(
    model: nn.Module, plan: PlacementPlan, group: dist.ProcessGroup | None
) -> list[Target]:
    layers = moe_modules(model)
    check_one_ep_size(layers)
    refuse_tied(model, "and a plan with replicas", "run this model without replicas")
    orders = [plan.experts_of_slots(row) for row in plan_rows(model, plan)]
    for order, (name, module) in zip(orders, layers, strict=True):
        plan.check_fits(num_experts=module.num_experts, num_ranks=module.ep_size)
        _check_layer(name or "the model", module, order)
    return targets_for(layers, orders, group)


def _check_layer(name: str, module: Any, wanted: np.ndarray) -> None:
    layer = module.deepspeed_moe
    if not hasattr(layer, "replicas"):
        raise ConfigError(
            f"{name}: found a layer of DeepSpeed's, expected one of moe_locality, which alone can "
            "serve replicas: call moe_locality.apply(model, plan=plan)"
        )
    if layer.replicas is not None:
        if not np.array_equal(layer.replicas.slot_to_logical, wanted):
            raise PlacementError(
                f"{name}: found a layer with the replicas of another plan, expected one without: "
                "build the model anew, and load its checkpoint"
            )
        return
    if layer.ep_group is not None:
        raise ConfigError(
            f"{name}: found a layer that is part of an engine, or whose groups are set, expected "
            "one before deepspeed.initialize, which has to see the parameters of all replicas"
        )
    if compat.tensor_parallel_size() > 1:
        raise ConfigError(
            f"{name}: found tensor parallelism and a plan with replicas, expected data and expert "
            "parallelism only: use a plan without replicas"
        )
    check_no_gradients(module.deepspeed_moe, name)


@torch.no_grad()
def _build(target: Target, serving: SlotMap) -> None:
    """Make and fill the modules of a layer's slots; update layer and gate."""
    module, group = target.module, target.group
    assert group is not None, "replicas need several ranks"
    layer: Any = module.deepspeed_moe
    replicas = LayerReplicas(target.slot_to_logical, dist.get_rank(group), module.ep_size)
    current = current_order(module)
    experts = layer.experts.deepspeed_experts
    sources = source_slots(current, replicas.slot_to_logical, module.ep_size)
    received = _fetch([_tensors(expert) for expert in experts], sources, replicas, group)
    for _ in range(replicas.slots_per_rank - len(experts)):
        experts.append(_twin(experts[0]))
    for expert, values in zip(experts, received, strict=True):
        for tensor, value in zip(_tensors(expert), values, strict=True):
            tensor.data.copy_(value)
    for local in replicas.extra_local_slots:
        for parameter in experts[local].parameters():
            setattr(parameter, NOT_COUNTED, True)
    for part in (module, layer, layer.experts):
        part.num_local_experts = replicas.slots_per_rank
    permute_gate(layer.gate, np.argsort(current))
    set_slot_to_logical(module, np.arange(module.num_experts))
    layer.gate.serving, layer.replicas, layer.dispatcher = serving, replicas, None


def _tensors(expert: nn.Module) -> list[Tensor]:
    return [*expert.buffers(), *expert.parameters()]


def _twin(expert: nn.Module) -> nn.Module:
    """Copy a module with DeepSpeed's attributes of its parameters (allreduce, group_name)."""
    twin = copy.deepcopy(expert)
    for new, old in zip(twin.parameters(), expert.parameters(), strict=True):
        for key, value in vars(old).items():
            setattr(new, key, value)
    return twin


def _fetch(
    tensors: list[list[Tensor]],
    sources: np.ndarray,
    replicas: LayerReplicas,
    group: dist.ProcessGroup,
) -> list[list[Tensor]]:
    """Return the new tensors of each slot of this rank; in round j all ranks get their slot j."""
    ranks = dist.get_process_group_ranks(group)
    own, per_rank = replicas.ep_rank, len(tensors)
    device = wire_device(group, tensors[0][0])
    found = []
    for local in range(replicas.slots_per_rank):
        # rank r gets its slot `local` from this slot
        wanted = sources[local :: replicas.slots_per_rank].tolist()
        leaving = {slot for r, slot in enumerate(wanted) if slot // per_rank == own and r != own}
        buffers = {slot: packed(tensors[slot - own * per_rank], device) for slot in leaving}
        operations = [
            dist.P2POp(dist.isend, buffers[slot], ranks[r], group)
            for r, slot in enumerate(wanted)
            if slot in leaving and r != own
        ]
        source = wanted[own]
        like = tensors[source % per_rank]
        incoming = packed(like, device)  # a copy, where it stays on this rank
        if source // per_rank != own:
            operations.append(dist.P2POp(dist.irecv, incoming, ranks[source // per_rank], group))
        for request in dist.batch_isend_irecv(operations) if operations else ():
            request.wait()
        found.append(unpacked(incoming, like))
    return found
