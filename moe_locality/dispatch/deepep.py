"""DeepEP V2 as a transport: a client of its ``ElasticBuffer``, where it is installed.

https://github.com/deepseek-ai/DeepEP (V2, on NCCL's device API). It is never required and never
chosen by ``auto``. It uses the documented expanding layout: ``dispatch(x, topk_idx, topk_weights,
..., do_expand=True)`` gives one row per route, grouped by local expert, and the weight of each row;
``combine(rows, handle)`` adds up the rows of each token, without weights, and with ``topk_weights``
sends those back too. So each is the other's gradient, and the weights are applied to the results of
the experts. Built ``deterministic``, rows are in the order of the flat exchange.

Limits: bfloat16 rows, at most ``deepep_max_tokens_per_rank`` tokens a rank, no payload of ours.
What DeepEP sends between its ranks is not counted. Placement works as everywhere: it is in the
slots.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_locality.config import DispatchConfig
from moe_locality.dispatch.transport import Combined, Dispatched, Transport
from moe_locality.errors import BackendUnavailable, ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepEPMetadata:
    """``handle``: DeepEP's, of this step; ``shape``: (T, K) of the routes."""

    handle: Any
    shape: tuple[int, int]
    tokens_per_local_expert: tuple[int, ...]


def import_deep_ep() -> Any:
    """Return the module ``deep_ep``; BackendUnavailable where it is not installed, or not V2."""
    try:
        module = importlib.import_module("deep_ep")
    except ImportError as error:
        raise BackendUnavailable(
            f"dispatch.exchange is 'deepep' and deep_ep cannot be imported ({error}): install "
            "DeepEP V2, or use 'auto'"
        ) from error
    if not hasattr(module, "ElasticBuffer"):
        raise BackendUnavailable(
            f"found deep_ep {getattr(module, '__version__', '')} without ElasticBuffer, expected "
            "DeepEP V2: install it, or use 'auto'"
        )
    return module


@dataclass(eq=False)
class DeepEPTransport(Transport[DeepEPMetadata]):
    """One dispatch and one combine of DeepEP."""

    metadata_type: ClassVar[type] = DeepEPMetadata
    sends_weights = True
    # shared by the layers of a group that fit one: each takes memory and a communicator
    _buffers: ClassVar[dict[tuple, Any]] = {}

    group: Any

    def __post_init__(self) -> None:
        config: DispatchConfig = self.config
        if (config.payload, config.combine_payload) != ("none", "none"):
            raise ConfigError(
                f"found payload {config.payload!r} and combine_payload {config.combine_payload!r} "
                "with exchange 'deepep', expected 'none': DeepEP moves the rows, and knows no such "
                "format of ours"
            )
        if config.deepep_max_tokens_per_rank is None:
            raise ConfigError(
                "found exchange 'deepep' without dispatch.deepep_max_tokens_per_rank, expected the "
                "most tokens that any rank gives to a layer: DeepEP sizes its buffer by it"
            )
        self._deep_ep = import_deep_ep()
        self.group = self.group if self.group is not None else torch.distributed.group.WORLD
        self.max_tokens = config.deepep_max_tokens_per_rank

    def start_dispatch(
        self,
        x: Tensor,
        slot_ids: Tensor,
        topk_weights: Tensor | None,
        metadata: DeepEPMetadata | None,
    ) -> Callable[[], Dispatched[DeepEPMetadata]]:
        """Dispatch at once; nothing is left for the finish."""
        assert topk_weights is not None
        if x.dtype != torch.bfloat16:
            raise ConfigError(
                f"found rows in {x.dtype}, expected torch.bfloat16: DeepEP sends no other; train "
                "in bfloat16, or use dispatch.exchange 'auto'"
            )
        if x.shape[0] > self.max_tokens:
            raise ConfigError(
                f"found {x.shape[0]} tokens, expected at most deepep_max_tokens_per_rank="
                f"{self.max_tokens}: raise it"
            )
        shape = (slot_ids.shape[0], slot_ids.shape[1])
        if metadata is not None:
            routes: dict[str, Any] = {"handle": metadata.handle}
        else:
            routes = {
                "topk_idx": slot_ids.to(self._deep_ep.topk_idx_t).contiguous(),
                "num_experts": self.num_slots,
                "num_max_tokens_per_rank": self.max_tokens,
                "expert_alignment": 1,
                "do_cpu_sync": True,
            }
        weights = topk_weights.float().contiguous()
        with self.clock("dispatch"):
            rows, _, row_weights, handle, _ = self._buffer(x.shape[1], shape[1]).dispatch(
                x.contiguous(), topk_weights=weights, do_expand=True, **routes
            )
        if metadata is None:
            counts = tuple(int(n) for n in handle.num_recv_tokens_per_expert_list)
            metadata = DeepEPMetadata(handle=handle, shape=shape, tokens_per_local_expert=counts)
        delivered = (metadata, rows, row_weights)
        return lambda: delivered

    def dispatch_backward(
        self, grad_rows: Tensor, grad_weights: Tensor | None, metadata: DeepEPMetadata
    ) -> tuple[Tensor, Tensor | None]:
        """Combine the gradients of the rows, and of their weights ``[R]``."""
        grad, back, _ = self._buffer(grad_rows.shape[1], metadata.shape[1]).combine(
            grad_rows, metadata.handle, topk_weights=grad_weights
        )
        return grad, back if grad_weights is not None else None

    def start_combine(
        self, expert_out: Tensor, topk_weights: Tensor, metadata: DeepEPMetadata
    ) -> Callable[[], Combined]:
        """Combine the weighted results at once; ``topk_weights [R]``: as they arrived."""
        weighted = (expert_out * topk_weights[:, None]).to(expert_out.dtype)
        with self.clock("combine"):
            buffer = self._buffer(expert_out.shape[1], metadata.shape[1])
            out = buffer.combine(weighted, metadata.handle)[0]
        return lambda: (out, expert_out)

    def combine_backward(
        self,
        grad: Tensor,
        rows: Tensor | None,
        topk_weights: Tensor,
        metadata: DeepEPMetadata,
        need_rows: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Dispatch the gradients of the tokens to the rows."""
        arrived = self._buffer(grad.shape[1], metadata.shape[1]).dispatch(
            grad, handle=metadata.handle, do_expand=True
        )[0]
        grad_rows = (arrived * topk_weights[:, None]).to(arrived.dtype) if need_rows else None
        return grad_rows, None if rows is None else (rows.float() * arrived).sum(dim=1)

    def _buffer(self, width: int, top_k: int) -> Any:
        key = (self.group, width, top_k, self.max_tokens)
        if key not in self._buffers:
            self._buffers[key] = self._deep_ep.ElasticBuffer(
                self.group,
                num_max_tokens_per_rank=self.max_tokens,
                hidden=width,
                num_topk=top_k,
                deterministic=True,
            )
        return self._buffers[key]
