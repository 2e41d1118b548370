"""What a recorder finds out when it is made: rank, request numbers, a writable directory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from moe_locality.errors import TraceError
from moe_locality.trace.parquet import next_sequence


def default_rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def default_first_request_id(directory: Path, rank: int) -> int:
    """Bits 48-62 rank, 32-47 run (by the shards that are there), 0-31 requests of this run."""
    return (rank % 2**15) * 2**48 + (next_sequence(directory, rank) % 2**16) * 2**32


def check_writable(directory: Path) -> None:
    """Write a file and remove it: where a disk is read-only or full, that fails here and now."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".probe-") as file:
            file.write(b"moe_locality")
            file.flush()
    except OSError as error:
        raise TraceError(
            f"found that nothing can be written to {directory} ({error.strerror}), expected a "
            "writable directory with free space: give another path"
        ) from error
