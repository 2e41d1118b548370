"""Lower bounds on the nodes that tokens touch, from a semidefinite relaxation of the partition.

Vertices are the experts of a layer and, where homes are given, one pin per node; a placement is a
0/1 matrix Y (Y_ij = 1: same node). Y is positive semidefinite with unit diagonal and row sums m,
the vertices of a node, so that Y = (m/n) J + V X V' with 0 <= X <= m I and tr X = n - m, where the
columns of V span the complement of the ones (Donath and Hoffman 1973; Rendl and Wolkowicz 1995).
The nodes that a token touches are not linear in Y. Every token pattern t therefore has its own
prices w_t on the pairs of its vertices, and over the set partitions p of the pattern

    touched(t) >= min_p (blocks(p) + <w_t, Y_p>) - <w_t, Y_t>

holds for any prices. With multipliers for unit diagonal, Y >= 0, fixed pairs and node loads the
rest is one eigenvalue problem. So *any* multipliers give a bound; the primal-dual iteration
(Chambolle and Pock 2011) only looks for good ones, and its accuracy does not touch validity.

Shapes: n vertices, M nodes, m = n/M, P patterns, k vertices of a pattern, q = k(k-1)/2 pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from moe_locality.placement.count_kernels import compiled
from moe_locality.placement.search.load_noise import falling_hull

SMOOTHING, _LEAST_SMOOTHING = 0.15, 0.01
_AT_ONCE = 10  # rounds of one smoothing
_LONGEST_STEP = 400.0
_DIAGONALS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
ROUNDING = 1e-12  # relative; double-precision sums and eigenvalues here are exact to about 1e-14


@dataclass(frozen=True, slots=True, kw_only=True)
class Patterns:
    """Different sets of ``k`` vertices and how many tokens have each."""

    members: np.ndarray  # [P, k] rising vertex numbers
    tokens: np.ndarray  # [P] float64
    partitions: Partitions

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.members, self.tokens, self.partitions.blocks, self.partitions.starts


@dataclass(frozen=True, slots=True, kw_only=True)
class Relaxation:
    """One layer to bound, per token: ``share`` turns counts of tokens into shares."""

    num_vertices: int
    num_nodes: int
    groups: tuple[Patterns, ...]
    num_tokens: int
    cost: np.ndarray  # [n, n] symmetric: <cost, Y> is added to what the patterns touch
    fixed: np.ndarray  # [n, n]: 0 or 1 where a pair is known (the diagonal is), else nan
    load: np.ndarray  # [n] load of each vertex, mean 1
    most_load: float  # per node; inf: no cap

    @property
    def node_size(self) -> int:
        return self.num_vertices // self.num_nodes

    @property
    def work_per_round(self) -> float:
        """Elementary steps of one round, roughly: eigenvectors, then the patterns."""
        patterns = sum(len(g.tokens) * (g.partitions.work + 64) for g in self.groups)
        return 4.0 * self.num_vertices**3 + 2e5 + patterns


@dataclass(slots=True)
class Prices:
    """The multipliers (and the primal iterate): the state of the iteration."""

    pairs: list[np.ndarray]  # per group [P, q] float64
    scale: list[np.ndarray]  # per group [P], the last minimum: keeps exponentials in range
    fixed: np.ndarray  # [n, n] diagonal and fixed pairs: any sign; other pairs: <= 0 (Y >= 0)
    load: np.ndarray  # [n] >= 0
    primal: np.ndarray  # [n, n]
    ahead: np.ndarray  # [n, n] extrapolated primal


def start_prices(problem: Relaxation) -> Prices:
    """Prices from the co-located pairs alone: the slope of the block counts where all is even.

    The diagonal is the best of a few multiples of the row sums of the cost (1: the Laplacian).
    """
    n = problem.num_vertices
    even = (problem.node_size - 1) / max(n - 1, 1)
    pairs = []
    for group in problem.groups:
        k = group.members.shape[1]
        slope = group.partitions.slope_at(even)
        pairs.append(np.full((len(group.tokens), k * (k - 1) // 2), slope))
    cost, _ = _least_touched(problem, pairs)
    primal = np.full((n, n), even)
    np.fill_diagonal(primal, 1.0)
    prices = Prices(
        pairs=pairs,
        scale=[np.zeros(len(g.tokens)) for g in problem.groups],
        fixed=np.zeros((n, n)),
        load=np.zeros(n),
        primal=primal,
        ahead=primal.copy(),
    )
    across = _complement(n)
    rows = cost.sum(axis=1)
    values = []
    for multiple in _DIAGONALS:
        inner, whole = across.T @ (cost - np.diag(multiple * rows)) @ across, multiple * rows.sum()
        lowest = np.linalg.eigvalsh(inner)[: problem.num_nodes - 1].sum()
        values.append(problem.node_size * (lowest - whole / n) + whole)
    prices.fixed = -np.diag(_DIAGONALS[int(np.argmax(values))] * rows)
    return prices


def improve(problem: Relaxation, prices: Prices, rounds: int, *, smoothing: float) -> None:
    """``rounds`` primal-dual steps on ``prices``, in place. ``smoothing``: temperature of the soft
    minimum over partitions that gives a pattern's direction; larger is smoother and faster at
    first, smaller is more accurate.
    """
    share = 1.0 / problem.num_tokens
    step_up, step_down = steps_of(problem, smoothing)
    for _ in range(rounds):
        cost = problem.cost.copy()
        for group, w, scale in zip(problem.groups, prices.pairs, prices.scale, strict=True):
            part = np.zeros_like(cost)
            _move_prices(*group.arrays, prices.ahead, w, scale, smoothing, step_up, part)
            cost -= 0.5 * share * part
        descend(problem, prices, cost, step_down)


def cooled(
    rounds: int, smoothing: float = SMOOTHING, cooling: float = 0.985
) -> Iterator[tuple[range, float]]:
    """Yield some rounds after the other, and their falling smoothing."""
    for done in range(0, rounds, _AT_ONCE):
        at = max(smoothing * cooling**done, _LEAST_SMOOTHING)
        yield range(done, min(done + _AT_ONCE, rounds)), at


def steps_of(problem: Relaxation, smoothing: float) -> tuple[float, float]:
    """Lengths of the steps of the prices of patterns, and of the primal."""
    counts = 2 * np.abs(problem.cost) * problem.num_tokens
    for group in problem.groups:
        add_pairs(counts, group.members, group.tokens)
    # largest share of the tokens that pick one pair: the squared norm of the price operator
    heaviest_pair = max(float(counts.max()) / problem.num_tokens, 1e-6)
    step_up = 2.0 * smoothing
    return step_up, min(0.5 / (step_up * heaviest_pair), _LONGEST_STEP)


def descend(problem: Relaxation, prices: Prices, cost: np.ndarray, step_down: float) -> None:
    """One step of the primal, and of the prices that no pattern has; ``cost`` [n, n] is changed."""
    across = _complement(problem.num_vertices)
    known = ~np.isnan(problem.fixed)
    target = np.where(known, problem.fixed, 0.0)
    moved = prices.fixed + 0.25 / step_down * (prices.ahead - target)
    prices.fixed = np.where(known, moved, np.minimum(moved, 0.0))
    if np.isfinite(problem.most_load):
        over = prices.ahead @ problem.load - problem.most_load
        norm = max(float(problem.load @ problem.load), 1e-30)
        prices.load = np.maximum(prices.load + 0.5 / step_down / norm * over, 0.0)
        cost += _row_cost(prices.load, problem.load)
    primal = _project(prices.primal - step_down * (cost + prices.fixed), across, problem.node_size)
    prices.ahead = 2 * primal - prices.primal
    prices.primal = primal


def certify(problem: Relaxation, prices: Prices) -> float:
    """The bound that the prices prove: nodes touched per token, rounding errors taken off."""
    return close(problem, prices, *_least_touched(problem, prices.pairs))


def _least_touched(problem: Relaxation, pairs: list[np.ndarray]) -> tuple[np.ndarray, float]:
    """(cost [n, n] of Y under prices on the pairs of each pattern, least touched with them)."""
    cost, tokens, share = problem.cost.copy(), 0.0, 1.0 / problem.num_tokens
    for group, w in zip(problem.groups, pairs, strict=True):
        part = np.zeros_like(cost)
        tokens += _lowest(*group.arrays, w, part)
        cost -= 0.5 * share * part
    return cost, tokens * share


def close(problem: Relaxation, prices: Prices, cost: np.ndarray, touched: float) -> float:
    """The bound: ``touched``, what patterns prove at a ``cost`` [n, n] of pairs, and the rest."""
    n, size, nodes = problem.num_vertices, problem.node_size, problem.num_nodes
    known = ~np.isnan(problem.fixed)
    fixed = np.where(known, prices.fixed, np.minimum(prices.fixed, 0.0))
    fixed = (fixed + fixed.T) / 2
    constant = -float((fixed * np.where(known, problem.fixed, 0.0)).sum())
    matrix = cost + fixed
    if np.isfinite(problem.most_load):
        over = np.maximum(prices.load, 0.0)
        matrix = matrix + _row_cost(over, problem.load)
        constant -= float(over.sum()) * problem.most_load
    across = _complement(n)
    values = np.linalg.eigvalsh(across.T @ matrix @ across) if n > 1 else np.zeros(0)
    spectral = float(matrix.sum()) * size / n + size * float(values[: nodes - 1].sum())
    magnitude = n * size * float(np.abs(matrix).sum()) + abs(touched) + abs(constant)
    return touched + constant + spectral - ROUNDING * magnitude


def add_pairs(counts: np.ndarray, members: np.ndarray, tokens: np.ndarray) -> None:
    """Add the tokens [P] to counts [n, n] of the pairs of their vertices, the lower one first."""
    for i in range(members.shape[1]):
        for j in range(i):
            pair = members[:, j].astype(np.int64) * len(counts) + members[:, i]
            counts += np.bincount(pair, tokens, counts.size).reshape(counts.shape)


@lru_cache(maxsize=8)
def _complement(n: int) -> np.ndarray:
    """[n, n-1] orthonormal columns, each orthogonal to the ones (Helmert)."""
    basis = np.zeros((n, max(n - 1, 0)))
    for column in range(n - 1):
        basis[: column + 1, column] = 1.0
        basis[column + 1, column] = -(column + 1.0)
        basis[:, column] /= np.sqrt((column + 1.0) * (column + 2.0))
    return basis


def _row_cost(prices: np.ndarray, load: np.ndarray) -> np.ndarray:
    return (np.outer(prices, load) + np.outer(load, prices)) / 2


def _project(matrix: np.ndarray, across: np.ndarray, size: int) -> np.ndarray:
    """The nearest (size/n) J + V X V' with 0 <= X <= size I and trace X = n - size."""
    n = len(matrix)
    inner = across.T @ matrix @ across
    values, vectors = np.linalg.eigh((inner + inner.T) / 2)
    low, high = values[0] - size - 1, values[-1] + 1
    for _ in range(60):  # the shift that gives the trace
        middle = (low + high) / 2
        if np.clip(values - middle, 0, size).sum() > n - size:
            low = middle
        else:
            high = middle
    turned = across @ vectors
    return size / n + (turned * np.clip(values - high, 0, size)) @ turned.T


