"""Exact integer counts of a trace: picks and pairs of picks; under a plan node visits, picks by
home, picks by batch.

Plain numpy, layer by layer; a trace of ``COMPILED_PICKS`` or more is counted by the same loops
compiled, in threads: the first ``evaluate`` of a small one should not wait for a compiler, and
memory stays bounded whatever the trace. Shapes: T tokens, L layers, K picks, E experts, P slots, G
ranks, M nodes, H homes that are served differently, C columns of a table, B batches.

Threads are plain ones, one per processor that this process may use: a compiled parallel loop would
start OpenMP threads, and a process that has those must not fork.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import numpy as np

from moe_locality.trace.io import read_pieces
from moe_locality.trace.schema import RoutingTrace

COMPILED_PICKS = 1 << 23
CHUNK_PICKS = 1 << 20
_NODES_PER_BYTE = 8


def node_visits(
    ids: np.ndarray, served_node: np.ndarray, home: np.ndarray, num_nodes: int, num_homes: int
) -> np.ndarray:
    """[L, num_homes, M] int64: how many tokens of a home have a pick that is served on a node; a
    token counts once per home and node, its own node included.

    ``ids`` [T, L, K], -1 = no pick; ``home`` [T], below ``num_homes``; ``served_node`` [L, H, E]
    the node that serves expert e for home h, H = 1: for all homes.
    """
    layers, homes, experts = served_node.shape
    visits = np.zeros((layers, num_homes, num_nodes), dtype=np.int64)
    for first in range(0, num_nodes, _NODES_PER_BYTE):
        # one bit per node of this block: the picks of a token are or-ed into one byte
        bit = served_node - first
        inside = (bit >= 0) & (bit < _NODES_PER_BYTE)
        table = np.zeros((layers, homes, experts + 1), dtype=np.uint8)
        table[:, :, 1:] = np.where(inside, 1 << np.where(inside, bit, 0), 0)
        patterns = np.zeros((layers, num_homes, 256), dtype=np.int64)  # tokens by home and byte
        if ids.size >= COMPILED_PICKS:
            given = (table.reshape(layers, -1), home, experts + 1, patterns)
            _count_layers(_add_patterns, ids, *given)
        else:
            for served, of_layer, found in zip(table, ids.swapaxes(0, 1), patterns, strict=True):
                served = served[home[:, None] if homes > 1 else 0, of_layer + 1]
                key = home * 256 + np.bitwise_or.reduce(served, axis=1)
                found += np.bincount(key, minlength=found.size).reshape(found.shape)
        width = min(_NODES_PER_BYTE, num_nodes - first)
        bits = (np.arange(256)[:, None] >> np.arange(width)) & 1
        visits[:, :, first : first + width] = patterns @ bits
    return visits


def picks_by_home(
    ids: np.ndarray, num_experts: int, home: np.ndarray, num_homes: int, *, repeated: bool = False
) -> np.ndarray:
    """[L, H, E] int64: picks of expert e by tokens whose ``home`` [T] is h; compiled, whatever the
    size, where the call is ``repeated``.
    """
    layers, columns = ids.shape[1], num_experts + 1
    counts = np.zeros((layers, num_homes, columns), dtype=np.int64)
    if repeated or ids.size >= COMPILED_PICKS:
        _count_layers(_add_picks, ids, home, counts)
    else:
        for of_layer, found in zip(ids.swapaxes(0, 1), counts, strict=True):
            key = home[:, None] * columns + of_layer + 1
            found += np.bincount(key.ravel(), minlength=found.size).reshape(found.shape)
    return counts[:, :, 1:]


def picks_by_batch(
    ids: np.ndarray,
    width: int,
    batch_tokens: int,
    column_of: Callable[[slice], np.ndarray] | None = None,
) -> Iterator[np.ndarray]:
    """Yield int64 [B, L, W] picks by expert of some consecutive batches; a rest that fills no batch
    is left out. ``column_of``: returns [T, L, K] what the picks of some rows are counted by
    instead, below W.
    """
    tokens, layers, picks = ids.shape
    size = min(batch_tokens, tokens)
    group = max(CHUNK_PICKS // max(layers * max(width, size * picks), 1), 1)
    layer_of = np.arange(layers)[:, None]
    for first in range(0, tokens // size, group):
        count = min(group, tokens // size - first)
        rows = slice(first * size, (first + count) * size)
        batch_of = np.arange(count * size)[:, None, None] // size
        key = (batch_of * layers + layer_of) * width
        key = key + (ids[rows] if column_of is None else column_of(rows))
        counts = np.bincount(key[ids[rows] >= 0], minlength=count * layers * width)
        yield counts.reshape(count, layers, width)


def rank_batches(
    ids: np.ndarray, batch_tokens: int, served_slot: np.ndarray, home: np.ndarray, shape
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ([B, L, G] picks served by each rank, [B, L, G] slots of it that they use), int64, of
    some consecutive batches; a rest that fills no batch is left out. Compiled.

    ``served_slot`` [L, H, E]; H = 1: the same for all homes. ``home`` [T], below H. ``shape``: (G
    ranks, slots per rank).
    """
    (tokens, layers, _), (ranks, per_rank) = ids.shape, shape
    columns = served_slot.shape[2] + 1
    table = np.zeros((layers, served_slot.shape[1], columns), dtype=np.int64)
    table[:, :, 1:] = served_slot + 1
    table = table.reshape(layers, -1)
    size = min(batch_tokens, tokens)
    group = max(CHUNK_PICKS // (layers * ranks), 1)
    for start in range(0, tokens // size, group):
        count = min(group, tokens // size - start)
        rows = slice(start * size, (start + count) * size)
        loads, active = np.empty((2, count, layers, ranks), dtype=np.int64)
        given = (table, home[rows], columns, size, loads, active, per_rank)
        _count_layers(_add_batches, ids[rows], *given)
        yield loads, active


@dataclass(frozen=True, slots=True, kw_only=True)
class Coactivation:
    """What a placement needs to know of a trace: how often experts are picked, alone and together.

    pairs: int64 [L, E, E], tokens that picked both experts; symmetric, zero on the diagonal.
    load: int64 [L, E], tokens that picked the expert.
    layer_ids: transformer layer index of each row. num_tokens: rows counted (a token whose layers
    lie in the shards of several pipeline stages counts once per shard).
    """

    pairs: np.ndarray
    load: np.ndarray
    layer_ids: tuple[int, ...]
    num_tokens: int


def count_coactivation(
    trace: RoutingTrace | str | os.PathLike[str],
    *,
    max_bytes: int = 128 << 20,
    progress: Callable[[int, int, str], None] | None = None,
) -> Coactivation:
    """Count picks and pairs of picks of every layer in one pass.

    The result does not depend on the number of threads, nor on how a trace is cut into shards.
    Raises TraceError for counts only, or files that are damaged or do not fit each other.

    Args:
        trace: a trace in memory, or the path of one. A directory of Parquet shards is read piece by
            piece and may be larger than memory; an .npz file is read whole.
        max_bytes: about what the expert ids of a piece of a shard may take, read and decoded.
        progress: called with (pieces done, pieces in all, text) when reading a directory.
    """
    whole = isinstance(trace, RoutingTrace)
    # parts of whatever rows and layers
    parts = [trace] if whole else read_pieces(trace, max_bytes=max_bytes, progress=progress)
    rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    seen: dict[int, int] = {}
    num = 0
    for part in parts:
        ids, num = part.tokens_only("count_coactivation").expert_ids, part.num_experts
        pairs, load = count_pairs(ids, num, np.zeros(len(ids), np.int64))
        for place, layer in enumerate(int(i) for i in part.layer_ids):
            seen[layer] = seen.get(layer, 0) + len(ids)
            if layer not in rows:
                rows[layer] = (np.zeros((num, num), np.int64), np.zeros(num, np.int64))
            both, alone = rows[layer]
            both += pairs[place]
            both += pairs[place].T
            alone += load[place, 0]
    layers = list(rows) if whole else sorted(rows)
    result = Coactivation(
        pairs=np.zeros((len(layers), num, num), np.int64),
        load=np.zeros((len(layers), num), np.int64),
        layer_ids=tuple(layers),
        num_tokens=max(seen.values(), default=0),
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
    """Call ``fill(first, last)`` so that every layer is in one call, in several threads, each for
    ``least`` layers or more.

    ``fill`` must release the interpreter lock (``nogil``) to gain from it, and write nothing that
    belongs to other layers; then the number of threads changes no result.
    """
    count = max(min(processors(), num_layers // least), 1)
    edges = [num_layers * i // count for i in range(count + 1)]
    map_layers(lambda part: fill(edges[part], edges[part + 1]), count)


@cache
def _compiled(loop: Callable[..., None]) -> Callable[..., None]:
    from moe_locality.placement.count_kernels import compiled  # not before: numba takes 0.3 s

    return compiled(loop)


def _count_layers(loop: Callable[..., None], ids: np.ndarray, *given: Any) -> None:
    """Run a loop, compiled, over all layers of ids [T, L, K]."""
    count = _compiled(loop)
    over_layers(lambda first, last: count(ids, first, last, *given), ids.shape[1])


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


# -- loops that are compiled: they count the layers first to last, and threads share the results --

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
    """Count ids [T, L, K] into pairs [L, E, E] and, by unit (request, say) [T] of the token, into
    load [L, U, E].

    A pair (e, f) is counted in pairs[e, f] or in pairs[f, e], whichever order the token has it in.
    Negative ids are no picks.
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
