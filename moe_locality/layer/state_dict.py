"""Put a placement into a state dict with the names of Hugging Face models: a pure function.

Routers are ``[E, D]`` (and biases ``[E]`` or ``[1, E]``). Experts are either stacked, ``[E, …]``
(transformers 5), or one by one, ``experts.{e}.…`` (files on the hub). A pattern is a regular
expression for the whole name with the group ``layer`` and, where experts come one by one, the group
``expert``.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer.slots import check_is_permutation, source_slots
from moe_locality.placement.plan import PlacementPlan

_LAYER = r".*layers\.(?P<layer>\d+)\."
_MLP = _LAYER + r"mlp\."
_MIXTRAL = _LAYER + r"(?:mlp|block_sparse_moe)\."
_STACKED = r"experts\.(?:gate_up_proj|up_proj|down_proj)"
_ONE_BY_ONE = r"experts\.(?P<expert>\d+)\..+"


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Patterns of a family of models: its routers with their biases, the tensors of its experts.

    ``grouped``: the router may pick groups of experts first, which no tensor says.
    """

    router: str
    experts: tuple[str, ...]
    grouped: bool = False


def _family(block: str, router: str = r"gate\.weight", grouped: bool = False) -> Names:
    return Names(
        router=block + router, experts=(block + _STACKED, block + _ONE_BY_ONE), grouped=grouped
    )


