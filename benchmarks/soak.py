"""Train for a thousand steps and see that nothing grows: memory, file descriptors, groups, threads.

A small model with two MoE layers, four gloo ranks as two nodes of two, the hierarchical exchange,
ZeRO 1, the recorder on, other numbers of tokens in every step. Sampled on every rank every
``steps / 20`` steps; growth is the median of the last quarter of samples less that of the second
quarter (the first is warm-up).

    python benchmarks/soak.py [--steps 1000] [--csv benchmarks/results.csv]
"""

import argparse
import ctypes
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
RANKS, EXPERTS, WIDTH = 4, 8, 64
SAMPLES = 20
MEASURES = ("rss_kib", "descriptors", "groups", "threads")


def build(folder: Path, world: int) -> Any:
    import moe_locality

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            expert = nn.Sequential(
                nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
            )
            sizes: dict[str, Any] = {"num_experts": EXPERTS, "ep_size": world, "k": 2}
            self.moe = nn.ModuleList(
                moe_locality.MoE(WIDTH, expert, drop_tokens=False, **sizes) for _ in range(2)
            )

        def forward(self, x):
            for layer in self.moe:
                x = x + layer(x)[0]
            return x.square().mean()

    torch.manual_seed(0)
    net = Net()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "moe_locality": {
            "dispatch": {"exchange": "hierarchical"},
            "cluster": {"num_nodes": 2, "ranks_per_node": world // 2},
            "trace": {"path": str(folder / "trace"), "shard_tokens": 512, "ring_tokens": 4096},
        },
    }
    parameters = list(net.parameters())
    return moe_locality.initialize(model=net, model_parameters=parameters, config=config)[0]


def sample() -> dict[str, int]:
    """What this process holds now."""
    import psutil
    from torch.distributed import distributed_c10d

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back: RSS is what is held
    process = psutil.Process()
    return {
        "rss_kib": process.memory_info().rss // 1024,
        "descriptors": process.num_fds(),
        "groups": len(distributed_c10d._world.pg_map),
        "threads": process.num_threads(),
    }


def train_and_sample(rank: int, world: int, steps: int, folder: Path, leak: Any = None) -> Any:
    """Return the samples of this rank and the seconds of the training, on ``world`` ranks (even).

    ``leak(step)`` is called in every step: for tests, which must see a leak.
    """
    engine = build(folder, world)
    generator = torch.Generator().manual_seed(rank)
    samples, start = [], time.perf_counter()
    for step in range(steps):
        tokens = int(torch.randint(0, 200, (), generator=generator))
        engine.backward(engine(torch.randn(tokens, WIDTH, generator=generator)).nan_to_num())
        engine.step()
        if leak is not None:
            leak(step)
        if (step + 1) % (steps // SAMPLES) == 0:
            samples.append(sample())
    seconds = time.perf_counter() - start
    engine.moe_locality.close()
    return samples, seconds


def growth(samples: list[dict[str, int]]) -> dict[str, float]:
    """How much each measure grew from the second quarter of the samples to the last."""
    quarter = len(samples) // 4
    second, last = samples[quarter : 2 * quarter], samples[-quarter:]
    return {
        name: statistics.median(s[name] for s in last) - statistics.median(s[name] for s in second)
        for name in MEASURES
    }


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tests.launch import run_ranks

    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--csv", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(
            train_and_sample, RANKS, chosen.steps, Path(folder), deepspeed=True, timeout_s=3600
        )
    rows = []
    for name in MEASURES:
        worst = max(growth(samples)[name] for samples, _ in found)
        first, last = (max(samples[i][name] for samples, _ in found) for i in (0, -1))
        print(f"{name}: {first} -> {last}, growth {worst:g}")
        unit = "KiB" if name == "rss_kib" else name
        note = "worst rank; last quarter of the samples less the second"
        rows.append({"metric": f"growth of {name}", "value": worst, "unit": unit, "note": note})
    seconds = max(seconds for _, seconds in found)
    print(f"{chosen.steps} steps in {seconds:.0f} s")
    if chosen.csv is not None:
        from _results import append_rows

        case = f"{chosen.steps} steps, {RANKS} gloo ranks as 2 x 2, ZeRO 1, recorder on"
        common = {"benchmark": "soak", "case": case, "kind": "measured"}
        append_rows(chosen.csv, [common | row for row in rows], packages=("torch", "deepspeed"))


if __name__ == "__main__":
    main()
