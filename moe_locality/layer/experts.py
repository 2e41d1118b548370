"""The experts of one rank on the rows that came for them."""

from typing import Any, Literal

import torch
from torch import Tensor

from moe_locality.errors import ConfigError
from moe_locality.layer.grouped import recognize, run_grouped

ExpertsMode = Literal["auto", "loop", "grouped"]


def check_experts_mode(mode: str) -> None:
    """Raise ConfigError unless the mode exists."""
    if mode not in ("auto", "loop", "grouped"):
        raise ConfigError(f"found experts={mode!r}, expected auto, loop or grouped")


def run_experts(
    experts: Any, rows: Tensor, tokens_per_expert: tuple[int, ...], mode: ExpertsMode = "auto"
) -> Tensor:
    """Run the local experts on their rows, ``[R, D]`` to ``[R, D]`` in the same order.

    ``loop`` calls one expert after the other, ``grouped`` runs them as grouped matrix products,
    ``auto`` groups where that is faster (see :func:`grouping_pays`) and the experts allow it.

    Raises:
        ConfigError: ``grouped`` was asked for, and the experts are not recognizably one MLP.
    """
    wanted = mode == "grouped" or (mode == "auto" and grouping_pays(rows))
    if wanted and rows.shape[0] and len(experts.deepspeed_experts):
        mlp = recognize(experts.deepspeed_experts)
        if not isinstance(mlp, str):
            return run_grouped(mlp, experts.deepspeed_experts, rows, tokens_per_expert)
        if mode == "grouped":
            raise ConfigError(
                f"experts='grouped' is not possible: {mlp}; expected experts that are the same MLP "
                "of nn.Linear layers: use 'auto' or 'loop'"
            )
    return run_loop(experts, rows, tokens_per_expert)


def grouping_pays(rows: Tensor) -> bool:
    """Return whether ``auto`` groups rows of this device and type.

    On a GPU where torch has a grouped kernel: bfloat16 from compute capability 9.0. On a CPU torch
    runs a loop inside, and stacking the weights is on top: measured, it is not reliably faster.
    """
    if rows.device.type != "cuda" or rows.dtype != torch.bfloat16:
        return False
    return torch.cuda.get_device_capability(rows.device) >= (9, 0)


def run_loop(experts: Any, rows: Tensor, tokens_per_expert: tuple[int, ...]) -> Tensor:
    """Run each local expert on its rows, one after the other.

    An expert without rows gets one row of zeros while gradients are on, and the result is dropped:
    its parameters then have gradients of zero, as DeepSpeed's padding gives them, and not none.
    """
    outputs = []
    # one split: the backward of a slice per expert would fill [R, D] zeros for each
    chunks = rows.split(list(tokens_per_expert))
    for expert, chunk in zip(experts.deepspeed_experts, chunks, strict=True):
        idle = chunk.shape[0] == 0
        if idle:
            if not torch.is_grad_enabled():
                continue
            # joined to the rows, so that backward reaches the exchange on a rank that got none
            chunk = torch.cat([chunk, rows.new_zeros(1, rows.shape[1])])
        # four dimensions, as DeepSpeed's [g, e, c, m], for experts that look at the shape
        out = expert(chunk[None, None])
        if isinstance(out, tuple):
            out = out[0]  # DeepSpeed ignores the bias term that some experts return
        out = out.reshape(-1, rows.shape[1])
        outputs.append(out[:0] if idle else out)
    return torch.cat(outputs) if outputs else rows