_BIASED = r"(?:gate\.weight|(?:gate\.)?(?:moe_statics\.)?e_score_correction_bias)"
_GROUPED = ("deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "dots1")
_GROUPED += ("exaone_moe", "solar_open", "mimo_v2_flash", "kimi_linear")
_GROUPED += ("laguna",)  # has no groups, but the same names: that has to be said

PRESETS = {
    "mixtral": _family(_MIXTRAL),
    "qwen3_moe": _family(_MLP),
    "olmoe": _family(_MLP),
    "gpt_oss": Names(
        router=_MLP + r"router\.(?:weight|bias)",
        experts=(_MLP + _STACKED + r"(?:_bias|_blocks|_scales)?",),
    ),
    **dict.fromkeys(_GROUPED, _family(_MIXTRAL, _BIASED, grouped=True)),
    "ernie4_5_moe": _family(
        _MIXTRAL, r"(?:gate\.weight|(?:gate\.)?moe_statics\.e_score_correction_bias)"
    ),
    **dict.fromkeys(
        ("minimax_m2", "hy_v3"), _family(_MIXTRAL, r"(?:gate\.weight|e_score_correction_bias)")
    ),
    "nemotron_h": _family(_LAYER + r"mixer\.", _BIASED, grouped=True),
    "lfm2_moe": _family(_LAYER + r"feed_forward\.", r"(?:gate\.weight|expert_bias)"),
    "afmoe": _family(_MLP, r"(?:router\.gate\.weight|expert_bias)"),
}
"""Names of transformers 5, and of the files on the hub that it reads."""

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
    router, experts = _patterns(preset, router_pattern, expert_patterns)
    check_is_permutation(plan)
    routers = _match(state, [router])
    layers = sorted({layer for layer, _ in routers.values()})
    if not layers:
        raise ConfigError(
            f"found no router named like {router!r} in {len(state)} tensors, expected one per MoE "
            f"layer: choose another preset ({', '.join(PRESETS)}) or give router_pattern"
        )
    found = _match(state, experts)
    places = {**routers, **found}
    _check_all_covered(state, places, plan.num_experts, keep_patterns)
    if preset is not None and PRESETS[preset].grouped and num_expert_groups is None:
        raise ConfigError(
            f"found the preset {preset!r} and no num_expert_groups, expected it: routers of this "
            "family may pick groups of experts first; give n_group of the model's config (1: none)"
        )
    sources = _sources(plan, current, layers)
    if num_expert_groups:
        check_groups(plan, num_expert_groups)
    _check_experts(found, layers, plan.num_experts)
    _check_tied(state, places, sources)
    relabelled: dict[str, Any] = {}
    for name in state:
        layer, expert = places.get(name, (None, None))
        if layer is None:
            relabelled[name] = state[name]
        elif expert is None:
            relabelled[name] = _rows(name, state[name], sources[layer])
        else:
            relabelled[name] = state[_renamed(name, experts, int(sources[layer][expert]))]
    return relabelled


def _check_tied(
    state: Mapping[str, Any],
    places: Mapping[str, tuple[int, int | None]],
    sources: Mapping[int, np.ndarray],
) -> None:
    """Raise PlacementError where one tensor has two names that the plan moves in two ways."""
    stays = np.arange(len(next(iter(sources.values()))))
    first: dict[int, tuple[str, Any]] = {}
    for name, value in state.items():
        layer, expert = places.get(name, (None, None))
        way = None if layer is None else sources[layer]
        way = None if way is None or (way == stays).all() else (way.tolist(), expert)
        memory = value.data_ptr() if torch.is_tensor(value) else value.ctypes.data
        other, its_way = first.setdefault(memory or id(value), (name, way))
        if way != its_way:
            raise PlacementError(
                f"found one tensor under the names {other} and {name}, and a plan that moves them "
                "in different ways, expected experts and router of each layer to be its own: give "
                "both layers the same order in the plan, or untie them (clone one of them)"
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


def _patterns(
    preset: str | None, router: str | None, experts: Sequence[str] | None
) -> tuple[str, list[str]]:
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"found the preset {preset!r}, expected one of {sorted(PRESETS)}")
    names = PRESETS[preset] if preset is not None else None
    router = router or (names.router if names else None)
    patterns = list(experts or (names.experts if names else ()))
    if router is None or not patterns:
        raise ConfigError(
            "found no names of routers and experts, expected preset= or both router_pattern= and "
            f"expert_patterns=: the presets are {sorted(PRESETS)}"
        )
    for pattern in (router, *patterns):
        if "layer" not in re.compile(pattern).groupindex:
            raise ConfigError(
                f"found no group named layer in the pattern {pattern!r}, expected one around the "
                r"number of the layer: write (?P<layer>\d+) there"
            )
    return router, patterns


def _match(state: Mapping[str, Any], patterns: list[str]) -> dict[str, tuple[int, int | None]]:
    """Map each name that a pattern covers to (layer, expert or None)."""
    found = {}
    for name in state:
        for match in filter(None, (re.fullmatch(pattern, name) for pattern in patterns)):
            groups = match.groupdict()
            expert = groups.get("expert")
            found[name] = (int(groups["layer"]), None if expert is None else int(expert))
    return found


def _check_all_covered(
    state: Mapping[str, Any],
    places: Mapping[str, tuple[int, int | None]],
    num_experts: int,
    keep_patterns: Sequence[str],
) -> None:
    """Refuse tensors that look like those of experts and that no pattern covers."""
    names: dict[int, list[str]] = {}
    for name, (layer, _) in places.items():
        names.setdefault(layer, []).append(name)
    # paths of modules, which os.path understands with its own separator
    paths = ([name.replace(".", os.sep) for name in found] for found in names.values())
    blocks = tuple(os.path.commonpath(found).replace(os.sep, ".") + "." for found in paths)
    missed = [
        name
        for name, value in state.items()
        if name not in places
        and not any(re.fullmatch(pattern, name) for pattern in keep_patterns)
        and (
            ".experts." in name
            or (
                name.startswith(blocks)
                and not _SHARED.search(name)
                and (num_experts in value.shape or "int" in str(value.dtype))
            )
        )
    ]
    if missed:
        raise ConfigError(
            f"found {len(missed)} expert tensors that no pattern covers, the first {missed[0]!r} "
            f"of shape {tuple(state[missed[0]].shape)}, expected all: they would stay with the "
            "wrong experts; choose another preset, cover them with router_pattern (one value per "
            "expert) or expert_patterns, or name in keep_patterns what belongs to no expert"
        )


def _sources(
    plan: PlacementPlan, current: PlacementPlan | None, layers: list[int]
) -> dict[int, np.ndarray]:
    rows = plan.rows_for(layers, len(layers))
    if current is not None:
        check_is_permutation(current)
        current.check_fits(layer_ids=plan.layer_ids, num_experts=plan.num_experts)
    identity = np.tile(np.arange(plan.num_experts), (plan.num_layers, 1))
    now = identity if current is None else current.physical_to_logical_map
    return {
        layer: source_slots(now[row], plan.physical_to_logical_map[row])
        for row, layer in zip(rows, layers, strict=True)
    }


def _check_experts(
    found: dict[str, tuple[int, int | None]], layers: list[int], experts: int
) -> None:
    alone = {layer for layer, _ in found.values()} - set(layers)
    if alone:
        raise ConfigError(
            f"layers {sorted(alone)}: found experts and no router, expected both: give the whole "
            "state dict of the layer, and a router_pattern that covers its router"
        )
    for layer in layers:
        numbers = {expert for at, expert in found.values() if at == layer}
        if not numbers:
            raise ConfigError(
                f"layer {layer}: found a router and no experts, expected both: give the whole "
                "state dict of the layer, and expert_patterns that cover its experts"
            )
        single = numbers - {None}
        if single and single != set(range(experts)):
            raise PlacementError(
                f"layer {layer}: found {len(single)} experts, expected the {experts} of the plan: "
                "make a plan for this model, or give all shards of the layer together"
            )


def _rows(name: str, value: Any, source: np.ndarray) -> Any:
    rows = torch.from_numpy(source) if torch.is_tensor(value) else source
    if value.ndim and value.shape[0] == len(source):
        return value[rows]
    if tuple(value.shape) == (1, len(source)):
        return value[:, rows]
    raise PlacementError(
        f"{name}: found the shape {tuple(value.shape)}, expected {len(source)} rows, one per "
        "expert of the plan: make a plan for this model"
    )


def _renamed(name: str, patterns: list[str], expert: int) -> str:
    for match in filter(None, (re.fullmatch(pattern, name) for pattern in patterns)):
        if match.groupdict().get("expert") is not None:
            start, end = match.span("expert")
            return f"{name[:start]}{expert}{name[end:]}"
    return name
