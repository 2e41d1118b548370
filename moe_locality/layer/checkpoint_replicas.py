"""Checkpoints of an engine with replicas: every logical expert once, as DeepSpeed writes E experts.

DeepSpeed writes a file per slot and names it by the slot's number. Here the file of a slot is that
of its expert: the lowest slot that holds it writes it, and every slot that holds it reads it. The
router is in logical order. So the weights are those of a plain checkpoint without a placement.

Optimizer files belong to ranks and hold what the rank's slots need: they load into an engine with
the same slots only, and the entry ``"replicas"`` says which those are.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import ConfigError
from moe_locality.layer.checkpoint_io import EXPERT_STATES
from moe_locality.layer.moe import moe_modules, set_slot_to_logical
from moe_locality.layer.relabel_weights import permute_gate
from moe_locality.layer.replica_map import LayerReplicas
from moe_locality.layer.replicas import has_replicas, replicas_of

_WITHOUT_OPTIMIZER = "load the weights alone, with load_module_only=True"


class ExpertFiles:
    """Stands between an engine and its checkpoint engine, and renumbers the files of experts.

    ``orders``: per MoE layer [E], the expert in each numbered file of the checkpoint that is read.
    """

    def __init__(self, engine: Any) -> None:
        self.layers: list[LayerReplicas | None] = [
            replicas_of(module) for _, module in moe_modules(engine.module)
        ]
        self.orders: Sequence[np.ndarray] = []
        files = engine.checkpoint_engine
        self._save, self._load = files.save, files.load
        files.save, files.load = self.save, self.load

    def save(self, state_dict: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Save a file; that of a slot under the number of its expert, or not at all."""
        found = self._slot_of(path)
        if found is not None:
            replicas, slot = found
            expert = int(replicas.slot_to_logical[slot])
            if replicas.primary_slots[expert] != slot:
                return None  # the expert is in the file of another slot
            state_dict, path = _keys(state_dict, slot, expert), _numbered(path, expert)
        return self._save(state_dict, path, *args, **kwargs)

    def load(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a file; for a slot that of its expert, with the keys of the slot."""
        found = self._slot_of(path)
        if found is None:
            return self._load(path, *args, **kwargs)
        replicas, slot = found
        layer = int(EXPERT_STATES.fullmatch(Path(path).name)[1])  # pyright: ignore
        wanted = int(replicas.slot_to_logical[slot])
        number = int(np.flatnonzero(self.orders[layer] == wanted)[0])
        return _keys(self._load(_numbered(path, number), *args, **kwargs), number, slot)

    def _slot_of(self, path: Any) -> tuple[LayerReplicas, int] | None:
        match = EXPERT_STATES.fullmatch(Path(path).name)
        replicas = self.layers[int(match[1])] if match else None
        return (replicas, int(match[2])) if match and replicas is not None else None


def _numbered(path: Any, number: int) -> str:
    match = EXPERT_STATES.fullmatch(Path(path).name)
    assert match is not None
    name = f"layer_{match[1]}_expert_{number}_mp_rank_{match[3]}_model_states.pt"
    return str(Path(path).with_name(name))


def _keys(state: dict[str, Any], old: int, new: int) -> dict[str, Any]:
    head = ".deepspeed_moe.experts.deepspeed_experts."
    return {key.replace(f"{head}{old}.", f"{head}{new}."): value for key, value in state.items()}


def slots_of(engine: Any) -> list[list[int]] | None:
    """Per MoE layer the expert of each slot, for the entry ``"replicas"``; None without them."""
    if not has_replicas(engine.module):
        return None
    found = [replicas_of(module) for _, module in moe_modules(engine.module)]
    return [replicas.slot_to_logical.tolist() for replicas in found if replicas is not None]


def check_optimizer_fits(engine: Any, entry: dict[str, Any] | None, path: Path) -> None:
    """Check that the optimizer state of a checkpoint was made by slots like this engine's.

    Raises:
        ConfigError: it was made by other ones.
    """
    theirs, ours = (entry or {}).get("replicas"), slots_of(engine)
    if theirs == ours:
        return
    what = {True: "no replicas", False: "replicas"}
    raise ConfigError(
        f"{path}: found optimizer state of an engine with {what[theirs is None]}, expected the "
        f"slots of this engine, which has {what[ours is None]}"
        f"{' (in other slots)' if theirs and ours else ''}: optimizer state with replicas loads "
        f"into the same slots only; {_WITHOUT_OPTIMIZER}. Nothing was loaded"
    )


def routers_to_logical(engine: Any, orders: Sequence[np.ndarray]) -> None:
    """Put router rows that were loaded in the order of a file into logical order."""
    moved = False
    for (_, module), order in zip(moe_modules(engine.module), orders, strict=True):
        if (order != np.arange(len(order))).any():
            permute_gate(module.deepspeed_moe.gate, np.argsort(order), None)
            moved = True
        set_slot_to_logical(module, np.arange(module.num_experts))
    if moved and hasattr(engine.optimizer, "refresh_fp32_params"):
        engine.optimizer.refresh_fp32_params()  # masters and ZeRO partitions, from the weights
