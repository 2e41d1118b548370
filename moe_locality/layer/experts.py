"""The experts of one rank on the rows that came for them."""

from typing import Any

import torch
from torch import Tensor


def run_experts(experts: Any, rows: Tensor, tokens_per_expert: tuple[int, ...]) -> Tensor:
    """Run each local expert on its rows, ``[R, D]`` to ``[R, D]`` in the same order.

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
