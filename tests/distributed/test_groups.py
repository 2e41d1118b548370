"""Process groups and the discovery of the cluster, on four gloo ranks."""

import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from moe_locality.compat import default_store, default_timeout
from moe_locality.config import ClusterConfig
from moe_locality.errors import TopologyError
from moe_locality.topology import (
    ClusterTopology,
    build_groups,
    discover_topology,
    exchange_objects,
    layout_groups,
)
from moe_locality.topology.groups import built_groups, follow_groups
from tests.launch import run_ranks

KINDS = ("ep", "edp", "intra_node", "inter_node")


def caught(call, *args, **kwargs):
    """Return the message of the TopologyError that a call raises, or what it returned."""
    try:
        return call(*args, **kwargs)
    except TopologyError as error:
        return str(error)


def sum_of_ranks_in_each_group(rank, world):
    results = []
    for names, ep_size, order in (("aabb", 2, "E+D"), ("abab", 4, "E+D"), ("abab", 2, "D+E")):
        layout = layout_groups(ClusterTopology.from_node_names(names), ep_size, order)
        groups = build_groups(layout)
        for kind in KINDS:
            ranks = getattr(groups, f"{kind}_ranks")
            assert rank in ranks
            assert ranks in getattr(layout, f"{kind}_groups")
            total = torch.tensor([2**rank])
            dist.all_reduce(total, group=getattr(groups, f"{kind}_group"))
            results.append((total.item(), sum(2**member for member in ranks)))
    return results


def test_each_group_connects_its_ranks_and_no_others():
    for results in run_ranks(sum_of_ranks_in_each_group, 4):
        assert len(results) == 3 * len(KINDS)
        assert all(found == expected for found, expected in results)


def build_twice(rank, world):
    layout = layout_groups(ClusterTopology.uniform(2, 2), 2)
    first = build_groups(layout)
    alive = len(distributed_c10d._world.pg_map)
    second = build_groups(layout_groups(ClusterTopology.uniform(2, 2), 2))
    same = all(
        getattr(first, f"{kind}_group") is getattr(second, f"{kind}_group") for kind in KINDS
    )
    leaked = len(distributed_c10d._world.pg_map) - alive
    # groups that are gone on one rank are made again, on all ranks
    if rank == 1:
        dist.destroy_process_group(first.ep_group)
    third = build_groups(layout)
    ranks = dist.get_process_group_ranks(third.ep_group)
    return same, leaked, third.ep_group is first.ep_group, tuple(ranks) == third.ep_ranks, alive


def test_building_the_same_layout_again_reuses_its_groups():
    for same, leaked, still_first, usable, alive in run_ranks(build_twice, 4):
        assert same
        assert leaked == 0
        assert not still_first
        assert usable
        assert alive == 1 + 3  # the world; EP (= intra-node), EDP, one inter-node singleton


def different_layouts(rank, world):
    topology = ClusterTopology.uniform(2, 2)
    other = layout_groups(topology, 4 if rank in (1, 2) else 2)
    three = layout_groups(topology, 2, "D+E" if rank == 3 else "E+D")
    small = layout_groups(ClusterTopology.uniform(1, 2), 2)
    return [caught(build_groups, layout) for layout in (other, three, small)]


def groups_of_two_clusters(rank, _world):
    clusters = [ClusterTopology.uniform(2, 2), ClusterTopology.from_node_names("abab")]
    layouts = [follow_groups(range(4), cluster)[1] for cluster in clusters]
    assert built_groups(range(4)) is not None
    assert built_groups(range(4), ClusterTopology.uniform(4, 1)) is None
    for cluster, layout in zip(clusters, layouts, strict=True):
        found = built_groups(range(4), cluster)
        assert found.layout == layout
        assert {cluster.node_of(r) for r in found.intra_node_ranks} == {cluster.node_of(rank)}


def test_built_groups_are_those_of_the_same_nodes():
    run_ranks(groups_of_two_clusters, 4)


def test_ranks_that_disagree_all_raise_and_name_the_odd_ones():
    for two_and_two, one_odd, wrong_world in run_ranks(different_layouts, 4, timeout_s=60):
        assert "on ranks [1, 2] than on the other 2 of 4" in two_and_two
        assert "on ranks [3] than on the other 3 of 4" in one_odd
        assert "same cluster description, ep_size and order" in one_odd
        assert "found a layout for 2 ranks, expected one for the 4 of this run" in wrong_world


def exchange(rank, world):
    halves = [dist.new_group([0, 3]), dist.new_group([1, 2])]
    mine = halves[0] if rank in (0, 3) else halves[1]
    everyone = [exchange_objects({"rank": rank, "turn": turn}) for turn in range(3)]
    return everyone, exchange_objects(f"rank {rank}", mine)


def keys_after(rank, world, turns):
    """Keys in the store after each so many exchanges."""
    found = []
    for turn in range(turns):
        exchange_objects({"turn": turn})
        dist.barrier()
        found.append(default_store().num_keys() if rank == 0 else 0)
        dist.barrier()
    return found


