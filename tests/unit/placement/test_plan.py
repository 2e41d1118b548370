import contextlib
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.commands.inputs import check_writable
from moe_locality.errors import ConfigError, PlacementError
from moe_locality.placement.plan import PlacementPlan
from tests.unit.placement.cases import plans


def plan_of(rows, *, experts, nodes=2, ranks_per_node=1, **rest):
    rows = np.asarray(rows)
    return PlacementPlan(
        layer_ids=tuple(range(3, 3 + len(rows))),
        num_experts=experts,
        num_nodes=nodes,
        ranks_per_node=ranks_per_node,
        physical_to_logical_map=rows,
        **rest,
    )


def test_linear_is_the_identity_layout():
    plan = PlacementPlan.linear(8, [1, 3], 2, 2, model="m")
    assert plan.physical_to_logical_map.tolist() == [list(range(8))] * 2
    assert plan.is_permutation
    assert (plan.num_ranks, plan.num_slots, plan.slots_per_rank) == (4, 8, 2)
    assert plan.rank_of_slot.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert plan.serving_slot().shape == (2, 4, 8)
    assert (plan.serving_slot() == np.arange(8)).all()


def test_maps_of_a_plan_with_replicas():
    plan = plan_of([[0, 1, 2, 0], [2, 1, 0, 2]], experts=3)
    assert plan.num_redundant_experts == 1
    assert not plan.is_permutation
    assert plan.logical_replica_count.tolist() == [[2, 1, 1], [1, 1, 2]]
    assert plan.logical_to_physical_map.tolist() == [
        [[0, 3], [1, -1], [2, -1]],
        [[2, -1], [1, -1], [0, 3]],
    ]


@settings(max_examples=60, deadline=None)
@given(plans())
def test_maps_are_inverse_to_each_other(plan):
    table, inverse = plan.physical_to_logical_map, plan.logical_to_physical_map
    for row in range(plan.num_layers):
        for expert in range(plan.num_experts):
            slots = np.flatnonzero(table[row] == expert).tolist()
            assert [s for s in inverse[row, expert].tolist() if s >= 0] == slots
            assert plan.logical_replica_count[row, expert] == len(slots)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_serving_slots_are_as_near_as_possible_and_agree_within_a_node(plan):
    served = plan.serving_slot()
    ranks, nodes = plan.rank_of_slot, plan.node_of_rank
    for row in range(plan.num_layers):
        for expert in range(plan.num_experts):
            slots = np.flatnonzero(plan.physical_to_logical_map[row] == expert)
            far_choice = {}
            for home in range(plan.num_ranks):
                slot = served[row, home, expert]
                assert slot in slots
                if home in ranks[slots]:
                    assert ranks[slot] == home
                elif nodes[home] in nodes[ranks[slots]]:
                    assert nodes[ranks[slot]] == nodes[home]
                else:
                    assert far_choice.setdefault(nodes[home], slot) == slot


def test_remote_homes_use_the_least_loaded_replica():
    # expert 0 on nodes 0 and 1; node 0 also holds the heavy expert 2, so node 2 is sent to node 1
    rows = [[0, 2, 0, 1, 3, 4]]
    load = [[10, 1, 50, 1, 1]]
    plan = plan_of(rows, experts=5, nodes=3, expert_load=load)
    assert plan.serving_slot()[0, :, 0].tolist() == [0, 2, 2]
    plan = plan_of(rows, experts=5, nodes=3, expert_load=[[10, 50, 1, 1, 1]])
    assert plan.serving_slot()[0, :, 0].tolist() == [0, 2, 0]


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([[0, 1, 2, 0]], {"experts": 4}, "layer 3: expert 3 has no slot"),
        (
            [[0, 1, 2, 7]],
            {"experts": 4},
            "layer 3: slot 3 holds expert 7; expected ids from 0 to 3",
        ),
        ([[0, 1, 2, 3], [0, 0, 1, 2]], {"experts": 4}, "layer 4: expert 3 has no slot"),
        ([[0, 0, 1, 2]], {"experts": 3}, "layer 3: expert 0 is on rank 0 twice"),
        (
            [[0, 1, 2]],
            {"experts": 3},
            "found 3 slots per layer, expected a multiple of the 2 ranks",
        ),
        ([[0.0, 1.0]], {"experts": 2}, "expected integers"),
        ([[0, 1]], {"experts": 2, "expert_load": [[1, 2, 3]]}, "expert_load: found shape"),
        ([[0, 1]], {"experts": 2, "rank_to_node": (0, 0)}, "rank_to_node"),
        # before a list of the ranks is made, which "num_nodes": 1000000000000 fills the memory with
        ([[0, 1]], {"experts": 2, "nodes": 3, "rank_to_node": (0, 0)}, "found 2 slots per layer"),
        ([[0, 1]], {"experts": 2, "rank_to_node": (0, 0.5)}, "expected a list of integers"),
        ([[0, 1]], {"experts": 2, "nodes": 0}, "num_nodes: found 0"),
        ([[0, 1]], {"experts": 2, "provenance": {"x": object()}}, "provenance.x: found a object"),
        ([[0, 1]], {"experts": 2, "costs": None}, "costs: found None"),
        ([[0, 1]], {"experts": 10**12}, "num_experts: found 1000000000000, expected at most 32767"),
        *(
            ([[0, 1]], {"experts": 2, "home_profiles": {name: value}}, f"found a damaged {name}")
            for name in ("domain_rank_share", "group_rank_share", "predictors", "token_price")
            for value in (5, "x")
        ),
        *(
            ([[0, 1]], {"experts": 2, "home_profiles": {name: value}}, f"found a damaged {name}")
            for name, value in {
                "domain_rank_share": {"a": ["x", 1]},
                "group_rank_share": {"a": [1]},
                "any_rank_share": [[1], [2]],
            }.items()
        ),
    ],
)
def test_an_invalid_plan_is_refused_with_its_place(rows, more, message):
    with pytest.raises(PlacementError) as caught:
        plan_of(rows, **more)
    assert message in str(caught.value)


