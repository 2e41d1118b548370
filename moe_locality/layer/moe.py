"""The drop-in for ``deepspeed.moe.layer.MoE``: the same function, a ragged dispatch.

What is DeepSpeed's stays DeepSpeed's: construction, gating (top-1, top-2, top-k, noise, random
token selection, dropping), the experts, the residual branch, the groups, the checkpoints. What is
ours is the way between gate and experts: no capacity padding, and experts that may sit in any slot.

*Slot* s of a layer is expert ``s % e`` of rank ``s // e`` of the EP group. Parameters are stored in
slot order, so a checkpoint is a plain DeepSpeed checkpoint. The gate routes in the *logical* frame:
it reads the rows of ``wg.weight`` in logical order, so routing, noise, ``l_aux``, ``exp_counts``
and recorded ids are bit for bit those of the model before it was placed. With the identity
placement (the default) the two frames are one.

Classes are assigned in place (``module.__class__``), by the constructor and by ``apply`` alike, so
parameters, hooks and references to a module stay what they were.
"""

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_locality import compat
from moe_locality.config import ClusterConfig, DispatchConfig
from moe_locality.dispatch.desync import CallPosition
from moe_locality.dispatch.dispatcher import (
    ExchangingLayer,
    SlotMap,
    TokenDispatcher,
    run_moe,
    warn_if_lossy,
)
from moe_locality.errors import ConfigError, TopologyError
from moe_locality.kernels import ops
from moe_locality.layer.experts import (
    ExpertsMode,
    check_experts_mode,
    run_experts,
    run_with_summed_gradients,
)
from moe_locality.layer.state import LayerReplicas, set_slot_to_logical
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.topology.groups import discover_topology, prepare_groups

compat.require_deepspeed()

import deepspeed.comm  # noqa: E402
from deepspeed.moe.experts import Experts  # noqa: E402
from deepspeed.moe.layer import MoE as StockMoE  # noqa: E402
from deepspeed.moe.sharded_moe import (  # noqa: E402
    FIRST_ALLTOALL_TIMER,
    MOE_TIMER,
    SECOND_ALLTOALL_TIMER,
    MOELayer,
    TopKGate,
)

logger = logging.getLogger(__name__)


class AttributeOverride:
    """An object with some attributes replaced when they are read; writes go to the object itself.

    DeepSpeed's own ``forward`` can run on it with, say, another order of the router rows, so its
    code need not be copied here."""

    def __init__(self, target: Any, **replaced: Any) -> None:
        object.__setattr__(self, "_target", target)
        object.__setattr__(self, "_replaced", replaced)

    def __getattr__(self, name: str) -> Any:
        return self._replaced[name] if name in self._replaced else getattr(self._target, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._target, name, value)


class LocalityTopKGate(TopKGate):
    """DeepSpeed's gate, read in the logical frame.

    The sparse output is DeepSpeed's: ``(l_aux, C, E, indices int32 [K, T] (-1 = dropped),
    locations, gates fp32 [K, T], exp_counts)``, with logical ids."""

    routes_in_logical_frame = True
    slot_to_logical: np.ndarray
    _placed: SlotMap  # slot of each expert; None inside where both orders are one
    serving: SlotMap | None = None  # the same for this rank's tokens, where experts have replicas

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: Tensor,
        used_token: Tensor | None = None,
        sparse_routes: bool = False,
        use_tutel: bool = False,
        *,
        padded: bool = True,
    ) -> Any:
        """Gate ``input [T, D]``; ``padded=False``: ranks need not agree on a capacity.

        Without dropping, DeepSpeed makes all ranks agree on the capacity of the padded buffers. It
        changes no route and no weight, so the ragged dispatch saves that collective."""
        if input.shape[0] == 0 and sparse_routes:
            return self._no_routes(input)
        replaced: dict[str, Any] = {}
        if not self.is_identity:
            order = self._placed.on(input.device)
            replaced["wg"] = SimpleNamespace(weight=self.wg.weight.index_select(0, order))
        if not padded and not self.drop_tokens:
            replaced["ep_group"] = None
        view: Any = AttributeOverride(self, **replaced) if replaced else self
        stock: Any = TopKGate.forward
        return stock(view, input, used_token, sparse_routes, use_tutel)

    @property
    def is_identity(self) -> bool:
        """Whether row e of the router belongs to expert e."""
        return self._placed.slot_of_expert is None

    def set_slot_to_logical(self, slot_to_logical: np.ndarray) -> None:
        """Say which logical expert each slot holds (checked by :func:`set_slot_to_logical`)."""
        self.slot_to_logical = slot_to_logical
        # not a buffer: it must not be saved, cast, or made on the meta device
        self._placed = SlotMap.of(slot_to_logical)

    @property
    def slot_map(self) -> SlotMap:
        """The slot of each logical expert for the tokens of this rank."""
        return self.serving or self._placed

    def slot_ids(self, logical_ids: Tensor) -> Tensor:
        """Map logical ids (-1 = dropped) to slots, the same shape and dtype."""
        return self.slot_map.slot_ids(logical_ids)

    def _no_routes(self, input: Tensor) -> tuple:
        """Return the gate's output for no tokens; DeepSpeed's own ``l_aux`` would be NaN."""
        logits = torch.nn.functional.linear(input.float(), self.wg.weight.float())
        num_experts = logits.shape[1]
        none = torch.empty(self.k, 0, dtype=torch.int32, device=input.device)
        counts = torch.zeros(num_experts, dtype=torch.int64, device=input.device)
        gates = logits[:, : self.k].t().contiguous()
        return (logits.sum(), torch.tensor(0), num_experts, none, none, gates, counts)


