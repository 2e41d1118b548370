"""Layers with replicas against one process without: results, gradients, and what is sent."""

import numpy as np
import pytest
import torch

from moe_locality.dispatch import traffic_report
from moe_locality.placement import evaluate
from moe_locality.topology import ClusterTopology
from moe_locality.trace.schema import RoutingTrace
from tests.distributed import replica_nets as nets
from tests.distributed.moe_cases import quiet
from tests.launch import run_ranks
from tests.tolerances import LAYER


def reference(world, dtype, train):
    """One process, one slot per expert, the tokens of all ranks."""
    layer = nets.layer_of(1, 0, dtype).train(train)
    x = torch.cat([nets.tokens_of(rank, dtype) for rank in range(world)], 1).requires_grad_()
    output = layer(x)[0]
    output.float().square().sum().backward()
    experts = [
        [p.grad for p in expert.parameters()]
        for expert in layer.deepspeed_moe.experts.deepspeed_experts
    ]
    return output.detach(), x.grad, layer.deepspeed_moe.gate.wg.weight.grad, experts


def placed_layer(rank, world, plan, topology, exchange, dtype, **options):
    from moe_locality import apply

    layer = nets.layer_of(world, rank, dtype, **options)
    section = {"dispatch": {"exchange": exchange}}
    apply(layer, section, plan=plan, topology=topology)
    layer.set_deepspeed_parallelism()
    return layer


