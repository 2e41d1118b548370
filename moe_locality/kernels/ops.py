"""The local kernels: checks, the choice of a backend, and the call.

Backends: ``reference`` (torch, any device, the truth), ``triton`` and ``cuda``. The choice is, in
this order: the ``backend`` argument of a call, :func:`set_backend`, the environment variable
``MOE_LOCALITY_BACKEND``, the device: on a GPU ``cuda`` where it was built, else ``triton`` where it
is installed, else ``reference``; on the CPU ``reference``.

These functions record no autograd: ``moe_locality.dispatch`` wraps a whole dispatch and a whole
combine. An eager call goes straight to the backend, since a Python operator would cost
microseconds that a decode step does not have. Under ``torch.compile``, and for tensor subclasses
such as those of ``FakeTensorMode``, it is ``torch.ops.moe_locality.*``, without a graph break.

Shapes: T tokens on this rank, K top-k, P slots, N rows, D model width.
"""

import importlib
import os
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cache, partial
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from moe_locality.errors import BackendUnavailable, ConfigError
from moe_locality.kernels.reference import new_map

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
HOW_TO_GET = {
    "triton": "pip install triton on a machine with an NVIDIA GPU (without a GPU, start Python "
    "with TRITON_INTERPRET=1 to try the kernels slowly)",
    "cuda": "build it on a machine with a CUDA torch and nvcc: MOE_LOCALITY_CUDA=1 pip install "
    "--no-build-isolation moe-locality",
}

_counts: Counter[tuple[str, str]] = Counter()
_chosen: Backend = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMap:
    """Where each kept route goes when routes are sorted by slot, stable in (token, k).

    N is the number of rows: that of the kept routes, or a static ``num_rows``.

    ``row_route [N] int32``: the flat route ``t * K + k`` of each row, -1 where a row has none.
    ``row_token [N] int32``: its token ``t``, -1 where a row has none.
    ``positions [T, K] int32``: the row of each route, -1 where it is dropped.
    ``tokens_per_slot [P] int64``: kept routes of each slot.
    ``slot_offsets [P + 1] int32``: first row of each slot; the last entry is the number of rows in
    use. ``slot_offsets[1:]`` is what grouped GEMMs want.
    ``routed_per_slot [P] int32``: routes of each slot before capacity and overflow took some.
    ``overflow [1] int32``: kept routes that found no row in a static ``num_rows`` (dropped).
    ``padded``: some rows may have no route.
    """

    row_route: Tensor
    row_token: Tensor
    positions: Tensor
    tokens_per_slot: Tensor
    slot_offsets: Tensor
    routed_per_slot: Tensor
    overflow: Tensor
    padded: bool = False


# -- the kernels


def row_map(
    slot_ids: Tensor,
    num_slots: int,
    *,
    capacity: int | None = None,
    num_rows: int | None = None,
    backend: Backend = "auto",
) -> RowMap:
    """Sort the routes by slot: a stable counting sort, the same on every call and device.

    With ``num_rows`` nothing waits for the device, and the call can be captured in a CUDA graph;
    without it, a call on a GPU waits once for the number of rows.

    Args:
        slot_ids: ``[T, K]`` integer, the slot of each route in 0..P-1; -1 where the route is
            dropped. Too large an id is an error on the CPU, and a dropped route where asking would
            wait for the device.
        num_slots: P.
        capacity: routes that one slot keeps, the first ones in (token, k) order: DeepSpeed's
            ``drop_policy="position"``.
        num_rows: N, fixed. Rows past ``slot_offsets[P]`` are not written, and never read. Routes
            beyond it are dropped and counted in ``overflow``.

    Raises:
        ConfigError: an argument has an impossible value.
    """
    if slot_ids.dim() != 2 or slot_ids.dtype.is_floating_point:
        raise ConfigError(
            f"found slot_ids {tuple(slot_ids.shape)} {slot_ids.dtype}, expected integers [T, K]: "
            "pass the ids of the gate"
        )
    given = {"num_slots": (num_slots, 1), "capacity": (capacity, 0), "num_rows": (num_rows, 0)}
    for name, (value, least) in given.items():
        if value is not None and value < least:
            raise ConfigError(f"found {name}={value}, expected at least {least}: correct it")
    limits = (-1 if capacity is None else capacity, -1 if num_rows is None else num_rows)
    made = _call("row_map", backend, slot_ids, num_slots, *limits)
    return RowMap(**dict(zip(MAP_FIELDS, made, strict=True)), padded=num_rows is not None)


