"""Keep ranks in step: each takes part in every exchange of every MoE layer, also without tokens.

A rank that has nothing to run enters the exchanges alone, with no rows: it needs no forward pass.
Dense weights are gathered once, before the first step, so that in a step only the exchange and one
small collective travel.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_locality.dispatch.desync import ask_ranks
from moe_locality.errors import ConfigError, PlacementError, TraceError
from moe_locality.integrations.transformers_ep import LocalityEP, expert_layers
from moe_locality.layer.agreement import LostRanks
from moe_locality.layer.replicas import replicas_of
from moe_locality.layer.state import current_order, has_auto_ep, moe_modules, plan_rows
from moe_locality.placement.plan import PlacementPlan
from moe_locality.trace.recorder.hooks import find_moe_layers, hook_layer, model_type_of


def world() -> tuple[int, int]:
    """Return (rank, number of ranks)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def rows_of(plan: PlacementPlan, model: nn.Module) -> list[int]:
    """Return the row of the plan for each MoE layer; none where the experts are not spread.
    PlacementError: the plan does not fit, or is not the one that the model was placed with.
    """
    num_ranks = world()[1]
    plan.check_fits(model_type=model_type_of(model), num_ranks=num_ranks if num_ranks > 1 else None)
    named = expert_layers(model) or moe_modules(model)
    rows = plan_rows(model, plan, [name for name, _ in named]) if named else []
    for (name, layer), row in zip(named, rows, strict=True):
        plan.check_fits(num_experts=layer.num_experts)
        if num_ranks > 1 and not np.array_equal(_slots(layer), plan.experts_of_slots(row)):
            raise PlacementError(
                f"found the plan {plan.digest()[:12]} for a model that was not placed with it: "
                f"{name} has other experts in its slots. Give the engine the plan of "
                "moe_locality.apply, or of init_inference, or place the model with this one first"
            )
    return rows


def _slots(layer: Any) -> np.ndarray:
    """Return the expert in each slot of a layer of transformers or DeepSpeed."""
    holder = layer if isinstance(layer, LocalityEP) else replicas_of(layer)
    return current_order(layer) if holder is None else holder.slot_to_logical


class RouteTap:
    """Sees the picks of every MoE layer in a forward pass, and drops those of padding.

    ``valid [T]``: which tokens are real, None: all of them. ``picks``: of the pass so far, ids
    ``[T, K]`` per layer in the order of the layers, kept where ``keeps`` is set. ``num_experts``:
    of a layer, None where the model has none. ``sees``: whether picks are wanted, a hook per layer.
    """

    def __init__(self, model: nn.Module, *, sees: bool) -> None:
        self.layers = [layer for _, layer in expert_layers(model)]
        self.num_experts: int | None = None
        self._hooks: list[Any] = []
        if sees:
            with contextlib.suppress(TraceError):  # a dense model has nothing to see
                found = find_moe_layers(model)
                self.num_experts = max(layer.num_experts for layer in found)
                for number, layer in enumerate(found):
                    self._hooks += hook_layer((number,), layer, self._see, None)
        self.order: list[tuple[LocalityEP, int, int, torch.dtype]] = []
        self.valid: Tensor | None = None
        self.keeps, self.learns = False, False
        self.picks: dict[int, Tensor] = {}
        for layer in self.layers:
            layer.on_routes = self.on_routes

    def on_routes(self, layer: LocalityEP, hidden: Tensor, ids: Tensor) -> Tensor:
        """Take the picks ``ids [T, K]`` of a layer; return those that are sent."""
        if self.learns:
            self.order.append((layer, hidden.shape[1], ids.shape[1], hidden.dtype))
        if self.valid is None:
            return ids
        if len(self.valid) != len(ids):
            raise ConfigError(
                f"found {len(ids)} tokens in an experts module of a pass of {len(self.valid)}, "
                "expected as many: this model is not served; use model.generate"
            )
        return ids.masked_fill(~self.valid[:, None], -1)

    def _see(self, places: tuple[int, ...], module: nn.Module, read: Any) -> None:
        if self.keeps:
            self.picks[places[0]] = read(False).ids

    def take_picks(self) -> np.ndarray | None:
        """Return the picks of the pass: int16 ``[T, L, K]``, and forget them."""
        if not self.picks:
            return None
        stacked = torch.stack([self.picks[number] for number in sorted(self.picks)], dim=1)
        self.picks = {}
        return stacked.to(torch.int16).cpu().numpy()

    def close(self) -> None:
        """Leave the layers as they were."""
        for layer in self.layers:
            if layer.on_routes == self.on_routes:
                layer.on_routes = None
        for hook in self._hooks:
            hook.remove()


