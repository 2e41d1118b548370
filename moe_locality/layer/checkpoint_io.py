"""Files of a DeepSpeed MoE checkpoint, and the entry that says which expert each slot holds.

DeepSpeed writes ``layer_{L}_expert_{G}_mp_rank_{MP}_model_states.pt`` with the slot number G in
name and keys, and everything else into ``mp_rank_{MP}_model_states.pt``; what a user passes as
``client_state`` becomes top-level keys of the latter. There, ``"moe_locality"`` holds
``slot_to_logical`` (one list of E ints per MoE layer). A file without it has slots that are logical
experts: a plain DeepSpeed checkpoint.
"""

import argparse
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_locality.errors import ConfigError, PlacementError

KEY = "moe_locality"
FORMAT_VERSION = 1
MODEL_STATES = re.compile(r"mp_rank_(\d+)_model_states\.pt")
EXPERT_STATES = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
OPTIMIZER_STATES = re.compile(r"expp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


def resolve_tag(folder: Path, tag: str | None) -> str:
    """Return the tag, read from the file ``latest`` where none is given.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    if tag is None:
        latest = folder / "latest"
        try:
            tag = latest.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(
                f"cannot read {latest}: {error.strerror}: expected the folder of a DeepSpeed "
                "checkpoint with the file 'latest'; check the path or name the tag"
            ) from error
    if not tag or not (folder / tag).is_dir():
        raise ConfigError(
            f"found no folder {folder / tag}, expected the tag of a DeepSpeed checkpoint: check "
            "the path and the tag"
        )
    return tag


def model_state_files(folder: Path) -> list[Path]:
    """Return ``mp_rank_*_model_states.pt`` of a tag's folder, by rising rank."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if MODEL_STATES.fullmatch(path.name))


def read_file(path: Path, *, trusted: bool = False) -> dict[str, Any]:
    """Read a file of a checkpoint on the CPU, tensors mapped from disk where the format allows.

    Only tensors and plain types are unpickled, with numpy arrays and ``argparse.Namespace``, which
    training scripts put into ``client_state``. ``trusted=True`` unpickles anything, which can run
    code.

    Raises:
        ConfigError: the file holds other objects, or cannot be read.
    """
    try:
        with torch.serialization.safe_globals(_allowed()):
            found = _torch_load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        if not trusted:
            what = re.search(r"GLOBAL (\S+)", str(error))
            raise ConfigError(
                f"{path}: found a pickled {what[1] if what else 'object'}, expected tensors and "
                "plain types: reading it can run code; if you trust the origin of this "
                "checkpoint, allow it with trust_checkpoint=True"
            ) from error
        found = _torch_load(path, weights_only=False)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ConfigError(
            f"cannot read {path}: {error}: the file is missing or damaged; check the checkpoint"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: found a {type(found).__name__}, expected a dict of states")
    return found


def _torch_load(path: Path, *, weights_only: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):  # files in the format before torch 1.6 cannot be mapped
            raise
        return torch.load(path, map_location="cpu", weights_only=weights_only)


def _allowed() -> list[Any]:
    # what numpy pickles a scalar and an array with has no public name
    scalar, array = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")]
    return [scalar, array, np.ndarray, np.dtype, argparse.Namespace, *kinds]


def make_entry(
    orders: Sequence[np.ndarray],
    *,
    plan_digest: str | None,
    optimizer_names: list[list[str]] | None,
    optimizer_left_out: bool = False,
    replicas: list[list[int]] | None = None,
) -> dict[str, Any]:
    """The value under ``"moe_locality"``, of plain types only.

    Args:
        orders: per MoE layer [E], the logical expert of each slot.
        optimizer_names: per parameter group, the names of the optimizer's parameters on a rank
            (experts by their number on that rank), or None where it does not step them itself.
        optimizer_left_out: the checkpoint has no optimizer state although training has some.
        replicas: per MoE layer [P], the expert of each slot of the ranks that wrote the optimizer
            state, where there were more slots than experts.
    """
    entry = {
        "format_version": FORMAT_VERSION,
        "slot_to_logical": [[int(expert) for expert in order] for order in orders],
        "plan_digest": plan_digest,
        "optimizer_names": optimizer_names,
        "optimizer_left_out": optimizer_left_out,
    }
    return entry if replicas is None else {**entry, "replicas": replicas}


def read_entry(state: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """Return the checked entry of a ``mp_rank`` file, None where there is none.

    Raises:
        PlacementError: the entry is damaged, or of another version.
    """
    entry = state.get(KEY)
    if entry is None:
        return None
    version = entry.get("format_version") if isinstance(entry, dict) else None
    if version != FORMAT_VERSION:
        raise PlacementError(
            f"{path}: found format_version {version!r} in the entry {KEY!r}, expected "
            f"{FORMAT_VERSION}: read it with the version of moe_locality that wrote it"
        )
    for row, order in enumerate(entry["slot_to_logical"]):
        if sorted(order) != list(range(len(order))):
            raise PlacementError(
                f"{path}: layer {row}: found the slot order {order}, expected a permutation: the "
                "entry is damaged; write the checkpoint again"
            )
    return entry


def orders_of(entry: dict[str, Any] | None, layers: int, experts: int) -> list[np.ndarray]:
    """Per MoE layer [E], the logical expert of each slot; identity without an entry.

    Raises:
        PlacementError: the entry is for another number of layers or experts.
    """
    if entry is None:
        return [np.arange(experts)] * layers
    orders = [np.array(order, dtype=np.int64) for order in entry["slot_to_logical"]]
    sizes = sorted({len(order) for order in orders})
    if len(orders) != layers or sizes != [experts]:
        raise PlacementError(
            f"found slot orders of {len(orders)} MoE layers with {sizes} experts in the "
            f"checkpoint, expected {layers} layers with {experts}: it is of another model"
        )
    return orders
