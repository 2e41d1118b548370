"""The pieces of ``train_lm.py``: sizes of a run, DeepSpeed's configuration, engine, training loop.

The loop is an ordinary DeepSpeed loop. What moe_locality adds is one context manager, ``annotate``,
around the forward pass, and ``recorder.step()`` after it.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .data import Requests


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSizes:
    """What a preset trains and evaluates on."""

    steps: int
    per_rank: int
    """requests of a rank and step"""
    train_per_domain: int
    held_out_per_domain: int
    lr: float


RUN_SIZES = {
    "tiny": RunSizes(steps=4, per_rank=4, train_per_domain=64, held_out_per_domain=16, lr=3e-3),
    "demo": RunSizes(steps=120, per_rank=4, train_per_domain=960, held_out_per_domain=96, lr=5e-3),
}

MODEL_NAME = "example-lm"


def rank_and_size() -> tuple[int, int]:
    """Return (rank, number of ranks), also without a launcher."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def ds_config(path: str | None, sizes: RunSizes, steps: int) -> dict[str, Any]:
    """Return the ds_config of a file, or the default one of the example.

    The default switches gradient clipping off (DeepSpeed clips at 1.0 where nothing is said):
    without ZeRO, its fp32 clip norm depends on which rank holds which expert
    (deepspeedai/DeepSpeed issue 8475), and a placement must not change the training.
    """
    config: dict[str, Any] = {
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": sizes.lr,
                "betas": [0.9, 0.95],
                "weight_decay": 0.0,
                "torch_adam": True,
            },
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {
                "total_num_steps": max(steps, 2),
                "warmup_num_steps": max(min(steps // 10, 100), 1),
                "cos_min_ratio": 0.1,
            },
        },
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 0},
    }
    if path is not None:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    config.setdefault("train_micro_batch_size_per_gpu", sizes.per_rank)
    config.setdefault("gradient_accumulation_steps", 1)
    config.setdefault("steps_per_print", 10**9)
    if config["gradient_accumulation_steps"] != 1:
        raise ValueError(
            f"gradient_accumulation_steps is {config['gradient_accumulation_steps']}: the loop of"
            " this example takes 1"
        )
    return config


def build_engine(model: torch.nn.Module, config: dict[str, Any], layer: str) -> Any:
    """Return the DeepSpeed engine: through moe_locality for its own layer, plain otherwise."""
    if layer == "locality":
        import moe_locality as front
    else:
        import deepspeed as front
    parameters = [p for p in model.parameters() if p.requires_grad]
    return front.initialize(model=model, model_parameters=parameters, config=config)[0]


def annotated(batch: Requests, stage: str) -> Any:
    """Label the tokens of a forward pass for whatever records it."""
    import moe_locality

    return moe_locality.annotate(
        request_ids=batch.request_id, domains=batch.domain_names(), stage=stage
    )


def as_tensors(batch: Requests, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (input, target) tokens, both [B, S] int64."""
    tokens = torch.from_numpy(batch.tokens.astype("int64")).to(device)
    return tokens[:, :-1], tokens[:, 1:]


def train(
    engine: Any,
    batches: Iterable[Requests],
    *,
    first_step: int,
    recorder_of: Callable[[int], Any],
    metrics: "Metrics",
    after_step: Callable[[int, Requests, torch.Tensor, Any], None] = lambda *_: None,
) -> None:
    """Train on the batches after ``first_step``; ``recorder_of(step)`` is its recorder or None.

    ``after_step`` is called with (step, batch, targets, output) of every step.
    """
    for step, batch in enumerate(batches, first_step + 1):
        start = time.perf_counter()
        recorder = recorder_of(step)
        inputs, targets = as_tensors(batch, engine.device)
        with annotated(batch, "train"):
            output = engine(inputs, targets)
        engine.backward(output.loss)
        engine.step()
        if recorder is not None:
            recorder.step()
        loss, aux = all_reduced_mean([output.lm_loss, output.aux_loss])
        metrics.step(
            step,
            loss=loss,
            aux_loss=aux,
            tokens=targets.numel() * rank_and_size()[1],
            step_s=time.perf_counter() - start,
        )
        after_step(step, batch, targets, output)


def all_reduced_mean(values: list[torch.Tensor]) -> list[float]:
    """Return the means over all ranks."""
    joined = torch.stack([value.detach().float() for value in values])
    if dist.is_initialized():
        dist.all_reduce(joined)
    return (joined / rank_and_size()[1]).tolist()


class Metrics:
    """Rank 0's lines ``progress DONE TOTAL TEXT`` on stdout, and a file with an object per step.

    ``total`` counts training steps and batches of the evaluation.
    """

    def __init__(self, path: str, *, total: int, append: bool, every: int = 5) -> None:
        self.start = time.perf_counter()
        self.total, self.done, self.every = total, 0, every
        self.file = None
        if rank_and_size()[0] == 0:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a" if append else "w", encoding="utf-8")  # noqa: SIM115

    def step(self, step: int, **values: float) -> None:
        """Report a training step."""
        self.write(kind="step", step=step, time_s=time.perf_counter() - self.start, **values)
        self.advance(f"step {step} loss {values['loss']:.3f}")

    def advance(self, text: str) -> None:
        """Report one unit of work, on stdout every few."""
        self.done += 1
        shown = self.done % self.every == 0 or self.done in (1, self.total)
        if shown and rank_and_size()[0] == 0:
            elapsed = time.perf_counter() - self.start
            print(f"progress {self.done} {self.total} {text}, {elapsed:.1f} s", flush=True)

    def write(self, **values: Any) -> None:
        """Append one object to the file (rank 0)."""
        if self.file is not None:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def share_cores() -> None:
    """Divide the cores among the ranks of this machine, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
