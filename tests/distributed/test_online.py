"""Online placement: experts move when the routing has drifted and the move pays, else they stay."""

import numpy as np
import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

import moe_locality
from moe_locality.errors import ConfigError
from moe_locality.layer.convert import after_each_step
from moe_locality.layer.state import current_order
from tests.distributed import relabel_nets as nets
from tests.launch import run_ranks

WORLD = 4
NEAR = [(0, 1), (2, 3), (4, 5), (6, 7)]  # pairs on one node of the linear placement
FAR = [(0, 4), (1, 5), (2, 6), (3, 7)]


def net_of(rank, ep_size):
    """Input dimension j picks pair j of NEAR, dimension 4 + j pair j of FAR, in both layers."""
    net = nets.build("stock", ep_size, rank % ep_size)
    with torch.no_grad():
        net.first.weight.copy_(torch.eye(nets.WIDTH))
        net.first.bias.zero_()
        for moe in (net.moe1, net.moe2):
            gate = moe.deepspeed_moe.gate.wg.weight.zero_()
            for column, pair in enumerate(NEAR + FAR):
                for expert in pair:
                    gate[expert, column] = 10
            for expert in moe.deepspeed_moe.experts.deepspeed_experts:
                expert[2].weight.mul_(1e-3)
                expert[2].bias.zero_()
    return net


def engine_of(rank, online, zero=1, ep_size=WORLD):
    cluster = {"num_nodes": 2, "ranks_per_node": WORLD // 2}
    config = nets.config_of(zero) | {"moe_locality": {"cluster": cluster, "online": online}}
    config["optimizer"]["params"]["lr"] = 1e-5  # routing follows the inputs alone
    net = net_of(rank, ep_size)
    engine, *_ = moe_locality.initialize(
        model=net, model_parameters=list(net.parameters()), config=config
    )
    return engine


def train(engine, steps, rank, first_column):
    losses = []
    engine.train()
    for step in steps:
        generator = torch.Generator().manual_seed(100 * step + rank)
        column = first_column + torch.randint(4, (4, 24), generator=generator)
        x = torch.nn.functional.one_hot(column, nets.WIDTH).float()
        loss = engine(x).square().mean() + 0.01 * engine.module.l_aux
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def orders(engine):
    return np.stack([current_order(m) for m in (engine.module.moe1, engine.module.moe2)])


def _follows(rank, world):
    options = {"every_n_steps": 4, "move_budget": 1.0, "max_imbalance": 1.5}
    options |= {"half_life_tokens": 500.0}
    patient = engine_of(rank, options | {"pays_within_steps": 10**6})
    hasty = engine_of(rank, options | {"pays_within_steps": 1})
    plain = engine_of(rank, "auto")
    assert plain.moe_locality.online is None
    linear = orders(plain)
    losses = {}
    for name, engine in (("patient", patient), ("hasty", hasty), ("plain", plain)):
        losses[name] = train(engine, range(8), rank, 0)
        assert (orders(engine) == linear).all()  # no drift, nothing moves
        losses[name] += train(engine, range(8, 20), rank, 4)
    for name in ("patient", "hasty"):
        np.testing.assert_allclose(losses[name], losses["plain"], rtol=1e-4, err_msg=name)
    seen = {
        name: [
            (d.relocated, d.drift, d.reason, d.moved_slots) for d in e.moe_locality.online.decisions
        ]
        for name, e in (("patient", patient), ("hasty", hasty))
    }
    report = next(d.report for d in patient.moe_locality.online.decisions if d.relocated)
    assert report.num_experts_moved > 0
    assert (orders(hasty) == linear).all()
    node_of = np.argsort(orders(patient), axis=1) // 4
    assert all((row[a] == row[b]) for row in node_of for a, b in FAR)  # each pair on one node
    return seen


def test_experts_follow_routing_that_drifts_and_stay_where_it_does_not_pay():
    per_rank = run_ranks(_follows, WORLD, deepspeed=True)
    assert all(seen == per_rank[0] for seen in per_rank)
    patient, hasty = per_rank[0]["patient"], per_rank[0]["hasty"]
    assert len(patient) == len(hasty) == 5
    assert [relocated for relocated, *_ in patient[:2]] == [False, False]
    assert "no swap within the budget lowers the copies" in patient[1][2]
    assert any(relocated for relocated, *_ in patient[2:])
    assert not patient[-1][0]  # it has settled
    assert not any(relocated for relocated, *_ in hasty)
    assert "and 1 are planned" in hasty[-1][2]


def _refused(rank, world):
    for ep_size in (1, 2):
        with pytest.raises(ConfigError, match=f"found experts spread over ep_size {ep_size} of 4"):
            engine_of(rank, {"every_n_steps": 4}, ep_size=ep_size)


def test_smaller_expert_parallel_groups_are_refused():
    run_ranks(_refused, WORLD, deepspeed=True)


def _both(rank, world, folder, managed):
    """Online and recorder on; micro-batches of two make a step."""
    section = {
        "cluster": {"num_nodes": 2, "ranks_per_node": WORLD // 2},
        "online": {"every_n_steps": 2},
        "trace": {"path": folder},
    }
    config = nets.config_of(
        gradient_accumulation_steps=2,
        managed_gradient_accumulation=managed,
        moe_locality=section,
    )
    net = net_of(rank, WORLD)
    stock_step, stock_destroy = DeepSpeedEngine.step, DeepSpeedEngine.destroy
    engine, *_ = moe_locality.initialize(
        model=net, model_parameters=list(net.parameters()), config=config
    )
    for wrapped, stock in ((engine.step, stock_step), (engine.destroy, stock_destroy)):
        assert wrapped.__wrapped__.__func__ is stock  # one wrapper around DeepSpeed's own
    online, recorder = engine.moe_locality.online, engine.moe_locality.recorder
    calls = []
    after_each_step(engine, lambda: calls.append((online._steps, recorder._assembler.step)))
    if managed:
        train(engine, range(8), rank, 0)
    else:  # a call of step ends an accumulation
        for step in range(4):
            for part in (0, 1):
                engine.backward(engine(nets.batch(2 * step + part, rank)[0]).square().mean())
            engine.step()
    assert [decision.step for decision in online.decisions] == [2, 4]
    engine.destroy()
    return calls


@pytest.mark.parametrize("managed", [True, False])
def test_online_and_recorder_share_one_wrapper_of_the_engine(tmp_path, managed):
    """step and destroy were wrapped once for each of them; with the accumulation in the [B4]
    caller's hands neither saw any step. One wrapper calls all, in order, once per optimizer
    step.
    """
    per_rank = run_ranks(_both, WORLD, str(tmp_path), managed, deepspeed=True)
    for calls in per_rank:
        assert [online for online, _ in calls] == [1, 2, 3, 4]
        assert np.diff([recorded for _, recorded in calls]).tolist() == [1, 1, 1]
