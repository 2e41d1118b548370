"""One price of imbalance for all layers, found by trying.

Steps of a call follow one another, so what imbalance costs adds up over the layers. Searching all
of them for the fewest copies plus one price times the imbalance to expect is what makes them share
the allowed imbalance best (Everett, Operations Research 11, 1963).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from moe_locality.placement.threads import map_layers

FIRST_PRICE = 2.0
"""Copies per token that an imbalance higher by one is worth; ``STEP`` the factor to the next one
while the price is not known to lie between two.
"""
STEP = 4.0
_LEAST = 0.01  # from where to go up after no price at all


def under_one_price(
    search: Callable[[int, float, int], float],
    allowed: Sequence[float],
    rounds: int,
    *,
    first: float = FIRST_PRICE,
    threads: int | None = None,
) -> float:
    """Search all layers at prices that come nearer to the mean imbalance allowed.

    Args:
        search: called with (place of a layer, price, round), by several threads; returns the
            imbalance to expect of what it found.
        allowed: imbalance of each layer.

    Returns:
        the price that would come next.
    """
    target, price = float(np.mean(allowed)) - 1, first
    known: list[tuple[float, float]] = []

    def one(place: int) -> float:
        return search(place, price, len(known))

    for _ in range(rounds):
        levels = map_layers(one, len(allowed), threads=threads)
        known.append((price, float(np.mean(levels)) - 1))
        price = next_price(known, target)
    return price


def next_price(known: Sequence[tuple[float, float]], target: float) -> float:
    """The price to try next for an imbalance of 1 + ``target``.

    ``known``: (price, imbalance less one) so far; between two prices that the target lies between,
    both are taken for powers of each other.
    """
    low = [(price, level) for price, level in known if level > target]
    high = [(price, level) for price, level in known if level <= target]
    if not low:
        price, level = min(high)
        return 0.0 if level * STEP < target else price / STEP
    if not high:
        return max(max(low)[0], _LEAST) * STEP
    (p, x), (q, y) = max(low), min(high)
    if p <= 0 or y <= 0 or target <= 0 or p >= q:
        return (p + q) / 2
    share = np.log(x / target) / np.log(x / y)
    return float(p * (q / p) ** min(max(share, 0.1), 0.9))
