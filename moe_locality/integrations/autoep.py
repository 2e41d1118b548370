"""DeepSpeed AutoEP with our exchange and placement.

AutoEP builds its layers inside ``deepspeed.initialize``: router, shared experts, optimizer groups
and checkpoints stay its own. :func:`adopt` then assigns a subclass in place that overrides one
method, ``_deepep_route``: the way of routed tokens to their experts and back.

With a plan, the router stays in logical order and the experts move between the ranks of the EP
group (weights, fp32 masters and moments), once. Checkpoints hold experts in logical order
(:func:`wrap_checkpoints`), so stock AutoEP and DeepSpeed's universal conversion read them.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import deepspeed.comm
import numpy as np
import torch
from deepspeed.module_inject.auto_ep_comm import DEEPEP_BACKEND
from deepspeed.module_inject.auto_ep_layer import (
    AutoEPMoELayer,
    RouterOutput,
    apply_scores_before_experts_if_enabled,
    permute_by_local_expert,
    unpermute_by_local_expert,
)
from torch import Tensor, nn

from moe_locality.compat import registered_expert_ranks
from moe_locality.config import MoeLocalityConfig, refuse_settings
from moe_locality.dispatch.desync import CallPosition
from moe_locality.dispatch.dispatcher import ExchangingLayer, SlotMap, run_moe
from moe_locality.errors import ConfigError
from moe_locality.layer.agreement import LostRanks, all_succeed
from moe_locality.layer.relocate import place_stacked
from moe_locality.layer.state import (
    check_between_steps,
    check_no_gradients,
    is_engine,
    plan_rows,
    stacked_shards,
    state_source,
)
from moe_locality.placement.plan import PlacementPlan, check_is_permutation, check_nodes
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.topology.groups import follow_groups
from moe_locality.trace.recorder.hooks import route_hooks

logger = logging.getLogger(__name__)
_KEEP_STOCK = "set enabled to false in the moe_locality section"


class LocalityAutoEPMoELayer(ExchangingLayer, AutoEPMoELayer):
    """``AutoEPMoELayer`` with our exchange; :func:`adopt` makes one of a layer that AutoEP built.
    ``slot_to_logical [E]``: the expert of each slot; slot s is in row ``s % e`` of rank ``s // e``.
    """

    calls_route_hooks = True
    slot_to_logical: np.ndarray
    slot_map: SlotMap

    @torch.compiler.disable  # pyright: ignore[reportArgumentType]
    def _deepep_route(self, tokens: Tensor, ro: RouterOutput) -> Tensor:
        """``tokens [T, H]`` to ``[T, H]``: dispatch, experts, combine."""
        ids, scores = ro.selected_experts, ro.top_scores
        dispatcher = self.get_dispatcher(
            self.ep_group,
            self.slot_map,
            num_slots=self.num_experts,
            num_ranks=self.ep_size,
            top_k=self.top_k,
            comm=deepspeed.comm,
        )
        for record in route_hooks(self).values():
            record(ids, scores)
        if self.score_apply == "post":
            return run_moe(dispatcher, tokens, ids, scores, self._run_experts)
        # the score scales what an expert reads, so every route is a row of its own
        rows = apply_scores_before_experts_if_enabled(
            tokens.repeat_interleave(self.top_k, dim=0), scores.reshape(-1), "pre"
        )
        ids, ones = ids.reshape(-1, 1), torch.ones_like(scores).reshape(-1, 1)
        results = run_moe(dispatcher, rows, ids, ones, self._run_experts)
        return results.view(-1, self.top_k, tokens.shape[1]).sum(dim=1)

    def _run_experts(self, rows: Tensor, tokens_per_expert: tuple[int, ...]) -> Tensor:
        """Run the local experts on rows that are padded as their grouped product wants them."""
        counts = torch.tensor(tokens_per_expert, dtype=torch.int32, device=rows.device)
        padded, order, aligned, num_rows = permute_by_local_expert(rows, counts)
        return unpermute_by_local_expert(self.experts(padded, aligned), order, num_rows)

    def set_order(self, slot_to_logical: np.ndarray) -> None:
        """Say which expert each slot holds; moves no weights."""
        self.slot_to_logical, self.slot_map = slot_to_logical, SlotMap.of(slot_to_logical)


def auto_ep_layers(model: nn.Module) -> list[tuple[str, AutoEPMoELayer]]:
    """Return (name, layer) of every AutoEP layer, ours too, in ``named_modules`` order."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, AutoEPMoELayer)]


