"""A layer with a fixed capacity on a GPU: its map, no waits, captured and replayed."""

import pytest
import torch
from torch import nn

pytest.importorskip("deepspeed")

from moe_locality.dispatch.flat import check_overflow, fixed_rows, lost_routes
from moe_locality.errors import BackendUnavailable, ConfigError
from moe_locality.kernels import ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
WIDTH, TOKENS = 64, 96


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    try:
        ops.check_backend(request.param)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    return request.param


@pytest.mark.parametrize("shape", [(0, 2, 4), (1, 1, 1), (37, 3, 5), (513, 8, 64)])
def test_the_map_is_the_references(shape, backend):
    tokens, top_k, slots = shape
    ids = torch.randint(-1, slots, (tokens, top_k))
    wanted = fixed_rows(ids, slots, 9, "reference")
    found = fixed_rows(ids.cuda(), slots, 9, backend)
    for name in ("row_route", "row_token", "positions", "slot_offsets", "overflow"):
        assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name)), name


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return self.down(nn.functional.relu(self.up(x)))


def make(backend, experts, drop_tokens, **capacity):
    from moe_locality import MoE

    torch.manual_seed(0)
    layer = MoE(
        WIDTH,
        Expert(),
        num_experts=8,
        k=3,
        drop_tokens=drop_tokens,
        kernels=backend,
        experts=experts,
        dispatch_config={"capacity": capacity},
    )
    return layer.to("cuda", torch.bfloat16)


def step(layer, x):
    out, l_aux, _ = layer(x)
    loss = out.float().square().sum() + l_aux
    return (out, *torch.autograd.grad(loss, (x, *layer.parameters())))


def captured(layer, x):
    """Warm up on a stream of its own, then capture one step."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(layer, x)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            found = step(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return graph, found


@pytest.mark.parametrize("drop_tokens", [False, True])
@pytest.mark.parametrize("experts", ["loop", "grouped"])
def test_a_layer_is_captured_and_replayed(backend, experts, drop_tokens):
    layer = make(backend, experts, drop_tokens, factor=8 / 3)  # room for whatever is routed
    x = torch.randn(TOKENS, WIDTH, device="cuda").bfloat16().requires_grad_()
    graph, found = captured(layer, x)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.copy_(torch.randn(TOKENS, WIDTH))
        graph.replay()
        wanted = step(layer, x)
        for ours, eager in zip(found, wanted, strict=True):
            assert torch.equal(ours, eager)
    check_overflow(layer)


def test_an_overflow_inside_a_replay_is_found_afterwards(backend):
    layer = make(backend, "loop", False, factor=1.0, on_overflow="drop")
    x = torch.randn(TOKENS, WIDTH, device="cuda").bfloat16()
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.zero_()  # ties: every token picks the same three
    graph, _ = captured(layer, x.requires_grad_())
    assert lost_routes(layer) == 3 * 3 * (
        TOKENS - TOKENS * 3 // 8
    )  # three steps before the capture
    with pytest.raises(ConfigError, match="routes beyond the rows"):
        check_overflow(layer)
    graph.replay()
    graph.replay()
    assert lost_routes(layer) == 2 * 3 * (TOKENS - TOKENS * 3 // 8)
    with pytest.raises(ConfigError, match="routes beyond the rows"):
        check_overflow(layer)
