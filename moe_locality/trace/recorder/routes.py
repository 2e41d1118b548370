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


def read_experts(_module: Any, args: Sequence[Any], kwargs: Any, with_weights: bool) -> Routes:
    """Read what a transformers experts module was called with: (hidden states, ids, weights)."""
    given = [*args, *kwargs.values()]
    if len(given) >= 3 and _are_picks(given[1], given[2]):
        return Routes(given[1], given[2].detach() if with_weights else None)
    raise TraceError(
        f"found an experts module called with {_describe(given)}, expected hidden states [T, D], "
        "expert ids [T, K] and weights [T, K]: use a supported transformers version"
    )


def read_zaya_experts(module: Any, args: Sequence[Any], kwargs: Any, weighted: bool) -> Routes:
    """As ``read_experts``; a token that skips comes as expert 0 with weight 0: no pick."""
    ids, weights = read_experts(module, args, kwargs, True)
    assert weights is not None
    return Routes(ids.masked_fill(weights == 0, -1), weights if weighted else None)


def read_longcat_experts(module: Any, args: Sequence[Any], kwargs: Any, weighted: bool) -> Routes:
    """As ``read_experts``; experts past the real ones do nothing with a token: no pick."""
    ids, weights = read_experts(module, args, kwargs, weighted)
    return Routes(ids.masked_fill(ids >= module.num_routed_experts, -1), weights)


def read_logits(logits: torch.Tensor, top_k: int, with_weights: bool) -> Routes:
    """The ``top_k`` largest logits [T, E], for routers that do not return what they picked."""
    values, ids = logits.detach().topk(top_k, dim=-1)
    return Routes(ids, values.float().softmax(-1) if with_weights else None)


def read_llama4_router(module: Any, output: Any, with_weights: bool) -> Routes:
    """(scores [T, E], logits [T, E]); the weight of a pick is its sigmoid."""
    values, ids = output[1].detach().topk(module.top_k, dim=1)
    return Routes(ids, values.float().sigmoid() if with_weights else None)


def read_jetmoe_router(module: Any, output: Any, with_weights: bool) -> Routes:
    """(…, logits [T, E])."""
    return read_logits(output[4], module.top_k, with_weights)


def read_doge_block(module: Any, output: Any, with_weights: bool) -> Routes:
    """(hidden states, logits [2, T, R]); expert x * R + y of the R * R has the score x + y."""
    rows, columns = output[1].detach()
    return read_logits((rows[:, :, None] + columns[:, None]).flatten(1), module.top_k, with_weights)


def read_switch_router(_module: Any, output: Any, with_weights: bool) -> Routes:
    """(one-hot [B, S, E], all zero = over capacity, probability [B, S, 1], logits)."""
    chosen, probability = output[0].flatten(0, -2), output[1].detach().reshape(-1, 1)
    ids = chosen.argmax(-1, keepdim=True).masked_fill(chosen.sum(-1, keepdim=True) == 0, -1)
    return Routes(ids, probability if with_weights else None)


def read_nllb_router(_module: Any, output: Any, with_weights: bool) -> Routes:
    """(one-hot of the first pick, weights [T, E] of at most two picks, logits)."""
    weights, ids = output[1].detach().flatten(0, -2).topk(2, dim=-1)
    return Routes(ids.masked_fill(weights == 0, -1), weights if with_weights else None)


def read_mxfp4_mlp(module: Any, output: Any, with_weights: bool) -> Routes:
    """(hidden states, logits [T, E]); its kernels pick by the same logits."""
    return read_logits(output[1], module.router.top_k, with_weights)


def read_custom(found: Any, with_weights: bool) -> Routes:
    """Check what a reader of ``attach(routers=)`` returned: ids [T, K], or ids and weights."""
    ids, weights = found if isinstance(found, tuple) else (found, None)
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.is_floating_point():
        raise TraceError(
            f"found {_describe([ids])} from a reader in routers=, expected expert ids [T, K] as "
            "integers, or a tuple of them and their weights [T, K]: correct the reader"
        )
    return Routes(ids, weights.detach() if with_weights and weights is not None else None)


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
