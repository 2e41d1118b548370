"""The files of a DeepSpeed MoE checkpoint: found, checked for gaps, and rewritten one by one."""

import copy
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer.checkpoint_io import (
    EXPERT_STATES,
    MODEL_STATES,
    OPTIMIZER_STATES,
    read_file,
)
from moe_locality.layer.relabel_weights import GATE_ROWS

EXPERT_KEY = re.compile(r"(.*)\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.+)")
GATE_KEY = "{}.deepspeed_moe.gate.{}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFiles:
    """Paths of one tag. ``prefixes[l]`` is the module name of MoE layer l.

    ``experts[layer, slot, mp]``, ``dense[mp]``, ``optimizer[ep rank, mp]``; ``other_optimizer``
    are ZeRO's partitions, on disk or offloaded; ``copied`` is everything else.
    """

    folder: Path
    num_layers: int
    num_experts: int
    prefixes: tuple[str, ...]
    experts: dict[tuple[int, int, int], Path]
    dense: dict[int, Path]
    optimizer: dict[tuple[int, int], Path]
    other_optimizer: tuple[Path, ...]
    copied: tuple[Path, ...]

    def left_out(self, optimizer_baked: bool) -> list[Path]:
        """Files that a bake does not write again."""
        return [*self.other_optimizer, *(() if optimizer_baked else self.optimizer.values())]


def find_files(folder: Path) -> CheckpointFiles:
    """Sort the files of a tag's folder and check that no expert is missing.

    Raises:
        ConfigError: no MoE checkpoint of this kind, or files are missing.
    """
    experts, dense, optimizer = {}, {}, {}
    other_optimizer, copied = [], []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.name if path.parent == folder else ""
        if match := EXPERT_STATES.fullmatch(name):
            layer, slot, mp = map(int, match.groups())
            experts[layer, slot, mp] = path
        elif match := MODEL_STATES.fullmatch(name):
            dense[int(match[1])] = path
        elif match := OPTIMIZER_STATES.fullmatch(name):
            optimizer[int(match[1]), int(match[2])] = path
        elif path.name.endswith("optim_states.pt") or "offloaded_tensors" in path.parts:
            other_optimizer.append(path)
        else:
            copied.append(path)
    layers, slots = _check_complete(folder, experts, dense, copied)
    return CheckpointFiles(
        folder=folder,
        num_layers=layers,
        num_experts=slots,
        prefixes=tuple(_prefix_of(experts[layer, 0, min(dense)]) for layer in range(layers)),
        experts=experts,
        dense=dense,
        optimizer=optimizer,
        other_optimizer=tuple(other_optimizer),
        copied=tuple(copied),
    )


def _check_complete(folder, experts, dense, copied) -> tuple[int, int]:
    if not experts:
        old = [p.name for p in copied if re.match(r"expert_\d+_mp_rank_", p.name)]
        what = f"found experts in an old format ({old[0]})" if old else "found no expert files"
        raise ConfigError(
            f"{folder}: {what}, expected layer_<L>_expert_<E>_mp_rank_<MP>_model_states.pt of "
            "deepspeed.moe.layer.MoE: only MoE checkpoints can be baked; load and save an old one "
            "with a newer DeepSpeed first"
        )
    layers = 1 + max(layer for layer, _, _ in experts)
    slots = 1 + max(slot for _, slot, _ in experts)
    ranks = sorted({mp for _, _, mp in experts} | set(dense))
    missing = [f"mp_rank_{mp:02d}_model_states.pt" for mp in ranks if mp not in dense]
    missing += [
        f"layer_{layer}_expert_{slot}_mp_rank_{mp:02d}_model_states.pt"
        for layer in range(layers)
        for slot in range(slots)
        for mp in ranks
        if (layer, slot, mp) not in experts
    ]
    if missing:
        raise ConfigError(
            f"{folder}: found {len(missing)} files missing, the first {missing[0]}, expected "
            f"{layers} MoE layers of {slots} experts: copy the whole checkpoint, or save it again"
        )
    return layers, slots


def _prefix_of(path: Path) -> str:
    """Return the module name of the layer that an expert file belongs to."""
    found = {match[1] for key in read_file(path) if (match := EXPERT_KEY.fullmatch(key))}
    if len(found) != 1:
        raise ConfigError(
            f"{path}: found the experts of {sorted(found)}, expected those of one "
            "deepspeed.moe.layer.MoE (AutoEP checkpoints cannot be baked: put the plan into the "
            "Hugging Face weights with relabel_state_dict, before deepspeed.initialize)"
        )
    return found.pop()


