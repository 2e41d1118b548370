"""How level the nodes will be on requests that the solver has not seen, and what that allows.

A request brings its own loads: the experts of code, of law, of a long answer. Loads counted on one
set of requests are therefore a sample, and a cap met exactly on it is broken on the next set. With
requests drawn independently, the picks c_r of request r and the share p of each expert in the
trace, the deviations d_r = c_r - |c_r| p have the covariance C = sum d_r d_r' (the ratio estimator,
Cochran, Sampling Techniques, 3rd ed., 1977, section 6.3). Against the loads of the trace, the load
of a node on an unseen sample ``UNSEEN_SHARE`` as large as the trace varies with
(1 + 1 / UNSEEN_SHARE) 1_b' C 1_b, in picks of the trace, b the experts of the node. The maximum
over the nodes of such normal loads, on average, is the expected imbalance.

Shapes: T tokens, L layers, K picks, E experts (or groups of them), U units, M nodes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.placement.counting import map_layers
from moe_locality.trace.schema import RoutingTrace

UNSEEN_SHARE = 3 / 7
"""Size of the unseen sample that an imbalance is expected for, as a share of the trace: what a
70 / 30 split holds out. A larger sample is more level, a smaller one less."""

OWN_ERROR = 0.5
"""How much of the error of the trace's own loads is added to that of the unseen ones, under a cap
that is found. A plan that levels the loads of the trace fits their error, so all of it comes back
on unseen requests; in a plan that does not, it is in the loads already. Plans under such a cap are
between the two.
"""

MAX_UNITS = 512
"""Requests beyond this number are bundled, which leaves the expected covariance what it is."""

MIN_REQUESTS = 8
"""With fewer requests, stretches of consecutive tokens stand for requests."""

_LOOKED_AT, _STRETCH, _TOKENS, _LAYERS = 512, 32, 1 << 17, 8
"""Requests, neighbors among them, tokens and layers that ``neighbors_alike`` looks at."""
_SHUFFLES, _GROWTH = 99, 1.1

_DRAWS = 1024
_FEW = 32
_LARGEST = 2.0**20  # deviations are rounded to whole numbers below this: sums of squares stay exact


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """How the loads of one layer vary from sample to sample: covariances [E, E], whole numbers in
    float64, and the factor ``deviation`` from the root of a block's covariance to the standard
    deviation of its load on an unseen sample, in picks of the trace.
    """

    covariance: np.ndarray
    deviation: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """What of a trace comes independently of the rest.

    unit: [T] int64 unit of each token. of: "request", "domain" or a number of requests next to each
    other. stratum: [U] domain of each unit; squares: [S] sum, over the requests of a domain, of
    their tokens squared; both None where a unit may be of any domain.
    """

    unit: np.ndarray
    of: str | int = "request"
    stratum: np.ndarray | None = None
    squares: np.ndarray | None = None


def units_of(request_id: np.ndarray, size: int = 1) -> np.ndarray:
    """[T] int64 unit of each token: ``size`` requests next to each other in number, bundled to at
    most ``MAX_UNITS``.

    Neighbors in number go to different bundles, for they may come from one source.
    """
    requests, unit = np.unique(request_id, return_inverse=True)
    if len(requests) >= max(MIN_REQUESTS, 2 * size):
        return unit.astype(np.int64) // size % MAX_UNITS
    tokens = len(request_id)
    return np.arange(tokens) * min(64, max(tokens, 1)) // max(tokens, 1)


def sampling_units(trace: RoutingTrace, of: str | int) -> Units:
    """The units that requests come in: "request", each by itself; "domain", domains as a whole; a
    number of requests that are next to each other; "auto", as many neighbors as are found alike.

    Raises:
        PlacementError: "domain" for a trace with fewer than two domains.
    """
    assert trace.request_id is not None
    if isinstance(of, int):
        return Units(unit=units_of(trace.request_id, of), of=of)
    if of == "domain":
        found = np.zeros(0) if trace.domain_id is None else np.unique(trace.domain_id)
        if len(found) < 2:
            raise PlacementError(
                f"sampling_unit: found 'domain' for a trace with {len(found)} domains, expected "
                "at least 2: use 'auto', or record the requests with domains"
            )
        assert trace.domain_id is not None
        domain = np.unique(trace.domain_id, return_inverse=True)[1]
        return Units(unit=domain.astype(np.int64) % MAX_UNITS, of="domain")
    if of == "auto":
        size = neighbors_alike(trace)
        if size > 1:
            return _units_of_neighbors(trace, size)
    return Units(unit=units_of(trace.request_id))


def _requests_by_domain(trace: RoutingTrace) -> tuple[np.ndarray, np.ndarray]:
    """([R] domains of the requests ordered by domain, then number; [T] place there)."""
    assert trace.request_id is not None
    ids, first, index = np.unique(trace.request_id, return_index=True, return_inverse=True)
    domain = np.zeros(len(ids), np.int64) if trace.domain_id is None else trace.domain_id[first]
    order = np.lexsort((ids, domain))
    place = np.empty(len(ids), dtype=np.int64)
    place[order] = np.arange(len(ids))
    return domain[order], place[index]


def _units_of_neighbors(trace: RoutingTrace, size: int) -> Units:
    """Blocks of ``size`` requests of one domain; the mix of domains varies request by request."""
    domain, place = _requests_by_domain(trace)
    stratum_of, count = np.unique(domain, return_inverse=True, return_counts=True)[1:]
    begin = np.cumsum(count) - count
    block = (np.arange(len(domain)) - begin[stratum_of]) // size
    blocks = -(-count // size)
    kept = np.minimum(blocks, np.maximum(2, MAX_UNITS * blocks // blocks.sum()))
    unit = (np.cumsum(kept) - kept)[stratum_of] + block % kept[stratum_of]
    tokens = np.bincount(place, minlength=len(domain)).astype(np.float64)
    return Units(
        unit=unit[place],
        of=size,
        stratum=np.repeat(np.arange(len(count)), kept),
        squares=np.bincount(stratum_of, weights=tokens**2),
    )


def neighbors_alike(trace: RoutingTrace) -> int:
    """How many requests next to each other in number (of one domain) come from one source: a power
    of 2, found from the trace; 1 where neighbors are no more alike than any two of their domain.

    With deviations e_r of the loads of request r from those of its domain, blocks of b requests
    have sum |e_b|^2 / sum |e_r|^2 = 1 + (b - 1) rho where rho is the intra-class correlation
    (Kish, Survey Sampling, 1965, section 5.4). b doubles while that grows, and while it is larger
    than in all of ``_SHUFFLES`` shuffles of the requests inside their domains.
    """
    domain, place = _requests_by_domain(trace)
    if len(domain) < 4 * MIN_REQUESTS:
        return 1
    chosen = np.arange(len(domain))
    if len(domain) > _LOOKED_AT:  # stretches of neighbors
        begin = np.linspace(0, len(domain) - _STRETCH, _LOOKED_AT // _STRETCH).astype(np.int64)
        chosen = np.unique(begin[:, None] + chosen[:_STRETCH])
    alike = _likeness(trace, domain, place, chosen)
    domain, size, last = domain[chosen], 1, float(np.trace(alike))
    rng = np.random.default_rng(0)
    shuffled = [np.lexsort((rng.random(len(chosen)), domain)) for _ in range(_SHUFFLES)]
    while len(chosen) >= 2 * size * MIN_REQUESTS and last > 0:
        block = _blocks(domain, chosen, 2 * size)
        same = block[:, None] == block
        found = float(alike[same].sum())
        if found < _GROWTH * last or any(
            found <= alike[np.ix_(some, some)][same].sum() for some in shuffled
        ):
            break
        size, last = 2 * size, found
    return size


def _blocks(domain: np.ndarray, chosen: np.ndarray, size: int) -> np.ndarray:
    """[R] block of ``size`` consecutive requests of one domain."""
    new = (np.diff(domain, prepend=-1) != 0) | (np.diff(chosen, prepend=-2) != 1)
    begin = np.flatnonzero(new)
    run = np.cumsum(new) - 1
    return run * len(domain) + (np.arange(len(domain)) - begin[run]) // size


def _likeness(
    trace: RoutingTrace, domain: np.ndarray, place: np.ndarray, chosen: np.ndarray
) -> np.ndarray:
    """[R, R] sum over experts and some layers of e_r e_s, for the chosen requests."""
    assert trace.expert_ids is not None
    row = np.full(len(domain), -1, dtype=np.int64)
    row[chosen] = np.arange(len(chosen))
    tokens = np.flatnonzero(row[place] >= 0)
    tokens = tokens[:: max(len(tokens) // _TOKENS, 1)]
    at, experts = row[place[tokens]][:, None], trace.num_experts
    stratum = np.unique(domain[chosen], return_inverse=True)[1]
    alike = np.zeros((len(chosen), len(chosen)))
    layers = trace.num_layers
    for layer in range(0, layers, max(layers // _LAYERS, 1)):
        picks = trace.expert_ids[tokens, layer].astype(np.int64)
        cells = (at * experts + picks)[picks >= 0]
        load = np.bincount(cells, minlength=len(chosen) * experts).reshape(-1, experts)
        rest = load - load.sum(axis=1, keepdims=True) * _shares(load, stratum)[stratum]
        norm = float((rest**2).sum())
        if norm > 0:
            alike += rest @ rest.T / norm
    return alike


def _shares(load: np.ndarray, stratum: np.ndarray) -> np.ndarray:
    """[S, E] share of each expert in the picks of each stratum, from loads [U, E]."""
    of = np.zeros((int(stratum.max()) + 1, load.shape[1]))
    np.add.at(of, stratum, load)
    return of / np.maximum(of.sum(axis=1, keepdims=True), 1)


def noise_of(unit_load: np.ndarray, units: Units | None = None, own_error: float = 1.0) -> Noise:
    """The noise of a layer from the loads [U, E] of its units.

    ``own_error``: see ``OWN_ERROR``.
    """
    rest, free = _deviations(unit_load, units)
    experts = unit_load.shape[1]
    if len(rest) < 2:
        return no_noise(experts)
    scale = _LARGEST / max(float(np.abs(rest).max()), 1.0)
    whole = np.rint(rest * scale)
    spread = (own_error + 1 / UNSEEN_SHARE) * len(rest) / free
    return Noise(covariance=whole.T @ whole, deviation=float(np.sqrt(spread)) / scale)


def _deviations(unit_load: np.ndarray, units: Units | None) -> tuple[np.ndarray, int]:
    """([.., E] deviations that add up to the noise, degrees of freedom)."""
    full = unit_load.sum(axis=1) > 0
    counts = unit_load[full].astype(np.float64)
    load, size = counts.sum(axis=0), counts.sum(axis=1, keepdims=True)
    share = load / max(load.sum(), 1.0)
    if units is None or units.stratum is None or units.squares is None:
        return counts - size * share, len(counts) - 1
    # units inside their domains, and how many requests come from each domain
    stratum = units.stratum[full]
    of = _shares(counts, stratum)
    rest = counts - size * of[stratum]
    rest *= np.sqrt(len(counts) / max(len(counts) - len(np.unique(stratum)), 1))
    root = load.sum() / len(units.unit) * np.sqrt(units.squares[: len(of)])
    return np.concatenate([rest, root[:, None] * (of - share)]), max(len(counts) + len(of), 1)


def no_noise(experts: int) -> Noise:
    """For a plan that has to be level on the trace itself."""
    return Noise(covariance=np.zeros((experts, experts)), deviation=0.0)


def shared_noise(noises: Sequence[Noise], loads: np.ndarray) -> Noise:
    """The noise of one layer that stands for several with the same placement.

    Its load is the sum of ``loads`` [L, E]; the imbalance to expect of it is about the mean of
    theirs: a node's share varies from layer to layer, and in each from sample to sample.
    """
    layers, total = len(loads), loads.sum()
    apart = loads - loads.sum(axis=1, keepdims=True) * (loads.sum(axis=0) / max(total, 1))
    covariance = apart.T @ apart
    for some in noises:
        covariance += some.covariance * some.deviation**2
    covariance *= layers
    scale = _LARGEST / max(float(np.sqrt(np.abs(covariance).max())), 1.0)
    return Noise(covariance=np.rint(covariance * scale**2), deviation=1 / scale)


def expected_imbalance(block_of: np.ndarray, load: np.ndarray, noise: Noise, blocks: int) -> float:
    """Mean of max / mean of the block loads over unseen samples, from the block of each expert [E]
    and its picks [E]; 1 for a layer without picks.
    """
    share = (np.asarray(block_of) == np.arange(blocks)[:, None]).astype(np.float64)
    return expected_shared_imbalance(share, load, noise)


def expected_shared_imbalance(share: np.ndarray, load: np.ndarray, noise: Noise) -> float:
    """``expected_imbalance`` where block b serves the share [B, E] of the picks of each expert."""
    block_load, covariance = share @ load, share @ noise.covariance @ share.T
    blocks, total = len(block_load), float(block_load.sum())
    if total == 0 or blocks == 1:
        return 1.0
    unit = noise.deviation * blocks / total
    values, vectors = np.linalg.eigh(covariance * unit**2)
    root = vectors * np.sqrt(np.maximum(values, 0))
    share = block_load * (blocks / total)
    return float((share[:, None] + root @ _draws(blocks)).max(axis=0).mean())


@functools.lru_cache(maxsize=8)
def _draws(blocks: int) -> np.ndarray:
    """[M, S] standard normal draws, each with its opposite; always the same ones."""
    half = np.random.default_rng(0).standard_normal((blocks, _DRAWS // 2))
    return np.concatenate([half, -half], axis=1)


@functools.lru_cache(maxsize=64)
def few_draws(blocks: int) -> np.ndarray:
    """[M, S] draws for searches that ask at every step and take loads for independent.

    The loads of blocks sum up to all picks, so they are negatively correlated and differ by more
    than independent ones: by sqrt(M / (M - 1)) where they vary alike, as the draws are scaled.
    """
    half = _draws(blocks)[:, : _FEW // 2]
    return np.concatenate([half, -half], axis=1) * np.sqrt(blocks / max(blocks - 1, 1))


def samples_of(noise: Noise | None, blocks: int) -> tuple[np.ndarray, float, np.ndarray]:
    """(covariance, deviation, draws) for a search; without noise no covariance and one draw."""
    if noise is None or noise.deviation == 0:
        return np.zeros((0, 0)), 0.0, np.zeros((blocks, 1))
    return noise.covariance, noise.deviation, few_draws(blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A placement of one layer: its copies per token, and the imbalance of the nodes expected on
    unseen requests.
    """

    copies: float
    imbalance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """Imbalance of one layer: ``allowed`` in the mean over the layers, at ``most`` by itself."""

    allowed: float
    most: float


