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
    """Keeps the input of every gate and recomputes the top-k choice in numpy."""

    def __init__(self, model):
        self.inputs = []
        self.gates = [m for m in model.modules() if isinstance(m, TopKGate)]
        for index, gate in enumerate(self.gates):
            gate.register_forward_pre_hook(
                lambda _gate, args, index=index: self.inputs.append(
                    (index, args[0].detach().float().numpy().copy())
                )
            )

    def picks(self, index):
        """int [T, K] of every call of one gate, each row ascending (dropless)."""
        gate = self.gates[index]
        weight = gate.wg.weight.detach().float().numpy()
        calls = [x @ weight.T for i, x in self.inputs if i == index]
        return np.concatenate([np.sort(np.argsort(-z, axis=1)[:, : gate.k], axis=1) for z in calls])


def inputs(batch=2, length=5, seed=0):
    """float32 [B, S, D]."""
    return torch.randn(batch, length, WIDTH, generator=torch.Generator().manual_seed(seed))
