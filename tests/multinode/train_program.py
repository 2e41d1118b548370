"""Run on every rank by the launcher: an MoE layer of ours, forward and backward, and what it cost.

``wire OUT``: each exchange for a few steps, with a trace; rank 0 writes OUT/result.json.
``until-broken OUT``: steps without end; each writes its number to OUT/step. A rank writes what the
package logs to OUT/log-RANK, and its error to OUT/error-RANK.
"""

import json
import logging
import os
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

import moe_locality
from moe_locality.compat import avoid_cpu_jit, end_distributed

EXPERTS, TOP_K, WIDTH = 8, 4, 512
TOKENS, STEPS = 192, 3
LIMIT_S = 20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        expert = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.moe = nn.ModuleList(
            deepspeed.moe.layer.MoE(
                WIDTH,
                expert,
                num_experts=EXPERTS,
                ep_size=int(os.environ["WORLD_SIZE"]),
                k=TOP_K,
                drop_tokens=False,
            )
            for _ in range(2)
        )

    def forward(self, x):
        for layer in self.moe:
            out, _, _ = layer(x)
            x = x + out
        return x.square().mean()


def start(exchange: str, trace: Path, accumulation: int = 1):
    section = {"dispatch": {"exchange": exchange}, "trace": {"path": str(trace)}}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "moe_locality": section,
    }
    net = Net()
    return moe_locality.initialize(
        model=net, model_parameters=list(net.parameters()), config=config
    )[0]


def tokens(step: int) -> torch.Tensor:
    """A rank's tokens: other numbers of them on other ranks."""
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(TOKENS + 16 * rank, WIDTH, generator=generator)
    return x.requires_grad_()  # so that the first layer sends as much back as the others


def link_bytes() -> int:
    """What this node's link carried out and in, as its kernel counted."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, values = line.partition(":")
        if name.strip() == "eth0":
            return int(values.split()[8])
    raise RuntimeError("found no eth0 on this node")


def node_bytes() -> dict[str, int]:
    """What each node's link has sent, by host name, the same on all ranks. Collective."""
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (socket.gethostname(), link_bytes()))
    return dict(everyone)


def measure(exchange: str, out: Path) -> dict:
    # accumulating for longer than we run: no gradient of a replica crosses the links meanwhile
    engine = start(exchange, out / f"trace-{exchange}", accumulation=STEPS + 1)
    dist.barrier()
    before = node_bytes()
    begin = time.perf_counter()
    for step in range(STEPS):
        engine.backward(engine(tokens(step)))
    dist.barrier()
    seconds = time.perf_counter() - begin
    after = node_bytes()
    found = {
        "wire": {name: after[name] - before[name] for name in after},
        "traffic": engine.moe_locality.traffic_report(),
        "topology": engine.moe_locality.topology.to_dict(),
        "seconds": seconds,
    }
    engine.moe_locality.close()
    return found


def wire(out: Path) -> None:
    found = {exchange: measure(exchange, out) for exchange in ("flat", "hierarchical")}
    if dist.get_rank() == 0:
        (out / "result.json").write_text(json.dumps(found))
    dist.barrier()


def until_broken(out: Path) -> None:
    steps, rank = 100_000, dist.get_rank()
    logging.getLogger("moe_locality").addHandler(logging.FileHandler(out / f"log-{rank}"))
    # no gradient of a replica crosses the links: what breaks off is an exchange of the layer
    engine = start("hierarchical", out / "trace", accumulation=steps + 1)
    try:
        for step in range(steps):
            engine.backward(engine(tokens(step)))
            engine.step()
            if rank == 0:
                (out / "step").write_text(str(step))
    except Exception:
        whole = out / f"error-{rank}"
        whole.with_suffix(".part").write_text(traceback.format_exc())
        whole.with_suffix(".part").rename(whole)
        engine.moe_locality.close()
        sys.stdout.flush()
        os._exit(3)  # the backend's threads may still wait for the node that is gone


def main() -> None:
    avoid_cpu_jit()
    deepspeed.init_distributed(
        dist_backend="gloo",
        timeout=timedelta(seconds=LIMIT_S if "until-broken" in sys.argv else 120),
    )
    torch.set_num_threads(1)
    what, out = sys.argv[-2], Path(sys.argv[-1])
    {"wire": wire, "until-broken": until_broken}[what](out)
    end_distributed()


if __name__ == "__main__":
    main()
