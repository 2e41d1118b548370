"""The one front of the kernels: checks, choice of the backend, a count of what really ran.

Backends: ``reference`` (torch, any device, the truth), ``triton`` and ``cuda``. The choice is,
first to last: the ``backend`` argument, :func:`set_backend`, the environment variable
``MOE_LOCALITY_BACKEND``, the device. These functions know no autograd: ``moe_locality.dispatch``
wraps a whole dispatch and a whole combine, which costs less than a wrapper per kernel.

Shapes: T tokens on this rank, K top-k, N kept routes (at most T*K), D model width, P slots.
"""

import importlib
import os
from collections import Counter
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from moe_locality.errors import BackendUnavailable, ConfigError

Backend = Literal["auto", "reference", "triton", "cuda"]
BACKENDS = ("reference", "triton", "cuda")
ENVIRONMENT_VARIABLE = "MOE_LOCALITY_BACKEND"

# A backend is a module with the functions of reference.py and, where it may be missing on this
# machine, ``why_unavailable() -> str | None``.
_MODULES = {
    "reference": "moe_locality.kernels.reference",
    "triton": "moe_locality.kernels.triton_impl",
    "cuda": "moe_locality.kernels.cuda_impl",
}
_HOW_TO_GET = {
    "triton": "install a version of moe_locality with Triton kernels, and triton on a GPU machine",
    "cuda": "install a version of moe_locality with the CUDA extension (MOE_LOCALITY_CUDA=1)",
}

_counts: Counter[tuple[str, str]] = Counter()
_chosen: Backend = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMap:
    """Where each kept route goes when routes are sorted by slot, stable in (token, k).

    ``row_route [N] int32``: the flat route ``t * K + k`` of each row.
    ``row_token [N] int32``: its token ``t``.
    ``positions [T, K] int32``: the row of each route, -1 where it is dropped.
    ``tokens_per_slot [P] int64``: rows of each slot; they sum to N.
    """

    row_route: Tensor
    row_token: Tensor
    positions: Tensor
    tokens_per_slot: Tensor


def set_backend(backend: Backend) -> None:
    """Choose the backend of every call that names none; ``"auto"`` undoes it.

    Raises:
        ConfigError: no such backend. BackendUnavailable: it is not usable here.
    """
    global _chosen
    if backend != "auto":
        _module(backend)
    _chosen = backend


def check_backend(backend: Backend) -> None:
    """Raise now what a call with this backend would raise later."""
    if backend != "auto":
        _module(backend)


def backend_counts() -> dict[str, dict[str, int]]:
    """Return ``{backend: {op: calls}}`` since the start or :func:`reset_backend_counts`."""
    counts: dict[str, dict[str, int]] = {}
    for (backend, op), calls in sorted(_counts.items()):
        counts.setdefault(backend, {})[op] = calls
    return counts


def reset_backend_counts() -> None:
    """Forget the calls counted so far."""
    _counts.clear()


def row_map(slot_ids: Tensor, num_slots: int, *, backend: Backend = "auto") -> RowMap:
    """Sort the routes by slot: a stable counting sort, the same on every call and device.

    Args:
        slot_ids: ``[T, K]`` integer, the slot of each route in 0..P-1, or -1 where it is dropped.
        num_slots: P.
    """
    if slot_ids.dim() != 2 or slot_ids.dtype.is_floating_point:
        raise ConfigError(
            f"found slot_ids {tuple(slot_ids.shape)} {slot_ids.dtype}, expected integers [T, K]"
        )
    return RowMap(**_run("row_map", slot_ids, backend)(slot_ids, num_slots))


def permute(x: Tensor, row_token: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return ``rows[n] = x[row_token[n]]``: ``[T, D]`` and ``[N]`` to ``[N, D]``."""
    return _run("permute", x, backend)(x, row_token)


def permute_backward(grad_rows: Tensor, positions: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return the gradient of :func:`permute`: each token's rows summed, ``[N, D]`` to ``[T, D]``.

    The sum runs over k in order, in fp32 or wider, and ends in the dtype of ``grad_rows``.
    """
    return _run("permute_backward", grad_rows, backend)(grad_rows, positions)


def combine(
    rows: Tensor, positions: Tensor, weights: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """Return ``out[t] = sum_k weights[t, k] * rows[positions[t, k]]``, dropped routes left out.

    ``rows [N, D]``, ``positions [T, K]``, ``weights [T, K]`` give ``[T, D]`` in the dtype of
    ``rows``; products and sums are in fp32 or wider, over k in order.
    """
    return _run("combine", rows, backend)(rows, positions, weights)


def combine_backward(
    grad: Tensor,
    rows: Tensor | None,
    mapping: RowMap,
    weights: Tensor,
    *,
    need_rows: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of :func:`combine` for ``rows`` (``[N, D]``) and ``weights`` (``[T,
    K]``).

    ``rows=None`` says that the gradient of the weights is not wanted, ``need_rows=False`` that of
    the rows is not. ``grad`` is ``[T, D]``; the gradient of a dropped route's weight is zero.
    """
    run = _run("combine_backward", grad, backend)
    return run(grad, rows, mapping.row_route, mapping.positions, weights, need_rows)


def _run(op: str, tensor: Tensor, backend: Backend):
    name = _resolve(backend, tensor.device)
    function = getattr(_module(name), op)
    _counts[name, op] += 1
    return function


def _resolve(backend: Backend, device: torch.device) -> str:
    del device  # the faster backends will be the default on their device
    for wish in (backend, _chosen, os.environ.get(ENVIRONMENT_VARIABLE, "auto")):
        if wish != "auto":
            return wish
    return "reference"


def _module(backend: str) -> ModuleType:
    if backend not in _MODULES:
        raise ConfigError(
            f"found kernels={backend!r}, expected auto, {', '.join(BACKENDS)}: correct the name"
        )
    try:
        module = importlib.import_module(_MODULES[backend])
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"kernels={backend!r} was asked for, but {error.name} is not installed here, expected "
            f"a usable {backend} backend: {_HOW_TO_GET[backend]}, or set kernels to 'auto'"
        ) from error
    why = getattr(module, "why_unavailable", lambda: None)()
    if why:
        raise BackendUnavailable(
            f"kernels={backend!r} was asked for, but {why}: {_HOW_TO_GET[backend]}, or set kernels "
            "to 'auto'"
        )
    return module
