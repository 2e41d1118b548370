"""The problems that local dispatches are timed on, and ours as steps: what every peer must equal.

A step is map, permute, (identity experts), weighted combine, and the backward of all, ``() -> (out
[T, D], grad_x [T, D], grad_weights [T, K])``; of a peer without backward, its first part alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_locality.dispatch import TokenDispatcher, run_moe
from moe_locality.kernels import ops

Step = Callable[[], tuple[Tensor, ...]]

CPU_SHAPE = (8192, 1024, 64, 8)
SHAPES = {  # T, D, E, K
    "A Mixtral": (8192, 4096, 8, 2),
    "B Qwen3-30B": (8192, 2048, 128, 8),
    "C DeepSeek-V3": (4096, 7168, 256, 8),
    "D OLMoE": (16384, 2048, 64, 8),
    "E Switch": (8192, 4096, 64, 1),
    "F decode": (128, 7168, 256, 8),
}
AVERAGED = tuple(name for name in SHAPES if not name.startswith("F"))
"""Shapes of the geometric means: a decode step is launches, not bandwidth."""
DRY_SHAPES = {"dry": (6, 32, 4, 2), "dry, one expert": (5, 32, 1, 1)}
BOUND = 3e-2  # of results in bfloat16, relative to their largest


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

    @property
    def top_k(self) -> int:
        return self.ids.shape[1]


def make_case(
    name: str,
    shape: tuple[int, int, int, int],
    seed: int,
    *,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """Distinct experts at random for each token; everything is random data."""
    tokens, width, experts, top_k = shape
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k].int()
    weights = torch.rand(tokens, top_k, generator=generator)
    weights /= weights.sum(dim=1, keepdim=True)
    x, grad = (torch.randn(tokens, width, generator=generator).to(dtype) for _ in range(2))
    return Case(
        name=name,
        x=x.to(device),
        grad=grad.to(device),
        ids=ids.to(device),
        weights=weights.to(device),
        num_experts=experts,
    )


def autograd_step(case: Case, forward: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """The step of what is differentiated by autograd."""

    def step():
        x = case.x.detach().requires_grad_()
        weights = case.weights.detach().requires_grad_()
        out = forward(x, weights)
        grad_x, grad_weights = torch.autograd.grad(out, (x, weights), case.grad)
        return out.detach(), grad_x, grad_weights

    return step


def ours(case: Case, backend: Any) -> Step:
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


def ours_forward(case: Case, backend: Any) -> Step:
    def step():
        where = ops.row_map(case.ids, case.num_experts, num_rows=case.num_rows, backend=backend)
        rows = ops.permute(case.x, where, backend=backend)
        return (ops.combine(rows, where.positions, case.weights, backend=backend),)

    return step


def ours_with_autograd(case: Case, backend: Any) -> Step:
    """What a layer of one rank calls; it waits for the counts, so a GPU cannot capture it."""
    dispatcher = TokenDispatcher(num_slots=case.num_experts, num_ranks=1, kernels=backend)

    def forward(x: Tensor, weights: Tensor) -> Tensor:
        return run_moe(dispatcher, x, case.ids, weights, lambda rows, counts: rows)

    return autograd_step(case, forward)


def disagreement(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> str:
    """Return how ``found`` breaks the contract, "" where it does not.

    Shapes are equal, and no value is further off than :data:`BOUND` of the largest.
    """
    for name, right, theirs in zip(("out", "grad_x", "grad_weights"), wanted, found, strict=False):
        if right.shape != theirs.shape:
            return f"its {name} is {tuple(theirs.shape)}, expected {tuple(right.shape)}"
        scale = float(right.float().abs().max()) or 1.0
        error = float((right.float() - theirs.float()).abs().max()) / scale
        if not error <= BOUND:
            return f"its {name} differs from the reference by {error:.1e} of the largest value"
    return ""


def floors_bytes(shape: tuple[int, int, int, int]) -> dict[str, int]:
    """The bytes that each operation cannot avoid, in units of u = T * D * 2."""
    tokens, width, _, top_k = shape
    unit = tokens * width * 2
    return {
        "permute": (1 + top_k) * unit,
        "combine": (1 + top_k) * unit,
        "permute_backward": (1 + top_k) * unit,
        "combine_backward": (1 + 2 * top_k) * unit,
        "everything": (4 + 5 * top_k) * unit,
    }


def mixes(top_k: int) -> dict[str, tuple[int, int]]:
    """Rows read and written per token by each operation: what its copy ceiling is measured with."""
    return {
        "permute": (1, top_k),
        "combine": (top_k, 1),
        "permute_backward": (top_k, 1),
        "combine_backward": (1 + top_k, top_k),
    }
