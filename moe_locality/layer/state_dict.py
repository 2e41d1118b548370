"""Put a placement into the tensors of a Hugging Face model, by their names.

Routers are ``[E, D]`` (and biases ``[E]`` or ``[1, E]``). Experts are either stacked, ``[E, …]``
(transformers 5), or one by one, ``experts.{e}.…`` (files on the hub). A pattern is a regular
expression for the whole name with the group ``layer`` and, where experts come one by one, the group
``expert``. ``relabel_state_dict`` works on tensors, ``hf_checkpoint`` on files, by one table.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.placement.plan import PlacementPlan, check_is_permutation, source_slots
from moe_locality.trace.recorder.hooks import layer_numbers

# -- names of all families ---------------------------------------------------------------------

_LAYER = r".*(?:layers|blocks)\.(?P<layer>\d+)\."
_ONE_BY_ONE = r"experts\.(?P<expert>\d+)\..+"
_PARTS = r"(?:gate_up_proj|(?:gate|up|down)_proj|fc[12]|w13|w[123]|(?:gate_and_up|down)_projs)"
_QUANTISED = r"(?:[._](?:weight|bias|blocks|scales?|inv|amax|outer|denominator))*"
_STACKED = r"experts\." + _PARTS + _QUANTISED
_BESIDE = r"(?:.*\.)?(?:mtp|talker|visual|vision_(?:tower|encoder|model))\..*"
"""Layers that predict several tokens, speech and images have routers and experts of their own,
which no plan of the language model's layers moves: they stay as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Patterns of a family of models: its routers with their biases, the tensors of its experts.

    ``ids``: tables whose values are numbers of experts. ``keep``: what belongs to no expert, though
    it looks like it. ``grouped``: the router may pick groups of experts first, which no tensor
    says. ``extra``: a router has rows past the experts (shared, zero computation), which stay.
    ``folded``: the experts of a tensor are one below the other, ``[E * F, D]``."""

    router: str
    experts: tuple[str, ...]
    ids: str | None = None
    keep: tuple[str, ...] = ()
    grouped: bool = False
    extra: bool = False
    folded: bool = False


def _family(block: str, router: str, *more: str, keep: tuple[str, ...] = (), **options) -> Names:
    """Names below ``layers.N.`` and a block; ``more``: patterns of stacked experts."""
    block = _LAYER + block
    experts = tuple(block + name for name in (_STACKED, _ONE_BY_ONE, *more))
    return Names(router=block + router, experts=experts, keep=(_BESIDE, *keep), **options)


def _all(families: str, names: Names, **options: Any) -> dict[str, Names]:
    return dict.fromkeys(families.split(), replace(names, **options))


def _only(parts: str) -> tuple[str, ...]:
    """Where a layer itself is the block: what is not below these parts belongs to no expert."""
    return (rf".*(?:layers|blocks)\.\d+\.(?!(?:{parts})\.).*",)


_MLP = r"mlp\."
_MIXTRAL = r"(?:mlp|block_sparse_moe)\."
_GATE = r"gate\.weight"
_SCORE = r"(?:moe_statics\.)?e_score_correction_bias"
_BIASED = rf"(?:{_GATE}|(?:gate\.)?{_SCORE})"
_PLAIN = _family(_MLP, _GATE)
_CORRECTED = _family(_MIXTRAL, _BIASED)
_LINEAR = r"(?:input|output)_linear\.weight"

_UNGROUPED = {
    "minimax_m3_vl": _CORRECTED,
    "laguna": _family(_MIXTRAL, rf"(?:{_GATE}|(?:gate|experts)\.{_SCORE})"),
    "muse_spark": _family(_MLP, _BIASED, keep=(r".*\.experts\.post_expert_norm\.weight",)),
    "kolibri1": _family(
        r"(?:mlp|moe)\.", rf"(?:{_GATE}|gate\.{_SCORE}|router\.expert_bias)", keep=_only("mlp|moe")
    ),
    "step3p7": _family(
        r"(?:mlp|moe)\.",
        rf"(?:{_GATE}|gate\.{_SCORE}|router_bias)",
        r"(?<=moe\.)(?:gate|up|down)_proj\.weight(?:_scale_inv)?",
    ),
    "deepseek_v4": _family(
        r"(?:mlp|ffn)\.",
        rf"gate\.(?:weight|bias|{_SCORE})",
        ids=_LAYER + r"(?:mlp|ffn)\.gate\.tid2eid",
    ),
    **_all(
        "inkling inkling2 inkling2_loop",
        _family(_MLP, rf"gate\.(?:weight|bias|{_SCORE})", extra=True),
    ),
}
"""Families without groups, by names that group-limited routers have too: that has to be said."""

PRESETS = {
    **{family: replace(names, grouped=True) for family, names in _UNGROUPED.items()},
    **_all("cohere2_moe flex_olmo flint lara_mini mellum olmoe qwen2_moe qwen3_5_moe", _PLAIN),
    **_all("qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl_moe qwen4_exp", _PLAIN),
    **_all("deepseek_v2 deepseek_ocr2 mistral4 unlimited_ocr", _PLAIN, grouped=True),
    **_all("mixtral minimax", _family(_MIXTRAL, _GATE)),
    "phimoe": _family(_MIXTRAL, r"(?:gate|router)\.weight"),
    "ernie4_5_moe": _family(
        _MIXTRAL, rf"(?:{_GATE}|(?:gate\.)?moe_statics\.e_score_correction_bias)"
    ),
    "minimax_m2": _family(_MIXTRAL, rf"(?:{_GATE}|e_score_correction_bias)"),
    **_all("axk1 axk2 beam deepseek_v3 deepseek_v32 dots1 dots3_note", _CORRECTED, grouped=True),
    **_all("exaone_moe glm4_moe glm4_moe_lite glm4v_moe glm5_next", _CORRECTED, grouped=True),
    **_all("glm_moe_dsa hy_v4 hy_v4_vl kimi_k25 kimi_linear", _CORRECTED, grouped=True),
    **_all("mimo_v2_flash solar_open", _CORRECTED, grouped=True),
    "bailing_hybrid": _family(_MLP, rf"gate\.(?:weight|expert_bias|{_SCORE})", grouped=True),
    **_all(
        "nemotron_h nemotron_h_omni nemotron3_5_transcribe",
        _family(r"mixer\.", _BIASED, grouped=True),
    ),
    "mistral_large4": _family(r"(?:mlp\.)?", _GATE, grouped=True, keep=_only(r"mlp|gate|experts")),
    **_all("gpt_oss openai_privacy_filter", _family(_MLP, r"router\.(?:weight|bias)")),
    "hy_v3": _family(_MLP, rf"(?:(?:router\.)?gate\.weight|expert_bias|{_SCORE})"),
    "afmoe": _family(_MLP, r"(?:router\.gate\.weight|expert_bias)"),
    "hunyuan_v1_moe": _family(_MLP, r"gate\.wg\.weight"),
    "aria": _family(_MLP, r"router\.weight"),
    **_all("jamba llama4", _family(r"feed_forward\.", r"router\.weight")),
    "lfm2_moe": _family(r"feed_forward\.", r"(?:gate\.weight|expert_bias)"),
    "jetmoe": _family(_MLP, r"router\.layer\.weight", _LINEAR, keep=(r".*\.self_attention\..*",)),
    **_all(
        "granitemoe granitemoe_swa granitemoehybrid granitemoeshared",
        _family(r"block_sparse_moe\.", r"router\.(?:layer\.)?weight", _LINEAR),
    ),
    "gemma4": _family(
        "", r"router\.(?:proj\.weight|per_expert_scale)", keep=_only("router|experts")
    ),
    "longcat_flash": _family(_MLP, rf"router\.(?:classifier\.weight|{_SCORE})", extra=True),
    "zaya": _family(
        _MLP,
        r"gate\.(?:balancing_biases|router_mlp\.out_proj\.weight)",
        extra=True,
        keep=(r".*\.gate\.(?:down_proj|router_mlp\.(?:fc\d|norm)|router_states_scale).*",),
    ),
    "dbrx": _family(r"ffn\.", r"router\.layer\.weight", r"experts\.mlp\.(?:[vw]1|w2)", folded=True),
    "switch_transformers": Names(
        router=r".*block\.(?P<layer>\d+)\.layer\.\d+\.mlp\.router\.classifier\.weight",
        experts=(r".*block\.(?P<layer>\d+)\..*mlp\.experts\.expert_(?P<expert>\d+)\..+",),
    ),
}
"""Names of all families, in transformers 5 and in the files on the hub that it reads."""

NEVER_GROUPED = frozenset(_UNGROUPED)
REFUSED = {
    "diffusion_gemma": "its encoder and decoder share their experts, and a trace has them twice",
    "doge": "its experts are pairs of a row and a column of keys, which no order can move alone",
    "ernie4_5_vl_moe": "its files have experts of text and of images in one list",
    "nllb_moe": "transformers runs its experts 0 and 1 whatever the router picks",
    "vitpose": "it has no router: the caller names an expert",
    "vitpose_backbone": "it has no router: the caller names an expert",
}
"""Families that cannot be relabelled, and why."""

_SHARED = re.compile(r"shared_(?:experts?|mlp)(?:_gate)?\.")
"""In the name of what serves every token: no axis of it belongs to experts."""


def relabel_state_dict(
    state: Mapping[str, Any],
    plan: PlacementPlan,
    *,
    preset: str | None = None,
    router_pattern: str | None = None,
    expert_patterns: Sequence[str] | None = None,
    keep_patterns: Sequence[str] = (),
    current: PlacementPlan | None = None,
    num_expert_groups: int | None = None,
) -> dict[str, Any]:
    """Return ``state`` with routers and experts in the slot order of ``plan``; the input stays.

    Args:
        state: name to tensor (torch or numpy).
        preset: one of ``PRESETS``; or give both patterns. ``router_pattern`` has to cover what
            else has a value per expert, such as ``e_score_correction_bias``.
        keep_patterns: names of tensors in MoE blocks that belong to no expert, though an axis is as
            long as there are experts (or they hold integers, or are called experts): they stay.
        current: the plan that ``state`` follows already; None: logical order.
        num_expert_groups: groups of a group-limited router (DeepSeek-V3, arXiv 2412.19437). It
            picks groups first, so a permutation must map whole groups onto groups. 1: it does not.
            Presets of families with such routers ask for it (``n_group`` of the config).

    Raises:
        ConfigError: unknown preset, or names that the patterns do not cover.
        PlacementError: the plan does not fit, has replicas, or tears a group apart.
    """
    names = _names_of(preset, router_pattern, expert_patterns)
    if preset is not None and names.grouped and num_expert_groups is None:
        raise ConfigError(
            f"found the preset {preset!r} and no num_expert_groups, expected it: routers of this "
            "family may pick groups of experts first; give n_group of the model's config (1: none)"
        )
    names = replace(names, keep=(*names.keep, *keep_patterns))
    job = Relabelling(state, plan, names, current=current, num_groups=num_expert_groups)
    job.check_tied()
    return {name: job.value(name) for name in state}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRole:
    """Where a tensor belongs, and how its name matched which pattern."""

    layer: int
    match: re.Match[str]

    @property
    def expert(self) -> int | None:
        """The number of its expert; None: rows of all."""
        found = self.match.groupdict().get("expert")
        return None if found is None else int(found)


class Relabelling:
    """What each tensor of a model becomes under a plan; the constructor checks all names, with the
    errors of ``relabel_state_dict``.

    ``state``: name to anything with ``shape`` and ``dtype``, torch or numpy; values of a lazy
    mapping are asked for their shapes here and for their contents by ``value`` alone."""

    def __init__(
        self,
        state: Mapping[str, Any],
        plan: PlacementPlan,
        names: Names,
        *,
        current: PlacementPlan | None = None,
        num_groups: int | None = None,
    ) -> None:
        check_is_permutation(plan)
        self.state, self.names, self.num_experts = state, names, plan.num_experts
        self.roles = _match(state, names)
        roles = list(self.roles.values())
        self.layers = sorted({r.layer for r in roles if r.match.re.pattern == names.router})
        if not self.layers:
            raise ConfigError(
                f"found no router named like {names.router!r} in {len(state)} tensors, expected "
                "one per MoE layer: give the weights of the whole model, choose another preset, or "
                "give router_pattern"
            )
        self._check_all_covered()
        rows = plan.rows_for(self.layers, len(self.layers))
        now: Any = [np.arange(plan.num_experts)] * plan.num_layers
        if current is not None:
            check_is_permutation(current)
            current.check_fits(layer_ids=plan.layer_ids, num_experts=plan.num_experts)
            now = current.physical_to_logical_map
        self.sources = {
            layer: source_slots(now[row], plan.physical_to_logical_map[row])
            for row, layer in zip(rows, self.layers, strict=True)
        }
        if num_groups:
            check_groups(plan, num_groups)
        others = (names.router, names.ids)
        self._check_experts([role for role in roles if role.match.re.pattern not in others])

    def value(self, name: str) -> Any:
        """The tensor that the file or model has under ``name`` afterwards; PlacementError where a
        shape does not fit."""
        role, value = self.roles.get(name), self.state[name]
        if role is None:
            return value
        source = self.sources[role.layer]
        if role.match.re.pattern == self.names.ids:
            return _renumbered(name, value, source)
        if role.expert is None:
            return _rows(name, value, source, self.names)
        if role.expert >= len(source):  # past the real ones
            return value
        start, end = role.match.span("expert")
        other = f"{name[:start]}{source[role.expert]}{name[end:]}"
        found = self.state.get(other)
        if found is None or (found.shape, found.dtype) != (value.shape, value.dtype):
            what = "nothing" if found is None else f"{found.dtype} {list(found.shape)}"
            raise PlacementError(
                f"found {what} under {other}, expected {value.dtype} {list(value.shape)} as {name} "
                "is, whose place it takes: experts of one layer have to be alike"
            )
        return found

    def check_tied(self) -> None:
        """Raise PlacementError where one tensor has two names that the plan moves in two ways."""
        stays = np.arange(self.num_experts)
        first: dict[int, tuple[str, Any]] = {}
        for name, value in self.state.items():
            role = self.roles.get(name)
            way = None
            if role is not None and (self.sources[role.layer] != stays).any():
                way = (self.sources[role.layer].tolist(), role.expert)
            memory = value.data_ptr() if torch.is_tensor(value) else value.ctypes.data
            other, its_way = first.setdefault(memory or id(value), (name, way))
            if way != its_way:
                raise PlacementError(
                    f"found one tensor under the names {other} and {name}, and a plan that moves "
                    "them in different ways, expected experts and router of each layer to be its "
                    "own: give both layers the same order in the plan, or untie them (clone one of "
                    "them)"
                )

    def _check_all_covered(self) -> None:
        """Refuse tensors that look like those of experts and that no pattern covers."""
        names: dict[int, list[str]] = {}
        for name, role in self.roles.items():
            names.setdefault(role.layer, []).append(name)
        # paths of modules, which os.path understands with its own separator
        paths = ([name.replace(".", os.sep) for name in found] for found in names.values())
        blocks = tuple(os.path.commonpath(found).replace(os.sep, ".") + "." for found in paths)
        missed = []
        for name, value in self.state.items():
            if name in self.roles or any(re.fullmatch(kept, name) for kept in self.names.keep):
                continue
            if ".experts." in name or (
                name.startswith(blocks)
                and not _SHARED.search(name)
                and (self.num_experts in value.shape or "int" in str(value.dtype))
            ):
                missed.append(name)
        if missed:
            raise ConfigError(
                f"found {len(missed)} expert tensors that no pattern covers, the first "
                f"{missed[0]!r} of shape {tuple(self.state[missed[0]].shape)}, expected all: they "
                "would stay with the wrong experts; choose another preset, cover them with "
                "router_pattern (one value per expert) or expert_patterns, or name in "
                "keep_patterns what belongs to no expert"
            )

    def _check_experts(self, roles: list[TensorRole]) -> None:
        """``roles``: of what is neither router nor table."""
        alone = {role.layer for role in roles} - set(self.layers)
        if alone:
            raise ConfigError(
                f"layers {sorted(alone)}: found experts and no router, expected both: give the "
                "whole state dict of the layer, and a router_pattern that covers its router"
            )
        for layer in self.layers:
            numbers = {role.expert for role in roles if role.layer == layer}
            if not numbers:
                raise ConfigError(
                    f"layer {layer}: found a router and no experts, expected both: give the whole "
                    "state dict of the layer, and expert_patterns that cover its experts"
                )
            single = {number for number in numbers if number is not None}
            single -= {n for n in single if self.names.extra and n >= self.num_experts}
            if single and single != set(range(self.num_experts)):
                raise PlacementError(
                    f"layer {layer}: found {len(single)} experts, expected the {self.num_experts} "
                    "of the plan: make a plan for this model, or give all shards of the layer "
                    "together"
                )


def check_groups(plan: PlacementPlan, num_groups: int) -> None:
    """Raise PlacementError unless every run of E / num_groups slots holds one whole group."""
    if plan.num_experts % num_groups:
        raise PlacementError(
            f"found {plan.num_experts} experts in {num_groups} groups, expected a multiple"
        )
    size = plan.num_experts // num_groups
    blocks = plan.physical_to_logical_map.reshape(plan.num_layers, num_groups, size) // size
    torn = np.argwhere((blocks != blocks[:, :, :1]).any(axis=2))
    if len(torn):
        layer, block = torn[0].tolist()
        mixed = sorted(set(blocks[layer, block].tolist()))
        raise PlacementError(
            f"layer {plan.layer_ids[layer]}: found slots {block * size} to "
            f"{(block + 1) * size - 1} with experts of groups {mixed}, expected one group: this "
            "router picks groups first; solve with expert_groups"
        )


def _names_of(preset: str | None, router: str | None, experts: Sequence[str] | None) -> Names:
    if preset is not None and preset not in PRESETS:
        why = f": {REFUSED[preset]}" if preset in REFUSED else ""
        raise ConfigError(f"found the preset {preset!r}{why}, expected one of {sorted(PRESETS)}")
    names = PRESETS[preset] if preset is not None else Names(router="", experts=())
    names = replace(names, router=router or names.router, experts=tuple(experts or names.experts))
    if not names.router or not names.experts:
        raise ConfigError(
            "found no names of routers and experts, expected preset= or both router_pattern= and "
            f"expert_patterns=: the presets are {sorted(PRESETS)}"
        )
    for pattern in (names.router, *names.experts):
        if "layer" not in re.compile(pattern).groupindex:
            raise ConfigError(
                f"found no group named layer in the pattern {pattern!r}, expected one around the "
                r"number of the layer: write (?P<layer>\d+) there"
            )
    return names


def _match(state: Mapping[str, Any], names: Names) -> dict[str, TensorRole]:
    """The role of each name that a pattern covers and that does not stay."""
    patterns = [re.compile(p) for p in (names.router, *names.experts, names.ids) if p]
    kept = [re.compile(pattern) for pattern in names.keep]
    matches: dict[str, re.Match[str]] = {}
    for name in state:
        match = next(filter(None, (pattern.fullmatch(name) for pattern in patterns)), None)
        if match is not None and not any(pattern.fullmatch(name) for pattern in kept):
            matches[name] = match
    prefixes = {name: name[: match.end("layer")] for name, match in matches.items()}
    numbers = {prefixes[name]: int(match["layer"]) for name, match in matches.items()}
    if len(set(numbers.values())) < len(numbers):  # encoder and decoder count from 0 each
        counted = layer_numbers([f"{prefix}.moe" for prefix in numbers], state)
        numbers = dict(zip(numbers, counted or range(len(numbers)), strict=True))
    return {n: TensorRole(layer=numbers[prefixes[n]], match=m) for n, m in matches.items()}


def _rows(name: str, value: Any, source: np.ndarray, names: Names) -> Any:
    shape, experts = tuple(value.shape), len(source)
    count = shape[0] if shape else 1
    order = np.concatenate([source, np.arange(experts, count)]) if names.extra else source
    rows = torch.from_numpy(order) if torch.is_tensor(value) else order
    if count == experts or (names.extra and count > experts):
        return value[rows]
    if shape == (1, experts):
        return value[:, rows]
    if names.folded and count % experts == 0:
        return value.reshape(experts, count // experts, *shape[1:])[rows].reshape(shape)
    if np.prod(shape) == 1 and not re.fullmatch(names.router, name):  # one scale for all experts
        return value
    raise PlacementError(
        f"{name}: found the shape {shape}, expected {experts} rows, one per expert of the plan: "
        "make a plan for this model"
    )


def _renumbered(name: str, value: Any, source: np.ndarray) -> Any:
    """A table of expert ids, where each has the number of its new slot."""
    if bool((value < 0).any()) or bool((value >= len(source)).any()):
        raise PlacementError(
            f"{name}: found numbers outside 0 to {len(source) - 1}, expected those of the plan's "
            "experts: make a plan for this model"
        )
    slots = np.argsort(source)
    if torch.is_tensor(value):
        return torch.from_numpy(slots)[value.long()].to(value.dtype)
    return slots[value].astype(value.dtype)
