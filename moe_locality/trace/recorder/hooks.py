"""Finds and hooks the MoE layers of a model: DeepSpeed gates, AutoEP routers, transformers experts.

Nothing of DeepSpeed or transformers is imported: a model that contains their classes has done so.
The ``read_`` functions take the choice of a router from what it returned, without copies. Shape
letters: T (S in DeepSpeed) tokens, K picks per token, E experts, C capacity.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from moe_locality import compat
from moe_locality.errors import TraceError
from moe_locality.trace.recorder.labels import Axes
from moe_locality.trace.schema import MAX_EXPERTS


class Routes(NamedTuple):
    """The picks of one layer in one forward pass."""

    ids: torch.Tensor
    """Any integer type, [T, K], -1 = no pick."""
    weights: torch.Tensor | None
    """[T, K]; None where nobody asked for them."""


def read_deepspeed_gate(output: Any, top_k: int, with_weights: bool) -> Routes:
    """Read the output of ``deepspeed.moe.sharded_moe.TopKGate``.

    Three layouts exist: sparse (DeepSpeed 0.19.4 and later) with indices and gates [K, T]; the same
    with lists of K tensors [T] (older, for Tutel); dense with combine weights [T, E, C]. The dense
    layout does not say which pick was the first: picks come in descending order of their weight.
    TraceError where the output is none of these."""
    if isinstance(output, tuple) and len(output) == 7:
        indices, gates = output[3], output[5]
        if isinstance(indices, (list, tuple)):
            indices, gates = torch.stack(tuple(indices)), torch.stack(tuple(gates))
        if indices.ndim == 2 and not indices.is_floating_point():
            return Routes(indices.t(), gates.detach().t() if with_weights else None)
    elif isinstance(output, tuple) and len(output) == 4:
        combine = output[1]
        if isinstance(combine, torch.Tensor) and combine.ndim == 3:
            weights, ids = combine.detach().sum(dim=2).topk(min(top_k, combine.shape[1]), dim=1)
            return Routes(ids.masked_fill(weights == 0, -1), weights)
    raise TraceError(
        f"found a TopKGate output {_describe(output)}, expected DeepSpeed's sparse layout (7 "
        "items, indices [K, T] fourth) or dense layout (4 items, weights [T, E, C] second): use "
        "a supported DeepSpeed version"
    )


def read_autoep_router(output: Any, with_weights: bool) -> Routes:
    """Read the output of ``deepspeed.moe.ep_router.TokenChoiceTopKRouter``: scores, ids [T, K]."""
    if isinstance(output, tuple) and len(output) >= 2 and _are_picks(output[1], output[0]):
        return Routes(output[1], output[0].detach() if with_weights else None)
    raise TraceError(
        f"found a router output {_describe(output)}, expected (scores [T, K], experts [T, K], "
        "counts [E]): use a supported DeepSpeed version"
    )


def read_experts(_module: Any, args: Sequence[Any], kwargs: Any, with_weights: bool) -> Routes:
    """Read what a transformers experts module was called with: (hidden states, ids, weights)."""
    given = [*args, *kwargs.values()]
    if len(given) >= 3 and _are_picks(given[1], given[2]):
        return Routes(given[1], given[2].detach() if with_weights else None)
    raise TraceError(
        f"found an experts module called with {_describe(given)}, expected hidden states [T, D], "
        "expert ids [T, K] and weights [T, K]: use a supported transformers version"
    )


def read_zaya_experts(module: Any, args: Sequence[Any], kwargs: Any, weighted: bool) -> Routes:
    """As ``read_experts``; a token that skips comes as expert 0 with weight 0: no pick."""
    ids, weights = read_experts(module, args, kwargs, True)
    assert weights is not None
    return Routes(ids.masked_fill(weights == 0, -1), weights if weighted else None)


def read_longcat_experts(module: Any, args: Sequence[Any], kwargs: Any, weighted: bool) -> Routes:
    """As ``read_experts``; experts past the real ones do nothing with a token: no pick."""
    ids, weights = read_experts(module, args, kwargs, weighted)
    return Routes(ids.masked_fill(ids >= module.num_routed_experts, -1), weights)


def read_logits(logits: torch.Tensor, top_k: int, with_weights: bool) -> Routes:
    """The ``top_k`` largest logits [T, E], for routers that do not return what they picked."""
    values, ids = logits.detach().topk(top_k, dim=-1)
    return Routes(ids, values.float().softmax(-1) if with_weights else None)


def read_llama4_router(module: Any, _args: Any, output: Any, with_weights: bool) -> Routes:
    """(scores [T, E], logits [T, E]); the weight of a pick is its sigmoid."""
    values, ids = output[1].detach().topk(module.top_k, dim=1)
    return Routes(ids, values.float().sigmoid() if with_weights else None)


def read_doge_block(module: Any, _args: Any, output: Any, with_weights: bool) -> Routes:
    """(hidden states, logits [2, T, R]); expert x * R + y of the R * R has the score x + y."""
    rows, columns = output[1].detach()
    return read_logits((rows[:, :, None] + columns[:, None]).flatten(1), module.top_k, with_weights)


def read_switch_router(_module: Any, _args: Any, output: Any, with_weights: bool) -> Routes:
    """(one-hot [B, S, E], all zero = over capacity, probability [B, S, 1], logits)."""
    chosen, probability = output[0].flatten(0, -2), output[1].detach().reshape(-1, 1)
    ids = chosen.argmax(-1, keepdim=True).masked_fill(chosen.sum(-1, keepdim=True) == 0, -1)
    return Routes(ids, probability if with_weights else None)


def read_nllb_router(_module: Any, _args: Any, output: Any, with_weights: bool) -> Routes:
    """(one-hot of the first pick, weights [T, E] of at most two picks, logits)."""
    weights, ids = output[1].detach().flatten(0, -2).topk(2, dim=-1)
    return Routes(ids.masked_fill(weights == 0, -1), weights if with_weights else None)


def read_custom(custom: Any, module: Any, args: Any, output: Any, with_weights: bool) -> Routes:
    """Check what a reader of ``attach(routers=)`` returns: ids [T, K], or ids and weights."""
    found = custom(module, args, output)
    ids, weights = found if isinstance(found, tuple) else (found, None)
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise TraceError(
            f"found {_describe([ids])} from a reader in routers=, expected expert ids [T, K] as "
            "integers, or a tuple of them and their weights [T, K]: correct the reader"
        )
    return Routes(ids, weights.detach() if with_weights and weights is not None else None)


def _are_picks(ids: Any, weights: Any) -> bool:
    if not isinstance(ids, torch.Tensor) or not isinstance(weights, torch.Tensor):
        return False
    return ids.ndim == 2 and not ids.is_floating_point() and weights.is_floating_point()


def _describe(items: Any) -> str:
    if not isinstance(items, (list, tuple)):
        return type(items).__name__
    parts = [type(item).__name__ for item in items]
    for at, item in enumerate(items):
        if isinstance(item, torch.Tensor):
            parts[at] = f"{item.dtype} {list(item.shape)}"
    return f"({', '.join(parts)})"


logger = logging.getLogger(__name__)

_EXPERTS_MARKS = ("is_transposed", "is_concatenated", "has_gate", "has_bias", "num_experts")
"""What transformers' ``@use_experts_implementation`` (the ExpertsInterface) sets on a module."""

