"""What an optimizer keeps about the experts, and whether it can be moved with them.

It can where the optimizer steps the model's own parameters (plain torch optimizers: ZeRO stage 0 in
fp32, or a model that was cast by hand). It cannot where DeepSpeed holds copies: the flat partitions
of ZeRO and the fp32 masters of fp16 and bf16 training would write the old weights back at the next
step.
"""

from typing import Any

import torch
from torch import nn

from moe_locality.errors import ConfigError
from moe_locality.layer.relabel_weights import GATE_ROWS, named_expert_tensors, state_tensors

_WHAT_TO_DO = (
    "relabel the model before deepspeed.initialize (moe_locality.initialize does, when given a "
    "plan), or save a checkpoint, bake the plan into it with `moe-locality bake` and load its "
    "weights (load_module_only=True)"
)


def is_engine(model: Any) -> bool:
    """Return whether this is a DeepSpeed training engine."""
    from deepspeed import DeepSpeedEngine

    return isinstance(model, DeepSpeedEngine)


def movable_optimizer(engine: Any) -> torch.optim.Optimizer | None:
    """Return the engine's optimizer if its state can follow the experts (None: it has none).

    Raises:
        ConfigError: ZeRO, fp32 masters, or another optimizer that holds copies of the weights.
    """
    stage = engine.zero_optimization_stage()
    optimizer = engine.optimizer
    if stage > 0:
        raise ConfigError(
            f"found ZeRO stage {stage}, expected stage 0: its flat fp32 partitions and moments "
            "belong to the slots, so after a move they would overwrite the moved weights or follow "
            f"the wrong experts: {_WHAT_TO_DO}"
        )
    if optimizer is None or type(optimizer).__name__ == "DummyOptim":
        return None
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            f"found the optimizer {type(optimizer).__name__}, expected a plain torch optimizer "
            "over fp32 weights: its fp32 master copies would overwrite the moved weights at the "
            f"next step: {_WHAT_TO_DO}"
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


def check_state_moves(module: Any, optimizer: torch.optim.Optimizer | None, name: str) -> None:
    """Check that all that a layer's optimizer state holds can be moved with its experts.

    Raises:
        ConfigError: a state tensor has another shape than its parameter (a factored or
            communication state), or experts of this rank have states of different kinds.
    """
    gate = dict(module.deepspeed_moe.gate.named_parameters())
    parameters = [(key, gate[key]) for key in GATE_ROWS if key in gate]
    experts = module.deepspeed_moe.experts.deepspeed_experts
    for slot, expert in enumerate(experts):
        parameters += [(f"expert {slot}: {key}", p) for key, p in expert.named_parameters()]
    for key, parameter in parameters:
        for state, value in state_tensors(optimizer, parameter):
            if value.shape != parameter.shape and value.numel() != 1:
                raise ConfigError(
                    f"{name}, {key}: found the optimizer state {state!r} of shape "
                    f"{tuple(value.shape)}, expected {tuple(parameter.shape)} like the parameter: "
                    f"this optimizer's state cannot follow the experts: {_WHAT_TO_DO}"
                )
    layouts = {layout_of(expert, optimizer) for expert in experts}
    if len(layouts) > 1:
        raise ConfigError(
            f"{name}: found experts with different tensors or optimizer states on one rank, "
            "expected the same for all: take one optimizer step with every expert, or relabel "
            "before training"
        )


def layout_of(expert: nn.Module, optimizer: torch.optim.Optimizer | None) -> str:
    """Names, shapes and dtypes of what travels with one expert, and the rest of its state."""
    tensors = [
        (name, tuple(tensor.shape), str(tensor.dtype))
        for name, tensor in named_expert_tensors(expert, optimizer)
    ]
    rest = []
    if optimizer is not None:
        for name, parameter in expert.named_parameters():
            for key, value in sorted(optimizer.state.get(parameter, {}).items()):
                if not isinstance(value, torch.Tensor):
                    rest.append((name, key, repr(value)))
    return repr((tensors, rest))


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
