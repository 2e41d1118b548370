"""The two-stage exchange gives what the flat one gives, and sends each token once per node."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import moe_locality
from moe_locality.config import DispatchConfig
from moe_locality.dispatch import TokenDispatcher, traffic_report
from moe_locality.dispatch.flat import FlatTransport
from moe_locality.dispatch.hierarchical import HierarchicalTransport, Rails
from moe_locality.errors import ConfigError
from moe_locality.topology import ClusterTopology
from moe_locality.topology.groups import build_groups, layout_groups
from tests.launch import run_ranks
from tests.tolerances import LAYER, LOSS

SLOTS_PER_RANK, TOP_K, WIDTH = 3, 4, 16
NODES = {
    "2 x 2": (0, 0, 1, 1),
    "4 x 1": (0, 1, 2, 3),
    "1 x 4": (0, 0, 0, 0),
    "interleaved": (0, 1, 0, 1),
    "mirrored": (0, 1, 1, 0),
}


def cluster(nodes: tuple[int, ...]) -> ClusterTopology:
    return ClusterTopology.from_node_names([f"node{node}" for node in nodes])


def routes(rank: int, case: str, num_slots: int) -> torch.Tensor:
    """[T, K] slots of this rank's tokens: no slot twice in a token, some routes dropped."""
    generator = torch.Generator().manual_seed(17 * rank + 1)
    tokens = {"uneven": 5 * rank, "one expert": 7, "random": 40}[case]
    slots = torch.rand(tokens, num_slots, generator=generator).argsort(dim=1)[:, :TOP_K]
    if case == "one expert":
        slots = torch.full((tokens, TOP_K), -1)
        slots[:, 0] = num_slots - 1
    elif tokens:
        slots[torch.rand(tokens, TOP_K, generator=generator) < 0.2] = -1
    return slots.to(torch.int32)


def step(dispatcher, rank, slots):
    """One forward and backward; returns the output and the gradients of x, weights and scales."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(len(slots), WIDTH, generator=generator, requires_grad=True)
    weights = torch.rand(len(slots), TOP_K, generator=generator, requires_grad=True)
    scales = torch.linspace(0.5, 2, SLOTS_PER_RANK).add(rank).requires_grad_()
    routed = dispatcher.dispatch(x, slots, weights)
    counts = torch.tensor(routed.tokens_per_local_expert)
    out = dispatcher.combine(routed.rows * scales.repeat_interleave(counts)[:, None], routed.handle)
    (out * torch.linspace(-1, 1, WIDTH)).sum().backward()
    return [value.detach().numpy() for value in (out, x.grad, weights.grad, scales.grad)]


def compare_on_rank(rank, world_size, nodes):
    topology, num_slots = cluster(nodes), SLOTS_PER_RANK * world_size
    rails = Rails(build_groups(layout_groups(topology, world_size)), topology, num_slots)
    node_of = np.array(nodes)
    for case in ("random", "uneven", "one expert"):
        made = {}
        slots = routes(rank, case, num_slots)
        for exchange in ("flat", "hierarchical"):
            dispatcher = TokenDispatcher(
                topology=topology,
                num_slots=num_slots,
                config=DispatchConfig(exchange=exchange),
                rails=rails,
            )
            made[exchange] = step(dispatcher, rank, slots), dispatcher
        for flat, ours in zip(made["flat"][0], made["hierarchical"][0], strict=True):
            np.testing.assert_allclose(ours, flat, rtol=LAYER["float32"][0], atol=1e-5)
        model = torch.nn.Module()
        model.traffic = made["hierarchical"][1].traffic
        report = traffic_report(model, topology)
        counted = {kind: report["rows_by_link"][kind]["cross_node"] for kind in report["rows"]}
        served = np.where(slots < 0, -1, node_of[slots.clamp_min(0) // SLOTS_PER_RANK])
        remote = sum(len(set(row) - {-1, nodes[rank]}) for row in served.tolist())
        total = torch.tensor(remote)
        dist.all_reduce(total)
        for kind in ("dispatch", "combine", "dispatch_grad", "combine_grad"):
            assert counted[kind] == int(total), (case, kind)
    return True


@pytest.mark.parametrize("nodes", NODES.values(), ids=NODES.keys())
def test_both_exchanges_agree_and_each_token_crosses_once_per_node(nodes):
    assert all(run_ranks(compare_on_rank, 4, nodes))


class Net(torch.nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        expert = torch.nn.Sequential(torch.nn.Linear(WIDTH, 24), torch.nn.Linear(24, WIDTH))
        self.moe = torch.nn.ModuleList(
            moe_locality.MoE(
                WIDTH, expert, num_experts=8, ep_size=4, k=k, capacity_factor=1.5, use_rts=False
            )
            for k in (1, 2, 3)
        )
        self.head = torch.nn.Linear(WIDTH, 1)

    def forward(self, x):
        for layer in self.moe:
            if self.checkpointed:
                out, aux, _ = checkpoint(layer, x, use_reentrant=False)
            else:
                out, aux, _ = layer(x)
            x = x + out + 0.01 * aux
        return self.head(x).pow(2).mean()


def losses_on_rank(rank, world_size, stage, dtype, checkpointed):
    found = {}
    for exchange in ("flat", "hierarchical", "one by one"):
        by_itself = {"exchange": "hierarchical", "reduce_at_node": False}
        section = {
            "dispatch": by_itself if exchange == "one by one" else {"exchange": exchange},
            "cluster": {"num_nodes": 2, "ranks_per_node": 2},
        }
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": dtype == "bfloat16"},
            "moe_locality": section,
        }
        net = Net(checkpointed)
        engine = moe_locality.initialize(
            model=net, model_parameters=list(net.parameters()), config=config
        )[0]
        losses = []
        for number in range(6):
            generator = torch.Generator().manual_seed(10 * number + rank)
            x = torch.randn(2, 12, WIDTH, generator=generator).to(getattr(torch, dtype))
            loss = engine(x)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
        transports = {type(layer.deepspeed_moe.dispatcher.transport) for layer in net.moe}
        assert transports == {FlatTransport if exchange == "flat" else HierarchicalTransport}
        found[exchange] = losses
    return found


@pytest.mark.parametrize(
    ("stage", "dtype", "checkpointed"),
    [(0, "float32", False), (1, "float32", True), (2, "bfloat16", False)],
)
def test_training_is_the_same(stage, dtype, checkpointed):
    """Under ZeRO, with gradient accumulation and with activation checkpointing."""
    for found in run_ranks(losses_on_rank, 4, stage, dtype, checkpointed, deepspeed=True):
        assert found["one by one"] == found["flat"]
        rtol, atol = LOSS[dtype]
        np.testing.assert_allclose(found["hierarchical"], found["flat"], rtol=rtol, atol=atol)
        assert found["flat"][0] != found["flat"][-1]


def without_groups(rank, world_size):
    with pytest.raises(ConfigError, match=r"expert groups of the nodes were not made"):
        TokenDispatcher(num_slots=4, config=DispatchConfig(exchange="hierarchical"))
    return True


def test_without_the_groups_it_is_refused():
    assert all(run_ranks(without_groups, 2))
