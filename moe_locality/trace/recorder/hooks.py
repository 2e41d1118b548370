"""Finds and hooks the MoE layers of a model: DeepSpeed gates, AutoEP routers, transformers experts.

Nothing of DeepSpeed or transformers is imported: a model that contains their classes has done so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from moe_locality.errors import TraceError
from moe_locality.trace.recorder.routes import (
    Routes,
    read_autoep_router,
    read_custom,
    read_deepspeed_gate,
    read_experts_input,
    read_jetmoe_router,
    read_llama4_router,
    read_longcat_experts,
    read_mxfp4_mlp,
    read_nllb_router,
    read_switch_router,
)

MAX_EXPERTS = 32_767
"""Expert ids are kept as int16, and one more number marks "no expert" in some routers."""

_EXPERTS_MARKS = ("is_transposed", "is_concatenated", "has_gate", "has_bias", "num_experts")
"""What transformers' ``@use_experts_implementation`` (the ExpertsInterface) sets on a module."""

_MODELS = "transformers.models."
_EXPERTS_INPUT = {
    (_MODELS + "dbrx.modeling_dbrx", "DbrxExperts"): lambda _m, args, kwargs, weights: (
        read_experts_input(args, kwargs, weights)
    ),
    (_MODELS + "longcat_flash.modeling_longcat_flash", "LongcatFlashExperts"): read_longcat_experts,
}
"""Experts of transformers outside the ExpertsInterface that are called with ids: their readers."""

_OUTPUTS: dict[tuple[str, str], Callable[[Any, Any, bool], Routes]] = {
    (_MODELS + "llama4.modeling_llama4", "Llama4Router"): read_llama4_router,
    (_MODELS + "jetmoe.modeling_jetmoe", "JetMoeTopKGating"): read_jetmoe_router,
    (
        _MODELS + "switch_transformers.modeling_switch_transformers",
        "SwitchTransformersTop1Router",
    ): (read_switch_router),
    (_MODELS + "nllb_moe.modeling_nllb_moe", "NllbMoeTop2Router"): read_nllb_router,
    ("transformers.integrations.mxfp4", "Mxfp4GptOssMLP"): read_mxfp4_mlp,
}
"""Modules of transformers whose output tells the picks, and their readers."""

Routers = Mapping[type, "tuple[int, Callable[[Any, tuple[Any, ...], Any], Any]]"]
"""Class of a router -> (number of experts, read(module, args, output) -> ids or (ids, weights))."""

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
    """"deepspeed" (stock or ours), "autoep", "transformers", or "output": read from its output."""
    module: torch.nn.Module
    parent: torch.nn.Module | None
    """The module around it, which sees [B, S, D]."""
    num_experts: int
    top_k: int | None
    """None: known only when it runs."""
    read: Any = None
    """Of the kinds "transformers" and "output": (module, args, kwargs or output, with_weights)."""


def find_moe_layers(model: torch.nn.Module, routers: Routers | None = None) -> list[MoeLayer]:
    """Return the MoE layers of ``model`` in the order of ``named_modules()``.

    Raises:
        TraceError: there is none, or one has more experts than an int16 can name.
    """
    modules = dict(model.named_modules())
    layers = []
    for name, module in modules.items():
        parent = modules[name.rpartition(".")[0]] if name else None
        kind, read = _kind_of(module, parent, routers or {})
        if kind is None:
            continue
        num_experts, top_k = _sizes(kind, module, routers or {})
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
                read=read,
            )
        )
    if not layers:
        raise TraceError(
            f"found no MoE layer in {type(model).__name__}, expected a deepspeed.moe.layer.MoE, an "
            "AutoEP layer or transformers experts (transformers 5): attach the recorder to the "
            "model that holds them, after they are built, or name its routers: attach(model, path, "
            "routers={RouterClass: (num_experts, lambda module, args, output: expert_ids)}) with "
            "expert_ids [T, K]"
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


def _kind_of(module: Any, parent: Any, routers: Routers) -> tuple[str | None, Any]:
    """The kind of a module, None = no router, and its reader where the kind does not say it."""
    for known, (_, custom) in routers.items():
        if isinstance(module, known):
            return "output", partial(_read_with, custom)
    if _is_a(module, "deepspeed.moe.sharded_moe", "TopKGate"):
        return "deepspeed", None
    if _is_a(module, "deepspeed.moe.ep_router", "TokenChoiceTopKRouter"):
        return "autoep", None
    if "transformers" not in sys.modules:
        return None, None
    for place, read in _EXPERTS_INPUT.items():
        if _is_a(module, *place):
            return "transformers", read
    for place, read in _OUTPUTS.items():
        if _is_a(module, *place) and type(parent).__name__ != "JetMoeMoA":  # attention's experts
            return "output", partial(_read_output, read)
    if all(hasattr(module, mark) for mark in _EXPERTS_MARKS):
        return "transformers", lambda _m, args, kwargs, w: read_experts_input(args, kwargs, w)
    return None, None


def _read_with(custom: Any, module: Any, args: Any, output: Any, with_weights: bool) -> Routes:
    return read_custom(custom(module, args, output), with_weights)


def _read_output(read: Any, module: Any, _args: Any, output: Any, with_weights: bool) -> Routes:
    return read(module, output, with_weights)


def _is_a(module: torch.nn.Module, where: str, name: str) -> bool:
    known = getattr(sys.modules.get(where), name, None)
    return known is not None and isinstance(module, known)


def _sizes(kind: str, module: Any, routers: Routers) -> tuple[int, int | None]:
    for known, (num_experts, _) in routers.items():
        if isinstance(module, known):
            return int(num_experts), None
    if kind == "deepspeed":
        return int(module.wg.out_features), int(module.k)
    if kind == "autoep":
        return int(module.num_experts), int(module.top_k)
    for name in ("num_routed_experts", "num_experts"):
        if hasattr(module, name):
            return int(getattr(module, name)), None
    return int(module.experts.num_experts), None


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
        on_routes(index, module, lambda weights: layer.read(module, args, kwargs, weights))

    def output_of(module, args, output):
        on_routes(index, module, lambda weights: layer.read(module, args, output, weights))

    def router(module, _args, output):
        on_routes(index, module, lambda weights: read_autoep_router(output, weights))

    def gate(module, _args, output):
        on_routes(index, module, lambda weights: read_deepspeed_gate(output, module.k, weights))

    if layer.kind == "transformers":
        return layer.module.register_forward_pre_hook(Hook(experts), with_kwargs=True)
    hooks = {"autoep": router, "deepspeed": gate, "output": output_of}
    return layer.module.register_forward_hook(Hook(hooks[layer.kind]))


def _first_axes(values: list[Any]) -> tuple[int, int] | None:
    for value in values:
        if isinstance(value, torch.Tensor):
            return (value.shape[0], value.shape[1]) if value.ndim == 3 else None
    return None