def test_exchange_objects_leaves_nothing_in_the_store():
    found = run_ranks(keys_after, 2, 4)[0]
    assert found == [found[0]] * 4


def test_values_are_exchanged_in_the_order_of_ranks():
    for rank, (everyone, half) in enumerate(run_ranks(exchange, 4)):
        for turn, values in enumerate(everyone):
            assert values == [{"rank": r, "turn": turn} for r in range(4)]
        assert half == (["rank 0", "rank 3"] if rank in (0, 3) else ["rank 1", "rank 2"])


# -- the cluster -----------------------------------------------------------------------------------


def discover(rank, world, variables, config=None):
    """``variables``: per rank a dict of environment variables."""

    for name in ("MOE_LOCALITY_NODE", "MOE_LOCALITY_RANKS_PER_NODE", "CROSS_RANK", "CROSS_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(variables[rank])
    return caught(discover_topology, cluster_config=config)


def on_every_rank(names, variable="MOE_LOCALITY_NODE"):
    return [{variable: name} for name in names]


@pytest.mark.parametrize(
    ("variables", "rank_to_node"),
    [
        ([{}] * 4, (0, 0, 0, 0)),  # one host name
        (on_every_rank("abab"), (0, 1, 0, 1)),
        (on_every_rank("2222", "MOE_LOCALITY_RANKS_PER_NODE"), (0, 0, 1, 1)),
        # two launchers on one machine, as in tests of two nodes
        ([{"CROSS_RANK": str(r // 2), "CROSS_SIZE": "2"} for r in range(4)], (0, 0, 1, 1)),
        # the launcher says one node: its number is no hint
        ([{"CROSS_RANK": str(r), "CROSS_SIZE": "1"} for r in range(4)], (0, 0, 0, 0)),
    ],
)
def test_nodes_are_found_by_name(variables, rank_to_node):
    found = run_ranks(discover, 4, variables)
    assert [topology.rank_to_node for topology in found] == [rank_to_node] * 4
    assert len({topology.node_names for topology in found}) == 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ([{"MOE_LOCALITY_NODE": "a"}] * 3 + [{}], r"MOE_LOCALITY_NODE set, but not on ranks [3]"),
        (on_every_rank("2221", "MOE_LOCALITY_RANKS_PER_NODE"), "with values ['1', '2']"),
        (on_every_rank("3333", "MOE_LOCALITY_RANKS_PER_NODE"), "found WORLD_SIZE=4"),
        (
            [{"MOE_LOCALITY_NODE": "a", "MOE_LOCALITY_RANKS_PER_NODE": "2"}] * 4,
            "expected one: unset the other",
        ),
    ],
)
def test_contradictions_raise_on_all_ranks(variables, message):
    for error in run_ranks(discover, 4, variables, timeout_s=60):
        assert message in error


def test_the_configuration_wins_and_only_the_first_rank_reads_its_files(tmp_path, monkeypatch):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("a slots=3\nb slots=1\n")
    config = ClusterConfig(hostfile=str(hostfile))
    found = run_ranks(discover, 4, on_every_rank("wxyz"), config)
    assert [topology.rank_to_node for topology in found] == [(0, 0, 0, 1)] * 4

    reader = ClusterTopology.from_hostfile

    def only_on_rank_0(*args, **kwargs):
        assert os.environ["RANK"] == "0"
        return reader(*args, **kwargs)

    monkeypatch.setattr(ClusterTopology, "from_hostfile", only_on_rank_0)
    assert run_ranks(discover, 4, [{}] * 4, config)[3].num_nodes == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ClusterConfig(num_nodes=2, ranks_per_node=4), "found 8 ranks in the cluster description"),
        (ClusterConfig(hostfile="/nowhere/hosts"), "cannot read the hostfile /nowhere/hosts"),
        (ClusterConfig(), "found an empty cluster section"),
    ],
)
def test_a_configuration_that_does_not_fit_raises_on_all_ranks(config, message):
    for error in run_ranks(discover, 4, [{}] * 4, config, timeout_s=60):
        assert message in error


def discover_a_half(rank, world):
    os.environ["MOE_LOCALITY_NODE"] = "aabb"[rank]
    halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    return discover_topology(halves[rank % 2]).rank_to_node


def test_the_topology_of_a_group():
    assert run_ranks(discover_a_half, 4) == [(0, 1)] * 4


def limits_of_groups(rank, world):
    groups = build_groups(layout_groups(ClusterTopology.uniform(2, 2), 4))
    made = [getattr(groups, f"{kind}_group") for kind in ("ep", "intra_node", "inter_node")]
    cpu = torch.device("cpu")
    found = [group._get_backend(cpu).options._timeout.total_seconds() for group in made]
    return [default_timeout().total_seconds(), *found]


def test_groups_wait_as_long_as_the_default_group():
    assert run_ranks(limits_of_groups, 4, timeout_s=77) == [[77.0] * 4] * 4
