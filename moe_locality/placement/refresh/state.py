"""What a refresh remembers of the traffic, and its compiled moves.

The state holds decayed co-activation counts and the latest tokens. Each move is the best pair swap
of any layer, until a budget is used. Items are slots (without replicas: one per expert), or
whole groups of experts. Shapes: L layers, N items, B blocks (nodes), G ranks, E experts (of groups:
groups).
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.files import replace_file
from moe_locality.placement.count_kernels import compiled
from moe_locality.placement.counting import count_coactivation
from moe_locality.placement.search.swaps import near_blocks, swap_near
from moe_locality.trace.schema import RoutingTrace

SAMPLE_TOKENS = 8192
_FORMAT = 1
_ARRAYS = ("layer_ids", "pairs", "load", "recent_ids", "recent_request")


@dataclass(slots=True, kw_only=True)
class RefreshState:
    """Counts of all traffic so far, older tokens weighing less, and a sample of the latest.
    ``absorb`` changes it in place; nothing of an old trace has to be kept or counted again.
    """

    model: str
    num_experts: int
    layer_ids: np.ndarray  # int32 [L]
    pairs: np.ndarray  # float32 [L, E, E], weighed tokens that picked both experts; zero diagonal
    load: np.ndarray  # float64 [L, E], weighed picks
    tokens: float  # weighed
    half_life_tokens: float | None
    """After so many newer tokens a token counts half; None: all count the same for ever."""
    recent_ids: np.ndarray  # int16 [S, L, K], the latest tokens
    recent_request: np.ndarray  # int64 [S]

    @classmethod
    def from_trace(
        cls,
        trace: RoutingTrace,
        *,
        half_life_tokens: float | None = None,
        sample_tokens: int = SAMPLE_TOKENS,
    ) -> RefreshState:
        """Count a trace of tokens; the end of it becomes the sample. Raises TraceError where it has
        counts only, PlacementError where the half-life is not above 0.
        """
        if half_life_tokens is not None and not half_life_tokens > 0:
            raise PlacementError(
                f"half_life_tokens: found {half_life_tokens}, expected a number of tokens above 0, "
                "or None to never forget"
            )
        layers, experts = trace.num_layers, trace.num_experts
        state = cls(
            model=trace.model,
            num_experts=experts,
            layer_ids=np.asarray(trace.layer_ids, np.int32),
            pairs=np.zeros((layers, experts, experts), np.float32),
            load=np.zeros((layers, experts)),
            tokens=0.0,
            half_life_tokens=half_life_tokens,
            recent_ids=np.zeros((0, layers, trace.top_k), np.int16),
            recent_request=np.zeros(0, np.int64),
        )
        state.absorb(trace, sample_tokens=sample_tokens)
        return state

    def absorb(self, trace: RoutingTrace, *, sample_tokens: int = SAMPLE_TOKENS) -> None:
        """Let old counts decay by the number of new tokens, and add the new ones; raises
        PlacementError for a trace of another model, or with other layers, experts or top_k.
        """
        view = trace.tokens_only("a refresh")
        found = (trace.model, trace.num_experts, trace.layer_ids.tolist(), trace.top_k)
        top_k = self.recent_ids.shape[2]
        expected = (self.model, self.num_experts, self.layer_ids.tolist(), top_k)
        if found != expected:
            raise PlacementError(
                f"found new tokens of (model, experts, layers, top_k) {found}, expected "
                f"{expected}: absorb traces of the model that the state was made from"
            )
        new = count_coactivation(trace)
        if self.half_life_tokens is not None:
            decay = 0.5 ** (trace.num_tokens / self.half_life_tokens)
            self.pairs *= np.float32(decay)
            self.load *= decay
            self.tokens *= decay
        self.pairs += new.pairs
        self.load += new.load
        self.tokens += trace.num_tokens
        ids = np.concatenate([self.recent_ids, view.expert_ids[-sample_tokens:]])
        request = np.concatenate([self.recent_request, view.request_id[-sample_tokens:]])
        self.recent_ids = np.ascontiguousarray(ids[-sample_tokens:])
        self.recent_request = request[-sample_tokens:]

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the state as .npz, whole or not at all."""
        place = Path(path)
        names = ("model", "num_experts", "tokens", *_ARRAYS)
        content: dict[str, Any] = {name: getattr(self, name) for name in names}
        content |= {"format": _FORMAT, "half_life_tokens": self.half_life_tokens or np.nan}
        try:
            replace_file(place, lambda file: np.savez(file, **content))
        except OSError as error:
            raise PlacementError(
                f"cannot write the refresh state {place}: {error.strerror or error}: give a path "
                "in a directory that you may write"
            ) from error
        return place

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> RefreshState:
        """Read a state; raises PlacementError when the file is missing or no such state."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if int(file["format"]) != _FORMAT:
                    raise ValueError(f"format {int(file['format'])}, expected {_FORMAT}")
                half_life = float(file["half_life_tokens"])
                state = cls(
                    model=str(file["model"]),
                    num_experts=int(file["num_experts"]),
                    tokens=float(file["tokens"]),
                    half_life_tokens=None if np.isnan(half_life) else half_life,
                    **{name: file[name] for name in _ARRAYS},
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise PlacementError(
                f"cannot read the refresh state {path}: {error}: make it again with "
                "RefreshState.from_trace"
            ) from error
        layers, num = len(state.layer_ids), state.num_experts
        shapes = (state.pairs.shape, state.load.shape, state.recent_ids.shape[1:2])
        fine = shapes == ((layers, num, num), (layers, num), (layers,))
        if not fine or state.recent_ids.max(initial=-1) >= num:
            raise PlacementError(
                f"the refresh state {path} is damaged: found shapes {shapes}, expected those of "
                f"{layers} layers and {num} experts: make it again with RefreshState.from_trace"
            )
        return state


EXCESS_WEIGHT = 1.0
"""Pairs on one node that a swap may cost per pick that it takes from above a cap. With much more,
few swaps all go into balance and copies rise; with much less, none do."""


@compiled
def swap_best(weight, pin, load, item, block_of, rank_of, block_cap, rank_cap, most):
    """Swap items between blocks, always the pair with the largest gain in any layer.

    The gain is weight inside blocks plus ``EXCESS_WEIGHT`` times the load that comes down to the
    caps. No swap raises the load above the caps or puts an expert twice on a rank. Ties go to the
    first layer, then to the first pair. Returns the number of swaps.

    Args:
        weight: [L, N, N] gain of having both items in one block (symmetric, zero diagonal).
        pin: [L, N, B] gain of having the item in that block.
        load: [L, N]; item: [L, N] expert of each slot; block_cap, rank_cap: [L].
        block_of, rank_of: [L, N], changed in place: a swap exchanges the places of two items.
        most: swaps that the budget pays for.
    """
    layers, num = load.shape
    num_ranks = rank_of.max() + 1
    near = np.empty(pin.shape)
    block_load = np.zeros((layers, pin.shape[2]))
    rank_load = np.zeros((layers, num_ranks))
    has = np.zeros((layers, num_ranks, item.max() + 1), dtype=np.bool_)
    pair = np.full((layers, 2), -1, dtype=np.int64)
    score = np.zeros(layers)
    for layer in range(layers):
        near[layer] = near_blocks(weight[layer], pin[layer], block_of[layer])
        for i in range(num):
            block_load[layer, block_of[layer, i]] += load[layer, i]
            rank_load[layer, rank_of[layer, i]] += load[layer, i]
            has[layer, rank_of[layer, i], item[layer, i]] = True
    done, stale = 0, -1
    while done < most:
        for layer in range(layers):
            if stale < 0 or layer == stale:
                given = (weight[layer], near[layer], load[layer], item[layer])
                places = (block_of[layer], rank_of[layer])
                loads = (block_load[layer], rank_load[layer])
                caps = (block_cap[layer], rank_cap[layer])
                score[layer] = _find(*given, places, loads, caps, has[layer], pair[layer])
        stale = np.argmax(score)
        if score[stale] <= 0:
            break
        i, j = pair[stale]
        a, b = block_of[stale, i], block_of[stale, j]
        swap_near(near[stale], weight[stale], a, b, i, j)
        block_load[stale, a] += load[stale, j] - load[stale, i]
        block_load[stale, b] -= load[stale, j] - load[stale, i]
        block_of[stale, i], block_of[stale, j] = b, a
        _exchange(load[stale], item[stale], rank_of[stale], rank_load[stale], has[stale], i, j)
        done += 1
    return done


@compiled
def level_best(load, item, rank_of, node_of_rank, whole_nodes, most):
    """Swap slots so that the busiest ranks do less: always in the least level layer that can gain.

    ``load``, ``item``, ``rank_of`` [L, N], ``most`` and what is returned: as in ``swap_best``.
    ``node_of_rank`` [G]; ``whole_nodes``: exchange inside a node only.
    """
    layers, num = load.shape
    num_ranks = len(node_of_rank)
    rank_load = np.zeros((layers, num_ranks))
    has = np.zeros((layers, num_ranks, item.max() + 1), dtype=np.bool_)
    for layer in range(layers):
        for i in range(num):
            rank_load[layer, rank_of[layer, i]] += load[layer, i]
            has[layer, rank_of[layer, i], item[layer, i]] = True
    uneven = np.empty(layers)
    for layer in range(layers):
        uneven[layer] = rank_load[layer].max() / max(rank_load[layer].mean(), 1e-300)
    done = 0
    while done < most:
        layer = np.argmax(uneven)
        if uneven[layer] <= 0:
            break
        held = (load[layer], item[layer], rank_of[layer], rank_load[layer], has[layer])
        i, j = _find_level(*held, node_of_rank, whole_nodes)
        if i < 0:
            uneven[layer] = -1.0  # nothing left to gain in this layer
            continue
        _exchange(*held, i, j)
        uneven[layer] = rank_load[layer].max() / max(rank_load[layer].mean(), 1e-300)
        done += 1
    return done


@compiled
def _over(first, second, shift, cap):
    """Change of the load above ``cap`` when ``shift`` moves from ``second`` to ``first``."""
    after = max(first + shift - cap, 0.0) + max(second - shift - cap, 0.0)
    return after - max(first - cap, 0.0) - max(second - cap, 0.0)


@compiled
def _find(weight, near, load, item, places, loads, caps, has, pair):
    """Write the best swap of a layer into ``pair``; return its score, 0 when none helps."""
    block_of, rank_of = places
    block_load, rank_load = loads
    best = 0.0
    level = block_load.max() <= caps[0] and rank_load.max() <= caps[1]
    for i in range(len(load)):
        a, r = block_of[i], rank_of[i]
        for j in range(i):
            b, s = block_of[j], rank_of[j]
            if a == b:
                continue
            gain = near[i, b] - near[i, a] + near[j, a] - near[j, b] - 2 * weight[i, j]
            if level and gain <= best:
                continue
            if has[s, item[i]] or has[r, item[j]]:
                continue
            shift = load[j] - load[i]
            over = _over(block_load[a], block_load[b], shift, caps[0])
            if r != s:
                over += _over(rank_load[r], rank_load[s], shift, caps[1])
            if over <= 0 and gain - EXCESS_WEIGHT * over > best:
                best = gain - EXCESS_WEIGHT * over
                pair[0], pair[1] = i, j
    return best


@compiled
def _find_level(load, item, rank_of, rank_load, has, node_of_rank, whole_nodes):
    """The swap of a slot of the busiest rank that leaves the smaller maximum of two ranks."""
    top = np.argmax(rank_load)
    best = rank_load[top] * (1 - 1e-9)
    first, second = -1, -1
    for i in range(len(load)):
        if rank_of[i] != top:
            continue
        for j in range(len(load)):
            r = rank_of[j]
            change = load[i] - load[j]
            if r == top or change <= 0:
                continue
            if whole_nodes and node_of_rank[r] != node_of_rank[top]:
                continue
            larger = max(rank_load[top] - change, rank_load[r] + change)
            if larger < best and not has[r, item[i]] and not has[top, item[j]]:
                best, first, second = larger, i, j
    return first, second


@compiled
def _exchange(load, item, rank_of, rank_load, has, i, j):
    """Exchange the ranks of two items."""
    r, s = rank_of[i], rank_of[j]
    has[r, item[i]], has[s, item[j]] = False, False
    has[s, item[i]], has[r, item[j]] = True, True
    rank_load[r] += load[j] - load[i]
    rank_load[s] += load[i] - load[j]
    rank_of[i], rank_of[j] = s, r
