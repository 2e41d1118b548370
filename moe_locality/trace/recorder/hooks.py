"""Finds and hooks the MoE layers of a model: DeepSpeed gates, AutoEP routers, transformers experts.

Nothing of DeepSpeed or transformers is imported: a model that contains their classes has done so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from moe_locality.errors import TraceError
from moe_locality.trace.recorder.routes import (
    Routes,
    read_autoep_router,
    read_deepspeed_gate,
    read_experts_input,
)

MAX_EXPERTS = 32_767
"""Expert ids are kept as int16, and one more number marks "no expert" in some routers."""

_EXPERTS_MARKS = ("is_transposed", "is_concatenated", "has_gate", "has_bias", "num_experts")
"""What transformers' ``@use_experts_implementation`` (the ExpertsInterface) sets on a module."""

OnRoutes = Callable[[int, torch.nn.Module, Callable[[bool], Routes]], None]
OnShape = Callable[[int, "tuple[int, int] | None"], None]


class Hook:
    """A forward hook that stays behind when its model is copied or pickled.

    In a compiled model it is a graph break: tracing it would compile the state of the recorder in.
    """

    __slots__ = ("_call", "_untraced")

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call
        self._untraced = torch.compiler.disable(call)

    def __call__(self, *args: Any) -> None:
        if torch.compiler.is_compiling():  # while tracing; the wrapper costs ten times the call
            self._untraced(*args)
        else:
            self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_absent_hook, ())


def _absent_hook() -> Callable[..., None]:
    return do_nothing


def do_nothing(*_args: Any) -> None:
    """The hook of a copied model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeLayer:
    """One MoE layer of a model, as the recorder sees it."""

    name: str
    """Name of the hooked module in the model."""
    kind: str
    """"deepspeed" (stock or ours), "autoep" or "transformers"."""
    module: torch.nn.Module
    parent: torch.nn.Module | None
    """The module around it, which sees [B, S, D]."""
    num_experts: int
    top_k: int | None
    """None: known only when it runs."""


def find_moe_layers(model: torch.nn.Module) -> list[MoeLayer]:
    """Return the MoE layers of ``model`` in the order of ``named_modules()``.

    Raises:
        TraceError: there is none, or one has more experts than an int16 can name.
    """
    modules = dict(model.named_modules())
    layers = []
    for name, module in modules.items():
        kind = _kind_of(module)
        if kind is None:
            continue
        parent = modules[name.rpartition(".")[0]] if name else None
        num_experts, top_k = _sizes(kind, module)
        if num_experts > MAX_EXPERTS:
            raise TraceError(
                f"found {num_experts} experts in {name!r}, expected at most {MAX_EXPERTS}: the "
                "trace keeps expert ids in 16 bits"
            )
        layers.append(
            MoeLayer(
                name=name,
                kind=kind,
                module=module,
                parent=parent,
                num_experts=num_experts,
                top_k=top_k,
            )
        )
    if not layers:
        raise TraceError(
            f"found no MoE layer in {type(model).__name__}, expected a deepspeed.moe.layer.MoE, an "
            "AutoEP layer or transformers experts (transformers 5, its ExpertsInterface): attach "
            "the recorder to the model that holds them, after they are built"
        )
    return layers


def of_one_size(
    layers: list[MoeLayer], before: list[MoeLayer], num_experts: int | None
) -> list[MoeLayer]:
    """Return the layers with ``num_experts`` experts (None: all); a trace has one number for all.

    Raises:
        TraceError: none has that many, or they and those attached ``before`` differ.
    """
    chosen = [layer for layer in layers if num_experts in (None, layer.num_experts)]
    sizes = {layer.num_experts for layer in [*chosen, *before]}
    if chosen and len(sizes) == 1:
        return chosen
    found = ", ".join(f"{layer.name!r}: {layer.num_experts}" for layer in [*before, *layers])
    raise TraceError(
        f"found MoE layers with different numbers of experts ({found}), expected one number: a "
        "trace and a plan would have experts that some layers lack; record one group of layers, "
        f"such as num_experts={max(sizes, default=layers[0].num_experts)}, each into a directory "
        "of its own"
    )


def _kind_of(module: torch.nn.Module) -> str | None:
    if _is_a(module, "deepspeed.moe.sharded_moe", "TopKGate"):
        return "deepspeed"
    if _is_a(module, "deepspeed.moe.ep_router", "TokenChoiceTopKRouter"):
        return "autoep"
    if all(hasattr(module, mark) for mark in _EXPERTS_MARKS) and "transformers" in sys.modules:
        return "transformers"
    return None


def _is_a(module: torch.nn.Module, where: str, name: str) -> bool:
    known = getattr(sys.modules.get(where), name, None)
    return known is not None and isinstance(module, known)


def _sizes(kind: str, module: Any) -> tuple[int, int | None]:
    if kind == "deepspeed":
        return int(module.wg.out_features), int(module.k)
    if kind == "autoep":
        return int(module.num_experts), int(module.top_k)
    return int(module.num_experts), None


def hook_layer(
    index: int, layer: MoeLayer, on_routes: OnRoutes, on_shape: OnShape
) -> list[RemovableHandle]:
    """Hook one layer and return the handles.

    ``on_shape(index, (B, S) or None)`` is called before it runs, ``on_routes(index, module, read)``
    when it has routed; ``read(with_weights)`` returns the Routes.
    """
    handles = []
    if layer.parent is not None:

        def before(_module, args, kwargs):
            on_shape(index, _first_axes([*args, *kwargs.values()]))

        handles.append(layer.parent.register_forward_pre_hook(Hook(before), with_kwargs=True))
    handles.append(_hook_router(index, layer, on_routes))
    return handles


def _hook_router(index: int, layer: MoeLayer, on_routes: OnRoutes) -> RemovableHandle:
    def experts(module, args, kwargs):
        on_routes(index, module, lambda weights: read_experts_input(args, kwargs, weights))

    def router(module, _args, output):
        on_routes(index, module, lambda weights: read_autoep_router(output, weights))

    def gate(module, _args, output):
        on_routes(index, module, lambda weights: read_deepspeed_gate(output, module.k, weights))

    if layer.kind == "transformers":
        return layer.module.register_forward_pre_hook(Hook(experts), with_kwargs=True)
    return layer.module.register_forward_hook(Hook(router if layer.kind == "autoep" else gate))


def _first_axes(values: list[Any]) -> tuple[int, int] | None:
    for value in values:
        if isinstance(value, torch.Tensor):
            return (value.shape[0], value.shape[1]) if value.ndim == 3 else None
    return None
