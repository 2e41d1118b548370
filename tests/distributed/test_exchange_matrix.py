"""Every exchange against one process that has all experts: outputs and all gradients.

Flat, and in two stages with results going home one by one: bit for bit. With one sum per node:
within tolerances.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_locality.config import DispatchConfig
from moe_locality.dispatch import TokenDispatcher, flat, hierarchical, traffic_report
from moe_locality.dispatch.hierarchical import HierarchicalTransport, Rails, pays
from moe_locality.kernels import ops
from moe_locality.quantization import fake_quantize, row_bytes
from tests.distributed.exchange_cases import (
    SLOTS_PER_RANK,
    WIDTH,
    CountingComm,
    Experts,
    data_of,
    groups_of,
    step,
)
from tests.launch import run_ranks
from tests.tolerances import LAYER

WORLD = 8
PLACES = [(1, 1), (1, 2), (8, 2), (1, 4), (4, 4), (8, 4), (1, 8), (2, 8), (4, 8)]
"""(nodes of the world of 8 ranks, ranks of an expert group)"""
EXCHANGES = {
    "flat": {"exchange": "flat"},
    "one by one": {"exchange": "hierarchical", "reduce_at_node": False},
    "sums": {"exchange": "hierarchical"},
}


def dispatcher_of(groups, topology, **config) -> TokenDispatcher:
    num_slots = SLOTS_PER_RANK * len(groups.ep_ranks)
    comm = config.pop("comm", None)
    return TokenDispatcher(
        groups.ep_group,
        topology,
        num_slots=num_slots,
        num_ranks=len(groups.ep_ranks),
        config=DispatchConfig(**config),
        rails=Rails(groups, topology, num_slots),
        comm=comm,
    )


def alone(ranks, num_slots, dtype, pattern, *, train, payload="none"):
    """The tokens of all ranks through all experts in this process; the parts of every rank."""
    parts = [data_of(rank, num_slots, dtype, pattern) for rank in ranks]
    data = tuple(torch.cat(values) for values in zip(*parts, strict=True))
    experts = Experts(range(num_slots), dtype)
    config = DispatchConfig(payload=payload)
    dispatcher = TokenDispatcher(num_slots=num_slots, num_ranks=1, config=config)
    made = step(dispatcher, experts, data, train=train)
    sizes = [len(part[0]) for part in parts]
    tokens = [value.split(sizes) for value in made[:3]]
    return tokens, made[3:]


def compare(rank, groups, exchange, made, reference):
    tokens, expert_grads = reference
    position = groups.ep_ranks.index(rank)
    expected = [value[position] for value in tokens]
    if len(made) > 1:
        slots = len(expert_grads) // 2
        mine = slice(position * SLOTS_PER_RANK, (position + 1) * SLOTS_PER_RANK)
        expected += [*expert_grads[:slots][mine], *expert_grads[slots:][mine]]
    for number, (ours, wanted) in enumerate(zip(made, expected, strict=True)):
        where = f"{exchange}, {len(groups.ep_ranks)} ranks, value {number}"
        if exchange == "sums":
            name = str(ours.dtype).removeprefix("torch.")
            # a node's share is rounded to the type of the rows before it travels
            rtol, atol = LAYER["bfloat16" if wanted.dtype == torch.bfloat16 else name]
            scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
            np.testing.assert_allclose(
                ours.float(), wanted.float(), rtol=rtol, atol=2 * atol * scale, err_msg=where
            )
        else:
            assert torch.equal(ours, wanted), where


def naive(ranks, num_slots, pattern):
    """:func:`alone` without any of our code: masks, plain autograd, float64 sums."""
    parts = [data_of(rank, num_slots, torch.float32, pattern) for rank in ranks]
    x, weights, slots = (torch.cat(values) for values in zip(*parts, strict=True))
    x, weights = x.double().requires_grad_(), weights.double().requires_grad_()
    experts = Experts(range(num_slots), torch.float64)
    with torch.no_grad():
        for ours, given in zip(
            experts.parameters(), Experts(range(num_slots), torch.float32).parameters(), strict=True
        ):
            ours.copy_(given)
    out = torch.zeros_like(x)
    for slot in range(num_slots):
        share = (weights * (slots == slot)).sum(dim=1, keepdim=True)
        out = out + share * (torch.relu(x @ experts.up[slot]) @ experts.down[slot])
    (out * torch.linspace(-1, 1, WIDTH)).sum().backward()
    return [out.detach(), x.grad, weights.grad, *experts.grads()]


def matrix(rank, world, places=tuple(PLACES)):
    for nodes, ep_size in places:
        groups, topology = groups_of(nodes, world, ep_size)
        num_slots = SLOTS_PER_RANK * ep_size
        position = groups.ep_ranks.index(rank)
        patterns = ["uneven"] if (nodes, ep_size) != (2, 8) else ["uneven", "one slot", "none kept"]
        dispatchers = {k: dispatcher_of(groups, topology, **c) for k, c in EXCHANGES.items()}
        for dtype in (torch.float32, torch.bfloat16):
            for pattern in patterns:
                data = data_of(rank, num_slots, dtype, pattern)
                for train in (True, False):
                    reference = alone(groups.ep_ranks, num_slots, dtype, pattern, train=train)
                    if train and dtype is torch.float32:
                        tokens, grads = reference
                        found = [*map(torch.cat, tokens), *grads]
                        for ours, wanted in zip(
                            found, naive(groups.ep_ranks, num_slots, pattern), strict=True
                        ):
                            torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-4)
                    for exchange, dispatcher in dispatchers.items():
                        mine = range(position * SLOTS_PER_RANK, (position + 1) * SLOTS_PER_RANK)
                        experts = Experts(mine, dtype)
                        made = step(dispatcher, experts, data, train=train)
                        compare(rank, groups, exchange, made, reference)


def test_outputs_and_gradients_are_those_of_one_process():
    run_ranks(matrix, WORLD, timeout_s=300)


def static_maps(rank, world):
    """What a GPU gets, here: maps of fixed size, whose rows past the end are never sent."""

    def of_fixed_size(slot_ids, num_slots, backend):
        return ops.row_map(slot_ids, num_slots, num_rows=slot_ids.numel(), backend=backend)

    flat.sort_routes = hierarchical.sort_routes = of_fixed_size
    matrix(rank, world, ((2, 4), (2, 2)))
    payloads(rank, world)


def test_maps_of_fixed_size_give_the_same():
    run_ranks(static_maps, 4, timeout_s=300)


def checkpointing(rank, world):
    groups, topology = groups_of(2, world, world)
    data = data_of(rank, SLOTS_PER_RANK * world, torch.float32)
    mine = range(rank * SLOTS_PER_RANK, (rank + 1) * SLOTS_PER_RANK)
    found = {}
    for exchange, config in EXCHANGES.items():
        comm = CountingComm()
        dispatcher = dispatcher_of(groups, topology, **config, comm=comm)
        expected = step(dispatcher, Experts(mine, torch.float32), data)
        plain, comm.calls = comm.calls, 0
        for reentrant in (True, False):
            for replay in (True, False):
                experts = Experts(mine, torch.float32)
                made = step(dispatcher, experts, data, checkpointed=reentrant, replay=replay)
                for ours, wanted in zip(made, expected, strict=True):
                    assert torch.equal(ours, wanted), (exchange, reentrant, replay)
                found[exchange, reentrant, replay] = comm.calls - plain
                comm.calls = 0
        # dispatch by the plan of an earlier step, other tokens
        x = torch.randn(data[0].shape, generator=torch.Generator().manual_seed(rank))
        first = dispatcher.dispatch(data[0], data[2], data[1])
        fresh = dispatcher.dispatch(x, data[2], data[1])
        again = dispatcher.dispatch(x, data[2], data[1], metadata=first.handle.metadata)
        assert torch.equal(fresh.rows, again.rows)
        assert torch.equal(fresh.handle.weights, again.handle.weights)
    return found


def test_recomputation_gives_the_same_and_metadata_saves_the_counts():
    """Recomputed: the exchanges of a forward; with its plan, without those of the counts."""
    for found in run_ranks(checkpointing, 4):
        for exchange, rows, counts in (("flat", 2, 1), ("sums", 4, 2), ("one by one", 4, 2)):
            for reentrant in (True, False):
                assert found[exchange, reentrant, True] == rows
                assert found[exchange, reentrant, False] == rows + counts


def payloads(rank, world):
    groups, topology = groups_of(2, world, world)
    num_slots = SLOTS_PER_RANK * world
    mine = range(rank * SLOTS_PER_RANK, (rank + 1) * SLOTS_PER_RANK)
    data = data_of(rank, num_slots, torch.bfloat16, "many")
    for payload in ("fp8", "mxfp8", "mxfp4"):
        rounded = [
            (fake_quantize(x, payload), weights, slots)
            for x, weights, slots in (
                data_of(r, num_slots, torch.bfloat16, "many") for r in range(world)
            )
        ]
        arrived = torch.cat(
            [x[(slots == slot).nonzero()[:, 0]] for slot in mine for x, _, slots in rounded]
        )
        for exchange, config in EXCHANGES.items():
            dispatcher = dispatcher_of(groups, topology, **config, payload=payload)
            routed = dispatcher.dispatch(data[0], data[2], data[1])
            assert torch.equal(routed.rows, arrived), (payload, exchange)
            same = dispatcher_of(groups, topology, **config)
            ours = step(dispatcher, Experts(mine, torch.bfloat16), data)
            wanted = step(same, Experts(mine, torch.bfloat16), rounded[rank])
            for value, expected in zip(ours, wanted, strict=True):
                assert torch.equal(value, expected), (payload, exchange)
            for counter, size in (
                (dispatcher.traffic, row_bytes(payload, WIDTH)),
                (same.traffic, 2 * WIDTH),
            ):
                assert (counter.bytes["dispatch"] == counter.rows["dispatch"] * size).all()
                assert (
                    counter.bytes["dispatch_grad"] == counter.rows["dispatch_grad"] * 2 * WIDTH
                ).all()
        # results in a low-bit format: exactly quantized where they go home one by one
        for exchange in ("flat", "one by one"):
            dispatcher = dispatcher_of(
                groups, topology, **EXCHANGES[exchange], combine_payload=payload
            )
            routed = dispatcher.dispatch(data[0], data[2], data[1])
            out = dispatcher.combine(routed.rows, routed.handle)
            exact = TokenDispatcher(num_slots=num_slots, num_ranks=1)
            routed = exact.dispatch(rounded[rank][0], data[2], data[1])
            assert torch.equal(out, exact.combine(routed.rows, routed.handle)), (payload, exchange)


def test_a_low_bit_payload_is_quantization_and_nothing_else():
    run_ranks(payloads, 4)


def kept_apart(rank, world):
    """Packed rows: what the slots and weights need is counted apart, messages are what was sent."""
    groups, topology = groups_of(2, world, world)
    dispatcher = dispatcher_of(groups, topology, exchange="auto", timing=True)
    assert isinstance(dispatcher.transport, HierarchicalTransport)
    num_slots = SLOTS_PER_RANK * world
    mine = range(rank * SLOTS_PER_RANK, (rank + 1) * SLOTS_PER_RANK)
    step(dispatcher, Experts(mine, torch.float32), data_of(rank, num_slots, torch.float32, "many"))
    model = torch.nn.Module()
    model.traffic = dispatcher.traffic  # pyright: ignore[reportAttributeAccessIssue]
    return traffic_report(model)


def test_what_is_packed_behind_rows_is_counted_apart():
    report = run_ranks(kept_apart, 4)[0]
    rows = report["rows_by_link"]
    across = rows["dispatch"]["cross_node"]
    # 3 int16 slots and 3 float32 weights, each rounded up to 16 bytes; back, the weights' gradients
    assert rows["routing"]["cross_node"] == 2 * across
    assert report["by_link"]["routing"]["cross_node"] == across * (32 + 16)
    assert report["by_link"]["dispatch"]["cross_node"] == across * WIDTH * 4
    assert report["messages_by_link"]["dispatch"]["cross_node"] == 4
    assert report["messages_by_link"]["dispatch"]["same_node"] == 4
    assert report["messages_by_link"]["routing"]["cross_node"] == 8
    kept = sum(int((data_of(r, 8, torch.float32, "many")[2] >= 0).sum()) for r in range(4))
    assert sum(report["load"]) == kept
    assert {"plan", "counts", "dispatch across", "dispatch inside", "sum"} <= report[
        "stage_us"
    ].keys()
    assert all(us > 0 for stage in report["stage_us"].values() for us in stage)


def auto_chooses(rank, world):
    chosen = {}
    for nodes, ep_size in ((1, 4), (2, 2), (2, 4), (4, 4)):
        groups, topology = groups_of(nodes, world, ep_size)
        chosen[nodes, ep_size] = [
            pays(groups.ep_ranks, topology, slots * ep_size, k)
            for slots, k in ((2, 2), (1, 2), (2, 1))
        ]
    return chosen


@pytest.mark.parametrize("world", [4])
def test_auto_takes_two_stages_where_they_pay(world):
    """Inside a node never; between nodes of several ranks always; else where picks can share."""
    chosen = run_ranks(auto_chooses, world)[0]
    assert chosen[1, 4] == [False] * 3
    assert chosen[2, 2] == [False] * 3
    assert chosen[2, 4] == [True] * 3
    assert chosen[4, 4] == [True, False, False]
    assert not dist.is_initialized()