def serve_visited(
    topk_ids: Tensor, slots: Tensor, nodes: Tensor, home_node: int, *, backend: Backend = "auto"
) -> Tensor:
    """Return the slot that serves each pick of tokens at home on one rank, by the token's other
    picks (rule "visited", ``placement/serving.py``). Shape and dtype of ``topk_ids``.

    Args:
        topk_ids: ``[T, K]`` integer logical ids, -1 where a route is dropped.
        slots: ``[E, X]`` int32, the slots that may serve an expert, the preferred one first, -1
            where there are fewer.
        nodes: ``[E, X]`` int64, the node of each, -1 likewise; at most 62 nodes.
    """
    return _call("serve_visited", backend, topk_ids, slots, nodes, home_node)


def permute(x: Tensor, index: Tensor | RowMap, *, backend: Backend = "auto") -> Tensor:
    """Return ``rows[n] = x[index[n]]``: ``[T, D]`` to ``[N, D]``.

    ``index`` is a list of rows ``[N]``, or a map: then each token is read once and written K times,
    and rows of a slot without a route become zero.
    """
    if isinstance(index, RowMap):
        padding = index.slot_offsets if index.padded else None
        return _call("permute", backend, x, index.row_token, index.positions, padding)
    return _call("gather", backend, x, index)


