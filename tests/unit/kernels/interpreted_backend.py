"""The Triton kernels as Python on the CPU, against the definitions and the reference.

Collected by ``test_triton.py`` in a process of its own: Triton has to be told to interpret before
anything imports it. Programs run one after another there, so no race can be seen here.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.dispatch import SlotMap
from moe_locality.dispatch.flat import fixed_rows
from moe_locality.kernels import ops, triton_impl
from tests.tolerances import KERNEL_SUM
from tests.unit.kernels import oracle
from tests.unit.kernels.test_row_map import requests
from tests.unit.placement.cases import plans_with_traces

CASES = [
    ((0, 2, 4, 8), torch.float32),  # no token
    ((1, 1, 1, 5), torch.float32),  # one expert
    ((7, 3, 3, 16), torch.float32),  # K = E
    ((7, 3, 3, 16), torch.float16),
    ((7, 3, 3, 16), torch.bfloat16),
    ((13, 2, 5, 31), torch.bfloat16),  # primes
    ((5, 8, 4, 64), torch.float16),  # K > E
]
"""(T, K, E, D) and the type of the rows, which the loops over shapes do not depend on."""


@settings(max_examples=25, deadline=None)
@given(requests(), st.booleans())
def test_the_map_is_its_definition(wanted, many_blocks):
    options = dict(wanted)
    ids, slots = options.pop("ids"), options.pop("num_slots")
    with pytest.MonkeyPatch.context() as patch:
        if many_blocks:
            shape = triton_impl.map_shape
            patch.setattr(triton_impl, "map_shape", lambda *a: small_blocks(shape(*a), a[0]))
        found = ops.row_map(ids, slots, **options, backend="triton")
    oracle.assert_map(found, oracle.row_map(**wanted))


@settings(max_examples=20, deadline=None)
@given(plans_with_traces(rules=("visited",)), st.booleans())
def test_serve_visited_is_the_reference(case, turned):
    """[F1]"""
    plan, trace = case
    for rank in range(plan.num_ranks):
        for layer, one in enumerate(SlotMap.of_plan(plan, rank)):
            ids = torch.from_numpy(trace.expert_ids[:, layer]).int()
            wanted = one.slot_ids(ids, kernels="reference")
            ids = ids.t().contiguous().t() if turned else ids
            assert one.slot_ids(ids, kernels="triton").tolist() == wanted.tolist()


def small_blocks(shape, num_tokens):
    """Blocks of four tokens, so that a few tokens make several blocks."""
    return shape | {"TB": 4, "blocks": max(1, -(-num_tokens // 4)), "CHUNK": 2}


def test_ids_of_any_stride_and_integer_dtype_give_the_same_map():
    ids = oracle.random_ids(9, 3, 5, 0)
    wanted = oracle.row_map(ids, 5)
    for other in (ids.long(), ids.t().contiguous().t(), ids.to(torch.int16)):
        oracle.assert_map(ops.row_map(other, 5, backend="triton"), wanted)


def three_way(found, reference, exact, dtype):
    """The kernel is as near to the float64 result as the reference is, within the dtype's bound."""
    rtol, atol = KERNEL_SUM[str(dtype).removeprefix("torch.")]
    for result in (found, reference):
        torch.testing.assert_close(result.double(), exact, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_moves_are_equal_and_sums_are_near(shape, dtype):
    tokens, top_k, experts, width = shape
    ids = oracle.random_ids(tokens, top_k, experts, 5)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator)
    maps = [ops.row_map(ids, experts, num_rows=num_rows) for num_rows in (None, ids.numel() + 9)]
    for mapping in (*maps, fixed_rows(ids, experts, 4, "reference")):
        used = int(mapping.slot_offsets[-1])
        rows = ops.permute(x, mapping, backend="triton")
        assert torch.equal(rows[:used], ops.permute(x, mapping)[:used])
        check_sums(mapping, weights, width, dtype, used)


def check_sums(mapping, weights, width, dtype, used):
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(len(mapping.row_token), width, generator=generator).to(dtype)
    poisoned = rows.clone()
    poisoned[mapping.row_token < 0] = float("nan")  # padding and the end: never read
    positions = mapping.positions
    for factors in (weights, None):
        found = ops.combine(poisoned, positions, factors, backend="triton")
        reference = ops.combine(poisoned, positions, factors)
        three_way(found, reference, oracle.combine(rows, positions, factors), dtype)
    grad = torch.randn(len(positions), width, generator=generator).to(dtype)
    found = ops.combine_backward(grad, poisoned, mapping, weights, backend="triton")
    reference = ops.combine_backward(grad, poisoned, mapping, weights)
    exact = ops.combine_backward(grad.double(), rows.double(), mapping, weights.double())
    three_way(found[0][:used], reference[0][:used], exact[0][:used], dtype)
    three_way(found[1], reference[1], exact[1], torch.float32)
    back = ops.permute_backward(poisoned, positions, backend="triton")
    reference = ops.permute_backward(poisoned, positions)
    three_way(back, reference, oracle.combine(rows, positions, None), dtype)


def test_a_plain_list_of_rows():
    x = torch.randn(6, 10)
    index = torch.tensor([5, 0, 0, 3])
    assert torch.equal(ops.permute(x, index, backend="triton"), x[index])
    assert ops.permute(x, index[:0], backend="triton").shape == (0, 10)


def test_a_width_of_several_tiles(monkeypatch):
    monkeypatch.setattr(triton_impl, "_tile", lambda *a, **k: (2, 16, 4))
    ids = oracle.random_ids(5, 2, 3, 0)
    mapping = fixed_rows(ids, 3, 4, "reference")
    x, weights = torch.randn(5, 40), torch.rand(5, 2)
    rows = ops.permute(x, mapping, backend="triton")
    assert torch.equal(rows, ops.permute(x, mapping))
    check_sums(mapping, weights, 40, torch.float32, len(rows))


def test_only_what_is_asked_for_is_made():
    mapping = ops.row_map(oracle.random_ids(5, 2, 3, 0), 3)
    grad, weights = torch.randn(5, 8), torch.rand(5, 2)
    rows, gates = ops.combine_backward(grad, None, mapping, weights, backend="triton")
    assert gates is None
    assert torch.equal(rows, ops.combine_backward(grad, None, mapping, weights)[0])
    held = torch.randn(len(rows), 8)
    rows, gates = ops.combine_backward(
        grad, held, mapping, weights, need_rows=False, backend="triton"
    )
    assert rows is None
    assert gates is not None


def test_rows_beyond_two_to_the_31_elements():
    """Untouched memory costs nothing, so only the last rows of four gigabytes are real."""
    width, tokens = 256, 3
    count = 2**31 // width + tokens
    rows = torch.empty(count, width, dtype=torch.float16)
    rows[-tokens:] = torch.arange(tokens * width).view(tokens, width) / 64
    positions = torch.arange(count - tokens, count, dtype=torch.int32).view(tokens, 1)
    found = ops.combine(rows, positions, None, backend="triton")
    assert torch.equal(found, rows[-tokens:])
    index = torch.arange(count - tokens, count)
    assert torch.equal(ops.permute(rows, index, backend="triton"), rows[-tokens:])
    target = triton_impl.permute(
        rows[-tokens:], torch.empty(count, dtype=torch.int32), positions, None
    )
    assert torch.equal(target[-tokens:], rows[-tokens:])
