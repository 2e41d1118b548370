"""Expert parallelism of Hugging Face transformers (5.23 and newer) through our dispatch.

``moe_locality.register(section)`` names the implementation, ``from_pretrained`` with
``DistributedConfig(fsdp_size=N, ep_size=N, ep_implementation="moe_locality")`` builds it for every
experts module, and ``moe_locality.apply(model)`` puts the plan into the loaded model. The router
stays transformers' own and routes logical experts; weights move between ranks once.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe_locality import compat
from moe_locality.config import MoeLocalityConfig, read_config, refuse_settings
from moe_locality.dispatch.desync import CallPosition
from moe_locality.dispatch.dispatcher import ExchangingLayer, SlotMap, run_moe
from moe_locality.errors import ConfigError, PlacementError
from moe_locality.integrations.expert_rows import (
    ExpertRows,
    follow_optimizer,
    followed_optimizers,
    keep_checkpoints_logical,
    tensors_beside,
    watch_optimizers,
)
from moe_locality.layer.agreement import (
    Inputs,
    agree_on_inputs,
    all_succeed,
    announce,
    section_and_plan,
)
from moe_locality.layer.state import plan_rows
from moe_locality.placement.plan import PlacementPlan, check_nodes
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.topology.groups import follow_groups

try:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
except ImportError as error:
    raise ConfigError(
        f"found no expert-parallel implementations in transformers ({error}), expected transformers"
        " 5.23 or newer with accelerate: pip install -U 'moe-locality[hf]'"
    ) from error

NAME = "moe_locality"
# (layer, hidden states [T, D], ids [T, K]) -> the ids that are sent; -1 is not
OnRoutes = Callable[["LocalityEP", Tensor, Tensor], Tensor]
logger = logging.getLogger(__name__)
_registered = MoeLocalityConfig()


def register(config: MoeLocalityConfig | dict[str, Any] | str | Path | None = None) -> None:
    """Let ``DistributedConfig(ep_implementation="moe_locality")`` name our exchange, before
    ``from_pretrained``.

    ``config``: the ``"moe_locality"`` section (a dict, or the path of a JSON file with it) for the
    models that are built afterwards; the defaults without it. With a ``plan``, call
    ``moe_locality.apply(model)`` when the model is loaded: it runs only then. ConfigError: the
    section is wrong, or has what this front end does not do.
    """
    global _registered
    section = read_config(config)
    _refuse_settings(section)
    _registered = section
    EPImplementationInterface.register(NAME, LocalityEP)


def _refuse_settings(section: MoeLocalityConfig) -> None:
    advice = {
        "enabled": "name another ep_implementation",
        "experts": "choose experts_implementation in from_pretrained",
        "online": "it runs beside a DeepSpeed engine",
        "tracking": "it runs beside a DeepSpeed engine",
        "trace": "call moe_locality.attach(model, path)",
    }
    refuse_settings(section, "of a transformers model", advice)


class LocalityEP(ExchangingLayer, EPImplementation):
    """``EPImplementation`` of transformers over :func:`moe_locality.dispatch.run_moe`."""

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        self.group = ep_mesh.get_group()
        self.ranks = dist.get_process_group_ranks(self.group)
        self.num_experts = self.num_local_experts * ep_mesh.size()
        self.slot_to_logical = np.arange(self.num_experts)
        self.rows = ExpertRows(experts, self.experts_forward, self.slot_to_logical, self.group)
        self.configure(_registered, None, CallPosition())
        self.waits_for_plan = self.section.plan is not None
        if self.waits_for_plan:
            compat.before_forward_passes(experts, self._check_is_placed)
        self.slot_map = SlotMap()
        self.on_routes: OnRoutes | None = None
        watch_optimizers(self.rows)
        experts.moe_locality_ep = self  # pyright: ignore[reportArgumentType]

    def configure(
        self, section: MoeLocalityConfig, topology: ClusterTopology | None, position: CallPosition
    ) -> None:
        """Take the settings; ``position`` is for messages."""
        self.section = section
        self.dispatch_config, self.kernels = section.dispatch, section.kernels
        self.topology, self.dispatcher = topology, None
        self.call_position, self.rows.name = position, position.name
        self.rows.hold_once()

    def _check_is_placed(self) -> bool:
        if self.waits_for_plan:
            raise PlacementError(
                f"found a forward pass before the plan {self.section.plan} was applied, expected "
                "moe_locality.apply(model) first, right after from_pretrained"
            )
        return True

    @torch.compiler.disable
    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``([T, D], [T, K] logical ids, [T, K])`` to ``[T, D]``. Collective over the EP group."""
        if self.topology is None:
            self.topology, _ = follow_groups(self.ranks, None, self.section.cluster)
        dispatcher = self.get_dispatcher(
            self.group,
            self.slot_map,
            num_slots=len(self.slot_to_logical),
            num_ranks=self.ep_mesh.size(),
            top_k=top_k_index.shape[1],
        )
        self.experts.traffic = dispatcher.traffic  # pyright: ignore[reportArgumentType]
        if self.on_routes is not None:
            top_k_index = self.on_routes(self, hidden_states, top_k_index)
        given = (hidden_states, top_k_index, top_k_weights)
        if self.tp_mesh.size() > 1:  # the ranks of a TP group hold the same tokens
            given = tuple(self._own_slice(tensor) for tensor in given)
        x, ids, weights = given
        out = run_moe(dispatcher, x, ids.to(torch.int32), weights.float(), self.rows.run)
        out = out.to(hidden_states.dtype)
        if self.tp_mesh.size() == 1:
            return out
        shape, stride = hidden_states.shape, (hidden_states.shape[1], 1)
        mine = (out.contiguous(), self.tp_mesh, [Shard(0)])
        return DTensor.from_local(*mine, shape=shape, stride=stride).full_tensor()

    def _own_slice(self, tensor: Tensor) -> Tensor:
        whole = DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
        return whole.redistribute(self.tp_mesh, [Shard(0)]).to_local()

    def check_untrained(self) -> None:
        """Raise ConfigError where a low-bit store would take weights from under a training."""
        if tensors_beside(self.rows):
            raise ConfigError(
                f"found gradients, or moments of an optimizer, of the experts {self.rows.name}, "
                "expected inference: stored experts are not trained. Save the model and load it "
                "anew to store them"
            )

    def place(self, slot_to_logical: np.ndarray, serving: SlotMap, others: list[DTensor]) -> None:
        """Move the experts, and ``others``, their gradients and moments, to their slots ``[P]``.
        Collective over the EP group. ``serving``: the slot of each expert for this rank's tokens.
        """
        slots = self.rows.place(slot_to_logical, others)
        self.slot_map = serving.renumbered(slots)
        self.slot_to_logical, self.dispatcher = slot_to_logical, None
        keep_checkpoints_logical(self.rows, first=self.call_position.number == 0)
        self.waits_for_plan = False


