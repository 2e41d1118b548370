"""The experts of one rank on the rows that came for them, and gradients summed over replicas.

Grouping takes experts that are recognizably the same MLP, ``down(act(gate(x)) * up(x))`` or
``down(act(up(x)))`` of plain ``nn.Linear`` layers (bias or not). What a module computes cannot be
read from its parts, so the first expert is probed: a float64 copy with random weights has to
agree with the formula on random inputs of many sizes. Everything else keeps the loop. Parameters
stay those of the modules: each product stacks the experts' weights, forward and again backward, a
copy of every expert weight per pass that the product must save again.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe_locality import compat
from moe_locality.errors import ConfigError
from moe_locality.layer.state import LayerReplicas, packed, unpacked

ExpertsMode = Literal["auto", "loop", "grouped"]
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
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def check_experts_mode(mode: str) -> None:
    """Raise ConfigError unless the mode exists."""
    if mode not in ("auto", "loop", "grouped"):
        raise ConfigError(f"found experts={mode!r}, expected auto, loop or grouped")


def run_experts(
    experts: Any, rows: Tensor, tokens_per_expert: tuple[int, ...], mode: ExpertsMode = "auto"
) -> Tensor:
    """Run the local experts on their rows, ``[R, D]`` to ``[R, D]`` in the same order.

    ``loop`` calls one expert after the other, ``grouped`` runs them as grouped matrix products
    (ConfigError where they are not recognizably one MLP), ``auto`` groups where that is faster (see
    :func:`grouping_pays`) and the experts allow it."""
    wanted = mode == "grouped" or (mode == "auto" and grouping_pays(rows))
    if wanted and rows.shape[0] and len(experts.deepspeed_experts):
        mlp = recognize(experts.deepspeed_experts)
        if not isinstance(mlp, str):
            return run_grouped(mlp, experts.deepspeed_experts, rows, tokens_per_expert)
        if mode == "grouped":
            raise ConfigError(
                f"experts='grouped' is not possible: {mlp}; expected experts that are the same MLP "
                "of nn.Linear layers: use 'auto' or 'loop'"
            )
    return run_loop(experts, rows, tokens_per_expert)


def grouping_pays(rows: Tensor) -> bool:
    """Return whether ``auto`` groups rows of this device and type: on a GPU where torch has a
    grouped kernel, bfloat16 from compute capability 9.0. On a CPU torch runs a loop inside, and
    stacking the weights is on top: measured, it is not reliably faster."""
    if rows.device.type != "cuda" or rows.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(rows.device) >= (9, 0)


def run_loop(experts: Any, rows: Tensor, tokens_per_expert: tuple[int, ...]) -> Tensor:
    """Run each local expert on its rows, one after the other. One without rows gets a row of zeros
    while gradients are on, and the result is dropped: its parameters then have gradients of zero,
    as DeepSpeed's padding gives them, and not none."""
    outputs = []
    # one split: the backward of a slice per expert would fill [R, D] zeros for each
    chunks = rows.split(list(tokens_per_expert))
    for expert, chunk in zip(experts.deepspeed_experts, chunks, strict=True):
        idle = chunk.shape[0] == 0
        if idle:
            if not torch.is_grad_enabled():
                continue
            # joined to the rows, so that backward reaches the exchange on a rank that got none
            chunk = torch.cat([chunk, rows.new_zeros(1, rows.shape[1])])
        # four dimensions, as DeepSpeed's [g, e, c, m], for experts that look at the shape
        out = expert(chunk[None, None])
        if isinstance(out, tuple):
            out = out[0]  # DeepSpeed ignores the bias term that some experts return
        out = out.reshape(-1, rows.shape[1])
        outputs.append(out[:0] if idle else out)
    return torch.cat(outputs) if outputs else rows


# -- grouped matrix products -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedMLP:
    """The MLP that all experts of a list are: names of the linear layers (``gate``: None without
    one), and the activation."""

    up: str
    down: str
    gate: str | None
    activation: str


_recognized: "WeakKeyDictionary[nn.ModuleList, dict[Any, GroupedMLP | str]]" = WeakKeyDictionary()


