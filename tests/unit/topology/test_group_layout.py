"""Rank lists of the expert groups: what every layout must satisfy, and what is refused."""

import logging

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moe_locality.errors import TopologyError
from moe_locality.topology import ClusterTopology, layout_groups
from moe_locality.topology.cluster import group_of


@st.composite
def clusters(draw, shuffled=True):
    num_nodes, per_node = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    nodes = [node for node in range(num_nodes) for _ in range(per_node)]
    return ClusterTopology(rank_to_node=tuple(draw(st.permutations(nodes)) if shuffled else nodes))


def fitting_layout(topology, data, order):
    """A layout of any ep_size that fits, or nothing to test."""
    sizes = [size for size in range(1, topology.num_ranks + 1) if topology.num_ranks % size == 0]
    try:
        return layout_groups(topology, data.draw(st.sampled_from(sizes)), order)
    except TopologyError:
        assume(False)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), topology=clusters(), order=st.sampled_from(["E+D", "D+E"]))
def test_every_rank_is_once_in_every_kind_of_group(data, topology, order):
    layout = fitting_layout(topology, data, order)
    world = list(range(topology.num_ranks))
    for name in ("ep", "edp", "intra_node", "inter_node"):
        groups = getattr(layout, f"{name}_groups")
        assert sorted(rank for group in groups for rank in group) == world, name
        assert all(list(group) == sorted(group) for group in groups), name
    assert {len(group) for group in layout.ep_groups} == {layout.ep_size}
    assert {len(group) for group in layout.edp_groups} == {len(world) // layout.ep_size}
    assert layout.num_ranks == len(world)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), topology=clusters(), order=st.sampled_from(["E+D", "D+E"]))
def test_ranks_of_an_edp_group_hold_the_same_experts(data, topology, order):
    layout = fitting_layout(topology, data, order)
    for edp in layout.edp_groups:
        # the position in the sorted EP group decides which experts a rank holds
        positions = {group_of(layout.ep_groups, rank).index(rank) for rank in edp}
        assert len(positions) == 1
        assert len({group_of(layout.ep_groups, rank) for rank in edp}) == len(edp)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), topology=clusters())
def test_an_ep_group_stays_in_a_node_or_takes_whole_nodes(data, topology):
    layout = fitting_layout(topology, data, "E+D")
    for group in layout.ep_groups:
        nodes = {topology.node_of(rank) for rank in group}
        if layout.ep_size <= topology.ranks_per_node:
            assert len(nodes) == 1
        else:
            assert set(group) == {rank for node in nodes for rank in topology.ranks_of(node)}


@settings(max_examples=150, deadline=None)
@given(data=st.data(), topology=clusters(), order=st.sampled_from(["E+D", "D+E"]))
def test_the_two_steps_of_a_hierarchical_exchange_reach_every_peer(data, topology, order):
    layout = fitting_layout(topology, data, order)
    for ep in layout.ep_groups:
        nodes = {topology.node_of(rank) for rank in ep}
        for rank in ep:
            intra = group_of(layout.intra_node_groups, rank)
            inter = group_of(layout.inter_node_groups, rank)
            assert set(intra) == {r for r in ep if topology.node_of(r) == topology.node_of(rank)}
            assert {topology.node_of(r) for r in inter} == nodes
            assert len(inter) == len(nodes)
            # equal local index inside the part of the EP group that is on each node
            assert len({group_of(layout.intra_node_groups, r).index(r) for r in inter}) == 1
            reached = {r for via in inter for r in group_of(layout.intra_node_groups, via)}
            assert reached == set(ep)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), topology=clusters(shuffled=False), order=st.sampled_from(["E+D", "D+E"]))
def test_consecutive_ranks_give_the_groups_that_deepspeed_makes(data, topology, order):
    deepspeed_groups = pytest.importorskip("deepspeed.utils.groups")
    layout = fitting_layout(topology, data, order)
    ep, edp = deepspeed_groups._get_expert_parallel_ranks(
        topology.num_ranks, 1, layout.ep_size, 1, order == "D+E"
    )
    assert sorted(map(list, layout.ep_groups)) == sorted(ep)
    assert sorted(map(list, layout.edp_groups)) == sorted(edp)


def test_interleaved_ranks_stay_on_their_nodes():
    topology = ClusterTopology.from_node_names(["a", "b", "a", "b"])
    assert layout_groups(topology, 2).ep_groups == ((0, 2), (1, 3))
    whole = layout_groups(topology, 4)
    assert whole.ep_groups == ((0, 1, 2, 3),)
    assert whole.intra_node_groups == ((0, 2), (1, 3))
    assert whole.inter_node_groups == ((0, 1), (2, 3))


class Mpu:
    def __init__(self, tensor=1, pipe=1):
        self.get_model_parallel_world_size = lambda: tensor
        self.get_pipe_parallel_world_size = lambda: pipe


@pytest.mark.parametrize(
    ("topology", "arguments", "message"),
    [
        (ClusterTopology.uniform(2, 4), {"ep_size": 3}, "found ep_size=3 for 8 ranks, expected a"),
        (ClusterTopology.uniform(2, 4), {"ep_size": 0}, "found ep_size=0"),
        (ClusterTopology.uniform(2, 4), {"ep_size": 16}, "expected a divisor of 8"),
        (ClusterTopology.uniform(2, 6), {"ep_size": 4}, "expected a divisor or a multiple of 6"),
        (
            ClusterTopology.uniform(2, 6),
            {"ep_size": 3, "order": "D+E"},
            "found EDP size 4 on 2 nodes x 6 ranks",
        ),
        (
            ClusterTopology.from_node_names("aab"),
            {"ep_size": 1},
            r"found uneven nodes \(2 nodes: a 2, b 1 ranks\)",
        ),
        (ClusterTopology.uniform(1, 2), {"ep_size": 2, "order": "DE"}, "found order='DE'"),
        (
            ClusterTopology.uniform(2, 2),
            {"ep_size": 2, "mpu": Mpu(tensor=2)},
            "found an mpu with tensor-parallel size 2, expected 1",
        ),
        (
            ClusterTopology.uniform(2, 2),
            {"ep_size": 2, "mpu": Mpu(pipe=2)},
            "pipeline-parallel size 2",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused(topology, arguments, message):
    with pytest.raises(TopologyError, match=message):
        layout_groups(topology, **arguments)


def test_an_mpu_without_model_parallelism_is_accepted():
    topology = ClusterTopology.uniform(2, 2)
    assert layout_groups(topology, 2, mpu=Mpu()) == layout_groups(topology, 2)


def test_ep_groups_of_different_shape_are_warned_of(caplog):
    names = ["a", "b", "a", "b", "c", "c", "d", "d"]
    with caplog.at_level(logging.WARNING):
        layout_groups(ClusterTopology.from_node_names(names), 4)
    assert "ranks [0, 1, 2, 3]: nodes [0, 1, 0, 1]; ranks [4, 5, 6, 7]: nodes [0, 0, 1, 1]" in (
        caplog.text
    )
    caplog.clear()
    layout_groups(ClusterTopology.uniform(4, 2), 4)
    assert caplog.text == ""


def test_the_digest_changes_with_every_field():
    topology = ClusterTopology.uniform(2, 4)
    layouts = [
        layout_groups(topology, 2),
        layout_groups(topology, 4),
        layout_groups(topology, 4, "D+E"),
        layout_groups(ClusterTopology.uniform(4, 2), 4),
    ]
    assert len({layout.digest() for layout in layouts}) == len(layouts)
    assert layout_groups(topology, 2).digest() == layouts[0].digest()
