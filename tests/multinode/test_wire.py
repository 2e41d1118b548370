"""Two nodes of two ranks, started by DeepSpeed's launcher over pdsh: what the placement predicts,
what our counters say and what the kernel saw on the links are the same bytes.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks._nodes import Nodes
from moe_locality.placement import PlacementPlan, evaluate
from moe_locality.topology import ClusterTopology
from moe_locality.trace import read_trace
from tests.multinode.train_program import EXPERTS, STEPS, TOKENS, TOP_K, WIDTH

pytestmark = pytest.mark.multinode

PROGRAM = Path(__file__).with_name("train_program.py")
LIMIT_S = 280
ROW_BYTES = 4 * WIDTH
KINDS = ("dispatch", "combine", "dispatch_grad", "combine_grad")
# the slots and the weights of a copy's picks, and the gradients of those weights; 16 bytes each
ROUTING_BYTES = {"flat": 0, "hierarchical": 3 * 16}
EXCHANGES = tuple(ROUTING_BYTES)
# Ethernet, IP and TCP; acknowledgments; the counts before each exchange; barriers
PROTOCOL = 1.05


@pytest.fixture(scope="module")
def run(two_nodes: Nodes, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("wire")
    done = two_nodes.finish(two_nodes.start(PROGRAM, ["wire", str(out)]), LIMIT_S)
    assert done.code == 0, done.output[-6000:]
    return json.loads((out / "result.json").read_text()), out


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_nodes_are_found_by_their_host_names(run, exchange):
    topology = ClusterTopology(**run[0][exchange]["topology"])
    assert tuple(topology.node_names) == ("node0", "node1")
    assert [topology.node_of(rank) for rank in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_counted_bytes_are_the_predicted_ones(run, exchange):
    rows = predicted_rows(run[1] / f"trace-{exchange}", exchange)
    counted = run[0][exchange]["traffic"]
    assert [counted["rows_by_link"][kind]["cross_node"] for kind in KINDS] == [rows] * 4
    assert [counted["by_link"][kind]["cross_node"] for kind in KINDS] == [rows * ROW_BYTES] * 4
    assert counted["by_link"]["routing"]["cross_node"] == rows * ROUTING_BYTES[exchange]


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_the_links_carry_what_was_counted(run, exchange):
    counted = counted_by_node(run[0][exchange]["traffic"]["bytes"])
    for node, sent in enumerate(counted):
        wire = run[0][exchange]["wire"][f"node{node}"]
        assert sent > 1e6  # enough to tell five percent
        assert sent < wire < PROTOCOL * sent, (node, wire / sent)


def predicted_rows(folder: Path, exchange: str) -> int:
    """Rows that cross nodes in one direction, from the recorded routing alone."""
    trace = read_trace(folder)
    assert trace.num_tokens == STEPS * sum(TOKENS + 16 * rank for rank in range(4))
    assert trace.expert_ids.shape[1:] == (2, TOP_K)
    plan = PlacementPlan.linear(
        num_experts=EXPERTS, layer_ids=trace.layer_ids, num_nodes=2, ranks_per_node=2
    )
    costs = evaluate(trace, plan, homes="trace")
    rows = costs.total_picks if exchange == "flat" else costs.total_copies
    assert rows
    return rows


def counted_by_node(sent: dict[str, list[list[int]]]) -> list[int]:
    """Bytes that each node (ranks 0-1 and 2-3) sent to the other."""
    pairs = [(0, 2), (0, 3), (1, 2), (1, 3)]
    there = sum(matrix[a][b] for matrix in sent.values() for a, b in pairs)
    back = sum(matrix[b][a] for matrix in sent.values() for a, b in pairs)
    return [there, back]
