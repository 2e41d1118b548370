from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import PlacementError
from moe_locality.placement import PlacementPlan, evaluate
from moe_locality.placement.balance import balance, rank_loads
from moe_locality.placement.refresh.improve import refresh, relevel, sampled_copies, saved_copies
from moe_locality.placement.refresh.state import RefreshState
from moe_locality.topology.cluster import ClusterTopology
from tests.unit.placement.cases import plans_with_traces, random_plan, random_trace
from tests.unit.placement.test_solve import planted


def planted_plan(member, nodes=4, swapped=()):
    """Hidden blocks as nodes of two ranks, and then some pairs of slots exchanged."""
    row = np.concatenate(member).astype(np.int32)
    for i, j in swapped:
        row[[i, j]] = row[[j, i]]
    return PlacementPlan(
        model="made",
        layer_ids=(0,),
        num_experts=len(row),
        num_nodes=nodes,
        ranks_per_node=2,
        physical_to_logical_map=row[None],
    )


def test_a_misplaced_pair_is_put_right_by_one_swap_and_nothing_else_moves():
    trace, member = planted(np.random.default_rng(1))
    wrong = planted_plan(member, swapped=[(0, 15)])
    state = RefreshState.from_trace(trace)
    found = refresh(wrong, state, move_budget=2 / 16, max_imbalance=1.5)
    assert found.moved_slots == 2
    table = planted_plan(member).physical_to_logical_map
    np.testing.assert_array_equal(found.plan.physical_to_logical_map, table)
    before, after = evaluate(trace, wrong).copies, evaluate(trace, found.plan).copies
    assert (found.copies_before, found.copies_after) == pytest.approx((before, after))
    assert found.saving > 2 * found.saving_error
    again = refresh(found.plan, state, move_budget=1.0, max_imbalance=1.5)
    assert again.moved_slots == 0
    assert again.worth_it is False
    assert again.plan is found.plan


def test_a_budget_below_one_swap_moves_nothing():
    trace, member = planted(np.random.default_rng(1))
    wrong = planted_plan(member, swapped=[(0, 15)])
    found = refresh(wrong, RefreshState.from_trace(trace), move_budget=1.9 / 16)
    assert found.moved_slots == 0


def test_whether_it_is_worth_it():
    trace, member = planted(np.random.default_rng(1))
    wrong = planted_plan(member, swapped=[(0, 15)])
    state = RefreshState.from_trace(trace)
    topology = ClusterTopology.uniform(4, 2, inter_node_gbps=10.0, inter_node_latency_us=5.0)
    figures = {"expert_bytes": 1e6, "copy_bytes": 1e4, "tokens_per_step": 800}
    few, many, unknown = (
        refresh(wrong, state, topology, max_imbalance=1.5, move_budget=0.2, steps=n, **figures)
        for n in (1, 10_000, None)
    )
    assert few.bytes_moved == 2e6
    assert few.move_us == pytest.approx(1e6 / 1e4 + 5)  # both ranks fetch one expert at 10 GB/s
    # copies of a step over 8 ranks, at 10 GB/s each
    assert few.saved_us_per_step == pytest.approx(few.saving * 800 / 8 * 1e4 / 1e4)
    assert few.break_even_steps == pytest.approx(few.move_us / few.saved_us_per_step)
    assert (few.worth_it, many.worth_it, unknown.worth_it) == (False, True, None)
    assert "pays for itself" in many.reason
    assert "steps" in unknown.reason


def test_a_saving_within_the_noise_is_not_worth_it():
    trace, member = planted(np.random.default_rng(1), tokens=800)
    wrong = planted_plan(member, swapped=[(0, 15)])
    state = RefreshState.from_trace(trace)
    state.recent_ids, state.recent_request = state.recent_ids[:2], state.recent_request[:2]
    found = refresh(wrong, state, move_budget=0.2, max_imbalance=1.5)
    assert found.worth_it is False
    assert "noise" in found.reason


def excess(plan, load, cap):
    """[L] load above the caps of nodes and ranks."""
    share = load / plan.logical_replica_count
    by_slot = np.take_along_axis(share, plan.physical_to_logical_map.astype(int), 1)
    by_rank = by_slot.reshape(len(load), plan.num_ranks, -1).sum(axis=2)
    by_node = np.stack(
        [by_rank[:, plan.node_of_rank == n].sum(axis=1) for n in range(plan.num_nodes)], axis=1
    )
    return [
        np.maximum(x - cap * x.mean(axis=1, keepdims=True), 0).sum(axis=1)
        for x in (by_rank, by_node)
    ]


