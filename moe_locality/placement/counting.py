"""Exact integer counts of a trace: picks and pairs of picks; under a plan node visits, picks by
home, picks by batch.

Plain numpy in chunks of tokens, so that memory stays bounded whatever the trace. A trace of
``COMPILED_PICKS`` or more is counted by the same loops compiled, in threads: the first ``evaluate``
of a small one should not wait for a compiler. Shapes: T tokens, L layers, K picks, E experts, P
slots, G ranks, M nodes.

Threads are plain ones, one per processor that this process may use: a compiled parallel loop would
start OpenMP threads, and a process that has those must not fork.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from moe_locality.trace.io import read_pieces
from moe_locality.trace.schema import RoutingTrace

COMPILED_PICKS = 1 << 23
CHUNK_PICKS = 1 << 20
_NODES_PER_BYTE = 8


def chunks(ids: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (rows, ids + 1 of these as int64 [L, rows, K]): 0 stands for "no pick"."""
    tokens, layers, picks = ids.shape
    step = max(CHUNK_PICKS // max(layers * picks, 1), 1)
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        part = ids[rows].transpose(1, 0, 2).astype(np.int64)
        part += 1
        yield rows, part


def node_visits(
    ids: np.ndarray,
    served_node: np.ndarray,
    home_node: np.ndarray,
    num_nodes: int,
    num_homes: int | None = None,
) -> np.ndarray:
    """How many tokens of home node m have a pick that is served on node n.

    Args:
        ids: [T, L, K], -1 = no pick.
        served_node: [L, H, E] the node that serves expert e for a home on node h; H = 1: the same
            for all homes.
        home_node: [T], the home node of each token, below M, or its home of ``num_homes``.

    Returns:
        [L, M, M] int64, or [L, num_homes, M]; a token counts once per (m, n), n = m included.
    """
    layers, homes, experts = served_node.shape
    rows = num_homes or num_nodes
    visits = np.zeros((layers, rows, num_nodes), dtype=np.int64)
    for first in range(0, num_nodes, _NODES_PER_BYTE):
        # one bit per node of this block: the picks of a token are or-ed into one byte
        bit = served_node - first
        inside = (bit >= 0) & (bit < _NODES_PER_BYTE)
        table = np.zeros((layers, homes, experts + 1), dtype=np.uint8)
        table[:, :, 1:] = np.where(inside, 1 << np.where(inside, bit, 0), 0)
        patterns = _count_patterns(ids, table.reshape(layers, -1), homes, home_node, rows)
        width = min(_NODES_PER_BYTE, num_nodes - first)
        bits = (np.arange(256)[:, None] >> np.arange(width)) & 1
        visits[:, :, first : first + width] = patterns @ bits
    return visits


def _count_patterns(ids, table, homes, home_node, nodes) -> np.ndarray:
    """[L, M, 256] int64: tokens by home node and by the or of their table bytes."""
    layers, columns = table.shape
    if ids.size >= COMPILED_PICKS:
        found = np.zeros((layers, nodes, 256), dtype=np.int64)
        _count_layers(_add_patterns, ids, table, home_node, columns // homes, found)
        return found
    counts = np.zeros(layers * nodes * 256, dtype=np.int64)
    layer_of = np.arange(layers)[:, None, None]
    for rows, part in chunks(ids):
        part += layer_of * columns
        if homes > 1:
            part += (home_node[rows] * (columns // homes))[None, :, None]
        pattern = np.bitwise_or.reduce(table.ravel()[part], axis=2).astype(np.int64)
        pattern += (layer_of[..., 0] * nodes + home_node[rows]) * 256
        counts += np.bincount(pattern.ravel(), minlength=counts.size)
    return counts.reshape(layers, nodes, 256)


def picks_by_home(
    ids: np.ndarray, num_experts: int, home: np.ndarray, num_homes: int
) -> np.ndarray:
    """[L, H, E] int64: picks of expert e by tokens whose ``home`` [T] is h."""
    if ids.size >= COMPILED_PICKS:
        return compiled_picks_by_home(ids, num_experts, home, num_homes)
    layers, columns = ids.shape[1], num_experts + 1
    counts = np.zeros(layers * num_homes * columns, dtype=np.int64)
    layer_of = np.arange(layers)[:, None]
    for rows, part in chunks(ids):
        part += ((layer_of * num_homes + home[rows]) * columns)[:, :, None]
        counts += np.bincount(part.ravel(), minlength=counts.size)
    return counts.reshape(layers, num_homes, columns)[:, :, 1:]


def compiled_picks_by_home(
    ids: np.ndarray, num_experts: int, home: np.ndarray, num_homes: int
) -> np.ndarray:
    """``picks_by_home`` compiled, whatever the size: for repeated calls."""
    found = np.zeros((ids.shape[1], num_homes, num_experts + 1), dtype=np.int64)
    _count_layers(_add_picks, ids, home, found)
    return found[:, :, 1:]


def picks_by_batch(
    ids: np.ndarray, num_experts: int, batch_tokens: int, served_slot: np.ndarray | None, home
) -> Iterator[np.ndarray]:
    """Yield int64 [B, L, E] picks of some consecutive batches; a rest that fills no batch is left
    out.

    With ``served_slot`` [L, G, E] and ``home`` [T]: [B, L, P] picks served by each slot.
    """
    tokens, layers, _ = ids.shape
    batch_tokens = min(batch_tokens, tokens)
    width = num_experts if served_slot is None else int(served_slot.max()) + 1
    if served_slot is not None:
        columns = num_experts + 1
        table = np.zeros((*served_slot.shape[:2], columns), dtype=np.int64)
        table[:, :, 1:] = served_slot + 1
    group = max(CHUNK_PICKS // max(layers * max(width, batch_tokens * ids.shape[2]), 1), 1)
    batches = tokens // batch_tokens
    layer_of = np.arange(layers)[:, None, None]
    for first in range(0, batches, group):
        count = min(group, batches - first)
        rows = slice(first * batch_tokens, (first + count) * batch_tokens)
        part = ids[rows].transpose(1, 0, 2).astype(np.int64) + 1
        if served_slot is not None:
            part += (layer_of * served_slot.shape[1] + home[rows][None, :, None]) * columns
            part = table.ravel()[part]
        batch_of = (np.arange(count * batch_tokens) // batch_tokens)[None, :, None]
        part += (batch_of * layers + layer_of) * (width + 1)
        size = count * layers * (width + 1)
        counts = np.bincount(part.ravel(), minlength=size)
        yield counts.reshape(count, layers, width + 1)[:, :, 1:]


def rank_batches(
    ids: np.ndarray, batch_tokens: int, served_slot: np.ndarray, home: np.ndarray, shape
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ([B, L, G] picks served by each rank, [B, L, G] slots of it that they use), int64, of
    some consecutive batches; a rest that fills no batch is left out. Compiled.

    Args:
        served_slot: [L, H, E]; H = 1: the same for all homes. home: [T], below H.
        shape: (G ranks, slots per rank).
    """
    tokens, layers, _ = ids.shape
    ranks, per_rank = shape
    columns = served_slot.shape[2] + 1
    table = np.zeros((layers, served_slot.shape[1], columns), dtype=np.int64)
    table[:, :, 1:] = served_slot + 1
    table = table.reshape(layers, -1)
    size = min(batch_tokens, tokens)
    group = max(CHUNK_PICKS // (layers * ranks), 1)
    for start in range(0, tokens // size, group):
        count = min(group, tokens // size - start)
        rows = slice(start * size, (start + count) * size)
        loads = np.empty((count, layers, ranks), dtype=np.int64)
        active = np.empty((count, layers, ranks), dtype=np.int64)
        given = (table, home[rows], columns, size, loads, active, per_rank)
        _count_layers(_add_batches, ids[rows], *given)
        yield loads, active


@dataclass(frozen=True, slots=True, kw_only=True)
class Coactivation:
    """What a placement needs to know of a trace: how often experts are picked, alone and together.

    pairs: int64 [L, E, E], tokens that picked both experts; symmetric, zero on the diagonal.
    load: int64 [L, E], tokens that picked the expert.
    layer_ids: transformer layer index of each row. num_tokens: rows counted (a token whose layers
    lie in the shards of several pipeline stages counts once per shard). model: of the trace.
    """

    pairs: np.ndarray
    load: np.ndarray
    layer_ids: tuple[int, ...]
    num_tokens: int
    model: str = ""

    @property
    def num_experts(self) -> int:
        return int(self.load.shape[1])


def count_coactivation(
    trace: RoutingTrace | str | os.PathLike[str],
    *,
    max_bytes: int = 128 << 20,
    progress: Callable[[int, int, str], None] | None = None,
) -> Coactivation:
    """Count picks and pairs of picks of every layer in one pass.

    The result does not depend on the number of threads, nor on how a trace is cut into shards.

    Args:
        trace: a trace in memory, or the path of one. A directory of Parquet shards is read piece by
            piece and may be larger than memory; an .npz file is read whole.
        max_bytes: about what the expert ids of a piece of a shard may take, read and decoded.
        progress: called with (pieces done, pieces in all, text) when reading a directory.

    Raises:
        TraceError: the trace has counts only, or its files are damaged or do not fit each other.
    """
    if not isinstance(trace, RoutingTrace):
        pieces = read_pieces(trace, max_bytes=max_bytes, progress=progress)
        return _sum_parts(pieces, sort=True)
    return _sum_parts(iter([trace]), sort=False)


def _sum_parts(parts: Iterator[RoutingTrace], *, sort: bool) -> Coactivation:
    """Add up parts of one trace, of whatever rows and layers; layers by number, or as they come."""
    rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    seen: dict[int, int] = {}
    model = ""
    num = 0
    for part in parts:
        ids = part.tokens_only("count_coactivation").expert_ids
        model, num = part.model, part.num_experts
        pairs, load = count_pairs(ids, num, np.zeros(len(ids), np.int64))
        for place, layer in enumerate(int(i) for i in part.layer_ids):
            seen[layer] = seen.get(layer, 0) + len(ids)
            if layer not in rows:
                rows[layer] = (np.zeros((num, num), np.int64), np.zeros(num, np.int64))
            both, alone = rows[layer]
            both += pairs[place]
            both += pairs[place].T
            alone += load[place, 0]
    layers = sorted(rows) if sort else list(rows)
    result = Coactivation(
        pairs=np.zeros((len(layers), num, num), np.int64),
        load=np.zeros((len(layers), num), np.int64),
        layer_ids=tuple(layers),
        num_tokens=max(seen.values(), default=0),
        model=model,
    )
    for place, layer in enumerate(layers):
        result.pairs[place], result.load[place] = rows.pop(layer)
        np.fill_diagonal(result.pairs[place], 0)
    return result


def count_pairs(
    ids: np.ndarray, num_experts: int, unit: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 [L, E, E] pairs in the order of the picks, uint32 [L, U, E] picks by unit) of ids
    [T, L, K]; ``unit`` [T]: of each token.

    Threads take different layers, so they share nothing that is written.
    """
    layers = ids.shape[1]
    pairs = np.zeros((layers, num_experts, num_experts), np.uint32)
    load = np.zeros((layers, int(unit.max(initial=0)) + 1, num_experts), np.uint32)
    _count_layers(_add_pairs, ids, unit, pairs, load)
    return pairs, load


def pair_weight(pairs: np.ndarray) -> np.ndarray:
    """[E, E] float64 tokens that picked both, symmetric, from a table of ``count_pairs``."""
    weight = pairs.astype(np.float64)
    weight += weight.T
    np.fill_diagonal(weight, 0)
    return weight


def pairs_of_layer(ids: np.ndarray, num_experts: int) -> np.ndarray:
    """[E, E] float64 tokens that pick both experts, symmetric, zero diagonal, of ids [T, K]."""
    unit = np.zeros(len(ids), np.int64)
    return pair_weight(count_pairs(ids[:, None], num_experts, unit)[0][0])


Result = TypeVar("Result")


def over_layers(fill: Callable[[int, int], object], num_layers: int, *, least: int = 1) -> None:
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


def _count_layers(loop: Callable[..., None], ids: np.ndarray, *given: Any) -> None:
    """Run a loop below, compiled, over all layers of ids [T, L, K]."""
    compiled = _compiled(loop)
    over_layers(lambda first, last: compiled(ids, first, last, *given), ids.shape[1])


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


# The loops: C columns of a table, B batches, H homes that are served differently. They count the
# layers ``first`` to ``last``; threads share the results.


@functools.cache
def _compiled(loop: Callable[..., None]) -> Callable[..., None]:
    """Compile a loop when it is first asked for: to import numba takes 0.3 s."""
    from moe_locality.placement.count_kernels import compiled

    return compiled(loop)


_BLOCK_TOKENS = 2048  # rows of a block stay in the cache while its layers are counted


def _add_patterns(ids, first, last, table, home, columns, counts):
    """Count into counts [L, M, 256] the or of table [L, C][layer, home * columns + id + 1]."""
    tokens, picks = ids.shape[0], ids.shape[2]
    width, homes = table.shape[1], counts.shape[1]
    flat, into = table.ravel(), counts.ravel()
    for token in range(tokens):  # by token: the tables of all layers stay in the cache
        at = home[token] * columns + 1 if width > columns else 1
        for layer in range(first, last):
            row = layer * width + at
            found = np.uint8(0)
            for pick in range(picks):
                found |= flat[np.uint64(row + ids[token, layer, pick])]
            into[np.uint64((layer * homes + home[token]) * 256 + found)] += 1


def _add_picks(ids, first, last, home, counts):
    """Count into counts [L, H, E + 1] the picks (id + 1) of tokens with home [T]."""
    tokens, picks = ids.shape[0], ids.shape[2]
    for start in range(0, tokens, _BLOCK_TOKENS):
        stop = min(start + _BLOCK_TOKENS, tokens)
        for layer in range(first, last):
            for token in range(start, stop):
                into = counts[layer, home[token]]
                for pick in range(picks):
                    into[np.uint64(ids[token, layer, pick] + 1)] += 1


def _add_batches(ids, first, last, table, home, columns, size, loads, active, per_rank):
    """Fill loads and active [B, L, G]: picks of each rank in each batch of ``size`` tokens, and how
    many of its ``per_rank`` slots they use.

    ``table`` [L, C] holds the slot + 1 of home * columns + id + 1, 0 for no pick.
    """
    picks = ids.shape[2]
    batches, ranks = loads.shape[0], loads.shape[2]
    several = table.shape[1] > columns
    counts = np.zeros(ranks * per_rank + 1, np.int64)
    for batch in range(batches):
        for layer in range(first, last):
            slots = table[layer]
            counts[:] = 0
            for token in range(batch * size, (batch + 1) * size):
                at = home[token] * columns + 1 if several else 1
                for pick in range(picks):
                    counts[slots[np.uint64(at + ids[token, layer, pick])]] += 1
            for rank in range(ranks):
                load, used = 0, 0
                for slot in range(rank * per_rank + 1, (rank + 1) * per_rank + 1):
                    load += counts[slot]
                    used += counts[slot] > 0
                loads[batch, layer, rank] = load
                active[batch, layer, rank] = used


_PAIR_BLOCK_TOKENS = 8192
"""Tokens counted for one layer before the next layer: enough that the table of a layer pays for
being fetched, few enough that the block, copied layer by layer, stays in the last-level cache."""


def _add_pairs(ids, first, last, unit, pairs, load):
    """Count the layers ``first`` to ``last`` of ids [T, L, K] into pairs [L, E, E] and, by unit
    (request, say) [T] of the token, into load [L, U, E].

    A pair (e, f) is counted in pairs[e, f] or in pairs[f, e], whichever order the token has it in.
    Negative ids are no picks. Threads may share the tables when their layers differ.
    """
    tokens, picks = ids.shape[0], ids.shape[2]
    num = np.uint64(load.shape[2])
    part = np.empty((last - first, min(_PAIR_BLOCK_TOKENS, tokens), picks), ids.dtype)
    found = np.empty(picks, dtype=np.uint64)  # unsigned: no test for an index from the end
    for start in range(0, tokens, _PAIR_BLOCK_TOKENS):
        stop = min(start + _PAIR_BLOCK_TOKENS, tokens)
        for token in range(start, stop):  # rows of a layer lie far apart: one pass over all of them
            for layer in range(first, last):
                for pick in range(picks):
                    part[layer - first, token - start, pick] = ids[token, layer, pick]
        for layer in range(first, last):
            table = pairs[layer].ravel()
            for token in range(start, stop):
                row = load[layer, unit[token]]
                count = 0
                for pick in range(picks):
                    e = part[layer - first, token - start, pick]
                    if e >= 0:
                        found[count] = e
                        count += 1
                for i in range(count):
                    e = found[i]
                    row[e] += np.uint32(1)
                    for j in range(i):
                        table[e * num + found[j]] += np.uint32(1)
