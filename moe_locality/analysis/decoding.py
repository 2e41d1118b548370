"""Decode replayed from a trace: what homes, placement and grouping save, and what prefill tells.

The experiment of arXiv 2604.23150 on recorded routing. Plans, clusters and classifiers are made
from one part of the requests and judged on the decode tokens of the others; of those only the
prefill is looked at (their first tokens, where no prefill was recorded; these are then not judged).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from moe_locality.errors import TraceError
from moe_locality.placement.baselines import request_picks
from moe_locality.placement.costs import imbalance
from moe_locality.placement.homes.predictor import (
    PRIOR_TOKENS,
    default_prediction,
    known_tokens,
    nearest_center,
    requests_of,
)
from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.problem import align_trace
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import PREFILL, RoutingTrace

Choose = Callable[[Sequence[int], Sequence[int]], int]
"""(requests that are ready, requests that run) → place of the next one among the ready ones."""


def decode_tokens(trace: RoutingTrace) -> RoutingTrace:
    """The tokens to judge: those after what homes of new requests are predicted from."""
    known = known_tokens(trace, requests_of(trace), default_prediction(trace))
    kept = np.ones(trace.num_rows, dtype=bool)
    kept[known] = False
    if trace.stage is not None:
        kept &= trace.stage != PREFILL
    return trace.take(np.flatnonzero(kept))


def lockstep(
    trace: RoutingTrace,
    homes: Mapping[int, int],
    num_ranks: int,
    *,
    max_num_seqs: int,
    steps: int,
    choose: Choose | None = None,
    seed: int = 0,
) -> np.ndarray:
    """[steps, G, B] rows of the trace that each rank decodes, B = ``max_num_seqs`` in every step.

    A request that ends makes room for the next of its rank's queue, which ``choose`` picks (None:
    the first). Queues never end: every request of a rank has run before one runs again, so that a
    rule that defers some gains nothing by it. Where a rank has too few requests some run in two
    rows, at other positions.

    Raises:
        TraceError: a rank has no request.
    """
    view = trace.tokens_only("lockstep")
    order = np.lexsort((view.position, view.request_id))
    requests, begin = np.unique(view.request_id[order], return_index=True)
    rows_of = dict(zip(requests.tolist(), np.split(order, begin[1:]), strict=True))
    rng = np.random.default_rng(seed)
    found = np.empty((steps, num_ranks, max_num_seqs), dtype=np.int64)
    for rank in range(num_ranks):
        own = [request for request in rows_of if homes[request] == rank]
        if not own:
            raise TraceError(
                f"found no request at home on rank {rank} of {num_ranks}, expected some on every "
                "rank: record more requests, or decode on fewer ranks"
            )
        queue: list[int] = []
        running: list[int] = []  # a request in each row of the batch
        cursor = np.zeros(max_num_seqs, dtype=np.int64)
        for step in range(steps):
            for place in range(max_num_seqs):
                if place < len(running) and cursor[place] < len(rows_of[running[place]]):
                    continue
                others = running[:place] + running[place + 1 :]
                request = _next(queue, own, others, choose, rng)
                running[place : place + 1] = [request]
                # the first batch starts in the middle of its requests, like every later one
                full = len(rows_of[request])
                cursor[place] = rng.integers(full) if step == 0 else 0
            found[step, rank] = [rows_of[r][c] for r, c in zip(running, cursor, strict=True)]
            cursor += 1
    return found


def _next(
    queue: list[int],
    own: list[int],
    running: list[int],
    choose: Choose | None,
    rng: np.random.Generator,
) -> int:
    """Take the next request that is not running out of the queue, which is refilled in time."""
    ready = [at for at, request in enumerate(queue) if request not in running]
    if not ready:
        first, queue[:] = len(queue), queue + rng.permutation(own).tolist()
        later = range(first, len(queue))
        ready = [at for at in later if queue[at] not in running] or [first]
    place = 0 if choose is None else choose([queue[at] for at in ready], running)
    return queue.pop(ready[place])


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """What decode steps send, means over steps and layers.

    picks, copies: rows that cross nodes, one per pick or one per remote node of a token.
    largest_pick_message, largest_copy_message: most rows from one rank to one rank (to one node,
        for copies) across nodes: what an exchange padded to its largest message pays.
    node_imbalance, rank_imbalance: max / mean of the picks that a node (rank) serves in a step.
    distinct: experts that the tokens of one rank pick in a step.
    """

    picks: float
    copies: float
    largest_pick_message: float
    largest_copy_message: float
    node_imbalance: float
    rank_imbalance: float
    distinct: float


def step_costs(
    trace: RoutingTrace, plan: PlacementPlan, topology: ClusterTopology, rows: np.ndarray
) -> StepCosts:
    """The costs of the steps ``rows [steps, G, B]`` of ``lockstep``, each rank's at home there."""
    steps, ranks, _ = rows.shape
    home = np.broadcast_to(np.arange(ranks)[None, :, None], rows.shape).ravel()
    aligned = align_trace(trace.take(rows.ravel()), plan, topology, home)
    assert aligned.ids is not None
    node = np.asarray(aligned.node_of_rank)
    nodes = aligned.num_nodes
    remote_pair, remote_node = node[:, None] != node, node[:, None] != np.arange(nodes)
    batch = np.repeat(np.arange(steps), rows[0].size) * ranks + home  # of each token
    totals = np.zeros(7)
    for layer in range(aligned.num_layers):
        ids = aligned.ids[:, layer].astype(np.int64)
        there = ids >= 0
        slots = aligned.slots_of(aligned.ids[:, layer : layer + 1], home, layer)[:, 0]
        served = slots // (aligned.num_slots // ranks)
        pair = (batch[:, None] * ranks + served)[there]
        picks = np.bincount(pair, minlength=steps * ranks * ranks).reshape(steps, ranks, ranks)
        visited = np.zeros((len(ids), nodes), dtype=bool)
        token = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)[there]
        visited[token, node[served[there]]] = True
        copies = visited.reshape(steps, ranks, -1, nodes).sum(axis=2)
        loads = picks.sum(axis=1)
        by_node = loads @ (node[:, None] == np.arange(nodes))
        used = np.zeros((steps * ranks, aligned.num_experts), dtype=bool)
        used[np.broadcast_to(batch[:, None], ids.shape)[there], ids[there]] = True
        totals += (
            (picks * remote_pair).sum(axis=(1, 2)).mean(),
            (copies * remote_node).sum(axis=(1, 2)).mean(),
            (picks * remote_pair).max(axis=(1, 2)).mean(),
            (copies * remote_node).max(axis=(1, 2)).mean(),
            imbalance(by_node).mean(),
            imbalance(loads).mean(),
            used.sum(axis=1).mean(),
        )
    means = (totals / aligned.num_layers).tolist()
    return StepCosts(**dict(zip((f.name for f in fields(StepCosts)), means, strict=True)))


