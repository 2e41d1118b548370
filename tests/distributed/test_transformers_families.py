"""Every family of transformers through our exchange (make test-families)."""

import pytest

pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers before 5.23")
pytest.importorskip("accelerate")

from tests.distributed import transformers_families as split
from tests.unit.trace.families import families


def test_the_table_of_split_families_lists_every_family():
    assert list(split.listed()) == families()


@pytest.mark.families
@pytest.mark.parametrize("family", families())
def test_every_family_runs_split_as_the_table_says(family):
    assert split.row(family) == split.listed()[family]
