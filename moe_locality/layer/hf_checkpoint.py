"""Write a placement into the folder of a Hugging Face model: no ranks, no GPU, no model code.

Every safetensors file keeps its header byte for byte: names, types, shapes and places of tensors,
so the index and the config stay true. Only what a name holds changes: expert 3's tensors hold the
expert that the plan puts into slot 3, and the rows of the router follow. Values are moved as bytes,
whatever their type (bf16, fp8, MXFP4 blocks and scales), one tensor in memory at a time.
"""

import hashlib
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.files import check_is_new, replace_folder
from moe_locality.layer.state_dict import NEVER_GROUPED, PRESETS, REFUSED, Names, Relabelling
from moe_locality.placement.plan import PlacementPlan, count_moves

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PLAN = "moe_locality_plan.json"
"""The plan that a folder was baked with; nothing reads it but the check against baking twice."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx")
_INTEGERS = {"I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "U8": "u1"}
_KINDS = {
    "kimi_k2": "deepseek_v3",
    "nemo_speechlm": "nemotron3_5_transcribe",
    "nemotronh_omni": "nemotron_h_omni",
    "inkling_mm_model": "inkling",
}
"""``model_type`` to family, where the names differ by more than an ending."""


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face model rather than a checkpoint of DeepSpeed."""
    return (folder / "config.json").is_file() and not (folder / "latest").exists()


def _family_names(model_type: str) -> tuple[str, ...]:
    plain = model_type.replace("-", "_")
    return plain, _KINDS.get(plain, ""), re.sub(r"_(?:text|thinker|mm_model)$", "", plain)


def _check_family(plan: PlacementPlan, family: str) -> None:
    """Raise PlacementError where the plan is for another family. A folder may name its language
    model in another way than transformers, or not at all."""
    made_for = str(plan.provenance.get("model_type", ""))
    known = [name for name in _family_names(made_for) if name in PRESETS]
    if known and family not in known:
        plan.check_fits(model_type=family)


def family_of(config: dict[str, Any]) -> str:
    """The family of a ``config.json``, or of its part with experts; ConfigError: none that can be
    relabelled."""
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    parts += [inner for part in parts[1:] for inner in part.values() if isinstance(inner, dict)]
    kinds = [str(part["model_type"]) for part in parts if part.get("model_type")]
    for kind in kinds:
        for name in _family_names(kind):
            if name in PRESETS:
                return name
            if name in REFUSED:
                raise ConfigError(
                    f"found a model of the family {name}, which no order of experts "
                    f"suits: {REFUSED[name]}"
                )
    raise ConfigError(
        f"found a model of the type {kinds}, expected one of the {len(PRESETS)} families with "
        "known names (docs/relabel.md): use relabel_state_dict with patterns of your own"
    )


class _File:
    """One safetensors file: its header as bytes (``head``), the entry of each tensor in file order,
    and ``data``, uint8, the tensors' bytes, mapped. ConfigError: it is cut off, or none."""

    def __init__(self, path: Path) -> None:
        try:
            total = path.stat().st_size
            with open(path, "rb") as file:
                size = file.read(8)
                length = int.from_bytes(size, "little")
                if length > total:  # a pointer of git LFS begins with text
                    raise ValueError(f"no safetensors file: it begins with {size!r}")
                head = size + file.read(length)
            entries: dict[str, dict[str, Any]] = json.loads(head[8:])
            entries.pop("__metadata__", None)
            entries = dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))
            ends = [0] + [entry["data_offsets"][1] for entry in entries.values()]
            starts = [entry["data_offsets"][0] for entry in entries.values()]
            whole = starts == ends[:-1] and ends[-1] + len(head) == total
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(path, error) from error
        if not whole:
            raise ConfigError(
                f"{path}: found {total} bytes, expected those of its header, "
                f"{ends[-1] + len(head)}, without gaps: download or copy it again"
            )
        self.path, self.head, self.entries, self.data = path, head, entries, np.zeros(0, np.uint8)
        if total > len(head):
            self.data = np.memmap(path, np.uint8, mode="r", offset=len(head))


