"""Low-bit formats: signal to noise on made and real tensors, and perplexity of the example model.

    python benchmarks/mx.py [--seeds 0 1 2] [--steps 300] [--csv benchmarks/results.csv]

Trains the example model (preset ``demo``), one per seed, where ``--checkpoints`` has none, and
keeps it there. Signal to noise (QSNR, dB, 10 log10(sum x^2 / sum (x - x')^2) over a tensor) on
Gaussian, Laplace and Student-t numbers (the Gaussian also over an octave of scales), on the weights
of the trained experts (mean of the dB of all matrices) and on the inputs of their linear layers
(held-out text). Perplexity per byte on the held-out text with the expert MLPs rounded to the
format: weights alone (W4A16), and weights and inputs of every linear layer (W4A4). The table is
that of the first seed; the steps from format to format are compared request by request over the
models of all seeds. Everything is computed, so all rows are measured; nothing here is a time. A
model takes three minutes of a core to train, the rest about ten.
"""

import argparse
import copy
import itertools
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _results import RESULTS, append_rows
from torch import Tensor, nn

from moe_locality.quantization import FORMATS, fake_quantize

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

SAMPLE = (1024, 1024)
ACTIVATION_ROWS = 512
"""rows of inputs kept per expert and linear layer"""
STEPS = ["mxfp4", "mxfp4-16", "mxfp4-16-oas", "mxfp4-mbs-s", "mxfp4-mbs-h", "nvfp4"]
"""the order of arXiv 2603.08713, table 2: each is compared with the one before, by request"""
WEIGHTS_ONLY = ("mxfp4-mbs-d",)
"""searched, so too slow for the inputs of a running model: MBS-H is what uses it"""
STORED = ("mxfp4-mbs-h", "mxfp8")
KINDS = {"W4A16": False, "W4A4": True}
"""whether inputs are rounded, too"""
OCTAVE = 8
"""scales 2^(i/8) of the Gaussian numbers: where a block's maximum lands is no chance then"""


def qsnr_db(x: Tensor, rounded: Tensor) -> float:
    """Return the signal-to-noise ratio of a rounded tensor."""
    noise = (x.double() - rounded.double()).square().sum()
    return float(10 * torch.log10(x.double().square().sum() / noise))


# ---- the model ----------------------------------------------------------------------------------


def start_one_rank() -> None:
    """A process group of one: DeepSpeed's MoE layer asks for it."""
    from moe_locality.compat import avoid_cpu_jit

    avoid_cpu_jit()
    import deepspeed

    store = f"file://{tempfile.mkdtemp()}/store"
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    deepspeed.init_distributed(
        dist_backend="gloo", init_method=store, rank=0, world_size=1, verbose=False
    )


def trained_model(
    checkpoint: Path, steps: int, seed: int, held_out_per_domain: int | None = None
) -> tuple[nn.Module, Any]:
    """Return the example model and its held-out requests; train it where the file is absent."""
    from lm import data
    from lm.model import build_model, preset
    from lm.training import RUN_SIZES

    import moe_locality

    sizes, config = RUN_SIZES["demo"], preset("demo")
    model = build_model(config, moe_locality.MoE, seed=seed)
    train_set, held_out = data.build_requests(
        seq_len=config.max_seq_len,
        train_per_domain=sizes.train_per_domain,
        held_out_per_domain=held_out_per_domain or sizes.held_out_per_domain,
        seed=seed,
    )
    if checkpoint.exists():
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
    else:
        train(model, train_set, steps, sizes.lr, seed)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), checkpoint)
    return model.eval(), held_out


def train(model: nn.Module, requests: Any, steps: int, lr: float, seed: int) -> None:
    """AdamW with the demo's settings and its global batch of 16 requests."""
    from lm import data
    from lm.training import as_tensors

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warm, 0.1 + 0.45 * (1 + math.cos(math.pi * min(1, s / steps)))),
    )
    batches = data.train_batches(requests, rank=0, num_ranks=1, per_rank=16, steps=steps, seed=seed)
    for step, batch in enumerate(batches, 1):
        inputs, targets = as_tensors(batch, torch.device("cpu"))
        output = model(inputs, targets)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"  step {step} of {steps}: loss {output.lm_loss.item():.3f}", flush=True)


@torch.no_grad()
def request_losses(model: nn.Module, requests: Any) -> Tensor:
    """Return the mean loss of every request, in nats per byte."""
    from lm.training import as_tensors

    losses = []
    for first in range(0, len(requests), 32):
        inputs, targets = as_tensors(requests.take(slice(first, first + 32)), torch.device("cpu"))
        losses.append(model(inputs, targets).sequence_loss)
    return torch.cat(losses).double()