class LocalityMOELayer(ExchangingLayer, MOELayer):
    """DeepSpeed's ``MOELayer`` with a ragged dispatch.

    With tensor parallelism or Tutel, DeepSpeed's own padded dispatch runs, with the slot mapping.
    """

    gate: LocalityTopKGate
    overlap_fn: Callable[[], Any] | None = None
    """work of the module around this layer, done while the results travel back"""
    experts_mode: ExpertsMode
    cluster: ClusterConfig | None = None
    """what to find the topology from, where DeepSpeed's engine is started without initialize"""
    replicas: LayerReplicas | None

    def forward(self, *input: Tensor, **kwargs: Any) -> Tensor:
        """``(hidden_states [..., D], used_token)`` to ``[..., D]``; sets l_aux and exp_counts."""
        if self.use_tutel:
            why = "Tutel is on"
        elif compat.tensor_parallel_size() > 1:
            why = "tensor parallelism is on"
        elif compat.all_to_all_replaced():
            why = "DeepSpeed's all-to-all was replaced, and the replacement has to see it"
        else:
            return self._ragged_forward(input[0], input[1])  # pyright: ignore[reportCallIssue]
        return self._padded_forward(why, *input, **kwargs)

    def _set_ep_group(self, ep_group: Any) -> None:
        super()._set_ep_group(ep_group)
        self.dispatcher = None

    @torch.compiler.disable  # pyright: ignore[reportArgumentType]
    def _ragged_forward(self, hidden_states: Tensor, used_token: Tensor | None) -> Tensor:
        with self._timed_stage("layer"):
            x = hidden_states.reshape(-1, hidden_states.shape[-1])
            self.l_aux, _, _, topk_ids, _, topk_weights, self.exp_counts = self.gate(
                x, used_token, True, padded=False
            )
            output = run_moe(
                self._get_dispatcher(),
                x,
                topk_ids.t(),
                topk_weights.t(),
                self._run_experts,
                overlap_fn=self.overlap_fn,
                stage=self._timed_stage,
            )
            return output.reshape(hidden_states.shape)

    def _run_experts(self, rows: Tensor, tokens_per_expert: tuple[int, ...]) -> Tensor:
        work = (self.experts, rows, tokens_per_expert, self.experts_mode)
        if self.replicas is None or not torch.is_grad_enabled():
            return run_experts(*work)
        return run_with_summed_gradients(*work, self.replicas, self.ep_group)

    @contextlib.contextmanager
    def _timed_stage(self, name: str) -> Iterator[None]:
        """Time the layer, or an exchange, as DeepSpeed does, under its names."""
        if not self.wall_clock_breakdown:
            yield
            return
        timer, attribute = {
            "layer": (MOE_TIMER, "time_moe"),
            "dispatch": (FIRST_ALLTOALL_TIMER, "time_falltoall"),
            "combine": (SECOND_ALLTOALL_TIMER, "time_salltoall"),
        }[name]
        self.timers(timer).start()
        yield
        self.timers(timer).stop()
        setattr(self, attribute, self.timers(timer).elapsed(reset=False))

    def _padded_forward(self, why: str, *input: Tensor, **kwargs: Any) -> Tensor:
        """Run DeepSpeed's own padded dispatch."""
        if self.replicas is not None:
            raise ConfigError(
                f"found experts with replicas, and {why}: DeepSpeed's padded dispatch, which then "
                "has to run, knows one slot per expert; use a plan without replicas"
            )
        if not self._said_padded:
            self._said_padded = True
            logger.warning(
                "moe_locality: %s, so DeepSpeed's padded dispatch runs in this layer: results and "
                "placement are right, the ragged exchange and its traffic counters are off",
                why,
            )

        def gate_of_slots(*args: Any) -> tuple:
            l_aux, capacity, num_experts, logical_ids, *rest = self.gate(*args)
            return (l_aux, capacity, num_experts, self.gate.slot_ids(logical_ids), *rest)

        stock: Any = MOELayer.forward
        return stock(AttributeOverride(self, gate=gate_of_slots), *input, **kwargs)

    def _get_dispatcher(self) -> TokenDispatcher:
        return self.get_dispatcher(
            self.ep_group,
            self.gate.slot_map,  # a relabelled layer has a new one
            num_slots=self.ep_size * self.num_local_experts,
            num_ranks=self.ep_size,
            top_k=self.gate.k,
            comm=deepspeed.comm,
        )


