"""Train or serve for long and see that nothing grows: memory, file descriptors, groups, threads.

A small model with two MoE layers, four gloo ranks as two nodes of two, the hierarchical exchange.
Training: ZeRO 1, the recorder on, other numbers of tokens in every step. Serving (``--serving``,
with minutes): requests of mixed lengths without end, homes predicted, grouped by experts, moved to
their homes. Sampled on every rank 20 times; growth is the median of the last quarter of samples
less that of the second quarter (the first is warm-up). It fails where anything grows.

    python benchmarks/soak.py [--steps 1000 | --serving 10] [--csv benchmarks/results.csv]
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

import numpy as np
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
RANKS, EXPERTS, WIDTH = 4, 8, 64
SAMPLES = 20
RSS_KIB = 8 * 1024
"""What allocators still take in the second half."""
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
            engine.moe_locality.recorder.flush()  # no shard is open while files are counted
            samples.append(sample())
    seconds = time.perf_counter() - start
    engine.moe_locality.close()
    return samples, seconds


def serve_and_sample(rank: int, world: int, seconds: float, folder: Path, leak: Any = None) -> Any:
    """As :func:`train_and_sample`, for so many seconds of serving; also the requests served."""
    import os

    import torch.distributed as dist
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
    from transformers.distributed import DistributedConfig

    import moe_locality
    from moe_locality.serving import Engine, Limits, SamplingParams
    from tests.unit.made_trace import make_trace

    os.environ["MOE_LOCALITY_RANKS_PER_NODE"] = str(world // 2)
    if rank == 0:
        make: Any = Qwen3MoeConfig
        config = make(
            vocab_size=64, hidden_size=WIDTH, moe_intermediate_size=WIDTH, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=EXPERTS,
            num_experts_per_tok=2, max_position_embeddings=256,
        )  # fmt: skip
        Qwen3MoeForCausalLM(config).save_pretrained(folder / "model")
    dist.barrier()
    trace = make_trace(num_experts=EXPERTS, num_layers=2).evolve(layer_ids=np.arange(2))
    cluster = moe_locality.ClusterTopology.uniform(2, world // 2)
    plan = moe_locality.solve(trace, cluster, homes="joint")
    moe_locality.register({"dispatch": {"exchange": "hierarchical"}})
    spread = DistributedConfig(fsdp_size=world, ep_size=world, ep_implementation="moe_locality")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=spread)
    model = moe_locality.apply(model, plan=plan)
    samples, start, steps = [], time.perf_counter(), 0

    def watch(counts: dict[str, Any]) -> None:
        nonlocal steps
        steps = counts["step"]
        if leak is not None:
            leak(steps)
        if time.perf_counter() - start > seconds * (len(samples) + 1) / SAMPLES:
            samples.append(sample())

    draw = np.random.default_rng(rank)

    def requests() -> Any:
        while time.perf_counter() - start < seconds:
            prompt = draw.integers(0, 64, draw.integers(1, 48)).tolist()
            yield {"prompt_token_ids": prompt, "max_tokens": int(draw.integers(1, 32))}

    limits = Limits(max_num_seqs=8, max_num_batched_tokens=64, max_num_ready=4)
    engine = Engine(
        model, limits=limits, homes="predicted", plan=plan, grouping="experts", on_step=watch
    )
    params = SamplingParams(temperature=0, ignore_eos=True)
    served = sum(one.error is None for one in engine.generate(requests(), params))
    engine.close()
    return samples[:SAMPLES], time.perf_counter() - start, served


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
    parser.add_argument("--steps", type=int, default=1000, help="of training")
    parser.add_argument("--serving", type=float, help="serve for so many minutes instead")
    parser.add_argument("--csv", type=Path)
    chosen = parser.parse_args()
    program, amount = train_and_sample, chosen.steps
    if chosen.serving:
        program, amount = serve_and_sample, 60 * chosen.serving
    with tempfile.TemporaryDirectory() as folder:
        found = run_ranks(program, RANKS, amount, Path(folder), deepspeed=True, timeout_s=3600)
    rows, grown = [], []
    for name in MEASURES:
        worst = max(growth(one[0])[name] for one in found)
        first, last = (max(one[0][i][name] for one in found) for i in (0, -1))
        print(f"{name}: {first} -> {last}, growth {worst:g}")
        if worst > (RSS_KIB if name == "rss_kib" else 0):
            grown.append(name)
        unit = "KiB" if name == "rss_kib" else name
        note = "worst rank; last quarter of the samples less the second"
        rows.append({"metric": f"growth of {name}", "value": worst, "unit": unit, "note": note})
    seconds = max(one[1] for one in found)
    done = f"{chosen.steps} steps"
    if chosen.serving:
        done = f"serving, {chosen.serving:g} minutes, {sum(one[2] for one in found)} requests"
    print(f"{done} in {seconds:.0f} s")
    if chosen.csv is not None:
        from _results import append_rows

        more = "homes predicted, grouped" if chosen.serving else "ZeRO 1, recorder on"
        case = f"{done}, {RANKS} gloo ranks as 2 x 2, {more}"
        common = {"benchmark": "soak", "case": case, "kind": "measured"}
        append_rows(chosen.csv, [common | row for row in rows], packages=("torch", "deepspeed"))
    if grown:
        sys.exit(f"these grew: {', '.join(grown)}")


if __name__ == "__main__":
    main()
