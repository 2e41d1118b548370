"""The Triton codec on a GPU: the bytes of the torch reference on the CPU, ten times over."""

import pytest
import torch

from moe_locality.quantization import codec, rows

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

FORMATS = [name for name in rows.ROW_FORMATS if name != "mxfp4-mbs-d"]


def activations(tokens, width):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn((tokens, width), generator=generator)
    x *= torch.exp2(torch.randint(-30, 30, (tokens, 1), generator=generator).float())
    x[0, 0], x[1, -1], x[2] = torch.nan, torch.inf, -0.0
    x[3] *= 2.0**-126
    return x


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [33, 2048, 7168])
def test_bytes_equal_the_reference(name, dtype, width):
    x = activations(64, width).to(dtype)
    row_token = torch.randint(-1, 64, (300,), generator=torch.Generator().manual_seed(1))
    wanted = rows.permute_encode(x, row_token, name)
    for _ in range(10):
        found = codec.permute_encode(x.cuda(), row_token.cuda(), name, backend="triton")
        assert torch.equal(found.cpu(), wanted)
    for out in (torch.float32, torch.bfloat16, torch.float16):
        back = codec.decode_rows(found, name, width, out, backend="triton").cpu()
        torch.testing.assert_close(
            back, rows.decode_rows(wanted, name, width, out), rtol=0, atol=0, equal_nan=True
        )