@compiled
def block_prices(w, k, price, pull):
    """price [2^k] of each block of a pattern: 1 + its pairs' prices; price[0] = 0."""
    price[0] = pull[0] = 0.0
    for top in range(k):
        base, row = 1 << top, top * (top - 1) // 2
        price[base] = 1.0
        for j in range(top):  # ``rest``: the masks below ``base`` whose highest item is j
            for rest in range(1 << j, 1 << (j + 1)):
                pull[rest] = pull[rest ^ (1 << j)] + w[row + j]
                price[base | rest] = price[rest] + pull[rest]


@compiled
def _block_factors(w, k, tilt, smoothing, factor, pull):
    """factor [2^k] = exp(-(price - items x tilt) / smoothing) of each block, with few exp."""
    alone, item = np.exp((tilt - 1.0) / smoothing), np.exp(tilt / smoothing)
    pull[0] = item
    for top in range(k):
        base, row = 1 << top, top * (top - 1) // 2
        factor[base] = alone
        for j in range(top):
            price = np.exp(-w[row + j] / smoothing)
            for rest in range(1 << j, 1 << (j + 1)):
                pull[rest] = pull[rest ^ (1 << j)] * price
                factor[base | rest] = factor[rest] * pull[rest]


@compiled
def _soft_blocks(blocks, starts, factor, price, chance):
    """(sum of the weights of all partitions, lowest price); chance: weight that a block is in."""
    total, lowest = 0.0, np.inf
    chance[:] = 0.0
    for p in range(len(starts) - 1):
        weight, value = 1.0, 0.0
        for b in range(starts[p], starts[p + 1]):
            weight *= factor[blocks[b]]
            value += price[blocks[b]]
        total += weight
        lowest = min(lowest, value)
        for b in range(starts[p], starts[p + 1]):
            chance[blocks[b]] += weight
    return total, lowest


