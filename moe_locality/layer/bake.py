"""Write a placement into a checkpoint of DeepSpeed MoE or AutoEP: no ranks, no GPU, one process.

Experts are renumbered to their slots (file names and keys), the router rows and the moments of a
plain optimizer likewise, and the entry ``"moe_locality"`` says which slot holds which expert. The
result is a plain DeepSpeed checkpoint of the same function.

Not baked: the optimizer state of ZeRO and of fp16 and bf16 training (flat partitions and fp32
masters). It is left out, because it would silently follow the slots; the summary says so.
"""

import copy
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.files import check_is_new, replace_file, replace_folder
from moe_locality.layer.checkpoint import (
    EXPERT_KEY,
    EXPERT_STATES,
    KEY,
    MODEL_STATES,
    OPTIMIZER_STATES,
    make_entry,
    read_entry,
    read_file,
    renumbered,
    renumbered_key,
    resolve_tag,
)
from moe_locality.layer.hf_checkpoint import bake_hugging_face, groups_of, is_hugging_face
from moe_locality.layer.state import GATE_ROWS
from moe_locality.layer.state_dict import PRESETS, check_groups
from moe_locality.placement.plan import (
    PlacementPlan,
    check_is_permutation,
    count_moves,
    source_slots,
)
from moe_locality.trace.recorder.hooks import layer_numbers

logger = logging.getLogger(__name__)

DEEPSPEED_GATE = re.compile(rf"deepspeed_moe\.gate\.(?:{'|'.join(map(re.escape, GATE_ROWS))})")
AUTO_EP_GATE = re.compile(r"(?:\w+\.)?(?:gate\.(?:weight|bias)|(?:e_score_correction|expert)_bias)")
"""AutoEP's router has two names where transformers records what it says."""


# -- the files of a checkpoint ------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class CheckpointFiles:
    """Paths of one tag. ``prefixes[l]`` is the module name of MoE layer l; ``auto_ep``: whether
    AutoEP made the layers.

    ``experts[layer, slot, mp]``, ``dense[mp]``, ``optimizer[ep rank, mp]``; ``other_optimizer``
    are ZeRO's partitions, on disk or offloaded; ``copied`` is everything else."""

    folder: Path
    num_experts: int = 0
    auto_ep: bool = False
    prefixes: list[str] = field(default_factory=list)
    experts: dict[tuple[int, ...], Path] = field(default_factory=dict)
    dense: dict[int, Path] = field(default_factory=dict)
    optimizer: dict[tuple[int, int], Path] = field(default_factory=dict)
    other_optimizer: list[Path] = field(default_factory=list)
    copied: list[Path] = field(default_factory=list)

    def gates_among(self, names: Iterable[str]) -> dict[str, int]:
        """The MoE layer of every tensor of a router among ``names``."""
        rows = AUTO_EP_GATE if self.auto_ep else DEEPSPEED_GATE
        return {
            name: layer
            for layer, prefix in enumerate(self.prefixes)
            for name in names
            if name.startswith(f"{prefix}.") and rows.fullmatch(name, len(prefix) + 1)
        }


def find_files(folder: Path) -> CheckpointFiles:
    """Classify the files of a tag's folder; raise ConfigError where it is no MoE checkpoint of this
    kind, or files are missing."""
    files = CheckpointFiles(folder=folder)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.name if path.parent == folder else ""
        if match := EXPERT_STATES.fullmatch(name):
            files.experts[tuple(map(int, match.groups()))] = path
        elif match := MODEL_STATES.fullmatch(name):
            files.dense[int(match[1])] = path
        elif match := OPTIMIZER_STATES.fullmatch(name):
            files.optimizer[int(match[1]), int(match[2])] = path
        elif path.name.endswith("optim_states.pt") or "offloaded_tensors" in path.parts:
            files.other_optimizer.append(path)
        else:
            files.copied.append(path)
    num_layers, files.num_experts = _check_complete(files)
    for layer in range(num_layers):
        path = files.experts[layer, 0, min(files.dense)]
        found = {match[1]: key for key in read_file(path) if (match := EXPERT_KEY.fullmatch(key))}
        if len(found) != 1:
            raise ConfigError(
                f"{path}: found the experts of {sorted(found)}, expected those of one "
                "deepspeed.moe.layer.MoE or of one layer of AutoEP"
            )
        ((prefix, key),) = found.items()
        files.prefixes.append(prefix)
        files.auto_ep = ".deepspeed_moe." not in key
    return files