def write_experts(
    files: CheckpointFiles, sources: Sequence[np.ndarray], folder: Path, *, trusted: bool
) -> None:
    """Write every expert under its new slot's number, one file in memory at a time.

    Raises:
        PlacementError: layers of other orders have the same expert tensors.
    """
    seen: dict[str, tuple[int, str]] = {}
    for layer, slot, mp in files.experts:
        old = int(sources[layer][slot])
        states = read_file(files.experts[layer, old, mp], trusted=trusted)
        check_not_tied(states, layer, sources, seen)
        write_file(
            {_renumbered(key, slot): value for key, value in states.items()},
            folder / files.experts[layer, slot, mp].name,
        )


def check_not_tied(
    states: dict[str, Any],
    layer: int,
    sources: Sequence[np.ndarray],
    seen: dict[str, tuple[int, str]],
) -> None:
    """Refuse tensors that an earlier layer with another order has too; ``seen`` by digest.

    A file does not say what is tied. Tensors of one value (fresh biases, norms) do not count.
    """
    for name, value in states.items():
        if not torch.is_tensor(value) or value.numel() < 2 or (value == value.flatten()[0]).all():
            continue
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest = hashlib.blake2b(raw.numpy().data, digest_size=16).hexdigest()
        other, other_name = seen.setdefault(digest, (layer, name))
        if not np.array_equal(sources[other], sources[layer]):
            raise PlacementError(
                f"found the same values in {name} (MoE layer {layer}) and {other_name} (MoE layer "
                f"{other}), and a plan that moves these layers in different ways, expected experts "
                "and router of each layer to be its own: where the model ties them, one order "
                "would be wrong for the other layer. Give both layers the same order in the plan"
            )


def _renumbered(key: str, slot: int) -> str:
    match = EXPERT_KEY.fullmatch(key)
    if match is None:
        return key
    return f"{match[1]}.deepspeed_moe.experts.deepspeed_experts.{slot}.{match[3]}"


def bake_dense(
    states: dict[str, Any], files: CheckpointFiles, sources: Sequence[np.ndarray], path: Path
) -> dict[str, Any]:
    """Return a ``mp_rank`` state whose router rows are in the new order; the input stays.

    Raises:
        ConfigError: a router is missing, or frozen experts are stored in ZeRO's fragments.
    """
    baked = dict(states)
    module = baked["module"] = copy.copy(states.get("module") or {})
    for layer, prefix in enumerate(files.prefixes):
        name = GATE_KEY.format(prefix, "wg.weight")
        if name not in module:
            raise ConfigError(
                f"{path}: found no {name}, expected the router of MoE layer {layer}: pipeline "
                "checkpoints keep it in files of their own and cannot be baked yet"
            )
    fragments = states.get("frozen_param_fragments")
    if fragments and any(EXPERT_KEY.fullmatch(name) for name in fragments):
        raise ConfigError(
            f"{path}: found frozen experts among ZeRO's fragments, expected none: DeepSpeed keeps "
            "those of one rank only; save with ZeRO stage 0"
        )
    seen: dict[str, tuple[int, str]] = {}
    for layer, prefix in enumerate(files.prefixes):
        keys = (GATE_KEY.format(prefix, name) for name in GATE_ROWS)
        check_not_tied({key: module[key] for key in keys if key in module}, layer, sources, seen)
    permute_gates(module, files.prefixes, sources)
    if fragments:
        baked["frozen_param_fragments"] = copy.copy(fragments)
        permute_gates(baked["frozen_param_fragments"], files.prefixes, sources)
    return baked


def permute_gates(
    states: dict[str, Any], prefixes: Sequence[str], sources: Sequence[np.ndarray]
) -> None:
    """Put the rows of every router in ``states`` (name -> tensor) into the new order."""
    for prefix, source in zip(prefixes, sources, strict=True):
        for name in GATE_ROWS:
            key = GATE_KEY.format(prefix, name)
            if key in states:
                states[key] = states[key][torch.from_numpy(source)]


def write_file(states: Any, path: Path) -> None:
    """``torch.save`` that is on disk when it returns."""
    with path.open("wb") as file:
        torch.save(states, file)
        file.flush()
        os.fsync(file.fileno())
