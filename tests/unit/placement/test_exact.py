"""Branch and bound against all placements of tiny layers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.placement import solve
from moe_locality.placement.bounds.lower import LayerTokens, certify_plan, prove_layer
from moe_locality.topology.cluster import ClusterTopology
from tests.unit.placement.cases import random_trace
from tests.unit.placement.test_bounds import placements

EFFORT = 4e9


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_the_proof_agrees_with_all_placements(data):
    experts, nodes = data.draw(st.sampled_from([(4, 2), (6, 2), (6, 3)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    trace = random_trace(rng, tokens=60, layers=1, experts=experts, top_k=3)
    home_node = rng.integers(0, nodes, 60) if data.draw(st.booleans()) else None
    cap = data.draw(st.sampled_from([np.inf, 1.3]))
    ids = trace.expert_ids[:, 0]
    counts = []
    for block_of in placements(experts, nodes):
        load = np.bincount(block_of, weights=trace.load()[0], minlength=nodes)
        if load.max() <= cap * load.mean():
            counts.append(visits(ids, block_of, home_node))
    layer = LayerTokens.of(ids, experts, nodes, home_node)
    if not counts:
        return
    best = min(counts)
    exact = prove_layer(layer, best, cap, EFFORT)
    assert exact.proved
    assert exact.bound == best
    worse = prove_layer(layer, best + 3, cap, EFFORT)
    assert not worse.proved
    assert worse.bound == worse.visits == best


def test_little_effort_is_not_called_a_proof():
    rng = np.random.default_rng(0)
    trace = random_trace(rng, tokens=3000, layers=1, experts=32, top_k=4)
    layer = LayerTokens.of(trace.expert_ids[:, 0], 32, 4, None)
    known = visits(trace.expert_ids[:, 0], np.arange(32) // 8, None)
    found = prove_layer(layer, known, np.inf, 0.0)
    assert not found.proved
    assert found.bound < known


def test_a_certificate_can_prove_a_plan():
    trace = random_trace(np.random.default_rng(4), tokens=300, layers=2, experts=8, top_k=3)
    topology = ClusterTopology.uniform(2, 2)
    plan = solve(trace, topology, max_imbalance=4.0)
    shown = certify_plan(trace, plan, topology, seconds=10.0, prove=True)
    assert shown.to_dict()["proved_layers"] == 2
    assert shown.gap == pytest.approx(0, abs=1e-9)
    linear = solve(trace, topology, method="linear")
    assert not certify_plan(trace, linear, topology, seconds=10.0, prove=True).proved.any()


def visits(ids, block_of, home_node) -> int:
    """Tokens x nodes touched, the home among them where it is given and the token picks at all."""
    total = 0
    for token, row in enumerate(ids):
        nodes = {int(block_of[e]) for e in row if e >= 0}
        if nodes and home_node is not None:
            nodes.add(int(home_node[token]))
        total += len(nodes)
    return total
