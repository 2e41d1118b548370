"""What a router chose, read from what it returned: pure functions on tensors, no copies.

Shape letters: T (S in DeepSpeed) tokens, K picks per token, E experts, C capacity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from moe_locality.errors import TraceError


class Routes(NamedTuple):
    """The picks of one layer in one forward pass."""

    ids: torch.Tensor
    """Any integer type, [T, K], -1 = no pick."""
    weights: torch.Tensor | None
    """[T, K]; None where nobody asked for them."""


def read_deepspeed_gate(output: Any, top_k: int, with_weights: bool) -> Routes:
    """Read the output of ``deepspeed.moe.sharded_moe.TopKGate``.

    Three layouts exist: sparse (DeepSpeed 0.19.4 and later) with indices and gates [K, T]; the same
    with lists of K tensors [T] (older, for Tutel); dense with combine weights [T, E, C]. The dense
    layout does not say which pick was the first: picks come in descending order of their weight.

    Raises:
        TraceError: the output is none of these.
    """
    if isinstance(output, tuple) and len(output) == 7:
        indices, gates = output[3], output[5]
        if isinstance(indices, (list, tuple)):
            indices, gates = torch.stack(tuple(indices)), torch.stack(tuple(gates))
        if indices.ndim == 2 and not indices.is_floating_point():
            return Routes(indices.t(), gates.detach().t() if with_weights else None)
    elif isinstance(output, tuple) and len(output) == 4:
        combine = output[1]
        if isinstance(combine, torch.Tensor) and combine.ndim == 3:
            weights, ids = combine.detach().sum(dim=2).topk(min(top_k, combine.shape[1]), dim=1)
            return Routes(ids.masked_fill(weights == 0, -1), weights)
    raise TraceError(
        f"found a TopKGate output {_describe(output)}, expected DeepSpeed's sparse layout (7 "
        "items, indices [K, T] fourth) or dense layout (4 items, weights [T, E, C] second): use "
        "a supported DeepSpeed version"
    )


def read_autoep_router(output: Any, with_weights: bool) -> Routes:
    """Read the output of ``deepspeed.moe.ep_router.TokenChoiceTopKRouter``: scores, ids [T, K]."""
    if isinstance(output, tuple) and len(output) >= 2 and _are_picks(output[1], output[0]):
        return Routes(output[1], output[0].detach() if with_weights else None)
    raise TraceError(
        f"found a router output {_describe(output)}, expected (scores [T, K], experts [T, K], "
        "counts [E]): use a supported DeepSpeed version"
    )


def read_experts_input(args: Sequence[Any], kwargs: dict[str, Any], with_weights: bool) -> Routes:
    """Read what a transformers experts module was called with: (hidden states, ids, weights)."""
    given = [*args, *kwargs.values()]
    if len(given) >= 3 and _are_picks(given[1], given[2]):
        return Routes(given[1], given[2].detach() if with_weights else None)
    raise TraceError(
        f"found an experts module called with {_describe(given)}, expected hidden states [T, D], "
        "expert ids [T, K] and weights [T, K]: use a supported transformers version"
    )


def _are_picks(ids: Any, weights: Any) -> bool:
    return (
        isinstance(ids, torch.Tensor)
        and isinstance(weights, torch.Tensor)
        and ids.ndim == 2
        and not ids.is_floating_point()
        and weights.is_floating_point()
    )


def _describe(items: Any) -> str:
    if not isinstance(items, (list, tuple)):
        return type(items).__name__
    parts = [
        f"{item.dtype} {list(item.shape)}"
        if isinstance(item, torch.Tensor)
        else type(item).__name__
        for item in items
    ]
    return f"({', '.join(parts)})"
