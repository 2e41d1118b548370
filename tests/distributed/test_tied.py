"""Layers that share router or experts: a plan never moves one tensor for two layers."""

import dataclasses

import numpy as np
import pytest
import torch

import moe_locality
from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer.bake import bake_checkpoint
from moe_locality.layer.checkpoint import wrap_checkpoints
from moe_locality.layer.relabeling import relabel
from tests import tolerances
from tests.distributed import relabel_nets as nets
from tests.launch import run_ranks

RANKS, SHARED = 2, "found tensors that several places share"
CLOSE = tolerances.LOSS["float32"]


def tie(net, what):
    """Make ``moe2`` (or a dense parameter) share with ``moe1``."""
    one, two = net.moe1.deepspeed_moe, net.moe2.deepspeed_moe
    if what == "experts":
        two.experts = one.experts
    elif what == "router":
        two.gate.wg = one.gate.wg
    elif what == "one parameter":
        two.experts.deepspeed_experts[1][0].weight = one.experts.deepspeed_experts[1][0].weight
    elif what == "inside":
        one.experts.deepspeed_experts[1][0].weight = one.experts.deepspeed_experts[0][0].weight
    else:
        net.dense = one.experts.deepspeed_experts[0][0].weight
    return net


TIES = ("experts", "router", "one parameter", "inside", "dense")


def tied(what, rank, kind="stock"):
    return tie(nets.build(kind, RANKS, rank), what)


def same_for_both(seed):
    rows = nets.plan_of(RANKS, seed).physical_to_logical_map
    plan = nets.plan_of(RANKS, None)
    return dataclasses.replace(plan, physical_to_logical_map=rows[[0, 0]])


PLANS = (nets.plan_of(RANKS, 3), same_for_both(3))


def ds_config(zero, **section):
    return nets.config_of(zero) | {"moe_locality": section}


def start(net, config):
    engine, *_ = moe_locality.initialize(
        model=net, model_parameters=list(net.parameters()), config=config
    )
    return engine


def _refused(rank, world, folder):
    for number, what in enumerate(TIES):
        zero, plan = number % 2, PLANS[number % 2]
        expected = nets.train(nets.engine_of(tied(what, rank), zero), range(4), rank)
        net = tied(what, rank)
        before = nets.weights_of(net)
        with pytest.raises(PlacementError, match=SHARED):
            relabel(net, plan)
        relabel(net, nets.plan_of(RANKS, None))  # nothing moves
        assert nets.same_bits(nets.weights_of(net), before)
        engine = nets.engine_of(net, zero)
        losses = nets.train(engine, range(2), rank)
        with pytest.raises(PlacementError, match=SHARED):
            relabel(engine, plan)
        assert losses + nets.train(engine, range(2, 4), rank) == expected, what
        with pytest.raises(PlacementError, match=SHARED):
            start(tied(what, rank), ds_config(zero, plan=f"{folder}/{zero}.json"))
        engine = start(tied(what, rank), ds_config(zero, plan=f"{folder}/none.json"))
        found = nets.train(engine, range(4), rank)
        np.testing.assert_allclose(found, expected, *CLOSE)


def test_no_plan_moves_what_two_places_share(tmp_path):
    """A shared tensor was moved once per layer, and losses changed; now the plan is refused by
    name wherever it enters, and a plan that moves nothing gives the losses of stock [D1]
    """
    for name, plan in (("0", PLANS[0]), ("1", PLANS[1]), ("none", nets.plan_of(RANKS, None))):
        plan.write(tmp_path / f"{name}.json")
    run_ranks(_refused, RANKS, str(tmp_path), deepspeed=True, timeout_s=300)


def _doors(rank, world):
    """Replicas and online placement."""
    replicas = dataclasses.replace(
        nets.plan_of(RANKS, None), physical_to_logical_map=np.array([[*range(8), 0, 1]] * 2)
    )
    for what in TIES:
        net = moe_locality.apply(tied(what, rank))
        with pytest.raises(PlacementError, match=SHARED):
            moe_locality.apply(net, plan=replicas)
        with pytest.raises(ConfigError, match=SHARED):
            start(tied(what, rank), ds_config(1, online={"every_n_steps": 1}))


def test_no_replicas_and_no_online_moves_of_what_two_places_share():
    """Both were accepted, and moved shared experts once per layer; now both are refused [D1]"""
    run_ranks(_doors, RANKS, deepspeed=True)


def _checkpoints(rank, world, folder):
    """A tied model saved, and a file of other orders that an engine with a plan shall not load."""
    engine = nets.engine_of(tied("experts", rank))
    nets.train(engine, range(1), rank)
    wrap_checkpoints(engine)
    engine.save_checkpoint(f"{folder}/tied", tag="t")
    expected = nets.logits_of(engine.module, rank)
    other = nets.engine_of(nets.build("stock", RANKS, rank))
    nets.train(other, range(1), rank)
    wrap_checkpoints(other)
    relabel(other, nets.plan_of(RANKS, 3))
    other.save_checkpoint(f"{folder}/other", tag="t")
    wrap_again = nets.engine_of(tied("experts", rank))
    wrap_checkpoints(wrap_again, plan=nets.plan_of(RANKS, None))
    with pytest.raises(PlacementError, match=SHARED):
        wrap_again.load_checkpoint(f"{folder}/other")
    torch.distributed.barrier()
    return expected.numpy()


def _load(rank, world, folder):
    engine = nets.engine_of(tied("experts", rank))
    wrap_checkpoints(engine)
    engine.load_checkpoint(folder)
    return nets.logits_of(engine.module, rank).numpy()


def test_checkpoints_of_layers_that_share_get_one_order(tmp_path):
    """bake gave shared experts two orders, and the layer that was loaded last won; now only a plan
    with one order for both is baked, and the model computes what it did [D1]
    """
    expected = run_ranks(_checkpoints, RANKS, str(tmp_path), deepspeed=True)
    with pytest.raises(PlacementError, match=r"the same values in moe2.* \(MoE layer 1\)"):
        bake_checkpoint(tmp_path / "tied", nets.plan_of(RANKS, 3), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    bake_checkpoint(tmp_path / "tied", same_for_both(3), tmp_path / "out")
    found = run_ranks(_load, RANKS, str(tmp_path / "out"), deepspeed=True)
    for logits, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(logits, wanted, *tolerances.LOGITS["float32"])


def _save_tied_router(rank, world, folder):
    nets.engine_of(tied("router", rank)).save_checkpoint(folder, tag="t")


def test_a_shared_router_is_baked_with_one_order_only(tmp_path):
    """The rows of a shared router were permuted for each layer; now two orders are refused [D1]"""
    run_ranks(_save_tied_router, RANKS, str(tmp_path / "in"), deepspeed=True)
    with pytest.raises(PlacementError, match=r"moe2\.deepspeed_moe\.gate\.wg\.weight"):
        bake_checkpoint(tmp_path / "in", nets.plan_of(RANKS, 3), tmp_path / "out")
    bake_checkpoint(tmp_path / "in", same_for_both(3), tmp_path / "out")