def _is_settled(gate: Any) -> bool:
    """Whether the picks of a token depend on nothing but the token."""
    return not gate.drop_tokens and not (gate.k == 2 and gate.top2_2nd_expert_sampling)


class LockStep:
    """The part of the engine that talks with the other ranks; ConfigError: not with this model."""

    def __init__(self, model: nn.Module, tap: RouteTap, device: torch.device) -> None:
        self.rank, self.size = world()
        self.model, self.tap, self.device = model, tap, device
        self.control_bytes = 0
        wide = [name for name, layer in expert_layers(model) if layer.tp_mesh.size() > 1]
        if wide:
            raise ConfigError(
                f"found tensor parallelism at {wide[0]}, expected ranks with requests of their own:"
                " load the model with tp_size=1"
            )
        theirs = moe_modules(model)
        wrong = [name for name, layer in theirs if not _is_settled(layer.deepspeed_moe.gate)]
        if has_auto_ep(model):
            wrong.append("layers of AutoEP")
        if wrong:
            raise ConfigError(
                f"found {wrong[0]}, expected transformers' experts, or DeepSpeed's MoE with "
                "drop_tokens=False and top2_2nd_expert_sampling=False, which gives a token the "
                "same in every batch"
            )
        self._whole_passes = bool(theirs)
        self._run: Callable[[], Any]

    def warm_up(self, run: Callable[[], Any]) -> None:
        """Gather the dense weights for good and learn the order of the layers. Collective.

        FSDP2 drops the weights of a pass that began before it was told to keep them, and those of
        its root at the end of the first one: two passes. ``run`` runs the model on one token.
        """
        self._run = run
        for layer in self.tap.layers:
            layer.rows.hold_once()
        keep = getattr(self.model, "set_reshard_after_forward", None)
        if keep is not None:
            keep(False)
        run()
        self.tap.learns = True
        run()
        self.tap.learns = False

    @torch.no_grad()
    def idle(self) -> None:
        """Take part in the exchanges of one pass without a token. DeepSpeed's layers have more
        collectives than the exchange: they get a token of nobody.
        """
        if self._whole_passes:
            self._run()
            return
        self.tap.valid = None  # of the last pass
        for layer, width, top_k, dtype in self.tap.order:
            nothing = torch.empty(0, width, dtype=dtype, device=self.device)
            routes = torch.empty(0, top_k, dtype=torch.int64, device=self.device)
            layer.experts(nothing, routes, torch.empty(0, top_k, dtype=dtype, device=self.device))

    def meet(self, word: list[int]) -> np.ndarray:
        """Exchange a few counts: returns ``[G, len(word)]``, what each rank said. Collective."""
        if self.size == 1:
            return np.array([word])
        mine = torch.tensor(word, dtype=torch.int64)
        everyone = torch.empty(self.size * len(word), dtype=torch.int64, device=self.device)
        with self.explained("between two steps of the engine"):
            dist.all_gather_into_tensor(everyone, mine.to(self.device))
        self.control_bytes += 8 * len(word) * (self.size - 1)
        return everyone.view(self.size, -1).cpu().numpy()

    @contextlib.contextmanager
    def explained(self, where: str) -> Iterator[None]:
        """Let an error of the backend, inside, name the ranks that are not there."""
        try:
            yield
        except RuntimeError as error:
            if type(error) is not RuntimeError and not isinstance(error, dist.DistError):
                raise  # out of memory, say: no rank is missing
            told = ask_ranks(range(self.size), range(self.size), where)
            raise LostRanks(
                f"the ranks did not meet {where}, on rank {self.rank}: one of them died or left. "
                f"{told} The backend says: {error}"
            ) from error