@compiled
def _move_prices(members, tokens, blocks, starts, ahead, w, scale, smoothing, step, cost):
    """One ascent step of every pattern's prices; adds tokens x prices to ``cost``. The gradient of
    the soft minimum is the expected Y over partitions with weight exp(-price / smoothing), less the
    Y of the primal. Where that weight leaves the range of float64 the prices stay.
    """
    num, k = members.shape
    price, factor, pull = np.zeros(1 << k), np.zeros(1 << k), np.zeros(1 << k)
    chance = np.zeros(1 << k)
    for t in range(num):
        block_prices(w[t], k, price, pull)
        _block_factors(w[t], k, scale[t] / k, smoothing, factor, pull)
        total, scale[t] = _soft_blocks(blocks, starts, factor, price, chance)
        good = total > 1e-250 and total < 1e250
        for bit in range(k):  # sums over supersets
            for mask in range(1 << k):
                if not mask >> bit & 1:
                    chance[mask] += chance[mask | (1 << bit)]
        for i in range(k):
            for j in range(i):
                e, f = members[t, i], members[t, j]
                pair = i * (i - 1) // 2 + j
                if good:
                    together = chance[(1 << i) | (1 << j)] / total
                    w[t, pair] += step * (together - ahead[e, f])
                cost[e, f] += tokens[t] * w[t, pair]
    cost += cost.T.copy()