def pick_chances(counts: np.ndarray, tokens: np.ndarray, overall: np.ndarray) -> np.ndarray:
    """[R, ...] chances of a pick: ``counts [R, ...] / tokens [R]``, drawn to ``overall [...]``."""
    seen = tokens.reshape(-1, *[1] * overall.ndim) + PRIOR_TOKENS
    return np.minimum((counts + PRIOR_TOKENS * overall) / seen, 1)


def added_experts(ready: np.ndarray, running: np.ndarray, overall: np.ndarray) -> np.ndarray:
    """[R] how many distinct experts each ready request is expected to add to the steps of those
    that run, beyond what it would add to as many average ones: a request that needs many experts
    anywhere is no worse here than later. From the chances ``[R, ...]``, ``[B, ...]`` and ``[...]``
    that a token picks an expert; picks of different tokens are taken as independent.
    """
    unused = np.prod(1 - running, axis=0) - (1 - np.minimum(overall, 1)) ** len(running)
    return (ready * unused).reshape(len(ready), -1).sum(axis=1)


class FewestExperts:
    """Chooses the ready request of fewest :func:`added_experts`, by its first tokens; the requests
    ``seen`` say what an average one picks.
    """

    def __init__(self, seen: RoutingTrace, arriving: RoutingTrace, predict: str) -> None:
        requests = requests_of(arriving)
        rows = known_tokens(arriving, requests, predict)
        assert arriving.expert_ids is not None
        picks = request_picks(arriving, requests.index, rows)
        known = np.bincount(requests.index[rows], minlength=len(requests.tokens))
        self._mean = seen.load().ravel() / seen.num_tokens
        chances = pick_chances(picks, known, self._mean)
        self._use = dict(zip(requests.request_ids.tolist(), chances, strict=True))

    def __call__(self, ready: Sequence[int], running: Sequence[int]) -> int:
        if not running:
            return 0
        own, others = (np.array([self._use[r] for r in some]) for some in (ready, running))
        return int(np.argmin(added_experts(own, others, self._mean)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Classification:
    """Held-out requests whose domain was found from their known tokens."""

    domains: tuple[str, ...]
    num_requests: int
    nearest_center: float
    ridge: float
    largest_class: float  # share of the most frequent domain, which a guess would find


def classify_domains(
    train: RoutingTrace,
    test: RoutingTrace,
    label_of: Callable[[str], str] = str,
    predict: str | None = None,
) -> Classification:
    """Tell the domain of held-out requests from the experts of their known tokens alone.

    ``nearest_center``: of unit vectors of picks, by Euclidean distance. ``ridge``: regression on
    the domains with the strength of least leave-one-out error. Domains that only one part has are
    left out. ``label_of``: the label of a domain, such as its data set. ``predict``: which tokens
    are known, as for homes; by default what these are predicted from.

    Raises:
        TraceError: fewer than two domains are in both parts.
    """
    points, labels = [], []
    for part in (train, test):
        requests = requests_of(part)
        rows = known_tokens(part, requests, predict or default_prediction(part))
        picks = request_picks(part, requests.index, rows)
        root = np.sqrt(picks)  # Hellinger: counts of frequent experts do not drown the others
        points.append(root / np.maximum(np.linalg.norm(root, axis=1, keepdims=True), 1e-12))
        labels.append([None if d is None else label_of(d) for d in requests.domains])
    names = sorted({*labels[0]} & {*labels[1]} - {None}, key=str)
    if len(names) < 2:
        raise TraceError(
            f"found {len(names)} domains in both parts of the trace, expected at least 2: label "
            "the requests, annotate(domains=...)"
        )
    known, asked = (np.array([name in names for name in some]) for some in labels)
    x, y = points[0][known], points[1][asked]
    is_x = np.array([[name == one for one in names] for name in labels[0]])[known]
    is_y = np.array([[name == one for one in names] for name in labels[1]])[asked].argmax(axis=1)
    centers = (is_x.T @ x) / is_x.sum(axis=0)[:, None]
    return Classification(
        domains=tuple(str(name) for name in names),
        num_requests=len(y),
        nearest_center=float((nearest_center(y, centers) == is_y).mean()),
        ridge=float((_ridge(x, is_x.astype(float), y) == is_y).mean()),
        largest_class=float(np.bincount(is_y).max() / len(is_y)),
    )


def _ridge(x: np.ndarray, target: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """[Q] the class of each asked point [Q, F] by ridge regression on x [R, F], classes [R, C]."""
    # in the dual, whose leave-one-out errors have a closed form
    mean, middle = x.mean(axis=0), target.mean(axis=0)
    kernel = (x - mean) @ (x - mean).T
    values, vectors = np.linalg.eigh(kernel)
    best, coefficients = np.inf, np.zeros_like(target)
    for strength in np.geomspace(1e-4, 10, 11) * max(float(values[-1]), 1e-12):
        inverse = (vectors / (np.maximum(values, 0) + strength)) @ vectors.T
        dual = inverse @ (target - middle)
        left_out = target - dual / np.diag(inverse)[:, None]
        error = float((left_out.argmax(axis=1) != target.argmax(axis=1)).mean())
        if error < best:
            best, coefficients = error, dual
    return ((asked - mean) @ (x - mean).T @ coefficients + middle).argmax(axis=1)