def adopt(
    engine: nn.Module,
    section: MoeLocalityConfig,
    topology: ClusterTopology | None,
    plan: PlacementPlan | None = None,
) -> list[str]:
    """Give every AutoEP layer of an engine our exchange, and place its experts. Collective.

    Layers of one rank, of AutoTP folding or with DeepEP as their backend stay as they are, with a
    line in the log. A second call changes the settings. Returns the names of the layers.
    ``engine``: what ``deepspeed.initialize`` made; without a plan also its module. Raises, on all
    ranks, ConfigError: an option that our exchange cannot keep, or a plan that cannot be applied;
    PlacementError: the plan does not fit.
    """
    layers = auto_ep_layers(engine.module if is_engine(engine) else engine)  # pyright: ignore
    ours, orders = all_succeed(lambda: _check(engine, layers, section, plan))
    if ours and topology is None:
        found = registered_expert_ranks(ours[0][1].ep_size)
        ranks = None if found is None else found[0]
        topology, layout = follow_groups(ranks, cluster_config=section.cluster)
        if plan is not None:
            check_nodes(plan, topology, layout.ep_groups)
    for number, (name, layer) in enumerate(ours):
        if not isinstance(layer, LocalityAutoEPMoELayer):
            layer.__class__ = LocalityAutoEPMoELayer
            layer.set_order(np.arange(layer.num_experts))
        layer.comm_backend = DEEPEP_BACKEND  # the branch of _forward that calls _deepep_route
        layer.dispatch_config, layer.kernels = section.dispatch, section.kernels
        layer.topology, layer.dispatcher = topology, None
        layer.call_position = CallPosition(number, name)
    if orders is not None:
        place_stacked(ours, orders, engine)
        wrap_checkpoints(engine)
    return [name for name, _ in ours]


def _check(
    engine: Any,
    layers: Sequence[tuple[str, AutoEPMoELayer]],
    section: MoeLocalityConfig,
    plan: PlacementPlan | None,
) -> tuple[list[tuple[str, Any]], list[np.ndarray] | None]:
    """Return the layers to adopt, and the slot order of the plan for each."""
    ours = [(name, m) for name, m in layers if _stays_because(name, m, plan) is None]
    if ours:
        instead = "use_grouped_mm of the expert_parallel section says how AutoEP's experts run"
        refuse_settings(section, "with AutoEP", {"experts": instead})
    for name, module in ours:
        if type(module) not in (AutoEPMoELayer, LocalityAutoEPMoELayer):
            raise ConfigError(
                f"{name}: found {type(module).__qualname__}, expected AutoEPMoELayer: {_KEEP_STOCK}"
            )
        if module.async_split_plan or module.combine_impl == "fused_weighted_sum":
            raise ConfigError(
                f"{name}: found async_split_plan={module.async_split_plan}, combine_impl="
                f"{module.combine_impl!r}, expected neither that nor fused_weighted_sum: they are "
                f"part of the exchange that moe_locality replaces; leave them out, or {_KEEP_STOCK}"
            )
    if plan is None or not ours:
        return ours, None
    check_is_permutation(plan)
    found = None
    if not is_engine(engine):
        found = "a bare module"
    elif engine.zero_optimization_stage() == 3:
        found = "ZeRO stage 3"
    elif engine.checkpoint_engine.is_decoupled():
        # it reads the tensors after save_checkpoint has returned, when they have moved back
        found = "a decoupled checkpoint engine"
    if found is not None:
        raise ConfigError(
            f"found a plan and {found}, expected an engine whose optimizer state can follow the "
            "experts (ZeRO stage 0, 1 or 2); or put the plan into the weights before "
            "deepspeed.initialize: moe_locality.layer.relabel_state_dict"
        )
    rows = plan_rows(engine.module, plan, [name for name, _ in layers])
    check_between_steps(engine)
    state = state_source(engine)
    for name, module in ours:
        check_no_gradients(module.experts, name)
        plan.check_fits(num_experts=module.num_experts, num_ranks=module.ep_size)
        stacked_shards(module.experts, state)
    return ours, [plan.physical_to_logical_map[row].astype(np.int64) for row in rows]


def _stays_because(name: str, module: AutoEPMoELayer, plan: PlacementPlan | None) -> str | None:
    """Return why a layer keeps AutoEP's exchange, None where it gets ours."""
    folding = module.folding_group_handles
    if module.ep_size == 1:
        why = "its experts are on one rank"
    elif folding is not None and folding.spec.tp_size > 1:
        why = "AutoTP folding is on, which has an exchange of its own"
    elif module.comm_backend == DEEPEP_BACKEND and not isinstance(module, LocalityAutoEPMoELayer):
        why = "comm_backend is deepep"
    else:
        return None
    if plan is not None and module.ep_size > 1:
        raise ConfigError(f"{name}: found a plan, and {why}: leave one of the two out")
    logger.warning("moe_locality: %s keeps AutoEP's own exchange: %s", name, why)
    return why


def wrap_checkpoints(engine: Any) -> None:
    """Save and load with the experts in logical order, as AutoEP does. The placement is undone
    before a call and redone after it: weights, masters and moments travel twice, and files know no
    plan. An error rises on all ranks. A second call changes nothing.
    """
    if getattr(engine, "moe_locality_wraps_checkpoints", False):
        return
    engine.moe_locality_wraps_checkpoints = True

    def in_logical_order(method: Any) -> Any:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            found = auto_ep_layers(engine.module)
            layers: list[Any] = [m for m in found if isinstance(m[1], LocalityAutoEPMoELayer)]
            orders = [layer.slot_to_logical for _, layer in layers]
            place_stacked(layers, [np.arange(len(order)) for order in orders], engine)
            try:
                result = all_succeed(lambda: method(*args, **kwargs))
            except LostRanks:
                raise
            except Exception:
                place_stacked(layers, orders, engine)
                raise
            place_stacked(layers, orders, engine)
            return result

        return call

    engine.save_checkpoint = in_logical_order(engine.save_checkpoint)
    engine.load_checkpoint = in_logical_order(engine.load_checkpoint)
