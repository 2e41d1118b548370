"""Experts kept in a low-bit format for inference, decoded on use.

``store_experts`` replaces every expert of a model's DeepSpeed MoE layers by a ``StoredExpert``: its
matrices become low-bit buffers, everything else (biases, norms) plain buffers. A forward pass
decodes the matrices of one expert, runs the expert's own ``forward`` with them and drops them, so
the memory is that of the low-bit store and one decoded expert. The stacked parameters ``[E, ...]``
of transformers' experts modules are stored row by row; a forward pass decodes the experts that have
tokens. Results are those of the experts with ``fake_quantize`` weights, to the last bit. A forward
pass that needs gradients is refused: a stored expert has no weights to train.

State dict of a ``StoredExpert``: for each matrix ``<name>.codes``, ``.scales`` and, where the
format has them, ``.factors`` and ``.tensor_scale``, all uint8, so that casting the model changes
none; for the rest ``<name>.value``. A state dict with plain ``<name>`` entries (any checkpoint from
before) loads too: it is quantized while it loads. Stacked experts have no state dict.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_locality.errors import ConfigError
from moe_locality.quantization import get_format
from moe_locality.quantization.mx import QuantizedTensor, dequantize, quantize


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreReport:
    """What ``store_experts`` did, on this rank. ``bytes_*`` count the experts alone."""

    format: str
    num_experts: int
    bytes_before: int
    bytes_after: int


class StoredTensor(nn.Module):
    """One parameter or buffer of a stored expert; ``decode()`` gives the tensor.

    ``format``: None where it is kept as it is, under ``value``. ``stacked``: it has a row for each
    expert; every row is stored by itself, so that it can travel."""

    def __init__(self, tensor: Tensor, format: str | None, *, stacked: bool = False) -> None:
        super().__init__()
        self.format, self.shape, self.dtype = format, tensor.shape, tensor.dtype
        rows = [_parts(row, format) for row in (tensor if stacked else [tensor])]
        for name, part in rows[0].items():
            if part is not None and stacked:
                part = torch.stack([row[name] for row in rows])  # pyright: ignore
            self.register_buffer(name, part)

    def decode(self, rows: Tensor | None = None) -> Tensor:
        """Return the tensor, or these ``rows [n]`` of a stacked one."""
        parts: Any = {
            name: part if rows is None or part is None else part.index_select(0, rows)
            for name, part in self._buffers.items()
        }
        if self.format is None:
            return parts["value"]
        if get_format(self.format).scale_rule == "fp32":
            parts["scales"] = parts["scales"].view(torch.float32)
        if parts["tensor_scale"] is not None:
            parts["tensor_scale"] = parts["tensor_scale"].view(torch.float32)[..., None]
        shape = self.shape if rows is None else torch.Size((len(rows), *self.shape[1:]))
        return dequantize(
            QuantizedTensor(**parts, shape=shape, format=self.format, dtype=self.dtype)
        )

    def moved(self, fetch: Callable[[Tensor], Tensor]) -> "StoredTensor":
        """Return the stacked tensor whose rows are those that ``fetch`` gives for its own."""
        other = copy.copy(self)
        parts = self._buffers.items()
        other._buffers = {name: None if part is None else fetch(part) for name, part in parts}
        return other

    def _apply(self, fn: Any, recurse: bool = True) -> "StoredTensor":
        # a cast of the model casts what decoding returns; the bytes stay what they are
        self.dtype = fn(torch.zeros(1, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


class StoredExpert(nn.Module):
    """One expert in a low-bit format: the same ``forward``, no parameters, no gradients.

    The tree of submodules is that of the expert, with ``StoredTensor`` leaves, so names in a state
    dict begin as they did. ``skeleton``: the expert on the meta device, shared in a layer."""

    def __init__(self, expert: nn.Module, format: str, skeleton: nn.Module) -> None:
        super().__init__()
        self.format = format
        self.names = tuple(name for name, _ in _tensors(expert))
        self.__dict__["skeleton"] = (skeleton,)  # in a tuple: it is no submodule
        for name, tensor in _tensors(expert):
            *path, leaf = name.split(".")
            parent: nn.Module = self
            for part in path:  # plain modules where absent
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            quantized = tensor.dim() >= 2 and tensor.is_floating_point()
            parent.add_module(leaf, StoredTensor(tensor, format if quantized else None))
        self.train(expert.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the expert computes with the decoded weights; ConfigError: an input asks for
        gradients."""
        _refuse_training(self.format, (*args, *kwargs.values()))
        decoded = {name: self.get_submodule(name).decode() for name in self.names}  # pyright: ignore
        skeleton = self.__dict__["skeleton"][0].train(self.training)
        return torch.func.functional_call(skeleton, decoded, args, kwargs, strict=True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.names:
            plain = state_dict.pop(prefix + name, None)  # a checkpoint from before the store
            if plain is None:
                continue
            leaf: Any = self.get_submodule(name)
            if plain.shape != leaf.shape:
                args[-1].append(
                    f"found {tuple(plain.shape)} for {prefix}{name}, expected {tuple(leaf.shape)}"
                )
                continue
            for part, tensor in _parts(plain, leaf.format).items():
                if tensor is not None:
                    state_dict[f"{prefix}{name}.{part}"] = tensor
        super()._load_from_state_dict(state_dict, prefix, *args)


def store_experts(model: nn.Module, format: str = "mxfp4-mbs-h") -> StoreReport:
    """Keep the experts of a model in a low-bit format, in place; return what that saves.

    Works on every ``Experts`` of DeepSpeed in the model (those of ``moe_locality.MoE``, of stock
    MoE layers, and on their own), and on the stacked experts of transformers, whole or spread over
    ranks by ``ep_implementation="moe_locality"``. Matrices are quantized along the dimension that
    is summed over (of DeepSpeed's experts the last, as in ``nn.Linear``). Every rank stores its own
    experts; nothing is communicated. MBS-H, the default, searches the factors of weights (MBS-D):
    about a second per million weights and core. ConfigError: unknown format, no experts, experts
    stored already, partitioned by ZeRO-3, in training, or spread in another way."""
    get_format(format)
    known_formats = {m.format for m in model.modules() if isinstance(m, StoredTensor)} - {None}
    if known_formats:
        raise ConfigError(
            f"found experts stored in {known_formats.pop()} already: build the model anew and load "
            "its checkpoint to store them in another format"
        )
    kind = getattr(sys.modules.get("deepspeed.moe.experts"), "Experts", ())
    found: list[Any] = [m.deepspeed_experts for m in model.modules() if isinstance(m, kind)]
    lists = list({id(experts): experts for experts in found}.values())  # layers may share one
    found = [m for m in model.modules() if hasattr(m, "num_experts")]  # and is of transformers
    stacked = [m for m in found if hasattr(m, "moe_locality_ep") or hasattr(m, "is_transposed")]
    if not lists and not stacked:
        raise ConfigError(
            f"found no experts in {type(model).__name__} that can be stored, expected DeepSpeed MoE"
            " layers, swapped in first, or stacked experts of transformers"
        )
    for experts in lists:
        if any(hasattr(parameter, "ds_id") for parameter in experts.parameters()):
            raise ConfigError(
                "found experts partitioned by ZeRO-3, expected whole ones: store them before "
                "DeepSpeed is initialized"
            )
    for experts in stacked:
        _check_stacked(experts)
    before = after = count = 0
    for experts in stacked:
        before += _store_stacked(experts, format)
        after += _num_bytes(experts.buffers())
        count += experts.num_experts
    known: dict[tuple[Any, ...], StoredExpert] = {}  # experts of the same tensors are stored once
    for experts in lists:
        skeleton = copy.deepcopy(experts[0]).to("meta")
        for index, expert in enumerate(experts):
            tensors = _tensors(expert)
            key = tuple((name, tensor.data_ptr() or id(tensor)) for name, tensor in tensors)
            if not key or key not in known:
                known[key] = StoredExpert(expert, format, skeleton)
                before += _num_bytes(tensor for _, tensor in tensors)
                after += _num_bytes(known[key].buffers())
                count += 1
            experts[index] = known[key]
    return StoreReport(format=format, num_experts=count, bytes_before=before, bytes_after=after)


# -- stacked experts of transformers


def stored_parameters(experts: nn.Module) -> dict[str, StoredTensor]:
    """Return the stored parameters of an experts module; none where it is not stored."""
    return {name: m for name, m in experts.named_children() if isinstance(m, StoredTensor)}


@contextmanager
def other_parameters(experts: Any, given: dict[str, Any], number: int) -> Iterator[None]:
    """Let an experts module have other parameters, stored ones too, of ``number`` experts."""
    tables = (experts._parameters, experts._modules)
    own, own_number = [dict(table) for table in tables], experts.num_experts
    for name, tensor in given.items():
        tables[isinstance(tensor, StoredTensor)][name] = tensor
    experts.num_experts = number
    try:
        yield
    finally:
        for table, before in zip(tables, own, strict=True):
            table.clear()
            table.update(before)
        experts.num_experts = own_number


def _run_stored(
    experts: nn.Module, forward: Callable[..., Tensor], hidden: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """Run ``forward(hidden [T, D], ids [T, K], weights [T, K])`` with the experts of ``ids``.
    ConfigError: an input asks for gradients."""
    stored = stored_parameters(experts)
    _refuse_training(next(p.format for p in stored.values() if p.format), (hidden, weights))
    used, local = torch.unique(ids, return_inverse=True)
    decoded = {name: tensor.decode(used).to(hidden.dtype) for name, tensor in stored.items()}
    if getattr(experts, "is_transposed", False):
        decoded = {n: t.mT.contiguous() if t.ndim > 2 else t for n, t in decoded.items()}
    with other_parameters(experts, decoded, len(used)):
        return forward(hidden, local, weights)


def _store_stacked(experts: Any, format: str) -> int:
    """Store an experts module; return the bytes that its parameters had."""
    owner = experts
    if hasattr(experts, "moe_locality_ep"):
        owner = experts.moe_locality_ep.rows
        tensors = owner.let_go_of_parameters()
    else:
        tensors = {name: experts._parameters.pop(name) for name in _stacked_names(experts)}
    owner.forward = partial(_run_stored, experts, owner.forward)

    def refuse(*_: Any) -> None:
        raise ConfigError(
            f"found a state dict asked of, or given to, experts stored in {format}, expected "
            "neither: they have no weights. Save, or load, the model before its experts are stored"
        )

    for name, tensor in tensors.items():
        kind = format if tensor.ndim > 2 else None
        summed_last = tensor.mT if kind and getattr(experts, "is_transposed", False) else tensor
        experts.add_module(name, StoredTensor(summed_last, kind, stacked=True))
    experts.register_state_dict_pre_hook(refuse)
    experts.register_load_state_dict_pre_hook(refuse)
    return _num_bytes(tensors.values())


def _stacked_names(experts: Any) -> list[str]:
    parameters = experts.named_parameters(recurse=False)
    return [name for name, p in parameters if p.ndim > 1 and len(p) == experts.num_experts]


def _check_stacked(experts: Any) -> None:
    names = _stacked_names(experts)
    if hasattr(experts, "moe_locality_ep"):
        experts.moe_locality_ep.check_untrained()
    elif not names or any(hasattr(getattr(experts, name), "device_mesh") for name in names):
        raise ConfigError(
            f"found {type(experts).__name__} with {names or 'no parameters [E, ...]'}, expected "
            'such parameters, whole or spread by ep_implementation="moe_locality": load them so'
        )


def _refuse_training(format: str, given: tuple[Any, ...]) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in given):
        raise ConfigError(
            f"found inputs that need gradients at an expert stored in {format}, expected "
            "inference: a stored expert has no weights to train. Run under torch.no_grad(), "
            "or train before store_experts"
        )


def _tensors(expert: nn.Module) -> list[tuple[str, Tensor]]:
    return [*expert.named_parameters(), *expert.named_buffers()]


def _num_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _parts(tensor: Tensor, format: str | None) -> dict[str, Tensor | None]:
    """Return what is stored of a tensor; the parts of a quantized one are uint8 throughout."""
    if format is None:
        return {"value": tensor.detach().clone()}
    q = quantize(tensor, format, role="weight")
    tensor_scale = None if q.tensor_scale is None else q.tensor_scale.reshape(1).view(torch.uint8)
    return {
        "codes": q.codes,
        "scales": q.scales.view(torch.uint8),
        "factors": q.factors,
        "tensor_scale": tensor_scale,
    }
