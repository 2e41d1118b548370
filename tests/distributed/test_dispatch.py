"""The exchange between ranks: where every row goes, its gradient, and what was counted."""

import numpy as np
import pytest
import torch

from moe_locality.config import DispatchConfig
from moe_locality.dispatch.desync import CallPosition
from moe_locality.dispatch.dispatcher import ExchangingLayer, SlotMap, TokenDispatcher, run_moe
from moe_locality.dispatch.traffic import traffic_report
from moe_locality.dispatch.transport import KINDS
from moe_locality.errors import MoeLocalityError, TopologyError
from moe_locality.topology import ClusterTopology, prepare_groups
from tests.launch import run_ranks

TOKENS = (5, 0, 9, 2)  # per rank; one has none
WIDTH, TOP_K = 6, 3


def data_of(rank: int, num_slots: int, pattern: str):
    """The same on every rank: each can compute what it must receive without talking."""
    generator = np.random.default_rng(100 + rank)
    x = torch.from_numpy(generator.standard_normal((TOKENS[rank], WIDTH)))
    weights = torch.from_numpy(generator.random((TOKENS[rank], TOP_K)))
    ids = generator.integers(-1, num_slots, (TOKENS[rank], TOP_K))
    if pattern == "one slot":
        ids[:] = num_slots - 1
    if pattern == "none":
        ids[:] = -1
    return x, weights, torch.from_numpy(ids)


def expert(slot: int, rows: torch.Tensor) -> torch.Tensor:
    return torch.sin(rows * (1 + slot))


def alone(rank: int, num_slots: int, pattern: str) -> dict:
    """What a rank gets when it computes all experts by itself."""
    x, weights, ids = data_of(rank, num_slots, pattern)
    x.requires_grad_()
    weights.requires_grad_()
    out = torch.zeros_like(x)
    for k in range(TOP_K):
        for slot in range(num_slots):
            chosen = ids[:, k] == slot
            out = out + torch.where(
                chosen[:, None], weights[:, k : k + 1] * expert(slot, x), torch.zeros_like(x)
            )
    out.square().sum().backward()
    return {"out": out.detach(), "grad x": x.grad, "grad weights": weights.grad}


