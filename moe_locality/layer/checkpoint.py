"""Checkpoints of a placed engine: weights in slot order, with the expert of each slot beside them.

A stock DeepSpeed engine loads them and computes the same function, because router rows and experts
are permuted alike. ``wrap_checkpoints`` adds what a load needs to move them.

With replicas, a checkpoint holds every logical expert once, as DeepSpeed writes E experts: the
lowest slot that holds an expert writes its file, and every slot that holds it reads that file
(:class:`ExpertFiles`). The router is in logical order. So the weights are those of a plain
checkpoint without a placement. Optimizer files hold what the slots of a rank need: they load into
an engine with the same slots only, which the entry ``"replicas"`` names.

DeepSpeed writes ``layer_{L}_expert_{G}_mp_rank_{MP}_model_states.pt`` with the slot number G in
name and keys, and everything else into ``mp_rank_{MP}_model_states.pt``; what a user passes as
``client_state`` becomes top-level keys of the latter. There, ``"moe_locality"`` holds
``slot_to_logical`` (one list of E ints per MoE layer). A file without it has slots that are logical
experts: a plain DeepSpeed checkpoint.
"""

import argparse
import functools
import hashlib
import inspect
import json
import logging
import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moe_locality.errors import ConfigError, MoeLocalityError, PlacementError
from moe_locality.layer.agreement import all_agree, all_succeed
from moe_locality.layer.relabeling import (
    Target,
    check_tied_stay,
    plan_of,
    plan_targets,
    relabel_to,
    targets_for,
)
from moe_locality.layer.replicas import has_replicas, replicas_of
from moe_locality.layer.state import (
    LayerReplicas,
    current_order,
    has_state,
    moe_modules,
    no_state,
    permute_gate,
    plain_optimizer,
    set_slot_to_logical,
    state_source,
)
from moe_locality.placement.plan import PlacementPlan
from moe_locality.topology.groups import exchange_objects

KEY = "moe_locality"
FORMAT_VERSION = 1
MODEL_STATES = re.compile(r"mp_rank_(\d+)_model_states\.pt")
EXPERT_KEY = re.compile(
    r"(.*)\.(?:deepspeed_moe\.experts\.deepspeed_experts\.(?=\d+\.)|experts\.w[123]\.(?=\d+$))(\d+).*"
)
"""Of DeepSpeed's MoE layers and of AutoEP's: module name and number of the expert."""
EXPERT_STATES = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
OPTIMIZER_STATES = re.compile(r"expp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")

_ALLOWED: list[Any] = [np.ndarray, np.dtype, argparse.Namespace]
_ALLOWED += [type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float32", "float64")]
# what numpy pickles a scalar and an array with has no public name
_ALLOWED += [np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]]

logger = logging.getLogger(__name__)


def resolve_tag(folder: Path, tag: str | None) -> str:
    """Return the tag, read from ``latest`` where none is given; ConfigError: no such checkpoint."""
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


def read_file(path: Path, *, trusted: bool = False) -> dict[str, Any]:
    """Read a file of a checkpoint on the CPU, tensors mapped from disk where the format allows.

    Only tensors and plain types are unpickled, with numpy arrays and ``argparse.Namespace``, which
    training scripts put into ``client_state``, else ConfigError. ``trusted=True`` unpickles
    anything, which can run code."""
    try:
        with torch.serialization.safe_globals(_ALLOWED):
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


def make_entry(
    orders: Sequence[np.ndarray],
    *,
    plan_digest: str | None,
    optimizer_names: list[list[str]] | None,
    optimizer_left_out: bool = False,
    replicas: list[list[int]] | None = None,
) -> dict[str, Any]:
    """The value under ``"moe_locality"``, of plain types only; docs/relabel.md has its keys.

    ``orders``: per MoE layer [E], the expert of each slot. ``optimizer_names``: per group, experts
    by their number on the rank; None where the engine does not step them itself.
    ``replicas``: per MoE layer [P], the expert of each slot of the ranks that wrote the optimizer
    state, where there were more slots than experts."""
    entry = {
        "format_version": FORMAT_VERSION,
        "slot_to_logical": [[int(expert) for expert in order] for order in orders],
        "plan_digest": plan_digest,
        "optimizer_names": optimizer_names,
        "optimizer_left_out": optimizer_left_out,
    }
    return entry if replicas is None else {**entry, "replicas": replicas}


