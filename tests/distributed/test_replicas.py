"""Layers with replicas against one process without: results, gradients, and what is sent."""

import numpy as np
import pytest
import torch

from moe_locality.dispatch import traffic_report
from moe_locality.placement import evaluate
from moe_locality.topology import ClusterTopology, groups
from moe_locality.trace.schema import RoutingTrace
from tests.distributed import replica_nets as nets
from tests.distributed.moe_cases import quiet
from tests.launch import run_ranks
from tests.tolerances import LAYER

WORLD = 8
PLACES = [(8, 2), (1, 2), (4, 4), (1, 4), (8, 4), (1, 8), (2, 8), (4, 8)]
"""(nodes of the world of 8 ranks, ranks of an expert group); one rank has no room for replicas"""
EXCHANGES = {
    "flat": {"exchange": "flat"},
    "one by one": {"exchange": "hierarchical", "reduce_at_node": False},
    "sums": {"exchange": "hierarchical"},
}


def reference(world, dtype, train):
    """One process, one slot per expert, the tokens of all ranks; nothing is dropped, so what a
    token gets does not depend on the tokens that share its expert group.
    """
    layer = nets.layer_of(1, 0, dtype).train(train)
    x = torch.cat([nets.tokens_of(rank, dtype) for rank in range(world)], 1).requires_grad_()
    output = layer(x)[0]
    output.float().square().sum().backward()
    experts = [
        [p.grad for p in expert.parameters()]
        for expert in layer.deepspeed_moe.experts.deepspeed_experts
    ]
    return output.detach(), x.grad, layer.deepspeed_moe.gate.wg.weight.grad, experts


def placed_layer(rank, ep_size, plan, topology, exchange, dtype, **options):
    from moe_locality import apply

    layer = nets.layer_of(ep_size, rank % ep_size, dtype, **options)
    section = {"dispatch": EXCHANGES[exchange]}
    apply(layer, section, plan=plan, topology=topology)
    layer.set_deepspeed_parallelism()
    return layer


def prepare(world, nodes):
    quiet()
    topology = ClusterTopology.uniform(num_nodes=nodes, ranks_per_node=world // nodes)
    groups.prepare_groups(topology, {world})
    return topology


def matrix(rank, world, places):
    quiet()
    wanted = {
        (dtype, train): reference(world, getattr(torch, dtype), train)
        for dtype in ("float32", "bfloat16")
        for train in (True, False)
    }
    for nodes, ep_size in places:
        groups._built.clear()  # those of the place before: the same ranks on other nodes
        topology = ClusterTopology.uniform(nodes, world // nodes)
        built = groups.prepare_groups(topology, {ep_size})[ep_size]
        spanned = len({topology.node_of(r) for r in built.ep_ranks})
        plan = nets.plan_of(ep_size, spanned, layers=1)
        assert plan.num_redundant_experts == ep_size
        for dtype in ("float32", "bfloat16"):
            kind = getattr(torch, dtype)
            layer = placed_layer(rank, ep_size, plan, topology, "flat", kind)
            for train in (True, False):
                equal_reference(rank, layer.train(train), built, topology, wanted[dtype, train])


def equal_reference(rank, layer, built, topology, reference):
    from moe_locality.config import DispatchConfig
    from moe_locality.layer.moe import configure

    dtype = reference[0].dtype
    dtype_name = str(dtype).removeprefix("torch.")
    wanted, grad_x, grad_gate, grad_experts = reference
    bounds = dict(zip(("rtol", "atol"), LAYER[dtype_name], strict=True))
    counts = [nets.tokens_of(r, dtype).shape[1] for r in range(topology.num_ranks)]
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    flat = []
    for exchange in EXCHANGES:
        where = (exchange, topology.num_nodes, len(built.ep_ranks), dtype_name, layer.training)
        configure(layer, dispatch_config=DispatchConfig(**EXCHANGES[exchange]))
        layer.zero_grad()
        x = nets.tokens_of(rank, dtype).requires_grad_()
        output = layer(x)[0]
        output.float().square().sum().backward()
        torch.testing.assert_close(output, wanted[:, mine], **bounds)
        torch.testing.assert_close(x.grad, grad_x[:, mine], **bounds)
        gate = layer.deepspeed_moe.gate.wg.weight.grad.float()
        made = [output.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]
        flat = flat or made
        if exchange == "one by one":
            assert all(torch.equal(a, b) for a, b in zip(made, flat, strict=True)), where
        torch.distributed.all_reduce(gate)
        # a sum of differences of rounded products: judged by its length
        error = (gate - grad_gate.float()).norm() / grad_gate.float().norm()
        assert error < bounds["rtol"], (where, error)
        check_experts(layer, grad_experts, bounds, built, where)


def check_experts(layer, grad_experts, bounds, built, where):
    replicas = layer.deepspeed_moe.replicas
    grads, expected = [], []
    for module, logical in zip(
        layer.deepspeed_moe.experts.deepspeed_experts, replicas.local_experts, strict=True
    ):
        grads.append(torch.cat([p.grad.float().flatten() for p in module.parameters()]))
        expected.append(torch.cat([grad.float().flatten() for grad in grad_experts[logical]]))
    ours = torch.stack(grads)
    # as DeepSpeed does: a rank may hand over a part, and its peers the rest
    torch.distributed.all_reduce(ours, group=built.edp_group)
    wanted = torch.stack(expected)
    # a sum over tokens of many sizes: judged by its length
    errors = (ours - wanted).norm(dim=1)
    assert (errors <= bounds["atol"] + bounds["rtol"] * wanted.norm(dim=1)).all(), where
    everyone = [torch.empty_like(ours) for _ in built.ep_ranks]
    torch.distributed.all_gather(everyone, ours, group=built.ep_group)
    first = {}
    for logical, grad in zip(replicas.slot_to_logical.tolist(), torch.cat(everyone), strict=True):
        assert torch.equal(first.setdefault(logical, grad), grad), where  # replicas: the same bits


@pytest.mark.parametrize(
    "places", [PLACES[::2], pytest.param(PLACES[1::2], marks=pytest.mark.slow)]
)
def test_outputs_and_gradients_are_those_of_one_process(places):
    """On 1, 2, 4 and more nodes; without sums at the node they are bit for bit those of flat."""
    run_ranks(matrix, WORLD, places, deepspeed=True, timeout_s=280)


def sends_what_is_predicted(rank, world, nodes):
    topology = prepare(world, nodes)
    plan = nets.plan_of(world, nodes, layers=1, seed=3)
    report, ids = {}, None
    for exchange in ("flat", "sums"):
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
    expected = {"flat": costs.total_picks, "sums": costs.total_copies}
    for exchange, rows in expected.items():
        sent = report[exchange]
        for kind in ("dispatch", "combine"):
            assert sent["rows_by_link"][kind]["cross_node"] == rows, (exchange, kind)
            assert sent["by_link"][kind]["cross_node"] == rows * nets.WIDTH * 4
    assert 0 < expected["sums"] < expected["flat"]


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
        layer = placed_layer(rank, world, plan, topology, "sums", torch.float32)
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
