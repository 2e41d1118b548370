"""Online placement: sample the routing of training steps, refresh the plan, relocate where it pays.

Off by default. Every ``every_n_steps`` optimizer steps the ranks' samples go to rank 0, which lets
old counts decay, refreshes the plan by few exchanges of slots, and weighs the time of the move
against the time that the saved copies take on the links between nodes. All ranks follow its
decision. The experts' weights move with masters and moments; the model computes the same function.
"""

import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moe_locality.analysis.stats import jensen_shannon_bits
from moe_locality.config import OnlineConfig
from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer.agreement import decided_by_first
from moe_locality.layer.moe import MoE
from moe_locality.layer.relabeling import plan_of, refuse_tied, relabel
from moe_locality.layer.relocate import MoveReport, RolledBackError
from moe_locality.layer.replicas import has_replicas
from moe_locality.layer.state import (
    current_order,
    expert_shards,
    flat_bytes,
    layer_ids_of,
    moe_modules,
    state_source,
)
from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.refresh.improve import refresh
from moe_locality.placement.refresh.state import RefreshState
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.recorder.hooks import read_deepspeed_gate
from moe_locality.trace.schema import TRAIN, RoutingTrace

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineDecision:
    """One decision of online placement. ``report`` is None where nothing moved.

    Args:
        reason: in words, with the figures that were weighed.
        drift: Jensen-Shannon divergence (bits) between the loads of this window and those of the
            first, of the layer where it is largest; the first window has 0.
        saved_us_per_step, move_us, break_even_steps: predicted; None where nothing would move.
    """

    step: int
    relocated: bool
    reason: str
    num_tokens: int
    drift: float
    moved_slots: int = 0
    saved_us_per_step: float | None = None
    move_us: float | None = None
    break_even_steps: float | None = None
    report: MoveReport | None = None
    elapsed_s: float = 0.0

    def metrics(self) -> dict[str, float]:
        """Numbers for a tracker, keys as ``online/...``; what is not known is left out."""
        names = ("relocated", "drift", "moved_slots", "saved_us_per_step", "move_us", "elapsed_s")
        found = {name: getattr(self, name) for name in names}
        found["sent_bytes"] = None if self.report is None else self.report.sent_bytes
        return {f"online/{k}": float(value) for k, value in found.items() if value is not None}


_Sample = tuple[np.ndarray, tuple[int, ...], int]
"""``ids [T, L, K]`` of a rank, tokens of each micro-batch in it, and of all that it saw."""


