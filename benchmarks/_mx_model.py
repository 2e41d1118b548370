"""The example model of the format benchmark: trained, evaluated, with its experts rounded."""

import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_locality.quantization import fake_quantize

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

ACTIVATION_ROWS = 512
"""rows of inputs kept per expert and linear layer"""


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
