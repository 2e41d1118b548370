"""The MoE layers of a model: which slot holds which expert, and what belongs to the experts and the
router of a layer on this rank, weights and optimizer state.

A *tensor shard* is one such tensor. A plain torch optimizer keeps moments beside the parameter;
DeepSpeed's fp16 and bf16 optimizers at ZeRO stage 0 keep a whole fp32 master; ZeRO 1 and 2 and
``BF16_Optimizer`` keep, on each rank of the expert-data-parallel group, a part of a flat fp32
master and of flat moments. A *flat buffer* is one byte buffer with all the tensors of an expert,
whole. All of these can move with an expert; :func:`state_source` refuses other optimizers.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe_locality import compat
from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer.hf_checkpoint import PLAN
from moe_locality.placement.plan import PlacementPlan, first_slots
from moe_locality.trace.recorder.hooks import config_of, model_type_of, moe_layer_ids

# -- the MoE layers of a model, and the order of their experts -------------------------------------


def moe_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """Return (name, module) of every DeepSpeed MoE layer, ours too, in ``named_modules`` order."""
    kind = getattr(sys.modules.get("deepspeed.moe.layer"), "MoE", ())  # () where none is loaded
    return [(name, m) for name, m in model.named_modules() if isinstance(m, kind)]


def has_auto_ep(model: nn.Module) -> bool:
    """Return whether DeepSpeed's AutoEP built layers of the model."""
    return any(getattr(module, "_is_autoep_layer", False) for module in model.modules())


def plan_rows(
    model: nn.Module, plan: PlacementPlan, names: Sequence[str] | None = None
) -> list[int]:
    """Return the row of ``plan`` for each MoE layer (``names``: default ``moe_modules(model)``);
    PlacementError: it is for another model or other layers, or is in the weights already."""
    plan.check_fits(model_type=model_type_of(model))
    folder = getattr(config_of(model), "name_or_path", None)
    baked = Path(folder) / PLAN if isinstance(folder, str) and folder else None
    if baked and baked.is_file() and PlacementPlan.read(baked).digest() == plan.digest():
        raise PlacementError(
            f"found a model from {folder}, whose weights were put into the order of this plan by "
            "`moe-locality bake`, expected the original: load that, or leave the plan out"
        )
    return plan.rows_for(*layer_ids_of(model, names))


def layer_ids_of(
    model: nn.Module, names: Sequence[str] | None = None
) -> tuple[list[int] | None, int]:
    """Return the transformer layer index of each MoE layer (None: not to be told), and L."""
    names = [name for name, _ in moe_modules(model)] if names is None else names
    return moe_layer_ids(model, names), len(names)


def current_order(module: Any) -> np.ndarray:
    """Return [E] int64: the logical expert that each slot of a layer holds now."""
    found = getattr(module.deepspeed_moe.gate, "slot_to_logical", None)
    return np.arange(module.num_experts) if found is None else np.array(found, dtype=np.int64)


def set_slot_to_logical(moe_module: Any, slot_to_logical: Any) -> None:
    """Say which logical expert each slot of a layer holds; moves no weights.

    Works on our layer, whose gate then routes in the logical frame, and on a stock one, whose gate
    only carries the fact (its outputs stay in the frame of the slots). PlacementError: not a
    permutation of 0..E-1."""
    placed = np.array(slot_to_logical, dtype=np.int64)
    num_experts = moe_module.num_experts
    if placed.shape != (num_experts,) or (np.sort(placed) != np.arange(num_experts)).any():
        raise PlacementError(
            f"found slot_to_logical {placed.tolist()}, expected a permutation of 0 to "
            f"{num_experts - 1}: a training layer holds every expert once"
        )
    gate = moe_module.deepspeed_moe.gate
    if getattr(gate, "routes_in_logical_frame", False):
        gate.set_slot_to_logical(placed)
    else:
        gate.slot_to_logical = placed


