"""Shared by the tests of the exchange: routes, experts, and one step of both with all gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_locality.dispatch import TokenDispatcher
from moe_locality.topology import ClusterTopology
from moe_locality.topology.groups import ExpertParallelGroups, build_groups, layout_groups

WIDTH, HIDDEN, TOP_K, SLOTS_PER_RANK = 16, 8, 3, 2
"""More picks than a rank has slots."""


class Experts(torch.nn.Module):
    """One small MLP per slot, its weights drawn from the number of the slot."""

    def __init__(self, slots: range, dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.down = torch.nn.ParameterList(), torch.nn.ParameterList()
        for slot in slots:
            generator = torch.Generator().manual_seed(1000 + slot)
            up = torch.randn(WIDTH, HIDDEN, generator=generator).to(dtype)
            down = torch.randn(HIDDEN, WIDTH, generator=generator).to(dtype)
            self.up.append(torch.nn.Parameter(up))
            self.down.append(torch.nn.Parameter(down))

    def forward(self, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        chunks = rows.split(list(counts))
        made = zip(chunks, self.up, self.down, strict=True)
        return torch.cat([torch.relu(chunk @ up) @ down for chunk, up, down in made])

    def grads(self) -> list[Tensor]:
        """One gradient per parameter, zero where there is none."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters()]


def data_of(rank: int, num_slots: int, dtype: torch.dtype, pattern: str = "uneven"):
    """Return x, weights and slots of a rank's tokens; every rank can make those of all."""
    generator = torch.Generator().manual_seed(31 * rank + num_slots)
    tokens = {"uneven": (5, 0, 9, 2)[rank % 4], "one slot": 6, "none kept": 4, "many": 64}[pattern]
    x = torch.randn(tokens, WIDTH, generator=generator).to(dtype)
    weights = torch.rand(tokens, TOP_K, generator=generator)
    top_k = min(TOP_K, num_slots)
    slots = torch.full((tokens, TOP_K), -1)
    if pattern == "one slot":
        slots[:, 0] = num_slots - 1
    elif pattern != "none kept" and tokens:
        slots[:, :top_k] = torch.rand(tokens, num_slots, generator=generator).argsort(1)[:, :top_k]
        slots[torch.rand(tokens, TOP_K, generator=generator) < 0.2] = -1
    return x, weights, slots.int()


def step(
    dispatcher: TokenDispatcher,
    experts: Experts,
    data: tuple[Tensor, Tensor, Tensor],
    *,
    train: bool = True,
    checkpointed: bool | None = None,
    replay: bool = False,
) -> list[Tensor]:
    """Return the output and, in training, the gradients of x, the weights and the experts.

    ``checkpointed``: recompute in backward, with torch's reentrant (True) or other (False) kind.
    ``replay``: the recomputation uses the dispatch metadata of the first forward.
    """
    x, weights, slots = data
    x, weights = x.clone().requires_grad_(train), weights.clone().requires_grad_(train)
    kept: list[Any] = []

    def layer(x: Tensor, weights: Tensor) -> Tensor:
        metadata = kept[0] if kept and replay else None
        routed = dispatcher.dispatch(x, slots, weights, metadata=metadata)
        kept.append(routed.handle.metadata)
        rows = experts(routed.rows, routed.tokens_per_local_expert)
        return dispatcher.combine(rows, routed.handle)

    with torch.set_grad_enabled(train):
        if checkpointed is None:
            out = layer(x, weights)
        else:
            out = checkpoint(layer, x, weights, use_reentrant=checkpointed)
    assert isinstance(out, Tensor)
    if not train:
        return [out]
    (out.float() * torch.linspace(-1, 1, WIDTH)).sum().backward()
    assert x.grad is not None
    assert weights.grad is not None
    return [out.detach(), x.grad, weights.grad, *experts.grads()]


def groups_of(nodes: int, world: int, ep_size: int) -> tuple[ExpertParallelGroups, ClusterTopology]:
    """Return the expert groups of a world of equal nodes. Collective."""
    topology = ClusterTopology.uniform(nodes, world // nodes)
    return build_groups(layout_groups(topology, ep_size)), topology


class CountingComm:
    """``torch.distributed`` that counts its all-to-alls."""

    def __init__(self) -> None:
        self.calls = 0

    def all_to_all_single(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return torch.distributed.all_to_all_single(*args, **kwargs)
