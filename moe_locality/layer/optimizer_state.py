"""What an optimizer keeps about the experts, and whether it can be moved with them.

It can where the optimizer steps the model's own parameters (plain torch optimizers at ZeRO stage 0
in fp32), where DeepSpeed keeps one fp32 master per parameter (fp16 and bf16 at stage 0), and where
it keeps them in flat partitions (ZeRO 1 and 2, ``BF16_Optimizer``).
"""

from typing import Any

import torch
from torch import nn

from moe_locality.errors import ConfigError
from moe_locality.layer.fragments import (
    StateSource,
    copied_state,
    expert_pieces,
    no_state,
    partitioned_state,
    plain_state,
)
from moe_locality.layer.relocate import gate_pieces

_WHAT_TO_DO = (
    "relabel the model before deepspeed.initialize (moe_locality.initialize does, when given a "
    "plan), or save a checkpoint, bake the plan into it with `moe-locality bake` and load its "
    "weights (load_module_only=True)"
)


def is_engine(model: Any) -> bool:
    """Return whether this is a DeepSpeed training engine."""
    from deepspeed import DeepSpeedEngine

    return isinstance(model, DeepSpeedEngine)


def state_source(engine: Any) -> StateSource:
    """Return how to find what the engine's optimizer keeps for a parameter.

    Raises:
        ConfigError: ZeRO stage 3, offloaded or reordered partitions, or an optimizer that holds
            copies of the weights in a way that is not known here.
    """
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if optimizer is None or type(optimizer).__name__ == "DummyOptim":
        return no_state
    if isinstance(optimizer, torch.optim.Optimizer):
        plain_optimizer(engine)
        return plain_state(optimizer)
    kind = type(optimizer).__name__
    if kind not in _KNOWN or stage > 2:
        raise ConfigError(
            f"found the optimizer {kind} at ZeRO stage {stage}, expected one of {sorted(_KNOWN)} "
            "or a plain torch optimizer, at stage 0, 1 or 2: its copies would overwrite the moved "
            f"weights at the next step: {_WHAT_TO_DO}"
        )
    for option in ("cpu_offload", "round_robin_gradients"):
        if getattr(optimizer, option, False):
            raise ConfigError(
                f"found {option} in the ZeRO optimizer, expected none: DeepSpeed does not say "
                f"where the parts of an expert are then: {_WHAT_TO_DO}"
            )
    return (
        copied_state(optimizer) if kind == "FP16_UnfusedOptimizer" else partitioned_state(optimizer)
    )


_KNOWN = ("BF16_Optimizer", "DeepSpeedZeroOptimizer", "FP16_UnfusedOptimizer")


def plain_optimizer(engine: Any) -> torch.optim.Optimizer | None:
    """Return the engine's optimizer if it steps the model's own parameters (None: it has none).

    Raises:
        ConfigError: it is one that DeepSpeed wraps, or holds copies.
    """
    optimizer = engine.optimizer
    if optimizer is None or type(optimizer).__name__ == "DummyOptim":
        return None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"found the optimizer {type(optimizer).__name__}, expected a plain torch optimizer"
        )
    own = {id(parameter) for parameter in engine.module.parameters()}
    foreign = sum(
        id(parameter) not in own for g in optimizer.param_groups for parameter in g["params"]
    )
    if foreign:
        raise ConfigError(
            f"found {foreign} parameters in the optimizer {type(optimizer).__name__} that are not "
            "the model's, expected the model's own: copies of the weights would overwrite the "
            f"moved ones: {_WHAT_TO_DO}"
        )
    return optimizer


def has_state(optimizer: Any) -> bool:
    """Return whether a plain optimizer has stepped or loaded (ZeRO fills its state at start)."""
    return isinstance(optimizer, torch.optim.Optimizer) and bool(optimizer.state)


def check_state_moves(module: Any, state: StateSource, name: str) -> None:
    """Check that all that a layer's optimizer state holds can be moved with its experts.

    Raises:
        ConfigError: a state tensor has another shape than its parameter (a factored or
            communication state), or experts of this rank have states of different kinds.
    """
    layer = module.deepspeed_moe
    gate_names = {piece.name.partition(":")[0] for piece in gate_pieces(layer.gate, state)}
    named = [(f"gate: {key}", p) for key, p in layer.gate.named_parameters() if key in gate_names]
    experts = layer.experts.deepspeed_experts
    for slot, expert in enumerate(experts):
        named += [(f"expert {slot}: {key}", p) for key, p in expert.named_parameters()]
    for key, parameter in named:
        for piece in state(parameter):
            if piece.shape != tuple(parameter.shape) and torch.Size(piece.shape).numel() != 1:
                raise ConfigError(
                    f"{name}, {key}: found the optimizer state {piece.name!r} of shape "
                    f"{piece.shape}, expected {tuple(parameter.shape)} like the parameter: "
                    f"this optimizer's state cannot follow the experts: {_WHAT_TO_DO}"
                )
    if len({layout_of(expert, state) for expert in experts}) > 1:
        raise ConfigError(
            f"{name}: found experts with different tensors or optimizer states on one rank, "
            "expected the same for all: take one optimizer step with every expert, or relabel "
            "before training"
        )


def layout_of(expert: nn.Module, state: StateSource | None) -> str:
    """Names, shapes and dtypes of what travels with one expert."""
    pieces = expert_pieces(expert, state or no_state)
    return repr([(p.name, p.shape, str(p.dtype)) for p in pieces])


def check_between_steps(engine: Any) -> None:
    """Check that the optimizer has no gradients of its own waiting, as ZeRO and bf16 keep them.

    Raises:
        ConfigError: some are.
    """
    optimizer = engine.optimizer
    waiting = engine.micro_steps % engine.gradient_accumulation_steps() != 0
    waiting |= any(g is not None for g in getattr(optimizer, "averaged_gradients", {}).values())
    waiting |= any(any(has) for has in getattr(optimizer, "fp32_groups_has_gradients", ()))
    if waiting:
        raise ConfigError(
            "found a gradient that no step has used, expected none: relabel after engine.step() "
            "of the last micro-batch, not in the middle of an accumulation"
        )


def check_no_gradients(module: Any, name: str) -> None:
    """Check that no gradient is waiting for a step: it belongs to the expert, and does not move.

    Raises:
        ConfigError: a gradient of the gate or an expert is not zero.
    """
    for key, parameter in module.deepspeed_moe.named_parameters():
        if parameter.grad is not None and bool(parameter.grad.any()):
            raise ConfigError(
                f"{name}, {key}: found a gradient that no step has used, expected none: relabel "
                "after optimizer.step() and zero_grad(), not in the middle of an accumulation"
            )
