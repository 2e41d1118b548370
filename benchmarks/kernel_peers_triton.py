"""Peers whose Triton files are run by themselves: MegaBlocks, torchtitan's MinimalAsyncEP."""

import os
from collections.abc import Callable
from typing import Any

import torch
from kernel_cases import Case, Step
from kernel_peers import Peer, expert_counts, import_alone, sorted_routes
from torch import Tensor


def _megablocks() -> Any:
    kernels: Any = import_alone("megablocks.backend.kernels")
    if os.environ.get("TRITON_INTERPRET") == "1":  # there is nothing to tune on
        for name in ("_padded_copy", "_padded_copy_wgrad", "_binned_copy", "_binned_copy_wgrad"):
            kernel = getattr(kernels, name)
            kernel.configs = kernel.configs[:1]
    return kernels


def _bins(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The routes by expert, the expert of each, and where each expert's routes end."""
    experts, order = torch.sort(case.ids.reshape(-1), stable=True)
    return order.int(), experts, expert_counts(case).cumsum(0).int()


def _unweighted(case: Case) -> Tensor | None:
    """No weights; the interpreter has no number whose dtype can be changed, and gets ones."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.ones(case.num_rows, device=case.x.device)
    return None


def megablocks(case: Case) -> Step:
    """``gather`` and ``scatter``, dropless; they write T * K rows and sum them afterwards."""
    kernels, none = _megablocks(), _unweighted(case)

    def step():
        order, experts, bins = _bins(case)
        weights = case.weights.reshape(-1)
        where = (order, experts)
        rows = kernels.gather(case.x, *where, none, bins, case.top_k)
        out = kernels.scatter(rows, *where, weights, bins, case.top_k)
        grad_rows = kernels.gather(case.grad, *where, weights, bins, case.top_k)
        gates = kernels.scatter_wgrad(rows, case.grad, *where, bins, case.top_k)
        grad_x = kernels.scatter(grad_rows, *where, none, bins, case.top_k)
        return out, grad_x, gates.view(case.ids.shape)

    return step


def megablocks_binned(case: Case) -> Step:
    """``binned_gather`` and ``binned_scatter``: equal capacities, here those of the busiest."""
    kernels, none = _megablocks(), _unweighted(case)
    capacity = int(expert_counts(case).max())

    def step():
        order, _, bins = _bins(case)
        weights = case.weights.reshape(-1)
        rows = kernels.binned_gather(case.x, order, none, bins, capacity, case.top_k)
        out = kernels.binned_scatter(rows, order, weights, bins, case.top_k)
        grad_rows = kernels.binned_gather(case.grad, order, weights, bins, capacity, case.top_k)
        gates = kernels.binned_scatter_wgrad(rows, case.grad, order, bins, case.top_k)
        grad_x = kernels.binned_scatter(grad_rows, order, none, bins, case.top_k)
        shape = (len(case.x), -1)
        return out.view(*shape), grad_x.view(*shape), gates.view(case.ids.shape)

    return step


def minimal_async_ep(case: Case) -> Step:
    """torchtitan's kernels on one rank: its copy to peers, reduce, and both gradients."""
    kernels: Any = import_alone("torchtitan.distributed.minimal_async_ep.kernels")
    tokens, top_k, count = len(case.x), case.top_k, case.num_rows
    rows = torch.empty(count, case.x.shape[1], dtype=case.x.dtype, device=case.x.device)
    pointer = torch.tensor([rows.data_ptr()], dtype=torch.int64, device=rows.device)
    ranks = torch.zeros(count, dtype=torch.int64, device=rows.device)
    places = torch.arange(count, device=rows.device)
    ordered: dict[str, Any] = {"top_k": top_k, "scores_are_slot_ordered": True}

    def step():
        order, token = sorted_routes(case)
        back = kernels.invert_flat_indices_kernel(order, num_rows=count)
        kernels.copy_rows_to_peers_kernel(
            *(case.x, [rows], ranks, places),
            ep_size=1,
            num_rows=count,
            num_cols=rows.shape[1],
            dst_ptrs=pointer,
            src_rows=token,
        )
        scores, dtype = case.weights.reshape(-1), case.x.dtype
        reduce: Callable = kernels.reduce_topk_slots_kernel
        out = reduce(rows, back, scores, num_tokens=tokens, **ordered)
        grad_rows = kernels.expand_topk_grad_kernel(
            case.grad, order, scores, dtype=dtype, **ordered
        )
        gates = kernels.topk_scores_grad_kernel(
            rows, case.grad, order, dtype=scores.dtype, **ordered
        )
        grad_x = reduce(grad_rows, back, None, num_tokens=tokens, top_k=top_k)
        return out, grad_x, gates.view(case.ids.shape)

    return step


PEERS = [
    Peer(
        name="torchtitan MinimalAsyncEP kernels",
        distribution="torchtitan",
        read_from="0.3.0",
        make=minimal_async_ep,
        note="one rank, no signals between peers",
    ),
    Peer(
        name="MegaBlocks gather, scatter",
        distribution="megablocks",
        read_from="0.10.0",
        make=megablocks,
        note="torch sorts and counts: its own need its CUDA extension",
    ),
    Peer(
        name="MegaBlocks binned",
        distribution="megablocks",
        read_from="0.10.0",
        make=megablocks_binned,
        note="equal capacities, zeroed; torch sorts and counts",
    ),
]
