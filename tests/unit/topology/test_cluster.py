"""ClusterTopology: numbering, subsets, what it refuses."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.config import ClusterConfig
from moe_locality.errors import TopologyError
from moe_locality.topology import ClusterTopology


def test_uniform_puts_consecutive_ranks_on_a_node():
    topology = ClusterTopology.uniform(num_nodes=4, ranks_per_node=2)
    assert topology.rank_to_node == (0, 0, 1, 1, 2, 2, 3, 3)
    assert (topology.num_nodes, topology.ranks_per_node, topology.num_ranks) == (4, 2, 8)
    assert topology.node_names == ("node0", "node1", "node2", "node3")
    assert topology.ranks_of(2) == (4, 5)
    assert topology.describe() == "4 nodes x 2 ranks"


def test_uneven_nodes_are_allowed_but_have_no_ranks_per_node():
    topology = ClusterTopology(rank_to_node=(0, 0, 1), node_names=("big", "small"))
    assert (topology.num_nodes, topology.num_ranks, topology.is_even) == (2, 3, False)
    with pytest.raises(TopologyError, match=r"uneven nodes \(2 nodes: big 2, small 1 ranks\)"):
        _ = topology.ranks_per_node


@settings(max_examples=60, deadline=None)
@given(names=st.lists(st.sampled_from("abcde"), min_size=1, max_size=12))
def test_every_rank_is_on_its_node(names):
    topology = ClusterTopology.from_node_names(names)
    assert [topology.node_names[topology.node_of(r)] for r in range(len(names))] == names
    nodes = [topology.ranks_of(node) for node in range(topology.num_nodes)]
    assert sorted(rank for ranks in nodes for rank in ranks) == list(range(len(names)))
    assert topology.rank_to_node[0] == 0
    assert ClusterTopology(**topology.to_dict()) == topology


def test_ranks_and_nodes_that_are_not_there_are_refused():
    topology = ClusterTopology.uniform(2, 2)
    with pytest.raises(TopologyError, match="found rank 4, expected 0 to 3"):
        topology.node_of(4)
    with pytest.raises(TopologyError, match="found node 2, expected 0 to 1"):
        topology.ranks_of(2)
    with pytest.raises(TopologyError, match="found rank -1"):
        topology.node_of(-1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank_to_node": ()}, "at least one rank each"),
        ({"rank_to_node": (0, 2)}, r"found ranks on nodes \[0, 2\].*number the nodes without gaps"),
        ({"rank_to_node": (-1, 0)}, "expected nodes 0 to M-1"),
        ({"rank_to_node": (0, 1), "node_names": ("a",)}, "found node names a for 2 nodes"),
        ({"rank_to_node": (0, 1), "node_names": ("a", "a")}, "expected a different name for each"),
        ({"rank_to_node": (0,), "intra_node_gbps": 0.0}, "found intra_node_gbps=0.0, expected a"),
        ({"rank_to_node": (0,), "inter_node_gbps": float("inf")}, "found inter_node_gbps=inf"),
        ({"rank_to_node": (0,), "inter_node_latency_us": -1.0}, "a number of at least 0"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(TopologyError, match=message):
        ClusterTopology(**fields)


def test_uniform_refuses_nothing_of_something():
    with pytest.raises(TopologyError, match="found 0 nodes x 2 ranks, expected at least 1 of each"):
        ClusterTopology.uniform(0, 2)


def test_the_cluster_section_of_a_configuration(tmp_path):
    (tmp_path / "hosts").write_text("a slots=1\nb slots=2\n")
    (tmp_path / "cluster.yaml").write_text("num_nodes: 3\nranks_per_node: 1\n")
    of = ClusterTopology.from_config
    assert of(ClusterConfig(hostfile=str(tmp_path / "hosts"))).rank_to_node == (0, 1, 1)
    assert of(ClusterConfig(file=str(tmp_path / "cluster.yaml"))).rank_to_node == (0, 1, 2)
    assert of(ClusterConfig(num_nodes=2, ranks_per_node=2)) == ClusterTopology.uniform(2, 2)
    given_already = ClusterTopology.uniform(1, 3)
    assert of(given_already) is given_already
    with pytest.raises(TopologyError, match="found an empty cluster section, expected hostfile"):
        of(ClusterConfig())