class OnlinePlacement:
    """Online placement of one engine; see :func:`attach_online`. ``decisions``: those so far."""

    def __init__(
        self, engine: Any, config: OnlineConfig, topology: ClusterTopology, layers: list[Any]
    ) -> None:
        self.engine, self.config, self.topology, self.layers = engine, config, topology, layers
        self.decisions: list[OnlineDecision] = []
        self.state: RefreshState | None = None
        self._first_load = np.zeros(0)
        self._steps = 0
        self._tokens = 0  # since the last decision, on this rank
        self._sample: list[list[torch.Tensor]] = [[] for _ in layers]
        self._hooks = [
            layer.deepspeed_moe.gate.register_forward_hook(functools.partial(self._saw, number))
            for number, layer in enumerate(layers)
        ]

    def close(self) -> None:
        """Stop sampling."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _saw(self, number: int, gate: Any, _inputs: Any, output: Any) -> None:
        if not gate.training or not torch.is_grad_enabled():
            return  # evaluation; the first pass of a recomputed block
        ids = read_deepspeed_gate(output, gate.k, False).ids.detach()
        kept = self._sample[number]
        kept.append(ids[: self.config.sample_tokens].to(torch.int16))  # stays on the device
        while sum(map(len, kept)) - len(kept[0]) >= self.config.sample_tokens:
            kept.pop(0)  # the latest are kept
        self._tokens += len(ids) if number == 0 else 0

    def step(self) -> OnlineDecision | None:
        """Count an optimizer step; decide on a relocation every ``every_n_steps``. Collective."""
        self._steps += 1
        if self._steps % self.config.every_n_steps or not self._hooks:  # closed: it sees nothing
            return None
        started = time.monotonic()
        plan_text, facts = decided_by_first(self._taken(), self._decide)
        report = None
        if plan_text is not None:
            try:
                report = relabel(self.engine, PlacementPlan.from_dict(plan_text))
            except PlacementError as error:
                if not isinstance(error.__cause__, RolledBackError) or error.__cause__.interrupted:
                    raise
                facts["reason"] = str(error)  # on all ranks; the training can go on
        facts |= {"relocated": report is not None, "report": report}
        elapsed_s = time.monotonic() - started
        decision = OnlineDecision(step=self._steps, elapsed_s=elapsed_s, **facts)
        self.decisions.append(decision)
        if dist.get_rank() == 0:
            words = "relocated" if decision.relocated else "nothing moved"
            logger.info("online placement, step %d: %s: %s", self._steps, words, decision.reason)
        return decision

    def _taken(self) -> _Sample:
        """Return the sample of this rank since the last decision, and start a new one."""
        sample, self._sample = self._sample, [[] for _ in self.layers]
        tokens, self._tokens = self._tokens, 0
        shapes = {tuple(map(len, parts)) for parts in sample}
        if len(shapes) != 1 or not all(sample):  # a layer was skipped: nothing fits together
            sample = [[torch.zeros(0, layer.deepspeed_moe.gate.k)] for layer in self.layers]
        layers = [torch.cat(parts).to("cpu", torch.int16).numpy() for parts in sample]
        return np.stack(layers, axis=1), tuple(map(len, sample[0])), tokens

    def _decide(self, gathered: Sequence[_Sample]) -> tuple[dict[str, Any] | None, dict]:
        """Rank 0: the new plan, or None, and the facts of the decision."""
        plan = self._plan()
        trace = _trace_of(gathered, plan)
        if trace.num_tokens == 0:
            return None, {"reason": "no tokens were seen", "num_tokens": 0, "drift": 0.0}
        load = trace.load() / max(trace.num_tokens, 1)
        if self.state is None:
            half_life = self.config.half_life_tokens
            self.state = RefreshState.from_trace(trace, half_life_tokens=half_life)
            self._first_load = load
        else:
            self.state.absorb(trace)
        drift = float(jensen_shannon_bits(load, self._first_load).max())
        layer: Any = self.layers[0].deepspeed_moe
        expert = layer.experts.deepspeed_experts[0]
        element = next(expert.parameters()).element_size()
        found = refresh(
            plan,
            self.state,
            self.topology,
            move_budget=self.config.move_budget,
            max_imbalance=self.config.max_imbalance,
            expert_bytes=float(flat_bytes(expert_shards(expert, state_source(self.engine)))),
            # of a copy: forward and backward, there and back
            copy_bytes=4.0 * layer.gate.wg.weight.shape[1] * element,
            tokens_per_step=sum(tokens for *_, tokens in gathered) / self.config.every_n_steps,
            steps=float(self.config.pays_within_steps),
        )
        names = ("reason", "moved_slots", "saved_us_per_step", "move_us", "break_even_steps")
        facts = {name: getattr(found, name) for name in names}
        facts |= {"num_tokens": trace.num_tokens, "drift": drift}
        pays = found.worth_it is True and found.moved_slots > 0
        return (found.plan.to_dict() if pays else None), facts

    def _plan(self) -> PlacementPlan:
        """The orders that the layers have now, as a plan of the watched cluster."""
        followed = plan_of(self.engine)
        numbers, _ = layer_ids_of(self.engine.module)
        return PlacementPlan(
            model=followed.model if followed is not None else "",
            layer_ids=tuple(range(len(self.layers)) if numbers is None else numbers),
            num_experts=self.layers[0].num_experts,
            num_nodes=self.topology.num_nodes,
            ranks_per_node=self.topology.ranks_per_node,
            physical_to_logical_map=np.stack([current_order(layer) for layer in self.layers]),
        )


def _trace_of(gathered: Sequence[_Sample], plan: PlacementPlan) -> RoutingTrace:
    """The samples of all ranks; a micro-batch of a rank counts as a request."""
    batches = [count for _, counts, _ in gathered for count in counts]
    return RoutingTrace(
        model=plan.model,
        num_experts=plan.num_experts,
        layer_ids=np.asarray(plan.layer_ids, np.int32),
        expert_ids=np.concatenate([ids for ids, *_ in gathered]),
        request_id=np.repeat(np.arange(len(batches)), batches),
        position=np.concatenate([np.arange(count) for count in batches]),
        stage=np.full(sum(batches), TRAIN, np.uint8),
    )


def attach_online(
    engine: Any, config: OnlineConfig, topology: ClusterTopology | None
) -> OnlinePlacement:
    """Start to sample the routing of ``engine``; call ``.step()`` after every optimizer step.

    ConfigError: layers that are not ours (their ids are of slots), or expert groups smaller
    than the world.
    """
    layers = [module for _, module in moe_modules(engine.module)]
    ours = all(isinstance(layer, MoE) for layer in layers) and not has_replicas(engine.module)
    if topology is None or not layers or not ours:
        raise ConfigError(
            "found layers that are not moe_locality.MoE (such as AutoEP's), or that have replicas, "
            "expected ours without replicas, from moe_locality.initialize: leave the section "
            "'online' out"
        )
    instead = "leave the section 'online' out"
    refuse_tied(engine.module, "and online placement", instead, ConfigError)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks == 1 or layers[0].ep_size != ranks:
        raise ConfigError(
            f"found experts spread over ep_size {layers[0].ep_size} of {ranks} ranks, expected all "
            "of several ranks: online placement weighs one expert-parallel group on one cluster; "
            "leave the section 'online' out, and relabel(engine, plan) with plans of your own"
        )
    return OnlinePlacement(engine, config, topology, layers)
