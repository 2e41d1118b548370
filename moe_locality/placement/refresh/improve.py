"""Improves an existing plan after traffic drift with few moves, and weighs moves against savings.

A refresh exchanges pairs of slots, the pair with the largest gain first, over all layers together,
until a budget of moved slots is used. Caps, replicas and expert groups are kept; every slot that is
not named in a swap stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moe_locality.errors import PlacementError
from moe_locality.placement.balance import most_level, rank_loads
from moe_locality.placement.costs import imbalance
from moe_locality.placement.count_kernels import remote_by_home
from moe_locality.placement.counting import picks_by_home
from moe_locality.placement.homes.predictor import serving_of_plan
from moe_locality.placement.plan import PlacementPlan, check_equal_slots
from moe_locality.placement.problem import Problem, Solution, check_topology
from moe_locality.placement.refresh.state import RefreshState, level_best, swap_best
from moe_locality.topology.cluster import ClusterTopology

IN_SAMPLE_SHARE = 0.6
"""Share of the allowed imbalance of the nodes that a refresh uses on the counts it sees: unseen
requests load nodes less evenly, so a cap met exactly here is broken there. A solve expects this
from how the loads of single requests differ (search/load_noise.py); a refresh keeps decayed counts
and no requests, so one share stands for it."""

ANOTHER_CLUSTER = "refresh on the cluster of the plan, or solve again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refresh:
    """A refreshed plan, what it moves, what it saves, and whether that is worth it.

    moved_slots, moved_share: slots whose expert was not on that rank before; of all slots.
    bytes_moved: with ``expert_bytes``. move_us: time until the busiest rank has its experts, if
        every rank fetches at its full bandwidth.
    copies_before, copies_after: per token and layer, on the latest tokens of the state; nan without
        a sample. saving, saving_error: their difference, and its standard error over requests.
    saved_us_per_step: time that the saved copies would take on the links between nodes, spread
        evenly over the ranks; with ``copy_bytes`` and ``tokens_per_step``.
    imbalance_before, imbalance_after: max / mean rank load by the state's counts, layers' mean.
    worth_it: None where the figures to weigh it were not given; ``reason`` says it in words.
    """

    plan: PlacementPlan
    moved_slots: int
    moved_share: float
    bytes_moved: float | None
    move_us: float | None
    copies_before: float
    copies_after: float
    saving: float
    saving_error: float
    saved_us_per_step: float | None
    break_even_steps: float | None
    imbalance_before: float
    imbalance_after: float
    worth_it: bool | None
    reason: str


def refresh(
    plan: PlacementPlan,
    state: RefreshState,
    topology: ClusterTopology | None = None,
    *,
    move_budget: float = 0.02,
    max_imbalance: float = 1.05,
    group_of: np.ndarray | None = None,
    pin: np.ndarray | None = None,
    expert_bytes: float | None = None,
    copy_bytes: float | None = None,
    tokens_per_step: float | None = None,
    steps: float | None = None,
    judged: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> Refresh:
    """Move few experts so that the latest traffic makes fewer copies; raises PlacementError where
    plan, state and cluster do not fit each other, or the budget is no share.

    Args:
        topology: for the bandwidths; None: the plan's ranks with the default ones.
        move_budget: most slots that may move, as a share of all slots of all layers.
        max_imbalance: cap on max / mean of node and rank loads. Where the drifted load is above it
            already, no swap makes it worse and swaps that bring it down are preferred.
        group_of: [E] group of each expert: groups stay whole, so whole groups are exchanged.
        pin: [L, E, M] picks of each expert by tokens at home on node m, where homes are known.
        expert_bytes: weights of one expert of one layer. copy_bytes: one copy of a token, there and
            back. tokens_per_step: of all ranks together. steps: for which the plan will be used.
        judged: picks [T, L, K], request [T] and home node [T] of tokens that the saving is taken
            from. None: the latest tokens of the state, at uniform homes.
    """
    budget = _budget(plan, move_budget)
    plan.check_fits(
        num_experts=state.num_experts, layer_ids=state.layer_ids.tolist(), model=state.model
    )
    check_topology(plan, topology, ANOTHER_CLUSTER)
    table = _improve(plan, state, budget, max_imbalance, group_of, pin)
    figures = (expert_bytes, copy_bytes, tokens_per_step, steps)
    return _weigh(plan, table, state, topology or plan.topology, figures, judged)


def relevel(
    plan: PlacementPlan, load: np.ndarray, *, move_budget: float, whole_nodes: bool = False
) -> PlacementPlan:
    """Move few experts so that the busiest ranks of new loads [L, E] do less; loads alone, and with
    ``whole_nodes`` inside their nodes (expert groups).
    """
    item = plan.physical_to_logical_map.astype(np.int64)
    shares = np.take_along_axis(load / plan.logical_replica_count, item, axis=1)
    rank_of = np.tile(plan.rank_of_slot.astype(np.int64), (len(item), 1))
    nodes = plan.node_of_rank.astype(np.int64)
    most = _budget(plan, move_budget) // 2
    level_best(np.ascontiguousarray(shares), item, rank_of, nodes, whole_nodes, most)
    table = _settle(plan.physical_to_logical_map, rank_of, plan.num_ranks)
    return _moved(plan, table, np.rint(load).astype(np.int64), home_profiles=None)


def _moved(
    plan: PlacementPlan, table: np.ndarray, load: np.ndarray, **changes: Any
) -> PlacementPlan:
    """The plan with other experts in its slots. Experts that stay on their nodes are served by the
    nodes that served them; the others by all that hold them, the least loaded one preferred.
    """
    changes |= {"physical_to_logical_map": table, "expert_load": load, "serving_nodes": None}
    new = replace(plan, **changes)
    if plan.serving_nodes is None:
        return new
    both = [plan.serving_nodes, new.node_choices()]
    width = max(nodes.shape[3] for nodes in both)
    old, fresh = (
        np.pad(nodes, [(0, 0)] * 3 + [(0, width - nodes.shape[3])], constant_values=-1)
        for nodes in both
    )
    stays = (plan.held_by_node == new.held_by_node).all(axis=2)
    return replace(new, serving_nodes=np.where(stays[:, None, :, None], old, fresh))


def _budget(plan: PlacementPlan, move_budget: float) -> int:
    """Slots that may move."""
    check_equal_slots(plan, "a refresh")
    if not 0 <= move_budget <= 1:
        raise PlacementError(
            f"move_budget: found {move_budget}, expected a share of the slots between 0 and 1"
        )
    return int(move_budget * plan.physical_to_logical_map.size + 1e-9)


def _improve(plan, state, budget, max_imbalance, group_of, pin) -> np.ndarray:
    """[L, P] new physical_to_logical_map; slots that do not move keep their expert."""
    old = plan.physical_to_logical_map
    layers, nodes = len(old), plan.num_nodes
    rank_of = np.tile(plan.rank_of_slot.astype(np.int64), (layers, 1))
    if nodes == 1:
        return old
    if group_of is not None:
        return _improve_groups(plan, state, budget, max_imbalance, np.asarray(group_of), pin)
    item = old.astype(np.int64)
    share = np.take_along_axis(1.0 / plan.logical_replica_count, item, axis=1)
    weight = _slot_weights(state, item, share, nodes)
    load = np.take_along_axis(state.load, item, axis=1) * share
    pins = np.zeros((layers, item.shape[1], nodes))
    if pin is not None:
        pins[:] = np.take_along_axis(pin, item[:, :, None], axis=1) * share[:, :, None]
    block_of = plan.node_of_rank.astype(np.int64)[rank_of]
    node_cap, rank_cap = _caps(plan, state, max_imbalance)
    swap_best(weight, pins, load, item, block_of, rank_of, node_cap, rank_cap, budget // 2)
    return _settle(old, rank_of, plan.num_ranks)


def _caps(plan, state, max_imbalance) -> tuple[np.ndarray, np.ndarray]:
    """[L] most load of a node, and of a rank, on the counts of the state."""
    total = state.load.sum(axis=1)
    tight = 1 + (max_imbalance - 1) * IN_SAMPLE_SHARE
    return total / plan.num_nodes * tight, total / plan.num_ranks * max_imbalance


def _slot_weights(state: RefreshState, item: np.ndarray, share: np.ndarray, nodes: int):
    """[L, P, P] gain of having two slots on one node.

    Two experts: tokens that pick both, times the shares of the picks that these replicas serve. Two
    replicas of an expert: on one node they serve the homes of that node once, not of two nodes.
    """
    (layers, slots), (first, second) = item.shape, (item[:, :, None], item[:, None])
    pairs = state.pairs[np.arange(layers)[:, None, None], first, second]
    weight = pairs * (share[:, :, None] * share[:, None])
    if slots > state.num_experts:
        own = np.take_along_axis(state.load, item, axis=1) / nodes
        weight = np.where(first == second, -own[:, None], weight)
        weight[:, np.arange(slots), np.arange(slots)] = 0
    return weight


def _improve_groups(plan, state, budget, max_imbalance, group_of, pin) -> np.ndarray:
    """Exchange whole groups between nodes, member for member."""
    old = plan.physical_to_logical_map
    if not plan.is_permutation:
        return old  # groups with replicas take unlike numbers of slots: none can be exchanged
    layers, groups, nodes = len(old), int(group_of.max()) + 1, plan.num_nodes
    onto = (group_of[:, None] == np.arange(groups)).astype(np.float64)
    weight = onto.T @ state.pairs @ onto
    weight[:, np.arange(groups), np.arange(groups)] = 0
    load = state.load @ onto
    rank_of_expert = np.argsort(old, axis=1) // plan.slots_per_rank
    members = np.argsort(group_of, kind="stable").reshape(groups, -1)
    node_of = plan.node_of_rank.astype(np.int64)[rank_of_expert[:, members]]
    if (node_of != node_of[:, :, :1]).any():
        raise PlacementError(
            "found a plan that splits an expert group over nodes, expected whole groups: solve "
            "again with expert_groups"
        )
    block_of = np.ascontiguousarray(node_of[:, :, 0])
    place_of = np.tile(np.arange(groups), (layers, 1))  # whose old slots each group takes
    pins = np.zeros((layers, groups, nodes)) if pin is None else onto.T @ pin
    cap = _caps(plan, state, max_imbalance)[0]
    item = place_of.copy()
    most = budget // (2 * members.shape[1])
    swap_best(weight, pins, load, item, block_of, place_of, cap, np.full(layers, np.inf), most)
    new_rank, rows = np.empty_like(rank_of_expert), np.arange(layers)[:, None, None]
    new_rank[:, members] = rank_of_expert[rows, members[place_of]]
    return _settle(old, np.take_along_axis(new_rank, old.astype(np.int64), axis=1), plan.num_ranks)


def _settle(old: np.ndarray, rank_of: np.ndarray, num_ranks: int) -> np.ndarray:
    """[L, P] slots after moving: item i of ``old`` goes to rank_of[:, i]; the others stay put."""
    table, home = old.copy(), np.arange(old.shape[1]) // (old.shape[1] // num_ranks)
    for new, held, rank in zip(table, old, rank_of, strict=True):
        freed = np.flatnonzero(rank != home)
        # as many leave a rank as come: freed slots in rising order are rising in rank too
        new[freed] = held[freed[np.argsort(rank[freed], kind="stable")]]
    return table


def _weigh(plan, table, state, topology, figures, judged) -> Refresh:
    """Put moves and savings side by side."""
    expert_bytes, copy_bytes, tokens_per_step, steps = figures
    load = np.rint(state.load).astype(int)
    new = _moved(plan, table, load)
    moved, move_us = moves(plan, new, topology, expert_bytes)
    before, after, error = (
        sampled_copies(plan, new, state) if judged is None else saved_copies(plan, new, *judged)
    )
    saved_us = even = None
    if copy_bytes is not None and tokens_per_step is not None:
        copies = (before - after) * len(state.layer_ids) * tokens_per_step / plan.num_ranks
        saved_us = copies * copy_bytes / (topology.inter_node_gbps * 1e3)
        even = move_us / saved_us if move_us is not None and saved_us > 0 else None
    levels = (rank_imbalance(plan, state.load), rank_imbalance(new, state.load))
    worth_it, reason = verdict(moved, before - after, error, levels, even, steps)
    return Refresh(
        plan=new if moved else plan,
        moved_slots=moved,
        moved_share=moved / table.size,
        bytes_moved=None if expert_bytes is None else moved * expert_bytes,
        move_us=move_us,
        copies_before=before,
        copies_after=after,
        saving=before - after,
        saving_error=error,
        saved_us_per_step=saved_us,
        break_even_steps=even,
        imbalance_before=levels[0],
        imbalance_after=levels[1],
        worth_it=worth_it,
        reason=reason,
    )


def solve_from(
    problem: Problem, start: PlacementPlan, move_budget: float, method: str, joint: bool
) -> Solution:
    """What ``solve(start=...)`` runs: ``coactivation`` refreshes, ``balance`` levels the ranks."""
    if method not in ("coactivation", "balance") or joint:
        found = "homes='joint'" if joint else f"method {method!r}"
        raise PlacementError(
            f"found start= with {found}, expected method 'coactivation' or 'balance', with given "
            "homes or none: solve without a start, or assign homes with the start plan first"
        )
    trace = problem.trace
    start.check_fits(
        num_experts=trace.num_experts,
        layer_ids=trace.layer_ids.tolist(),
        model=trace.model,
        model_type=trace.model_type,
    )
    check_topology(start, problem.topology, ANOTHER_CLUSTER)
    notes = {"start": start.digest(), "move_budget": move_budget}
    if method == "balance":
        whole = problem.group_of is not None
        plan = relevel(start, trace.load(), move_budget=move_budget, whole_nodes=whole)
        given = {"load": plan.expert_load, "home_profiles": None}
        unmoved = _moved(start, start.physical_to_logical_map, **given)
        plan = _moved(start, most_level(trace, unmoved, plan), **given)
        moved = moves(start, plan, problem.topology, None)[0]
        return Solution(plan=plan, notes={**notes, "moved_slots": moved})
    pin = None
    if problem.home_rank is not None:
        ids, nodes = trace.tokens_only("homes").expert_ids, problem.num_nodes
        counts = picks_by_home(ids, trace.num_experts, problem.home_node, nodes)
        pin = counts.transpose(0, 2, 1).astype(np.float64)
    found = refresh(
        start,
        RefreshState.from_trace(trace),
        problem.topology,
        move_budget=move_budget,
        max_imbalance=problem.max_imbalance,
        group_of=problem.group_of,
        pin=pin,
    )
    return Solution(plan=found.plan, notes={**notes, "moved_slots": found.moved_slots})


CERTAIN = 2.0  # standard errors by which the saving must be above zero to count
REPLICA_TOKENS = 4096  # of the sample, on which plans with replicas are compared
LEVELED = 0.01  # change of the rank imbalance that is worth a word where copies are not saved


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
    ranks, nodes = old.rank_of_slot, old.node_of_rank
    inter, intra = np.zeros((2, 2, old.num_ranks))  # of each: received, sent
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
    if not len(state.recent_ids):
        return np.nan, np.nan, np.nan
    # with replicas every home is looked at by itself: fewer tokens for the same time
    step = 1 if old.is_permutation else max(len(state.recent_ids) // REPLICA_TOKENS, 1)
    return saved_copies(old, new, state.recent_ids[::step], state.recent_request[::step])


def saved_copies(old, new, ids, request, home_node=None) -> tuple[float, float, float]:
    """The same of tokens with picks [T, L, K] of these requests [T]; uniform homes by default."""
    ids = np.ascontiguousarray(ids)
    found = [_copies(plan, ids, home_node) for plan in (old, new)]
    saved = found[0] - found[1]
    part = np.unique(request, return_inverse=True)[1]
    # tokens of a request are alike: the requests, not the tokens, are the independent draws
    off = np.bincount(part, weights=saved - saved.mean())
    draws = len(off)
    error = np.sqrt((off**2).sum() * draws / max(draws - 1, 1)) / len(saved)
    return float(found[0].mean()), float(found[1].mean()), float(error if draws > 1 else np.inf)


def _copies(plan: PlacementPlan, ids: np.ndarray, home_node: np.ndarray | None) -> np.ndarray:
    """[T] copies of each token per layer; expected over uniform home nodes where they are None."""
    served = serving_of_plan(plan, "copies").choices
    each = np.arange(len(ids))
    found = remote_by_home(ids, each, len(ids), served, plan.num_nodes, False)
    if home_node is not None:
        return found[each, home_node] / len(served)
    return found.sum(axis=1) / plan.num_nodes / len(served)


def rank_imbalance(plan: PlacementPlan, load: np.ndarray) -> float:
    """Max / mean of the rank loads, replicas sharing evenly, mean over layers."""
    table = plan.physical_to_logical_map.reshape(plan.num_layers, plan.num_ranks, -1)
    return float(imbalance(rank_loads(load, table)).mean())
