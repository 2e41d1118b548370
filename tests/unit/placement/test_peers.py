import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import BackendUnavailable, PlacementError
from moe_locality.placement import baselines, evaluate, solve
from moe_locality.placement.baselines import _place_by_use, cluster_homes
from moe_locality.topology.cluster import ClusterTopology
from moe_locality.trace.schema import RoutingTrace
from tests.unit.placement.cases import random_trace

METHODS = ("request_kmeans", "hottest", "eplb_global")


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_every_peer_makes_valid_plans_and_the_same_again(data):
    nodes, per_node = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    ranks = nodes * per_node
    experts = data.draw(st.integers(ranks, 4 * ranks))
    spare = -experts % ranks + ranks * data.draw(st.integers(0, 1))
    if (experts + spare) // ranks > experts:
        return
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    trace = random_trace(rng, tokens=30, layers=2, experts=experts, top_k=min(3, experts))
    topology = ClusterTopology.uniform(nodes, per_node)
    for method in METHODS:  # a PlacementPlan checks itself: every expert, none twice on a rank
        made = [
            solve(trace, topology, method=method, num_redundant_experts=spare, seed=3)
            for _ in range(2)
        ]
        assert made[0].digest() == made[1].digest()
        assert made[0].num_slots == experts + spare


def test_request_kmeans_makes_clusters_of_requests_nodes():
    """Two kinds of requests with experts of their own: each kind finds all of its picks at home."""
    trace = two_kinds()
    topology = ClusterTopology.uniform(2, 2)
    plan = solve(trace, topology, method="request_kmeans")
    homes = cluster_homes(trace, plan, topology, predict="first:2")
    assert evaluate(trace, plan, topology, homes).picks == 0
    assert len(set(homes.values())) == 4  # the ranks of a node share its requests
    with pytest.raises(PlacementError, match="method 'request_kmeans'"):
        cluster_homes(trace, solve(trace, topology), topology, predict="oracle")
    layers = {"layer_ids": np.arange(2), "expert_ids": np.repeat(trace.expert_ids, 2, axis=1)}
    two = trace.evolve(**layers)
    alike = solve(two, topology, method="request_kmeans", one_layout=True)
    with pytest.raises(PlacementError, match="cluster centers of another kind"):
        cluster_homes(two, alike, topology, predict="oracle")


def test_solve_takes_the_old_name_of_request_kmeans_with_a_warning():
    trace, topology = two_kinds(), ClusterTopology.uniform(2, 2)
    with pytest.warns(DeprecationWarning, match="now called 'request_kmeans'"):
        old = solve(trace, topology, method="seed", seed=3)
    new = solve(trace, topology, method="request_kmeans", seed=3)
    assert old == new
    assert new.provenance["method"] == "request_kmeans"


def test_use_places_every_expert_once_before_any_twice():
    use = np.array([[9, 8, 7, 0], [6, 5, 1, 2]])
    assert _place_by_use(use, 2) == [[0, 1], [3, 2]]
    assert _place_by_use(use, 3) == [[0, 1, 2], [3, 2, 0]]


def test_hot_experts_go_where_they_are_missing():
    assert baselines.add_hottest([[0, 1], [2, 3]], np.array([5, 1, 9, 7]), 3) == [
        [0, 1, 2],
        [2, 3, 0],
    ]


def test_global_eplb_is_as_level_as_ranks_allow_where_groups_bind_the_hierarchical_one():
    load = np.array([90, 80, 70, 60, 4, 3, 2, 1])
    groups = np.arange(8) // 4
    held = baselines.eplb(load, 2, 2, 8, groups)
    free = baselines.pack_replicas(load, 4, 8)
    assert max(load[r].sum() for r in free) < max(load[r].sum() for r in held)


def test_equalize_moves_the_expert_that_loses_least():
    weight = np.zeros((6, 6))
    weight[0, 1] = weight[1, 0] = weight[2, 3] = weight[3, 2] = 5
    weight[3, 5] = weight[5, 3] = 1
    assert baselines.equalize(np.array([0, 0, 0, 0, 1, 1]), weight, 2).tolist() in (
        [0, 0, 0, 1, 1, 1],
        [0, 0, 1, 0, 1, 1],
    )


def test_mtkahypar_finds_the_groups_and_repeats_itself():
    pytest.importorskip("mtkahypar")
    trace, topology = two_kinds(), ClusterTopology.uniform(2, 2)
    plan = solve(trace, topology, method="mtkahypar", seed=1)
    assert evaluate(trace, plan, topology).copies == pytest.approx(0.5)  # one node per token
    assert plan.digest() == solve(trace, topology, method="mtkahypar", seed=1).digest()
    with pytest.raises(PlacementError, match="redundant"):
        solve(trace, topology, method="mtkahypar", num_redundant_experts=4)


def test_mtkahypar_that_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mtkahypar", None)
    with pytest.raises(BackendUnavailable, match="pip install mtkahypar"):
        solve(two_kinds(), ClusterTopology.uniform(2, 2), method="mtkahypar")


def two_kinds() -> RoutingTrace:
    """40 requests of 4 tokens; even ones pick among even experts, odd ones among odd experts."""
    rng = np.random.default_rng(0)
    request = np.repeat(np.arange(40), 4)
    ids = np.stack([rng.permutation(4)[:2] * 2 + r % 2 for r in request])
    return RoutingTrace(
        model="two kinds",
        num_experts=8,
        layer_ids=np.zeros(1, dtype=np.int32),
        domain=("a",),
        expert_ids=ids[:, None].astype(np.int16),
        request_id=request.astype(np.int64),
        position=np.tile(np.arange(4), 40).astype(np.int32),
        stage=np.full(len(ids), 1, dtype=np.uint8),
        domain_id=np.zeros(len(ids), dtype=np.int32),
    )
