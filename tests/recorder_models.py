"""Small models of stock DeepSpeed layers, and what their routers chose, told independently."""

import numpy as np
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.sharded_moe import TopKGate

WIDTH = 16


class MoeModel(torch.nn.Module):
    """Residual MoE layers; ``skip`` names layers that do not run in the next forward pass."""

    def __init__(self, num_layers=3, num_experts=8, k=2, layer=MoE, seed=0, **options):
        super().__init__()
        torch.manual_seed(seed)
        options = {"drop_tokens": False, "top2_2nd_expert_sampling": False, **options}
        self.blocks = torch.nn.ModuleList(
            layer(WIDTH, torch.nn.Linear(WIDTH, WIDTH), num_experts=num_experts, k=k, **options)
            for _ in range(num_layers)
        )
        self.skip = set()
        self.exp_counts = []

    def forward(self, x):
        self.exp_counts = []
        for index, block in enumerate(self.blocks):
            if index not in self.skip:
                y, _, counts = block(x)
                self.exp_counts.append(counts.numpy().copy())
                x = x + y
        return x


class GateWitness:
    """Recomputes the top-k choice of every gate in numpy, from input and weight at that time."""

    def __init__(self, model):
        self.calls = []
        gates = [m for m in model.modules() if isinstance(m, TopKGate)]
        for index, gate in enumerate(gates):
            gate.register_forward_pre_hook(
                lambda gate, args, index=index: self.calls.append((index, choose(gate, args[0])))
            )

    def picks(self, index):
        """int [T, K] of all calls of one gate, each row ascending (dropless)."""
        return np.concatenate([ids for i, ids in self.calls if i == index])


def choose(gate, x):
    """int [T, K], ascending."""
    logits = x.detach().float().numpy() @ gate.wg.weight.detach().float().numpy().T
    return np.sort(np.argsort(-logits, axis=1)[:, : gate.k], axis=1)


def inputs(batch=2, length=5, seed=0):
    """float32 [B, S, D]."""
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))
