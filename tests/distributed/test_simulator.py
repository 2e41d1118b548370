"""What the simulator counts is what the exchanges of the dispatcher send, by link and rank."""

import numpy as np
import pytest
import torch

from moe_locality.config import DispatchConfig
from moe_locality.dispatch import TokenDispatcher, traffic_report
from moe_locality.dispatch.hierarchical import Rails
from moe_locality.placement.problem import align_trace
from moe_locality.simulator.model import count_all
from moe_locality.topology import ClusterTopology
from moe_locality.topology.groups import build_groups, layout_groups
from tests.launch import run_ranks
from tests.unit.placement.cases import random_plan, random_trace

RANKS, WIDTH = 4, 8


def case(nodes):
    """One layer on 4 ranks with replicas, some picks dropped."""
    rng = np.random.default_rng(5)
    plan = random_plan(
        rng,
        layers=1,
        experts=9,
        nodes=max(nodes) + 1,
        ranks_per_node=RANKS // (max(nodes) + 1),
        slots_per_rank=3,
        rank_to_node=nodes,
    )
    return plan, random_trace(rng, tokens=60, layers=1, experts=9, top_k=3, ranks=RANKS)


def counts_on_rank(rank, world_size, nodes):
    plan, trace = case(nodes)
    topology = ClusterTopology(rank_to_node=nodes)
    rails = Rails(build_groups(layout_groups(topology, world_size)), topology, plan.num_slots)
    ids = trace.expert_ids[trace.rank == rank, 0]
    slots = np.where(ids < 0, -1, plan.serving_slot()[0, rank][np.maximum(ids, 0)])
    found = {}
    for exchange in ("flat", "hierarchical"):
        dispatcher = TokenDispatcher(
            topology=topology,
            num_slots=plan.num_slots,
            config=DispatchConfig(exchange=exchange),
            rails=rails,
        )
        routed = dispatcher.dispatch(
            torch.ones(len(ids), WIDTH), torch.tensor(slots).int(), torch.ones(len(ids), 3)
        )
        dispatcher.combine(routed.rows, routed.handle)
        model = torch.nn.Module()
        model.traffic = dispatcher.traffic
        found[exchange] = traffic_report(model, topology)
    return found


@pytest.mark.parametrize("nodes", [(0, 0, 1, 1), (0, 1, 0, 1), (0, 1, 2, 3), (0, 0, 0, 0)])
def test_simulated_rows_are_the_rows_sent(nodes):
    plan, trace = case(nodes)
    aligned = align_trace(trace, plan, None, "trace")
    report = run_ranks(counts_on_rank, RANKS, nodes)[0]
    for exchange, sent in report.items():
        counted = count_all(aligned, exchange)
        for kind in ("dispatch", "combine"):
            assert sent["rows_by_link"][kind] == counted.rows_by_link(), (exchange, kind)
        matrix = np.array(sent["rows"]["dispatch"])
        same_node = np.equal.outer(nodes, nodes)
        off = ~np.eye(RANKS, dtype=bool)
        assert (matrix * ~same_node).sum(1).tolist() == counted.across_sent[0].tolist()
        assert (matrix * ~same_node).sum(0).tolist() == counted.across_received[0].tolist()
        assert (matrix * (same_node & off)).sum(1).tolist() == counted.inside_sent[0].tolist()
        assert (matrix * (same_node & off)).sum(0).tolist() == counted.inside_received[0].tolist()
