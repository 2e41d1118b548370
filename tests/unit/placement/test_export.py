import json
import random

import numpy as np
import pytest
import yaml
from hypothesis import given, settings

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.placement.export import (
    TARGETS,
    engine_serving_slots,
    from_engine_map,
    launch_lines,
    sglang_serving_slots,
    to_autoep_descriptors,
    to_sglang_map,
    write_export,
)
from moe_locality.placement.plan import PlacementPlan
from tests.unit.placement.cases import plans


def plan_of_layer_1():
    return PlacementPlan(
        layer_ids=(1,),
        num_experts=3,
        num_nodes=2,
        ranks_per_node=1,
        physical_to_logical_map=[[2, 1, 0, 2]],
    )


def test_to_sglang_map_gives_layers_without_experts_the_linear_row():
    plan = plan_of_layer_1()
    rows = [[0, 1, 2, 0], [2, 1, 0, 2], [0, 1, 2, 0]]
    assert to_sglang_map(plan, num_hidden_layers=3) == {"physical_to_logical_map": rows}
    with pytest.raises(PlacementError, match="below num_hidden_layers = 1"):
        to_sglang_map(plan, num_hidden_layers=1)


@settings(max_examples=20, deadline=None)
@given(plans(uneven=False))
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


def sglang_reads(path, num_hidden_layers):
    """A reader from the documentation: ``--init-expert-location FILE.json``, "a JSON file with
    physical_to_logical_map": a row of experts by slot for every layer of the model. Any other key
    would be an unknown argument.
    """
    assert path.name.endswith(".json")
    content = json.loads(path.read_text())
    assert list(content) == ["physical_to_logical_map"]
    assert len(content["physical_to_logical_map"]) == num_hidden_layers
    return dict(enumerate(content["physical_to_logical_map"]))


def trtllm_reads(path, ep_size):
    """A reader from examples/wide_ep/ep_load_balancer/README.md: "initial_global_assignments maps
    MoE layer index to a list of length num_slots; at layer i, the j-th expert slot is assigned with
    expert ID initial_global_assignments[i][j]. Every successive slots are assigned to a rank;
    layer_updates_per_iter of 0 means static".
    """
    content = yaml.safe_load(path.read_text())
    assert set(content) == {"num_slots", "layer_updates_per_iter", "initial_global_assignments"}
    assert content["layer_updates_per_iter"] == 0
    assert content["num_slots"] % ep_size == 0
    rows = content["initial_global_assignments"]
    assert all(type(i) is int and len(row) == content["num_slots"] for i, row in rows.items())
    return rows


def vllm_ascend_reads(path, moe_layer_ids):
    """A reader from vllm-ascend's guide to expert maps (``expert_map_path``): for every MoE layer
    the experts of every device, devices in order.
    """
    assert path.name.endswith(".json")
    content = json.loads(path.read_text())
    assert content["moe_layer_count"] == len(content["layer_list"]) == len(moe_layer_ids)
    rows = {}
    for number, (layer, entry) in enumerate(zip(moe_layer_ids, content["layer_list"], strict=True)):
        devices = entry["device_list"]
        assert entry["layer_id"] == number
        assert [one["device_id"] for one in devices] == list(range(entry["device_count"]))
        rows[layer] = [expert for one in devices for expert in one["device_expert"]]
    return rows