def _tensors_of(files: list[_File]) -> dict[str, np.ndarray]:
    """The tensors of all files by name, mapped; integers keep their type, bf16 is V2, fp8 V1."""
    found: dict[str, np.ndarray] = {}
    for file in files:
        for name, entry in file.entries.items():
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            count = math.prod(shape)
            if count and (end - start) % count:  # several values in a byte
                shape = (*shape[:-1], (end - start) // math.prod(shape[:-1]))
                count = end - start
            size = (end - start) // count if count else 1
            kind = _INTEGERS.get(entry["dtype"], f"V{size}")
            raw = file.data[start:end]
            found[name] = raw.view(kind).reshape(shape) if count else np.zeros(shape, kind)
    if sum(len(file.entries) for file in files) != len(found):
        raise ConfigError("found a tensor in two safetensors files, expected it in one")
    return found


def bake_hugging_face(
    folder: Path, plan: PlacementPlan, out: Path, *, num_expert_groups: int | None = None
) -> dict[str, Any]:
    """``bake_checkpoint`` for ``config.json``, safetensors (one, or several with an index),
    tokenizer and more.

    MoE layers past the model's own (multi-token prediction) stay, unless ``plan`` has them.
    ``num_expert_groups``: None: as the config says.

    Returns:
        A summary, as ``bake_checkpoint``; and family, layer numbers, SHA-256 of all weight files.

    Errors as of ``bake_checkpoint``. ConfigError also: an unknown family, or a tensor with an
    expert axis that no pattern covers. PlacementError also: the plan tears a group apart.
    """
    check_is_new(out)
    _check_folders(folder, out)
    config = _read_json(folder / "config.json")
    family, files = family_of(config), _files_of(folder)
    _check_family(plan, family)
    names = PRESETS[family]
    own = _text_config(config).get("num_hidden_layers")
    if isinstance(own, int) and all(layer < own for layer in plan.layer_ids):
        past = rf".*layers\.(?!(?:{'|'.join(map(str, range(own)))})\.)\d+\..*"
        names = replace(names, keep=(*names.keep, past))
    groups = groups_of(config, family, names, num_expert_groups)
    job = Relabelling(_tensors_of(files), plan, names, num_groups=groups)
    weights = {file.path for file in files}
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p not in weights)
    found = [p for p in found if not {".git", ".cache"} & set(p.relative_to(folder).parts)]
    copied = [path for path in found if path.suffix not in _WEIGHTS]
    hashes: dict[str, str] = {}

    def write(target: Path) -> None:
        for path in copied:
            place = target / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, place)
            _check_hash(place, _hash_of(path))
        for file in files:
            hashes[file.path.name] = _write_file(file, job, target / file.path.name)
        plan.write(target / PLAN)

    replace_folder(out, write)
    return {
        "checkpoint": str(folder),
        "out": str(out),
        "family": family,
        "num_layers": len(job.layers),
        "layer_ids": job.layers,
        "num_experts": plan.num_experts,
        "plan_digest": plan.digest(),
        **count_moves([job.sources[layer] for layer in job.layers], plan.slots_per_rank),
        "sha256": hashes,
        "copied": [str(path.relative_to(folder)) for path in copied],
        # other formats of the same weights, which would be in the old order
        "left_out": [str(p.relative_to(folder)) for p in found if p not in copied],
    }


def _check_folders(folder: Path, out: Path) -> None:
    if folder.resolve() in out.resolve().parents:  # a second bake would copy it
        raise ConfigError(
            f"found {out} in {folder}, which is read, expected a folder elsewhere: choose another"
        )
    if (folder / PLAN).exists():
        raise ConfigError(
            f"found {PLAN} in {folder}, expected the original model: this one was baked already, "
            "and its experts count as slots; bake the original, or remove the file if the plan "
            "comes from a trace of this model"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"cannot read {path}: {error}: download or copy it again")


def _files_of(folder: Path) -> list[_File]:
    """The files of weights that transformers reads, headers only."""
    if (folder / INDEX).exists():
        index = _read_json(folder / INDEX).get("weight_map", {})
        files = [_File(folder / name) for name in sorted(set(index.values()))]
        found = {name: file.path.name for file in files for name in file.entries}
        wrong = next((name for name in sorted(index) if found.get(name) != index[name]), None)
        if wrong is not None:
            raise ConfigError(
                f"{folder / INDEX}: found another place of {wrong} than the files have, expected "
                "the index of these files: download or save the model again"
            )
        return files
    if not (folder / SINGLE).exists():
        raise ConfigError(
            f"found neither {INDEX} nor {SINGLE} in {folder}, expected the weights as safetensors: "
            "load the model with transformers and save it with save_pretrained"
        )
    return [_File(folder / SINGLE)]


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model, over what stands around it."""
    parts = (config.get(name) for name in ("thinker_config", "text_config", "llm_config"))
    inner = next((part for part in parts if isinstance(part, dict)), {})
    return {**config, **(_text_config(inner) if inner else {})}


def groups_of(config: dict[str, Any], family: str, names: Names, given: int | None) -> int | None:
    """How many groups of experts the router picks from first; None or 1: it picks none."""
    text = _text_config(config)
    said = [text[name] for name in ("n_group", "num_expert_group") if name in text]
    if given is None and not said and names.grouped and family not in NEVER_GROUPED:
        raise ConfigError(
            f"found no n_group in the config of this {family}, expected the number of groups that "
            "its router picks first: give num_expert_groups (--expert-groups; 1: it picks none)"
        )
    return next((int(number) for number in (given, *said) if number), None)


def _write_file(file: _File, job: Relabelling, target: Path) -> str:
    """Write one file of weights and return its SHA-256, which was read back."""
    digest = hashlib.sha256(file.head)
    with open(target, "wb") as out:
        out.write(file.head)
        for name, entry in file.entries.items():
            value = np.ascontiguousarray(job.value(name))
            raw = value.reshape(-1).view(np.uint8)
            start, end = entry["data_offsets"]
            if raw.nbytes != end - start:
                raise PlacementError(
                    f"{name}: found {raw.nbytes} bytes, expected {end - start}: experts of one "
                    "layer have to be alike"
                )
            digest.update(raw.data)
            out.write(raw.data)
    _check_hash(target, digest.hexdigest())
    return digest.hexdigest()


def _hash_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_hash(path: Path, expected: str) -> None:
    if (found := _hash_of(path)) != expected:
        raise ConfigError(
            f"{path.name}: found the SHA-256 {found} in what was written, expected {expected}: the "
            "disk or its memory is at fault; choose another one"
        )
