"""Checkpoints of a placed engine: weights in slot order, and beside them which expert is where.

A stock DeepSpeed engine loads them and computes the same function, because router rows and experts
are permuted alike. ``wrap_checkpoints`` adds what it does not need: the slot order is written with
every save, read before every load, and weights and moments go to the engine's own placement.
"""

import functools
import hashlib
import inspect
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from moe_locality.errors import ConfigError, MoeLocalityError
from moe_locality.layer.checkpoint_io import (
    KEY,
    make_entry,
    model_state_files,
    orders_of,
    read_entry,
    read_file,
)
from moe_locality.layer.checkpoint_replicas import (
    ExpertFiles,
    check_optimizer_fits,
    routers_to_logical,
    slots_of,
)
from moe_locality.layer.fragments import no_state
from moe_locality.layer.moe import moe_modules, set_slot_to_logical
from moe_locality.layer.optimizer_state import has_state, plain_optimizer, state_source
from moe_locality.layer.relabel import (
    Target,
    check_tied_stay,
    current_order,
    find_group,
    plan_of,
    plan_targets,
    relabel_to,
)
from moe_locality.layer.replicas import has_replicas
from moe_locality.layer.vote import agree, agree_on_failure
from moe_locality.placement.plan import PlacementPlan

logger = logging.getLogger(__name__)


def wrap_checkpoints(engine: Any, plan: PlacementPlan | None = None) -> None:
    """Make ``engine.save_checkpoint`` and ``load_checkpoint`` keep the slot order.

    Saving adds ``client_state["moe_locality"]``. Loading a checkpoint of another slot order moves
    weights and moments to the placement of this engine: ``plan``, else the one it was started with
    or last relabelled to; an engine without a plan takes the order of the file. Where moments
    cannot move (offloaded or reordered ZeRO partitions) and the orders differ, the load is refused
    on all ranks before anything is read into the engine. A second call changes nothing.
    """
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
                f"found the key {KEY!r} in client_state, expected none: moe_locality writes it; "
                "use another name"
            )
        client_state[KEY] = _entry_of(engine, plan or plan_of(engine))
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
    """What a load will do: the order of the file, the order wanted, and whether moments load."""

    file_orders: list[np.ndarray]
    targets: list[Target]
    with_optimizer: bool

    @property
    def moves(self) -> bool:
        return any(
            (order != target.slot_to_logical).any()
            for order, target in zip(self.file_orders, self.targets, strict=True)
        )


def _load(
    engine: Any,
    load: Callable[[], Any],
    arguments: dict[str, Any],
    plan: PlacementPlan | None,
    files: ExpertFiles | None,
) -> Any:
    decision, failure = None, None
    try:
        decision = _decide(engine, arguments, plan or plan_of(engine))
    except Exception as error:  # noqa: BLE001 it rises below, on all ranks
        failure = error
    agree_on_failure(failure)
    agree("checkpoints or placements", _digest(decision))
    if files is not None and decision is not None:
        files.orders = decision.file_orders
    load_path, client_state = load()
    if decision is None or load_path is None:
        return load_path, client_state
    if isinstance(client_state, dict):
        client_state.pop(KEY, None)
    if files is not None:
        routers_to_logical(engine, decision.file_orders)
        return load_path, client_state
    for target, order in zip(decision.targets, decision.file_orders, strict=True):
        set_slot_to_logical(target.module, order)
    if decision.moves:
        state = state_source(engine) if decision.with_optimizer else no_state
        relabel_to(lambda: (decision.targets, state), _digest(decision))
        if not decision.with_optimizer and hasattr(engine.optimizer, "refresh_fp32_params"):
            engine.optimizer.refresh_fp32_params()  # masters and ZeRO partitions, from the weights
    return load_path, client_state