@dataclass(frozen=True, eq=False)
class LayerReplicas:
    """The slots [P] of one layer, seen from rank ``ep_rank`` of its EP group of ``num_ranks``."""

    slot_to_logical: np.ndarray
    ep_rank: int
    num_ranks: int

    @property
    def slots_per_rank(self) -> int:
        return len(self.slot_to_logical) // self.num_ranks

    @property
    def local_experts(self) -> np.ndarray:
        """[P / G] the logical expert of each slot of this rank."""
        first = self.ep_rank * self.slots_per_rank
        return self.slot_to_logical[first : first + self.slots_per_rank]

    @cached_property
    def primary_slots(self) -> np.ndarray:
        """[E] the lowest slot of each expert: the one that is saved and counted."""
        return first_slots(self.slot_to_logical)

    @property
    def extra_local_slots(self) -> list[int]:
        """Slots of this rank, from 0, that hold an expert which a lower slot of the layer holds."""
        primary = self.primary_slots
        first = self.ep_rank * self.slots_per_rank
        return [j for j, e in enumerate(self.local_experts) if primary[e] != first + j]

    @cached_property
    def shared(self) -> list[tuple[int, list[int]]]:
        """By rising logical expert (so exchanges cannot cross), the slots of this rank (from 0)
        whose experts are on other ranks too, with the ranks of all holders in slot order."""
        found = []
        for local in np.argsort(self.local_experts, kind="stable").tolist():
            slots = np.flatnonzero(self.slot_to_logical == self.local_experts[local])
            if len(slots) > 1:
                found.append((local, (slots // self.slots_per_rank).tolist()))
        return found


# -- what moves with an expert ---------------------------------------------------------------------


GATE_ROWS = ("wg.weight", "wg.bias", "bias", "e_score_correction_bias", "expert_bias")
"""Tensors of a gate that have one row (or number) per expert."""

_ALIGN_BYTES = 16  # a slice of a byte buffer can be viewed as any dtype only at its alignment

_WHAT_TO_DO = (
    "relabel the model before deepspeed.initialize (moe_locality.initialize does, when given a "
    "plan), or save a checkpoint, bake the plan into it with `moe-locality bake` and load its "
    "weights (load_module_only=True)"
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorShard:
    """One tensor that belongs to a parameter; ``name``: parameter, or parameter:state.

    ``shape``: of the whole tensor. ``local``: the tensor; or, where ``group``, whose ranks hold the
    parts, is set, the flat part of this rank (None: no part), which begins at element ``start``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    local: Tensor | None
    start: int = 0
    group: Any = None

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def row(self, number: int) -> "TensorShard":
        """Return ``self[number]``, of the first axis, as a shard that shares the memory."""
        shape = self.shape[1:]
        if self.group is None or self.local is None:
            local = None if self.local is None else self.local.detach()[number]
            return replace(self, shape=shape, local=local, start=0)
        size = torch.Size(shape).numel()
        first = max(self.start, number * size)
        last = min(self.start + self.local.numel(), (number + 1) * size)
        local = self.local[first - self.start : last - self.start] if first < last else None
        return replace(self, shape=shape, local=local, start=max(first - number * size, 0))


StateSource = Callable[[Tensor], list[TensorShard]]
"""What an optimizer keeps for a parameter; shards are named by the state alone ("exp_avg")."""


def no_state(parameter: Tensor) -> list[TensorShard]:
    """State source of a model that has no optimizer."""
    return []


def plain_state(optimizer: torch.optim.Optimizer) -> StateSource:
    """State source of an optimizer that steps the model's own parameters."""
    return lambda parameter: _whole(optimizer.state.get(parameter, {}))


def copied_state(optimizer: Any) -> StateSource:
    """State source of ``FP16_UnfusedOptimizer``: one whole fp32 copy per parameter."""
    master_of = {
        id(parameter): master
        for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for parameter, master in zip(parameters, masters, strict=True)
    }

    def shards(parameter: Tensor) -> list[TensorShard]:
        master = master_of.get(id(parameter))
        if master is None:
            return []
        return [_whole_shard("fp32", master), *_whole(optimizer.state.get(master, {}))]

    return shards


def partitioned_state(optimizer: Any) -> StateSource:
    """State source of ZeRO 1 and 2 and of ``BF16_Optimizer``: parts of flat tensors."""
    flats = getattr(optimizer, "single_partition_of_fp32_groups", None)
    if flats is None:
        flats = optimizer.fp32_groups_flat_partition
    groups = getattr(optimizer, "bit16_groups", None)
    groups = optimizer.bf16_groups if groups is None else groups
    group_of = {id(p): number for number, members in enumerate(groups) for p in members}
    state = optimizer.optimizer.state

    def shards(parameter: Tensor) -> list[TensorShard]:
        found = compat.master_fragment(parameter)
        if found is None:
            return []
        fragment, group = found
        # every rank needs the names of the states, also one that holds no part
        flat = flats[group_of[id(parameter)]]
        tensors = {"fp32": flat, **state.get(flat, {})}
        parts = []
        for key in sorted(tensors):
            value = tensors[key]
            if not isinstance(value, Tensor) or value.numel() == 1 != flat.numel():
                continue  # a step counter is the same for all parameters of the group
            if value.shape != flat.shape:
                raise _cannot_follow("", key, value, flat)
            local, start = None, 0
            if fragment is not None:
                address = fragment.get_hp_fragment_address()
                local = value.data.narrow(0, address.start, address.numel)
                start = fragment.lp_fragment_address.start
            whole = _whole_shard(key, parameter)
            parts.append(replace(whole, dtype=value.dtype, local=local, start=start, group=group))
        return parts

    return shards


def _cannot_follow(
    where: str,
    state: str,
    found: Any,
    expected: Any,
    instead: str = f"or no plan, or {_WHAT_TO_DO}",
) -> ConfigError:
    return ConfigError(
        f"{where}found the optimizer state {state!r} of shape {tuple(found.shape)}, expected "
        f"{tuple(expected.shape)} like the parameter or its partition: this optimizer's state "
        f"cannot follow the experts: use one such as Adam, {instead}"
    )


def _whole(state: dict[str, Any]) -> list[TensorShard]:
    return [_whole_shard(key, state[key]) for key in sorted(state) if torch.is_tensor(state[key])]


def _whole_shard(name: str, tensor: Tensor) -> TensorShard:
    return TensorShard(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype, local=tensor)


def expert_shards(expert: nn.Module, state: StateSource) -> list[TensorShard]:
    """Return what moves with one expert, in an order that is the same for all of a layer."""
    found = [_whole_shard(name, buffer) for name, buffer in expert.named_buffers()]
    for name, parameter in expert.named_parameters():
        found += parameter_shards(name, parameter, state)
    return sorted(found, key=lambda shard: shard.group is not None)


def stacked_shards(experts: nn.Module, state: StateSource) -> list[list[TensorShard]]:
    """Return what moves with each expert of a module whose parameters are ``[e, ...]``; ConfigError
    where an optimizer state has another shape than its parameter."""
    found: list[list[TensorShard]] = []
    for name, parameter in experts.named_parameters():
        found = found or [[] for _ in parameter]
        for shard in parameter_shards(name, parameter, state):
            if shard.shape == tuple(parameter.shape):
                for number, shards in enumerate(found):
                    shards.append(shard.row(number))
            elif torch.Size(shard.shape).numel() != 1:  # a step counter is that of all experts
                raise _cannot_follow("", shard.name, shard, parameter, "or no plan")
    return [sorted(shards, key=lambda shard: shard.group is not None) for shards in found]


def parameter_shards(name: str, parameter: Tensor, state: StateSource) -> Iterator[TensorShard]:
    """Yield the parameter itself, then what the optimizer keeps for it."""
    yield _whole_shard(name, parameter)
    yield from (replace(shard, name=f"{name}:{shard.name}") for shard in state(parameter))


def gate_rows(gate: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a gate that have a row per expert, by name."""
    found: dict[str, Tensor] = {}
    for name in GATE_ROWS:
        value: Any = gate
        for part in name.split("."):
            value = getattr(value, part, None)
        if isinstance(value, Tensor):
            found[name] = value
    return found


def gate_shards(gate: nn.Module, state: StateSource) -> list[TensorShard]:
    """Return the per-expert tensors of a gate, moments too; a step counter stays."""
    found = []
    for name, tensor in gate_rows(gate).items():
        shards = parameter_shards(name, tensor, state)
        found += [shard for shard in shards if shard.shape == tuple(tensor.shape)]
    return sorted(found, key=lambda shard: shard.group is not None)


def permute_gate(gate: nn.Module, source: np.ndarray) -> None:
    """Row s of every per-expert tensor of the gate takes row ``source[s]`` (no optimizer state)."""
    for tensor in gate_rows(gate).values():
        tensor.data.copy_(tensor.data[torch.from_numpy(source).to(tensor.device)])


# -- flat buffers ----------------------------------------------------------------------------------


def flat_bytes(shards: list[TensorShard]) -> int:
    """Return the size of the flat buffer that holds the tensors, whole."""
    return sum(_padded_bytes(shard) for shard in shards)


def whole_bytes(shards: list[TensorShard]) -> int:
    """Return the bytes at the front that every rank has whole; partitioned tensors follow."""
    return flat_bytes([shard for shard in shards if shard.group is None])


def pack(shards: list[TensorShard], buffer: Tensor) -> None:
    """Write what this rank holds into ``buffer``; the parts of other ranks are zero."""
    buffer.zero_()  # it is bytes because gloo has no fp8 type
    for shard, start in _places(shards):
        if shard.local is not None:
            raw = shard.local.detach().contiguous().reshape(-1).view(torch.uint8)
            first = start + shard.start * shard.dtype.itemsize
            buffer[first : first + raw.numel()].copy_(raw)


def packed(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return a new flat buffer on ``device`` with the values of ``tensors``."""
    shards = [_whole_shard("", tensor) for tensor in tensors]
    buffer = torch.empty(flat_bytes(shards), dtype=torch.uint8, device=device)
    pack(shards, buffer)
    return buffer


def unpacked(buffer: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Return the tensors in a buffer that :func:`packed` made of ones ``like`` them, as views."""
    return whole_tensors(buffer, [_whole_shard("", tensor) for tensor in like])


def unpack(buffer: Tensor, shards: list[TensorShard]) -> None:
    """Write a flat buffer into the tensors of this rank, of the same shapes and dtypes."""
    for shard, start in _places(shards):
        if shard.local is not None:
            first = start + shard.start * shard.dtype.itemsize
            raw = buffer[first : first + shard.local.numel() * shard.dtype.itemsize]
            shard.local.data.copy_(raw.view(shard.dtype).view(shard.local.shape))


def whole_tensors(buffer: Tensor, shards: list[TensorShard]) -> list[Tensor]:
    """Return the whole tensors of a flat buffer, as views."""
    return [
        buffer[start : start + shard.num_bytes].view(shard.dtype).view(shard.shape)
        for shard, start in _places(shards)
    ]


def _places(shards: list[TensorShard]) -> Iterator[tuple[TensorShard, int]]:
    start = 0
    for shard in shards:
        yield shard, start
        start += _padded_bytes(shard)


def _padded_bytes(shard: TensorShard) -> int:
    return -(-shard.num_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


# -- what the optimizer of an engine keeps ---------------------------------------------------------


def is_engine(model: Any) -> bool:
    """Return whether this is a DeepSpeed training engine."""
    from deepspeed import DeepSpeedEngine

    return isinstance(model, DeepSpeedEngine)


def state_source(engine: Any) -> StateSource:
    """Return what finds the optimizer state of a parameter; ConfigError: ZeRO stage 3, offloaded or
    reordered partitions, or copies of the weights that are kept in a way not known here."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    kind = type(optimizer).__name__
    if optimizer is None or kind == "DummyOptim":
        return no_state
    if isinstance(optimizer, torch.optim.Optimizer):
        if plain_optimizer(engine) is None:
            raise ConfigError(
                f"found parameters in the optimizer {kind} that are not the model's, expected the "
                "model's own: copies of the weights would overwrite the moved ones: "
                f"{_WHAT_TO_DO}"
            )
        return plain_state(optimizer)
    if kind not in _KNOWN or stage > 2:
        raise ConfigError(
            f"found the optimizer {kind} at ZeRO stage {stage}, expected one of {sorted(_KNOWN)} "
            "or a plain torch optimizer, at stage 0, 1 or 2: its copies would overwrite the moved "
            f"weights at the next step: {_WHAT_TO_DO}"
        )
    for option in ("cpu_offload", "round_robin_gradients"):
        if getattr(optimizer, option, False):
            raise ConfigError(
                f"relabel is not supported with {option}: DeepSpeed does not say where the parts "
                f"of an expert are: {_WHAT_TO_DO}"
            )
    find = copied_state if kind == "FP16_UnfusedOptimizer" else partitioned_state
    return find(optimizer)


_KNOWN = ("BF16_Optimizer", "DeepSpeedZeroOptimizer", "FP16_UnfusedOptimizer")


def plain_optimizer(engine: Any) -> torch.optim.Optimizer | None:
    """Return the engine's optimizer if it steps the model's own parameters, else None."""
    optimizer = engine.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        return None
    own = {id(parameter) for parameter in engine.module.parameters()}
    stepped = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return optimizer if all(id(parameter) in own for parameter in stepped) else None


def has_state(optimizer: Any) -> bool:
    """Return whether a plain optimizer has stepped or loaded (ZeRO fills its state at start)."""
    return isinstance(optimizer, torch.optim.Optimizer) and bool(optimizer.state)


def check_state_moves(module: Any, state: StateSource, name: str) -> None:
    """Raise ConfigError where the optimizer state of a layer cannot move with its experts: a tensor
    has another shape than its parameter (a factored or communication state), or experts of this
    rank have states of different kinds."""
    layer = module.deepspeed_moe
    named = [(f"gate: {key}", tensor) for key, tensor in gate_rows(layer.gate).items()]
    experts = layer.experts.deepspeed_experts
    for slot, expert in enumerate(experts):
        named += [(f"expert {slot}: {key}", p) for key, p in expert.named_parameters()]
    for key, parameter in named:
        for shard in state(parameter):
            if shard.shape != tuple(parameter.shape) and torch.Size(shard.shape).numel() != 1:
                raise _cannot_follow(f"{name}, {key}: ", shard.name, shard, parameter)
    if len({layout_of(expert, state) for expert in experts}) > 1:
        raise ConfigError(
            f"{name}: found experts with different tensors or optimizer states on one rank, "
            "expected the same for all: take one optimizer step with every expert, or relabel "
            "before training"
        )


def layout_of(expert: nn.Module, state: StateSource = no_state) -> str:
    """Return names, shapes and dtypes of what moves with one expert."""
    return repr([(s.name, s.shape, str(s.dtype)) for s in expert_shards(expert, state)])


def check_between_steps(engine: Any) -> None:
    """Raise ConfigError where ZeRO or bf16 keeps a gradient that no step has used."""
    optimizer = engine.optimizer
    waiting = engine.micro_steps % engine.gradient_accumulation_steps() != 0
    waiting |= any(g is not None for g in getattr(optimizer, "averaged_gradients", {}).values())
    waiting |= any(any(has) for has in getattr(optimizer, "fp32_groups_has_gradients", ()))
    if waiting:
        raise ConfigError(
            "found a gradient that no step has used: relabel after engine.step() of the last "
            "micro-batch, not in the middle of an accumulation"
        )


def check_no_gradients(experts: nn.Module, name: str) -> None:
    """Raise ConfigError where a gradient of a module is not zero: gradients do not move."""
    for key, parameter in experts.named_parameters():
        if parameter.grad is not None and bool(parameter.grad.any()):
            raise ConfigError(
                f"{name}, {key}: found a gradient that no step has used: relabel after "
                "optimizer.step() and zero_grad(), not in the middle of an accumulation"
            )
