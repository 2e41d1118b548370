"""The kernels on a GPU: the same maps and moves, sums as near to float64 as the reference, the same
on every run, no wait for the device, captured and replayed.
"""

import pytest
import torch

from moe_locality.errors import BackendUnavailable
from moe_locality.kernels import local, ops
from moe_locality.kernels.backends import GateSpec
from tests.tolerances import KERNEL_SUM
from tests.unit.kernels import oracle
from tests.unit.kernels.test_gate import SPECS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(0, 2, 4, 8), (1, 1, 1, 8), (37, 3, 3, 31), (513, 8, 64, 128), (2000, 6, 300, 72)]


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    try:
        ops.check_backend(request.param)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    return request.param


def options_of(ids, experts, seed):
    """Every option of the map at once."""
    generator = torch.Generator().manual_seed(seed)
    slots = experts + 3
    return slots, {
        "slot_of_expert": torch.randperm(slots, generator=generator)[:experts].int(),
        "keep": torch.rand(ids.shape, generator=generator) < 0.9,
        "capacity": max(1, ids.numel() // experts),
        "alignment": 8,
        "num_rows": max(0, ids.numel() * 3 // 4) + slots * 8,
        "node_of_slot": torch.randint(0, 5, (slots,), generator=generator).int(),
        "num_nodes": 5,
    }


def on_gpu(options):
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


# the most routes that one block maps, one token more, and more slots than routes
MAP_SHAPES = [*SHAPES, (256, 8, 256, 0), (257, 8, 256, 0), (3, 2, 997, 0)]


@pytest.mark.parametrize("shape", MAP_SHAPES)
def test_maps_are_the_definition(shape, backend):
    tokens, top_k, experts, _ = shape
    ids = oracle.random_ids(tokens, top_k, experts, 1)
    for slots, options in ((experts, {}), options_of(ids, experts, 2)):
        found = ops.row_map(ids.cuda(), slots, **on_gpu(options), backend=backend)
        oracle.assert_map(found, oracle.row_map(ids, slots, **options))


def three_way(found, reference, exact, dtype):
    rtol, atol = KERNEL_SUM[str(dtype).removeprefix("torch.")]
    for result in (found.cpu(), reference):
        torch.testing.assert_close(result.double(), exact, rtol=rtol, atol=atol)


def check_moves(backend, shape, dtype, alignment=8):
    tokens, top_k, experts, width = shape
    ids = oracle.random_ids(tokens, top_k, experts, 5)
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(tokens, width, generator=generator).to(dtype) for _ in range(2))
    weights = torch.rand(tokens, top_k, generator=generator)
    options = {"alignment": alignment, "num_rows": tokens * top_k + experts * alignment + 7}
    here = ops.row_map(ids, experts, **options)
    there = ops.row_map(ids.cuda(), experts, **options, backend=backend)
    used = int(here.slot_offsets[-1])
    rows, row_weights = ops.permute_with_weights(x.cuda(), weights.cuda(), there, backend=backend)
    wanted = ops.permute_with_weights(x, weights, here)
    assert torch.equal(rows[:used].cpu(), wanted[0][:used])
    assert torch.equal(row_weights[:used].cpu(), wanted[1][:used])
    held = torch.randn(len(here.row_token), width, generator=generator).to(dtype)
    poisoned = held.clone()
    poisoned[here.row_token < 0] = float("nan")
    for factors in (weights, None):
        moved = None if factors is None else factors.cuda()
        found = ops.combine(poisoned.cuda(), there.positions, moved, backend=backend)
        exact = oracle.combine(held, here.positions, factors)
        three_way(found, ops.combine(poisoned, here.positions, factors), exact, dtype)
    found = ops.combine_backward(
        grad.cuda(), poisoned.cuda(), there, weights.cuda(), backend=backend
    )
    reference = ops.combine_backward(grad, poisoned, here, weights)
    exact = ops.combine_backward(grad.double(), held.double(), here, weights.double())
    three_way(found[0][:used], reference[0][:used], exact[0][:used], dtype)
    scale = max(1.0, float(exact[1].abs().max()) if exact[1].numel() else 1.0)
    three_way(found[1] / scale, reference[1] / scale, exact[1] / scale, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_moves_are_equal_and_sums_are_near(shape, dtype, backend):
    check_moves(backend, shape, dtype)


def test_the_smallest_shapes_for_the_memory_checker(backend):
    check_moves(backend, (5, 2, 3, 16), torch.bfloat16)
    ids = oracle.random_ids(700, 4, 9, 0)  # several blocks
    slots, options = options_of(ids, 9, 0)
    ops.row_map(ids.cuda(), slots, **on_gpu(options), backend=backend)
    logits = torch.randn(9, 12, device="cuda")
    ids, weights = ops.gate(logits, SPECS[4], backend=backend)
    ops.gate_backward(weights, logits, ids, SPECS[4], backend=backend)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_gate_picks_the_same_experts(spec, with_bias, backend):
    generator = torch.Generator().manual_seed(7)
    logits = (torch.randn(133, 12, generator=generator) * 4).round() / 4
    bias = torch.randn(12, generator=generator) if with_bias else None
    moved = None if bias is None else bias.cuda()
    ids, weights = ops.gate(logits.cuda(), spec, bias=moved, backend=backend)
    wanted_ids, wanted = ops.gate(logits, spec, bias=bias)
    if bias is None and (spec.num_groups == 1 or spec.group_score == "max"):
        assert torch.equal(ids.cpu(), wanted_ids)
    three_way(weights, wanted, oracle.gate(logits, spec, bias)[1], torch.float32)
    grad = torch.randn(weights.shape, generator=generator)
    found = ops.gate_backward(grad.cuda(), logits.cuda(), wanted_ids.cuda(), spec, backend=backend)
    exact = ops.gate_backward(grad.double(), logits.double(), wanted_ids, spec)
    three_way(found, ops.gate_backward(grad, logits, wanted_ids, spec), exact, torch.float32)


def local_step(x, logits, spec, backend, num_rows):
    x, logits = x.detach().requires_grad_(), logits.detach().requires_grad_()
    ids, weights = local.topk_gate(logits, spec, backend=backend)
    where = ops.row_map(ids, logits.shape[1], num_rows=num_rows, backend=backend)
    rows = local.dispatch(x, where, backend=backend)
    out = local.combine(rows, where, weights, backend=backend)
    grads = torch.autograd.grad(out.float().square().sum(), (x, logits))
    return (out.detach(), *grads, where.overflow)


def test_ten_runs_are_one_result(backend):
    x = torch.randn(777, 256, device="cuda").bfloat16()
    logits = torch.randn(777, 64, device="cuda")
    first = local_step(x, logits, GateSpec(top_k=8), backend, 777 * 8)
    for _ in range(9):
        again = local_step(x, logits, GateSpec(top_k=8), backend, 777 * 8)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_local_path_never_waits_and_can_be_captured(backend):
    spec = GateSpec(top_k=4, renormalize=True)
    x = torch.randn(300, 128, device="cuda").bfloat16()
    logits = torch.randn(300, 32, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            local_step(x, logits, spec, backend, 1100)  # fewer rows than routes: some overflow
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = local_step(x, logits, spec, backend, 1100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(300, 128))
        logits.copy_(torch.randn(300, 32))
        graph.replay()
        wanted = local_step(x, logits, spec, backend, 1100)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert int(found[3]) == 100


def test_rows_beyond_two_to_the_31_elements(backend):
    width, tokens = 4096, 7
    count = 2**31 // width + tokens
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("less than 6 GiB of GPU memory are free")
    rows = torch.empty(count, width, dtype=torch.bfloat16, device="cuda")
    rows[-tokens:] = torch.randn(tokens, width, device="cuda").bfloat16()
    positions = torch.arange(count - tokens, count, dtype=torch.int32, device="cuda")[:, None]
    assert torch.equal(ops.combine(rows, positions, None, backend=backend), rows[-tokens:])
    assert torch.equal(ops.permute(rows, positions[:, 0], backend=backend), rows[-tokens:])


def test_what_is_written_beyond_two_to_the_31_elements(backend):
    """A permute and a backward whose last rows lie past it: K = 8 rows of every token."""
    width, top_k, experts = 4096, 8, 8
    tokens = 2**31 // width // top_k + 3
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("less than 8 GiB of GPU memory are free")
    ids = torch.arange(experts, dtype=torch.int32, device="cuda").expand(tokens, top_k)
    where = ops.row_map(ids, experts, num_rows=tokens * top_k, backend=backend)
    assert torch.equal(
        where.positions[:, -1],
        where.row_token.new_tensor(range(tokens * (top_k - 1), tokens * top_k)),
    )
    x = torch.randn(tokens, width, device="cuda").bfloat16()
    rows = ops.permute(x, where, backend=backend)
    assert rows.numel() > 2**31
    assert all(torch.equal(rows[k * tokens : (k + 1) * tokens], x) for k in (0, top_k - 1))
    del rows
    weights = torch.zeros(tokens, top_k, device="cuda")
    weights[:, -1] = 1
    grads, _ = ops.combine_backward(x, None, where, weights, backend=backend)
    assert torch.equal(grads[-tokens:], x)
    assert not grads[:tokens].any()
