"""A whole MoE layer, forward and backward: what the local kernels are worth beside the experts.

Router, top-k gate, dispatch, SwiGLU experts as grouped products, combine; one GPU, no exchange.
Experts, router and gate are the same for everyone, so what differs is the dispatch. The peers' own
functions are put together as their layers do (``read_from`` in the report).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kernel_cases import Case, Step, make_case
from kernel_peers import Peer
from torch import Tensor
from torch.nn.functional import silu

from moe_locality.dispatch import TokenDispatcher, run_moe

SHAPES = {  # T, D, E, K, width of an expert
    "Mixtral": (8192, 4096, 8, 2, 14336),
    "Qwen3-30B": (8192, 2048, 128, 8, 768),
    "OLMoE": (16384, 2048, 64, 8, 1024),
}
DRY_SHAPES = {"dry": (12, 32, 4, 2, 16)}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """``x``, ``grad`` of a case; ``router [E, D]``, ``up [E, D, 2F]``, ``down [E, F, D]``."""

    case: Case
    router: Tensor
    up: Tensor
    down: Tensor


def make_layer(name: str, shape: tuple[int, int, int, int, int], device: str) -> Layer:
    tokens, width, experts, top_k, hidden = shape
    case = make_case(name, (tokens, width, experts, top_k), 0, device=device)
    generator = torch.Generator(device=device).manual_seed(1)

    def normal(*size: int) -> Tensor:
        made = torch.randn(*size, generator=generator, device=device) * size[-2] ** -0.5
        return made.bfloat16()

    router = normal(width, experts).t().contiguous()
    up, down = normal(experts, width, 2 * hidden), normal(experts, hidden, width)
    return Layer(case=case, router=router, up=up, down=down)


def run_experts(rows: Tensor, ends: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU of the rows of each expert; ``ends [E] int32``: the row after its last one."""
    product = _grouped()
    gate, value = product(rows, up, offs=ends).chunk(2, dim=1)
    return product(silu(gate) * value, down, offs=ends)


def _grouped() -> Any:
    functional: Any = torch.nn.functional
    plain: Any = torch
    return getattr(functional, "grouped_mm", None) or plain._grouped_mm


def step_of(layer: Layer, forward: Callable[..., Tensor]) -> Step:
    """Output and the gradients of the tokens and the router; those of the experts are made too."""

    def step():
        leaves = [layer.case.x, layer.router, layer.up, layer.down]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        out = forward(*leaves)
        grads = torch.autograd.grad(out, leaves, layer.case.grad)
        return out.detach(), grads[0], grads[1]

    return step


def ours(layer: Layer, backend: Any) -> Step:
    """The product's way (``run_moe``) on one rank."""
    case = layer.case
    dispatcher = TokenDispatcher(num_slots=case.num_experts, num_ranks=1, kernels=backend)

    def forward(x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ids, weights = torch_gate((x @ router.t()).float(), case.top_k)

        def experts(rows: Tensor, counts: tuple[int, ...]) -> Tensor:
            ends = torch.tensor(counts, device=rows.device).cumsum(0).int()
            return run_experts(rows, ends, up, down)

        return run_moe(dispatcher, x, ids, weights, experts)

    return step_of(layer, forward)


def torch_gate(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, ids = logits.softmax(dim=1).topk(top_k, dim=1)
    return ids, weights / weights.sum(dim=1, keepdim=True)


def auto_ep(layer: Layer, *, fused: bool) -> Step:
    from kernel_peers_deepspeed import auto_ep_forward

    case = layer.case

    def forward(x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ids, weights = torch_gate((x @ router.t()).float(), case.top_k)

        def experts(rows: Tensor, counts: Tensor) -> Tensor:
            return run_experts(rows, counts.cumsum(0).int(), up, down)

        return auto_ep_forward(x, ids, weights, case.num_experts, experts, fused=fused)

    return step_of(layer, forward)


def moe_layer(layer: Layer) -> Step:
    from kernel_peers_deepspeed import moe_layer_forward

    case = layer.case

    def forward(x: Tensor, router: Tensor, up: Tensor, down: Tensor) -> Tensor:
        ids, weights = torch_gate((x @ router.t()).float(), case.top_k)

        def experts(rows: Tensor) -> Tensor:  # [E, C, D]: equal capacities need no groups
            gate, value = torch.bmm(rows, up).chunk(2, dim=2)
            return torch.bmm(silu(gate) * value, down)

        return moe_layer_forward(x, ids, weights, case.num_experts, experts)

    return step_of(layer, forward)


def peers() -> list[Peer]:
    def peer(name: str, make: Any, gpu_only: str = "") -> Peer:
        return Peer(
            name=name, distribution="deepspeed", read_from="0.19.8", make=make, gpu_only=gpu_only
        )

    why = "its Triton kernels are defined only where there is a GPU"
    return [
        peer("layer, DeepSpeed MOELayer (sparse)", moe_layer),
        peer("layer, DeepSpeed AutoEP, default", lambda layer: auto_ep(layer, fused=False)),
        peer("layer, DeepSpeed AutoEP, fused", lambda layer: auto_ep(layer, fused=True), why),
    ]