def every_rank_gets_what_it_would_compute_alone(rank, world, per_rank, pattern):
    num_slots = world * per_rank
    topology = ClusterTopology.uniform(world // 2, 2)
    dispatcher = TokenDispatcher(None, topology, num_slots=num_slots)
    x, weights, ids = data_of(rank, num_slots, pattern)
    x.requires_grad_()
    weights.requires_grad_()
    routed = dispatcher.dispatch(x, ids, weights)
    chunks = routed.rows.split(list(routed.tokens_per_local_expert))
    mine = range(rank * per_rank, (rank + 1) * per_rank)
    # what arrived is what the others have for these slots, source by source
    for slot, chunk in zip(mine, chunks, strict=True):
        arrived = []
        for source in range(world):
            sx, _, sids = data_of(source, num_slots, pattern)
            token, _ = (sids == slot).nonzero(as_tuple=True)
            arrived.append(sx[token])
        assert torch.equal(chunk.detach(), torch.cat(arrived))
    results = torch.cat([expert(slot, chunk) for slot, chunk in zip(mine, chunks, strict=True)])
    out = dispatcher.combine(results, routed.handle)
    out.square().sum().backward()
    expected = alone(rank, num_slots, pattern)
    torch.testing.assert_close(out.detach(), expected["out"])
    torch.testing.assert_close(x.grad, expected["grad x"])
    torch.testing.assert_close(weights.grad, expected["grad weights"])
    check_report(dispatcher, rank, world, per_rank, pattern, topology)


def check_report(dispatcher, rank, world, per_rank, pattern, topology):
    holder = torch.nn.Module()
    holder.traffic = dispatcher.traffic  # pyright: ignore[reportAttributeAccessIssue]
    report = traffic_report(holder)
    wanted = np.zeros((world, world), dtype=np.int64)
    for source in range(world):
        _, _, ids = data_of(source, world * per_rank, pattern)
        for slot in ids[ids >= 0].tolist():
            wanted[source, slot // per_rank] += 1
    for kind in KINDS:
        # results and the gradients of inputs travel the other way
        matrix = wanted if kind in ("dispatch", "combine_grad") else wanted.T
        assert report["rows"][kind] == matrix.tolist(), kind
        assert report["bytes"][kind] == (matrix * WIDTH * 8).tolist(), kind
        links = {"same_rank": 0, "same_node": 0, "cross_node": 0}
        for a in range(world):
            for b in range(world):
                same = topology.node_of(a) == topology.node_of(b)
                name = "same_rank" if a == b else "same_node" if same else "cross_node"
                links[name] += int(matrix[a, b])
        assert report["rows_by_link"][kind] == links


@pytest.mark.parametrize(
    ("world", "per_rank", "pattern"),
    [(2, 2, "random"), (4, 1, "random"), (4, 3, "random"), (4, 2, "one slot"), (4, 2, "none")],
)
def test_exchange(world, per_rank, pattern):
    run_ranks(every_rank_gets_what_it_would_compute_alone, world, per_rank, pattern)


def two_groups_count_in_global_ranks(rank, world):
    pairs = [torch.distributed.new_group([a, a + 1]) for a in (0, 2)]
    dispatcher = TokenDispatcher(
        pairs[rank // 2], ClusterTopology.uniform(2, 2), num_slots=2, num_ranks=2
    )
    routed = dispatcher.dispatch(torch.ones(1, 2), torch.tensor([[1]]), torch.ones(1, 1))
    dispatcher.combine(routed.rows, routed.handle)
    holder = torch.nn.Module()
    holder.traffic = dispatcher.traffic  # pyright: ignore[reportAttributeAccessIssue]
    report = traffic_report(holder)
    assert report["rows"]["dispatch"] == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert report["by_link"]["dispatch"] == {"same_rank": 16, "same_node": 16, "cross_node": 0}
    inside = traffic_report(holder, group=pairs[rank // 2])
    assert inside["ranks"] == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert inside["rows"]["dispatch"] == [[0, 1], [0, 1]]


def test_groups_inside_a_world():
    run_ranks(two_groups_count_in_global_ranks, 4)


def routes_to_no_expert(rank, _world, exchange):
    """Rank 1 names an expert that does not exist, with and without a map of slots; then none does:
    what each rank is told.
    """
    topology = ClusterTopology.uniform(2, 2)
    prepare_groups(topology, [4])
    said = []
    for order in (None, np.arange(8)[::-1]):
        layer = ExchangingLayer()
        layer.dispatch_config, layer.kernels = DispatchConfig(exchange=exchange), "auto"
        layer.topology, layer.call_position = topology, CallPosition(0, "mlp")
        slots = SlotMap() if order is None else SlotMap.of(order)
        dispatcher = layer.get_dispatcher(None, slots, num_slots=8, num_ranks=4, top_k=2)
        x, weights = torch.ones(3, 4), torch.ones(3, 2)
        for ids in ([0, 8] if rank == 1 else [0, 1], [0, 7]):
            call = (dispatcher, x, torch.tensor([ids] * 3), weights)
            try:
                out = run_moe(*call, lambda rows, _: 2 * rows)
                assert torch.equal(out, 4 * x)
                said.append("")
            except MoeLocalityError as error:
                said.append(str(error))
    return said


@pytest.mark.parametrize("exchange", ["flat", "hierarchical"])
def test_run_moe_raises_on_all_ranks_where_one_names_no_expert(exchange):
    """Nobody waits for the timeout of the group, and the next step works."""
    for rank, said in enumerate(run_ranks(routes_to_no_expert, 4, exchange)):
        for at in (0, 2):
            message = said[at]
            assert message.startswith("ranks [1] gave up in layer 0 (mlp), call 1: "), message
            assert ("found expert 8 in the routes, expected at most 7" in message) == (rank == 1)
            assert said[at + 1] == ""


def wrong_group_size_is_refused(rank, world):
    with pytest.raises(TopologyError, match=r"group of 2 ranks, expected ep_size=4"):
        TokenDispatcher(None, num_slots=4, num_ranks=4)
    with pytest.raises(TopologyError, match=r"found 5 slots for 2 ranks, expected a multiple"):
        TokenDispatcher(None, num_slots=5)


def test_wrong_groups_are_refused():
    run_ranks(wrong_group_size_is_refused, 2)
