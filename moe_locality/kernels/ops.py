"""The one front of the kernels: checks, then the backend that this call gets.

Backends: ``reference`` (torch, any device, the truth), ``triton`` and ``cuda``; how one is chosen
stands in ``moe_locality.kernels.backends``. These functions know no autograd:
``moe_locality.dispatch`` and ``moe_locality.kernels.local`` wrap a whole dispatch and a whole
combine, which costs less than a wrapper per kernel. Under ``torch.compile`` they are operators of
the namespace ``moe_locality`` (``moe_locality.kernels.library``), without a graph break.

Shapes: T tokens on this rank, K top-k, E experts, P slots, M nodes, N rows, D model width.
"""

from typing import Literal

import torch
from torch import Tensor

from moe_locality.errors import ConfigError
from moe_locality.kernels import backends, library
from moe_locality.kernels.backends import (
    BACKENDS,
    ENVIRONMENT_VARIABLE,
    MAX_NODES,
    Backend,
    GateSpec,
    RowMap,
    backend_counts,
    check_backend,
    reset_backend_counts,
    set_backend,
)

__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "Backend",
    "GateSpec",
    "RowMap",
    "backend_counts",
    "check_backend",
    "check_overflow",
    "combine",
    "combine_backward",
    "gate",
    "gate_backward",
    "permute",
    "permute_backward",
    "permute_with_weights",
    "permute_with_weights_backward",
    "reset_backend_counts",
    "row_map",
    "set_backend",
]

_MODULES = backends.MODULES