Reader = Callable[[Any, Any, Any, bool], Routes]
"""Called with (module, args, kwargs or output, with_weights)."""

_READERS: dict[tuple[str, str], tuple[str, Reader]] = {
    ("deepspeed.moe.sharded_moe", "TopKGate"): (
        "deepspeed",
        lambda module, _args, output, weights: read_deepspeed_gate(output, module.k, weights),
    ),
    ("deepspeed.moe.ep_router", "TokenChoiceTopKRouter"): (
        "autoep",
        lambda _module, _args, output, weights: read_autoep_router(output, weights),
    ),
    # experts that are called with ids and are outside the ExpertsInterface, or with ids of no pick
    ("dbrx", "DbrxExperts"): ("transformers", read_experts),
    ("step3p7", "Step3p7Experts"): ("transformers", read_experts),
    ("longcat_flash", "LongcatFlashExperts"): ("transformers", read_longcat_experts),
    ("zaya", "ZayaExperts"): ("transformers", read_zaya_experts),
    # modules whose output tells the picks
    ("llama4", "Llama4Router"): ("output", read_llama4_router),
    ("doge", "DogeCDMoE"): ("output", read_doge_block),
    ("switch_transformers", "SwitchTransformersTop1Router"): ("output", read_switch_router),
    ("nllb_moe", "NllbMoeTop2Router"): ("output", read_nllb_router),
    ("jetmoe", "JetMoeTopKGating"): (
        "output",
        lambda module, _args, output, weights: read_logits(output[4], module.top_k, weights),
    ),
    ("transformers.integrations.mxfp4", "Mxfp4GptOssMLP"): (  # its kernels pick by these logits
        "output",
        lambda module, _args, output, weights: read_logits(output[1], module.router.top_k, weights),
    ),
}
"""(module, or family of transformers, and class) → kind of the layer, and its reader."""

