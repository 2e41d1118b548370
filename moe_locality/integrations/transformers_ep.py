"""Expert parallelism of Hugging Face transformers (5.23 and newer) through our dispatch.

``moe_locality.register(section)`` names the implementation, ``from_pretrained`` with
``DistributedConfig(fsdp_size=N, ep_size=N, ep_implementation="moe_locality")`` builds it for every
experts module, and ``moe_locality.apply(model)`` puts the plan into the loaded model. The router
stays transformers' own and routes logical experts; weights move between ranks once.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe_locality.config import MoeLocalityConfig, read_config
from moe_locality.dispatch.desync import CallPosition
from moe_locality.dispatch.dispatcher import SlotMap, TokenDispatcher, layer_dispatcher, run_moe
from moe_locality.errors import ConfigError, PlacementError
from moe_locality.integrations.expert_rows import ExpertRows, expert_parameters
from moe_locality.integrations.logical_state import (
    follow_optimizer,
    followed_optimizers,
    keep_checkpoints_logical,
    tensors_beside,
    watch_optimizers,
)
from moe_locality.layer.agreement import all_agree, all_succeed
from moe_locality.placement.plan import PlacementPlan, check_nodes
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.topology.groups import (
    built_groups,
    discover_topology,
    exchange_objects,
    follow_groups,
)
from moe_locality.trace.recorder.hooks import moe_layer_ids

try:
    from transformers.distributed.expert_parallel import EPImplementation, EPImplementationInterface
except ImportError as error:
    raise ConfigError(
        f"found no expert-parallel implementations in transformers ({error}), expected transformers"
        " 5.23 or newer with accelerate: pip install -U 'moe-locality[hf]'"
    ) from error

NAME = "moe_locality"
OnRoutes = Callable[["LocalityEP", Tensor, Tensor], Tensor]
"""(layer, hidden states [T, D], ids [T, K]) -> the ids that are sent; -1 is not."""
logger = logging.getLogger(__name__)
_registered = MoeLocalityConfig()


def register(config: MoeLocalityConfig | dict[str, Any] | str | None = None) -> None:
    """Let ``DistributedConfig(ep_implementation="moe_locality")`` name our exchange.

    Call it before ``from_pretrained``.

    Args:
        config: the ``"moe_locality"`` section (a dict, or the path of a JSON file with it) for the
            models that are built afterwards; the defaults without it. With a ``plan``, call
            ``moe_locality.apply(model)`` when the model is loaded: it runs only then.

    Raises:
        ConfigError: the section is wrong, or has what this front end does not do.
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
        "online": "leave it out",
        "tracking": "leave it out",
        "trace": "call moe_locality.attach(model, path)",
    }
    for name, what_to_do in advice.items():
        if getattr(section, name) != getattr(MoeLocalityConfig(), name):
            raise ConfigError(
                f"found {name} in the section of a transformers model, expected cluster, dispatch, "
                f"kernels and plan: {what_to_do}"
            )