def _check_complete(files: CheckpointFiles) -> tuple[int, int]:
    """Return the numbers of layers and slots."""
    folder, experts, dense = files.folder, files.experts, files.dense
    if not experts:
        old = [p.name for p in files.copied if re.match(r"expert_\d+_mp_rank_", p.name)]
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


def _refuse_tied(
    first: dict[bytes, tuple[int, str]],
    sources: Sequence[np.ndarray],
    layer: int,
    tensors: dict[str, Any],
) -> None:
    """Refuse a tensor of a layer that another layer, which moves otherwise, has too (files do not
    say what is tied). Tensors of one value (fresh biases, norms) do not count.

    ``first``: layer and name of the tensors so far, by a hash of their bytes."""
    if all(np.array_equal(sources[0], other) for other in sources):
        return
    for name, value in tensors.items():
        if not torch.is_tensor(value) or value.numel() < 2 or (value == value.flatten()[0]).all():
            continue
        raw = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest = hashlib.blake2b(raw.numpy().data).digest()
        other, other_name = first.setdefault(digest, (layer, name))
        if not np.array_equal(sources[other], sources[layer]):
            raise PlacementError(
                f"found the same values in {name} (MoE layer {layer}) and {other_name} (MoE layer "
                f"{other}), and a plan that moves these layers in different ways, expected experts "
                "and router of each layer to be its own: where the model ties them, one order "
                "would be wrong for the other layer. Give both layers the same order in the plan"
            )


def bake_dense(
    states: dict[str, Any], files: CheckpointFiles, sources: Sequence[np.ndarray], path: Path
) -> dict[str, Any]:
    """Return a ``mp_rank`` state with its router rows in the new order; the input stays.
    ConfigError: a router is missing, or frozen experts are in ZeRO's fragments."""
    module, fragments = states.get("module") or {}, states.get("frozen_param_fragments")
    gates = files.gates_among(module)
    for layer, prefix in enumerate(files.prefixes):
        if layer not in gates.values():
            raise ConfigError(
                f"{path}: found no router below {prefix}, expected that of MoE layer {layer}: "
                "pipeline checkpoints keep it in files of their own and cannot be baked yet"
            )
    if fragments and any(EXPERT_KEY.fullmatch(name) for name in fragments):
        raise ConfigError(
            f"{path}: found frozen experts among ZeRO's fragments, expected none: DeepSpeed keeps "
            "those of one rank only; save with ZeRO stage 0"
        )
    first: dict[bytes, tuple[int, str]] = {}
    for key, layer in gates.items():
        _refuse_tied(first, sources, layer, {key: module[key]})
    baked = dict(states)
    for part in ("module", "frozen_param_fragments"):
        if states.get(part):
            tensors = baked[part] = copy.copy(states[part])
            for key in gates.keys() & tensors.keys():
                tensors[key] = tensors[key][torch.from_numpy(sources[gates[key]])]
    return baked


def _write_file(states: Any, path: Path) -> None:
    replace_file(path, lambda file: torch.save(states, file))


# -- optimizer state at ZeRO stage 0 ---------------------------------------------------------------

OptimizerStates = dict[tuple[int, int], dict[str, Any]]
"""The content of the optimizer file of each (EP rank, mp rank)."""