Routers = Mapping[type, "tuple[int, Callable[[Any, tuple[Any, ...], Any], Any]]"]
"""Class of a router -> (number of experts, read(module, args, output) -> ids or (ids, weights))."""

Places = tuple[int, ...]
"""Numbers of a layer in the recorder; several where the model runs it at several depths."""

Read = Callable[[bool], Routes]
"""Called with whether the weights are wanted."""

OnRoutes = Callable[[Places, torch.nn.Module, Read], None]
OnShape = Callable[[Places, "Axes | None"], None]


class Hook:
    """A forward hook that stays behind when its model is copied or pickled. In a compiled model it
    is a graph break: tracing it would compile the state of the recorder in."""

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
        return partial, (_do_nothing,)


def _do_nothing(*_args: Any) -> None:
    """The hook of a copied model."""


class IdleSteps:
    """Knows which forward passes of ``generate(synced_gpus=True)`` are for the other ranks only: a
    rank whose requests are done runs its model on until all ranks are done. It stands in for the
    method that transformers asks before every step, until :meth:`remove`."""

    METHOD = "_has_unfinished_sequences"

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self.next = False
        """Whether the forward pass that begins is such a step; set back as it is read."""
        self._original: Any = getattr(module, self.METHOD, None)
        if self._original is not None:
            vars(module)[self.METHOD] = self

    def __call__(self, this_peer_finished: bool, *args: Any, **kwargs: Any) -> bool:
        goes_on = self._original(this_peer_finished, *args, **kwargs)
        self.next = bool(this_peer_finished) and goes_on
        return goes_on

    def remove(self) -> None:
        """Give the module its own method back."""
        if vars(self._module).get(self.METHOD) is self:
            del vars(self._module)[self.METHOD]

    def __reduce__(self) -> tuple[Any, ...]:  # a copied model asks transformers itself
        return partial, (self._original.__func__, None)


@dataclass(frozen=True, slots=True)
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
    read: Reader
    """Before it runs of the kind "transformers", after that of the others."""
    depth: int
    """How many names the same module had before this one: it runs once for each."""


