"""Which backend runs a kernel, why another one cannot, what really ran; the types of all backends.

The choice is, first to last: the ``backend`` argument of a call, :func:`set_backend`, the
environment variable ``MOE_LOCALITY_BACKEND``, the device: on a GPU ``cuda`` where it was built,
else ``triton`` where it is installed, else ``reference``; on the CPU ``reference``.
"""

import importlib
import os
from collections import Counter
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from moe_locality.errors import BackendUnavailable, ConfigError

Backend = Literal["auto", "reference", "triton", "cuda"]
BACKENDS = ("reference", "triton", "cuda")
ENVIRONMENT_VARIABLE = "MOE_LOCALITY_BACKEND"

# A backend is a module with the functions of reference.py and, where it may be missing on this
# machine, ``why_unavailable() -> str | None``.
MODULES = {
    "reference": "moe_locality.kernels.reference",
    "triton": "moe_locality.kernels.triton_impl",
    "cuda": "moe_locality.kernels.cuda_impl",
}
_HOW_TO_GET = {
    "triton": "pip install triton on a machine with an NVIDIA GPU (without a GPU, start Python "
    "with TRITON_INTERPRET=1 to try the kernels slowly)",
    "cuda": "build it on a machine with a CUDA torch and nvcc: MOE_LOCALITY_CUDA=1 pip install "
    "--no-build-isolation moe-locality",
}

_counts: Counter[tuple[str, str]] = Counter()
_chosen: Backend = "auto"


def set_backend(backend: Backend) -> None:
    """Choose the backend of every call that names none; ``"auto"`` undoes it.

    Raises:
        ConfigError: no such backend. BackendUnavailable: it is not usable here.
    """
    global _chosen
    if backend != "auto":
        module_of(backend)
    _chosen = backend


def check_backend(backend: Backend) -> None:
    """Raise now what a call with this backend would raise later."""
    if backend != "auto":
        module_of(backend)


def backend_counts() -> dict[str, dict[str, int]]:
    """Return ``{backend: {op: calls}}`` since the start or :func:`reset_backend_counts`."""
    counts: dict[str, dict[str, int]] = {}
    for (backend, op), calls in sorted(_counts.items()):
        counts.setdefault(backend, {})[op] = calls
    return counts


def reset_backend_counts() -> None:
    """Forget the calls counted so far."""
    _counts.clear()


def select(op: str, device: torch.device, backend: str) -> Any:
    """Return the function ``op`` of the backend that this call gets, and count the call."""
    name = _resolve(backend, device)
    function = getattr(module_of(name), op)
    _counts[name, op] += 1
    return function


def module_of(backend: str) -> ModuleType:
    """Return the module of a backend.

    Raises:
        ConfigError: no such backend. BackendUnavailable: it is not usable here, with the reason.
    """
    if backend not in MODULES:
        raise ConfigError(
            f"found kernels={backend!r}, expected auto, {', '.join(BACKENDS)}: correct the name"
        )
    module, why = _load(MODULES[backend])
    if module is None:
        raise BackendUnavailable(
            f"kernels={backend!r} was asked for, but {why}, expected a usable {backend} backend: "
            f"{_HOW_TO_GET[backend]}, or set kernels to 'auto'"
        )
    return module


def _resolve(backend: str, device: torch.device) -> str:
    for wish in (backend, _chosen, os.environ.get(ENVIRONMENT_VARIABLE, "auto")):
        if wish != "auto":
            return wish
    if device.type == "cuda":
        for name in ("cuda", "triton"):
            if _load(MODULES[name])[0] is not None:
                return name
    return "reference"


@cache
def _load(name: str) -> tuple[ModuleType | None, str]:
    """Import a backend once; ``(None, why)`` where it cannot be used on this machine."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        return None, f"{error.name} is not installed here"
    why = getattr(module, "why_unavailable", lambda: None)()
    return (None, why) if why else (module, "")


MAX_NODES = 63
"""Nodes of a cluster that a token's bitmask (one int64) can name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMap:
    """Where each kept route goes when routes are sorted by slot, stable in (token, k).

    N is the number of rows: of the kept routes and the padding between the slots or, with a static
    ``num_rows``, exactly that, whatever the routes are.

    ``row_route [N] int32``: the flat route ``t * K + k`` of each row, -1 where a row has none.
    ``row_token [N] int32``: its token ``t``, -1 where a row has none.
    ``positions [T, K] int32``: the row of each route, -1 where it is dropped.
    ``tokens_per_slot [P] int64``: kept routes of each slot.

    Only from maps of :func:`moe_locality.kernels.ops.row_map`, not of plain index lists:

    ``slot_offsets [P + 1] int32``: first row of each slot; its padding lies behind its routes, and
    the last entry is the number of rows in use. ``slot_offsets[1:]`` is what grouped GEMMs want.
    ``routed_per_slot [P] int32``: routes of each slot before capacity and overflow took some.
    ``overflow [1] int32``: kept routes that found no row in a static ``num_rows`` (dropped).
    ``node_mask [T] int64``: bit m is set where a kept route of the token goes to node m.
    ``tokens_per_node [M] int64``: tokens with a kept route to each node, each counted once.
    ``padded``: some rows may have no route.
    """

    row_route: Tensor
    row_token: Tensor
    positions: Tensor
    tokens_per_slot: Tensor
    slot_offsets: Tensor
    routed_per_slot: Tensor
    overflow: Tensor
    node_mask: Tensor | None = None
    tokens_per_node: Tensor | None = None
    padded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSpec:
    """How a router's logits become K expert ids and K weights.

    ``score``: softmax over all experts, or sigmoid of each. ``num_groups``, ``top_groups``: only
    experts of the best ``top_groups`` groups of consecutive experts may be picked; a group's score
    is the sum of its two best (``top2``: DeepSeek-V3, arXiv 2412.19437, section 2.1.2) or its best
    (``max``: DeepSeek-V2, arXiv 2405.04434, section 2.2.2). ``renormalize``: the K weights of a
    token sum to one. ``scale``: factor on the weights, last.
    """

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["top2", "max"] = "top2"
    renormalize: bool = False
    scale: float = 1.0

    def check(self, num_experts: int) -> None:
        """Raise ConfigError where this gate cannot work on ``num_experts`` experts."""
        problem = ""
        if self.score not in ("softmax", "sigmoid"):
            problem = f"score={self.score!r}, expected softmax or sigmoid"
        elif self.group_score not in ("top2", "max"):
            problem = f"group_score={self.group_score!r}, expected top2 or max"
        elif self.num_groups < 1 or num_experts % self.num_groups:
            problem = f"{num_experts} experts in {self.num_groups} groups, expected equal groups"
        elif not 1 <= self.top_groups <= self.num_groups:
            problem = f"top_groups={self.top_groups}, expected 1 to {self.num_groups}"
        else:
            reachable = num_experts // self.num_groups * self.top_groups
            if not 1 <= self.top_k <= reachable:
                problem = f"top_k={self.top_k}, expected 1 to {reachable}, the experts in reach"
        if problem:
            raise ConfigError(f"found a gate with {problem}: correct the gate")
