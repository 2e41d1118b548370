"""The gate of the drop-in: DeepSpeed's, with its rows read in logical order."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from deepspeed.moe.sharded_moe import TopKGate
from torch import Tensor

from moe_locality.layer.view import View


class LocalityTopKGate(TopKGate):
    """DeepSpeed's gate, read in the logical frame.

    The sparse output is DeepSpeed's: ``(l_aux, C, E, indices int32 [K, T] (-1 = dropped),
    locations, gates fp32 [K, T], exp_counts)``, with logical ids.
    """

    routes_in_logical_frame = True
    slot_to_logical: np.ndarray
    _serving: Tensor | None = None

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input: Tensor,
        used_token: Tensor | None = None,
        sparse_routes: bool = False,
        use_tutel: bool = False,
        *,
        padded: bool = True,
    ) -> Any:
        """Gate ``input [T, D]``; with ``padded=False`` nobody needs equal capacities on all ranks.

        Without dropping, DeepSpeed makes all ranks agree on the capacity of the padded buffers. It
        changes no route and no weight, so the ragged dispatch saves that collective.
        """
        if input.shape[0] == 0 and sparse_routes:
            return self._no_routes(input)
        replaced: dict[str, Any] = {}
        if not self.is_identity:
            order = self._slot_of_logical(input.device)
            replaced["wg"] = SimpleNamespace(weight=self.wg.weight.index_select(0, order))
        if not padded and not self.drop_tokens:
            replaced["ep_group"] = None
        view: Any = View(self, **replaced) if replaced else self
        stock: Any = TopKGate.forward
        return stock(view, input, used_token, sparse_routes, use_tutel)

    @property
    def is_identity(self) -> bool:
        """Whether row e of the router belongs to expert e."""
        return self._identity

    def set_slot_to_logical(self, slot_to_logical: np.ndarray) -> None:
        """Say which logical expert each slot holds (checked by :func:`set_slot_to_logical`)."""
        self.slot_to_logical = slot_to_logical
        self._identity = bool((slot_to_logical == np.arange(len(slot_to_logical))).all())
        self._orders: dict[torch.device, Tensor] = {}

    def set_serving_slots(self, serving_slots: np.ndarray | None) -> None:
        """Say which slot serves each expert for this rank's tokens (``[E]``), where experts have
        replicas; None: the one slot that holds it.
        """
        self._serving = None if serving_slots is None else torch.from_numpy(serving_slots)

    def slot_ids(self, logical_ids: Tensor) -> Tensor:
        """Map logical ids (-1 = dropped) to slots, the same shape and dtype."""
        if self._serving is not None:
            slots = self._serving = self._serving.to(logical_ids.device)  # itself where it is there
        elif self.is_identity:
            return logical_ids
        else:
            slots = self._slot_of_logical(logical_ids.device)
        slots = slots.to(logical_ids.dtype)
        return torch.where(logical_ids < 0, logical_ids, slots[logical_ids.clamp_min(0).long()])

    def _slot_of_logical(self, device: torch.device) -> Tensor:
        # not a buffer: it must not be saved, cast, or made on the meta device
        if device not in self._orders:
            self._orders[device] = torch.from_numpy(np.argsort(self.slot_to_logical)).to(device)
        return self._orders[device]

    def _no_routes(self, input: Tensor) -> tuple:
        """A rank without tokens takes part in the exchange; DeepSpeed's l_aux would be NaN."""
        logits = torch.nn.functional.linear(input.float(), self.wg.weight.float())
        num_experts = logits.shape[1]
        none = torch.empty(self.k, 0, dtype=torch.int32, device=input.device)
        counts = torch.zeros(num_experts, dtype=torch.int64, device=input.device)
        gates = logits[:, : self.k].t().contiguous()
        return (logits.sum(), torch.tensor(0), num_experts, none, none, gates, counts)