def expert_layers(model: nn.Module) -> list[tuple[str, LocalityEP]]:
    """Return (name, implementation) of every experts module that exchanges through ours."""
    found = ((name, getattr(m, "moe_locality_ep", None)) for name, m in model.named_modules())
    return [(name, layer) for name, layer in found if isinstance(layer, LocalityEP)]


def apply(
    model: nn.Module,
    config: MoeLocalityConfig | dict[str, Any] | str | Path | None = None,
    *,
    plan: PlacementPlan | str | Path | None = None,
    topology: ClusterTopology | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Put section and plan into a model that ``from_pretrained`` has spread over the ranks.

    Collective; call it after ``from_pretrained``, and again for another plan. The experts move
    between the ranks, layer by layer, with their gradients and moments; state dicts stay in the
    order of the logical experts. On one rank nothing changes. Errors (ConfigError, PlacementError,
    TopologyError) rise on all ranks; nothing has moved then.

    Args:
        config: default: the section that ``register`` was given.
        plan: or its file; default: the plan that the section names.
        topology: node of every rank. Default: from the section's ``cluster``, or asked from all.
        optimizer: one whose state is loaded before its first step, where others are found.
    """
    layers = expert_layers(model)
    if not layers:
        return _without_layers(model)

    def read() -> Inputs[None]:
        given = layers[0][1].section if config is None else config
        section, found = section_and_plan(given, plan)
        _refuse_settings(section)
        if optimizer is not None:
            follow_optimizer(optimizer)
        return section, found, None

    section, wanted, _ = agree_on_inputs(read)
    topology, layout = follow_groups(layers[0][1].ranks, topology, section.cluster)
    optimizers = followed_optimizers()

    def check() -> list[tuple[int, list[DTensor]]]:
        if wanted is None:
            return []
        for _, layer in layers:
            wanted.check_fits(num_experts=layer.num_experts, num_ranks=layer.ep_mesh.size())
        check_nodes(wanted, topology, layout.ep_groups)
        rows = plan_rows(model, wanted, [name for name, _ in layers])
        beside = [tensors_beside(layer.rows, optimizers) for _, layer in layers]
        return list(zip(rows, beside, strict=True))

    moves = all_succeed(check)
    for number, (name, layer) in enumerate(layers):
        layer.configure(section, topology, CallPosition(number, name))
    if wanted is not None:
        serving = SlotMap.of_plan(wanted, dist.get_rank(layers[0][1].group))
        for (_, layer), (row, beside) in zip(layers, moves, strict=True):
            layer.place(wanted.experts_of_slots(row), serving[row], beside)
    placed = not layers[0][1].rows.is_identity or wanted is not None
    announce(f"{len(layers)} layers of {type(model).__name__}", section, placed)
    return model


def _without_layers(model: nn.Module) -> nn.Module:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        logger.warning(
            "moe_locality: on one rank %s is transformers' own model: there is nothing to exchange",
            type(model).__name__,
        )
        return model
    raise ConfigError(
        f"found no experts in {type(model).__name__} that exchange through moe_locality, expected "
        "a model that was loaded with DistributedConfig(fsdp_size=N, ep_size=N, "
        'ep_implementation="moe_locality") after moe_locality.register(), N above 1'
    )
