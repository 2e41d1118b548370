"""Which replica serves which pick."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.dispatch import SlotMap
from moe_locality.errors import PlacementError
from moe_locality.kernels import ops
from moe_locality.placement.plan import PlacementPlan
from moe_locality.placement.problem import align_trace
from moe_locality.placement.search import visited
from moe_locality.placement.serving import choose_serving_nodes
from tests.unit.kernels import cuda_on_host, oracle
from tests.unit.placement.cases import plans, plans_with_traces, random_plan
from tests.unit.placement.recount import server


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


@settings(max_examples=60, deadline=None)
@given(plans_with_traces(rules=("visited",)), st.randoms(use_true_random=False))
def test_visited_serves_alike_everywhere_whatever_the_order_of_the_picks(case, random):
    """[F1] Written by hand from the file, the search, what evaluate and the simulator ask, torch in
    either order of the picks. Triton's kernel: ``interpreted_backend.py``.
    """
    plan, trace = case
    serve = server(plan.to_dict())
    aligned = align_trace(trace, plan, None, "trace")
    columns = random.sample(range(trace.top_k), trace.top_k)
    for rank in range(plan.num_ranks):
        rows, home = np.flatnonzero(trace.rank == rank), int(plan.node_of_rank[rank])
        maps = SlotMap.of_plan(plan, rank)
        for layer in range(plan.num_layers):
            ids = torch.from_numpy(trace.expert_ids[rows, layer].astype(np.int64))
            found = maps[layer].slot_ids(ids)
            mixed = maps[layer].slot_ids(ids[:, columns].int())
            assert mixed.tolist() == found[:, columns].tolist()
            ids, found = ids.numpy(), found.numpy()
            there = ids >= 0
            held = plan.experts_of_slots(layer)
            ranks = np.where(there, found * plan.num_ranks // len(held), -1)
            by_hand = [serve(layer, rank, row) for row in ids.tolist()]
            assert ranks.tolist() == [[-1 if r is None else r for r in row] for row in by_hand]
            assert (held[found[there]] == ids[there]).all()
            counted = aligned.slots_of(trace.expert_ids[rows], trace.rank[rows], 0)[:, layer]
            number = np.cumsum(plan.physical_to_logical_map[layer] >= 0) - 1  # without empty ones
            assert (number[counted[there]] == found[there]).all()
            nodes = np.where(there, plan.node_of_rank[ranks], -1)
            assert searched(plan, layer, ids, home) == [
                [int(n != home and n in row) for n in range(plan.num_nodes)]
                for row in nodes.tolist()
            ]


@settings(max_examples=60, deadline=None)
@given(plans_with_traces(rules=("visited",)), st.sampled_from([torch.int32, torch.int64]))
def test_serve_visited_by_the_cuda_kernel_is_the_reference(case, dtype):
    """[F1] The source of the kernel, built for the host."""
    plan, trace = case
    rank = int(trace.rank[0])
    for layer, one in enumerate(SlotMap.of_plan(plan, rank)):
        if one.nodes is None:
            continue  # one node: nothing to decide
        ids = torch.from_numpy(trace.expert_ids[:, layer]).to(dtype)
        tables = (one.on(ids.device), torch.from_numpy(one.nodes), one.home_node)
        found = cuda_on_host.serve_visited(ids, *tables)
        assert (found.dtype, found.tolist()) == (dtype, one.slot_ids(ids).tolist())


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(300, 8, 40), (129, 9, 5), (0, 2, 4)])
def test_serve_visited_by_the_cuda_kernel_over_several_blocks(tokens, top_k, experts):
    """[F1] Blocks, strides, an id type of neither kernel, more picks than experts, wrong ids."""
    tables = oracle.serving_tables(experts, tokens)
    ids = oracle.random_ids(tokens, top_k, experts, 0)
    wanted = ops.serve_visited(ids, *tables, backend="reference").tolist()
    for some in (ids, ids.to(torch.int16), ids.t().contiguous().t().long()):
        found = cuda_on_host.serve_visited(some, *tables)
        assert (found.dtype, found.tolist()) == (some.dtype, wanted)
    beyond = cuda_on_host.serve_visited(torch.where(ids == 0, experts, ids), *tables)
    assert (beyond[ids == 0] == -1).all()


def searched(plan, layer, ids, home):
    """[T][M] 1 for the nodes besides home that each token visits, as the search counts them."""
    lists = plan.node_choices()[layer]
    choices = np.full((*lists.shape[:2], plan.num_nodes + 1), -1)
    choices[..., : lists.shape[2]] = lists
    held = plan.held_by_node[layer]
    alone = np.where(held.sum(axis=1) == 1, held.argmax(axis=1), -1)
    later, loads, found = np.empty(ids.shape[1], np.int64), np.empty(plan.num_nodes, np.int64), []
    for row in np.sort(ids, axis=1):
        copies = visited._visit(row, home, alone, choices, later, loads)
        found.append([int(n != home and load > 0) for n, load in enumerate(loads)])
        assert copies == sum(found[-1])
    return found


@settings(max_examples=40, deadline=None)
@given(plans(rules=("visited",)))
def test_a_file_keeps_the_rule_and_its_nodes(plan):
    again = PlacementPlan.from_dict(json.loads(plan.to_json()))
    assert again == plan
    assert again.serving_rule == "visited"
    assert again.digest() == plan.digest() != replace_rule(plan, "home").digest()
    assert (again.slot_choices(0) == plan.slot_choices(0)).all()
    assert "serving_rule" not in replace_rule(plan, "home").to_dict()


def replace_rule(plan, rule):
    return replace(plan, serving_rule=rule, serving_nodes=None)


def two_copies(**rest):
    """Three nodes of one rank; expert 0 is on nodes 0 and 1, the others on one node each."""
    return PlacementPlan(
        layer_ids=(0,), num_experts=5, num_nodes=3, ranks_per_node=1,
        physical_to_logical_map=[[0, 1, 0, 2, 3, 4]], serving_rule="visited", **rest,
    )  # fmt: skip


def test_visited_prefers_home_then_a_visited_node_then_the_first_of_the_list():
    plan = two_copies(expert_load=[[5, 9, 0, 0, 0]])  # node 0 has more load
    node_of_slot = plan.node_of_rank[plan.rank_of_slot]

    def nodes(rank, picks):
        slots = SlotMap.of_plan(plan, rank)[0].slot_ids(torch.tensor([picks])).numpy()
        return [int(node_of_slot[s]) for s in slots[0]]

    assert nodes(0, [0, 2]) == [0, 1]  # at home, though node 1 is visited
    assert nodes(2, [0, 1]) == [0, 0]  # node 0 is visited anyway
    assert nodes(2, [0, 3]) == [1, 2]  # nothing but home is visited: node 1 has less load


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[0, -1, 1, -1, 2, 0]], "expert 0 is served for homes on node 2 by nodes \\[2, 0\\]"),
        ([[0, -1, 1, -1, -1, 0]], "for homes on node 2 by nodes \\[-1, 0\\]"),
        ([[1, 0, 1, -1, 0, 1]], "for homes on node 0"),
        ([[0, -1, 1, -1, 0, 0]], "for homes on node 2 by nodes"),
        ([[0, 1, 0, 1]], "rows that do not fit the map"),
        ([[0.5, 1, 0]], "rows that do not fit the map"),
        ([], "rows that do not fit the map"),
    ],
)
def test_serving_nodes_that_cannot_be_are_refused(rows, message):
    content = two_copies().to_dict() | {"serving_nodes": rows}
    with pytest.raises(PlacementError, match=message):
        PlacementPlan.from_dict(content)


def test_serving_rule_must_be_known_and_alone_names_nodes():
    with pytest.raises(PlacementError, match="serving_rule: found 'nearest'"):
        replace(two_copies(), serving_rule="nearest")
    nodes = two_copies().node_choices()
    with pytest.raises(PlacementError, match="serving_nodes: found some with serving_rule 'home'"):
        replace(two_copies(), serving_rule="home", serving_nodes=nodes)
    with pytest.raises(PlacementError, match="at most 62 nodes"):
        replace(PlacementPlan.linear(63, [0], 63, 1), serving_rule="visited")


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
