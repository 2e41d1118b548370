"""Offline baking: equal to a live relabel file by file, composed, refused where it cannot be exact.

The checkpoints are real ones: two ranks of DeepSpeed write them once for this module.
"""

import collections
import shutil

import numpy as np
import pytest
import torch

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer.bake import _refuse_tied, bake_checkpoint
from moe_locality.layer.checkpoint import wrap_checkpoints
from moe_locality.layer.relabeling import relabel
from moe_locality.placement import PlacementPlan
from tests import tolerances
from tests.distributed import relabel_nets as nets
from tests.launch import run_ranks

RANKS, SEED = 2, 7
DENSE = "mp_rank_00_model_states.pt"
EXPERT_0 = "layer_0_expert_0_mp_rank_00_model_states.pt"


def _write(rank, world, folder):
    """Stage 0 with and without our entry, the same relabelled live, ZeRO 2, bf16."""
    engine = nets.engine_of(nets.build("stock", world, rank))
    nets.train(engine, range(2), rank)
    engine.save_checkpoint(f"{folder}/stock", tag="t")
    wrap_checkpoints(engine)
    engine.save_checkpoint(f"{folder}/plain", tag="t", client_state={"epoch": np.float64(2)})
    logits = nets.logits_of(engine.module, rank)
    relabel(engine, nets.plan_of(world, SEED))
    engine.save_checkpoint(f"{folder}/live", tag="t", client_state={"epoch": np.float64(2)})
    losses = nets.train(engine, range(2, 5), rank)
    for name, options in (("zero2", {"zero": 2}), ("bf16", {"precision": "bf16"})):
        other = nets.engine_of(nets.build("stock", world, rank), **options)
        nets.train(other, range(1), rank)
        wrap_checkpoints(other)
        other.save_checkpoint(f"{folder}/{name}", tag="t")
    return logits.numpy(), losses  # a tensor would travel as a file of a process that is gone


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return folder, run_ranks(_write, RANKS, str(folder), deepspeed=True)


def read(path):
    return torch.load(path, map_location="cpu", weights_only=False)


def same(left, right):
    """Bitwise equality of nested states."""
    if torch.is_tensor(left):
        return torch.is_tensor(right) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, collections.abc.Mapping):
        return list(left) == list(right) and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def assert_same_files(left, right, ignore=()):
    names = sorted(p.name for p in left.iterdir())
    assert names == sorted(p.name for p in right.iterdir())
    for name in names:
        a, b = read(left / name), read(right / name)
        if name == DENSE:
            for key in ignore:
                a.pop(key, None), b.pop(key, None)
            assert list(a) == list(b)
        assert same(a, b), name


def plan(seed):
    return nets.plan_of(RANKS, seed)


