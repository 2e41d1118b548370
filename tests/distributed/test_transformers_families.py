"""Every family of transformers through our exchange (make test-families)."""

import pytest

from tests.launch import skip_without_expert_parallelism

skip_without_expert_parallelism()
pytest.importorskip("accelerate")

from tests.distributed import transformers_families as split  # noqa: E402
from tests.unit.trace.families import families  # noqa: E402


def test_the_table_of_split_families_lists_every_family():
    assert list(split.listed()) == families()


@pytest.mark.families
@pytest.mark.parametrize("family", families())
def test_every_family_runs_split_as_the_table_says(family):
    assert split.row(family) == split.listed()[family]