@settings(max_examples=60, deadline=None)
@given(plans_with_traces(uneven=False), st.floats(0, 1), st.sampled_from([1.0, 1.2, 9.0]))
def test_budget_caps_and_replicas_are_kept(case, budget, cap):
    plan, trace = case
    plan = replace(plan, model=trace.model)
    state = RefreshState.from_trace(trace)
    found = refresh(plan, state, move_budget=budget, max_imbalance=cap)
    found.plan.validate()
    changed = found.plan.physical_to_logical_map != plan.physical_to_logical_map
    assert found.moved_slots <= changed.sum() <= budget * plan.physical_to_logical_map.size
    np.testing.assert_array_equal(found.plan.logical_replica_count, plan.logical_replica_count)
    before, after = excess(plan, state.load, cap), excess(found.plan, state.load, cap)
    assert (sum(after) <= sum(before) + 1e-6).all()
    assert found.plan == refresh(plan, state, move_budget=budget, max_imbalance=cap).plan
    assert 0 <= found.moved_share <= budget


@settings(max_examples=40, deadline=None)
@given(plans_with_traces(uneven=False))
def test_sampled_copies_are_those_of_evaluate(case):
    plan, trace = case
    plan = replace(plan, model=trace.model)
    found = sampled_copies(plan, plan, RefreshState.from_trace(trace))
    assert found[0] == found[1] == pytest.approx(evaluate(trace, plan).copies)
    ranks = np.arange(trace.num_tokens) % plan.num_ranks
    where = (trace.expert_ids, trace.request_id, plan.node_of_rank.astype(int)[ranks])
    at_home = saved_copies(plan, plan, *where)[0]
    assert at_home == pytest.approx(evaluate(trace, plan, homes=ranks).copies)


