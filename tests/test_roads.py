"""How many files one row passes: counted while a layer runs, so that no list can go stale."""

import sys
from pathlib import Path

import pytest
import torch

import moe_locality
from tests.launch import run_ranks

PACKAGE = Path(moe_locality.__file__).parent


def files_that_run(call) -> set[str]:
    """Files of the package whose functions are called in this thread while ``call()`` runs."""
    found: set[str] = set()

    def note(frame, event, _arg):
        if event == "call":
            found.add(frame.f_code.co_filename)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
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
