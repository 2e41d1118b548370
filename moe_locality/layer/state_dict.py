"""Bake a placement into a state dict with the names of Hugging Face models: a pure function.

Routers are ``[E, D]`` (and a bias ``[E]``). Experts are either stacked, ``[E, …]`` (transformers
5), or one by one, ``experts.{e}.…`` (files on the hub). A pattern is a regular expression for the
whole name with the group ``layer`` and, where experts come one by one, the group ``expert``.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer.moves import check_is_permutation, source_slots
from moe_locality.placement.plan import PlacementPlan

_MLP = r".*layers\.(?P<layer>\d+)\.mlp\."
_MIXTRAL = r".*layers\.(?P<layer>\d+)\.(?:mlp|block_sparse_moe)\."
_STACKED = r"experts\.(?:gate_up_proj|down_proj)"
_ONE_BY_ONE = r"experts\.(?P<expert>\d+)\..+"


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """Patterns of a family of models: its routers, and the tensors of its experts."""

    router: str
    experts: tuple[str, ...]


PRESETS = {
    "mixtral": Names(
        router=_MIXTRAL + r"gate\.weight", experts=(_MIXTRAL + _STACKED, _MIXTRAL + _ONE_BY_ONE)
    ),
    "qwen3_moe": Names(
        router=_MLP + r"gate\.weight", experts=(_MLP + _STACKED, _MLP + _ONE_BY_ONE)
    ),
    "olmoe": Names(router=_MLP + r"gate\.weight", experts=(_MLP + _STACKED, _MLP + _ONE_BY_ONE)),
    "gpt_oss": Names(
        router=_MLP + r"router\.(?:weight|bias)",
        experts=(_MLP + _STACKED + r"(?:_bias|_blocks|_scales)?",),
    ),
}
"""Names of transformers 5, and of the files on the hub that it reads."""


def relabel_state_dict(
    state: Mapping[str, Any],
    plan: PlacementPlan,
    *,
    preset: str | None = None,
    router_pattern: str | None = None,
    expert_patterns: Sequence[str] | None = None,
    current: PlacementPlan | None = None,
    num_expert_groups: int | None = None,
) -> dict[str, Any]:
    """Return ``state`` with routers and experts in the slot order of ``plan``; the input stays.

    Args:
        state: name to tensor (torch or numpy).
        preset: one of ``PRESETS``; or give both patterns.
        current: the plan that ``state`` follows already; None: logical order.
        num_expert_groups: groups of a group-limited router (DeepSeek-V3, arXiv 2412.19437). It
            picks groups first, so a permutation must map whole groups onto groups.

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
    _check_all_covered(state, found)
    sources = _sources(plan, current, layers)
    if num_expert_groups:
        check_groups(plan, num_expert_groups)
    _check_experts(found, layers, plan.num_experts)
    places = {**routers, **found}
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


def _check_all_covered(state: Mapping[str, Any], found: dict[str, Any]) -> None:
    missed = [name for name in state if ".experts." in name and name not in found]
    if missed:
        raise ConfigError(
            f"found {len(missed)} expert tensors that no pattern covers, the first {missed[0]!r}, "
            "expected all: they would stay with the wrong experts; give expert_patterns"
        )


def _sources(
    plan: PlacementPlan, current: PlacementPlan | None, layers: list[int]
) -> dict[int, np.ndarray]:
    plan.check_fits(layer_count=len(layers))
    if plan.layer_ids not in (tuple(layers), tuple(range(len(layers)))):
        plan.check_fits(layer_ids=layers)
    if current is not None:
        check_is_permutation(current)
        current.check_fits(layer_ids=plan.layer_ids, num_experts=plan.num_experts)
    identity = np.tile(np.arange(plan.num_experts), (plan.num_layers, 1))
    now = identity if current is None else current.physical_to_logical_map
    return {
        layer: source_slots(now[row], plan.physical_to_logical_map[row])
        for row, layer in enumerate(layers)
    }


def _check_experts(
    found: dict[str, tuple[int, int | None]], layers: list[int], experts: int
) -> None:
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
    if value.ndim == 0 or value.shape[0] != len(source):
        raise PlacementError(
            f"{name}: found the shape {tuple(value.shape)}, expected {len(source)} rows, one per "
            "expert of the plan: make a plan for this model"
        )
    return value[torch.from_numpy(source) if torch.is_tensor(value) else source]


def _renamed(name: str, patterns: list[str], expert: int) -> str:
    for match in filter(None, (re.fullmatch(pattern, name) for pattern in patterns)):
        if match.groupdict().get("expert") is not None:
            start, end = match.span("expert")
            return f"{name[:start]}{expert}{name[end:]}"
    return name