def test_groups_are_exchanged_whole():
    rng = np.random.default_rng(0)
    group_of = np.arange(16) // 2
    ids = np.stack([rng.permutation(np.arange(4) + 4 * (t % 4))[:3] for t in range(400)])
    trace, _ = planted(rng)
    trace = trace.evolve(expert_ids=ids[:, None].astype(np.int16))
    trace = trace.take(np.arange(400))
    # group g holds experts 2 g and 2 g + 1; groups 2 n and 2 n + 1 are picked together
    order = [0, 2, 1, 3, 4, 5, 6, 7]
    row = np.concatenate([[2 * g, 2 * g + 1] for g in order])
    plan = replace(planted_plan([row]), model=trace.model)
    state = RefreshState.from_trace(trace)
    for budget, groups in ((3 / 16, 0), (4 / 16, 2)):
        found = refresh(plan, state, move_budget=budget, max_imbalance=2, group_of=group_of)
        assert found.moved_slots == 2 * groups
    nodes = found.plan.physical_to_logical_map.reshape(4, 4)
    assert all(len(set((row // 4).tolist())) == 1 for row in nodes)
    split = replace(plan, physical_to_logical_map=np.roll(row, 1)[None].astype(np.int32))
    with pytest.raises(PlacementError, match="splits an expert group"):
        refresh(split, state, group_of=group_of)


def test_relevel_moves_few_slots_and_lowers_the_busiest_rank():
    rng = np.random.default_rng(5)
    load = rng.integers(1, 1000, (6, 32))
    plan = random_plan(
        rng, layers=6, experts=32, nodes=2, ranks_per_node=4, slots_per_rank=5, model="m"
    )

    def worst(some):
        return rank_loads(load, some.physical_to_logical_map.reshape(6, 8, 5)).max(axis=1)

    for whole in (False, True):
        found = relevel(plan, load, move_budget=0.1, whole_nodes=whole)
        changed = found.physical_to_logical_map != plan.physical_to_logical_map
        assert 0 < changed.sum() <= 0.1 * 240
        assert (worst(found) <= worst(plan)).all()
        assert worst(found).sum() < worst(plan).sum()
        if whole:
            on_node = np.sort(found.physical_to_logical_map.reshape(6, 2, 20))
            np.testing.assert_array_equal(
                on_node, np.sort(plan.physical_to_logical_map.reshape(6, 2, 20))
            )
    free = relevel(plan, load, move_budget=1.0)
    ideal = rank_loads(load, balance(load, 2, 4, 40)).max(axis=1)
    assert worst(free).mean() < worst(plan).mean() * 0.9
    assert (ideal <= worst(free) * 1.2).all()


def test_refresh_and_relevel_keep_who_serves_whom_where_experts_stay():
    rng = np.random.default_rng(2)
    trace = random_trace(rng, tokens=600, layers=2, experts=12, top_k=3)
    plan = random_plan(rng, layers=2, experts=12, nodes=4, ranks_per_node=1, slots_per_rank=6)
    plan = replace(plan, expert_load=trace.load(), serving_rule="visited")
    held, home = plan.held_by_node, np.arange(4)[:, None]
    last = 3 - held[..., ::-1].argmax(axis=2)  # [L, E]: its last node alone serves an expert
    lists = np.where(held.transpose(0, 2, 1), home, last[:, None])[..., None]
    plan = replace(plan, serving_nodes=lists)
    state = RefreshState.from_trace(trace)
    for found in (
        refresh(plan, state, move_budget=0.2, max_imbalance=2.0).plan,
        relevel(plan, rng.integers(1, 1000, (2, 12)), move_budget=0.2),
    ):
        stays = (found.held_by_node == held).all(axis=2)
        assert stays.any()
        assert not stays.all()
        for layer, expert in np.argwhere(stays):
            kept = found.node_choices()[layer, :, expert]
            np.testing.assert_array_equal(kept[:, 0], lists[layer, :, expert, 0])
            assert (kept[:, 1:] < 0).all()
        for layer, expert in np.argwhere(~stays):
            away = ~found.held_by_node[layer, expert]
            named = (found.node_choices()[layer, away, expert] >= 0).sum(axis=1)
            assert (named == found.held_by_node[layer, expert].sum()).all()


def test_old_tokens_decay_by_the_number_of_new_ones():
    rng = np.random.default_rng(2)
    old, new = (random_trace(rng, tokens=n, layers=2, experts=8, top_k=3) for n in (300, 100))
    once, other = RefreshState.from_trace(old), RefreshState.from_trace(new)
    state = RefreshState.from_trace(old, half_life_tokens=100)
    state.absorb(new)
    np.testing.assert_allclose(state.pairs, once.pairs / 2 + other.pairs)
    np.testing.assert_allclose(state.load, once.load / 2 + other.load)
    assert state.tokens == pytest.approx(250)
    np.testing.assert_array_equal(state.recent_ids[-100:], new.expert_ids)
    kept = RefreshState.from_trace(old)
    kept.absorb(new)
    np.testing.assert_allclose(kept.load, once.load + other.load)


def test_the_sample_holds_the_latest_tokens():
    rng = np.random.default_rng(2)
    old, new = (random_trace(rng, tokens=n, layers=2, experts=8, top_k=3) for n in (30, 10))
    state = RefreshState.from_trace(old, sample_tokens=15)
    state.absorb(new, sample_tokens=15)
    expected = np.concatenate([old.expert_ids[-5:], new.expert_ids])
    np.testing.assert_array_equal(state.recent_ids, expected)


def test_a_state_comes_back_from_its_file(tmp_path):
    trace = random_trace(np.random.default_rng(3), tokens=40, layers=2, experts=8, top_k=3)
    for half_life in (None, 12.5):
        state = RefreshState.from_trace(trace, half_life_tokens=half_life)
        back = RefreshState.read(state.write(tmp_path / "state.npz"))
        for name in RefreshState.__slots__:
            np.testing.assert_array_equal(getattr(back, name), getattr(state, name))
        back.absorb(trace)
    assert [p.name for p in tmp_path.iterdir()] == ["state.npz"]


def test_a_damaged_state_is_refused(tmp_path):
    path = tmp_path / "state.npz"
    with pytest.raises(PlacementError, match="cannot read"):
        RefreshState.read(path)
    trace = random_trace(np.random.default_rng(3), tokens=40, layers=2, experts=8, top_k=3)
    state = RefreshState.from_trace(trace)
    state.write(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(PlacementError, match="make it again"):
        RefreshState.read(path)
    state.pairs = state.pairs[:1]
    with pytest.raises(PlacementError, match="is damaged"):
        RefreshState.read(state.write(path))


def test_what_does_not_fit_is_refused():
    rng = np.random.default_rng(4)
    trace = random_trace(rng, tokens=40, layers=2, experts=8, top_k=2)
    state = RefreshState.from_trace(trace)
    plan = random_plan(
        rng, layers=2, experts=8, nodes=2, ranks_per_node=2, slots_per_rank=2, model=trace.model
    )
    with pytest.raises(PlacementError, match="move_budget"):
        refresh(plan, state, move_budget=1.5)
    with pytest.raises(PlacementError, match="on the cluster of the plan"):
        refresh(plan, state, ClusterTopology.uniform(1, 4))
    with pytest.raises(PlacementError, match="layer ids"):
        refresh(replace(plan, layer_ids=(5, 6)), state)
    with pytest.raises(PlacementError, match="half_life_tokens"):
        RefreshState.from_trace(trace, half_life_tokens=0)
    other = random_trace(rng, tokens=4, layers=2, experts=8, top_k=3)
    with pytest.raises(PlacementError, match="absorb traces of the model"):
        state.absorb(other)
