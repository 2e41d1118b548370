"""Recorded ids stay logical: with a plan at the start, after a live relabel, on stock layers."""

import numpy as np
import torch

import moe_locality
from moe_locality.layer.checkpoint import wrap_checkpoints
from moe_locality.layer.relabeling import relabel
from moe_locality.layer.state import current_order
from moe_locality.trace import read_trace
from moe_locality.trace.recorder import RoutingRecorder
from tests.distributed import relabel_nets as nets
from tests.launch import run_ranks

WORLD = 2


def _record(model, folder, rank):
    recorder = RoutingRecorder(folder, rank=rank, strict=True, first_request_id=100 * rank)
    recorder.attach(model)
    with torch.no_grad():
        for step in range(3):
            model(nets.batch(step, rank)[0])
    recorder.close()


def _three_ways(rank, world, folder):
    reference = nets.engine_of(nets.build("stock", world, rank))
    _record(reference.module, f"{folder}/unplaced", rank)

    stock = nets.build("stock", world, rank)
    relabel(stock, nets.plan_of(world, 1))
    _record(nets.engine_of(stock).module, f"{folder}/stock", rank)

    path = f"{folder}/plan.json"  # both write it: whole, and the same
    nets.plan_of(world, 1).write(path)
    section = {"plan": path, "cluster": {"num_nodes": 1, "ranks_per_node": world}}
    config = nets.config_of() | {"moe_locality": section}
    net = nets.build("stock", world, rank)
    engine, *_ = moe_locality.initialize(
        model=net, model_parameters=list(net.parameters()), config=config
    )
    assert (
        current_order(net.moe1).tolist()
        == nets.plan_of(world, 1).to_dict()["physical_to_logical_map"][0]
    )
    _record(engine.module, f"{folder}/ours", rank)

    # live: another plan, which the engine then follows; a checkpoint of it loads into the first
    wrap_checkpoints(engine)
    engine.save_checkpoint(f"{folder}/checkpoint", tag="first")
    relabel(engine, nets.plan_of(world, 2))
    assert engine.moe_locality.plan == nets.plan_of(world, 2)
    _record(engine.module, f"{folder}/relabelled", rank)
    engine.load_checkpoint(f"{folder}/checkpoint", tag="first")
    assert (
        current_order(net.moe2).tolist()
        == nets.plan_of(world, 2).to_dict()["physical_to_logical_map"][1]
    )
    _record(engine.module, f"{folder}/loaded", rank)


def test_traces_name_logical_experts(tmp_path):
    run_ranks(_three_ways, WORLD, str(tmp_path), deepspeed=True)
    expected = read_trace(tmp_path / "unplaced")
    assert expected.num_tokens == WORLD * 3 * 24
    assert len(np.unique(expected.expert_ids)) > 4
    for name in ("stock", "ours", "relabelled", "loaded"):
        found = read_trace(tmp_path / name)
        assert (found.request_id == expected.request_id).all()
        assert (found.expert_ids == expected.expert_ids).all(), name