def find_moe_layers(model: torch.nn.Module, routers: Routers | None = None) -> list[MoeLayer]:
    """Return the MoE layers of ``model`` in the order of ``named_modules()``.

    A module that is in a list several times (``ModuleList([block] * 3)``) is as many layers. Other
    names of one module (an attribute that points to it) are not. TraceError where there is none, or
    one has more experts than an int16 can name."""
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: list[MoeLayer] = []
    names_of: dict[int, list[str]] = {}
    for name, module in modules.items():
        parent = modules[name.rpartition(".")[0]] if name else None
        given = [router for cls, router in (routers or {}).items() if isinstance(module, cls)]
        found = ("output", partial(read_custom, given[0][1])) if given else _known(module, parent)
        if found is None:
            continue
        kind, read = found
        known = names_of.setdefault(id(module), [])
        if known and _pattern(name) != _pattern(known[0]):
            continue
        known.append(name)
        num_experts, top_k = (int(given[0][0]), None) if given else _sizes(kind, module)
        if num_experts > MAX_EXPERTS:
            raise TraceError(
                f"found {num_experts} experts in {name!r}, expected at most {MAX_EXPERTS}: the "
                "trace keeps expert ids in 16 bits"
            )
        depth = len(known) - 1
        layers.append(MoeLayer(name, kind, module, parent, num_experts, top_k, read, depth))
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
    """Return the layers with ``num_experts`` experts (None: all). A trace has one number for all:
    TraceError where none has that many, or they and those attached ``before`` differ."""
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


def _known(module: Any, parent: Any) -> tuple[str, Reader] | None:
    """The kind of a module and its reader; None: it is no router."""
    for (where, name), found in _READERS.items():
        place = where if "." in where else f"transformers.models.{where}.modeling_{where}"
        if _is_a(module, place, name) and type(parent).__name__ != "JetMoeMoA":  # of attention
            return found
    if "transformers" in sys.modules and all(hasattr(module, mark) for mark in _EXPERTS_MARKS):
        return "transformers", read_experts
    return None


def _is_a(module: torch.nn.Module, where: str, name: str) -> bool:
    known = getattr(sys.modules.get(where), name, None)
    return known is not None and isinstance(module, known)


def _sizes(kind: str, module: Any) -> tuple[int, int | None]:
    if kind == "deepspeed":
        return int(module.wg.out_features), int(module.k)
    if kind == "autoep":
        return int(module.num_experts), int(module.top_k)
    if getattr(module, "_is_expert_parallel", False):  # its num_experts counts those of this rank
        ours = getattr(module, "moe_locality_ep", None)  # stored in low bits, it has no parameters
        return int(ours.num_experts if ours else next(module.parameters()).shape[0]), None
    for name in ("num_routed_experts", "num_experts"):
        if hasattr(module, name):
            return int(getattr(module, name)), None
    return int(module.experts.num_experts), None


def hook_layer(
    places: Places, layer: MoeLayer, on_routes: OnRoutes, on_shape: OnShape | None
) -> list[RemovableHandle]:
    """Hook a layer: ``on_shape(places, (B, S) or None)``, if given, is called before it runs,
    ``on_routes(places, module, read)`` when it has routed; ``read(with_weights)`` gives Routes."""
    handles: list[RemovableHandle] = []
    if layer.parent is not None and on_shape is not None:

        def before(_module, args, kwargs):
            on_shape(places, _first_axes([*args, *kwargs.values()]))

        handles.append(layer.parent.register_forward_pre_hook(Hook(before), with_kwargs=True))

    def routed(module, args, rest):
        if not getattr(layer.parent, "calls_route_hooks", False):
            on_routes(places, module, lambda weights: layer.read(module, args, rest, weights))

    if layer.kind == "transformers":
        pre_hook = layer.module.register_forward_pre_hook(Hook(routed), with_kwargs=True)
        return [*handles, pre_hook]
    handles.append(layer.module.register_forward_hook(Hook(routed)))
    if layer.kind == "autoep" and layer.parent is not None:

        def exchanged(ids, scores):
            def read(weights: bool) -> Routes:
                return Routes(ids, scores.detach() if weights else None)

            on_routes(places, layer.module, read)

        seam = route_hooks(layer.parent)
        handles.append(RemovableHandle(seam))
        seam[handles[-1].id] = Hook(exchanged)
    return handles


def route_hooks(module: Any) -> OrderedDict[int, Callable[..., None]]:
    """Return the hooks that an exchange of ours calls with ``(ids [T, K], weights [T, K])``. They
    stand on the layer, also before it is ours. A class of ours says ``calls_route_hooks``."""
    return vars(module).setdefault("route_hooks", OrderedDict())


