"""The kernels as operators of ``torch.library``, for ``torch.compile`` and export.

Eager calls go straight to the backend: a Python operator costs microseconds that a decode step
does not have. While a graph is traced, and for tensors of other classes (those without data of
``FakeTensorMode``), they become ``torch.ops.moe_locality.*``, whose fake functions give the shapes.
No operator has autograd; what wraps them has.
"""

from typing import Any

import torch
from torch import Tensor

from moe_locality.kernels import backends
from moe_locality.kernels.backends import GateSpec

_GATE = (
    "int top_k, str score, int num_groups, int top_groups, str group_score, bool renormalize, "
    "float scale, str backend"
)
SCHEMAS = {
    "gate": f"(Tensor logits, Tensor? bias, {_GATE}) -> (Tensor, Tensor)",
    "gate_backward": f"(Tensor grad_weights, Tensor logits, Tensor ids, {_GATE}) -> Tensor",
    "row_map": "(Tensor expert_ids, int num_slots, Tensor? slot_of_expert, Tensor? keep, "
    "int capacity, int alignment, SymInt num_rows, Tensor? node_of_slot, int num_nodes, "
    "str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "gather": "(Tensor x, Tensor index, str backend) -> Tensor",
    "permute": "(Tensor x, Tensor row_token, Tensor row_route, Tensor positions, Tensor? weights, "
    "Tensor? slot_offsets, str backend) -> (Tensor, Tensor)",
    "combine": "(Tensor rows, Tensor positions, Tensor? weights, Tensor? row_values, str backend) "
    "-> (Tensor, Tensor)",
    "combine_backward": "(Tensor grad, Tensor? rows, Tensor row_token, Tensor row_route, "
    "Tensor positions, Tensor weights, bool need_rows, Tensor? slot_offsets, str backend) "
    "-> (Tensor, Tensor)",
}
"""What an operator does not make (a weight that is not asked for) is an empty tensor."""

_library = torch.library.Library("moe_locality", "FRAGMENT")
_PLAIN = (Tensor, torch.nn.Parameter)


def call(op: str, *args: Any) -> Any:
    """Run ``op``; the arguments are those of its schema, the last is the wanted backend."""
    if torch.compiler.is_compiling() or type(args[0]) not in _PLAIN:
        return getattr(torch.ops.moe_locality, op)(*args)
    return _RUN[op](*args)


def _gate(logits: Tensor, bias: Tensor | None, *spec: Any) -> tuple[Tensor, Tensor]:
    *fields, backend = spec
    return backends.select("gate", logits.device, backend)(logits, bias, _spec(*fields))


def _gate_backward(grad_weights: Tensor, logits: Tensor, ids: Tensor, *spec: Any) -> Tensor:
    *fields, backend = spec
    run = backends.select("gate_backward", logits.device, backend)
    return run(grad_weights, logits, ids, _spec(*fields))


def _row_map(expert_ids: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *args, backend = rest
    made = backends.select("row_map", expert_ids.device, backend)(expert_ids, *args)
    made = {name: _or_empty(made[name], expert_ids) for name in made}
    return tuple(made[name] for name in MAP_FIELDS)


def _gather(x: Tensor, index: Tensor, backend: str) -> Tensor:
    return backends.select("gather", x.device, backend)(x, index)


def _permute(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *args, backend = rest
    rows, weights = backends.select("permute", x.device, backend)(x, *args)
    return rows, _or_empty(weights, rows)


def _combine(rows: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *args, backend = rest
    out, values = backends.select("combine", rows.device, backend)(rows, *args)
    return out, _or_empty(values, rows)


def _combine_backward(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *args, backend = rest
    made = backends.select("combine_backward", grad.device, backend)(grad, *args)
    return _or_empty(made[0], grad), _or_empty(made[1], grad)


MAP_FIELDS = (
    "row_route",
    "row_token",
    "positions",
    "tokens_per_slot",
    "slot_offsets",
    "routed_per_slot",
    "overflow",
    "node_mask",
    "tokens_per_node",
)


def _spec(top_k, score, num_groups, top_groups, group_score, renormalize, scale) -> GateSpec:
    return GateSpec(
        top_k=top_k,
        score=score,
        num_groups=num_groups,
        top_groups=top_groups,
        group_score=group_score,
        renormalize=renormalize,
        scale=scale,
    )


def _or_empty(tensor: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if tensor is None else tensor


# -- shapes, for tensors without data
# --------------------------------------------------------------


def _fake_gate(logits: Tensor, bias: Tensor | None, top_k: int, *rest: Any):
    shape = (logits.shape[0], top_k)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=wide)


def _fake_gate_backward(grad_weights: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _fake_row_map(
    expert_ids: Tensor,
    num_slots: int,
    slot_of_expert: Tensor | None,
    keep: Tensor | None,
    capacity: int,
    alignment: int,
    num_rows: int,
    node_of_slot: Tensor | None,
    num_nodes: int,
    backend: str,
):
    def make(shape: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return expert_ids.new_empty(shape, dtype=dtype)

    rows = num_rows if num_rows >= 0 else torch.library.get_ctx().new_dynamic_size()
    with_nodes = node_of_slot is not None
    nodes = (
        (make(expert_ids.shape[0], torch.int64), make(num_nodes, torch.int64))
        if with_nodes
        else (make(0, expert_ids.dtype), make(0, expert_ids.dtype))
    )
    counts = (make(num_slots, torch.int64), make(num_slots + 1), make(num_slots), make(1))
    return make(rows), make(rows), make(expert_ids.shape), *counts, *nodes


def _fake_gather(x: Tensor, index: Tensor, backend: str) -> Tensor:
    return x.new_empty(index.shape[0], x.shape[1])


def _fake_permute(
    x: Tensor, row_token: Tensor, row_route: Tensor, positions: Tensor, weights: Tensor | None, *_
):
    count = row_token.shape[0]
    return x.new_empty(count, x.shape[1]), x.new_empty(0) if weights is None else weights.new_empty(
        count
    )


def _fake_combine(
    rows: Tensor, positions: Tensor, weights: Tensor | None, row_values: Tensor | None, *_
):
    out = rows.new_empty(positions.shape[0], rows.shape[1])
    return out, rows.new_empty(0) if row_values is None else row_values.new_empty(positions.shape)


def _fake_combine_backward(
    grad: Tensor,
    rows: Tensor | None,
    row_token: Tensor,
    row_route: Tensor,
    positions: Tensor,
    weights: Tensor,
    need_rows: bool,
    *_,
):
    shape = (row_token.shape[0], grad.shape[1]) if need_rows else (0,)
    gates = grad.new_empty(0) if rows is None else weights.new_empty(weights.shape)
    return grad.new_empty(shape), gates


_RUN = {
    "gate": _gate,
    "gate_backward": _gate_backward,
    "row_map": _row_map,
    "gather": _gather,
    "permute": _permute,
    "combine": _combine,
    "combine_backward": _combine_backward,
}
_FAKES = {
    "gate": _fake_gate,
    "gate_backward": _fake_gate_backward,
    "row_map": _fake_row_map,
    "gather": _fake_gather,
    "permute": _fake_permute,
    "combine": _fake_combine,
    "combine_backward": _fake_combine_backward,
}

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _RUN[_name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"moe_locality::{_name}", _FAKES[_name], lib=_library)
