"""Loss, logits and routing of every request, so that two runs can be compared request by request.

The file is an .npz with one row per request, sorted by ``request_id``: ``request_id`` int64 [N],
``domain_id`` int32 [N], ``rank`` int32 [N] (the one that computed it), ``loss`` float32 [N] (mean
over the tokens), ``token_loss`` float32 [N, S], ``last_logits`` float32 [N, V], ``logits_digest``
(BLAKE2b of all the request's logits, 16 hex digits), ``domains``, ``picks`` int16 [N, S, L, K] (the
experts of each token, ascending) and ``gap`` float32 [N, S, L] (by how much the router's logit of
the last pick exceeds that of the best expert that was not picked). Dropless routing without
sampling makes the logits of a request independent of its batch, up to the order of sums inside
matrix products; that order decides picks only where ``gap`` is at the level of rounding.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from .data import Requests
from .training import annotated, as_tensors, rank_and_size


def evaluate_requests(
    engine: Any,
    batches: Iterable[Requests],
    *,
    recorder: Any = None,
    stage: str = "prefill",
    after_batch: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray] | None:
    """Run the batches of every rank through the model and return the rows of all ranks on rank 0.

    Collective over the default group: every rank calls it with as many batches.
    """
    rows: list[dict[str, np.ndarray]] = []
    engine.eval()
    with torch.no_grad():
        for batch in batches:
            inputs, targets = as_tensors(batch, engine.device)
            with annotated(batch, stage), watched_gates(engine) as routing:
                output = engine(inputs, targets)
            if recorder is not None:
                recorder.step()
            rows.append(rows_of(batch, targets, output, routing))
            after_batch()
    engine.train()
    return gathered(rows)


@contextmanager
def watched_gates(model: torch.nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Collect (picks [T, K], gaps [T]) of every DeepSpeed gate, layer by layer, of a forward."""
    from deepspeed.moe.sharded_moe import TopKGate

    from moe_locality.trace.recorder.hooks import read_deepspeed_gate

    found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(gate: Any, inputs: tuple, output: Any) -> None:
        ids = read_deepspeed_gate(output, gate.k, False).ids.detach()
        with torch.no_grad():
            logits = F.linear(inputs[0].float(), gate.wg.weight.float())  # in any order of experts
        best = F.pad(logits, (0, 1), value=-torch.inf).topk(gate.k + 1).values
        found.append((ids.sort(dim=1).values, best[:, -2] - best[:, -1]))

    gates = [module for module in model.modules() if isinstance(module, TopKGate)]
    hooks = [gate.register_forward_hook(look) for gate in gates]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def rows_of(
    batch: Requests,
    targets: torch.Tensor,
    output: Any,
    routing: list[tuple[torch.Tensor, torch.Tensor]],
) -> dict[str, np.ndarray]:
    """Return the rows of this rank's batch: ``output`` of the model for ``targets`` [B, S]."""
    logits = output.logits.detach().float()
    token_loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    logits = logits.cpu().numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in logits]
    shape = tuple(targets.shape)
    picks = [ids.reshape(*shape, -1).to(torch.int16) for ids, _ in routing]
    gaps = [gap.reshape(shape) for _, gap in routing]
    return {
        "request_id": batch.request_id,
        "domain_id": batch.domain_id,
        "rank": np.full(len(batch), rank_and_size()[0], dtype=np.int32),
        "loss": output.sequence_loss.float().cpu().numpy(),
        "token_loss": token_loss.cpu().numpy(),
        "last_logits": logits[:, -1].copy(),
        "logits_digest": np.array(digests),
        "picks": _stacked(picks, (*shape, 0, 0), np.int16),
        "gap": _stacked(gaps, (*shape, 0), np.float32),
    }


def _stacked(layers: list[torch.Tensor], empty: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Layers behind one another on the third axis; ``empty`` for a dense model."""
    if not layers:
        return np.zeros(empty, dtype=dtype)
    return torch.stack(layers, dim=2).cpu().numpy().astype(dtype)


def gathered(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray] | None:
    """Join the rows of all ranks on rank 0, sorted by ``step`` (where they have it) and request.

    Collective over the default group; every rank has at least one batch.
    """
    rank, size = rank_and_size()
    parts: list[Any] = [rows]
    if dist.is_initialized():
        parts = [None] * size
        dist.gather_object(rows, parts if rank == 0 else None, dst=0)
    if rank != 0:
        return None
    flat = [row for part in parts for row in part]
    joined = {name: np.concatenate([row[name] for row in flat]) for name in flat[0]}
    order = np.lexsort((joined["request_id"], joined.get("step", joined["request_id"])))
    return {name: values[order] for name, values in joined.items()}


def write_evaluation(rows: dict[str, np.ndarray], domains: tuple[str, ...], path: Path) -> None:
    """Write the rows as .npz, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as file:
        np.savez_compressed(file, domains=np.array(domains), **rows)
    os.replace(partial, path)


def read_evaluation(path: str | Path) -> dict[str, np.ndarray]:
    """Read what ``write_evaluation`` wrote."""
    with np.load(path) as content:
        return {name: content[name] for name in content.files}


def loss_by_domain(rows: dict[str, np.ndarray], domains: tuple[str, ...]) -> dict[str, float]:
    """Return the mean loss of each domain."""
    return {
        name: float(rows["loss"][rows["domain_id"] == i].mean())
        for i, name in enumerate(domains)
        if (rows["domain_id"] == i).any()
    }


def compare_evaluations(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> dict[str, Any]:
    """Compare two evaluations of the same requests.

    Returns the largest difference of a request's loss and of a last logit, and how many requests
    have logits that agree to the last bit.

    Raises:
        ValueError: they do not hold the same requests.
    """
    if not np.array_equal(a["request_id"], b["request_id"]):
        raise ValueError(
            f"the evaluations hold {len(a['request_id'])} and {len(b['request_id'])} requests that"
            " are not the same: evaluate both runs with the same seed and preset"
        )
    return {
        "requests": len(a["request_id"]),
        "max_loss_difference": float(np.abs(a["loss"] - b["loss"]).max()),
        "max_logit_difference": float(np.abs(a["last_logits"] - b["last_logits"]).max()),
        "requests_bitwise_equal": int((a["logits_digest"] == b["logits_digest"]).sum()),
    }
