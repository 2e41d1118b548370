"""How many files one row passes: counted while a layer runs, so that no list can go stale."""

import sys
import threading
from pathlib import Path

import pytest
import torch

import moe_locality
from tests.launch import run_ranks
from tests.recorder_models import MoeModel, inputs

PACKAGE = Path(moe_locality.__file__).parent


def files_that_run(call) -> set[str]:
    """Files of the package whose functions run while ``call()`` does, in its new threads too."""
    found: set[str] = set()

    def note(frame, event, _arg):
        if event == "call":
            found.add(frame.f_code.co_filename)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    paths = (Path(name).resolve() for name in found)
    return {str(path.relative_to(PACKAGE)) for path in paths if path.is_relative_to(PACKAGE)}


def forward_on_rank(rank, world, exchange, nodes):
    """The second forward of a layer: the first one also builds its dispatcher."""
    from moe_locality import MoE
    from moe_locality.topology import ClusterTopology
    from moe_locality.topology.groups import prepare_groups

    topology = ClusterTopology.uniform(nodes, world // nodes)
    prepare_groups(topology, [world], "E+D")
    layer = MoE(
        8,
        torch.nn.Linear(8, 8),
        num_experts=4,
        ep_size=world,
        k=2,
        drop_tokens=False,
        topology=topology,
        dispatch_config={"exchange": exchange},
    )
    layer.set_deepspeed_parallelism()
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(rank))
    layer(x)
    found = files_that_run(lambda: layer(x))
    return type(layer.deepspeed_moe.dispatcher.transport).__name__, sorted(found)


@pytest.mark.parametrize(
    ("exchange", "world", "nodes", "transport", "most"),
    [
        ("flat", 1, 1, "FlatTransport", 9),
        ("flat", 2, 1, "FlatTransport", 9),
        ("hierarchical", 2, 2, "HierarchicalTransport", 12),
    ],
)
def test_moe_forward_passes_few_files(exchange, world, nodes, transport, most):
    for name, found in run_ranks(forward_on_rank, world, exchange, nodes, deepspeed=True):
        assert name == transport
        # what must be seen, or the count would mean nothing
        assert {"layer/moe.py", "dispatch/dispatcher.py", "kernels/reference.py"} <= set(found)
        assert len(found) <= most, found


def way_of_a_trace(rank, world, folder):
    """Record two forward passes, solve a plan of them, and put it into the layers."""
    from moe_locality.placement import solve
    from moe_locality.topology import ClusterTopology
    from moe_locality.topology.groups import prepare_groups
    from moe_locality.trace import read_trace

    topology = ClusterTopology.uniform(world, 1)
    prepare_groups(topology, [world], "E+D")
    model = MoeModel(num_layers=2, num_experts=8, ep_size=world)
    for block in model.blocks:
        block.set_deepspeed_parallelism()

    def record():
        recorder = moe_locality.attach(model, folder, shard_tokens=8)
        for seed in range(4):
            model(inputs(batch=4, seed=seed + 4 * rank))
        recorder.close()
        torch.distributed.barrier()

    found = files_that_run(record)
    trace = read_trace(folder)
    plan = solve(trace, topology)  # numba compiles: too many calls to be watched
    found |= files_that_run(lambda: solve(read_trace(folder), topology))
    found |= files_that_run(lambda: moe_locality.relabel(model, plan, weights_only=True))
    return sorted(found)


def test_a_trace_passes_few_files_from_the_recorder_to_the_weights(tmp_path):
    for found in run_ranks(way_of_a_trace, 2, str(tmp_path / "trace"), deepspeed=True):
        seen = set(found)
        assert {"trace/recorder/core.py", "placement/solve.py", "layer/relabeling.py"} <= seen
        assert len(found) <= 24, "\n".join(found)
