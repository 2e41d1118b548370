"""Low-bit rows by the CUDA extension and by Triton: the bytes of the torch reference on the CPU."""

import pytest
import torch

from moe_locality.dispatch.flat import fixed_rows
from moe_locality.errors import BackendUnavailable
from moe_locality.kernels import ops
from moe_locality.quantization import quantize, rows
from tests.unit.kernels import oracle

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
FORMATS_OF_TENSORS = ["fp8", "nvfp4", "mxfp4-mbs-s"]
FORMATS = [name for name in rows.ROW_FORMATS if name != "mxfp4-mbs-d"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    try:
        ops.check_backend(request.param)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    return request.param


def activations(tokens, width, dtype):
    """Random rows, and ties, signed zeros, subnormals, huge numbers, NaN and infinity."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(tokens, width, generator=generator)
    x *= torch.exp2(torch.randint(-30, 30, (tokens, 1), generator=generator).float())
    x[0] = torch.randint(-12, 13, (width,), generator=generator) / 4
    x[1], x[2] = -0.0, torch.randn(width, generator=generator) * 2.0**-127
    x[3] = x[3].sign() * torch.finfo(dtype).max
    x[4, 0], x[5, -1] = torch.nan, -torch.inf
    return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


def check(name, dtype, width, backend, tokens=61):
    x = activations(tokens, width, dtype)
    ids = oracle.random_ids(tokens, 3, 5, width)
    where = fixed_rows(ids, 5, tokens, "reference")
    there = fixed_rows(ids.cuda(), 5, tokens, backend)
    wanted = rows.permute_encode(x, where.row_token, name)
    args = (x.cuda(), there.row_token, name)
    found = rows.permute_encode(*args, positions=there.positions, backend=backend)
    assert torch.equal(found.cpu(), wanted)
    assert torch.equal(rows.permute_encode(*args, backend=backend), found)
    encoded = rows.encode_rows(x.cuda(), name, backend=backend)
    assert torch.equal(encoded.cpu(), rows.encode_rows(x, name))
    index = torch.randint(-1, len(wanted), (97,), generator=torch.Generator().manual_seed(1)).int()
    for out in DTYPES:
        for order in (None, index):
            moved = None if order is None else order.cuda()
            back = rows.decode_rows(found, name, width, out, index=moved, backend=backend)
            exact = rows.decode_rows(wanted, name, width, out, index=order)
            torch.testing.assert_close(back.cpu(), exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 128, 2100, 7168])
def test_bytes_are_those_of_the_reference(name, dtype, width, backend):
    check(name, dtype, width, backend)


def test_a_static_factor_is_that_of_the_reciprocal(backend):
    x = torch.tensor([[0.3368421196937561], [7.979221343994141], [1.2190476655960083]])
    found = rows.encode_rows(x.cuda(), "mxfp4-mbs-s", backend=backend)
    assert torch.equal(found.cpu(), rows.encode_rows(x, "mxfp4-mbs-s"))


@pytest.mark.parametrize("name", FORMATS_OF_TENSORS)
def test_the_reference_is_the_same_on_a_gpu(name):
    x = activations(61, 2100, torch.float32)
    here, there = (quantize(given, name, role="activation") for given in (x, x.cuda()))
    for part in ("codes", "scales", "factors", "tensor_scale"):
        found, wanted = getattr(there, part), getattr(here, part)
        assert (found is None) == (wanted is None)
        if wanted is not None:
            equal = torch.testing.assert_close
            equal(found.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["fp8", "mxfp4-mbs-s"])
def test_the_smallest_rows_for_the_memory_checker(name, backend):
    check(name, torch.bfloat16, 48, backend, tokens=7)


def test_tokens_that_lie_apart_and_no_tokens(backend):
    x = activations(9, 64, torch.bfloat16)
    wide = torch.cat([x, x], dim=1).cuda()[:, 3:35]
    found = rows.encode_rows(wide, "mxfp8", backend=backend)
    assert torch.equal(found.cpu(), rows.encode_rows(wide.cpu(), "mxfp8"))
    columns = x.cuda().t()
    found = rows.encode_rows(columns, "fp8", backend=backend)
    assert torch.equal(found.cpu(), rows.encode_rows(x.t(), "fp8"))
    padding = torch.full((4,), -1, dtype=torch.int32, device="cuda")
    for tokens in (0, len(x)):
        given = x.cuda()[:tokens]
        assert not rows.permute_encode(given, padding, "mxfp8", backend=backend).any()


def test_ten_runs_are_one_result_also_when_captured(backend):
    x = activations(512, 2048, torch.bfloat16).cuda()
    ids = oracle.random_ids(512, 8, 64, 0, drop=0).cuda()
    where = ops.row_map(ids, 64, num_rows=4096, backend=backend)

    def encode():
        return rows.permute_encode(
            x, where.row_token, "mxfp8", positions=where.positions, backend=backend
        )

    first = encode()
    assert all(torch.equal(encode(), first) for _ in range(9))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = encode()
    found.fill_(99)
    graph.replay()
    assert torch.equal(found, first)


def test_encoded_rows_beyond_two_to_the_31_bytes(backend):
    """Only the last rows of the buffer are written and read."""
    width, tokens = 4096, 3
    size = rows.row_bytes("mxfp8", width)
    count = 2**31 // size + 5
    if torch.cuda.mem_get_info()[0] < 3 * 2**30:
        pytest.skip("less than 3 GiB of GPU memory are free")
    buffer = torch.empty(count, size, dtype=torch.uint8, device="cuda")
    x = torch.randn(tokens, width, device="cuda").bfloat16()
    buffer[-tokens:] = rows.encode_rows(x, "mxfp8", backend=backend)
    index = torch.arange(count - tokens, count, dtype=torch.int32, device="cuda")
    found = rows.decode_rows(buffer, "mxfp8", width, x.dtype, index=index, backend=backend)
    wanted = rows.decode_rows(buffer[-tokens:].contiguous(), "mxfp8", width, x.dtype)
    assert torch.equal(found, wanted)
