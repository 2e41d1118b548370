"""The kernels on a GPU: the same maps and moves, sums as near to float64 as the reference, the same
on every run, no wait for the device, captured and replayed.
"""

import pytest
import torch

from moe_locality.dispatch.flat import fixed_rows
from moe_locality.errors import BackendUnavailable
from moe_locality.kernels import ops
from tests.tolerances import KERNEL_SUM
from tests.unit.kernels import oracle

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


def options_of(ids, slots):
    """Every option of the map at once."""
    return {"capacity": max(1, ids.numel() // slots), "num_rows": ids.numel() * 3 // 4}


# the most routes that one block maps, one token more, more slots than routes, and as many as just
# fit into the shared memory that every block may have
MAP_SHAPES = [*SHAPES, (256, 8, 256, 0), (257, 8, 256, 0), (3, 2, 997, 0), (3, 2, 1117, 0)]


@pytest.mark.parametrize("shape", MAP_SHAPES)
def test_maps_are_the_definition(shape, backend):
    tokens, top_k, experts, _ = shape
    ids = oracle.random_ids(tokens, top_k, experts, 1)
    for options in ({}, options_of(ids, experts)):
        found = ops.row_map(ids.cuda(), experts, **options, backend=backend)
        oracle.assert_map(found, oracle.row_map(ids, experts, **options))


def check_serving(backend, tokens, top_k, experts):
    tables, ids = (
        oracle.serving_tables(experts, tokens),
        oracle.random_ids(tokens, top_k, experts, 0),
    )
    wanted = ops.serve_visited(ids, *tables, backend="reference").tolist()
    slots, nodes, home = tables
    for given in (ids.cuda(), ids.t().contiguous().t().cuda().long()):
        found = ops.serve_visited(given, slots.cuda(), nodes.cuda(), home, backend=backend)
        assert (found.dtype, found.tolist()) == (given.dtype, wanted)


@pytest.mark.parametrize("shape", MAP_SHAPES)
def test_serve_visited_is_the_reference(shape, backend):
    """[F1]"""
    check_serving(backend, *shape[:3])


def test_serve_visited_never_waits_and_can_be_captured(backend):
    """[F1]"""
    slots, nodes, home = oracle.serving_tables(64, 0)
    tables, ids = (slots.cuda(), nodes.cuda(), home), oracle.random_ids(300, 4, 64, 0).cuda()
    ops.serve_visited(ids, *tables, backend=backend)  # compiled before
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = ops.serve_visited(ids, *tables, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed in range(3):
        ids.copy_(oracle.random_ids(300, 4, 64, seed))
        graph.replay()
        wanted = ops.serve_visited(ids.cpu(), slots, nodes, home, backend="reference")
        assert torch.equal(found.cpu(), wanted)


def three_way(found, reference, exact, dtype):
    rtol, atol = KERNEL_SUM[str(dtype).removeprefix("torch.")]
    for result in (found.cpu(), reference):
        torch.testing.assert_close(result.double(), exact, rtol=rtol, atol=atol)


def check_moves(backend, shape, dtype):
    tokens, top_k, experts, width = shape
    ids = oracle.random_ids(tokens, top_k, experts, 5)
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(tokens, width, generator=generator).to(dtype) for _ in range(2))
    weights = torch.rand(tokens, top_k, generator=generator)
    here = fixed_rows(ids, experts, 8, "reference")
    there = fixed_rows(ids.cuda(), experts, 8, backend)
    used = int(here.slot_offsets[-1])
    rows = ops.permute(x.cuda(), there, backend=backend)
    assert torch.equal(rows[:used].cpu(), ops.permute(x, here)[:used])
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


def test_weights_of_dropped_routes_have_no_gradient(backend):
    """Also where no row is left: the memory is poisoned before."""
    ids = torch.full((64, 4), -1, device="cuda")
    x, weights = torch.randn(64, 128, device="cuda"), torch.rand(64, 4, device="cuda")
    where = ops.row_map(ids, 8, backend=backend)
    rows = ops.permute(x, where, backend=backend)
    assert rows.shape == (0, 128)
    assert not ops.combine(rows, where.positions, weights, backend=backend).any()
    poison = torch.full_like(weights, torch.nan)
    del poison
    grad_rows, grad_weights = ops.combine_backward(x, rows, where, weights, backend=backend)
    assert grad_rows.shape == rows.shape
    assert not grad_weights.any()


def test_the_smallest_shapes_for_the_memory_checker(backend):
    check_moves(backend, (5, 2, 3, 16), torch.bfloat16)
    ids = oracle.random_ids(700, 4, 9, 0)  # several blocks
    ops.row_map(ids.cuda(), 9, **options_of(ids, 9), backend=backend)
    check_serving(backend, 200, 4, 9)


def local_step(x, ids, weights, backend, num_rows):
    """Map, permute, square, combine and both backwards."""
    where = ops.row_map(ids, 64, num_rows=num_rows, backend=backend)
    rows = ops.permute(x, where, backend=backend)
    out = ops.combine(rows, where.positions, weights, backend=backend)
    grads = ops.combine_backward(out, rows, where, weights, backend=backend)
    grad_x = ops.permute_backward(grads[0], where.positions, backend=backend)
    return out, grad_x, grads[1], where.overflow


def problem(tokens, width, top_k):
    ids = oracle.random_ids(tokens, top_k, 64, 0, drop=0).cuda()
    x = torch.randn(tokens, width, device="cuda").bfloat16()
    return x, ids, torch.rand(tokens, top_k, device="cuda")


def test_ten_runs_are_one_result(backend):
    given = problem(777, 256, 8)
    first = local_step(*given, backend, 777 * 8)
    for _ in range(9):
        again = local_step(*given, backend, 777 * 8)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_local_path_never_waits_and_can_be_captured(backend):
    x, ids, weights = problem(300, 128, 4)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            local_step(x, ids, weights, backend, 1100)  # fewer rows than routes: some overflow
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = local_step(x, ids, weights, backend, 1100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(300, 128))
        weights.copy_(torch.rand(300, 4))
        ids.copy_(oracle.random_ids(300, 4, 64, seed, drop=0))
        graph.replay()
        wanted = local_step(x, ids, weights, backend, 1100)
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
