"""Low-bit formats: signal to noise on made and real tensors, and perplexity of the example model.

    python benchmarks/mx.py [--seeds 0 1 2] [--steps 300] [--csv benchmarks/results.csv]

Trains the example model (preset ``demo``), one per seed, where ``--checkpoints`` has none, and
keeps it there. Signal to noise (QSNR, dB, 10 log10(sum x^2 / sum (x - x')^2) over a tensor) on
Gaussian, Laplace and Student-t numbers (the Gaussian also over an octave of scales), on the weights
of the trained experts (mean of the dB of all matrices) and on the inputs of their linear layers
(held-out text). Perplexity per byte on the held-out text with the expert MLPs rounded to the
format: weights alone (W4A16), and weights and inputs of every linear layer (W4A4). The table is
that of the first seed; the steps from format to format are compared request by request over the
models of all seeds. What is computed is kept beside the checkpoints, so a run that was cut off goes
on: delete the folder to begin anew. Everything is computed, so all rows are measured; nothing here
is a time. A model takes three minutes of a core to train, the rest about ten.
"""

import argparse
import copy
import itertools
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _mx_model import (
    expert_inputs,
    expert_linears,
    perplexity,
    request_losses,
    rounded_losses,
    start_one_rank,
    trained_model,
)
from _results import RESULTS, append_rows, table_path
from torch import Tensor, nn

from moe_locality.quantization import FORMATS, fake_quantize

SAMPLE = (1024, 1024)
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


def kept(path: Path, compute: Callable[[], Any]) -> Any:
    """Return what the file holds, or compute it and keep it there."""
    if not path.exists():
        value = compute()
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(value, partial)
        partial.replace(path)
    return torch.load(path, weights_only=True)


def losses_of(model: nn.Module, held_out: Any, name: str, kind: str, folder: Path) -> Tensor:
    """Return the losses with the experts rounded to a format, W4A16 or W4A4."""
    return kept(
        folder / f"{len(held_out)}-{kind}-{name}.pt",
        lambda: rounded_losses(model, held_out, name, inputs=KINDS[kind]),
    )


def signal_to_noise(name: str, made: dict[str, Tensor], real: dict[str, Any]) -> dict[str, float]:
    """Return the QSNR of a format on made tensors, and its mean over real ones."""
    row = {
        f"{kind} QSNR": qsnr_db(x, fake_quantize(x, name, role="weight"))
        for kind, x in made.items()
    }
    for kind, (role, tensors) in real.items():
        row[f"{kind} QSNR"] = statistics.fmean(
            qsnr_db(x, fake_quantize(x, name, role=role)) for x in tensors
        )
    return row


def shrinkage(name: str, real: dict[str, Any]) -> dict[str, float]:
    """Return by how much rounding shrinks real tensors: 1 - sum(x x') / sum(x^2), over all."""
    row = {}
    for kind, (role, tensors) in real.items():
        pairs = [(x.double(), fake_quantize(x, name, role=role).double()) for x in tensors]
        kept_share = sum(float((x * y).sum()) for x, y in pairs)
        row[f"{kind} shrinkage"] = 1 - kept_share / sum(float((x * x).sum()) for x, _ in pairs)
    return row


def table(
    model: nn.Module, held_out: Any, seed: int, folder: Path
) -> tuple[dict[str, dict[str, float]], Losses]:
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
        row = kept(
            folder / f"{len(held_out)}-QSNR-{name}.pt",
            lambda name=name: signal_to_noise(name, made, real),
        )
        row |= kept(
            folder / f"{len(held_out)}-shrinkage-{name}.pt",
            lambda name=name: shrinkage(name, real),
        )
        for kind, inputs_too in KINDS.items():
            if inputs_too and name in WEIGHTS_ONLY:
                continue
            losses[kind, name] = losses_of(model, held_out, name, kind, folder)
            row[f"{kind} perplexity"] = perplexity(losses[kind, name])
        rows[name] = row
        print(f"  {name}", flush=True)
    return rows, losses


def step_losses(model: nn.Module, held_out: Any, folder: Path) -> Losses:
    """Return the losses of the formats of ``STEPS`` alone."""
    return {
        (kind, name): losses_of(model, held_out, name, kind, folder)
        for kind in KINDS
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
        cells = [f"{row[c]:.{2 if 'QSNR' in c else 4}f}" if c in row else "" for c in columns]
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
    known = {
        "QSNR": "dB",
        "loss": "nats per byte",
        "bytes": "bytes",
        "kurtosis": "none",
        "shrinkage": "none",
    }
    return next((unit for word, unit in known.items() if word in column), "per byte")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/mx"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held-out", type=int, default=192, help="requests per domain")
    parser.add_argument("--csv", type=table_path, default=RESULTS)
    options = parser.parse_args()
    start_one_rank()
    losses: dict[int, Losses] = {}
    rows: dict[str, dict[str, float]] = {}
    more: dict[str, dict[str, float]] = {}
    count = 0
    for seed in options.seeds:
        folder = options.checkpoints / f"seed{seed}-steps{options.steps}"
        path = folder / "model.pt"
        model, held_out = trained_model(path, options.steps, seed, options.held_out)
        count = len(held_out)
        if not rows:
            rows, losses[seed] = table(model, held_out, seed, folder)
            print_table(rows)
            more = kept(
                folder / f"{count}-more.pt",
                lambda model=model, held_out=held_out, seed=seed: {
                    **octave(made_tensors(seed)["Gaussian"]),
                    **stored(model, held_out),
                },
            )
        else:
            losses[seed] = step_losses(model, held_out, folder)
    more |= steps_between(losses)
    for name, row in more.items():
        print(f"{name}: " + ", ".join(f"{column} {value:.6g}" for column, value in row.items()))
    rows |= more
    append_rows(options.csv, csv_rows(rows, options, count), packages=("torch", "deepspeed"))


if __name__ == "__main__":
    main()
