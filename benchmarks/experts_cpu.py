"""Experts on the CPU: grouped matrix products against the loop, forward and backward.

    python benchmarks/experts_cpu.py [--csv benchmarks/results.csv]

SwiGLU experts, rows spread unevenly. The two take turns, so a busy machine hurts both; the figure
is the median of the ratios of neighbors. It decides what ``experts: auto`` means on a CPU.
"""

import argparse
import statistics
import time

import torch
from _results import RESULTS, append_rows, table_path
from torch import nn

from moe_locality.layer.experts import run_experts

CASES = [(16, 96, 64, 4096), (4, 96, 64, 1024), (8, 512, 256, 2048), (64, 256, 128, 2048)]
"""experts, width, expert width, rows; the first is the example model's"""
ROUNDS = 15


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def seconds(experts: nn.Module, rows: torch.Tensor, counts: tuple[int, ...], mode: str) -> float:
    start = time.perf_counter()
    out = run_experts(experts, rows, counts, mode)  # pyright: ignore[reportArgumentType]
    out.backward(rows)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=table_path, default=RESULTS)
    options = parser.parse_args()
    from deepspeed.moe.experts import Experts

    found = []
    for num_experts, width, hidden, num_rows in CASES:
        torch.manual_seed(0)
        experts = Experts(SwiGLU(width, hidden), num_experts)
        share = torch.rand(num_experts).square()
        picks = torch.multinomial(share, num_rows, replacement=True)
        counts = tuple(torch.bincount(picks, minlength=num_experts).tolist())
        rows = torch.randn(num_rows, width, requires_grad=True)
        for mode in ("loop", "grouped"):
            seconds(experts, rows, counts, mode)
        pairs = [
            (seconds(experts, rows, counts, "loop"), seconds(experts, rows, counts, "grouped"))
            for _ in range(ROUNDS)
        ]
        ratio = statistics.median(loop / grouped for loop, grouped in pairs)
        best_us = [1e6 * min(times) for times in zip(*pairs, strict=True)]
        case = f"{num_experts} experts, {width} x {hidden}, {num_rows} rows, float32"
        print(f"{case}: loop {best_us[0]:.0f} us, grouped {best_us[1]:.0f} us, ratio {ratio:.2f}")
        common = {"benchmark": "experts_cpu", "case": case, "kind": "measured"}
        found += [
            {**common, "metric": "loop, best", "value": round(best_us[0]), "unit": "us"},
            {**common, "metric": "grouped, best", "value": round(best_us[1]), "unit": "us"},
            {
                **common,
                "metric": "speed of grouped, median of pairs",
                "value": round(ratio, 3),
                "unit": "x",
                "baseline": "loop",
                "note": f"{torch.get_num_threads()} threads",
            },
        ]
    append_rows(options.csv, found, packages=("torch", "deepspeed"))


if __name__ == "__main__":
    main()
