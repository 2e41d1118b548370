"""Nodes for the tests here, where this machine can make them; else a skip says why not."""

from collections.abc import Iterator

import pytest

from benchmarks import _nodes
from benchmarks._nodes import Nodes


@pytest.fixture(scope="session")
def can_have_nodes() -> None:
    reason = _nodes.why_not()
    if reason is not None:
        pytest.skip(f"no nodes on this machine: {reason}")


@pytest.fixture(scope="module")
def two_nodes(can_have_nodes) -> Iterator[Nodes]:
    """Two nodes of two ranks, links of 200 Mbit/s."""
    with Nodes(2, slots=2, mbit_per_s=200) as nodes:
        yield nodes