def read_entry(
    state: dict[str, Any], path: Path, layers: int, experts: int
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Return the entry of a ``mp_rank`` file, and per MoE layer [E] the logical expert of each
    slot; without an entry, ({}, identity). PlacementError: it is damaged, of another version, or
    for other layers or experts."""
    entry = state.get(KEY)
    if entry is None:
        return {}, [np.arange(experts)] * layers
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
    orders = [np.array(order, dtype=np.int64) for order in entry["slot_to_logical"]]
    sizes = sorted({len(order) for order in orders})
    if len(orders) != layers or sizes != [experts]:
        raise PlacementError(
            f"found slot orders of {len(orders)} MoE layers with {sizes} experts in the "
            f"checkpoint, expected {layers} layers with {experts}: it is of another model"
        )
    return entry, orders


def wrap_checkpoints(engine: Any, plan: PlacementPlan | None = None) -> None:
    """Make ``engine.save_checkpoint`` and ``load_checkpoint`` keep the slot order.

    Saving adds ``client_state["moe_locality"]``. Loading a checkpoint of another slot order moves
    weights and moments to the placement of this engine: ``plan``, else the one it was started with
    or last relabelled to; an engine without a plan takes the order of the file. Where moments
    cannot move (offloaded or reordered ZeRO partitions) and the orders differ, the load is refused
    on all ranks before anything is read into the engine. A second call changes nothing."""
    if getattr(engine, "moe_locality_wraps_checkpoints", False):
        return
    engine.moe_locality_wraps_checkpoints = True
    files = ExpertFiles(engine) if has_replicas(engine.module) else None
    save, load = engine.save_checkpoint, engine.load_checkpoint

    @functools.wraps(save)
    def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(save).bind(*args, **kwargs)
        client_state = dict(bound.arguments.get("client_state") or {})
        if KEY in client_state:
            raise ConfigError(
                f"found the key {KEY!r} in client_state, which moe_locality writes: rename it"
            )
        followed = plan or plan_of(engine)
        client_state[KEY] = make_entry(
            [current_order(module) for _, module in moe_modules(engine.module)],
            plan_digest=followed.digest() if followed else None,
            optimizer_names=_optimizer_names(engine),
            replicas=slots_of(engine),
        )
        bound.arguments["client_state"] = client_state
        return save(*bound.args, **bound.kwargs)

    @functools.wraps(load)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(load).bind(*args, **kwargs)
        bound.apply_defaults()
        return _load(engine, functools.partial(load, *args, **kwargs), bound.arguments, plan, files)

    engine.save_checkpoint = save_checkpoint
    engine.load_checkpoint = load_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class _Decision:
    """What a load does: the order of the file, the new order, and whether moments load."""

    file_orders: list[np.ndarray]
    targets: list[Target]
    with_optimizer: bool

    @property
    def moves(self) -> bool:
        return not all(map(np.array_equal, self.file_orders, self.new_orders))

    @property
    def new_orders(self) -> list[np.ndarray]:
        return [target.slot_to_logical for target in self.targets]


def _load(
    engine: Any,
    load: Callable[[], Any],
    arguments: dict[str, Any],
    plan: PlacementPlan | None,
    files: "ExpertFiles | None",
) -> Any:
    decision = all_succeed(lambda: _decide(engine, arguments, plan or plan_of(engine)))
    digest = "no checkpoint"
    if decision is not None:
        orders = [*decision.file_orders, *decision.new_orders]
        digest = _sha256([*(order.tolist() for order in orders), decision.with_optimizer])
    all_agree("checkpoints or placements", digest)
    if decision is not None and files is not None:
        files.orders = decision.file_orders
    load_path, client_state = load()
    if decision is None or load_path is None:
        return load_path, client_state
    if isinstance(client_state, dict):
        client_state.pop(KEY, None)
    moved_alone = False  # weights, without their masters
    for target, order in zip(decision.targets, decision.file_orders, strict=True):
        logical = np.arange(len(order))
        if files is not None and (order != logical).any():  # with replicas, a router is logical
            permute_gate(target.module.deepspeed_moe.gate, np.argsort(order))
            order, moved_alone = logical, True
        set_slot_to_logical(target.module, order)
    if decision.moves:
        state = state_source(engine) if decision.with_optimizer else no_state
        relabel_to(lambda: (decision.targets, state), digest)
        moved_alone = not decision.with_optimizer
    if moved_alone and hasattr(engine.optimizer, "refresh_fp32_params"):
        engine.optimizer.refresh_fp32_params()  # masters and ZeRO partitions, from the weights
    return load_path, client_state


def _decide(engine: Any, arguments: dict[str, Any], plan: PlacementPlan | None) -> _Decision | None:
    """Compare file and engine before anything is loaded; None: nothing to keep track of."""
    path = _first_file(Path(arguments["load_dir"]), arguments["tag"])
    layers = moe_modules(engine.module)
    if path is None or not layers:
        return None  # DeepSpeed says itself what is missing
    # tensors stay on disk; trusted: the engine unpickles this very file a moment later
    states = read_file(path, trusted=True)
    entry, file_orders = read_entry(states, path, len(layers), layers[0][1].num_experts)
    replicas = has_replicas(engine.module)
    if plan is not None and not replicas:
        targets = plan_targets(engine.module, plan)
        check_tied_stay(engine.module, targets, file_orders)
    else:
        targets = targets_for(layers, file_orders)
    loads_optimizer = (
        engine.optimizer is not None
        and arguments["load_optimizer_states"]
        and not arguments["load_module_only"]
    )
    decision = _Decision(file_orders=file_orders, targets=targets, with_optimizer=loads_optimizer)
    if loads_optimizer:
        if entry.get("optimizer_left_out"):
            raise ConfigError(
                f"{path}: this checkpoint was baked without optimizer state: load its weights with "
                "load_module_only=True"
            )
        check_optimizer_fits(engine, entry, path)
        try:
            if decision.moves:
                state_source(engine)
        except MoeLocalityError as error:
            raise ConfigError(
                f"{path}: found another order of experts than this engine's plan, expected the "
                f"same, because the optimizer state cannot follow ({error}). Nothing was loaded. "
                "Or start the engine without a plan: it then takes the order of the checkpoint"
            ) from error
    elif not replicas and (engine.global_steps or has_state(engine.optimizer)):
        # moments stay where they are; with replicas, every slot keeps its expert
        orders = [current_order(target.module) for target in targets]
        if not all(map(np.array_equal, orders, decision.new_orders)):
            raise ConfigError(
                f"{path}: found another order of experts than this engine's, which has taken "
                f"{engine.global_steps} steps, and no optimizer state to load with it: its moments "
                "would follow the wrong experts. Nothing was loaded: load the weights before the "
                "first step"
            )
    return decision


def _first_file(folder: Path, tag: str | None) -> Path | None:
    try:
        tag = resolve_tag(folder, None if tag is None else str(tag))
    except ConfigError:
        return None
    files = (path for path in (folder / tag).iterdir() if MODEL_STATES.fullmatch(path.name))
    return min(files, default=None)


def _sha256(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _optimizer_names(engine: Any) -> list[list[str]] | None:
    """Names of the optimizer's parameters, group by group (its saved state has numbers only); None
    where ranks differ."""
    optimizer = None if has_replicas(engine.module) else plain_optimizer(engine)
    names = None
    if optimizer is not None:
        name_of = {id(p): name for name, p in engine.module.named_parameters()}
        names = [[name_of[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if dist.is_initialized() and len(set(exchange_objects(_sha256(names)))) > 1:
        logger.warning(
            "the optimizer's parameter groups differ between ranks (set PYTHONHASHSEED=0): "
            "their names are not saved, so optimizer state cannot be baked offline"
        )
        return None
    return names


# -- replicas ---------------------------------------------------------------------------------


class ExpertFiles:
    """Replaces ``save`` and ``load`` of a checkpoint engine to renumber the files of experts.

    ``orders``: per MoE layer [E], the expert in each numbered file of the checkpoint that is read.
    """

    def __init__(self, engine: Any) -> None:
        self.layers = [replicas_of(module) for _, module in moe_modules(engine.module)]
        self.orders: Sequence[np.ndarray] = []
        files = engine.checkpoint_engine
        self._save, self._load = files.save, files.load
        files.save, files.load = self.save, self.load

    def save(self, state_dict: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Save a file; that of a slot under the number of its expert, or not at all."""
        found = self._slot_of(path)
        if found is not None:
            _, replicas, slot = found
            expert = int(replicas.slot_to_logical[slot])
            if replicas.primary_slots[expert] != slot:
                return None  # the expert is in the file of another slot
            state_dict, path = renumbered(state_dict, expert), _numbered(path, expert)
        return self._save(state_dict, path, *args, **kwargs)

    def load(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a file; for a slot that of its expert, with the keys of the slot."""
        found = self._slot_of(path)
        if found is None:
            return self._load(path, *args, **kwargs)
        layer, replicas, slot = found
        wanted = int(replicas.slot_to_logical[slot])
        number = int(np.flatnonzero(self.orders[layer] == wanted)[0])
        return renumbered(self._load(_numbered(path, number), *args, **kwargs), slot)

    def _slot_of(self, path: Any) -> tuple[int, LayerReplicas, int] | None:
        if (match := EXPERT_STATES.fullmatch(Path(path).name)) is None:
            return None
        layer, slot, _ = map(int, match.groups())
        replicas = self.layers[layer]
        return None if replicas is None else (layer, replicas, slot)


def _numbered(path: Any, number: int) -> str:
    name = re.sub(r"(?<=_expert_)\d+", str(number), Path(path).name)
    return str(Path(path).with_name(name))


def renumbered_key(key: str, number: int) -> str:
    """The key of an expert's tensor with another number; other keys stay."""
    match = EXPERT_KEY.fullmatch(key)
    return key if match is None else f"{key[: match.start(2)]}{number}{key[match.end(2) :]}"


def renumbered(state: dict[str, Any], number: int) -> dict[str, Any]:
    """The tensors of one expert under another number."""
    return {renumbered_key(key, number): value for key, value in state.items()}


def slots_of(engine: Any) -> list[list[int]] | None:
    """Per MoE layer the expert of each slot, for the entry ``"replicas"``; None without them."""
    found = [replicas_of(module) for _, module in moe_modules(engine.module)]
    return [one.slot_to_logical.tolist() for one in found if one is not None] or None


def check_optimizer_fits(engine: Any, entry: dict[str, Any], path: Path) -> None:
    """Raise ConfigError unless the optimizer state of a checkpoint is of this engine's slots."""
    theirs, ours = entry.get("replicas"), slots_of(engine)
    if theirs == ours:
        return
    what = {True: "no replicas", False: "replicas"}
    raise ConfigError(
        f"{path}: found optimizer state of an engine with {what[theirs is None]}, expected the "
        f"slots of this engine, which has {what[ours is None]}"
        f"{' (in other slots)' if theirs and ours else ''}: optimizer state with replicas loads "
        f"into the same slots only; load the weights alone (load_module_only=True). Nothing was "
        "loaded"
    )