@compiled
def _lowest(members, tokens, blocks, starts, w, cost):
    """Sum over tokens of the exact minimum over partitions; adds tokens x prices to ``cost``."""
    num, k = members.shape
    price, pull = np.zeros(1 << k), np.zeros(1 << k)
    sum_lowest = 0.0
    for t in range(num):
        block_prices(w[t], k, price, pull)
        lowest = np.inf
        for p in range(len(starts) - 1):
            value = 0.0
            for b in range(starts[p], starts[p + 1]):
                value += price[blocks[b]]
            lowest = min(lowest, value)
        sum_lowest += tokens[t] * lowest
        for i in range(k):
            for j in range(i):
                e, f = members[t, i], members[t, j]
                cost[e, f] += tokens[t] * w[t, i * (i - 1) // 2 + j]
    cost += cost.T.copy()
    return sum_lowest


@dataclass(frozen=True, slots=True, kw_only=True)
class Partitions:
    """All set partitions of ``k`` items: blocks as bit masks, one partition after the other."""

    k: int
    blocks: np.ndarray  # [B] int64 bit masks
    starts: np.ndarray  # [partitions + 1] where each begins in ``blocks``
    sizes: np.ndarray  # [2^k] items of a mask

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
        """Blocks lost per pair: on the lower hull of :meth:`counts`, at this ``share`` of pairs."""
        counts = self.counts()
        lines = hull_slopes(counts)
        if not len(lines):
            return 0.0
        pairs, blocks = counts.T
        at = share * self.k * (self.k - 1) / 2
        values = [float((blocks + c * pairs).min()) - c * at for c in lines]
        return float(lines[int(np.argmax(values))])


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
    corners = points[falling_hull(points.tolist())].tolist()
    steps = itertools.pairwise(corners)
    return np.array([(y0 - y1) / (x1 - x0) for (x0, y0), (x1, y1) in steps])


@lru_cache(maxsize=64)
def set_partitions(k: int, most_blocks: int, most_items: int) -> Partitions:
    """Partitions of k items into at most ``most_blocks`` blocks of at most ``most_items`` items."""
    found = list(_partitions(k, most_blocks, most_items, 0, []))
    return Partitions(
        k=k,
        blocks=np.fromiter(itertools.chain.from_iterable(found), dtype=np.int64),
        starts=np.cumsum([0, *map(len, found)]),
        sizes=np.array([mask.bit_count() for mask in range(2**k)], dtype=np.int64),
    )


def _partitions(
    k: int, most_blocks: int, most_items: int, item: int, blocks: list[int]
) -> Iterator[list[int]]:
    if item == k:
        yield list(blocks)
        return
    for index in range(len(blocks)):
        if blocks[index].bit_count() < most_items:
            blocks[index] |= 1 << item
            yield from _partitions(k, most_blocks, most_items, item + 1, blocks)
            blocks[index] ^= 1 << item
    if len(blocks) < most_blocks:
        blocks.append(1 << item)
        yield from _partitions(k, most_blocks, most_items, item + 1, blocks)
        blocks.pop()