class LocalityEP(EPImplementation):
    """``EPImplementation`` of transformers over :func:`moe_locality.dispatch.run_moe`."""

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        self.group = ep_mesh.get_group()
        self.num_experts = self.num_slots = self.num_local_experts * ep_mesh.size()
        order = np.arange(self.num_experts)
        self.rows = ExpertRows(experts, self.experts_forward, order, self.group)
        self.section = _registered
        self.has_plan, self.waits_for_plan = False, self.section.plan is not None
        self.position = CallPosition()
        self.topology: ClusterTopology | None = None
        self.slot_map = SlotMap()
        self.dispatcher: TokenDispatcher | None = None
        self.on_routes: OnRoutes | None = None
        watch_optimizers()
        experts.moe_locality_ep = self  # pyright: ignore[reportArgumentType]

    @torch.compiler.disable
    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``([T, D], [T, K] logical ids, [T, K])`` to ``[T, D]``. Collective over the EP group."""
        if self.waits_for_plan:
            raise PlacementError(
                f"found a forward pass before the plan {self.section.plan} was applied, expected "
                "moe_locality.apply(model) first, right after from_pretrained"
            )
        if self.dispatcher is None:
            self.dispatcher = self._make_dispatcher(top_k_index.shape[1])
        if self.on_routes is not None:
            top_k_index = self.on_routes(self, hidden_states, top_k_index)
        given = (hidden_states, top_k_index, top_k_weights)
        if self.tp_mesh.size() > 1:  # the ranks of a TP group hold the same tokens
            given = tuple(self._own_slice(tensor) for tensor in given)
        x, ids, weights = given
        out = run_moe(self.dispatcher, x, ids.to(torch.int32), weights.float(), self.rows.run)
        out = out.to(hidden_states.dtype)
        if self.tp_mesh.size() == 1:
            return out
        shape, stride = hidden_states.shape, (hidden_states.shape[1], 1)
        mine = (out.contiguous(), self.tp_mesh, [Shard(0)])
        return DTensor.from_local(*mine, shape=shape, stride=stride).full_tensor()

    def _own_slice(self, tensor: Tensor) -> Tensor:
        whole = DTensor.from_local(tensor, self.tp_mesh, [Replicate()], run_check=False)
        return whole.redistribute(self.tp_mesh, [Shard(0)]).to_local()

    def _make_dispatcher(self, top_k: int) -> TokenDispatcher:
        size, config = self.ep_mesh.size(), self.section.dispatch
        if self.topology is None:
            self.topology = discover_topology(cluster_config=self.section.cluster)
        if config.exchange in ("auto", "hierarchical") and size > 1:
            ranks = dist.get_process_group_ranks(self.group)
            if built_groups(ranks, self.topology) is None:  # by an earlier layer, on all alike
                follow_groups(ranks, self.topology)
        made = layer_dispatcher(
            self.group,
            self.topology,
            num_slots=self.num_slots,
            num_ranks=size,
            top_k=top_k,
            config=config,
            kernels=self.section.kernels,
            position=self.position,
            slot_map=self.slot_map,
        )
        self.experts.traffic = made.traffic  # pyright: ignore[reportArgumentType]
        return made

    def configure(
        self, section: MoeLocalityConfig, topology: ClusterTopology, number: int, name: str
    ) -> None:
        """Take the settings; ``number`` and ``name`` of the layer are for messages."""
        self.section, self.topology, self.dispatcher = section, topology, None
        self.position.number, self.position.name, self.rows.name = number, name, name

    def place(self, slot_to_logical: np.ndarray, serving: SlotMap, others: list[DTensor]) -> None:
        """Move the experts to their slots ``[P]``. Collective over the EP group.

        ``serving``: the slot that serves each expert for the tokens of this rank.
        ``others``: gradients and moments, which move with the experts.
        """
        slots = self.rows.place(slot_to_logical.astype(np.int64), others)
        self.slot_map = serving.renumbered(slots)
        self.num_slots, self.dispatcher = len(slot_to_logical), None
        if not self.has_plan:
            keep_checkpoints_logical(self.rows, first=self.position.number == 0)
        self.waits_for_plan, self.has_plan = False, True


def expert_layers(model: nn.Module) -> list[tuple[str, LocalityEP]]:
    """Return (name, implementation) of every experts module that exchanges through ours."""
    found = ((name, getattr(m, "moe_locality_ep", None)) for name, m in model.named_modules())
    return [(name, layer) for name, layer in found if isinstance(layer, LocalityEP)]


def apply(
    model: nn.Module,
    config: MoeLocalityConfig | dict[str, Any] | str | None = None,
    *,
    plan: PlacementPlan | None = None,
    topology: ClusterTopology | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> nn.Module:
    """Put section and plan into a model that ``from_pretrained`` has spread over the ranks.

    Collective; call it after ``from_pretrained``, and again for another plan. The experts move
    between the ranks, layer by layer, with their gradients and moments; state dicts stay in the
    order of the logical experts. On one rank nothing changes.

    Args:
        config: default: the section that ``register`` was given.
        plan: default: the plan that the section names.
        topology: node of every rank. Default: from the section's ``cluster``, or asked from all.
        optimizer: one whose state is loaded before its first step, where others are found.

    Raises:
        ConfigError, PlacementError, TopologyError: on all ranks; nothing has moved then.
    """
    layers = expert_layers(model)
    if not layers:
        return _without_layers(model)

    def read() -> tuple[MoeLocalityConfig, PlacementPlan | None]:
        section = layers[0][1].section if config is None else read_config(config)
        _refuse_settings(section)
        if optimizer is not None:
            follow_optimizer(optimizer)
        return section, PlacementPlan.read(section.plan) if plan is None and section.plan else plan

    section, wanted = all_succeed(read)
    all_agree("moe_locality sections", section.model_dump_json())
    all_agree("placement plans", "none" if wanted is None else wanted.digest())
    topology = topology or discover_topology(cluster_config=section.cluster)
    ep_groups = exchange_objects(dist.get_process_group_ranks(layers[0][1].group))
    optimizers = followed_optimizers()

    def check() -> list[tuple[int, list[DTensor]]]:
        rows = [] if wanted is None else _rows_for(model, layers, wanted, topology, ep_groups)
        beside = (tensors_beside(layer.rows, optimizers) for _, layer in layers)
        return list(zip(rows, beside, strict=False))

    moves = all_succeed(check)
    for number, (name, layer) in enumerate(layers):
        layer.configure(section, topology, number, name)
    if wanted is not None:
        serving = SlotMap.of_plan(wanted, dist.get_rank(layers[0][1].group))
        for (_, layer), (row, beside) in zip(layers, moves, strict=True):
            layer.place(wanted.physical_to_logical_map[row], serving[row], beside)
    if dist.get_rank() == 0:
        logger.warning(
            "moe_locality: %d MoE layers of %s exchange their tokens (exchange %s, %s plan)",
            *(len(layers), type(model).__name__, section.dispatch.exchange),
            "a" if layers[0][1].has_plan else "no",
        )
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
        'ep_implementation="moe_locality") after moe_locality.register()'
    )


def _rows_for(
    model: nn.Module,
    layers: list[tuple[str, LocalityEP]],
    plan: PlacementPlan,
    topology: ClusterTopology,
    ep_groups: list[list[int]],
) -> list[int]:
    """Return the row of the plan for each layer; raise where plan and model do not fit."""
    for name, layer in layers:
        plan.check_fits(num_experts=layer.num_experts, num_ranks=layer.ep_mesh.size())
        for key, parameter in expert_parameters(layer.experts, name, layer.num_experts).items():
            if parameter.to_local().shape[0] * layer.ep_mesh.size() != layer.num_experts:
                raise ConfigError(
                    f"found {name}.{key} split over several copies of its expert group, expected "
                    "ep_size = fsdp_size * tp_size: a plan needs every expert whole on one rank; "
                    "raise ep_size, or leave the plan out"
                )
    check_nodes(plan, topology, ep_groups)
    return plan.rows_for(moe_layer_ids(model, [name for name, _ in layers]), len(layers))
