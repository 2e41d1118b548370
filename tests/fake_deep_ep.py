"""A FAKE of ``deep_ep``: the documented interface of DeepEP V2's ``ElasticBuffer``, on gloo.

It is not DeepEP and shares no code with it. It gathers everything on every rank and does what the
docstrings of ``ElasticBuffer.dispatch`` and ``.combine`` promise in the expanding layout, so that
our client can be tested where DeepEP cannot be installed. It says nothing about DeepEP's speed.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

topk_idx_t = torch.int64


@dataclass
class EPHandle:
    topk_idx: Tensor
    everyone: list[Tensor]
    num_experts: int
    num_max_tokens_per_rank: int
    num_recv_tokens_per_expert_list: list[int]
    do_expand: bool


class ElasticBuffer:
    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
    ) -> None:
        assert deterministic, "the fake keeps the order of the deterministic mode only"
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.hidden, self.num_topk = hidden, num_topk

    def _gather(self, value: Tensor) -> list[Tensor]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def _picks(self, handle: EPHandle, rank: int) -> list[tuple[int, int, int]]:
        """(source, token, k) of the rows of a rank: by local expert, then source, then token."""
        local = handle.num_experts // self.size
        picks = []
        for expert in range(rank * local, (rank + 1) * local):
            for source, ids in enumerate(handle.everyone):
                picks += [(source, t, k) for t, k in (ids == expert).nonzero().tolist()]
        return picks

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        handle: EPHandle | None = None,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
    ):
        assert x.dtype == torch.bfloat16
        assert x.shape[1] == self.hidden
        assert do_expand
        if handle is None:
            assert topk_idx is not None
            assert num_experts is not None
            assert num_max_tokens_per_rank is not None
            assert topk_idx.dtype == topk_idx_t
            assert len(x) <= num_max_tokens_per_rank
            handle = EPHandle(
                topk_idx.clone(),
                self._gather(topk_idx),
                num_experts,
                num_max_tokens_per_rank,
                [],
                True,
            )
            local = num_experts // self.size
            for expert in range(self.rank * local, (self.rank + 1) * local):
                count = sum(int((ids == expert).sum()) for ids in handle.everyone)
                handle.num_recv_tokens_per_expert_list.append(count)
        else:
            assert topk_idx is None, "must be None with a handle"
            assert not do_cpu_sync, "no CPU sync with a cached handle"
        xs = self._gather(x)
        picks = self._picks(handle, self.rank)
        rows = (
            torch.stack([xs[s][t] for s, t, _ in picks]) if picks else x.new_empty(0, self.hidden)
        )
        weights = None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float
            all_weights = self._gather(topk_weights)
            weights = torch.tensor([float(all_weights[s][t, k]) for s, t, k in picks])
        return rows, None, weights, handle, None

    def combine(self, x: Tensor, handle: EPHandle, topk_weights: Tensor | None = None):
        assert x.dtype == torch.bfloat16
        rows = self._gather(x)
        weights = None if topk_weights is None else self._gather(topk_weights)
        tokens, top_k = handle.topk_idx.shape
        out = torch.zeros(tokens, self.hidden)
        back = torch.zeros(tokens, top_k)
        for rank in range(self.size):
            for row, (source, token, k) in enumerate(self._picks(handle, rank)):
                if source == self.rank:
                    out[token] += rows[rank][row].float()
                    if weights is not None:
                        back[token, k] = weights[rank][row]
        return out.to(torch.bfloat16), None if weights is None else back, None
