"""What crosses between nodes is what ``evaluate`` predicts, exactly: flat and in two stages, with
and without replicas; and for uniform routing it is the closed form.
"""

from math import comb

import numpy as np
import pytest
import torch

from moe_locality.config import DispatchConfig
from moe_locality.dispatch import SlotMap, TokenDispatcher, traffic_report
from moe_locality.dispatch.hierarchical import Rails
from moe_locality.placement import evaluate
from moe_locality.placement.plan import PlacementPlan
from moe_locality.topology import ClusterTopology
from moe_locality.topology.groups import build_groups, layout_groups
from moe_locality.trace import RoutingTrace
from tests.launch import run_ranks
from tests.unit.placement.cases import random_plan

CASES = ("", "home", "visited")
"""Without replicas; with them, by the rule that says which one serves a pick: under "visited" in a
layer with fewer slots than another one of the plan."""

WORLD, TOKENS, EXPERTS, TOP_K, WIDTH = 8, 96, 32, 8, 8


def routes_of(rank: int) -> np.ndarray:
    """Uniform routing, one pick in ten dropped on odd ranks."""
    rng = np.random.default_rng(rank)
    ids = rng.random((TOKENS, EXPERTS)).argsort(axis=1)[:, :TOP_K]
    return np.where(rng.random(ids.shape) < 0.1 * (rank % 2), -1, ids)


def case_of(nodes: int, rule: str) -> tuple[PlacementPlan, RoutingTrace]:
    per_node = WORLD // nodes
    if rule:
        plan = random_plan(
            np.random.default_rng(nodes),
            layers=2,
            experts=EXPERTS,
            nodes=nodes,
            ranks_per_node=per_node,
            slots_per_rank=[EXPERTS // WORLD + 2 + (rule == "visited"), EXPERTS // WORLD + 2],
            serving_rule=rule,
        )
    else:
        plan = PlacementPlan.linear(EXPERTS, [0, 1], nodes, per_node)
    ids = np.concatenate([routes_of(rank) for rank in range(WORLD)])
    return plan, trace_of(ids, np.repeat(np.arange(WORLD), TOKENS), EXPERTS, layer=1)


def trace_of(ids: np.ndarray, requests: np.ndarray, experts: int, layer: int = 0) -> RoutingTrace:
    """One layer; the tokens of request r live on rank r."""
    count = len(ids)
    return RoutingTrace(
        model="uniform",
        num_experts=experts,
        layer_ids=np.array([layer], dtype=np.int32),
        domain=("uniform",),
        expert_ids=ids[:, None].astype(np.int16),
        request_id=np.sort(requests),
        position=np.arange(count, dtype=np.int32),
        stage=np.zeros(count, dtype=np.uint8),
        domain_id=np.zeros(count, dtype=np.int32),
    )


def counted_on_rank(rank, world):
    found = {}
    for nodes in (2, 4, 8):
        topology = ClusterTopology.uniform(nodes, world // nodes)
        groups = build_groups(layout_groups(topology, world))
        for rule in CASES:
            plan, _ = case_of(nodes, rule)
            ids = routes_of(rank)
            slots = SlotMap.of_plan(plan, rank)[1].slot_ids(torch.from_numpy(ids))
            num_slots = len(plan.experts_of_slots(1))
            for exchange in ("flat", "hierarchical"):
                dispatcher = TokenDispatcher(
                    topology=topology,
                    num_slots=num_slots,
                    config=DispatchConfig(exchange=exchange),
                    rails=Rails(groups, topology, num_slots),
                )
                x = torch.ones(TOKENS, WIDTH, requires_grad=True)
                weights = torch.ones(TOKENS, TOP_K, requires_grad=True)
                routed = dispatcher.dispatch(x, slots.int(), weights)
                dispatcher.combine(routed.rows * 2, routed.handle).sum().backward()
                model = torch.nn.Module()
                model.traffic = dispatcher.traffic  # pyright: ignore[reportAttributeAccessIssue]
                report = traffic_report(model)
                found[nodes, rule, exchange] = {
                    kind: (report["rows_by_link"][kind], report["by_link"][kind])
                    for kind in ("dispatch", "combine", "dispatch_grad", "combine_grad")
                }
    return found


def test_counted_is_predicted_with_and_without_replicas():
    found = run_ranks(counted_on_rank, WORLD)[0]
    assert len(found) == 18
    for (nodes, rule, exchange), by_kind in found.items():
        plan, trace = case_of(nodes, rule)
        topology = ClusterTopology.uniform(nodes, WORLD // nodes)
        costs = evaluate(trace, plan, topology, {rank: rank for rank in range(WORLD)})
        predicted = costs.total_picks if exchange == "flat" else costs.total_copies
        assert predicted is not None
        for kind, (rows, sizes) in by_kind.items():
            where = (nodes, rule, exchange, kind)
            assert rows["cross_node"] == predicted, where
            assert sizes["cross_node"] == predicted * WIDTH * 4, where


@pytest.mark.parametrize(("nodes", "fewer"), [(2, 3.9), (4, 2.15), (8, 1.48)])
def test_uniform_routing_costs_the_closed_form(nodes, fewer):
    """Copies per token: (M - 1) (1 - C(E - E/M, k) / C(E, k)); picks: k (M - 1) / M."""
    experts, tokens = 256, 8192
    rng = np.random.default_rng(0)
    ids = rng.random((tokens, experts)).argsort(axis=1)[:, :TOP_K]
    trace = trace_of(ids, np.arange(tokens) % WORLD, experts)
    plan = PlacementPlan.linear(experts, [0], nodes, WORLD // nodes)
    topology = ClusterTopology.uniform(nodes, WORLD // nodes)
    costs = evaluate(trace, plan, topology, {rank: rank for rank in range(WORLD)})
    copies = (nodes - 1) * (1 - comb(experts - experts // nodes, TOP_K) / comb(experts, TOP_K))
    assert costs.total_copies is not None
    assert costs.total_picks is not None
    np.testing.assert_allclose(costs.total_copies / tokens, copies, rtol=0.02)
    assert costs.total_picks / costs.total_copies >= fewer