def test_bake_checkpoint_baked_is_what_a_live_relabel_saves(made, tmp_path):
    folder, _ = made
    summary = bake_checkpoint(folder / "plain", plan(SEED), tmp_path / "out")
    assert summary["optimizer"] == "baked"
    assert summary["left_out"] == []
    assert (tmp_path / "out" / "latest").read_text() == "t"
    assert_same_files(tmp_path / "out" / "t", folder / "live" / "t")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    order = plan(SEED).physical_to_logical_map
    slots = np.arange(nets.EXPERTS)
    assert summary["experts_moved_per_layer"] == (order != slots).sum(1).tolist()
    assert summary["experts_changing_rank_per_layer"] == (order // 4 != slots // 4).sum(1).tolist()


def test_bake_checkpoint_plans_compose_and_linear_is_the_identity(made, tmp_path):
    folder, _ = made
    bake_checkpoint(folder / "plain", plan(1), tmp_path / "a")
    bake_checkpoint(tmp_path / "a", plan(2), tmp_path / "ab")
    bake_checkpoint(folder / "plain", plan(2), tmp_path / "b")
    assert_same_files(tmp_path / "ab" / "t", tmp_path / "b" / "t")
    bake_checkpoint(tmp_path / "ab", plan(None), tmp_path / "back", tag="t")
    assert_same_files(tmp_path / "back" / "t", folder / "plain" / "t", ignore=["moe_locality"])
    assert not same(read(tmp_path / "ab" / "t" / EXPERT_0), read(folder / "plain" / "t" / EXPERT_0))


def _resume(rank, world, folder):
    engine = nets.engine_of(nets.build("stock", world, rank))
    engine.load_checkpoint(folder)
    logits = nets.logits_of(engine.module, rank).numpy()
    return logits, nets.train(engine, range(2, 5), rank)


def test_bake_checkpoint_a_stock_engine_goes_on_from_a_baked_checkpoint(made, tmp_path):
    folder, expected = made
    bake_checkpoint(folder / "plain", plan(3), tmp_path / "out")
    found = run_ranks(_resume, RANKS, str(tmp_path / "out"), deepspeed=True)
    for (logits, losses), (wanted_logits, wanted_losses) in zip(found, expected, strict=True):
        rtol, atol = tolerances.LOGITS["float32"]
        np.testing.assert_allclose(logits, wanted_logits, rtol=rtol, atol=atol)
        np.testing.assert_allclose(losses, wanted_losses, *tolerances.LOSS["float32"])


def test_bake_checkpoint_without_names_the_optimizer_is_left_out_or_trusted(made, tmp_path, caplog):
    folder, _ = made
    summary = bake_checkpoint(folder / "stock", plan(SEED), tmp_path / "out")
    assert "does not name the optimizer's parameters" in summary["optimizer"]
    assert summary["left_out"] == [f"expp_rank_{r}_mp_rank_00_optim_states.pt" for r in (0, 1)]
    assert not list((tmp_path / "out" / "t").glob("*optim*"))
    assert read(tmp_path / "out" / "t" / DENSE)["optimizer"] is None
    assert "left out" in caplog.text
    trusted = bake_checkpoint(
        folder / "stock", plan(SEED), tmp_path / "trusted", trust_parameter_order=True
    )
    assert trusted["optimizer"] == "baked"
    ignore = ["moe_locality", "epoch"]
    assert_same_files(tmp_path / "trusted" / "t", folder / "live" / "t", ignore=ignore)


def _load_without_optimizer(rank, world, folder, options):
    engine = nets.engine_of(nets.build("ours", world, rank), **options)
    wrap_checkpoints(engine)
    with pytest.raises(ConfigError, match="baked without optimizer state"):
        engine.load_checkpoint(folder)
    engine.load_checkpoint(folder, load_module_only=True)
    return nets.logits_of(engine.module, rank).numpy()


@pytest.mark.parametrize("name", ["zero2", "bf16"])
def test_bake_checkpoint_state_that_belongs_to_slots_is_left_out(made, tmp_path, name):
    folder, _ = made
    summary = bake_checkpoint(folder / name, plan(SEED), tmp_path / "out")
    assert summary["optimizer"].startswith("left out: found ")
    assert "load_module_only=True" in summary["optimizer"]
    assert not list((tmp_path / "out" / "t").glob("*optim*"))
    options = {"zero": 2} if name == "zero2" else {"precision": "bf16"}
    found = run_ranks(
        _load_without_optimizer, RANKS, str(tmp_path / "out"), options, deepspeed=True
    )
    before = run_ranks(_module_only, RANKS, str(folder / name), options, deepspeed=True)
    rtol, atol = tolerances.LOGITS["float32" if name == "zero2" else "bfloat16"]
    for logits, expected in zip(found, before, strict=True):
        np.testing.assert_allclose(logits, expected, rtol=rtol, atol=atol)
    again = bake_checkpoint(tmp_path / "out", plan(None), tmp_path / "back")
    assert again["optimizer"] == "left out: an earlier bake left it out"


def _module_only(rank, world, folder, options):
    # our layer here too: in bf16 the order of DeepSpeed's sums can turn a token to another expert
    engine = nets.engine_of(nets.build("ours", world, rank), **options)
    engine.load_checkpoint(folder, load_module_only=True)
    return nets.logits_of(engine.module, rank).numpy()


@pytest.fixture
def copied(made, tmp_path):
    folder, _ = made
    shutil.copytree(folder / "plain", tmp_path / "in")
    return tmp_path / "in"


class Payload:
    def __reduce__(self):
        return (print, ("code ran",))


BROKEN = {
    "no latest": (lambda c: (c / "latest").unlink(), "cannot read .*latest"),
    "tag gone": (lambda c: (c / "latest").write_text("u"), "expected the tag"),
    "expert gone": (
        lambda c: (c / "t" / "layer_1_expert_3_mp_rank_00_model_states.pt").unlink(),
        "1 files missing, the first layer_1_expert_3",
    ),
    "dense gone": (lambda c: (c / "t" / DENSE).unlink(), "the first mp_rank_00_model_states.pt"),
    "not MoE": (
        lambda c: [p.unlink() for p in (c / "t").glob("layer_*")],
        "found no expert files.*only MoE checkpoints can be baked",
    ),
    "damaged expert": (
        lambda c: (c / "t" / "layer_1_expert_7_mp_rank_00_model_states.pt").write_bytes(b"x" * 9),
        "layer_1_expert_7",
    ),
    "pickled code": (
        lambda c: torch.save({**read(c / "t" / DENSE), "args": Payload()}, c / "t" / DENSE),
        "found a pickled .*print, expected tensors and plain types",
    ),
    "no router": (
        lambda c: torch.save({**read(c / "t" / DENSE), "module": {}}, c / "t" / DENSE),
        "found no router below moe1, expected that of MoE layer 0",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bake_checkpoint_broken_checkpoints_are_refused_and_nothing_is_left(
    copied, tmp_path, case, capsys
):
    damage, text = BROKEN[case]
    damage(copied)
    with pytest.raises(ConfigError, match=text):
        bake_checkpoint(copied, plan(1), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [copied]
    assert "code ran" not in capsys.readouterr().out


def test_bake_checkpoint_a_trusted_checkpoint_may_hold_objects(copied, tmp_path, capsys):
    torch.save({**read(copied / "t" / DENSE), "args": Payload()}, copied / "t" / DENSE)
    bake_checkpoint(copied, plan(1), tmp_path / "out", trust_checkpoint=True)
    assert "code ran" in capsys.readouterr().out


def test_bake_checkpoint_plans_and_places_that_do_not_fit(copied, tmp_path):
    with pytest.raises(PlacementError, match="MoE layers: found 3 in the plan, expected 2"):
        bake_checkpoint(copied, nets.plan_of(RANKS, 1, layers=3), tmp_path / "out")
    replicas = PlacementPlan(
        layer_ids=(0, 1),
        num_experts=8,
        num_nodes=1,
        ranks_per_node=2,
        physical_to_logical_map=[[*range(8), 0, 1]] * 2,
    )
    with pytest.raises(PlacementError, match="2 replicas"):
        bake_checkpoint(copied, replicas, tmp_path / "out")
    with pytest.raises(ConfigError, match="in use, expected a new or empty folder"):
        bake_checkpoint(copied, plan(1), copied)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*nothing was left"):
        bake_checkpoint(copied, plan(1), tmp_path / "file" / "out")
    (tmp_path / "empty").mkdir()
    bake_checkpoint(copied, plan(1), tmp_path / "empty")  # an empty folder is fine
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "in"]


def test_bake_checkpoint_other_files_are_copied_and_offloaded_state_is_not(copied, tmp_path):
    (copied / "t" / "notes.txt").write_text("kept")
    swapped = copied / "t" / "offloaded_tensors" / "rank00" / "0.tensor.swp"
    swapped.parent.mkdir(parents=True)
    swapped.write_bytes(b"moments")
    summary = bake_checkpoint(copied, plan(1), tmp_path / "out")
    assert summary["copied"] == ["notes.txt"]
    assert "0.tensor.swp" in summary["left_out"]
    assert "0.tensor.swp" in summary["optimizer"]
    assert (tmp_path / "out" / "t" / "notes.txt").read_text() == "kept"
    assert not (tmp_path / "out" / "t" / "offloaded_tensors").exists()


def test_tied_tensors_differ_by_one_number_or_are_the_same():
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    other = values.clone()
    other[1001] += 1
    tied = ({}, [np.array([0, 1]), np.array([1, 0]), np.array([0, 1])])
    _refuse_tied(*tied, 0, {"a": values})
    _refuse_tied(*tied, 1, {"b": other})
    _refuse_tied(*tied, 2, {"c": values.clone()})  # the same order
    _refuse_tied(*tied, 1, {"d": torch.ones(9)})
    _refuse_tied(*tied, 0, {"e": torch.ones(9)})  # one value: fresh biases are alike everywhere
    with pytest.raises(
        PlacementError, match=r"same values in f \(MoE layer 1\) and a \(MoE layer 0"
    ):
        _refuse_tied(*tied, 1, {"f": values.clone()})
