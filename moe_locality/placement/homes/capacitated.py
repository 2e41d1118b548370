"""Who goes where under capacities: requests to ranks, by prices and a greedy fill.

The assignment is a transport problem: R requests, each whole to one of G ranks, most benefit under
a capacity of tokens (and of requests) per rank. Its Lagrangian relaxation puts a price on the
capacity of each node; at the best prices all but about one request per node have their own best
node, so that a greedy fill in falling order of what is at stake loses little. ``dual_bound`` says
how little: no assignment is worth more. Work is O(R G) per step, some seconds for 10^5 requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_locality.placement.count_kernels import compiled
from moe_locality.placement.search.swaps import next_random

PRICE_STEPS = 150
EXCHANGE_ROUNDS = 20
ANNEAL_REQUESTS = 5000
"""Beyond so many requests the fill is within some 1e-4 of the bound, and annealing is left out."""
ANNEAL_STEPS = 500  # per request


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacities:
    """``tokens`` per rank (inf: no cap). ``even``: every rank gets as many requests, up to one."""

    tokens: float
    even: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """``rank_of`` [R]; ``token_price`` [M]; ``dual_bound``: no assignment is worth more."""

    rank_of: np.ndarray
    token_price: np.ndarray
    dual_bound: float


def assign(
    score: np.ndarray, tokens: np.ndarray, node_of_rank: np.ndarray, capacities: Capacities
) -> Assignment:
    """Most sum of ``tokens`` [R] x ``score`` [R, G] under the capacities; where whole requests do
    not fit below that of tokens, the rank with least takes what is left, and that of requests is
    kept. The scores of a node's ranks should differ little, because prices are per node.
    """
    ranks, nodes = len(node_of_rank), int(node_of_rank.max()) + 1
    room, seats = np.bincount(node_of_rank, minlength=nodes).astype(float), None
    size, larger = len(tokens), 0  # requests of a rank; ranks that may have one more
    if capacities.even:
        size, larger = divmod(len(tokens), ranks)
        seats = room * (size + (larger > 0))
    near = np.full((len(tokens), nodes), -np.inf)
    for rank, node in enumerate(node_of_rank):
        near[:, node] = np.maximum(near[:, node], score[:, rank])
    prices = _prices(near, tokens.astype(float), room * capacities.tokens, seats)
    worth = (score - prices[0][node_of_rank]) * tokens[:, None] - prices[1][node_of_rank]
    # in falling order of best - second best (of one node alone: zero); indifferent, short ones last
    top = np.sort((near - prices[0]) * tokens[:, None] - prices[1], axis=1)[:, -2:]
    order = np.lexsort((-tokens, top[:, 0] - top[:, -1]))
    caps = (float(capacities.tokens), size, larger)
    whole = tokens.astype(np.int64)
    rank_of, filled, count = _fill(order, worth, whole, *caps)
    value = np.ascontiguousarray(score * tokens[:, None])
    _improve(rank_of, filled, count, value, whole, *caps[:2], EXCHANGE_ROUNDS)
    if 1 < len(tokens) <= ANNEAL_REQUESTS and ranks > 1:
        heat = float((near.max(axis=1) - near.mean(axis=1)).mean() * tokens.mean())
        steps = ANNEAL_STEPS * len(tokens)
        rank_of = _anneal(rank_of, filled, count, value, whole, *caps[:2], steps, heat)
    return Assignment(rank_of=rank_of, token_price=prices[0], dual_bound=prices[2])


def _prices(near, tokens, room, seats) -> tuple[np.ndarray, np.ndarray, float]:
    """Subgradient descent on the dual: (price per token [M], price per request [M], its value)."""
    nodes = near.shape[1]
    by_token, by_request = np.zeros(nodes), np.zeros(nodes)
    best = (by_token, by_request, np.inf)
    gap = float(np.mean(near.max(axis=1) - near.mean(axis=1))) if len(near) else 0.0
    caps_tokens = np.isfinite(room).all()
    for step in range(PRICE_STEPS):
        worth = (near - by_token) * tokens[:, None] - by_request
        choice = worth.argmax(axis=1)
        dual = float(worth.max(axis=1).sum())
        dual += float((by_token * room).sum()) if caps_tokens else 0.0
        dual += float((by_request * seats).sum()) if seats is not None else 0.0
        if dual < best[2]:
            best = (by_token, by_request, dual)
        pace = 2 * gap / (1 + step) ** 0.7
        if caps_tokens:
            fill = np.bincount(choice, weights=tokens, minlength=nodes)
            by_token = np.maximum(by_token + pace * (fill / np.maximum(room, 1) - 1), 0)
        if seats is not None:
            count = np.bincount(choice, minlength=nodes)
            pull = pace * float(tokens.mean()) * (count / np.maximum(seats, 1) - 1)
            by_request = np.maximum(by_request + pull, 0)
    return best


@compiled
def _fill(order, worth, tokens, cap, size, larger):
    """Each request in turn to its best rank with room; then level what is above the capacity."""
    requests, ranks = worth.shape
    rank_of = np.zeros(requests, dtype=np.int64)
    filled, count = np.zeros(ranks, dtype=np.int64), np.zeros(ranks, dtype=np.int64)
    for request in order:
        best, least = -1, -1
        for rank in range(ranks):
            if count[rank] > size or (count[rank] == size and larger <= 0):
                continue
            if least < 0 or filled[rank] < filled[least]:
                least = rank
            if filled[rank] + tokens[request] <= cap and (
                best < 0
                or worth[request, rank] > worth[request, best]
                or (worth[request, rank] == worth[request, best] and filled[rank] < filled[best])
            ):
                best = rank
        if best < 0:
            best = least
        if count[best] == size:
            larger -= 1
        rank_of[request] = best
        filled[best] += tokens[request]
        count[best] += 1
    return rank_of, filled, count


@compiled
def _improve(rank_of, filled, count, value, tokens, cap, size, rounds):
    """Move or exchange requests: first less above the capacity, then more value.

    For every request the search takes the best move, and the best exchange with the requests that
    would gain most from the opposite move (one per pair of ranks, refreshed when it is used).
    """
    requests, ranks = value.shape
    for _ in range(rounds):
        changed = False
        partner = np.full((ranks, ranks), -1, dtype=np.int64)
        for request in range(requests):
            home = rank_of[request]
            for rank in range(ranks):
                held = partner[home, rank]
                gain = value[request, rank] - value[request, home]
                if held < 0 or gain > value[held, rank] - value[held, home]:
                    partner[home, rank] = request
        for request in range(requests):
            home = rank_of[request]
            best, other, best_less, best_gain = -1, -1, 0.0, 1e-9
            for rank in range(ranks):
                if rank == home:
                    continue
                gain = value[request, rank] - value[request, home]
                if count[rank] < size:  # never where every rank must have as many
                    less = _relief(filled[home], filled[rank], tokens[request], cap)
                    if less > best_less or (less == best_less and gain > best_gain):
                        best, other, best_less, best_gain = rank, -1, less, gain
                back = partner[rank, home]
                if back >= 0 and rank_of[back] == rank:
                    shift = tokens[request] - tokens[back]
                    less = _relief(filled[home], filled[rank], shift, cap)
                    gain += value[back, home] - value[back, rank]
                    if less > best_less or (less == best_less and gain > best_gain):
                        best, other, best_less, best_gain = rank, back, less, gain
            if best < 0:
                continue
            changed = True
            _move(request, best, other, rank_of, filled, count, tokens)
        if not changed:
            break


@compiled
def _relief(first, second, shift, cap):
    """How much less is above the capacity once ``shift`` tokens moved from first to second."""
    before = max(first - cap, 0.0) + max(second - cap, 0.0)
    return before - (max(first - shift - cap, 0.0) + max(second + shift - cap, 0.0))


@compiled
def _move(request, rank, other, rank_of, filled, count, tokens):
    """Move a request to a rank, and ``other`` (-1: none) from there to where it was."""
    home = rank_of[request]
    shift = tokens[request]
    rank_of[request] = rank
    if other >= 0:
        rank_of[other] = home
        shift -= tokens[other]
    else:
        count[home] -= 1
        count[rank] += 1
    filled[home] -= shift
    filled[rank] += shift


@compiled
def _anneal(rank_of, filled, count, value, tokens, cap, size, steps, heat):
    """[R] the best assignment met by random moves and exchanges under falling heat.

    Where capacity is tight whole requests fit badly, and only detours over worse assignments lead
    to better ones. Load above the capacity never grows. The sequence of random numbers is fixed.
    """
    requests, ranks = value.shape
    state = np.array([np.uint64(1)])
    best = rank_of.copy()
    gained, most = 0.0, 0.0
    for step in range(steps):
        temperature = 0.5 * heat * (1 - step / steps) ** 2 + 1e-9
        request, other = next_random(state) % requests, -1
        home, shift = rank_of[request], tokens[request]
        if next_random(state) % 3 == 0:
            rank = next_random(state) % ranks
        else:
            other = next_random(state) % requests
            rank = rank_of[other]
            shift -= tokens[other]
        if rank == home or (other < 0 and count[rank] >= size):
            continue
        gain = value[request, rank] - value[request, home]
        if other >= 0:
            gain += value[other, home] - value[other, rank]
        less = _relief(filled[home], filled[rank], shift, cap)
        if less < 0:
            continue
        luck = (next_random(state) + 1) / 2147483649.0
        if less == 0 and gain < 0 and luck >= np.exp(gain / temperature):
            continue
        _move(request, rank, other, rank_of, filled, count, tokens)
        gained += gain
        if less > 0 or gained > most + 1e-9:  # less above the capacity comes first
            most = gained
            best[:] = rank_of
    return best