def perplexity(losses: Tensor) -> float:
    """Per byte, over all held-out requests."""
    return math.exp(float(losses.mean()))


def expert_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Return the linear layers of all experts."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "deepspeed_experts" in name
    ]


# ---- rounding the experts -----------------------------------------------------------------------


@contextmanager
def rounded_experts(model: nn.Module, name: str, *, inputs: bool) -> Iterator[None]:
    """Round the weights of all experts to a format, and their inputs too if asked for."""
    linears = [linear for _, linear in expert_linears(model)]
    kept = [linear.weight.data for linear in linears]
    hooks = []
    for linear in linears:
        linear.weight.data = fake_quantize(linear.weight.data, name, role="weight")
        if inputs:
            hooks.append(linear.register_forward_pre_hook(_round_input(name)))
    try:
        yield
    finally:
        for linear, weight in zip(linears, kept, strict=True):
            linear.weight.data = weight
        for hook in hooks:
            hook.remove()


def rounded_losses(model: nn.Module, requests: Any, name: str, *, inputs: bool) -> Tensor:
    """Return the losses with the weights of the experts rounded to a format, and their inputs."""
    with rounded_experts(model, name, inputs=inputs):
        return request_losses(model, requests)


def _round_input(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        return (fake_quantize(args[0], name, role="activation"), *args[1:])

    return hook


@torch.no_grad()
def expert_inputs(model: nn.Module, requests: Any) -> list[Tensor]:
    """Return the inputs of every linear layer of the experts on some held-out text."""
    found: dict[str, list[Tensor]] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda module, args, name=name: found.setdefault(name, []).append(
                args[0].flatten(0, -2)
            )
        )
        for name, linear in expert_linears(model)
    ]
    request_losses(model, requests.take(slice(0, 96)))
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts)[:ACTIVATION_ROWS] for parts in found.values()]


# ---- the table ----------------------------------------------------------------------------------


def made_tensors(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        "Gaussian": torch.randn(SAMPLE),
        "Laplace": torch.distributions.Laplace(0.0, 1.0).sample(SAMPLE),
        "Student-t, 4 degrees": torch.distributions.StudentT(4.0).sample(SAMPLE),
        "Student-t, 3 degrees": torch.distributions.StudentT(3.0).sample(SAMPLE),
    }


def kurtosis(x: Tensor) -> float:
    """Return the fourth standardized moment: 3 for Gaussian numbers, more for heavier tails."""
    x = x.double() - x.double().mean()
    return float(x.pow(4).mean() / x.square().mean().square())


def octave(x: Tensor) -> dict[str, dict[str, float]]:
    """Return the signal to noise of each 4-bit format over an octave of scales of ``x``."""
    found = {}
    for name in STEPS:
        if name == "mxfp4-mbs-h":  # S or D, and the search of D takes long
            continue
        scaled = [x * 2 ** (i / OCTAVE) for i in range(OCTAVE)]
        values = [qsnr_db(y, fake_quantize(y, name, role="activation")) for y in scaled]
        found[f"{name}, Gaussian, an octave of scales"] = {
            "QSNR, mean": statistics.fmean(values),
            "QSNR, least": min(values),
            "QSNR, largest": max(values),
        }
    return found


Losses = dict[tuple[str, str], Tensor]
"""losses of every request by (W4A16 or W4A4, format)"""


def table(model: nn.Module, held_out: Any, seed: int) -> tuple[dict[str, dict[str, float]], Losses]:
    """Return ``{format: {column: value}}`` and the losses.

    The row ``float32`` has the unrounded perplexity.
    """
    made = made_tensors(seed)
    weights = [linear.weight.data for _, linear in expert_linears(model)]
    inputs = [x for x in expert_inputs(model, held_out) if len(x) and bool(x.any())]
    real = {"weights": ("weight", weights), "activations": ("activation", inputs)}
    unrounded = perplexity(request_losses(model, held_out))
    rows = {"float32": {f"{kind} perplexity": unrounded for kind in KINDS}}
    for kind, x in made.items():
        rows["float32"][f"{kind} kurtosis"] = kurtosis(x)
    for kind, (_, tensors) in real.items():
        rows["float32"][f"{kind} kurtosis"] = statistics.fmean(map(kurtosis, tensors))
    losses: Losses = {}
    for name in FORMATS:
        row = {
            f"{kind} QSNR": qsnr_db(x, fake_quantize(x, name, role="weight"))
            for kind, x in made.items()
        }
        for kind, (role, tensors) in real.items():
            row[f"{kind} QSNR"] = statistics.fmean(
                qsnr_db(x, fake_quantize(x, name, role=role)) for x in tensors
            )
        for kind, inputs_too in KINDS.items():
            if inputs_too and name in WEIGHTS_ONLY:
                continue
            losses[kind, name] = rounded_losses(model, held_out, name, inputs=inputs_too)
            row[f"{kind} perplexity"] = perplexity(losses[kind, name])
        rows[name] = row
        print(f"  {name}", flush=True)
    return rows, losses


