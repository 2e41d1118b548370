import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.dispatch.hierarchical import ALIGNMENT, wire_format

DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int16, torch.int32]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 5),
    st.lists(st.tuples(st.integers(1, 9), st.sampled_from(DTYPES)), min_size=2, max_size=3),
    st.integers(0, 2**32 - 1),
)
def test_what_is_packed_comes_out_again(count, shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.randint(0, 100, (count, width), generator=generator).to(dtype)
        for width, dtype in shapes
    ]
    wire = wire_format(*parts)
    buffer = wire.pack(parts)
    assert buffer.dtype == torch.uint8
    assert buffer.shape == (count, wire.row_bytes)
    assert wire.row_bytes % ALIGNMENT == 0
    assert wire.extra_bytes == wire.row_bytes - parts[0].shape[1] * parts[0].element_size()
    order = torch.randperm(count, generator=generator)
    for part, found in zip(parts, wire.unpack(buffer[order]), strict=True):
        assert torch.equal(found, part[order])


def test_the_same_values_make_the_same_bytes():
    rows, slots = torch.ones(2, 3), torch.ones(2, 1, dtype=torch.int16)
    wire = wire_format(rows, slots)
    assert torch.equal(wire.pack([rows, slots]), wire.pack([rows, slots]))
    assert wire.pack([rows, slots])[:, 12:16].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_part_travels_as_it_is(dtype):
    rows = torch.ones(3, 5).to(dtype)
    wire = wire_format(rows, None)
    assert wire.pack([rows]) is rows
    assert wire.unpack(rows)[0] is rows
    assert wire.extra_bytes == 0