class MoE(StockMoE):
    """``deepspeed.moe.layer.MoE`` with a ragged, placement-aware dispatch.

    The same arguments, the same ``(output, l_aux, exp_counts)``, the same state-dict keys.

    Args:
        dispatch_config: how tokens travel; a dict is read as the ``dispatch`` section.
        kernels: backend of the local kernels (``auto``, ``reference``, ``triton``, ``cuda``).
        experts: how the experts run (``auto``, ``loop``, ``grouped``).
        topology: node of every rank, for the traffic report.
    """

    deepspeed_moe: LocalityMOELayer

    def __init__(
        self,
        *args: Any,
        dispatch_config: DispatchConfig | dict[str, Any] | None = None,
        kernels: ops.Backend = "auto",
        experts: ExpertsMode = "auto",
        topology: ClusterTopology | None = None,
        **kwargs: Any,
    ) -> None:
        compat.init_stock_moe(StockMoE, self, *args, **kwargs)
        adopt(
            self,
            dispatch_config=dispatch_config,
            kernels=kernels,
            experts=experts,
            topology=topology,
        )

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """As DeepSpeed's, for which its engine asks on all ranks. Where it would make expert groups
        and ``initialize`` made none, the nodes are found and groups made that follow them."""
        _follow_the_nodes(self, use_data_before_expert_parallel_)
        stock: Any = StockMoE.set_deepspeed_parallelism
        stock(self, use_data_before_expert_parallel_=use_data_before_expert_parallel_)

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> Any:
        """As DeepSpeed's; the residual MLP runs while the experts' results travel back: still after
        the experts, so random numbers are drawn in DeepSpeed's order."""
        stock: Any = StockMoE.forward
        if not self.use_residual:
            return stock(self, hidden_states, used_token)
        early, layer = [], self.deepspeed_moe

        def mlp(*args: Any) -> Any:
            return early.pop() if early else self.mlp(*args)

        layer.overlap_fn = lambda: early.append(self.mlp(hidden_states))
        try:
            return stock(AttributeOverride(self, mlp=mlp), hidden_states, used_token)
        finally:
            layer.overlap_fn = None


def _follow_the_nodes(module: StockMoE, use_data_before_expert_parallel: bool) -> None:
    """Make the expert groups of a layer whose nodes are not known yet. Collective."""
    layer: Any = module.deepspeed_moe
    group = compat.expert_parallel_group(module.expert_group_name)
    if (group, layer.topology, compat.model_parallel_unit()) != (None, None, None):
        return
    order = "D+E" if use_data_before_expert_parallel else "E+D"
    try:
        prepare_groups(discover_topology(cluster_config=layer.cluster), [module.ep_size], order)
    except TopologyError as error:  # on all ranks alike
        if layer.cluster is not None:
            raise
        logger.warning("moe_locality: DeepSpeed makes the expert groups itself: %s", error)


