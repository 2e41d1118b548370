"""Run on every rank by benchmarks/multinode.py: one MoE layer in several ways, in turns, timed.

``_multinode_program.py CASES.json BATCHES.npz OUT.json``. Recorded routes are replayed without a
changed gate: the first E columns of a token are scores of the experts, and the gate's weights are
the identity, so any gate picks what was recorded.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from torch import nn

import moe_locality
from moe_locality.compat import avoid_cpu_jit
from moe_locality.placement import PlacementPlan
from moe_locality.topology import discover_topology, prepare_groups


class OneLayer(nn.Module):
    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        torch.manual_seed(0)
        width, hidden = sizes["width"], sizes["hidden"]
        expert = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.moe = deepspeed.moe.layer.MoE(
            width,
            expert,
            num_experts=sizes["experts"],
            ep_size=int(os.environ["WORLD_SIZE"]),
            k=sizes["top_k"],
            drop_tokens=False,
        )
        gate: Any = self.moe.deepspeed_moe.gate
        with torch.no_grad():
            gate.wg.weight.copy_(torch.eye(sizes["experts"], width))

    def forward(self, x):
        return self.moe(x)[0]


def build(case: dict[str, Any], sizes: dict[str, int], topology: Any) -> nn.Module:
    model = OneLayer(sizes)
    if case["exchange"] != "stock":
        plan = PlacementPlan.read(case["plan"]) if case["plan"] else None
        section = {"dispatch": {"exchange": case["exchange"]}}
        moe_locality.apply(model, section, plan=plan, topology=topology)
    model.moe.set_deepspeed_parallelism()
    return model


def tokens(ids: np.ndarray, sizes: dict[str, int]) -> torch.Tensor:
    """[T, D] tokens whose gate picks ``ids [T, K]``, the first with the highest score."""
    picked = torch.from_numpy(ids.astype(np.int64))
    x = torch.randn(len(picked), sizes["width"]) * 0.1
    x[:, : sizes["experts"]] = 0
    x.scatter_(1, picked, torch.linspace(6, 3, picked.shape[1]).expand(picked.shape))
    return x.requires_grad_()


def timed(model: nn.Module, x: torch.Tensor) -> float:
    """Seconds of a forward and backward until the slowest rank is done. Collective."""
    dist.barrier()
    start = time.perf_counter()
    model(x).square().mean().backward()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def main() -> None:
    avoid_cpu_jit()
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=300))
    torch.set_num_threads(1)
    given = json.loads(Path(sys.argv[-3]).read_text())
    batches, sizes = np.load(sys.argv[-2]), given["sizes"]
    topology = discover_topology()
    prepare_groups(topology, [dist.get_world_size()])
    models = [build(case, sizes, topology) for case in given["cases"]]
    seconds: list[list[float]] = [[] for _ in models]
    for step in range(given["warmup"] + given["rounds"]):
        for case, model, found in zip(given["cases"], models, seconds, strict=True):
            ids = batches[case["homes"]]
            x = tokens(ids[step % len(ids), dist.get_rank()], sizes)
            took = timed(model, x)
            if step >= given["warmup"]:
                found.append(took)
    if dist.get_rank() == 0:
        Path(sys.argv[-1]).write_text(json.dumps(seconds))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
