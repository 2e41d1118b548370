"""Other projects' local dispatch, each behind a guard: what cannot be imported says why.

A peer is a function from a :class:`Case` to a step: map, permute, (identity experts), weighted
combine, and the backward of all, ``() -> (out [T, D], grad_x [T, D], grad_weights [T, K])``. A peer
whose result is not ours within the bound is reported and not timed.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moe_locality.kernels import local, ops

Step = Callable[[], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem: ``x``, ``grad`` ``[T, D]``, ``ids``, ``weights`` ``[T, K]``, E experts."""

    name: str
    x: Tensor
    grad: Tensor
    ids: Tensor
    weights: Tensor
    num_experts: int

    @property
    def num_rows(self) -> int:
        return self.ids.numel()


def autograd_step(case: Case, forward: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """The step of a peer that is differentiated by autograd."""

    def step():
        x = case.x.detach().requires_grad_()
        weights = case.weights.detach().requires_grad_()
        out = forward(x, weights)
        grad_x, grad_weights = torch.autograd.grad(out, (x, weights), case.grad)
        return out.detach(), grad_x, grad_weights

    return step


def ours(case: Case, backend: ops.Backend) -> Step:
    """Static number of rows: nothing waits for the device, so the step can be captured."""

    def step():
        where = ops.row_map(case.ids, case.num_experts, num_rows=case.num_rows, backend=backend)
        rows = ops.permute(case.x, where, backend=backend)
        out = ops.combine(rows, where.positions, case.weights, backend=backend)
        grad_rows, grad_weights = ops.combine_backward(
            case.grad, rows, where, case.weights, backend=backend
        )
        assert grad_rows is not None
        grad_x = ops.permute_backward(grad_rows, where.positions, backend=backend)
        assert grad_weights is not None
        return out, grad_x, grad_weights

    return step


def ours_with_autograd(case: Case, backend: ops.Backend) -> Step:
    def forward(x: Tensor, weights: Tensor) -> Tensor:
        where = ops.row_map(case.ids, case.num_experts, num_rows=case.num_rows, backend=backend)
        rows = local.dispatch(x, where, backend=backend)
        return local.combine(rows, where, weights, backend=backend)

    return autograd_step(case, forward)


def _sorted_routes(case: Case) -> tuple[Tensor, Tensor]:
    order = torch.argsort(case.ids.reshape(-1), stable=True)
    return order, order // case.ids.shape[1]


def torch_index_add(case: Case) -> Step:
    """What a newcomer writes: index_select, multiply, index_add."""

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        order, token = _sorted_routes(case)
        rows = x.index_select(0, token)
        scaled = rows * weights.reshape(-1).index_select(0, order)[:, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, scaled)

    return autograd_step(case, forward)


def torch_compiled(case: Case) -> Step:
    """Gather, multiply and sum over k in fp32, fused by torch.compile."""

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        order, token = _sorted_routes(case)
        position = torch.empty_like(order)
        position[order] = torch.arange(len(order), device=order.device)
        rows = x.index_select(0, token)
        picked = rows[position].view(*case.ids.shape, -1)
        return (picked.float() * weights[..., None]).sum(1).to(x.dtype)

    return autograd_step(case, torch.compile(forward))


def deepspeed_moe_layer(case: Case) -> Step:
    """DeepSpeed's ``MOELayer`` since 0.19.4: index gathers into a buffer of equal capacities.

    Capacity is the load of the busiest expert, so that nothing is dropped.
    """
    from deepspeed.moe import sharded_moe

    encode: Any = sharded_moe._sparse_encode
    decode: Any = sharded_moe._sparse_decode
    experts = case.num_experts
    capacity = int(torch.bincount(case.ids.reshape(-1).long(), minlength=experts).max())

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        ids = case.ids.t().contiguous()
        mask = torch.zeros(len(x), experts, dtype=torch.bool, device=x.device)
        mask.scatter_(1, case.ids.long(), True)
        places = (mask.cumsum(0) - 1).gather(1, case.ids.long()).t()
        slots = sharded_moe._route_slots(ids, places, experts, capacity)
        rows = encode(x, slots, experts, capacity)
        return decode(rows.reshape(-1, x.shape[1]), slots, weights.t(), len(x))

    return autograd_step(case, forward)


def megatron_unfused(case: Case) -> Step:
    """Megatron-core's ``moe_utils.permute`` and ``unpermute`` without Transformer Engine."""
    from megatron.core.transformer.moe import moe_utils  # pyright: ignore

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        probs, mask = _dense(case, weights)
        rows, _, order, *_ = moe_utils.permute(x, mask, num_out_tokens=case.num_rows)
        return moe_utils.unpermute(rows, order, x.shape, probs=probs, routing_map=mask)

    return autograd_step(case, forward)


def transformer_engine_triton(case: Case) -> Step:
    """Transformer Engine's Triton permutation by mask map, its map included."""
    te = _transformer_engine_kernels()
    tokens, width = case.x.shape
    experts, rows_out = case.num_experts, case.num_rows

    def step():
        probs, mask = _dense(case, case.weights)
        where = te.make_row_id_map(mask.to(torch.int32), tokens, experts)
        rows, _, _ = te.permute_with_mask_map(
            case.x, where, None, None, None, tokens, experts, rows_out, width, None
        )
        out, _ = te.unpermute_with_mask_map(rows, where, probs, None, None, tokens, experts, width)
        grad_rows, grad_probs = te.unpermute_with_mask_map_bwd_with_merging_probs(
            case.grad, where, rows, probs, None, tokens, experts, rows_out, width
        )
        grad_x, _ = te.unpermute_with_mask_map(
            grad_rows, where, None, None, None, tokens, experts, width
        )
        return out, grad_x, grad_probs.gather(1, case.ids.long())

    return step


def _transformer_engine_kernels() -> Any:
    """Import the Triton files alone: the packages around them want a 300 MB library beside them."""
    names = ("", ".common", ".common.triton", ".pytorch", ".pytorch.triton")
    kept = {f"transformer_engine{n}": sys.modules.get(f"transformer_engine{n}") for n in names}
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'transformer_engine'")
    root = Path(next(iter(spec.submodule_search_locations)))
    try:
        for name in names:
            hollow: Any = ModuleType(f"transformer_engine{name}")
            hollow.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
            sys.modules[hollow.__name__] = hollow
        return importlib.import_module("transformer_engine.pytorch.triton.permutation")
    finally:  # whoever imports the package next gets the real one, or its own error
        for name, module in kept.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def _dense(case: Case, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The ``[T, E]`` probabilities and mask that some peers take."""
    empty = weights.new_zeros(len(weights), case.num_experts)
    probs = empty.scatter(1, case.ids.long(), weights)
    mask = torch.zeros_like(empty, dtype=torch.bool).scatter(1, case.ids.long(), True)
    return probs, mask


PEERS: dict[str, Callable[[Case], Step]] = {
    "torch index_select + index_add": torch_index_add,
    "torch.compile, gather and sum": torch_compiled,
    "DeepSpeed MOELayer (sparse)": deepspeed_moe_layer,
    "Megatron-core unfused": megatron_unfused,
    "Transformer Engine Triton": transformer_engine_triton,
}
"""Without an adapter yet: DeepSpeed AutoEP, torchtitan, torchao, MegaBlocks."""
