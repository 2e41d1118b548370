"""What the recorder costs a training step on this machine, against the same step without it.

    python benchmarks/recorder_overhead.py [--rounds 15] [--csv benchmarks/results.csv]

A decoder-like model of stock DeepSpeed MoE layers trains in one process. Blocks of steps with and
without hooks alternate (A B B A), so that other load on the machine hits both. A round gives the
ratio of its two halves; the figure is the median over the rounds, with the range of their middle
half.

Two clocks: wall time, and CPU time of the whole process, which other load disturbs less and which
charges the writer thread in full, as if it never ran beside the model. Writing is charged too:
every block of steps ends with ``flush()``. Nothing here is simulated.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from _results import append_rows, table_path
from deepspeed.moe.layer import MoE
from torch import nn

from moe_locality.trace.recorder import RoutingRecorder, annotate


class Block(nn.Module):
    """Causal attention and an MoE layer, each with a residual and a norm before it."""

    def __init__(self, width: int, heads: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        expert = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.moe = MoE(
            width,
            expert,
            num_experts=num_experts,
            k=top_k,
            drop_tokens=False,
            top2_2nd_expert_sampling=False,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.moe(self.norms[1](x))[0]


class Decoder(nn.Module):
    """Embedding, blocks, logits."""

    def __init__(self, width: int, layers: int, num_experts: int, top_k: int, vocab: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, 4, num_experts, top_k) for _ in range(layers))
        self.head = nn.Linear(width, vocab)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Step times with and without recorder by one clock, and the ratio with/without per round."""

    clock: str
    without_us: float
    with_us: float
    ratios: tuple[float, ...]

    @property
    def overhead_percent(self) -> float:
        return 100 * (statistics.median(self.ratios) - 1)

    @property
    def range_percent(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.ratios, n=4)
        return 100 * (low - 1), 100 * (high - 1)

    def __str__(self) -> str:
        low, high = self.range_percent
        return (
            f"{self.clock}: step {self.without_us / 1e3:.1f} ms without, "
            f"{self.with_us / 1e3:.1f} ms with recorder, overhead {self.overhead_percent:+.2f} % "
            f"(middle half of {len(self.ratios)} rounds {low:+.2f} to {high:+.2f} %)"
        )


def decoder_step(options: argparse.Namespace) -> tuple[nn.Module, Callable[[], None]]:
    """The model and a function that runs one training step of it."""
    torch.manual_seed(options.seed)
    model = Decoder(options.width, options.layers, options.experts, options.top_k, 512)
    batch = options.tokens // options.sequence
    ids = torch.randint(0, 512, (batch, options.sequence + 1))

    def loss_of() -> torch.Tensor:
        logits = model(ids[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return model, training_step(model, batch, loss_of)


def demo_step(options: argparse.Namespace) -> tuple[nn.Module, Callable[[], None]]:
    """The same for the model of examples/train_lm.py."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from lm.model import build_model, preset

    config = preset("demo")
    options.sequence = config.max_seq_len
    options.layers, options.width = config.num_layers, config.width
    options.experts, options.top_k = config.num_experts, config.top_k
    model = build_model(config, seed=options.seed)
    torch.manual_seed(options.seed)
    batch = options.tokens // options.sequence
    ids = torch.randint(0, config.vocab_size, (batch, options.sequence + 1))
    return model, training_step(model, batch, lambda: model(ids[:, :-1], ids[:, 1:]).loss)


def training_step(
    model: nn.Module, batch: int, loss_of: Callable[[], torch.Tensor]
) -> Callable[[], None]:
    """One labelled forward, backward and AdamW step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    counter = iter(range(10**9))

    def step() -> None:
        first = next(counter) * batch
        with annotate(request_ids=range(first, first + batch), domains="text", stage="train"):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(
    model: nn.Module, step: Callable[[], None], recorder: RoutingRecorder, rounds: int, steps: int
) -> list[Result]:
    """Alternate blocks of ``steps`` steps with and without hooks, in rounds of A B B A."""

    def timed(recorded: bool) -> list[float]:
        handle = recorder.attach(model) if recorded else None
        begin = [clock() for clock in CLOCKS.values()]
        for _ in range(steps):
            step()
            if recorded:
                recorder.step()
        if recorded:
            recorder.flush()
        seconds = [clock() - b for clock, b in zip(CLOCKS.values(), begin, strict=True)]
        if handle is not None:
            handle.detach()
        return [s / steps for s in seconds]

    for recorded in (False, True):
        timed(recorded)
    plain, with_hooks = [], []
    for round_index in range(rounds):
        order = (False, True, True, False) if round_index % 2 else (True, False, False, True)
        times = [(recorded, timed(recorded)) for recorded in order]
        plain.append([sum(t) / 2 for t in zip(*(t for r, t in times if not r), strict=True)])
        with_hooks.append([sum(t) / 2 for t in zip(*(t for r, t in times if r), strict=True)])
    return [
        Result(
            clock=name,
            without_us=1e6 * statistics.median(p[i] for p in plain),
            with_us=1e6 * statistics.median(w[i] for w in with_hooks),
            ratios=tuple(w[i] / p[i] for p, w in zip(plain, with_hooks, strict=True)),
        )
        for i, name in enumerate(CLOCKS)
    ]


def rows(options: argparse.Namespace, result: Result) -> Iterator[dict[str, str]]:
    """Lines of results.csv for one clock."""
    low, high = result.range_percent
    common = {
        "benchmark": "recorder_overhead",
        "case": (
            f"{options.model} T={options.tokens} L={options.layers} D={options.width} "
            f"E={options.experts} K={options.top_k}{' weights' if options.weights else ''}"
        ),
        "kind": "measured",
        "baseline": "same step without recorder",
        "note": (
            f"{torch.get_num_threads()} threads; "
            f"median of {options.rounds} rounds A B B A of {options.steps} steps; middle half "
            f"{low:+.2f} to {high:+.2f} %; load average {os.getloadavg()[0]:.1f}"
        ),
    }
    for metric, value, unit in (
        (f"overhead_{result.clock}", f"{result.overhead_percent:.2f}", "%"),
        (f"step_without_{result.clock}", f"{result.without_us:.0f}", "us"),
        (f"step_with_{result.clock}", f"{result.with_us:.0f}", "us"),
    ):
        yield {**common, "metric": metric, "value": value, "unit": unit}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["decoder", "demo"], default="decoder")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per step")
    parser.add_argument("--sequence", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--weights", action="store_true", help="record the router weights too")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="steps per block")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-tokens", type=int, default=16_384)
    parser.add_argument("--out", help="directory of the recorded trace (default: temporary)")
    parser.add_argument("--csv", type=table_path, help="table to append the figures to")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    model, step = {"decoder": decoder_step, "demo": demo_step}[options.model](options)
    with tempfile.TemporaryDirectory() as folder:
        recorder = RoutingRecorder(
            options.out or folder,
            model="recorder_overhead",
            weights=options.weights,
            shard_tokens=options.shard_tokens,
            strict=True,
        )
        results = measure(model, step, recorder, options.rounds, options.steps)
        report = recorder.close()
    expected = (2 * options.rounds + 1) * options.steps * options.tokens
    if report.recorded_tokens != expected or report.dropped_tokens:
        raise SystemExit(f"found {report.recorded_tokens} tokens recorded, expected {expected}")
    for result in results:
        print(result)
        if options.csv:
            append_rows(options.csv, rows(options, result), packages=("torch", "deepspeed"))


if __name__ == "__main__":
    main()