def step_losses(model: nn.Module, held_out: Any) -> Losses:
    """Return the losses of the formats of ``STEPS`` alone."""
    return {
        (kind, name): rounded_losses(model, held_out, name, inputs=inputs)
        for kind, inputs in KINDS.items()
        for name in STEPS
    }


def steps_between(of_seeds: dict[int, Losses]) -> dict[str, dict[str, float]]:
    """Return the loss of each format over the one before, request by request over all seeds.

    The half-width of the 95 % interval is 1.96 standard errors of the mean over all requests; the
    means of the models are there too, since requests of one model are not independent of it.
    """
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        for before, name in itertools.pairwise(STEPS):
            parts = {s: all_[kind, name] - all_[kind, before] for s, all_ in of_seeds.items()}
            pooled = torch.cat(list(parts.values()))
            row = found.setdefault(f"{name} minus {before}", {})
            row[f"{kind} loss difference"] = float(pooled.mean())
            row[f"{kind} loss difference, half of the 95 % interval"] = float(
                1.96 * pooled.std() / len(pooled) ** 0.5
            )
            for seed, part in parts.items():
                row[f"{kind} loss difference, seed {seed}"] = float(part.mean())
    return found


def stored(model: nn.Module, held_out: Any) -> dict[str, dict[str, float]]:
    """Return bytes and perplexity of the model with its experts in the store."""
    from moe_locality.layer.expert_store import store_experts

    found = {}
    for name in STORED:
        copied = copy.deepcopy(model)
        report = store_experts(copied, name)
        found[f"experts stored in {name}"] = {
            "bytes before": float(report.bytes_before),
            "bytes after": float(report.bytes_after),
            "perplexity": perplexity(request_losses(copied, held_out)),
        }
    return found


def print_table(rows: dict[str, dict[str, float]]) -> None:
    columns = list(dict.fromkeys([*rows["mxfp4"], *rows["float32"]]))
    print("| format | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in rows.items():
        cells = [f"{row[c]:.{4 if 'perpl' in c else 2}f}" if c in row else "" for c in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")


def csv_rows(rows: dict[str, dict[str, float]], options: Any, count: int) -> list[dict[str, Any]]:
    note = (
        f"example model, preset demo, {options.steps} steps, one process; expert MLPs only; seeds "
        f"{' '.join(map(str, options.seeds))}, {count} held-out requests of each; table: first seed"
    )
    return [
        {
            "benchmark": "mx",
            "case": name,
            "metric": column,
            "value": round(value, 6),
            "unit": _unit(column),
            "kind": "measured",
            "baseline": name.partition(" minus ")[2] or "float32",
            "note": note,
        }
        for name, row in rows.items()
        for column, value in row.items()
    ]


def _unit(column: str) -> str:
    known = {"QSNR": "dB", "loss": "nats per byte", "bytes": "bytes", "kurtosis": "none"}
    return next((unit for word, unit in known.items() if word in column), "per byte")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/mx"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", type=int, default=192, help="requests per domain")
    parser.add_argument("--csv", type=Path, default=RESULTS)
    options = parser.parse_args()
    start_one_rank()
    losses: dict[int, Losses] = {}
    rows: dict[str, dict[str, float]] = {}
    more: dict[str, dict[str, float]] = {}
    count = 0
    for seed in options.seeds:
        path = options.checkpoints / f"model{seed}.pt"
        model, held_out = trained_model(path, options.steps, seed, options.held_out)
        count = len(held_out)
        if not rows:
            rows, losses[seed] = table(model, held_out, seed)
            print_table(rows)
            more = {**octave(made_tensors(seed)["Gaussian"]), **stored(model, held_out)}
        else:
            losses[seed] = step_losses(model, held_out)
    more |= steps_between(losses)
    for name, row in more.items():
        print(f"{name}: " + ", ".join(f"{column} {value:.6g}" for column, value in row.items()))
    rows |= more
    append_rows(options.csv, csv_rows(rows, options, count), packages=("torch", "deepspeed"))


if __name__ == "__main__":
    main()