def gate(
    logits: Tensor, spec: GateSpec, *, bias: Tensor | None = None, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the K experts of each token and their weights: ``ids [T, K] int32``, ``weights [T, K]
    fp32`` (fp64 for fp64 logits), best first, ties to the lower id.

    ``logits [T, E]``; ``bias [E]`` is added to the scores for the choice only, not to the weights
    (DeepSeek-V3's balancing without an auxiliary loss, arXiv 2408.15664).
    """
    if logits.dim() != 2 or not logits.dtype.is_floating_point:
        raise ConfigError(
            f"found logits {tuple(logits.shape)} {logits.dtype}, expected floats [T, E]"
        )
    spec.check(logits.shape[1])
    return library.call("gate", logits, bias, *_fields(spec), backend)


def gate_backward(
    grad_weights: Tensor,
    logits: Tensor,
    ids: Tensor,
    spec: GateSpec,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Return the gradient of the logits ``[T, E]``, in their dtype; the choice has none."""
    return library.call("gate_backward", grad_weights, logits, ids, *_fields(spec), backend)


def row_map(
    expert_ids: Tensor,
    num_slots: int,
    *,
    slot_of_expert: Tensor | None = None,
    keep: Tensor | None = None,
    capacity: int | None = None,
    alignment: int = 1,
    num_rows: int | None = None,
    on_overflow: Literal["drop", "error"] = "drop",
    node_of_slot: Tensor | None = None,
    num_nodes: int = 0,
    backend: Backend = "auto",
) -> RowMap:
    """Sort the routes by slot: a stable counting sort, the same on every call and device.

    With ``num_rows`` every shape is known beforehand, nothing waits for the device, and the call
    can be captured in a CUDA graph; without it, a call on a GPU waits once for the number of rows.

    Args:
        expert_ids: ``[T, K]`` integer; the expert of each route in 0..E-1, or its slot in 0..P-1
            where ``slot_of_expert`` is None. -1 where the route is dropped. Too large an id is an
            error on the CPU, and a dropped route where asking would wait for the device.
        num_slots: P.
        slot_of_expert: ``[E]`` integer, the slot that serves each expert for tokens of this rank
            (a row of the plan's choice among replicas); -1 drops the expert's routes.
        keep: ``[T, K]`` bool, False drops the route.
        capacity: routes that one slot keeps, the first ones in (token, k) order: DeepSpeed's
            ``drop_policy="position"``.
        alignment: rows of a slot are padded to a multiple of this.
        num_rows: N, fixed. Rows past ``slot_offsets[P]`` are not written, and never read. Routes
            beyond it are dropped and counted in ``overflow``.
        on_overflow: ``"drop"``, or ``"error"``: raise as soon as that costs no wait (on the CPU,
            now; on a GPU, give the map to :func:`check_overflow` where a wait does not hurt).
        node_of_slot: ``[P]`` integer in 0..M-1, for ``node_mask`` and ``tokens_per_node``.
        num_nodes: M, at most 63.

    Raises:
        ConfigError: an argument that cannot be, or an overflow (see ``on_overflow``).
    """
    _check_map(expert_ids, num_slots, capacity, alignment, num_rows, node_of_slot, num_nodes)
    limits = (-1 if capacity is None else capacity, alignment, -1 if num_rows is None else num_rows)
    nodes = (node_of_slot, num_nodes)
    made = library.call(
        "row_map", expert_ids, num_slots, slot_of_expert, keep, *limits, *nodes, backend
    )
    fields = dict(zip(library.MAP_FIELDS, made, strict=True))
    if node_of_slot is None:
        fields["node_mask"] = fields["tokens_per_node"] = None
    mapping = RowMap(**fields, padded=alignment > 1 or num_rows is not None)
    check = on_overflow == "error" and num_rows is not None and not expert_ids.is_cuda
    if check and not torch.compiler.is_compiling():
        check_overflow(mapping)
    return mapping


def check_overflow(mapping: RowMap) -> None:
    """Raise ConfigError if routes found no row in a static ``num_rows``. Waits for the device."""
    lost = int(mapping.overflow)
    if lost:
        raise ConfigError(
            f"found {lost} routes beyond the {mapping.row_route.shape[0]} rows of the static "
            "capacity, expected none: raise num_rows, or choose on_overflow='drop'"
        )


def permute(x: Tensor, index: Tensor | RowMap, *, backend: Backend = "auto") -> Tensor:
    """Return ``rows[n] = x[index[n]]``: ``[T, D]`` to ``[N, D]``.

    ``index`` is a list of rows ``[N]``, or a map: then each token is read once and written K times,
    and padding rows become zero.
    """
    if isinstance(index, RowMap):
        return _permute(x, None, index, backend)[0]
    return library.call("gather", x, index, backend)


def permute_with_weights(
    x: Tensor, weights: Tensor, mapping: RowMap, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """:func:`permute`, and the weight of each row, for experts that apply it: ``[N, D]``, ``[N]``.

    ``weights [T, K]``; the weight of a padding row is zero.
    """
    return _permute(x, weights, mapping, backend)


def permute_backward(grad_rows: Tensor, positions: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return the gradient of :func:`permute`: each token's rows summed, ``[N, D]`` to ``[T, D]``.

    The sum runs over k in order, in fp32 or wider, and ends in the dtype of ``grad_rows``.
    """
    return library.call("combine", grad_rows, positions, None, None, backend)[0]


def permute_with_weights_backward(
    grad_rows: Tensor, grad_row_weights: Tensor, positions: Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the gradients ``[T, D]`` and ``[T, K]`` of :func:`permute_with_weights`."""
    return library.call("combine", grad_rows, positions, None, grad_row_weights, backend)


def combine(
    rows: Tensor, positions: Tensor, weights: Tensor | None, *, backend: Backend = "auto"
) -> Tensor:
    """Return ``out[t] = sum_k weights[t, k] * rows[positions[t, k]]``, dropped routes left out.

    ``rows [N, D]``, ``positions [T, K]``, ``weights [T, K]`` give ``[T, D]`` in the dtype of
    ``rows``; products and sums are in fp32 or wider, over k in order. ``weights=None`` is a plain
    sum, for experts that applied the weights.
    """
    return library.call("combine", rows, positions, weights, None, backend)[0]


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
    the rows is not. ``grad`` is ``[T, D]``; the gradient of a dropped route's weight is zero, and
    so is that of a padding row.
    """
    grad_rows, grad_weights = library.call(
        "combine_backward",
        grad,
        rows,
        mapping.row_token,
        mapping.row_route,
        mapping.positions,
        weights,
        need_rows,
        mapping.slot_offsets if mapping.padded else None,
        backend,
    )
    return grad_rows if need_rows else None, grad_weights if rows is not None else None


def _permute(x: Tensor, weights: Tensor | None, mapping: RowMap, backend: Backend):
    where = (mapping.row_token, mapping.row_route, mapping.positions)
    padding = mapping.slot_offsets if mapping.padded else None
    return library.call("permute", x, *where, weights, padding, backend)


def _fields(spec: GateSpec) -> tuple:
    groups = (spec.num_groups, spec.top_groups, spec.group_score)
    return (spec.top_k, spec.score, *groups, spec.renormalize, spec.scale)


def _check_map(
    expert_ids: Tensor,
    num_slots: int,
    capacity: int | None,
    alignment: int,
    num_rows: int | None,
    node_of_slot: Tensor | None,
    num_nodes: int,
) -> None:
    if expert_ids.dim() != 2 or expert_ids.dtype.is_floating_point:
        raise ConfigError(
            f"found expert_ids {tuple(expert_ids.shape)} {expert_ids.dtype}, expected integers "
            "[T, K]: pass the ids of the gate"
        )
    for name, value, least in (
        ("num_slots", num_slots, 1),
        ("capacity", capacity, 0),
        ("alignment", alignment, 1),
        ("num_rows", num_rows, 0),
    ):
        if value is not None and value < least:
            raise ConfigError(f"found {name}={value}, expected at least {least}: correct it")
    if node_of_slot is not None and not 1 <= num_nodes <= MAX_NODES:
        raise ConfigError(
            f"found num_nodes={num_nodes} with node_of_slot, expected 1 to {MAX_NODES}: say how "
            "many nodes there are"
        )