def _decide(engine: Any, arguments: dict[str, Any], plan: PlacementPlan | None) -> _Decision | None:
    """Compare file and engine before anything is loaded; None: nothing here for us to do."""
    peeked = _peek(Path(arguments["load_dir"]), arguments["tag"])
    layers = moe_modules(engine.module)
    if peeked is None or not layers:
        return None  # DeepSpeed says itself what is missing
    path, entry = peeked
    file_orders = orders_of(entry, len(layers), layers[0][1].num_experts)
    replicas = has_replicas(engine.module)
    if plan is not None and not replicas:
        targets = plan_targets(engine.module, plan)
        check_tied_stay(engine.module, targets, file_orders)
    else:
        targets = _as_targets(layers, file_orders)
    loads_optimizer = (
        engine.optimizer is not None
        and arguments["load_optimizer_states"]
        and not arguments["load_module_only"]
    )
    decision = _Decision(file_orders=file_orders, targets=targets, with_optimizer=loads_optimizer)
    if loads_optimizer:
        if entry is not None and entry.get("optimizer_left_out"):
            raise ConfigError(
                f"{path}: found a checkpoint that was baked without optimizer state, expected one "
                "with it: load its weights with load_module_only=True"
            )
        check_optimizer_fits(engine, entry, path)
        if decision.moves:
            _check_moments_can_move(engine, path)
    elif not replicas:  # else every slot keeps its expert
        _check_no_moments_stay(engine, decision, path)
    return decision


def _check_moments_can_move(engine: Any, path: Path) -> None:
    try:
        state_source(engine)
    except MoeLocalityError as error:
        raise ConfigError(
            f"{path}: found another order of experts than this engine's plan, expected the same, "
            f"because the optimizer state cannot follow ({error}). Nothing was loaded. Or start "
            "the engine without a plan: it then takes the order of the checkpoint"
        ) from error


def _check_no_moments_stay(engine: Any, decision: _Decision, path: Path) -> None:
    """Weights alone are loaded: moments that stay must already belong to the order wanted."""
    stays = all(
        (current_order(target.module) == target.slot_to_logical).all()
        for target in decision.targets
    )
    if stays or (engine.global_steps == 0 and not has_state(engine.optimizer)):
        return
    raise ConfigError(
        f"{path}: found another order of experts than this engine's, which has taken "
        f"{engine.global_steps} steps, and no optimizer state to load with it: its moments would "
        "follow the wrong experts. Nothing was loaded: load the weights before the first step"
    )


def _peek(folder: Path, tag: str | None) -> tuple[Path, dict[str, Any] | None] | None:
    """Read the entry of a checkpoint; tensors stay on disk."""
    if tag is None:
        latest = folder / "latest"
        if not latest.is_file():
            return None
        tag = latest.read_text(encoding="utf-8").strip()
    files = model_state_files(folder / str(tag))
    if not files:
        return None
    # trusted: the engine unpickles this very file a moment later
    return files[0], read_entry(read_file(files[0], trusted=True), files[0])


def _as_targets(layers: list[tuple[str, Any]], orders: list[np.ndarray]) -> list[Target]:
    return [
        Target(name=name, module=module, slot_to_logical=order, group=find_group(module, None))
        for (name, module), order in zip(layers, orders, strict=True)
    ]


def _digest(decision: _Decision | None) -> str:
    if decision is None:
        return "no checkpoint"
    facts = [
        [order.tolist() for order in decision.file_orders],
        [target.slot_to_logical.tolist() for target in decision.targets],
        decision.with_optimizer,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _entry_of(engine: Any, plan: PlacementPlan | None) -> dict[str, Any]:
    return make_entry(
        [current_order(module) for _, module in moe_modules(engine.module)],
        plan_digest=plan.digest() if plan else None,
        optimizer_names=_optimizer_names(engine),
        replicas=slots_of(engine),
    )


def _optimizer_names(engine: Any) -> list[list[str]] | None:
    """Names of the optimizer's parameters, group by group, where all ranks have the same.

    A saved optimizer state knows its parameters by number only; with the names, the state of an
    expert can be found again in the file.
    """
    try:
        optimizer = None if has_replicas(engine.module) else plain_optimizer(engine)
    except ConfigError:
        optimizer = None
    names = None
    if optimizer is not None:
        name_of = {id(p): name for name, p in engine.module.named_parameters()}
        names = [[name_of[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    if dist.is_initialized() and dist.get_world_size() > 1:
        digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, digest)
        if len(set(found)) > 1:
            logger.warning(
                "the optimizer's parameter groups differ between ranks (set PYTHONHASHSEED=0): "
                "their names are not saved, so optimizer state cannot be baked offline"
            )
            return None
    return names
