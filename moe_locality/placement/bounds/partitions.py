"""Set partitions of a few items into at most so many blocks, and the steps of their block count."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Partitions:
    """All set partitions of ``k`` items: blocks as bit masks, one partition after the other."""

    k: int
    blocks: np.ndarray  # [B] int64 bit masks
    starts: np.ndarray  # [partitions + 1] where each begins in ``blocks``
    sizes: np.ndarray  # [2^k] items of a mask

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        return self.blocks, self.starts

    @property
    def work(self) -> int:
        """Multiplications to weigh all partitions once, and to sum over the masks of a pair."""
        return 2 * len(self.blocks) + 8 * 2**self.k

    def counts(self) -> np.ndarray:
        """[partitions, 2]: (co-located pairs, blocks) of each."""
        sizes = self.sizes[self.blocks]
        pairs = np.add.reduceat(sizes * (sizes - 1) // 2, self.starts[:-1])
        return np.stack([pairs, np.diff(self.starts)], axis=1)

    def slope_at(self, share: float) -> float:
        """Blocks lost per co-located pair where ``share`` of all pairs are co-located.

        The slope of the lower convex hull of (pairs, blocks) over the partitions.
        """
        lines = hull_slopes(self.counts())
        if not len(lines):
            return 0.0
        pairs = share * self.k * (self.k - 1) / 2
        values = [self.intercept(c) - c * pairs for c in lines]
        return float(lines[int(np.argmax(values))])

    def intercept(self, slope: float) -> float:
        """The largest a with blocks >= a - slope x pairs for every partition."""
        pairs, blocks = self.counts().T
        return float((blocks + slope * pairs).min())


def partition_counts(k: int, most_blocks: int, most_items: int) -> np.ndarray:
    """[N, 2] the different (co-located pairs, blocks) over partitions of k items."""
    found = {
        (sum(size * (size - 1) // 2 for size in sizes), len(sizes))
        for sizes in _sizes(k, most_blocks, min(k, most_items))
    }
    return np.array(sorted(found))


def _sizes(k: int, most_blocks: int, largest: int) -> Iterator[tuple[int, ...]]:
    if k == 0:
        yield ()
    elif most_blocks > 0:
        for size in range(min(k, largest), 0, -1):
            for rest in _sizes(k - size, most_blocks - 1, size):
                yield (size, *rest)


def hull_slopes(points: np.ndarray) -> np.ndarray:
    """Falling slopes (as positive numbers) of the lower convex hull of (pairs, blocks)."""
    best: dict[int, int] = {}
    for pairs, blocks in points.tolist():
        best[pairs] = min(blocks, best.get(pairs, blocks))
    hull: list[tuple[int, int]] = []
    for x, y in sorted(best.items()):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            hull.pop()
        hull.append((x, y))
    steps = itertools.pairwise(hull)
    slopes = [(y0 - y1) / (x1 - x0) for (x0, y0), (x1, y1) in steps]
    return np.array([s for s in slopes if s > 0])


@lru_cache(maxsize=64)
def set_partitions(k: int, most_blocks: int, most_items: int) -> Partitions:
    """Partitions of k items into at most ``most_blocks`` blocks of at most ``most_items`` items."""
    blocks: list[int] = []
    starts = [0]
    for partition in _partitions(k, most_blocks, most_items, 0, []):
        blocks += partition
        starts.append(len(blocks))
    return Partitions(
        k=k,
        blocks=np.array(blocks, dtype=np.int64),
        starts=np.array(starts, dtype=np.int64),
        sizes=np.array([bin(mask).count("1") for mask in range(2**k)], dtype=np.int64),
    )


def _partitions(
    k: int, most_blocks: int, most_items: int, item: int, blocks: list[int]
) -> Iterator[list[int]]:
    if item == k:
        yield list(blocks)
        return
    for index in range(len(blocks)):
        if bin(blocks[index]).count("1") < most_items:
            blocks[index] |= 1 << item
            yield from _partitions(k, most_blocks, most_items, item + 1, blocks)
            blocks[index] ^= 1 << item
    if len(blocks) < most_blocks:
        blocks.append(1 << item)
        yield from _partitions(k, most_blocks, most_items, item + 1, blocks)
        blocks.pop()