class NotBaked(Exception):
    """The optimizer state cannot be baked exactly; the message says why."""


def baked_optimizer(
    files: CheckpointFiles, states: OptimizerStates, names: list[str], sources: Sequence[np.ndarray]
) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Yield ``states`` in the new order; ``names[i]``: parameter i, experts by local number."""
    index_of = {name: i for i, name in enumerate(names)}
    layer_of = {prefix: layer for layer, prefix in enumerate(files.prefixes)}
    gates = files.gates_among(names)
    per_rank = files.num_experts // _num_ranks(states)
    for (rank, mp), content in states.items():
        baked = dict(content)
        if content.get("optimizer") is not None:
            optimizer = baked["optimizer"] = dict(content["optimizer"])
            old = optimizer["state"]
            new = optimizer["state"] = {}
            for i, name in enumerate(names):
                state = old.get(i)
                if name in gates and state is not None:
                    order = torch.from_numpy(sources[gates[name]])
                    state = {**state, **{key: v[order] for key, v in _arrays(state).items()}}
                elif match := EXPERT_KEY.fullmatch(name):
                    source = sources[layer_of[match[1]]]
                    slot = int(source[rank * per_rank + int(match[2])])
                    there = states[slot // per_rank, mp]["optimizer"]["state"]
                    state = there.get(index_of[renumbered_key(name, slot % per_rank)])
                if state is not None:
                    new[i] = state
        yield (rank, mp), baked


def _num_ranks(states: OptimizerStates) -> int:
    return 1 + max(rank for rank, _ in states)


def read_optimizer_states(
    files: CheckpointFiles,
    dense: dict[str, Any],
    names: list[list[str]] | None,
    *,
    trusted: bool,
    trust_order: bool,
) -> tuple[OptimizerStates, list[str]] | None:
    """Read all optimizer files, and the names of their parameters; None: the checkpoint has none.
    NotBaked says why they cannot be baked.

    ``dense``: state of an ``mp_rank`` file. ``names``: per parameter group, if the checkpoint has
    them; else ``trust_order`` takes the order of the model."""
    if files.other_optimizer:
        raise NotBaked(
            f"found {files.other_optimizer[0].name}, expected expp_rank files: ZeRO partitions "
            "the state into flat pieces that belong to slots; load with load_module_only=True"
        )
    if not files.optimizer:
        return None
    if files.auto_ep:
        raise NotBaked("AutoEP keeps moments by rank; load with load_module_only=True")
    states = {key: read_file(path, trusted=trusted) for key, path in files.optimizer.items()}
    contents = [content.get("optimizer") for content in states.values()]
    if all(content is None for content in contents):
        return states, []  # as they are
    for content in contents:
        if not isinstance(content, dict) or set(content) != {"state", "param_groups"}:
            found = sorted(content) if isinstance(content, dict) else type(content).__name__
            raise NotBaked(
                f"found an optimizer state with {found}, expected a plain torch optimizer's: fp32 "
                "masters belong to slots; load with load_module_only=True"
            )
    if names is not None:
        flat = [name for group in names for name in group]
    elif trust_order:
        flat = _names_by_order(files, dense, states)
    else:
        raise NotBaked(
            "the checkpoint does not name the optimizer's parameters (moe_locality did not save "
            "it); if they are in the order of the model, allow it (trust_parameter_order=True, "
            "--trust-parameter-order), else load with load_module_only=True"
        )
    per_rank, rest = divmod(files.num_experts, _num_ranks(states))
    _check_names(files, flat, per_rank if rest == 0 else 0, contents)
    return states, flat


def _check_names(files: CheckpointFiles, names: list[str], per_rank: int, contents: Any) -> None:
    """Every layer has as many experts on every rank, every file these parameters, and every moment
    of a router a row per expert (or one number)."""
    trained: dict[str, set[int]] = {}
    for name in names:
        if match := EXPERT_KEY.fullmatch(name):
            trained.setdefault(match[1], set()).add(int(match[2]))
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
        for i, name in enumerate(names):
            state = content["state"].get(i, {}) if ".deepspeed_moe.gate." in name else {}
            for key, value in _arrays(state).items():
                if len(value) != files.num_experts:
                    raise NotBaked(
                        f"{name}: found the state {key!r} of shape {tuple(value.shape)}, expected "
                        f"{files.num_experts} rows"
                    )


def _arrays(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a parameter's state, without step counters."""
    return {k: v for k, v in state.items() if torch.is_tensor(v) and v.numel() != 1}


