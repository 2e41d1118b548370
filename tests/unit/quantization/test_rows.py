"""Encoded rows: sizes, layout, independence of the rows beside them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import ConfigError
from moe_locality.quantization import mx, rows
from moe_locality.quantization.formats import FORMATS, bytes_per_row, row_bytes


def activations(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("name", rows.ROW_FORMATS)
@given(seed=st.integers(0, 999), count=st.integers(0, 5), width=st.integers(0, 300))
@settings(max_examples=8, deadline=None)
def test_encode_rows_a_row_decodes_to_what_the_format_says(name, seed, count, width):
    x = activations(seed, count, width)
    buffer = rows.encode_rows(x, name)
    assert buffer.shape == (count, row_bytes(name, width))
    assert buffer.is_contiguous()
    back = rows.decode_rows(buffer, name, width, torch.float32)
    assert torch.equal(back, mx.fake_quantize(x, name, role="activation"))


@pytest.mark.parametrize("name", rows.ROW_FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encode_rows_dtypes_and_strides(name, dtype):
    x = activations(1, 300, 6, dtype=dtype).t()
    back = rows.decode_rows(rows.encode_rows(x, name), name, 300, dtype)
    assert back.dtype == dtype
    assert torch.equal(back, mx.fake_quantize(x, name, role="activation"))


@pytest.mark.parametrize("name", rows.ROW_FORMATS)
def test_encode_rows_a_row_does_not_depend_on_its_neighbors(name):
    x = activations(2, 7, 200)
    x[3, 5] = torch.inf
    alone = torch.cat([rows.encode_rows(x[i : i + 1], name) for i in range(7)])
    assert torch.equal(rows.encode_rows(x, name), alone)


def test_encode_rows_sizes():
    for name in rows.ROW_FORMATS:
        for width in (1, 7, 128, 2048, 7168):
            exact, sent = bytes_per_row(name, width), row_bytes(name, width)
            assert exact <= sent < exact + 16 + 4
            assert sent % 16 == 0
    assert row_bytes("fp8", 2048) == 2048 + 64
    assert row_bytes("mxfp8", 2048) == 2048 + 64
    assert row_bytes("mxfp4", 2048) == 1024 + 64
    assert row_bytes("mxfp4-mbs-s", 2048) == 1024 + 16 + 128


@pytest.mark.parametrize("name", rows.ROW_FORMATS)
@given(seed=st.integers(0, 999), tokens=st.integers(1, 9), count=st.integers(0, 20))
@settings(max_examples=6, deadline=None)
def test_permute_encode_is_encode_of_the_permuted_rows(name, seed, tokens, count):
    x = activations(seed, tokens, 70)
    generator = torch.Generator().manual_seed(seed)
    row_token = torch.randint(-1, tokens, (count,), generator=generator, dtype=torch.int32)
    found = rows.permute_encode(x, row_token, name)
    expected = rows.encode_rows(x[row_token.clamp(min=0).long()], name)
    expected[row_token < 0] = 0
    assert torch.equal(found, expected)
    back = rows.decode_rows(found, name, 70, torch.float32)
    assert not back[row_token < 0].any()


def test_encode_rows_refusals():
    with pytest.raises(ConfigError, match="spans the whole tensor"):
        rows.encode_rows(torch.zeros(2, 4), "nvfp4")
    with pytest.raises(ConfigError, match="expected one of"):
        rows.encode_rows(torch.zeros(2, 4), "int4")
    with pytest.raises(ConfigError, match=r"expected \[N, D\]"):
        rows.encode_rows(torch.zeros(4), "fp8")
    with pytest.raises(ConfigError, match=r"uint8 \[N, 16\]"):
        rows.decode_rows(torch.zeros(2, 48, dtype=torch.uint8), "mxfp4", 20, torch.float32)


def test_encode_rows_every_other_format_has_rows():
    assert set(rows.ROW_FORMATS) == set(FORMATS) - {"nvfp4"}