def input_axes(values: Iterable[Any]) -> Axes | None:
    """[B, S] of the token ids among the inputs of a model: the first 2-d tensor of integers."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.ndim == 2 and value.dtype in (torch.int64, torch.int32):
                return value.shape[0], value.shape[1]
        elif isinstance(value, (dict, list, tuple)):
            found = input_axes(value.values() if isinstance(value, dict) else value)
            if found is not None:
                return found
    return None


def encoder_of(model: torch.nn.Module, layers: list[MoeLayer]) -> torch.nn.Module | None:
    """The encoder of a transformers model, whose tokens are not those of its other MoE layers."""
    paired = getattr(getattr(model, "config", None), "is_encoder_decoder", None)
    find: Any = getattr(model, "get_encoder", None)
    if paired is None or find is None:  # not of transformers
        return None
    encoder = find()
    inside = {id(module) for module in encoder.modules()} & {id(layer.module) for layer in layers}
    return encoder if paired or 0 < len(inside) < len(layers) else None


def pipeline_rank(model: torch.nn.Module) -> int | None:
    """The data-parallel rank of a stage of a DeepSpeed pipeline; None: the model is none."""
    for module in model.modules():
        if _is_a(module, "deepspeed.runtime.pipe.module", "PipelineModule"):
            stage: Any = module
            return int(stage.mpu().get_data_parallel_rank())
    return None


def repeats_tokens(model: torch.nn.Module) -> bool:
    """Whether another rank records the tokens of this one: the first of its tensor-parallel group,
    whose ranks transformers gives the same batch."""
    for module in model.modules():
        mesh: Any = getattr(module, "_device_mesh", None)
        if "tp" in (getattr(mesh, "mesh_dim_names", None) or ()):
            return mesh.get_local_rank("tp") > 0
    return False


def _first_axes(values: list[Any]) -> Axes | None:
    for value in values:
        if isinstance(value, torch.Tensor):
            return (value.shape[0], value.shape[1]) if value.ndim == 3 else None
    return None


def config_of(model: torch.nn.Module) -> Any:
    """The ``config`` of a model, also below DDP; None for models without one."""
    return getattr(getattr(model, "module", model), "config", None)


def model_type_of(model: torch.nn.Module) -> str:
    """The ``model_type`` of a transformers model (of its language part), "" for other models."""
    config = config_of(model)
    for part in ("thinker_config", "text_config", "llm_config"):
        config = getattr(config, part, None) or config
    found = getattr(config, "model_type", "")
    return found if isinstance(found, str) else ""


def moe_layer_ids(model: torch.nn.Module, names: Sequence[str]) -> list[int] | None:
    """The transformer layer index, dense layers counted, of the MoE modules with these names.

    None where nothing tells: the layers then count as 0, 1, 2, ... in their order. TraceError in a
    stage of a DeepSpeed pipeline whose blocks cannot be told: other stages are not seen from here.
    """
    names = [name.removesuffix(".deepspeed_moe.gate") for name in names]
    for prefix, module in model.named_modules():
        if _is_a(module, "deepspeed.runtime.pipe.module", "PipelineModule"):
            return _pipeline_numbers(compat.pipeline_layer_kinds(module), prefix, names)
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return layer_numbers(names, parameters)


def layer_numbers(names: Sequence[str], parameters: Iterable[str]) -> list[int] | None:
    """Transformer layer index of each MoE module, by the names of all of them, in the order of the
    model, and of all its parameters; None where the names do not tell.

    The rule, for ``model.layers.3.mlp`` as for ``encoder.block.3.layer.1.mlp``: the outermost
    number that stands in a list of blocks. A list of blocks is one where another entry has a
    parameter of the same name, or that has one entry; an entry that is the MoE module itself is no
    block. Lists that hold MoE layers (encoder, decoder) follow one another. Where that gives two
    layers one number (stages: ``layers.1.blocks.3``), the next number inward is taken, in lists
    whose entries have half of their parameters in common."""
    lists: dict[str, dict[int, set[str]]] = {}  # "model.layers" -> entry -> names below it
    for name in {*parameters, *names}:
        for of_list, entry, below in _entries(name):
            lists.setdefault(of_list, {}).setdefault(entry, set()).add(below)
    inner = {below for name in names for _, _, below in _entries(name)}
    outer = [_block_of(name, lists, inner) for name in names]
    chosen = [found for found in outer if found is not None]
    if len(chosen) == len(names) and len(set(chosen)) < len(names):
        pairs = zip(names, chosen, strict=True)
        inward = [_alike_below(name, place[0], lists, inner) for name, place in pairs]
        chosen = [found for found in inward if found is not None]
        if len(set(chosen)) < len(names):
            logger.warning(
                "found several MoE layers in one block (%r is in one of them), so they count as "
                "0, 1, 2, ... in their order, and not by transformer layer",
                names[0],
            )
    if len(set(chosen)) < len(names):
        return None
    first, start = {}, 0
    for pattern in dict.fromkeys(_pattern(of_list) for of_list, _ in chosen):
        alike = (of_list for of_list in lists if _pattern(of_list) == pattern)
        for of_list in sorted(alike, key=lambda name: [n for _, n, _ in _entries(f"{name}.")]):
            first[of_list], start = start, start + max(lists[of_list]) + 1
    return [first[of_list] + entry for of_list, entry in chosen]


_Lists = dict[str, dict[int, set[str]]]


def _entries(name: str) -> list[tuple[str, int, str]]:
    """(list, entry, name below the entry) for every number in a name, from outermost in."""
    parts = name.split(".")
    return [
        (".".join(parts[:at]), int(part), ".".join(parts[at + 1 :]))
        for at, part in enumerate(parts[:-1])
        if part.isdigit()
    ]


def _pattern(of_list: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in of_list.split("."))


def _block_of(name: str, lists: _Lists, moe: set[str]) -> tuple[str, int] | None:
    """The outermost entry above an MoE module that is a block."""
    for of_list, entry, _ in _entries(name):
        entries = lists[of_list]
        if len(entries) == 1:  # one block, or a wrapper around the model
            return _alike_below(name, of_list, lists, moe) or (of_list, entry)
        if any(entries[entry] & below for other, below in entries.items() if other != entry):
            return of_list, entry
    return None


def _alike_below(name: str, above: str, lists: _Lists, moe: set[str]) -> tuple[str, int] | None:
    """The outermost entry below the list ``above`` that, but for its MoE, is like another one."""
    for of_list, entry, _ in _entries(name):
        if len(of_list) <= len(above):
            continue
        plain = {
            number: {n for n in below if not any(f"{n}.".startswith(f"{m}.") for m in moe)}
            for number, below in lists[of_list].items()
        }
        own = plain.pop(entry)
        if any(2 * len(own & other) >= max(len(own), len(other), 1) for other in plain.values()):
            return of_list, entry
    return None


def _pipeline_numbers(kinds: Sequence[Any], prefix: str, names: Sequence[str]) -> list[int]:
    """Numbers among the blocks of all stages: layers of the commonest class, and all between."""
    blocks = {kind for kind, _ in Counter(filter(None, kinds)).most_common(1)}
    span: list[int] = []
    while len(found := [at for at, kind in enumerate(kinds) if kind in blocks]) > len(span):
        span = [at for at in range(found[0], found[-1] + 1) if kinds[at] is not None]
        blocks |= {kinds[at] for at in span}
    at = [name.removeprefix(prefix).lstrip(".").split(".")[0] for name in names]
    numbers = [span.index(int(i)) if i.isdigit() and int(i) in span else -1 for i in at]
    if -1 in numbers or len(set(numbers)) < len(numbers):
        raise TraceError(
            f"found MoE layers {list(names)} in a pipeline stage, expected at most one in each "
            "of its blocks (the layers of one class in the PipelineModule): give layer_ids, the "
            "transformer layer index of each"
        )
    return numbers