def cap_of(linear: float, packed: float, max_imbalance: float, slack: float | None) -> Cap:
    """The cap of a layer: ``max_imbalance``, where packing by loads alone can reach it (the
    imbalance ``packed``); or, with a ``slack``, so much above what can be reached, but not above
    the usual order's, ``linear``.
    """
    if slack is None:
        allowed = max(max_imbalance, packed)
        return Cap(allowed=allowed, most=allowed + max_imbalance - 1)
    allowed = min(min(linear, packed) + slack, linear)
    return Cap(allowed=allowed, most=max(allowed, min(2 * allowed - 1, linear)))


FIRST_MULTIPLIER = 2.0
"""Copies per token that an imbalance higher by one is worth; ``STEP`` the factor to the next one
while the price is not known to lie between two.
"""
STEP = 4.0
LEAST_PRICE = 0.01  # from where to go up after no price at all


def search_lagrangian(
    search: Callable[[int, float, int], float],
    allowed: Sequence[float],
    rounds: int,
    first: float = FIRST_MULTIPLIER,
    least: float = 0.0,
) -> float:
    """Search all layers at prices that come nearer to the mean imbalance allowed; returns the price
    that would come next.

    Args:
        search: called with (place of a layer, price, round), by several threads; returns the
            expected imbalance of what it found.
        allowed: imbalance of each layer.
        least: price below which an imbalance that is allowed is not worth having.
    """
    target, price = float(np.mean(allowed)) - 1, max(first, least)
    known: list[tuple[float, float]] = []

    def one(place: int) -> float:
        return search(place, price, len(known))

    for _ in range(rounds):
        levels = map_layers(one, len(allowed))
        known.append((price, float(np.mean(levels)) - 1))
        price = max(next_multiplier(known, target), least)
    return price