def recognize(experts: nn.ModuleList) -> GroupedMLP | str:
    """Return the MLP that these experts are, or the reason why they keep the loop. Hooks, casts,
    partitioned weights and replaced modules are checked each time (in every forward pass), the
    settings of the modules once per list and mode (training or not)."""
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
    """Run the experts on ``rows [R, D]``, R > 0 and ordered by expert, to ``[R, D]``. Equal numbers
    of rows, as a fixed capacity gives them, never wait for the device."""
    each = tokens_per_expert[0] if len(set(tokens_per_expert)) == 1 else None
    if each is None:
        counts = torch.tensor(tokens_per_expert, device=rows.device)
    else:  # filled where it lives: a copy from the host cannot be captured in a CUDA graph
        counts = torch.full((len(tokens_per_expert),), each, device=rows.device)

    def linear(name: str, x: Tensor) -> Tensor:
        layers: list[Any] = [getattr(expert, name) for expert in experts]
        biases = [layer.bias for layer in layers] if layers[0].bias is not None else []
        return _GroupedLinear.apply(x, counts, each, *(layer.weight for layer in layers), *biases)

    return _formula(mlp, linear, rows)


def _formula(mlp: GroupedMLP, linear: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
    hidden, activation = linear(mlp.up, x), ACTIVATIONS[mlp.activation]
    hidden = activation(hidden) if mlp.gate is None else activation(linear(mlp.gate, x)) * hidden
    return linear(mlp.down, hidden)


class _GroupedLinear(torch.autograd.Function):
    """``x @ weight[e].T + bias[e]`` for the rows of every expert e (``each``: where all have as
    many). Saves the parameters, not their stack, so the copy does not live until the backward pass;
    an expert without rows gets gradients of zero."""

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
    others = [child for child in first.children() if type(child) is not nn.Linear]
    if len(linears) not in (2, 3) or any(type(c) not in ACTIVATION_MODULES for c in others):
        return "an expert is not two or three nn.Linear and an activation"
    parts = {f"{name}.{key}" for name in linears for key in ("weight", "bias")}
    held = {name for name, _ in (*first.named_parameters(), *first.named_buffers())}
    if not held <= parts:
        return f"an expert holds more than linear layers: {sorted(held - parts)}"
    shapes = [[(name, p.shape) for name, p in e.named_parameters()] for e in experts]
    modules = ([vars(module) for module in expert.modules()] for expert in experts)
    settings = [[{k: v for k, v in m.items() if k[0] != "_"} for m in one] for one in modules]
    for what, traits in {"shape": shapes, "their settings": settings}.items():
        if any(trait != traits[0] for trait in traits):
            return f"the experts differ in {what}"
    for name in linears:
        layer: Any = first.get_submodule(name)
        row_bytes = [n * layer.weight.element_size() for n in layer.weight.shape]
        if any(size % _ALIGNMENT_BYTES for size in row_bytes):
            return f"rows of {min(row_bytes)} bytes are not a multiple of {_ALIGNMENT_BYTES}"
    return _probe(first, linears)


def _probe(expert: nn.Module, linears: list[str]) -> GroupedMLP | str:
    """Find the formula that a float64 copy with random weights computes."""
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(expert).to("cpu", torch.float64)
    with torch.no_grad():
        for parameter in probe.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    layers: dict[str, Any] = {name: probe.get_submodule(name) for name in linears}
    for names, activation in itertools.product(itertools.permutations(linears), ACTIVATIONS):
        gate = names[0] if len(names) == 3 else None
        mlp = GroupedMLP(up=names[-2], down=names[-1], gate=gate, activation=activation)
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
        wanted = _formula(mlp, lambda name, y: layers[name](y), x)
        try:
            found = expert(x[None, None])
        except (RuntimeError, TypeError, ValueError):
            return False
        if isinstance(found, tuple):
            found = found[0]  # as the loop does: DeepSpeed ignores what else an expert returns
    if found.shape != (1, 1, *wanted.shape):
        return False
    return torch.allclose(found[0, 0], wanted, rtol=1e-9, atol=1e-12)


# -- gradients of replicas -------------------------------------------------------------------------
#
# An identity operator is put between the parameters of replicated experts and the forward pass. Its
# backward runs after that of the experts and before that of the dispatch, at the same point between
# the exchanges of a layer on every rank. The holders of an expert exchange their gradients, and
# each sums them in slot order, in fp32: all get the same bits. DeepSpeed's hooks (reduction over
# data-parallel ranks, ZeRO, accumulation) see the gradient of an expert without replicas; with
# three or more expert-data-parallel ranks each sees one part of their sum, and zeros.


def run_with_summed_gradients(
    experts: Any,
    rows: Tensor,
    tokens_per_expert: tuple[int, ...],
    mode: ExpertsMode,
    replicas: LayerReplicas,
    group: Any,
) -> Tensor:
    """:func:`run_experts`, with gradients summed over the replicas; ``group``: the EP group, None
    for the world. Backward is collective among the holders of an expert."""
    ranks = dist.get_process_group_ranks(group if group is not None else dist.group.WORLD)
    parameters: dict[str, Tensor] = {}  # to train, of experts that others hold too, by name
    shared: list[tuple[int, list[int]]] = []  # how many are of each expert, and who holds it
    for local, holders in replicas.shared:
        found = experts.deepspeed_experts[local].named_parameters()
        trained = {name: parameter for name, parameter in found if parameter.requires_grad}
        parameters |= {f"experts.deepspeed_experts.{local}.{n}": p for n, p in trained.items()}
        shared.append((len(trained), [ranks[holder] for holder in holders]))
    if not parameters:
        return run_experts(experts, rows, tokens_per_expert, mode)
    if mode == "grouped" or grouping_pays(rows):
        recognize(experts.deepspeed_experts)  # it copies an expert, so before others stand in
    first = next(iter(parameters.values()))
    edp_group = compat.expert_data_parallel_group(getattr(first, "group_name", ""))
    stand_ins = _SumOverReplicas.apply(shared, group, edp_group, *parameters.values())
    replaced = dict(zip(parameters, stand_ins, strict=True))
    runner = _Runner(experts, mode)
    return torch.func.functional_call(runner, replaced, (rows, tokens_per_expert))


class _Runner(nn.Module):
    """``run_experts`` as a module, so that torch can put other tensors in the parameters' place."""

    def __init__(self, experts: nn.Module, mode: ExpertsMode) -> None:
        super().__init__()
        self.experts = experts
        self.mode: ExpertsMode = mode
        self.training = experts.training

    def forward(self, rows: Tensor, tokens_per_expert: tuple[int, ...]) -> Tensor:
        return run_experts(self.experts, rows, tokens_per_expert, self.mode)


class _SumOverReplicas(torch.autograd.Function):
    """Parameters as they are; gradients summed over the replicas. ``shared``: of each expert the
    number of its parameters, and the ranks that hold it."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        shared: list[tuple[int, list[int]]],
        group: Any,
        edp_group: Any,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.shared, ctx.group, ctx.edp_group = shared, group, edp_group
        return tuple(parameter.detach() for parameter in parameters)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        summed: list[Tensor] = []
        for count, ranks in ctx.shared:  # one after the other: room for the copies of one expert
            mine = list(grads[len(summed) : len(summed) + count])
            summed += _own_part(sum_in_order(_swap(mine, ranks, ctx.group)), ctx.edp_group)
        return None, None, None, *summed


def _swap(mine: list[Tensor], ranks: list[int], group: Any) -> list[list[Tensor]]:
    """Return the gradients of all holders in slot order. Collective among the holders."""
    if not mine:
        return [mine]
    outgoing = packed(mine, mine[0].device)
    own = dist.get_rank()
    others = [rank for rank in ranks if rank != own]
    incoming = {own: outgoing, **{rank: torch.empty_like(outgoing) for rank in others}}
    operations = [dist.P2POp(dist.isend, outgoing, rank, group) for rank in others]
    operations += [dist.P2POp(dist.irecv, incoming[rank], rank, group) for rank in others]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    return [unpacked(incoming[rank], mine) for rank in ranks]


def _own_part(grads: list[Tensor], edp_group: Any) -> list[Tensor]:
    """Return one part per rank of the sum over ``edp_group``, zeros elsewhere. Collective there."""
    # From three ranks on, the order in which DeepSpeed sums the ranks depends on the position of an
    # element in its buffers, which differs between replicas. So each rank sums one part in rank
    # order, and DeepSpeed adds zeros to it: exact in every order.
    size = 1 if edp_group is None else dist.get_world_size(edp_group)
    if size < 3 or not grads:
        return grads  # a + b is b + a
    sizes = [grad.numel() for grad in grads]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    part = -(-flat.numel() // size)
    outgoing = flat.new_zeros(size * part)
    outgoing[: flat.numel()] = flat
    incoming = torch.empty_like(outgoing)
    dist.all_to_all_single(incoming, outgoing, group=edp_group)
    parts = torch.zeros_like(outgoing).view(size, part)
    parts[dist.get_rank(edp_group)] = sum_in_order([[p] for p in incoming.view(size, part)])[0]
    found = parts.view(-1)[: flat.numel()].split(sizes)
    return [new.view(old.shape).to(old.dtype) for new, old in zip(found, grads, strict=True)]


def sum_in_order(replicas: list[list[Tensor]]) -> list[Tensor]:
    """Add up the gradients of replicas in the order given, in fp32 (or wider where they are)."""
    summed = []
    for grads in zip(*replicas, strict=True):
        total = grads[0].to(torch.promote_types(grads[0].dtype, torch.float32), copy=True)
        for grad in grads[1:]:
            total += grad
        summed.append(total.to(grads[0].dtype))
    return summed
