"""Reading a trace piece by piece, for sums over traces that are larger than memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from moe_locality.errors import TraceError
from moe_locality.trace.merge import settings
from moe_locality.trace.npz import read_npz
from moe_locality.trace.schema import RoutingTrace
from moe_locality.trace.shards import (
    missing_sequences,
    read_shard,
    replaced_since,
    shard_files,
)

Progress = Callable[[int, int, str], None]


def read_pieces(
    path: str | os.PathLike[str], *, max_bytes: int, progress: Progress | None = None
) -> Iterator[RoutingTrace]:
    """Yield a trace directory as traces of some rows and some layers each.

    Every (row, layer) is in exactly one piece. Repeated tokens and tokens that a pipeline stage
    lacks are not looked for, as ``read_trace`` does: that needs all rows at once.

    Args:
        max_bytes: about what the per-layer columns of a piece may take, as read and as decoded; a
            piece has at least one layer of one shard.
        progress: called with (pieces done, pieces in all, name of the shard).

    Raises:
        TraceError: nothing is there, a shard is damaged, missing in a sequence, or does not fit the
            first one.
    """
    place = Path(path)
    if place.suffix == ".npz" and not place.is_dir():
        yield read_npz(place)
        return
    files = shard_files(place) if place.is_dir() else {}
    shards = list(files)
    if not shards:
        raise TraceError(
            f"found no part-*.parquet shard at {place}, expected a directory of shards or an .npz "
            "file: check the path"
        )
    if missing := missing_sequences(shards):
        raise TraceError(
            f"found no shard {missing[0]} in {place}, though a later one of this rank is there: "
            "restore it, or read what is left with read_trace(strict=False)"
        )
    work = _plan_pieces(shards, max_bytes)
    for done, (shard, layers) in enumerate(work):
        if progress is not None:
            progress(done, len(work), shard.name)
        piece = read_shard(shard, layers)[0]
        if replaced_since({shard: files[shard]}):
            raise TraceError(
                f"found that shard {shard} was replaced while the trace was being read, expected "
                "it to stay: read it when the program that writes it is done"
            )
        yield piece
    if progress is not None:
        progress(len(work), len(work), "")


def _plan_pieces(shards: list[Path], max_bytes: int) -> list[tuple[Path, tuple[int, ...]]]:
    """(shard, layers) of each piece; the shards are checked against each other on the way."""
    work: list[tuple[Path, tuple[int, ...]]] = []
    first: RoutingTrace | None = None
    layer_sets: set[frozenset[int]] = set()
    for shard in shards:
        head, meta = read_shard(shard, ())
        first = first or head
        if settings(head)[:3] != settings(first)[:3] or meta.top_k != _top_k(shards[0]):
            raise TraceError(
                f"found that shard {shard} does not fit {shards[0].name}: {settings(head)[:3]}, "
                f"expected {settings(first)[:3]} (model, kind, experts) and the same top_k: a "
                "directory holds one trace; move the shard away"
            )
        own = frozenset(meta.layer_ids)
        if any(own != other and own & other for other in layer_sets):
            raise TraceError(
                f"found that shard {shard} has layers {sorted(own)}, expected those of another "
                "shard or none of them: move the shard away"
            )
        layer_sets.add(own)
        width = 2 * meta.top_k if meta.kind == "tokens" else 8 * meta.num_experts
        if any(name.startswith("expert_weights") for name in meta.columns):
            width *= 2
        step = max(max_bytes // max(2 * width * head.num_rows, 1), 1)
        ids = meta.layer_ids
        work += [(shard, ids[start : start + step]) for start in range(0, len(ids), step)]
    return work


def _top_k(shard: Path) -> int:
    return read_shard(shard, ())[1].top_k
