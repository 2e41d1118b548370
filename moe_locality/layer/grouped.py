"""Experts as grouped matrix products: one call for all experts instead of one per expert.

It takes experts that are recognizably the same MLP, ``down(act(gate(x)) * up(x))`` or
``down(act(up(x)))`` of plain ``nn.Linear`` layers (bias or not). What a module computes cannot be
read from its parts, so the first expert is also asked: a float64 copy with random weights has to
agree with the formula on random inputs of many sizes. Everything else keeps the loop.

Parameters stay those of the modules. Each product stacks the experts' weights, forward and again
backward: a copy of every expert weight per pass, which the product has to earn back.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_locality import compat

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
ACTIVATION_MODULES = (nn.SiLU, nn.GELU, nn.ReLU, nn.Tanh, nn.Identity)
_ALIGNMENT_BYTES = 16
_SIZES = (0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of the inputs that the first expert gets
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedMLP:
    """The MLP that all experts of a list are: names of the linear layers, and the activation.

    ``gate`` is None without one.
    """

    up: str
    down: str
    gate: str | None
    activation: str


_recognized: "WeakKeyDictionary[nn.ModuleList, dict[Any, GroupedMLP | str]]" = WeakKeyDictionary()


def recognize(experts: nn.ModuleList) -> GroupedMLP | str:
    """Return the MLP that these experts are, or the reason why they keep the loop.

    Asked for every forward pass: hooks, casts, partitioned weights and replaced modules are looked
    for each time, the settings of the modules once per list and mode (training or not).
    """
    why = _why_not_now(experts)
    if why is not None:
        return why
    known = _recognized.setdefault(experts, {})
    classes = (experts[0].training, *map(type, experts[0].modules()))
    if classes not in known:
        known[classes] = _identify(experts)
    return known[classes]


def run_grouped(
    mlp: GroupedMLP, experts: nn.ModuleList, rows: Tensor, tokens_per_expert: Sequence[int]
) -> Tensor:
    """Run the experts on ``rows [R, D]``, R > 0 and ordered by expert, to ``[R, D]``.

    Equal numbers of rows, as a fixed capacity gives them, never wait for the device.
    """
    each = tokens_per_expert[0] if len(set(tokens_per_expert)) == 1 else None
    if each is None:
        counts = torch.tensor(tokens_per_expert, device=rows.device)
    else:  # filled where it lives: a copy from the host cannot be captured in a CUDA graph
        counts = torch.full((len(tokens_per_expert),), each, device=rows.device)
    linear = partial(_linear, experts=experts, counts=counts, each=each)
    hidden = linear(rows, name=mlp.up)
    activation = ACTIVATIONS[mlp.activation]
    if mlp.gate is None:
        hidden = activation(hidden)
    else:
        hidden = activation(linear(rows, name=mlp.gate)) * hidden
    return linear(hidden, name=mlp.down)


def _linear(
    x: Tensor, *, experts: nn.ModuleList, counts: Tensor, each: int | None, name: str
) -> Tensor:
    layers: list[Any] = [getattr(expert, name) for expert in experts]
    biases = [layer.bias for layer in layers] if layers[0].bias is not None else []
    return _GroupedLinear.apply(x, counts, each, *(layer.weight for layer in layers), *biases)


class _GroupedLinear(torch.autograd.Function):
    """``x @ weight[e].T + bias[e]`` for the rows of every expert e, ``each`` of them where all have
    as many.

    Saves the parameters, not their stack, so the copy does not live until the backward pass. An
    expert without rows gets gradients of zero.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, counts: Tensor, each: int | None, *parameters: Tensor
    ) -> Tensor:
        num_experts = counts.shape[0]
        ctx.each = each
        ctx.offsets = counts.cumsum(0).to(torch.int32)
        ctx.save_for_backward(x, counts, *parameters)
        weights = torch.stack(parameters[:num_experts])
        y = compat.grouped_mm()(x, weights.transpose(1, 2), offs=ctx.offsets)
        if len(parameters) > num_experts:
            biases = torch.stack(parameters[num_experts:])
            times = counts if each is None else each
            y = y + biases.repeat_interleave(times, dim=0, output_size=x.shape[0])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, counts, *parameters = ctx.saved_tensors
        num_experts = counts.shape[0]
        grouped_mm = compat.grouped_mm()
        grad = grad.contiguous()  # grouped products refuse expanded gradients
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grouped_mm(grad, torch.stack(parameters[:num_experts]), offs=ctx.offsets)
        grads: list[Tensor | None] = [None] * len(parameters)
        if any(ctx.needs_input_grad[3 : 3 + num_experts]):
            grads[:num_experts] = grouped_mm(grad.t(), x, offs=ctx.offsets).unbind(0)
        if len(parameters) > num_experts:
            if ctx.each is None:
                sums = torch.segment_reduce(grad.float(), "sum", lengths=counts, axis=0)
            else:
                sums = grad.float().view(num_experts, ctx.each, grad.shape[1]).sum(1)
            grads[num_experts:] = sums.to(grad.dtype).unbind(0)
        return grad_x, None, None, *grads