@settings(max_examples=30, deadline=None)
@given(plans(uneven=False))
def test_write_export_gives_what_readers_of_the_documentation_take(tmp_path_factory, plan):
    folder = tmp_path_factory.mktemp("export")
    layers = max(plan.layer_ids) + 2
    files = {
        target: write_export(plan, folder / f"{target}.json", target, layers, plan.layer_ids)
        for target in ("vllm", "sglang", "vllm-ascend", "trtllm")
    }
    ordered = sorted(plan.layer_ids)
    rows = dict(zip(plan.layer_ids, plan.physical_to_logical_map.tolist(), strict=True))
    taken = {
        "sglang": sglang_reads(files["sglang"], layers),
        "trtllm": trtllm_reads(files["trtllm"], plan.num_ranks),
        "vllm-ascend": vllm_ascend_reads(files["vllm-ascend"], ordered),
        "vllm": dict(zip(ordered, json.loads(files["vllm"].read_text()), strict=True)),
    }
    for target, of_layer in taken.items():
        assert {layer: of_layer[layer] for layer in ordered} == rows, target
        content = yaml.safe_load(files[target].read_text())  # JSON is YAML
        back = from_engine_map(content, **{**shape_of(plan), "layer_ids": tuple(ordered)})
        assert back.physical_to_logical_map.tolist() == [rows[layer] for layer in ordered]


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
        (replicas, "excel", "expected one of: sglang, trtllm, vllm-ascend, vllm, vllm-ranks"),
    ):
        with pytest.raises(PlacementError, match=message):
            write_export(plan, path, target)
        assert not path.exists()
    assert json.loads(write_export(replicas, path, "vllm").read_text()) == [[2, 1, 0, 2]]
    for target in ("sglang", "vllm-ascend"):
        with pytest.raises(PlacementError, match="takes a file only by the end"):
            write_export(replicas, tmp_path / "map.yaml", target, 3)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write the map"):
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
        ({"initial_global_assignments": {2: [0, 1, 2, 3]}}, r"no row for the layers \[3\]"),
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


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("sglang", ("--init-expert-location F", "--ep-num-redundant-experts 1", "routed_dp_rank")),
        ("trtllm", ("load_balancer: F", "enable_attention_dp: true", "--rule in_turn")),
        ("vllm-ascend", ('{"eplb_config": {"expert_map_path": "F"}}', "copies in turn")),
        (
            "vllm",
            ("no released vLLM (up to 0.33.0) reads", "moe-locality bake MODEL --plan p.json"),
        ),
        ("vllm-ranks", ("no released vLLM (up to 0.33.0) reads", "moe-locality bake")),
        ("autoep", ("no released DeepSpeed",)),
    ],
)
def test_launch_lines_name_the_file_and_what_the_engine_does(target, words):
    plan = plan_of_layer_1()
    text = "\n".join(launch_lines(plan, target, "F", "p.json"))
    assert all(word in text for word in words), text


@settings(max_examples=30, deadline=None)
@given(plans(uneven=False))
def test_sglang_serving_slots_are_near_and_the_rest_is_dealt(plan):
    """First slot on the own rank, else first on the own node, else any."""
    served = sglang_serving_slots(plan)
    assert served.tolist() == sglang_serving_slots(plan).tolist()
    for row, held in enumerate(plan.logical_to_physical_map.tolist()):
        for expert, slots in enumerate(held):
            slots = [slot for slot in slots if slot >= 0]
            for rank in range(plan.num_ranks):
                node = rank // plan.ranks_per_node
                near = [s for s in slots if s // plan.slots_per_rank == rank]
                ranks = plan.ranks_per_node
                inside = [s for s in slots if s // plan.slots_per_rank // ranks == node]
                if not near and len(inside) < len(slots):
                    near = inside
                found = served[row, rank, expert]
                assert found == near[0] if near else found in slots


def test_sglang_serving_slots_deal_far_copies_evenly_with_the_generator_of_python():
    """4 nodes of 2; the copies of expert 0 are on nodes 0 and 3, so nodes 1 and 2 draw: each of
    their ranks with its own generator, seeded alike, so all see the same lot and take their place.
    """
    plan = PlacementPlan(
        layer_ids=(2,),  # two dense layers before it, which have replicas and draw too
        num_experts=8,
        num_nodes=4,
        ranks_per_node=2,
        physical_to_logical_map=[[0, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5, 6, 0, 7]],
    )
    served = sglang_serving_slots(plan)[0, :, 0]
    assert served[:2].tolist() == [0, 0]
    assert served[6:].tolist() == [14, 14]
    alone = PlacementPlan.from_dict({**plan.to_dict(), "layer_ids": [0]})
    first = sglang_serving_slots(alone)[0, :, 0]
    draw = random.Random(42)
    dealt = [0, 14] * 2 + draw.sample([0, 14], 0)
    draw.shuffle(dealt)
    assert first[2:6].tolist() == dealt
    assert np.bincount(first)[[0, 14]].tolist() == [4, 4]


@settings(max_examples=20, deadline=None)
@given(plans(uneven=False))
def test_engine_serving_slots_in_turn_are_copies_of_the_expert_one_rank_after_the_other(plan):
    served = engine_serving_slots(plan, "in_turn")
    for row, held in enumerate(plan.logical_to_physical_map.tolist()):
        for expert, slots in enumerate(held):
            slots = [slot for slot in slots if slot >= 0]
            expected = [slots[rank % len(slots)] for rank in range(plan.num_ranks)]
            assert served[row, :, expert].tolist() == expected
    assert (engine_serving_slots(plan, "sglang") == sglang_serving_slots(plan)).all()
