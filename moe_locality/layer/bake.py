"""Bake a placement into a DeepSpeed MoE checkpoint on disk: no ranks, no GPU, one process.

Experts are renumbered to their slots (file names and keys), the router rows and the moments of a
plain optimizer likewise, and the entry ``"moe_locality"`` says which slot holds which expert. The
result is a plain DeepSpeed checkpoint of the same function.

Not baked: the optimizer state of ZeRO and of fp16 and bf16 training (flat partitions and fp32
masters). It is left out, because it would silently follow the slots; the summary says so.
"""

import logging
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import ConfigError
from moe_locality.layer.bake_files import (
    CheckpointFiles,
    bake_dense,
    find_files,
    write_experts,
    write_file,
)
from moe_locality.layer.bake_optimizer import NotBaked, OptimizerStates, read_optimizer_states
from moe_locality.layer.checkpoint_io import (
    KEY,
    make_entry,
    orders_of,
    read_entry,
    read_file,
    resolve_tag,
)
from moe_locality.layer.moves import check_is_permutation, source_slots
from moe_locality.placement.plan import PlacementPlan
from moe_locality.trace.recorder.hooks import layer_numbers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One bake: what is read, and per layer the slot that each slot reads."""

    files: CheckpointFiles
    dense: dict[int, dict[str, Any]]
    sources: list[np.ndarray]
    entry: dict[str, Any]
    optimizer: OptimizerStates | None
    left_out: str | None
    trusted: bool


def bake_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    plan: PlacementPlan,
    out_dir: str | os.PathLike[str],
    *,
    tag: str | None = None,
    trust_checkpoint: bool = False,
    trust_parameter_order: bool = False,
) -> dict[str, Any]:
    """Write a copy of a DeepSpeed MoE checkpoint with its experts where ``plan`` wants them.

    A checkpoint that is already placed goes from its order to the plan's; the linear plan brings
    logical order back, bit for bit. ``out_dir`` appears whole or not at all.

    Args:
        checkpoint_dir: folder with ``latest`` and one folder per tag.
        plan: a permutation; its ``layer_ids`` are the transformer layers that have experts.
        out_dir: new (or empty) folder.
        tag: which checkpoint; by default the one that ``latest`` names.
        trust_checkpoint: unpickle objects that are not plain data; they can run code.
        trust_parameter_order: a checkpoint that moe_locality did not save does not name the
            optimizer's parameters. Take them to be in the order of the model, DeepSpeed's default
            (shapes are checked), instead of leaving the optimizer state out.

    Returns:
        A summary: paths, layers, experts, how many experts changed rank per layer, ``optimizer``
        ("baked", "none", or why it was left out), files that were copied and left out.

    Raises:
        ConfigError: not a DeepSpeed MoE checkpoint, a file is missing, or out_dir is not usable.
        PlacementError: the plan does not fit, or has replicas.
    """
    source, out = Path(checkpoint_dir), Path(out_dir)
    tag = resolve_tag(source, tag)
    check_is_permutation(plan)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            f"found {out} in use, expected a new or empty folder: choose another one, or remove it"
        )
    job = _prepare(source / tag, plan, trust_checkpoint, trust_parameter_order)
    _write_whole(job, out, tag)
    return _summarize(job, plan, source, out, tag)


def _prepare(folder: Path, plan: PlacementPlan, trusted: bool, trust_order: bool) -> _Job:
    """Read what is small, check everything; nothing is written yet."""
    files = find_files(folder)
    plan.check_fits(num_experts=files.num_experts, layer_count=files.num_layers)
    dense = {mp: read_file(path, trusted=trusted) for mp, path in files.dense.items()}
    numbers = layer_numbers(files.prefixes, dense[min(dense)].get("module") or ())
    first = files.dense[min(files.dense)]
    entry = read_entry(dense[min(dense)], first)
    current = orders_of(entry, files.num_layers, files.num_experts)
    rows = plan.rows_for(numbers, files.num_layers)
    target = [row.astype(np.int64) for row in plan.physical_to_logical_map[rows]]
    sources = [source_slots(old, new) for old, new in zip(current, target, strict=True)]
    names = entry.get("optimizer_names") if entry else None
    optimizer, left_out = None, None
    if entry is not None and entry.get("optimizer_left_out"):
        left_out = "an earlier bake left it out"
    try:
        if entry is not None and entry.get("replicas"):
            raise NotBaked("it was made with replicas, and belongs to their slots")
        optimizer = read_optimizer_states(
            files, dense, names, trusted=trusted, trust_order=trust_order
        )
    except NotBaked as reason:
        left_out = str(reason)
        logger.warning("the optimizer state was left out of %s: %s", folder, reason)
    return _Job(
        files=files,
        dense=dense,
        sources=sources,
        entry=make_entry(
            target,
            plan_digest=plan.digest(),
            optimizer_names=names,
            optimizer_left_out=left_out is not None,
        ),
        optimizer=optimizer,
        left_out=left_out,
        trusted=trusted,
    )


def _write_whole(job: _Job, out: Path, tag: str) -> None:
    """Write into a temporary sibling of ``out`` and rename it at the end."""
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        umask = os.umask(0)  # mkdtemp makes private folders
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        _write(job, temporary / tag)
        (temporary / "latest").write_text(tag, encoding="utf-8")
        if out.exists():
            out.rmdir()  # empty, as checked
        temporary.rename(out)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConfigError(
                f"cannot write {out}: {error.strerror or error}: nothing was left behind; choose "
                "a folder that can be written, with enough room"
            ) from error
        raise


def _write(job: _Job, folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in job.files.copied:
        target = folder / path.relative_to(job.files.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    write_experts(job.files, job.sources, folder, trusted=job.trusted)
    rank_0: dict[int, Any] = {}
    if job.optimizer is not None:
        for (rank, mp), states in job.optimizer.baked(job.sources):
            write_file(states, folder / job.files.optimizer[rank, mp].name)
            if rank == 0:
                rank_0[mp] = states["optimizer"]
    for mp, path in job.files.dense.items():
        states = bake_dense(job.dense[mp], job.files, job.sources, path)
        # rank 0 writes its optimizer here too; DeepSpeed reads it from the expp_rank files
        states["optimizer"] = rank_0.get(mp) if states.get("optimizer") is not None else None
        states[KEY] = job.entry
        write_file(states, folder / path.name)


def _summarize(job: _Job, plan: PlacementPlan, source: Path, out: Path, tag: str) -> dict[str, Any]:
    per_rank = plan.slots_per_rank
    slots = np.arange(job.files.num_experts)
    optimizer = "baked" if job.optimizer is not None else "none"
    return {
        "checkpoint": str(source),
        "out": str(out),
        "tag": tag,
        "num_layers": job.files.num_layers,
        "num_experts": job.files.num_experts,
        "plan_digest": plan.digest(),
        "experts_moved_per_layer": [int((s != slots).sum()) for s in job.sources],
        "experts_changing_rank_per_layer": [
            int((s // per_rank != slots // per_rank).sum()) for s in job.sources
        ],
        "optimizer": optimizer if job.left_out is None else f"left out: {job.left_out}",
        "copied": [str(path.relative_to(job.files.folder)) for path in job.files.copied],
        "left_out": [path.name for path in job.files.left_out(job.optimizer is not None)],
    }
