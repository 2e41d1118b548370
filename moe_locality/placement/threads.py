"""Compiled loops over layers in plain threads, one per processor that this process may use.

A compiled parallel loop would start OpenMP threads, and a process that has those must not fork.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def over_layers(
    fill: Callable[[int, int], object],
    num_layers: int,
    *,
    least: int = 1,
) -> None:
    """Call ``fill(first, last)`` so that every layer is in one call, in several threads.

    ``fill`` must release the interpreter lock (``nogil``) to gain from it, and write nothing that
    belongs to other layers; then the number of threads changes no result.

    Args:
        least: layers per thread below which another thread is not worth starting.
    """
    count = max(min(processors(), num_layers // max(least, 1)), 1)
    if count == 1:
        fill(0, num_layers)
        return
    edges = [num_layers * i // count for i in range(count + 1)]
    with ThreadPoolExecutor(count) as pool:
        jobs = [pool.submit(fill, *edge) for edge in itertools.pairwise(edges)]
        for job in jobs:
            job.result()


def map_layers(one: Callable[[int], Result], num_layers: int) -> list[Result]:
    """``one(layer)`` of every layer, in order, computed in several threads as in ``over_layers``;
    a thread that is done takes the next layer.
    """
    count = max(min(processors(), num_layers), 1)
    if count == 1:
        return [one(layer) for layer in range(num_layers)]
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(num_layers)))


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