def _names_by_order(
    files: CheckpointFiles, dense: dict[str, Any], states: OptimizerStates
) -> list[str]:
    """Return DeepSpeed's default: the dense parameters, then the experts, in model order."""
    buffers = set(dense.get("buffer_names") or ())
    shapes = {k: tuple(v.shape) for k, v in dense["module"].items() if k not in buffers}
    mp = min(files.dense)
    experts = {}
    for layer in range(len(files.prefixes)):
        for slot in range(files.num_experts // _num_ranks(states)):
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
        found = {tuple(v.shape) for v in _arrays(content["state"].get(i, {})).values()}
        if found - {shape}:
            raise NotBaked(
                f"found states of shape {sorted(found)} for parameter {i}, expected {shape} of "
                f"{name}: the order of the model is not the optimizer's"
            )
    return list(flat)


# -- the whole checkpoint --------------------------------------------------------------------------


def bake_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    plan: PlacementPlan,
    out_dir: str | os.PathLike[str],
    *,
    tag: str | None = None,
    trust_checkpoint: bool = False,
    trust_parameter_order: bool = False,
    num_expert_groups: int | None = None,
) -> dict[str, Any]:
    """Write a copy of an MoE checkpoint with its experts where ``plan`` wants them.

    The checkpoint is DeepSpeed's, or the folder of a Hugging Face model (``config.json`` and
    safetensors: ``hf_checkpoint.bake_hugging_face``). One of DeepSpeed that is already placed goes
    from its order to the plan's; the linear plan brings logical order back, bit for bit.

    Args:
        checkpoint_dir: folder with ``latest`` and one folder per tag.
        plan: a permutation; its ``layer_ids`` are the transformer layers that have experts.
        out_dir: new (or empty) folder, which appears whole or not at all.
        tag: which checkpoint; by default the one that ``latest`` names.
        trust_checkpoint: unpickle objects that are not plain data; they can run code.
        trust_parameter_order: a checkpoint that moe_locality did not save does not name the
            optimizer's parameters. Take them to be in the order of the model, DeepSpeed's default
            (shapes are checked), instead of leaving the optimizer state out.
        num_expert_groups: groups of a group-limited router, of Hugging Face models and AutoEP.

    Returns:
        A summary: paths, layers, experts, how many experts changed rank per layer, ``optimizer``
        ("baked", "none", or why it was left out), files that were copied and left out.

    Raises:
        ConfigError: not a DeepSpeed MoE checkpoint, a file is missing, or out_dir is not usable.
        PlacementError: the plan does not fit, or has replicas.
    """
    source, out = Path(checkpoint_dir), Path(out_dir)
    if is_hugging_face(source):
        return bake_hugging_face(source, plan, out, num_expert_groups=num_expert_groups)
    tag = resolve_tag(source, tag)
    check_is_permutation(plan)
    check_is_new(out)
    bake = _Bake(source / tag, plan, trust_checkpoint, trust_parameter_order, num_expert_groups)

    def write(folder: Path) -> None:
        bake.write(folder / tag)
        (folder / "latest").write_text(tag, encoding="utf-8")

    replace_folder(out, write)
    return {"checkpoint": str(source), "out": str(out), "tag": tag, **bake.summary()}