def prepare(world, nodes):
    from moe_locality.topology.groups import prepare_groups

    quiet()
    topology = ClusterTopology.uniform(num_nodes=nodes, ranks_per_node=world // nodes)
    prepare_groups(topology, {world})
    return topology


def equal_reference(rank, world, nodes, dtypes, modes):
    topology = prepare(world, nodes)
    plan = nets.plan_of(world, nodes, layers=1)
    assert plan.num_redundant_experts == world
    for dtype_name in dtypes:
        dtype = getattr(torch, dtype_name)
        bounds = dict(zip(("rtol", "atol"), LAYER[dtype_name], strict=True))
        for train in modes:
            wanted, grad_x, grad_gate, grad_experts = reference(world, dtype, train)
            counts = [nets.tokens_of(r, dtype).shape[1] for r in range(world)]
            mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
            for exchange in ("flat", "hierarchical"):
                layer = placed_layer(rank, world, plan, topology, exchange, dtype).train(train)
                x = nets.tokens_of(rank, dtype).requires_grad_()
                output = layer(x)[0]
                output.float().square().sum().backward()
                torch.testing.assert_close(output, wanted[:, mine], **bounds)
                torch.testing.assert_close(x.grad, grad_x[:, mine], **bounds)
                gate = layer.deepspeed_moe.gate.wg.weight.grad.float()
                torch.distributed.all_reduce(gate)
                # a sum of differences of rounded products: judged by its length
                error = (gate - grad_gate.float()).norm() / grad_gate.float().norm()
                assert error < bounds["rtol"], (exchange, dtype_name, train, error)
                check_experts(layer, grad_experts, bounds)


def check_experts(layer, grad_experts, bounds):
    replicas = layer.deepspeed_moe.replicas
    experts = layer.deepspeed_moe.experts.deepspeed_experts
    held = zip(experts, replicas.local_experts, strict=True)
    mine = {}
    for module, logical in held:
        for parameter, expected in zip(module.parameters(), grad_experts[logical], strict=True):
            torch.testing.assert_close(parameter.grad, expected, **bounds)
        mine[int(logical)] = [p.grad.float().numpy() for p in module.parameters()]
    everyone = [None] * replicas.num_ranks
    torch.distributed.all_gather_object(everyone, mine)
    seen = {}
    for held in everyone:  # replicas have the same bits
        for logical, grads in held.items():
            for one, other in zip(seen.setdefault(logical, grads), grads, strict=True):
                assert np.array_equal(one, other)


@pytest.mark.parametrize(("world", "nodes"), [(2, 1), (2, 2), (4, 2)])
def test_outputs_and_gradients_are_those_of_one_process(world, nodes):
    both = ("float32", "bfloat16")
    run_ranks(equal_reference, world, nodes, both, (True, False), deepspeed=True)


def test_outputs_and_gradients_on_four_nodes():
    run_ranks(equal_reference, 8, 4, ("float32",), (True,), deepspeed=True, timeout_s=240)


def sends_what_is_predicted(rank, world, nodes):
    topology = prepare(world, nodes)
    plan = nets.plan_of(world, nodes, layers=1, seed=3)
    report, ids = {}, None
    for exchange in ("flat", "hierarchical"):
        layer = placed_layer(rank, world, plan, topology, exchange, torch.float32)
        x = nets.tokens_of(rank, torch.float32)
        gate = layer.deepspeed_moe.gate
        ids = gate(x[0], None, True, padded=False)[3].t().numpy()
        layer(x)
        report[exchange] = traffic_report(layer, topology)
    everyone = [None] * world
    torch.distributed.all_gather_object(everyone, ids)
    return report, everyone


@pytest.mark.parametrize("nodes", [2])
def test_rows_sent_are_those_that_evaluate_predicts(nodes):
    world = 4
    report, ids = run_ranks(sends_what_is_predicted, world, nodes, deepspeed=True)[0]
    plan = nets.plan_of(world, nodes, layers=1, seed=3)
    ranks = np.repeat(np.arange(world), [len(rows) for rows in ids]).astype(np.int32)
    tokens = len(ranks)
    trace = RoutingTrace(
        model="",
        num_experts=nets.EXPERTS,
        layer_ids=np.arange(1, dtype=np.int32),
        domain=(),
        expert_ids=np.concatenate(ids)[:, None].astype(np.int16),
        request_id=np.arange(tokens),
        position=np.zeros(tokens, dtype=np.int32),
        stage=np.zeros(tokens, dtype=np.uint8),
        domain_id=np.full(tokens, -1, dtype=np.int32),
        rank=ranks,
    )
    costs = evaluate(trace, plan, homes="trace")
    expected = {"flat": costs.total_picks, "hierarchical": costs.total_copies}
    for exchange, rows in expected.items():
        sent = report[exchange]
        for kind in ("dispatch", "combine"):
            assert sent["rows_by_link"][kind]["cross_node"] == rows, (exchange, kind)
            assert sent["by_link"][kind]["cross_node"] == rows * nets.WIDTH * 4
    assert 0 < expected["hierarchical"] < expected["flat"]


def evaluates_bitwise(rank, world):
    topology = prepare(world, 1)
    plain = nets.layer_of(world, rank, torch.float32, nets.Scale()).eval()
    plain.set_deepspeed_parallelism()
    for seed in range(2):
        plan = nets.plan_of(world, layers=1, seed=seed, extra_per_rank=2)
        placed = placed_layer(
            rank, world, plan, topology, "flat", torch.float32, expert=nets.Scale()
        ).eval()
        served = placed.deepspeed_moe.gate.slot_ids(torch.arange(nets.EXPERTS))
        assert served.tolist() == plan.serving_slot()[0, rank].tolist()
        with torch.no_grad():
            x = nets.tokens_of(rank, torch.float32)
            found, expected = placed(x), plain(x)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def test_inference_is_that_without_replicas_bit_for_bit():
    run_ranks(evaluates_bitwise, 4, deepspeed=True)


def checkpointed_backward(rank, world):
    from torch.utils.checkpoint import checkpoint

    topology = prepare(world, 2)
    plan = nets.plan_of(world, 2, layers=1)
    gradients = {}
    for how in ("plain", "reentrant", "not reentrant"):
        layer = placed_layer(rank, world, plan, topology, "hierarchical", torch.float32)
        x = nets.tokens_of(rank, torch.float32).requires_grad_()
        if how == "plain":
            output = layer(x)[0]
        else:
            output = checkpoint(lambda x, run=layer: run(x)[0], x, use_reentrant=how == "reentrant")
        output.square().sum().backward()
        gradients[how] = [x.grad, *(p.grad for p in layer.parameters())]
    for how in ("reentrant", "not reentrant"):
        for found, expected in zip(gradients[how], gradients["plain"], strict=True):
            assert torch.equal(found, expected)


def test_activation_checkpointing_changes_no_bit():
    run_ranks(checkpointed_backward, 4, deepspeed=True)