def permute_backward(grad_rows: Tensor, positions: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return the gradient of :func:`permute`: each token's rows summed, ``[N, D]`` to ``[T, D]``,
    over k in order, in fp32 or wider, in the dtype of ``grad_rows``."""
    return _call("combine", backend, grad_rows, positions, None)


def combine(
    rows: Tensor, positions: Tensor, weights: Tensor | None, *, backend: Backend = "auto"
) -> Tensor:
    """Return ``out[t] = sum_k weights[t, k] * rows[positions[t, k]]``, dropped routes left out.

    ``rows [N, D]``, ``positions [T, K]``, ``weights [T, K]`` (None: a plain sum) give ``[T, D]`` in
    the dtype of ``rows``; products and sums are in fp32 or wider, over k in order.
    """
    return _call("combine", backend, rows, positions, weights)


def combine_backward(
    grad: Tensor,
    rows: Tensor | None,
    mapping: RowMap,
    weights: Tensor,
    *,
    need_rows: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of :func:`combine`, ``grad [T, D]``, for ``rows [N, D]`` and ``weights
    [T, K]``; zero for the weight of a dropped route and for a row without a route.

    ``rows=None`` says that the gradient of the weights is not wanted, ``need_rows=False`` that of
    the rows is not.
    """
    where = (mapping.row_token, mapping.row_route, mapping.positions)
    padding = mapping.slot_offsets if mapping.padded else None
    args = (grad, rows, *where, weights, need_rows, padding)
    grad_rows, grad_weights = _call("combine_backward", backend, *args)
    return grad_rows if need_rows else None, grad_weights if rows is not None else None


# -- the choice of a backend


def set_backend(backend: Backend) -> None:
    """Choose the backend of every call that names none; ``"auto"`` undoes it.

    Raises:
        ConfigError: no such backend. BackendUnavailable: it is not usable here.
    """
    global _chosen
    check_backend(backend)
    _chosen = backend


def check_backend(backend: Backend) -> None:
    """Raise now what a call with this backend would raise later."""
    if backend != "auto":
        _module_of(backend)


def backend_counts() -> dict[str, dict[str, int]]:
    """Return ``{backend: {op: calls}}`` since the start or :func:`reset_backend_counts`."""
    counts: dict[str, dict[str, int]] = {}
    for (backend, op), calls in sorted(_counts.items()):
        counts.setdefault(backend, {})[op] = calls
    return counts


def reset_backend_counts() -> None:
    """Forget the calls counted so far."""
    _counts.clear()


def _call(op: str, backend: str, *args: Any) -> Any:
    """Run ``op`` on the backend that this call gets; ``args[0]`` is a tensor on its device."""
    if torch.compiler.is_compiling() or type(args[0]) not in _PLAIN:
        return getattr(torch.ops.moe_locality, op)(*args, backend)
    return _run(op, backend, *args)


def _run(op: str, backend: str, *args: Any) -> Any:
    name = _resolve(backend, args[0].device)
    _counts[name, op] += 1
    # Triton launches on the current device
    with torch.cuda.device_of(args[0]) if name == "triton" else nullcontext():
        return getattr(_module_of(name), op)(*args)


def _module_of(backend: str) -> ModuleType:
    """Return the module of a backend; say why where there is none or it is not usable here."""
    if backend not in _MODULES:
        raise ConfigError(
            f"found kernels={backend!r}, expected auto, {', '.join(BACKENDS)}: correct the name"
        )
    module, why = _load(_MODULES[backend])
    if module is None:
        raise BackendUnavailable(
            f"kernels={backend!r} was asked for, but {why}, expected a usable {backend} backend: "
            f"{HOW_TO_GET[backend]}, or set kernels to 'auto'"
        )
    return module


def _resolve(backend: str, device: torch.device) -> str:
    for wish in (backend, _chosen, os.environ.get(ENVIRONMENT_VARIABLE, "auto")):
        if wish != "auto":
            return wish
    if device.type == "cuda":
        for name in ("cuda", "triton"):
            if _load(_MODULES[name])[0] is not None:
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


# -- operators of torch.library, for torch.compile and export

MAP_FIELDS = tuple(field.name for field in fields(RowMap) if field.name != "padded")
"""The results of the operator and of the backend function ``row_map``, in this order."""

SCHEMAS = {
    "row_map": "(Tensor slot_ids, int num_slots, int capacity, SymInt num_rows, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "serve_visited": "(Tensor ids, Tensor slots, Tensor nodes, int home_node, str backend) "
    "-> Tensor",
    "gather": "(Tensor x, Tensor index, str backend) -> Tensor",
    "permute": "(Tensor x, Tensor row_token, Tensor positions, Tensor? slot_offsets, str backend) "
    "-> Tensor",
    "combine": "(Tensor rows, Tensor positions, Tensor? weights, str backend) -> Tensor",
    "combine_backward": "(Tensor grad, Tensor? rows, Tensor row_token, Tensor row_route, "
    "Tensor positions, Tensor weights, bool need_rows, Tensor? slot_offsets, str backend) "
    "-> (Tensor, Tensor)",
}
"""A gradient that is not asked for is an empty tensor. No operator has autograd."""

_PLAIN = (Tensor, torch.nn.Parameter)
_library = torch.library.Library("moe_locality", "FRAGMENT")


def _run_operator(op: str, *args: Any) -> Any:
    *rest, backend = args
    made = _run(op, backend, *rest)
    if op == "combine_backward":
        return tuple(args[0].new_empty(0) if part is None else part for part in made)
    return made


def _fake_row_map(slot_ids: Tensor, num_slots: int, capacity: int, num_rows: int, backend: str):
    rows = num_rows if num_rows >= 0 else torch.library.get_ctx().new_dynamic_size()
    return new_map(slot_ids, num_slots, rows)


def _fake_rows(x: Tensor, index: Tensor, *_: Any) -> Tensor:
    return x.new_empty(index.shape[0], x.shape[1])


def _fake_combine_backward(
    grad: Tensor,
    rows: Tensor | None,
    row_token: Tensor,
    row_route: Tensor,
    positions: Tensor,
    weights: Tensor,
    need_rows: bool,
    *_: Any,
):
    shape = (row_token.shape[0], grad.shape[1]) if need_rows else (0,)
    grad_weights = grad.new_empty(0) if rows is None else weights.new_empty(weights.shape)
    return grad.new_empty(shape), grad_weights


_FAKES: dict[str, Any] = {
    "serve_visited": lambda ids, *_: ids.new_empty(ids.shape),
    "row_map": _fake_row_map,
    "gather": _fake_rows,
    "permute": _fake_rows,
    "combine": _fake_rows,
    "combine_backward": _fake_combine_backward,
}

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, partial(_run_operator, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"moe_locality::{_name}", _FAKES[_name], lib=_library)
