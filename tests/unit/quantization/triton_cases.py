"""The Triton kernels under Triton's interpreter: run by ``test_triton.py``.

Their bytes are those of the torch reference, whose bytes are tested elsewhere.
"""

import pytest
import torch

from moe_locality.errors import ConfigError
from moe_locality.quantization import rows

# one of each kind of element, scale and factor: the others differ in the block alone
FORMATS = ["mxfp4", "mxfp4-16-oas", "mxfp4-mbs-s", "mxfp8", "mxfp8-e5m2", "fp8"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows_of_all_kinds(width, dtype):
    """Rows with ties, zeros, signed zeros, the largest and the smallest numbers, NaN, infinity."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn((8, width), generator=generator)
    x[1] *= torch.exp2(torch.randint(-20, 20, (width,), generator=generator).float())
    x[2] = torch.randint(-12, 13, (width,), generator=generator) / 4
    x[3] = -0.0
    x[4] *= torch.finfo(dtype).max / 8
    x[5] *= 2.0**-126
    x[6, width // 2] = torch.nan
    x[7, 0] = -torch.inf
    return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


def same_bits(a, b):
    """Equal to the last bit, NaN wherever the other has one."""
    nan = a.isnan()
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(integer)[~nan], b.view(integer)[~nan])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("width", "dtype"),
    [(1, torch.float32), (37, torch.float16), (160, torch.float32), (160, torch.bfloat16)],
)
def test_encode_and_decode(name, dtype, width):
    x = rows_of_all_kinds(width, dtype)
    encoded = rows.encode_rows(x, name, backend="triton")
    assert torch.equal(encoded, rows.encode_rows(x, name))
    for out in DTYPES:
        found = rows.decode_rows(encoded, name, width, out, backend="triton")
        assert same_bits(found, rows.decode_rows(encoded, name, width, out))


def test_a_static_factor_is_that_of_the_reciprocal():
    """6 / a rounded once has another factor for these."""
    x = torch.tensor([[0.3368421196937561], [7.979221343994141], [1.2190476655960083]])
    encoded = rows.encode_rows(x, "mxfp4-mbs-s", backend="triton")
    assert torch.equal(encoded, rows.encode_rows(x, "mxfp4-mbs-s"))


@pytest.mark.parametrize("name", FORMATS)
def test_decode_in_any_order(name):
    encoded = rows.encode_rows(rows_of_all_kinds(140, torch.bfloat16), name)
    index = torch.tensor([7, -1, 0, 0, 3, -1, 6, 5, 1, 2], dtype=torch.int32)
    found = rows.decode_rows(encoded, name, 140, torch.bfloat16, index=index, backend="triton")
    wanted = rows.decode_rows(encoded, name, 140, torch.bfloat16)
    assert same_bits(found[index >= 0], wanted[index[index >= 0].long()])
    assert not found[index < 0].any()
    assert same_bits(rows.decode_rows(encoded, name, 140, torch.bfloat16, index=index), found)


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "mxfp4-mbs-s"])
def test_several_chunks(name):
    x = rows_of_all_kinds(2100, torch.bfloat16)
    encoded = rows.encode_rows(x, name, backend="triton")
    assert torch.equal(encoded, rows.encode_rows(x, name))
    found = rows.decode_rows(encoded, name, 2100, torch.bfloat16, backend="triton")
    assert same_bits(found, rows.decode_rows(encoded, name, 2100, torch.bfloat16))


@pytest.mark.parametrize("name", FORMATS)
def test_every_code_decodes_alike(name):
    generator = torch.Generator().manual_seed(3)
    buffer = torch.randint(0, 256, (6, rows.row_bytes(name, 256)), generator=generator)
    buffer = buffer.to(torch.uint8)
    found = rows.decode_rows(buffer, name, 256, torch.float32, backend="triton")
    assert same_bits(found, rows.decode_rows(buffer, name, 256, torch.float32))


@pytest.mark.parametrize(
    ("name", "given"), [*((name, True) for name in FORMATS), ("mxfp4-mbs-s", False)]
)
def test_permute_encode(name, given):
    x = rows_of_all_kinds(140, torch.bfloat16)
    generator = torch.Generator().manual_seed(4)
    row_token = torch.randint(-1, 8, (20,), generator=generator, dtype=torch.int32)
    positions = rows.inverse_positions(row_token, 8).to(torch.int32) if given else None
    found = rows.permute_encode(x, row_token, name, positions=positions, backend="triton")
    assert torch.equal(found, rows.permute_encode(x, row_token, name))


def test_inverse_positions():
    row_token = torch.tensor([2, 0, -1, 2, 2, 1])
    expected = [[1, -1, -1], [5, -1, -1], [0, 3, 4], [-1, -1, -1]]
    assert rows.inverse_positions(row_token, 4).tolist() == expected


@pytest.mark.parametrize("count", [0, 3])
def test_nothing_to_do(count):
    x = torch.zeros(0, 64)
    assert rows.encode_rows(x, "fp8", backend="triton").shape == (0, 80)
    padding = torch.full((count,), -1)
    assert not rows.permute_encode(x, padding, "fp8", backend="triton").any()
    empty = torch.zeros(0, 80, dtype=torch.uint8)
    assert not rows.decode_rows(empty, "fp8", 64, x.dtype, backend="triton").numel()


def test_columns_that_are_not_contiguous():
    x = rows_of_all_kinds(64, torch.float32)[:, ::2]
    assert torch.equal(rows.encode_rows(x, "mxfp4", backend="triton"), rows.encode_rows(x, "mxfp4"))


def test_mbs_d_is_refused():
    with pytest.raises(ConfigError, match="searched"):
        rows.encode_rows(torch.zeros(2, 64), "mxfp4-mbs-d", backend="triton")
