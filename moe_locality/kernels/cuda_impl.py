"""The CUDA backend: the extension of ``csrc/``, used where it was built; allocation and dtypes.

Nothing is built here: the library is loaded if it lies in the package. Its operators write into
tensors that are made here, on torch's stream; only a row map without static ``num_rows`` waits for
the device.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_locality.errors import ConfigError
from moe_locality.kernels.backends import GateSpec
from moe_locality.kernels.reference import TINY

LIBRARY = "_C_cuda.abi3.so"
NO_LIMIT = 2**31 - 1
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_EXPERTS, MAX_GROUPS = 1024, 32


@cache
def load_library() -> str | None:
    """Load the extension; return why that is not possible, or None."""
    path = Path(__file__).parents[1] / LIBRARY
    if not path.exists():
        return "this installation has no CUDA extension (it was installed without building it)"
    try:
        torch.ops.load_library(os.fspath(path))
    except OSError as error:
        return f"its library {path.name} cannot be loaded by torch {torch.__version__} ({error})"
    return None


def why_unavailable() -> str | None:
    """Return why no kernel of this backend can run here, or None."""
    why = load_library()
    if why is None and not torch.cuda.is_available():
        why = "torch sees no GPU here"
    return why


def row_map(
    expert_ids: Tensor,
    num_slots: int,
    slot_of_expert: Tensor | None,
    keep: Tensor | None,
    capacity: int,
    alignment: int,
    num_rows: int,
    node_of_slot: Tensor | None,
    num_nodes: int,
) -> dict[str, Tensor | None]:
    if expert_ids.dtype not in (torch.int32, torch.int64):
        expert_ids = expert_ids.to(torch.int32)
    num_tokens, top_k = expert_ids.shape
    size = num_rows if num_rows >= 0 else num_tokens * top_k + num_slots * (alignment - 1)

    def make(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return expert_ids.new_empty(shape, dtype=dtype)

    run = torch.ops.moe_locality_cuda
    blocks = run.row_map_blocks(num_tokens, top_k)
    nodes = None if node_of_slot is None else node_of_slot.to(torch.int32).contiguous()
    node_mask = None if nodes is None else make(num_tokens, dtype=torch.int64)
    node_counts = None if nodes is None else make(blocks, num_nodes, dtype=torch.int64)
    out: dict[str, Any] = {
        "row_route": make(size),
        "row_token": make(size),
        "positions": make(num_tokens, top_k),
        "tokens_per_slot": make(num_slots, dtype=torch.int64),
        "slot_offsets": make(num_slots + 1),
        "routed_per_slot": make(num_slots),
        "overflow": make(1),
    }
    run.row_map(
        expert_ids,
        None if keep is None else keep.contiguous().view(torch.uint8),
        None if slot_of_expert is None else slot_of_expert.to(torch.int32).contiguous(),
        nodes,
        make(blocks, num_slots),
        *out.values(),
        node_mask,
        node_counts,
        NO_LIMIT if capacity < 0 else min(capacity, NO_LIMIT),
        alignment,
        num_nodes,
        num_rows >= 0 or alignment > 1,
    )
    out["node_mask"] = node_mask
    out["tokens_per_node"] = None if node_counts is None else node_counts.sum(dim=0)
    if num_rows < 0:
        used = int(out["slot_offsets"][-1])  # the one wait for the device
        out["row_route"], out["row_token"] = out["row_route"][:used], out["row_token"][:used]
    return out


def gather(x: Tensor, index: Tensor) -> Tensor:
    rows = x.new_empty(index.shape[0], x.shape[1])
    torch.ops.moe_locality_cuda.gather(x.contiguous(), index.contiguous(), rows)
    return rows


def permute(
    x: Tensor,
    row_token: Tensor,
    row_route: Tensor,
    positions: Tensor,
    weights: Tensor | None,
    slot_offsets: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    rows = x.new_empty(row_token.shape[0], x.shape[1])
    weights = _floats(weights)
    row_weights = None if weights is None else weights.new_empty(row_token.shape[0])
    torch.ops.moe_locality_cuda.permute(
        x.contiguous(), positions, row_token, slot_offsets, weights, rows, row_weights
    )
    return rows, row_weights


def combine(
    rows: Tensor, positions: Tensor, weights: Tensor | None, row_values: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    _check_dtype(rows)
    out = rows.new_empty(positions.shape[0], rows.shape[1])
    row_values = _floats(row_values)
    values = None if row_values is None else row_values.new_empty(positions.shape)
    torch.ops.moe_locality_cuda.combine(
        rows.contiguous(), positions, _floats(weights), row_values, out, values
    )
    return out, values


def combine_backward(
    grad: Tensor,
    rows: Tensor | None,
    row_token: Tensor,
    row_route: Tensor,
    positions: Tensor,
    weights: Tensor,
    need_rows: bool,
    slot_offsets: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    _check_dtype(grad)
    wide = _floats(weights)
    grad_rows = grad.new_empty(row_token.shape[0], grad.shape[1]) if need_rows else None
    grad_weights = None if rows is None else torch.empty_like(wide)
    torch.ops.moe_locality_cuda.combine_backward(
        grad.contiguous(),
        None if rows is None else rows.contiguous(),
        positions,
        row_token,
        slot_offsets,
        wide,
        grad_rows,
        grad_weights,
    )
    return grad_rows, None if grad_weights is None else grad_weights.to(weights.dtype)


def gate(logits: Tensor, bias: Tensor | None, spec: GateSpec) -> tuple[Tensor, Tensor]:
    logits = _check_logits(logits, spec)
    ids = logits.new_empty((logits.shape[0], spec.top_k), dtype=torch.int32)
    weights = logits.new_empty((logits.shape[0], spec.top_k), dtype=torch.float32)
    two = spec.group_score == "top2"
    by_logit = bias is None and not (spec.num_groups > 1 and two)
    torch.ops.moe_locality_cuda.gate(
        logits,
        _floats(bias),
        ids,
        weights,
        *(spec.num_groups, spec.top_groups, spec.score == "sigmoid", two, by_logit),
        *(spec.renormalize, spec.scale, TINY),
    )
    return ids, weights


def gate_backward(grad_weights: Tensor, logits: Tensor, ids: Tensor, spec: GateSpec) -> Tensor:
    logits = _check_logits(logits, spec)
    grad = logits.new_empty(logits.shape)
    torch.ops.moe_locality_cuda.gate_backward(
        _floats(grad_weights),
        logits,
        ids.contiguous(),
        grad,
        *(spec.score == "sigmoid", spec.renormalize, spec.scale, TINY),
    )
    return grad


def _check_dtype(tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise ConfigError(
            f"found rows of {tensor.dtype}, expected float32, float16 or bfloat16 on the CUDA "
            "backend: cast them, or use backend='reference'"
        )


def _check_logits(logits: Tensor, spec: GateSpec) -> Tensor:
    _check_dtype(logits)
    if logits.shape[1] > MAX_EXPERTS or spec.num_groups > MAX_GROUPS:
        raise ConfigError(
            f"found {logits.shape[1]} experts in {spec.num_groups} groups, expected at most "
            f"{MAX_EXPERTS} in {MAX_GROUPS} on the CUDA backend: use backend='triton'"
        )
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _floats(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.to(torch.float32).contiguous()