def _set_parallelism_of_subclass(
    self: StockMoE, use_data_before_expert_parallel_: bool = False
) -> None:
    """``MoE.set_deepspeed_parallelism`` for a user's subclass of the stock layer."""
    _follow_the_nodes(self, use_data_before_expert_parallel_)
    type(self).set_deepspeed_parallelism(self, use_data_before_expert_parallel_)


# DeepSpeed's parameters, then ours: what ``help`` and editors show
_stock, _own = (inspect.signature(c.__init__).parameters.values() for c in (StockMoE, MoE))
MoE.__signature__ = inspect.Signature(  # pyright: ignore[reportAttributeAccessIssue]
    [*list(_stock)[1:], *(p for p in _own if p.kind is p.KEYWORD_ONLY)]
)


def adopt(
    module: StockMoE,
    *,
    dispatch_config: DispatchConfig | dict[str, Any] | None = None,
    kernels: ops.Backend = "auto",
    experts: ExpertsMode = "auto",
    topology: ClusterTopology | None = None,
) -> bool:
    """Turn a stock MoE module into ours, in place; return False where it already was.

    A subclass of the stock class keeps its class and its methods: only its ``deepspeed_moe`` and
    gate change, and groups that follow the nodes are made first. What a stock gate knew of its
    placement (``gate.slot_to_logical``) is kept. ConfigError: the module is not built from
    DeepSpeed's own gate, experts and layer."""
    if isinstance(dispatch_config, dict):
        dispatch_config = DispatchConfig.model_validate(dispatch_config)
    dispatch_config = dispatch_config or DispatchConfig()
    warn_if_lossy(dispatch_config)
    ops.check_backend(kernels)
    check_experts_mode(experts)
    layer: Any = module.deepspeed_moe
    if isinstance(layer, LocalityMOELayer):
        return False
    parts = (layer, layer.gate, layer.experts)
    kinds = {"deepspeed_moe": MOELayer, "gate": TopKGate, "experts": Experts}
    for part, (name, expected) in zip(parts, kinds.items(), strict=True):
        if type(part) is not expected:
            raise ConfigError(
                f"found {type(part).__qualname__} as {name} of an MoE layer, expected DeepSpeed's "
                f"{expected.__name__}: a changed layer cannot be swapped; leave it as it is, or "
                "build it from moe_locality.MoE"
            )
    placed = getattr(layer.gate, "slot_to_logical", None)
    if type(module) is StockMoE:
        module.__class__ = MoE
    elif not isinstance(module, MoE):
        own: Any = MethodType(_set_parallelism_of_subclass, module)
        module.set_deepspeed_parallelism = own
    layer.__class__ = LocalityMOELayer
    layer.gate.__class__ = LocalityTopKGate
    layer.dispatch_config, layer.kernels, layer.topology = dispatch_config, kernels, topology
    layer.experts_mode = experts
    layer.dispatcher = layer.replicas = None
    layer.call_position = CallPosition()
    layer._said_padded = False
    set_slot_to_logical(module, np.arange(module.num_experts) if placed is None else placed)
    return True


def configure(
    module: StockMoE,
    *,
    dispatch_config: DispatchConfig | None = None,
    kernels: ops.Backend | None = None,
    experts: ExpertsMode | None = None,
    topology: ClusterTopology | None = None,
) -> None:
    """Change how a layer that is ours dispatches; None keeps what it has."""
    if dispatch_config is not None:
        warn_if_lossy(dispatch_config)
    if kernels is not None:
        ops.check_backend(kernels)
    layer: Any = module.deepspeed_moe
    if experts is not None:
        check_experts_mode(experts)
        layer.experts_mode = experts
    changes = {"dispatch_config": dispatch_config, "kernels": kernels, "topology": topology}
    for name, value in changes.items():
        if value is not None and value != getattr(layer, name):
            setattr(layer, name, value)
            layer.dispatcher = None
