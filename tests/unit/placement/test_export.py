import json

import pytest
from hypothesis import given, settings

from moe_locality.errors import PlacementError
from moe_locality.placement.export import to_autoep_descriptors, to_engine_dict, write_engine_map
from moe_locality.placement.plan import PlacementPlan
from tests.unit.placement.cases import plans


def test_the_engine_map_holds_that_key_and_nothing_else(tmp_path):
    plan = PlacementPlan.linear(4, [1, 2], 2, 1)
    path = write_engine_map(plan, tmp_path / "map.json")
    assert json.loads(path.read_text()) == {"physical_to_logical_map": [[0, 1, 2, 3]] * 2}


def test_layers_without_experts_get_the_linear_row():
    plan = PlacementPlan(
        layer_ids=(1,),
        num_experts=3,
        num_nodes=2,
        ranks_per_node=1,
        physical_to_logical_map=[[2, 1, 0, 2]],
    )
    rows = to_engine_dict(plan, num_hidden_layers=3)["physical_to_logical_map"]
    assert rows == [[0, 1, 2, 0], [2, 1, 0, 2], [0, 1, 2, 0]]
    with pytest.raises(PlacementError, match="below num_hidden_layers = 1"):
        to_engine_dict(plan, num_hidden_layers=1)


@settings(max_examples=20, deadline=None)
@given(plans())
def test_autoep_descriptors_are_those_that_deepspeed_makes(plan):
    affine = pytest.importorskip("deepspeed.checkpoint.autoep_affine")
    descriptors = to_autoep_descriptors(plan)
    assert list(descriptors) == list(plan.layer_ids)
    for row, layer in enumerate(plan.layer_ids):
        by_rank = plan.physical_to_logical_map[row].reshape(plan.num_ranks, -1).tolist()
        expected = affine.make_autoep_placement_descriptor(plan.num_experts, by_rank)
        assert descriptors[layer] == expected
        json.dumps(descriptors[layer])  # plain types only