def _why_not_now(experts: nn.ModuleList) -> str | None:
    first = experts[0]
    if compat.grouped_mm() is None:
        return "this torch has no grouped_mm"
    device_type = next((p.device.type for p in first.parameters()), "cpu")
    if torch.is_autocast_enabled(device_type):
        return "autocast is on"
    dtype = next((p.dtype for p in first.parameters()), None)
    classes = [type(module) for module in first.modules()]
    for expert in experts:
        if [type(module) for module in expert.modules()] != classes:
            return "the experts are not of one class"
        for module in expert.modules():
            if any(getattr(module, hooks) for hooks in _HOOKS):
                return f"a {type(module).__name__} of an expert has hooks"
        for parameter in expert.parameters():
            if parameter.dtype != dtype or not parameter.is_floating_point():
                return "the weights are not of one floating-point type"
            if parameter.numel() == 0 or hasattr(parameter, "ds_id"):
                return "the weights are partitioned (ZeRO-3)"
    return None


def _identify(experts: nn.ModuleList) -> GroupedMLP | str:
    first = experts[0]
    linears = [name for name, child in first.named_children() if type(child) is nn.Linear]
    others = [c for _, c in first.named_children() if type(c) is not nn.Linear]
    if len(linears) not in (2, 3) or any(type(c) not in ACTIVATION_MODULES for c in others):
        return "an expert is not two or three nn.Linear and an activation"
    parts = {f"{name}.{key}" for name in linears for key in ("weight", "bias")}
    held = {name for name, _ in (*first.named_parameters(), *first.named_buffers())}
    if not held <= parts:
        return f"an expert holds more than linear layers: {sorted(held - parts)}"
    why = _why_unequal(experts) or _why_unaligned(first, linears)
    if why is not None:
        return why
    return _ask(first, linears)


def _why_unequal(experts: nn.ModuleList) -> str | None:
    def shapes(expert: nn.Module) -> list[Any]:
        return [(name, p.shape) for name, p in expert.named_parameters()]

    def settings(expert: nn.Module) -> list[Any]:
        return [
            {k: v for k, v in vars(m).items() if not k.startswith("_")} for m in expert.modules()
        ]

    first = experts[0]
    for expert in experts:
        if shapes(expert) != shapes(first):
            return "the experts differ in shape"
        if settings(expert) != settings(first):
            return "the experts differ in their settings"
    return None


def _why_unaligned(expert: nn.Module, linears: list[str]) -> str | None:
    for name in linears:
        layer: Any = expert.get_submodule(name)
        row_bytes = [n * layer.weight.element_size() for n in layer.weight.shape]
        if any(size % _ALIGNMENT_BYTES for size in row_bytes):
            return f"rows of {min(row_bytes)} bytes are not a multiple of {_ALIGNMENT_BYTES}"
    return None


def _ask(expert: nn.Module, linears: list[str]) -> GroupedMLP | str:
    """Find the formula that a float64 copy with random weights computes."""
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(expert).to("cpu", torch.float64)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    layers: dict[str, Any] = {name: probe.get_submodule(name) for name in linears}
    for names, activation in itertools.product(itertools.permutations(linears), ACTIVATIONS):
        mlp = GroupedMLP(
            up=names[-2],
            down=names[-1],
            gate=names[0] if len(names) == 3 else None,
            activation=activation,
        )
        width = layers[mlp.up].in_features
        x = torch.randn((len(_SIZES), width), generator=generator, dtype=torch.float64)
        if _agrees(probe, layers, mlp, x * torch.tensor(_SIZES)[:, None] / width**0.5):
            return mlp
    return "an expert does not compute act(gate(x)) * up(x) or act(up(x)), then down"


def _agrees(expert: nn.Module, layers: dict[str, Any], mlp: GroupedMLP, x: Tensor) -> bool:
    down, up, gate = layers[mlp.down], layers[mlp.up], layers.get(mlp.gate or "")
    fits = up.in_features == x.shape[1] == down.out_features
    if not fits or up.out_features != down.in_features:
        return False
    if gate is not None and gate.weight.shape != up.weight.shape:
        return False
    with torch.no_grad():
        activation = ACTIVATIONS[mlp.activation]
        hidden = activation(up(x)) if gate is None else activation(gate(x)) * up(x)
        wanted = down(hidden)
        try:
            found = expert(x[None, None])
        except (RuntimeError, TypeError, ValueError):
            return False
        if isinstance(found, tuple):
            found = found[0]  # as the loop does: DeepSpeed ignores what else an expert returns
    if found.shape != (1, 1, *wanted.shape):
        return False
    return torch.allclose(found[0, 0], wanted, rtol=1e-9, atol=1e-12)
