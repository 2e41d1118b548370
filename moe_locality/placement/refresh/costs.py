"""What the moves of a refresh cost, what they save, and whether that pays."""

from __future__ import annotations

import numpy as np

from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.plan.serving import choose_serving_nodes

CERTAIN = 2.0
"""Standard errors by which the saving must be above zero to count."""

REPLICA_TOKENS = 4096
"""Tokens of the sample on which plans with replicas are compared."""

LEVELED = 0.01
"""Change of the rank imbalance that is worth a word where copies are not saved."""


def verdict(moved, saving, error, levels, even, steps) -> tuple[bool | None, str]:
    if not moved:
        return False, "no swap within the budget lowers the copies"
    if not saving > CERTAIN * error and levels[0] - levels[1] > LEVELED:
        return None, (
            f"the swaps level the ranks (max / mean {levels[0]:.3f} to {levels[1]:.3f}) and save "
            f"{saving:.4f} copies per token and layer: decide by how far the busiest rank holds "
            "the others up"
        )
    if np.isnan(saving):
        return None, "no sample of tokens in the state: the saving is not known"
    if not saving > CERTAIN * error:
        return False, (
            f"the saving of {saving:.4f} copies per token and layer is within the noise of the "
            f"latest tokens (standard error {error:.4f})"
        )
    if even is None or steps is None:
        return None, (
            f"saves {saving:.4f} copies per token and layer: give expert_bytes, copy_bytes, "
            "tokens_per_step and steps to weigh it against the move"
        )
    words = f"the move pays for itself after {even:.0f} steps, and {steps:.0f} are planned"
    return (True, words) if even <= steps else (False, words)


def moves(old, new, topology, expert_bytes) -> tuple[int, float | None]:
    """(moved slots, time in us until the busiest rank has fetched its new experts)."""
    ranks = old.rank_of_slot
    nodes = old.node_of_rank
    inter = np.zeros((2, old.num_ranks))  # received, sent
    intra = np.zeros((2, old.num_ranks))
    count = 0
    for before, after in zip(old.physical_to_logical_map, new.physical_to_logical_map, strict=True):
        for slot in np.flatnonzero(before != after):
            expert, to = after[slot], ranks[slot]
            holders = ranks[before == expert]
            if to in holders:
                continue
            near = holders[nodes[holders] == nodes[to]]
            tier, source = (intra, near[0]) if len(near) else (inter, holders[0])
            tier[0, to] += 1
            tier[1, source] += 1
            count += 1
    if expert_bytes is None:
        return count, None
    slow = inter * expert_bytes / (topology.inter_node_gbps * 1e3)
    fast = intra * expert_bytes / (topology.intra_node_gbps * 1e3)
    slow += np.where(inter > 0, topology.inter_node_latency_us, 0)
    fast += np.where(intra > 0, topology.intra_node_latency_us, 0)
    return count, float((slow + fast).max())


def sampled_copies(old, new, state) -> tuple[float, float, float]:
    """(copies before, after, standard error of the difference) per token and layer."""
    from moe_locality.placement.refresh.moves import remote_nodes

    if not len(state.recent_ids):
        return np.nan, np.nan, np.nan
    layers = len(state.layer_ids)
    # with replicas every home is looked at by itself: fewer tokens for the same time
    step = 1 if old.is_permutation else max(len(state.recent_ids) // REPLICA_TOKENS, 1)
    ids = np.ascontiguousarray(state.recent_ids[::step])
    found = [
        remote_nodes(ids, _serving_nodes(plan), plan.num_nodes) / layers for plan in (old, new)
    ]
    saved = found[0] - found[1]
    requests, part = np.unique(state.recent_request[::step], return_inverse=True)
    # tokens of a request are alike: the requests, not the tokens, are the independent draws
    off = np.bincount(part, weights=saved - saved.mean())
    draws = len(requests)
    error = np.sqrt((off**2).sum() * draws / max(draws - 1, 1)) / len(saved)
    return float(found[0].mean()), float(found[1].mean()), float(error if draws > 1 else np.inf)


def _serving_nodes(plan: PlacementPlan) -> np.ndarray:
    """[L, H, E] node that serves an expert for homes on node h; H = 1 without replicas."""
    slots = plan.physical_to_logical_map.astype(np.int64)
    node_of_slot = plan.node_of_rank.astype(np.int64)[plan.rank_of_slot]
    if plan.is_permutation:
        served = np.empty((len(slots), 1, plan.num_experts), np.int64)
        np.put_along_axis(served[:, 0], slots, node_of_slot[None], axis=1)
        return served
    layer, slot = np.indices(slots.shape)
    held = np.zeros((len(slots), plan.num_experts, plan.num_nodes), bool)
    held[layer, slots, node_of_slot[slot]] = True
    load = plan.expert_load
    if load is None:
        load = np.ones(held.shape[:2], np.int64)
    return np.ascontiguousarray(choose_serving_nodes(held, load))


def rank_imbalance(plan: PlacementPlan, load: np.ndarray) -> float:
    """Max / mean of the rank loads, replicas sharing evenly, mean over layers."""
    share = load / plan.logical_replica_count
    slots = np.take_along_axis(share, plan.physical_to_logical_map.astype(np.int64), axis=1)
    by_rank = slots.reshape(len(slots), plan.num_ranks, -1).sum(axis=2)
    mean = by_rank.mean(axis=1)
    return float(
        np.divide(by_rank.max(axis=1), mean, out=np.ones(len(mean)), where=mean > 0).mean()
    )
