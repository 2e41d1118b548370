import json

import pytest
from hypothesis import given, settings

from moe_locality.errors import PlacementError
from moe_locality.placement.export import (
    TARGETS,
    from_engine_map,
    to_autoep_descriptors,
    to_engine_dict,
    write_engine_map,
    write_export,
)
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


def shape_of(plan):
    return {
        "num_experts": plan.num_experts,
        "layer_ids": plan.layer_ids,
        "num_nodes": plan.num_nodes,
        "ranks_per_node": plan.ranks_per_node,
    }


@settings(max_examples=30, deadline=None)
@given(plans())
def test_maps_of_engines_come_back_as_the_same_placement(tmp_path_factory, plan):
    folder = tmp_path_factory.mktemp("export")
    for target in ("vllm", "sglang", "vllm-ascend"):
        options = {"num_hidden_layers": plan.num_layers + 2, "layers": plan.layer_ids}
        path = write_export(plan, folder / target, target, **options)
        back = from_engine_map(json.loads(path.read_text()), **shape_of(plan))
        assert back.physical_to_logical_map.tolist() == plan.physical_to_logical_map.tolist()
    assert len(json.loads((folder / "vllm").read_text())) == plan.num_layers


@settings(max_examples=30, deadline=None)
@given(plans(replicas=False))
def test_ranks_of_experts_come_back_as_the_same_ranks(plan):
    one = PlacementPlan.from_dict(
        {
            **plan.to_dict(),
            "layer_ids": [0, 5],
            "physical_to_logical_map": [plan.physical_to_logical_map[0].tolist()] * 2,
            "expert_load": None,
        }
    )
    content = TARGETS["vllm-ranks"](one, None)
    back = from_engine_map(content, **shape_of(one))
    held = one.physical_to_logical_map.reshape(2, one.num_ranks, -1)
    assert back.physical_to_logical_map.reshape(held.shape).tolist() == [
        [sorted(rank) for rank in layer] for layer in held.tolist()
    ]
    assert TARGETS["vllm-ranks"](back, None) == content


def test_what_a_target_cannot_hold_is_refused(tmp_path):
    replicas = PlacementPlan(
        layer_ids=(1,),
        num_experts=3,
        num_nodes=2,
        ranks_per_node=1,
        physical_to_logical_map=[[2, 1, 0, 2]],
    )
    differing = PlacementPlan(
        layer_ids=(1, 2),
        num_experts=2,
        num_nodes=2,
        ranks_per_node=1,
        physical_to_logical_map=[[0, 1], [1, 0]],
    )
    path = tmp_path / "map.json"
    for plan, target, message in (
        (replicas, "vllm-ranks", "found 1 replicas per layer, expected none"),
        (differing, "vllm-ranks", "another placement in layer 2 than in layer 1"),
        (replicas, "sglang", "give num_hidden_layers="),
        (replicas, "excel", "expected one of: vllm, vllm-ranks, sglang, autoep"),
    ):
        with pytest.raises(PlacementError, match=message):
            write_export(plan, path, target)
        assert not path.exists()
    assert json.loads(write_export(replicas, path, "vllm").read_text()) == [[2, 1, 0, 2]]
    (tmp_path / "file").write_text("")
    with pytest.raises(PlacementError, match="cannot write"):
        write_export(replicas, tmp_path / "file" / "map.json", "vllm")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no rows of experts"),
        ("x", "no rows of experts"),
        ([[0, 1, 2]], "slots"),
        ([[0, 1, 2, "x"]], "."),
        ([[0, 1, 2, 3]] * 2, "found 2 rows, expected one for each of 1 MoE layers or for every"),
        ({"layer_list": 3}, "no rows of experts"),
        ({"layer_list": [3]}, "found the devices"),
        ({"layer_list": [{"device_list": [{"device_id": 1}]}]}, r"found the devices \['1'\]"),
        ({"expert_to_ep_rank": [0, 0, 1]}, "no list of 4 ranks below 2"),
        ({"expert_to_ep_rank": [0, 0, 0, 1]}, r"found \[3, 1\] experts on the ranks"),
        ({"expert_to_ep_rank": [0, 0, 1, 2]}, "no list of 4 ranks below 2"),
    ],
)
def test_foreign_maps_that_are_no_plans_are_refused(content, message):
    with pytest.raises(PlacementError, match=message):
        from_engine_map(content, num_experts=4, layer_ids=(3,), num_nodes=2, ranks_per_node=1)
    shared = from_engine_map(
        [3, 2, 1, 0], num_experts=4, layer_ids=(3, 9), num_nodes=2, ranks_per_node=1
    )
    assert shared.physical_to_logical_map.tolist() == [[3, 2, 1, 0]] * 2


def test_a_map_of_vllm_ascend():
    """Its maps could be neither written nor read; [E4]
    devices may stand in any order there."""
    plan = PlacementPlan(
        layer_ids=(3, 4),
        num_experts=3,
        num_nodes=1,
        ranks_per_node=2,
        physical_to_logical_map=[[2, 1, 0, 2], [0, 1, 2, 1]],
    )
    content = TARGETS["vllm-ascend"](plan, None)
    assert content == {
        "moe_layer_count": 2,
        "layer_list": [
            {
                "layer_id": row,
                "device_count": 2,
                "device_list": [
                    {"device_id": 0, "device_expert": experts[:2]},
                    {"device_id": 1, "device_expert": experts[2:]},
                ],
            }
            for row, experts in enumerate([[2, 1, 0, 2], [0, 1, 2, 1]])
        ],
    }
    content["layer_list"][1]["device_list"].reverse()
    back = from_engine_map(content, **shape_of(plan))
    assert back.physical_to_logical_map.tolist() == plan.physical_to_logical_map.tolist()