def test_a_plan_is_immutable():
    plan = PlacementPlan.linear(4, [0], 2, 1)
    with pytest.raises(AttributeError):
        plan.num_nodes = 4  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        plan.physical_to_logical_map[0, 0] = 1


@settings(max_examples=40, deadline=None)
@given(plans())
def test_round_trip_byte_for_byte(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.write(path)
    again = PlacementPlan.read(path)
    assert again == plan
    assert again.digest() == plan.digest()
    assert again.to_json() == path.read_text()


def test_the_file_has_one_line_per_layer_and_no_nan():
    plan = plan_of([[0, 1], [1, 0]], experts=2, costs={"copies": float("nan"), "link": 0.5})
    lines = plan.to_json().splitlines()
    assert "  [0, 1]," in lines
    assert "  [1, 0]" in lines
    assert json.loads(plan.to_json())["costs"] == {"copies": None, "link": 0.5}
    keys = [line.split('"')[1] for line in lines if line.startswith(' "')]
    assert keys == sorted(keys)


def test_digest_ignores_provenance_and_sees_placement():
    plan = plan_of([[0, 1]], experts=2, provenance={"seed": 1})
    assert plan.digest() == plan_of([[0, 1]], experts=2, provenance={"seed": 2}).digest()
    assert plan.digest() != plan_of([[1, 0]], experts=2, provenance={"seed": 1}).digest()


def test_a_failed_write_leaves_the_old_plan_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    plan_of([[0, 1]], experts=2).write(path)
    before = path.read_bytes()

    def full_disk(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ConfigError, match=r"cannot write the plan .*No space left"):
        plan_of([[1, 0]], experts=2).write(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_write_keeps_links_and_refuses_pipes(tmp_path):
    """`place -o /dev/null` made a file of the device, for the whole machine where root ran it."""
    plan, link, pipe = plan_of([[0, 1]], experts=2), tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to("plan.json")
    plan.write(link)
    assert link.is_symlink()
    assert PlacementPlan.read(tmp_path / "plan.json") == plan
    os.mkfifo(pipe)
    with pytest.raises(ConfigError, match="it is a device or a pipe"):
        plan.write(pipe)
    with pytest.raises(ConfigError, match="it is a device or a pipe"):  # before the work
        check_writable(pipe, "plan")
    assert pipe.is_fifo()
    link.unlink()
    link.symlink_to(link)  # a loop
    check_writable(link, "plan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=9), "found format_version 9, expected 1"),
        (lambda d: d.pop("format_version"), "found format_version None"),
        (lambda d: d.update(surprise=1), "found unknown keys ['surprise']"),
        (lambda d: d.pop("num_nodes"), "missing keys ['num_nodes']"),
        (lambda d: d.update(num_experts="four"), "num_experts: found 'four'"),
        (lambda d: d.update(layer_ids=3), "layer_ids: found 3"),
        (lambda d: d.update(physical_to_logical_map=[[0, 1], [0]]), "rows of unequal length"),
        (
            lambda d: d.update(physical_to_logical_map=[[0, 1], [0, 1]]),
            "found 2 rows, expected one",
        ),
        (lambda d: d.update(physical_to_logical_map=None), "physical_to_logical_map: found"),
        (lambda d: d.update(provenance=None), "provenance: found None"),
    ],
)
def test_a_damaged_file_is_refused_and_named(tmp_path, change, message):
    content = PlacementPlan.linear(2, [0], 2, 1).to_dict()
    change(content)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(PlacementError) as caught:
        PlacementPlan.read(path)
    assert message in str(caught.value)
    assert "bad.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x80", '"plan"'])
def test_what_is_no_plan_at_all(tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(PlacementError, match=r"bad\.json"):
        PlacementPlan.read(path)
    with pytest.raises(PlacementError, match=r"cannot read the plan .*No such file"):
        PlacementPlan.read(tmp_path / "absent.json")


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_flipped_bytes_never_give_another_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan = plan_of([[0, 1, 2, 0]], experts=3, expert_load=[[5, 1, 1]])
    raw = bytearray(plan.to_json().encode())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw))
    with contextlib.suppress(PlacementError):  # any other exception fails the test
        PlacementPlan.read(path)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"num_experts": 8}, "experts per layer: found 4 in the plan, expected 8"),
        ({"layer_count": 3}, "MoE layers: found 2 in the plan, expected 3"),
        ({"layer_ids": [0, 2]}, "layer ids: found (0, 1) in the plan, expected (0, 2)"),
        ({"num_ranks": 4}, "expert-parallel ranks: found 2 in the plan, expected 4"),
        ({"model": "other"}, "model: found 'mine' in the plan, expected 'other'"),
    ],
)
def test_check_fits_says_what_differs(wanted, message):
    plan = PlacementPlan.linear(4, [0, 1], 2, 1, model="mine")
    with pytest.raises(PlacementError) as caught:
        plan.check_fits(**wanted)
    assert message in str(caught.value)
    assert "make a plan for this model" in str(caught.value)
    plan.check_fits(num_experts=4, layer_count=2, layer_ids=[0, 1], num_ranks=2, model="mine")
    PlacementPlan.linear(4, [0], 2, 1).check_fits(model="any model is fine")
