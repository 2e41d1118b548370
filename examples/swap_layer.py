"""Three lines change in an existing DeepSpeed script: its MoE layers become moe_locality's.

    deepspeed --num_accelerators 2 examples/swap_layer.py              # as it was
    deepspeed --num_accelerators 2 examples/swap_layer.py --swap       # with the three lines

Both print the same losses: the layer computes the same function, it only sends less. Everything
but the marked lines is what any script with ``deepspeed.moe.layer.MoE`` looks like.
"""

import argparse

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from torch import nn

import moe_locality  # line 1 of 3
from moe_locality.compat import avoid_cpu_jit, end_distributed

DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "steps_per_print": 10**9,
    "moe_locality": {
        "dispatch": {"exchange": "auto"}
    },  # line 2 of 3: DeepSpeed ignores the section
}


class Classifier(nn.Module):
    """Somebody's model, written for DeepSpeed's MoE layer."""

    def __init__(self, ep_size: int) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 32)
        expert = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.moe = MoE(32, expert, num_experts=4, ep_size=ep_size, k=2, drop_tokens=False)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(self.embed(x))
        y, balance_loss, _ = self.moe(hidden)
        return F.cross_entropy(self.head(hidden + y), labels) + 0.01 * balance_loss


def train(*, swap: bool, steps: int) -> tuple[list[float], nn.Module]:
    """Train for some steps and return this rank's losses, and the model."""
    torch.manual_seed(0)
    model = Classifier(ep_size=torch.distributed.get_world_size())
    front = moe_locality if swap else deepspeed  # line 3 of 3: moe_locality.initialize
    engine, *_ = front.initialize(
        model=model, model_parameters=list(model.parameters()), config=DS_CONFIG
    )
    data = torch.Generator().manual_seed(engine.global_rank)
    losses = []
    for step in range(steps):
        x = torch.randn(8, 16, generator=data)
        labels = x[:, :4].argmax(1)
        torch.manual_seed(step)  # the gate of k=2 draws its second expert
        loss = engine(x.to(engine.device), labels.to(engine.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--swap", action="store_true", help="use moe_locality's layers")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by DeepSpeed's launcher")
    args = parser.parse_args()
    avoid_cpu_jit()  # on a CPU, DeepSpeed would compile an op here first
    deepspeed.init_distributed(verbose=False)
    losses, model = train(swap=args.swap, steps=args.steps)
    if torch.distributed.get_rank() == 0:
        print(f"layer {type(model.moe).__module__}.{type(model.moe).__name__}", flush=True)
        for step, loss in enumerate(losses):
            print(f"step {step} loss {loss:.6f}", flush=True)
    del model  # its layers hold process groups
    end_distributed()


if __name__ == "__main__":
    main()
