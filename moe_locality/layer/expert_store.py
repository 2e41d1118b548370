"""Experts kept in a low-bit format for inference, decoded one at a time on use.

``store_experts`` replaces every expert of a model's MoE layers by a ``StoredExpert``: its matrices
become low-bit buffers, everything else (biases, norms) plain buffers. A forward pass decodes
the matrices of one expert, runs the expert's own ``forward`` with them and drops them, so the
memory is that of the low-bit store and one decoded expert. Results are those of the experts with
``fake_quantize`` weights, to the last bit. A forward pass that needs gradients is refused: a stored
expert has no weights to train.

State dict: for each matrix ``<name>.codes``, ``.scales`` and, where the format has them,
``.factors`` and ``.tensor_scale``, all uint8, so that casting the model changes none; for the rest
``<name>.value``. A state dict with plain ``<name>`` entries (any checkpoint from before) loads too:
it is quantized while it loads.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
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

    ``format`` is None where it is kept as it is, under ``value``.
    """

    value: Tensor
    codes: Tensor
    scales: Tensor
    factors: Tensor | None
    tensor_scale: Tensor | None

    def __init__(self, tensor: Tensor, format: str | None) -> None:
        super().__init__()
        self.format, self.shape, self.dtype = format, tensor.shape, tensor.dtype
        for name, part in _parts(tensor, format).items():
            self.register_buffer(name, part)

    def decode(self) -> Tensor:
        if self.format is None:
            return self.value
        scales, tensor_scale = self.scales, self.tensor_scale
        if get_format(self.format).scale_rule == "fp32":
            scales = scales.view(torch.float32)
        return dequantize(
            QuantizedTensor(
                codes=self.codes,
                scales=scales,
                factors=self.factors,
                tensor_scale=None if tensor_scale is None else tensor_scale.view(torch.float32)[0],
                shape=self.shape,
                format=self.format,
                dtype=self.dtype,
            )
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "StoredTensor":
        # a cast of the model casts what decoding returns; the bytes stay what they are
        self.dtype = fn(torch.zeros(1, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


class StoredExpert(nn.Module):
    """One expert in a low-bit format: the same ``forward``, no parameters, no gradients.

    The tree of submodules is that of the expert, with ``StoredTensor`` leaves, so names in a state
    dict begin as they did.
    """

    def __init__(self, expert: nn.Module, format: str, skeleton: nn.Module) -> None:
        """``skeleton`` is the expert on the meta device; experts of one layer share it."""
        super().__init__()
        self.format = format
        self.names = tuple(name for name, _ in _tensors(expert))
        self.__dict__["skeleton"] = (skeleton,)  # in a tuple: it is no submodule
        for name, tensor in _tensors(expert):
            path, _, leaf = name.rpartition(".")
            quantized = tensor.dim() >= 2 and tensor.is_floating_point()
            parent = _submodule(self, path)
            parent.add_module(leaf, StoredTensor(tensor, format if quantized else None))
        self.train(expert.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the expert computes with the decoded weights.

        Raises:
            ConfigError: the inputs ask for gradients.
        """
        given = (*args, *kwargs.values())
        if torch.is_grad_enabled() and any(
            isinstance(x, Tensor) and x.requires_grad for x in given
        ):
            raise ConfigError(
                f"found inputs that need gradients at an expert stored in {self.format}, expected "
                "inference: a stored expert has no weights to train. Run under torch.no_grad(), "
                "or train before store_experts"
            )
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

    Works on every ``Experts`` of DeepSpeed in the model: those of ``moe_locality.MoE``, of stock
    MoE layers, and on their own. Matrices (two dimensions or more) are quantized along their last
    dimension, which for ``nn.Linear`` is the one that is summed over. Every rank stores its own
    experts; nothing is communicated. MBS-H, the default, searches the factors of weights (MBS-D):
    about a second per million weights and core.

    Raises:
        ConfigError: unknown format, no experts, experts stored already, or partitioned by ZeRO-3.
    """
    get_format(format)
    lists = _expert_lists(model)
    if not lists:
        raise ConfigError(
            f"found no experts in {type(model).__name__}, expected DeepSpeed MoE layers: swap "
            "them in first"
        )
    for experts in lists:
        _check_storable(experts)
    before = after = count = 0
    known: dict[tuple[Any, ...], StoredExpert] = {}  # experts of the same tensors are stored once
    for experts in lists:
        skeleton = copy.deepcopy(experts[0]).to("meta")
        for index, expert in enumerate(experts):
            tensors = tuple(
                (name, tensor.data_ptr() or id(tensor)) for name, tensor in _tensors(expert)
            )
            if tensors and tensors in known:
                experts[index] = known[tensors]
                continue
            stored = StoredExpert(expert, format, skeleton)
            known[tensors] = stored
            before += _num_bytes(tensor for _, tensor in _tensors(expert))
            after += _num_bytes(stored.buffers())
            experts[index] = stored
            count += 1
    return StoreReport(format=format, num_experts=count, bytes_before=before, bytes_after=after)


def _expert_lists(model: nn.Module) -> list[nn.ModuleList]:
    from deepspeed.moe.experts import Experts

    found = [m.deepspeed_experts for m in model.modules() if isinstance(m, Experts)]
    return list({id(experts): experts for experts in found}.values())  # layers may share one


def _check_storable(experts: nn.ModuleList) -> None:
    for expert in experts:
        if isinstance(expert, StoredExpert):
            raise ConfigError(
                f"found experts stored in {expert.format} already: build the model anew and load "
                "its checkpoint to store them in another format"
            )
        if any(hasattr(parameter, "ds_id") for parameter in expert.parameters()):
            raise ConfigError(
                "found experts partitioned by ZeRO-3, expected whole ones: store them before "
                "DeepSpeed is initialized"
            )


def _tensors(expert: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from expert.named_parameters()
    yield from expert.named_buffers()


def _submodule(root: nn.Module, path: str) -> nn.Module:
    """Return the submodule at a path, made of plain modules where it is absent."""
    for name in path.split(".") if path else ():
        if name not in dict(root.named_children()):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root


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
