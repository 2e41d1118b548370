"""Which replica serves which home."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.placement.plan import choose_serving_nodes
from tests.unit.placement.cases import plans, random_plan


@settings(max_examples=60, deadline=None)
@given(plans())
def test_serving_follows_the_rule_step_by_step(plan):
    assert plan.serving_slot().tolist() == _by_hand(plan)


@settings(max_examples=40, deadline=None)
@given(plans())
def test_a_node_names_one_slot_for_an_expert_that_it_lacks(plan):
    served = plan.serving_slot()
    node_of_slot = plan.node_of_rank[plan.rank_of_slot]
    for row, experts in enumerate(plan.physical_to_logical_map):
        for node in range(plan.num_nodes):
            mine = set(experts[node_of_slot == node].tolist())
            absent = [e for e in range(plan.num_experts) if e not in mine]
            slots = served[row][plan.node_of_rank == node][:, absent]
            assert (slots == slots[0]).all()


@settings(max_examples=30, deadline=None)
@given(plans(), st.integers(0, 100))
def test_a_layer_is_served_alike_alone_and_among_others(plan, pick):
    row = pick % plan.num_layers
    load = None if plan.expert_load is None else plan.expert_load[row : row + 1]
    alone = type(plan)(
        layer_ids=(plan.layer_ids[row],),
        num_experts=plan.num_experts,
        num_nodes=plan.num_nodes,
        ranks_per_node=plan.ranks_per_node,
        physical_to_logical_map=plan.physical_to_logical_map[row : row + 1],
        expert_load=load,
        rank_to_node=plan.rank_to_node,
    )
    assert (alone.serving_slot()[0] == plan.serving_slot()[row]).all()


def test_replicas_on_every_node_serve_their_own_node_evenly():
    rng = np.random.default_rng(0)
    plan = random_plan(
        rng, layers=2, experts=6, nodes=3, ranks_per_node=2, slots_per_rank=6,
        expert_load=rng.integers(1, 100, (2, 6)),
    )  # fmt: skip
    served = plan.rank_of_slot[plan.serving_slot()]
    assert (served == np.arange(6)[None, :, None]).all()


@pytest.mark.parametrize("load", [None, [[0, 0, 0]]])
def test_a_layer_without_load_counts_every_expert_alike(load):
    rng = np.random.default_rng(1)
    shape = {"layers": 1, "experts": 3, "nodes": 2, "ranks_per_node": 2, "slots_per_rank": 2}
    even = random_plan(rng, **shape, expert_load=np.ones((1, 3), dtype=np.int64))
    other = type(even)(
        layer_ids=(0,), num_experts=3, num_nodes=2, ranks_per_node=2,
        physical_to_logical_map=even.physical_to_logical_map,
        expert_load=None if load is None else np.array(load),
    )  # fmt: skip
    assert (other.serving_slot() == even.serving_slot()).all()


def test_remote_homes_prefer_the_least_loaded_node_then_the_heaviest_expert_chooses_first():
    held = np.zeros((1, 4, 3), dtype=bool)
    held[0, 0, [0, 1]] = True  # replicated on nodes 0 and 1; home 2 must choose
    held[0, 1, [0, 1]] = True
    held[0, 2, 0] = True
    held[0, 3, 1] = True
    served = choose_serving_nodes(held, np.array([[5, 9, 4, 3]]))
    # node 0 has 5 + 9 + 3 x 4 = 26, node 1 has 5 + 9 + 3 x 3 = 23: expert 1 goes to node 1 (32),
    # then expert 0 to node 0
    assert served[0, 2].tolist() == [0, 1, 0, 1]


def _by_hand(plan):
    """The rule in plain loops: [L][G][E]."""
    node_of = [int(plan.node_of_rank[r]) for r in plan.rank_of_slot]
    result = []
    for row, experts in enumerate(plan.physical_to_logical_map.tolist()):
        load = [1] * plan.num_experts
        if plan.expert_load is not None and plan.expert_load[row].any():
            load = plan.expert_load[row].tolist()
        slots = {e: [s for s, x in enumerate(experts) if x == e] for e in range(plan.num_experts)}
        falling = sorted(slots, key=lambda e: (-load[e], e))
        node = _nodes_by_hand(slots, node_of, load, falling, plan.num_nodes)
        result.append(_slots_by_hand(plan, slots, node_of, load, falling, node))
    return result


def _nodes_by_hand(slots, node_of, load, falling, num_nodes):
    busy, node = [0] * num_nodes, {}
    for e, mine in slots.items():
        holders = {node_of[s] for s in mine}
        for home in range(num_nodes):
            if home in holders or len(holders) == 1:
                node[home, e] = home if home in holders else min(holders)
                busy[node[home, e]] += load[e]
    for e in falling:
        for home in range(num_nodes):
            if (home, e) not in node:
                node[home, e] = min({node_of[s] for s in slots[e]}, key=lambda n: (busy[n], n))
                busy[node[home, e]] += load[e]
    return node


def _slots_by_hand(plan, slots, node_of, load, falling, node):
    rank_of, table = plan.rank_of_slot, [[-1] * plan.num_experts for _ in range(plan.num_ranks)]
    busy, waiting = [0] * plan.num_ranks, []
    for e in falling:
        for home_node in range(plan.num_nodes):
            homes = [r for r in range(plan.num_ranks) if plan.node_of_rank[r] == home_node]
            there = [s for s in slots[e] if node_of[s] == node[home_node, e]]
            groups = [[r] for r in homes] if node[home_node, e] == home_node else [homes]
            for group in groups:
                own = [s for s in there if rank_of[s] in group]
                certain = own if len(group) == 1 and own else there
                if len(certain) == 1:
                    _serve(table, busy, group, e, certain[0], rank_of, load)
                else:
                    waiting.append((group, e, there))
    for group, e, there in waiting:
        _serve(
            table, busy, group, e, min(there, key=lambda s: (busy[rank_of[s]], s)), rank_of, load
        )
    return table


def _serve(table, busy, group, e, slot, rank_of, load):
    for rank in group:
        table[rank][e] = slot
    busy[rank_of[slot]] += load[e] * len(group)
