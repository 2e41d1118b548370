"""The optimizer state of a checkpoint at ZeRO stage 0: moments follow their experts, exactly.

DeepSpeed writes one file per rank of the EP group, ``expp_rank_{r}_…_optim_states.pt``, with the
state dict of a torch optimizer: parameters are numbers, in the order of the parameter groups. Their
names come from the entry that moe_locality saves, or, on demand, from the order of the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_locality.layer.bake_files import EXPERT_KEY, GATE_KEY, CheckpointFiles
from moe_locality.layer.checkpoint_io import read_file
from moe_locality.layer.relabel_weights import GATE_ROWS


class NotBaked(Exception):
    """The optimizer state cannot be baked exactly; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerStates:
    """States of all ranks. ``names[i]`` is the name of parameter i, experts by local number."""

    files: CheckpointFiles
    states: dict[tuple[int, int], dict[str, Any]]
    names: list[str]
    per_rank: int

    def baked(
        self, sources: Sequence[np.ndarray]
    ) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
        """Yield ((EP rank, mp rank), content of its file) in the new order."""
        index_of = {name: i for i, name in enumerate(self.names)}
        layer_of = {prefix: layer for layer, prefix in enumerate(self.files.prefixes)}
        gates = {
            GATE_KEY.format(prefix, row): sources[layer]
            for prefix, layer in layer_of.items()
            for row in GATE_ROWS
        }
        for (rank, mp), content in self.states.items():
            baked = dict(content)
            if content.get("optimizer") is None:
                yield (rank, mp), baked
                continue
            optimizer = baked["optimizer"] = dict(content["optimizer"])
            old = optimizer["state"]
            new = optimizer["state"] = {}
            for i, name in enumerate(self.names):
                state = old.get(i)
                if name in gates and state is not None:
                    state = _permuted(state, gates[name])
                elif match := EXPERT_KEY.fullmatch(name):
                    source = sources[layer_of[match[1]]]
                    slot = int(source[rank * self.per_rank + int(match[2])])
                    there = self.states[slot // self.per_rank, mp]["optimizer"]["state"]
                    local = name.replace(
                        f".deepspeed_experts.{match[2]}.",
                        f".deepspeed_experts.{slot % self.per_rank}.",
                    )
                    state = there.get(index_of[local])
                if state is not None:
                    new[i] = state
            yield (rank, mp), baked


def read_optimizer_states(
    files: CheckpointFiles,
    dense: dict[int, dict[str, Any]],
    names: list[list[str]] | None,
    *,
    trusted: bool,
    trust_order: bool,
) -> OptimizerStates | None:
    """Read all optimizer files and check that they can be baked; None: the checkpoint has none.

    Args:
        names: per parameter group, the names of its parameters, or None where nobody wrote them.
        trust_order: without names, take the order of the model.

    Raises:
        NotBaked: why not.
    """
    if files.other_optimizer:
        raise NotBaked(
            f"found {files.other_optimizer[0].name}, expected expp_rank files: ZeRO partitions "
            "the state into flat pieces that belong to slots; load with load_module_only=True"
        )
    if not files.optimizer:
        return None
    states = {key: read_file(path, trusted=trusted) for key, path in files.optimizer.items()}
    contents = [content.get("optimizer") for content in states.values()]
    if all(content is None for content in contents):
        return OptimizerStates(files=files, states=states, names=[], per_rank=1)  # as they are
    for content in contents:
        if not isinstance(content, dict) or set(content) != {"state", "param_groups"}:
            found = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise NotBaked(
                f"found an optimizer state with {found}, expected a plain torch optimizer's: fp32 "
                "masters belong to slots; load with load_module_only=True"
            )
    if names is None and trust_order:
        names = _names_by_order(files, next(iter(dense.values())), states)
    if names is None:
        raise NotBaked(
            "the checkpoint does not name the optimizer's parameters (moe_locality did not save "
            "it); if they are in the order of the model, allow it (trust_parameter_order=True, "
            "--trust-parameter-order), else load with load_module_only=True"
        )
    ranks = 1 + max(rank for rank, _ in states)
    per_rank, rest = divmod(files.num_experts, ranks)
    flat = [name for group in names for name in group]
    _check_names(files, flat, per_rank if rest == 0 else 0, contents)
    _check_shapes(flat, contents, files.num_experts)
    return OptimizerStates(files=files, states=states, names=flat, per_rank=per_rank)


def _check_names(files: CheckpointFiles, names: list[str], per_rank: int, contents: Any) -> None:
    local: dict[str, set[int]] = {prefix: set() for prefix in files.prefixes}
    for name in names:
        if match := EXPERT_KEY.fullmatch(name):
            local.setdefault(match[1], set()).add(int(match[2]))
    trained = {prefix: found for prefix, found in local.items() if found}
    if any(found != set(range(per_rank)) for found in trained.values()):
        raise NotBaked(
            f"found {len(files.optimizer)} optimizer files and the local experts "
            f"{ {p: sorted(f) for p, f in trained.items()} }, expected {per_rank} per rank in "
            "every layer: layers with different ep_size cannot be baked"
        )
    for content in contents:
        numbers = [i for group in content["param_groups"] for i in group["params"]]
        if numbers != list(range(len(names))):
            raise NotBaked(
                f"found {len(numbers)} parameters in an optimizer file, expected the "
                f"{len(names)} that the checkpoint names"
            )


def _check_shapes(names: list[str], contents: Any, num_experts: int) -> None:
    """Every moment of a router must have a row per expert; a step counter is one number."""
    for content in contents:
        for i, name in enumerate(names):
            if ".deepspeed_moe.gate." not in name:
                continue
            for key, value in content["state"].get(i, {}).items():
                if torch.is_tensor(value) and value.numel() != 1 and len(value) != num_experts:
                    raise NotBaked(
                        f"{name}: found the state {key!r} of shape {tuple(value.shape)}, expected "
                        f"{num_experts} rows"
                    )


def _permuted(state: dict[str, Any], source: np.ndarray) -> dict[str, Any]:
    order = torch.from_numpy(source)
    return {
        key: value[order] if torch.is_tensor(value) and value.numel() != 1 else value
        for key, value in state.items()
    }


def _names_by_order(
    files: CheckpointFiles, dense: dict[str, Any], states: dict[tuple[int, int], dict[str, Any]]
) -> list[list[str]] | None:
    """DeepSpeed's default: a group of all dense parameters, then the experts, in model order."""
    buffers = set(dense.get("buffer_names") or ())
    shapes = {k: tuple(v.shape) for k, v in dense["module"].items() if k not in buffers}
    per_rank = files.num_experts // (1 + max(rank for rank, _ in states))
    mp = min(files.dense)
    experts = {}
    for layer in range(files.num_layers):
        for slot in range(per_rank):
            path = files.experts[layer, slot, mp]
            experts |= {k: tuple(v.shape) for k, v in read_file(path).items() if k not in buffers}
    content = states[0, mp]["optimizer"]
    sizes = [len(group["params"]) for group in content["param_groups"]]
    flat = {**shapes, **experts}
    if sum(sizes) != len(flat) or len(shapes) != sizes[0]:
        raise NotBaked(
            f"found parameter groups of {sizes}, expected {len(shapes)} dense and {len(experts)} "
            "expert parameters in the order of the model: the order cannot be trusted"
        )
    for i, (name, shape) in enumerate(flat.items()):
        found = {
            tuple(v.shape)
            for v in content["state"].get(i, {}).values()
            if torch.is_tensor(v) and v.numel() != 1
        }
        if found - {shape}:
            raise NotBaked(
                f"found states of shape {sorted(found)} for parameter {i}, expected {shape} of "
                f"{name}: the order of the model is not the optimizer's"
            )
    names = iter(flat)
    return [[next(names) for _ in range(size)] for size in sizes]
