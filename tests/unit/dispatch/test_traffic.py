import torch
from torch import nn

from moe_locality.dispatch.dispatcher import TokenDispatcher
from moe_locality.dispatch.traffic import link_classes, reset_traffic, traffic_report
from moe_locality.dispatch.transport import KINDS, TrafficCounter
from moe_locality.topology import ClusterTopology


class Layer(nn.Module):
    def __init__(self, counter):
        super().__init__()
        self.traffic = counter


def test_forward_and_backward_are_counted_apart():
    dispatcher = TokenDispatcher(num_slots=2)
    x = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.ones(3, 2, requires_grad=True)
    routed = dispatcher.dispatch(x, torch.tensor([[0, 1], [1, -1], [0, 1]]), weights)
    out = dispatcher.combine(routed.rows.float(), routed.handle)
    rows = {kind: dispatcher.traffic.rows[kind].tolist() for kind in KINDS}
    assert rows == {"dispatch": [5], "combine": [5], "dispatch_grad": [0], "combine_grad": [0]}
    out.sum().backward()
    rows = {kind: dispatcher.traffic.rows[kind].tolist() for kind in KINDS}
    assert rows == {kind: [5] for kind in KINDS}
    sizes = {kind: dispatcher.traffic.bytes[kind].tolist() for kind in KINDS}
    assert sizes == {
        "dispatch": [5 * 4 * 2],
        "combine": [5 * 4 * 4],
        "dispatch_grad": [5 * 4 * 2],
        "combine_grad": [5 * 4 * 4],
    }


def test_report_of_one_process_sums_the_layers():
    counter = TrafficCounter(ranks=[0], topology=ClusterTopology.uniform(1, 1))
    counter.count("dispatch", [3], torch.empty(0, 8))
    other = TrafficCounter(ranks=[0])
    other.count("combine", [2], torch.empty(7, 4))
    model = nn.Sequential(Layer(counter), nn.ReLU(), Layer(other))
    report = traffic_report(model)
    assert report["rows"]["dispatch"] == [[3]]
    assert report["bytes"]["combine"] == [[2 * 4 * 4]]
    assert report["by_link"]["dispatch"] == {
        "same_rank": 3 * 8 * 4,
        "same_node": 0,
        "cross_node": 0,
    }
    assert [layer["name"] for layer in report["per_layer"]] == ["0", "2"]
    assert report["per_layer"][1]["rows"]["combine"] == [[2]]
    reset_traffic(model)
    assert traffic_report(model)["rows"]["dispatch"] == [[0]]


def test_links_are_classed_by_node():
    topology = ClusterTopology(rank_to_node=(0, 1, 0, 1), node_names=("a", "b"))
    classes = link_classes([0, 1, 2], topology)
    assert classes.tolist() == [[0, 2, 1], [2, 0, 2], [1, 2, 0]]


def test_without_a_topology_the_report_has_no_links():
    report = traffic_report(Layer(TrafficCounter(ranks=[0])))
    assert report["by_link"] is None
    assert report["rows_by_link"] is None
