"""relabel() on real process groups: the same function, the same bits back, refusals everywhere."""

import re

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_locality.errors import ConfigError, PlacementError
from moe_locality.layer.relabeling import relabel
from moe_locality.layer.state import current_order
from tests import tolerances
from tests.distributed import relabel_nets as nets
from tests.launch import run_ranks

RTOL, ATOL = tolerances.LOGITS["float32"]


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=ATOL)


def _there_and_back(rank, world, ep_size):
    group = None
    if ep_size not in (1, world):
        groups = [dist.new_group(range(s, s + ep_size)) for s in range(0, world, ep_size)]
        group = groups[rank // ep_size]
    for kind in ("stock", "ours"):
        _there_and_back_with(rank, kind, ep_size, group)


def _there_and_back_with(rank, kind, ep_size, group):
    """Before initialize: A, then B, then linear; each time the same logits, last the same bits."""
    net = nets.build(kind, ep_size, nets.ep_rank_of(rank, ep_size))
    before = nets.weights_of(net)
    identities = [id(p) for p in net.parameters()]
    seen = [before]
    for seed in (1, 2):
        plan = nets.plan_of(ep_size, seed)
        relabel(net, plan, group=group)
        _check_content(net, plan, before, nets.ep_rank_of(rank, ep_size), ep_size)
        seen.append(nets.weights_of(net))
        relabel(net, plan, group=group)  # again: nothing moves
        assert nets.same_bits(seen[-1], nets.weights_of(net))
    assert not nets.same_bits(seen[1], seen[2])
    relabel(net, nets.plan_of(ep_size, None), group=group)
    assert nets.same_bits(nets.weights_of(net), before)
    assert [id(p) for p in net.parameters()] == identities
    assert (current_order(net.moe1) == np.arange(nets.EXPERTS)).all()


def _check_content(net, plan, before, ep_rank, ep_size):
    """Slot s holds expert plan[s], and gate row s names it: checked against the recipe of build."""
    local = nets.EXPERTS // ep_size
    for row, name in enumerate(("moe1", "moe2")):
        order = plan.physical_to_logical_map[row]
        layer = getattr(net, name).deepspeed_moe
        gate = before[f"{name}.deepspeed_moe.gate.wg.weight"]
        assert torch.equal(layer.gate.wg.weight, gate[torch.from_numpy(order.astype(np.int64))])
        for slot, expert in enumerate(layer.experts.deepspeed_experts):
            logical = int(order[ep_rank * local + slot])
            twin = nets.build("stock", nets.EXPERTS, logical)  # its only expert is this one
            twin = getattr(twin, name).deepspeed_moe.experts.deepspeed_experts[0]
            assert nets.same_bits(nets.weights_of(expert), nets.weights_of(twin))


@pytest.mark.parametrize(("world", "ep_size"), [(1, 1), (2, 2), (4, 4), (4, 2)])
def test_other_plan_and_back_is_the_identity_bit_for_bit(world, ep_size):
    run_ranks(_there_and_back, world, ep_size, deepspeed=True)


def _logits(rank, world, kind, ep_size, when):
    net = nets.build(kind, ep_size, nets.ep_rank_of(rank, ep_size))
    plan = nets.plan_of(ep_size, 3)
    reference = nets.engine_of(nets.build("stock", ep_size, nets.ep_rank_of(rank, ep_size)))
    if when == "before":
        relabel(net, plan)
        engine = nets.engine_of(net)
    else:
        engine = nets.engine_of(net)
        relabel(engine, plan)
    expected = nets.logits_of(reference.module, rank)
    close(nets.logits_of(engine.module, rank), expected)
    for name, row in (("moe1", 0), ("moe2", 1)):
        counts = getattr(engine.module, name.replace("moe", "counts"))
        wanted = getattr(reference.module, name.replace("moe", "counts"))
        order = torch.from_numpy(plan.physical_to_logical_map[row].astype(np.int64))
        # a stock layer can only count slots; ours counts logical experts
        assert torch.equal(counts, wanted if kind == "ours" else wanted[order])
    losses = nets.train(engine, range(4), rank)
    np.testing.assert_allclose(losses, nets.train(reference, range(4), rank), rtol=1e-5)
    relabel(engine, nets.plan_of(ep_size, 4))  # in mid-training: moments move along
    losses = nets.train(engine, range(4, 8), rank)
    np.testing.assert_allclose(losses, nets.train(reference, range(4, 8), rank), rtol=1e-5)


def _all_logits(rank, world, ep_size):
    for kind in ("stock", "ours"):
        for when in ("before", "after"):
            _logits(rank, world, kind, ep_size, when)


@pytest.mark.parametrize(
    ("world", "ep_size"), [(1, 1), (2, 2), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_logits_and_training_are_those_of_the_unplaced_model(world, ep_size):
    run_ranks(_all_logits, world, ep_size, deepspeed=True)


def _expert_data_parallel(rank, world):
    """World 4, ep_size 2: the two EP groups move alike, copies stay equal, moments too."""
    engine = nets.engine_of(nets.build("stock", 2, rank % 2))
    nets.train(engine, range(3), rank)
    relabel(engine, nets.plan_of(2, 5))
    experts = [(n, p) for n, p in engine.module.named_parameters() if "deepspeed_experts" in n]
    found = []
    for _, parameter in experts:
        state = engine.optimizer.state[parameter]
        found += [parameter.detach(), state["exp_avg"], state["exp_avg_sq"]]
    everyone = [None] * world
    dist.all_gather_object(everyone, found)
    for r in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(everyone[r], everyone[r + 2], strict=True))
    assert not torch.equal(everyone[0][0], everyone[1][0])
    # a bare model, without its optimizer, on demand
    before = nets.logits_of(engine.module, rank)
    relabel(engine.module, nets.plan_of(2, 6), weights_only=True)
    close(nets.logits_of(engine.module, rank), before)


def test_copies_of_the_ep_group_stay_equal():
    run_ranks(_expert_data_parallel, 4, deepspeed=True)


def _bitwise_routing(rank, world):
    """Our layer, random token selection and dropping: routes are those of the unplaced model."""
    results = []
    for seed in (None, 6):
        net = nets.build("ours", world, rank, k=1, use_rts=True, drop_tokens=True)
        relabel(net, nets.plan_of(world, seed))
        engine = nets.engine_of(net)
        engine.train()
        routes = []
        for name in ("moe1", "moe2"):
            gate = getattr(engine.module, name).deepspeed_moe.gate
            gate.register_forward_hook(lambda m, i, o, to=routes: to.append((o[0], o[3], o[6])))
        torch.manual_seed(rank)
        with torch.no_grad():
            logits = engine(nets.batch(0, rank)[0])
        results.append((logits, routes))
    (expected, plain), (found, placed) = results
    assert torch.equal(found, expected)
    for (l1, ids1, counts1), (l2, ids2, counts2) in zip(plain, placed, strict=True):
        assert torch.equal(l1, l2)
        assert torch.equal(ids1, ids2)
        assert torch.equal(counts1, counts2)
    assert any((ids < 0).any() for _, ids, _ in plain)  # something was dropped


@pytest.mark.parametrize("world", [1, 2])
def test_routing_of_our_layer_is_bitwise_that_of_the_unplaced_model(world):
    run_ranks(_bitwise_routing, world, deepspeed=True)


def _refused(rank, world, cases):
    return [_refused_one(rank, world, case) for case in cases]


def _refused_one(rank, world, case):
    ep_size = world
    if case == "other plan on one rank":
        model, plan = nets.build("stock", ep_size, rank), nets.plan_of(ep_size, 1 + (rank == 1))
    elif case == "one rank has a plan that does not fit":
        layers = 3 if rank == 1 else 2
        model = nets.build("stock", ep_size, rank)
        plan = nets.plan_of(ep_size, 1, layers)
    elif case == "other ranks":
        model, plan = nets.build("stock", ep_size, rank), nets.plan_of(1, 1)
    elif case.startswith("round robin"):
        zero = {"stage": 2, "round_robin_gradients": True}
        model = nets.engine_of(nets.build("stock", ep_size, rank), zero_optimization=zero)
        plan = nets.plan_of(ep_size, 1)
    elif case == "module of an engine":
        model = nets.engine_of(nets.build("stock", ep_size, rank)).module
        plan = nets.plan_of(ep_size, 1)
    elif case.startswith("gradients"):
        zero, precision = int(case[-1]), "bf16" if case.startswith("gradients bf16") else "fp32"
        accumulate = {"data_types": {"grad_accum_dtype": "fp32"}} if precision == "bf16" else {}
        model = nets.engine_of(nets.build("stock", ep_size, rank), zero, precision, **accumulate)
        plan = nets.plan_of(ep_size, 1)
        dtype = next(model.module.parameters()).dtype
        engine_loss = model(nets.batch(0, rank)[0].to(dtype)).float().sum()
        if rank == 1:
            model.backward(engine_loss)
        else:
            model.backward(engine_loss * 0)
    elif case in ("no group", "wrong group"):
        model, plan = nets.build("stock", 2, rank % 2), nets.plan_of(2, 1)
    before = nets.weights_of(model)
    try:
        relabel(model, plan, group=dist.group.WORLD if case == "wrong group" else None)
    except (ConfigError, PlacementError) as error:
        assert nets.same_bits(nets.weights_of(model), before)
        return type(error).__name__, str(error)
    return "moved", ""


REFUSALS = [
    ("one rank has a plan that does not fit", 2, "PlacementError", "MoE layers: found 3"),
    ("other ranks", 2, "PlacementError", "expert-parallel ranks: found 1"),
    ("round robin", 2, "ConfigError", "not supported with round_robin_gradients"),
    ("module of an engine", 2, "ConfigError", r"relabel\(engine, plan\)"),
    ("gradients at stage 0", 2, "ConfigError", "found a gradient"),
    ("gradients at stage 1", 2, "ConfigError", "found a gradient"),
    ("gradients at stage 2", 2, "ConfigError", "found a gradient"),
    ("gradients bf16 at stage 1", 2, "ConfigError", "found a gradient"),
    ("wrong group", 4, "ConfigError", "group of 4 ranks, expected ep_size 2"),
    ("no group", 4, "ConfigError", "found no expert-parallel group 'ep_size_2'"),
    ("other plan on one rank", 4, "PlacementError", r"\[1\] differ from ranks \[0, 2, 3\]"),
]


@pytest.mark.parametrize("world", [2, 4])
def test_refusals_reach_every_rank_and_move_nothing(world):
    rows = [row for row in REFUSALS if row[1] == world]
    cases = [row[0] for row in rows]
    for per_rank in run_ranks(_refused, world, cases, deepspeed=True, timeout_s=60):
        for (case, _, kind, text), (found, message) in zip(rows, per_rank, strict=True):
            assert found == kind, (case, message)
            assert re.search(text, message), (case, message)


def test_plans_with_replicas_are_refused():
    from moe_locality.placement import PlacementPlan

    rows = [[*range(8), 0, 1]] * 2
    plan = PlacementPlan(
        layer_ids=(0, 1),
        num_experts=8,
        num_nodes=1,
        ranks_per_node=2,
        physical_to_logical_map=rows,
    )
    with pytest.raises(PlacementError, match=r"2 replicas.*moe_locality.initialize"):
        relabel(nets.build("stock", 1), plan)
