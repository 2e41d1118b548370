"""Loss and logits of every held-out request, so that two runs can be compared request by request.

The file is an .npz with one row per request, sorted by ``request_id``: ``request_id`` int64 [N],
``domain_id`` int32 [N], ``rank`` int32 [N] (the one that computed it), ``loss`` float32 [N] (mean
over the tokens), ``last_logits`` float32 [N, V], ``logits_digest`` (BLAKE2b of all the request's
logits, 16 hex digits) and ``domains``. Dropless routing without sampling makes the logits of a
request independent of its batch, up to the order of sums inside matrix products.
"""

import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .data import Requests
from .training import annotated, as_tensors, rank_and_size

ROWS = ("request_id", "domain_id", "rank", "loss", "last_logits", "logits_digest")


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
            with annotated(batch, stage):
                output = engine(inputs, targets)
            if recorder is not None:
                recorder.step()
            rows.append(_rows(batch, output))
            after_batch()
    engine.train()
    return _gathered(rows)


def _rows(batch: Requests, output: Any) -> dict[str, np.ndarray]:
    logits = output.logits.float().cpu().numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in logits]
    return {
        "request_id": batch.request_id,
        "domain_id": batch.domain_id,
        "rank": np.full(len(batch), rank_and_size()[0], dtype=np.int32),
        "loss": output.sequence_loss.float().cpu().numpy(),
        "last_logits": logits[:, -1].copy(),
        "logits_digest": np.array(digests),
    }


def _gathered(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray] | None:
    rank, size = rank_and_size()
    parts: list[Any] = [rows]
    if dist.is_initialized():
        parts = [None] * size
        dist.gather_object(rows, parts if rank == 0 else None, dst=0)
    if rank != 0:
        return None
    flat = [row for part in parts for row in part]
    order = np.argsort(np.concatenate([row["request_id"] for row in flat]), kind="stable")
    return {name: np.concatenate([row[name] for row in flat])[order] for name in ROWS}


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
