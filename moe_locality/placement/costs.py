"""What a placement costs on a trace: one definition for solver, simulator, report and tests.

A token t with home node h and picks S_l(t) in layer l costs

* ``copies``: nodes other than h that serve some pick (the token is sent once to each),
* ``picks``:  picks served on another node than h (what a transport without de-duplication sends).

``TRANSPORTS`` says what crosses nodes under the transports of other engines.

With replicas the rule of the plan says which slot serves a pick (``serving.py``). Without homes the
cost is the exact expectation over homes drawn uniformly from all ranks, independent of the
picks. Without replicas that makes ``picks`` K(M-1)/M for every placement: only ``copies`` then
tells plans apart.

A cost depends on which requests were recorded. ``ratio_interval`` and ``expected_change`` estimate
how far with the delete-a-group jackknife over requests (Kott, "The delete-a-group jackknife",
Journal of Official Statistics 17, 2001).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.placement.plan import PlacementPlan, to_plain
from moe_locality.placement.problem import AlignedTrace, Homes, align_trace, log_warning
from moe_locality.placement.serving import count_on_nodes
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import RoutingTrace

BATCH_TOKENS = 512
TRANSPORTS = ("once_per_node", "per_pick", "per_rank", "allgather")
"""How a token is sent: once to each node that serves it (this package, DeepEP's normal kernels),
for each pick (plain all-to-all, DeepEP's low-latency kernels), once to each rank that serves it
(the one-sided all-to-all of FlashInfer and TensorRT-LLM), or to every node whatever it picks
(all-gather and reduce-scatter, the default of vLLM).
"""
_ENOUGH_PICKS = 16
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Costs of a plan on a trace; every float is the mean of its ``per_layer`` row over the layers.

    copies, picks: per token per layer (nan for a trace of counts only).
    link: rows (times ``row_bytes``) that the busiest node sends or receives, whichever is more, in
        the dispatch direction, each token once per destination node, over the whole trace.
    node_imbalance, rank_imbalance: max / mean of the picks served per node (rank) over the trace.
    straggler: max / mean of the picks served per rank in a batch of ``batch_tokens`` consecutive
        tokens, mean over the batches. Without homes it is taken on the expected loads of a batch.
    distinct: experts that a rank computes at all in such a batch, mean over ranks and batches.
    idle: probability that a rank has no pick in such a batch, mean over ranks and batches.
    crossing: rows that cross nodes in the dispatch, per token per layer, with the ``transport``.
    move: fraction of slots whose expert was not on that rank in ``baseline``, or, with
        ``expert_bytes``, the bytes to fetch per layer; nan without a baseline.
    total_copies, total_picks: exact integers over all layers where homes are given, else None.
    """

    copies: float
    picks: float
    link: float
    node_imbalance: float
    rank_imbalance: float
    straggler: float
    distinct: float
    idle: float
    crossing: float
    move: float
    per_layer: dict[str, np.ndarray]
    layer_ids: tuple[int, ...]
    num_tokens: int
    batch_tokens: int
    transport: str = TRANSPORTS[0]
    total_copies: int | None = None
    total_picks: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; nan becomes None."""
        return to_plain({f.name: getattr(self, f.name) for f in fields(self)}, "costs")


def evaluate(
    trace: RoutingTrace,
    plan: PlacementPlan,
    topology: ClusterTopology | None = None,
    homes: Homes = None,
    *,
    row_bytes: float | None = None,
    baseline: PlacementPlan | None = None,
    expert_bytes: float | None = None,
    batch_tokens: int = BATCH_TOKENS,
    rule: str | None = None,
    transport: str = TRANSPORTS[0],
    load: np.ndarray | None = None,
) -> Costs:
    """The costs of ``plan`` on ``trace``, see ``Costs``; raises PlacementError where plan, trace,
    cluster and homes do not fit each other.

    Args:
        topology: the cluster; must have the plan's ranks on the plan's nodes. None: the plan's.
        homes: None = expectation over uniform homes; a dict request id → rank; an array [T] of
            ranks; or "trace" = the ranks recorded in the trace.
        row_bytes: bytes of one token on the wire; None: ``link`` counts rows.
        baseline, expert_bytes: plan to move from, and the size of one expert's weights.
        batch_tokens: tokens of a batch for ``straggler`` and ``distinct``, all ranks together; in a
            trace of counts every step is a batch.
        rule: which copy serves a token; None: as the plan says; else see ``align_trace``.
        transport: of ``TRANSPORTS``, for ``crossing``. load: [L, E] ``trace.load()``, where known.
    """
    aligned = align_trace(trace, plan, topology, homes, rule, load)
    if plan.expert_load is not None:
        warn_of_absent_experts(plan.expert_load, plan.layer_ids)
    _check_settings(batch_tokens, row_bytes, transport)
    rows: dict[str, np.ndarray] = {}
    totals: tuple[int | None, int | None] = (None, None)
    by_rank = _rank_traffic(aligned)
    served = by_rank.sum(axis=1)
    if aligned.ids is None:
        rows["copies"] = rows["picks"] = rows["link"] = np.full(aligned.num_layers, np.nan)
    else:
        totals = _traffic_costs(aligned, by_rank, rows, row_bytes or 1)
    rows["node_imbalance"] = imbalance(_by_node(served, aligned.node_of_rank, axis=1))
    rows["rank_imbalance"] = imbalance(served)
    rows["straggler"], rows["distinct"], rows["idle"] = _batch_costs(aligned, batch_tokens)
    rows["crossing"] = _crossing(aligned, transport, rows)
    rows["move"] = _moved(aligned, plan, baseline)
    if expert_bytes is not None:
        rows["move"] = rows["move"] * plan.num_slots * expert_bytes
    return Costs(
        **{name: float(row.mean()) for name, row in rows.items()},
        per_layer=rows,
        layer_ids=aligned.layer_ids,
        num_tokens=trace.num_tokens,
        batch_tokens=batch_tokens,
        transport=transport,
        total_copies=totals[0],
        total_picks=totals[1],
    )


def _check_settings(batch_tokens: int, row_bytes: float | None, transport: str) -> None:
    if batch_tokens < 1:
        raise PlacementError(f"batch_tokens: found {batch_tokens}, expected at least 1: correct it")
    if row_bytes is not None and not 0 < row_bytes < math.inf:
        raise PlacementError(f"row_bytes: found {row_bytes}, expected a number above 0: correct it")
    if transport not in TRANSPORTS:
        raise PlacementError(
            f"transport: found {transport!r}, expected one of {', '.join(TRANSPORTS)}"
        )


def warn_of_absent_experts(load: np.ndarray, layer_ids: Sequence[int] | np.ndarray) -> None:
    """Log a warning where layers may have fewer experts than load [L, E] has: of many picks all
    those from half of the experts on are zero, where another layer's are not.
    """
    most = load.shape[1]
    used = most - (load[:, ::-1] > 0).argmax(axis=1)
    enough = load.sum(axis=1) >= _ENOUGH_PICKS * most
    short = np.flatnonzero(enough & (used <= most // 2) & (used.max() > most // 2))
    if len(short):
        log_warning(
            _log,
            "%d layers pick at most half of the %d experts (first: layer %s, experts 0 to %d only):"
            " if these layers have no more, the trace mixes layers of different sizes and neither "
            "imbalance nor plans and costs hold for them: take each group of layers by itself, "
            "recorded with attach(..., num_experts=N) or imported with --layers",
            *(len(short), most, layer_ids[short[0]], used[short[0]] - 1),
        )


def traffic_matrix(
    trace: RoutingTrace,
    plan: PlacementPlan,
    topology: ClusterTopology | None = None,
    homes: Homes = None,
    *,
    per_layer: bool = False,
) -> np.ndarray:
    """[G, G] float picks from home rank (row) to the rank of the serving slot (column), the
    diagonal included: their sum is the number of picks in the trace. Summed over the layers, or
    [L, G, G] with ``per_layer``; without homes the expectation over uniform homes.
    """
    matrix = _rank_traffic(align_trace(trace, plan, topology, homes))
    return matrix if per_layer else matrix.sum(axis=0)


def imbalance(loads: np.ndarray, empty: float = 1.0) -> np.ndarray:
    """max / mean along the last axis, [...]; ``empty`` where nothing is loaded."""
    mean = loads.mean(axis=-1)
    return np.where(mean > 0, loads.max(axis=-1) / np.where(mean > 0, mean, 1), empty)


def _rank_traffic(aligned: AlignedTrace) -> np.ndarray:
    """[L, G, G] float64 picks by home rank and serving rank; integers below 2**53 are exact."""
    layers, ranks = aligned.num_layers, aligned.num_ranks
    if aligned.choices is not None:
        _, slots = aligned.served_by_token
        matrix = slots.reshape(layers, ranks, ranks, -1).sum(axis=3).astype(np.float64)
    else:
        matrix = np.zeros((layers, ranks, ranks))
        # [L, G, E] picks; without homes [L, 1, E], the same for every home
        shares, served = aligned.picks_by_home(), aligned.served_rank
        for layer in range(layers):
            for home in range(ranks):
                counts = shares[layer, home if aligned.home_rank is not None else 0]
                matrix[layer, home] = np.bincount(served[layer, home], counts, minlength=ranks)
    return matrix if aligned.home_rank is not None else matrix / ranks


def _by_node(values: np.ndarray, node_of_rank: np.ndarray, axis: int) -> np.ndarray:
    """Sum the rank axis into nodes."""
    nodes = int(node_of_rank.max()) + 1
    onto = (node_of_rank[:, None] == np.arange(nodes)).astype(values.dtype)
    return np.moveaxis(np.tensordot(values, onto, axes=([axis], [0])), -1, axis)


def _traffic_costs(
    aligned: AlignedTrace, by_rank, rows, row_bytes
) -> tuple[int | None, int | None]:
    """Fill copies, picks and link; return their exact totals where homes are given."""
    tokens = len(aligned.ids)  # type: ignore[arg-type]
    between = _by_node(_by_node(by_rank, aligned.node_of_rank, 1), aligned.node_of_rank, 2)
    remote = ~np.eye(aligned.num_nodes, dtype=bool)
    visits = aligned.node_visits() * remote  # [L, M, M]
    rows["picks"] = (between * remote).sum(axis=(1, 2)) / tokens
    rows["copies"] = visits.sum(axis=(1, 2)) / tokens
    rows["link"] = np.maximum(visits.sum(axis=2), visits.sum(axis=1)).max(axis=1) * row_bytes
    if aligned.home_rank is None:
        return None, None
    return int(visits.sum()), round(float((between * remote).sum()))


def _crossing(aligned: AlignedTrace, transport: str, rows: dict[str, np.ndarray]) -> np.ndarray:
    """[L] rows that cross nodes per token with the transport."""
    if transport == "allgather":
        return np.full(aligned.num_layers, aligned.num_nodes - 1.0)
    if transport != "per_rank" or aligned.ids is None:
        return rows["picks" if transport == "per_pick" else "copies"]
    return _rank_copies(aligned) / len(aligned.ids)


def _rank_copies(aligned: AlignedTrace) -> np.ndarray:
    """[L] ranks of other nodes that serve a pick, summed over the tokens."""
    remote = aligned.node_of_rank[:, None] != aligned.node_of_rank
    return (aligned.rank_visits() * remote).sum(axis=(1, 2))


def _batch_costs(aligned: AlignedTrace, batch_tokens: int) -> np.ndarray:
    """[3, L] straggler, distinct, idle; expected values where the home decides and is not given."""
    batches = 0
    costs = np.zeros((3, aligned.num_layers))
    for loads, active, idle in aligned.rank_batches(batch_tokens):  # [B, L, G] each
        costs[0] += imbalance(loads).sum(axis=0)
        costs[1] += active.mean(axis=2).sum(axis=0)
        costs[2] += idle.mean(axis=2).sum(axis=0)
        batches += len(loads)
    return costs / batches


def _moved(
    aligned: AlignedTrace, plan: PlacementPlan, baseline: PlacementPlan | None
) -> np.ndarray:
    """[L] fraction of slots whose expert was on another rank in ``baseline``."""
    if baseline is None:
        return np.full(aligned.num_layers, np.nan)
    baseline.check_fits(
        num_experts=plan.num_experts, layer_ids=plan.layer_ids, num_ranks=plan.num_ranks
    )
    new, old = (
        count_on_nodes(some.physical_to_logical_map, some.rank_of_slot, some.num_experts) > 0
        for some in (plan, baseline)
    )  # [L, E, G]
    return ((new & ~old).sum(axis=(1, 2)) / plan.num_slots)[aligned.plan_rows]


NUM_BLOCKS = (5, 10, 15, 20)
# 97.5 % points of Student's t by degrees of freedom
T_975 = {4: 2.776, 9: 2.262, 14: 2.145, 19: 2.093}


def request_blocks(trace: RoutingTrace, seed: int = 0) -> np.ndarray | None:
    """[T] block of every token, whole requests together; None where there are too few requests."""
    if trace.request_id is None or len(trace.request_ids) < NUM_BLOCKS[0]:
        return None
    requests, number = np.unique(trace.request_id, return_inverse=True)
    count = max(n for n in NUM_BLOCKS if n <= len(requests))
    block = np.random.default_rng(seed).permutation(len(requests)) % count
    return block[number]


def copies_of_blocks(
    trace: RoutingTrace,
    plan: PlacementPlan,
    topology: ClusterTopology | None,
    homes: Homes,
    blocks: np.ndarray | None,
    *,
    by_rank: bool = False,
) -> np.ndarray | None:
    """[B] copies of each block, summed over its tokens and all layers, None without blocks; with
    ``by_rank`` ranks of other nodes instead of nodes.
    """
    if blocks is None or trace.expert_ids is None:
        return None
    totals = []
    for block in range(int(blocks.max()) + 1):
        rows = blocks == block
        part = homes[rows] if isinstance(homes, np.ndarray) else homes
        aligned = align_trace(trace.take(rows), plan, topology, part)
        if by_rank:
            totals.append(_rank_copies(aligned).sum())
            continue
        visits = aligned.node_visits()
        totals.append(visits.sum() - np.trace(visits.sum(axis=0)))
    return np.array(totals, dtype=np.float64)


def ratio_interval(first: np.ndarray | None, last: np.ndarray | None) -> tuple[float, float] | None:
    """95 % interval of sum(last) / sum(first) over [B] blocks, by leaving out one at a time; None
    where it cannot be said: no blocks, or nothing left in ``first`` without one of them.
    """
    if first is None or last is None or first.sum() == 0:
        return None
    without = first.sum() - first
    if (without <= 0).any():
        return None
    return _around(last.sum() / first.sum(), (last.sum() - last) / without)


def _around(value: float, left_out: np.ndarray) -> tuple[float, float]:
    """95 % interval of a ratio, from the [B] ratios without one block each."""
    count = len(left_out)
    spread = math.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())
    reach = T_975[count - 1] * spread
    return max(float(value - reach), 0.0), float(value + reach)


def expected_change(
    trace: RoutingTrace,
    base: tuple[PlacementPlan, Homes],
    plan: tuple[PlacementPlan, Homes],
    topology: ClusterTopology | None,
    blocks: np.ndarray,
    *,
    by_rank: bool = False,
) -> dict[str, tuple[float, float, float] | None]:
    """(change, low, high) of costs from ``base`` to ``plan``, each with the homes of its requests:
    shares of the base, -0.2 is a fifth less, with their 95 % interval over the blocks of requests;
    copies, picks, node_imbalance and rank_imbalance, with ``by_rank`` rank_copies too. None: the
    base has nothing to change.
    """
    both = (base, plan)
    kinds = {"copies": False, "rank_copies": True} if by_rank else {"copies": False}
    copies = {
        name: [
            copies_of_blocks(trace, some, topology, at, blocks, by_rank=kind) for some, at in both
        ]
        for name, kind in kinds.items()
    }
    traffic = [_traffic_of_blocks(trace, some, topology, at, blocks) for some, at in both]
    node = plan[0].node_of_rank
    remote = node[:, None] != node
    picks = [(some * remote).sum(axis=(1, 2, 3)) for some in traffic]
    found: dict[str, tuple[float, float, float] | None] = {}
    for name, (first, last) in (*copies.items(), ("picks", picks)):
        reach, found[name] = ratio_interval(first, last), None
        if reach and first is not None and last is not None:
            found[name] = float(last.sum() / first.sum() - 1), reach[0] - 1, reach[1] - 1
    on_node = (node[:, None] == np.arange(node.max() + 1)).astype(np.float64)
    for name, onto in (("node_imbalance", on_node), ("rank_imbalance", np.eye(len(node)))):
        loads = [some.sum(axis=2) @ onto for some in traffic]  # [B, L, nodes or ranks]
        total, without = (
            np.divide(*(imbalance(some).mean(axis=-1) for some in reversed(kept)))
            for kept in (
                [some.sum(axis=0) for some in loads],
                [some.sum(axis=0) - some for some in loads],
            )
        )
        low, high = _around(total, without)
        found[name] = float(total - 1), low - 1, high - 1
    return found


def _traffic_of_blocks(trace, plan, topology, homes, blocks) -> np.ndarray:
    """[B, L, G, G] ``traffic_matrix`` of each block."""
    parts = [trace.take(blocks == block) for block in range(int(blocks.max()) + 1)]
    return np.stack([traffic_matrix(part, plan, topology, homes, per_layer=True) for part in parts])