class _Bake:
    """One bake. The constructor reads the small files and checks everything; it writes nothing.

    ``sources``: per layer, the old slot that each new slot takes."""

    def __init__(
        self,
        folder: Path,
        plan: PlacementPlan,
        trusted: bool,
        trust_order: bool,
        groups: int | None,
    ) -> None:
        files = find_files(folder)
        num_layers = len(files.prefixes)
        plan.check_fits(num_experts=files.num_experts, layer_count=num_layers)
        dense = {mp: read_file(path, trusted=trusted) for mp, path in files.dense.items()}
        first = dense[min(dense)]
        if files.auto_ep:
            section = first["ds_config"]["expert_parallel"]
            preset = section.get("preset_model") or "unnamed"
            family = PRESETS.get(preset, PRESETS["deepseek_v3"])
            check_groups(plan, groups_of({}, preset, family, groups) or 1)
        path = files.dense[min(dense)]
        entry, current = read_entry(first, path, num_layers, files.num_experts)
        rows = plan.rows_for(layer_numbers(files.prefixes, first.get("module") or ()), num_layers)
        target = [row.astype(np.int64) for row in plan.physical_to_logical_map[rows]]
        self.files, self.dense, self.plan, self.trusted = files, dense, plan, trusted
        self.sources = [source_slots(old, new) for old, new in zip(current, target, strict=True)]
        names = entry.get("optimizer_names")
        self.optimizer = None
        self.left_out = "an earlier bake left it out" if entry.get("optimizer_left_out") else None
        try:
            if entry.get("replicas"):
                raise NotBaked("it was made with replicas, and belongs to their slots")
            self.optimizer = read_optimizer_states(
                files, first, names, trusted=trusted, trust_order=trust_order
            )
        except NotBaked as reason:
            self.left_out = str(reason)
            logger.warning("the optimizer state was left out of %s: %s", folder, reason)
        self.entry = make_entry(
            target,
            plan_digest=plan.digest(),
            optimizer_names=names,
            optimizer_left_out=self.left_out is not None,
        )

    def write(self, folder: Path) -> None:
        files = self.files
        folder.mkdir(parents=True)
        for path in files.copied:
            target = folder / path.relative_to(files.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        first: dict[bytes, tuple[int, str]] = {}
        for (layer, slot, mp), path in files.experts.items():  # one file in memory at a time
            old = int(self.sources[layer][slot])
            states = read_file(files.experts[layer, old, mp], trusted=self.trusted)
            _refuse_tied(first, self.sources, layer, states)
            _write_file(renumbered(states, slot), folder / path.name)
        rank_0: dict[int, Any] = {}
        if self.optimizer is not None:
            for (rank, mp), states in baked_optimizer(files, *self.optimizer, self.sources):
                _write_file(states, folder / files.optimizer[rank, mp].name)
                if rank == 0:
                    rank_0[mp] = states["optimizer"]
        for mp, path in files.dense.items():
            states = bake_dense(self.dense[mp], files, self.sources, path)
            # rank 0 writes its optimizer here too; DeepSpeed reads it from the expp_rank files
            states["optimizer"] = rank_0.get(mp) if states.get("optimizer") is not None else None
            states[KEY] = self.entry
            _write_file(states, folder / path.name)

    def summary(self) -> dict[str, Any]:
        """What ``bake_checkpoint`` returns, without the paths."""
        files, baked = self.files, self.optimizer is not None
        optimizer = "baked" if baked else "none"
        left_out = [*files.other_optimizer, *(() if baked else files.optimizer.values())]
        return {
            "num_layers": len(files.prefixes),
            "num_experts": files.num_experts,
            "plan_digest": self.plan.digest(),
            **count_moves(self.sources, self.plan.slots_per_rank),
            "optimizer": optimizer if self.left_out is None else f"left out: {self.left_out}",
            "copied": [str(path.relative_to(files.folder)) for path in files.copied],
            "left_out": [path.name for path in left_out],
        }