def next_multiplier(known: Sequence[tuple[float, float]], target: float) -> float:
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
        return max(max(low)[0], LEAST_PRICE) * STEP
    (p, x), (q, y) = max(low), min(high)
    if p <= 0 or y <= 0 or target <= 0 or p >= q:
        return (p + q) / 2
    share = np.log(x / target) / np.log(x / y)
    return float(p * (q / p) ** min(max(share, 0.1), 0.9))


def allocate(
    tried: Sequence[Sequence[Candidate]], caps: Sequence[Cap], least: float = 0.0
) -> list[int]:
    """The candidate chosen in each layer: fewest copies in all, with the mean imbalance as allowed.

    Steps of a call follow one another, so what imbalance costs adds up over the layers: it is
    spent where it saves most copies. A multiple-choice knapsack, solved greedily along the lower
    convex hulls of the layers (Sinha and Zoltners, Operations Research 27, 1979).

    Args:
        caps: only the sum of what is allowed counts, but no layer gets more than its ``most``.
            Where no candidate keeps to that, the most level is taken.
        least: copies that an imbalance higher by one has to save; less is not worth it.
    """
    budget = sum(cap.allowed for cap in caps)
    chosen, steps = [], []
    for layer, (some, cap) in enumerate(zip(tried, caps, strict=True)):
        hull = falling_hull([(one.imbalance, one.copies) for one in some], cap.most)
        chosen.append(hull[0])
        for rank, (here, there) in enumerate(itertools.pairwise(hull)):
            cost = some[there].imbalance - some[here].imbalance
            gain = some[here].copies - some[there].copies
            steps.append((-gain / max(cost, 1e-12), layer, rank, cost, there))
    spent = sum(some[place].imbalance for some, place in zip(tried, chosen, strict=True))
    blocked = set()
    for slope, layer, _, cost, there in sorted(steps):
        if layer in blocked or spent + cost > budget or -slope < least:
            blocked.add(layer)
            continue
        chosen[layer] = there
        spent += cost
    return chosen


def falling_hull(points: Sequence[Sequence[float]], most: float = np.inf) -> list[int]:
    """Places of the points (x, y) on the falling part of their lower convex hull, x rising up to
    ``most``; the first point alone where none is below that.
    """
    places = sorted(range(len(points)), key=lambda i: (*points[i], i))
    hull: list[int] = []
    for place in [i for i in places if points[i][0] <= most] or places[:1]:
        x, y = points[place]
        if hull and y >= points[hull[-1]][1]:
            continue
        while len(hull) > 1:
            (x0, y0), (x1, y1) = points[hull[-2]], points[hull[-1]]
            if (y0 - y1) * (x - x0) > (y0 - y) * (x1 - x0):
                break
            hull.pop()
        hull.append(place)
    return hull
