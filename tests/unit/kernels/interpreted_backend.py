"""The Triton kernels as Python on the CPU, against the definitions and the reference.

Collected by ``test_triton.py`` in a process of its own: Triton has to be told to interpret before
anything imports it. Programs run one after another there, so no race can be seen here.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.kernels import ops, triton_impl
from moe_locality.kernels.backends import GateSpec
from tests.tolerances import KERNEL_SUM
from tests.unit.kernels import oracle
from tests.unit.kernels.test_gate import SPECS
from tests.unit.kernels.test_row_map import requests

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(0, 2, 4, 8), (1, 1, 1, 5), (7, 3, 3, 16), (13, 2, 5, 31), (5, 8, 4, 64)]
"""(T, K, E, D): no token, one expert, K = E, primes, K > E."""


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_moves_are_equal_and_sums_are_near(shape, dtype):
    tokens, top_k, experts, width = shape
    ids = oracle.random_ids(tokens, top_k, experts, 5)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    weights = torch.rand(tokens, top_k, generator=generator)
    for num_rows, alignment in ((None, 1), (None, 4), (tokens * top_k + experts * 4 + 9, 4)):
        mapping = ops.row_map(ids, experts, num_rows=num_rows, alignment=alignment)
        used = int(mapping.slot_offsets[-1])
        rows = ops.permute(x, mapping, backend="triton")
        assert torch.equal(rows[:used], ops.permute(x, mapping)[:used])
        also, row_weights = ops.permute_with_weights(x, weights, mapping, backend="triton")
        assert torch.equal(also[:used], rows[:used])
        wanted_weights = ops.permute_with_weights(x, weights, mapping)[1]
        assert torch.equal(row_weights[:used], wanted_weights[:used])
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
    back = ops.permute_with_weights_backward(
        poisoned, weights.new_ones(len(rows)), positions, backend="triton"
    )
    reference = ops.permute_backward(poisoned, positions)
    three_way(back[0], reference, oracle.combine(rows, positions, None), dtype)
    assert torch.equal(back[1], (positions >= 0).float())


def test_a_plain_list_of_rows():
    x = torch.randn(6, 10)
    index = torch.tensor([5, 0, 0, 3])
    assert torch.equal(ops.permute(x, index, backend="triton"), x[index])
    assert ops.permute(x, index[:0], backend="triton").shape == (0, 10)


def test_a_width_of_several_tiles(monkeypatch):
    monkeypatch.setattr(triton_impl, "_tile", lambda *a, **k: (2, 16, 4))
    ids = oracle.random_ids(5, 2, 3, 0)
    mapping = ops.row_map(ids, 3, alignment=2)
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
    target, _ = triton_impl.permute(
        rows[-tokens:], torch.empty(count, dtype=torch.int32), positions, positions, None, None
    )
    assert torch.equal(target[-tokens:], rows[-tokens:])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_gate_picks_the_same_experts(spec, with_bias):
    generator = torch.Generator().manual_seed(7)
    # quarters: many exact ties, and sums without rounding where keys are the logits
    logits = (torch.randn(33, 12, generator=generator) * 4).round() / 4
    logits[0] = 0
    bias = torch.randn(12, generator=generator) if with_bias else None
    ids, weights = ops.gate(logits, spec, bias=bias, backend="triton")
    wanted_ids, wanted = ops.gate(logits, spec, bias=bias)
    if spec.num_groups == 1 or spec.group_score == "max":
        assert torch.equal(ids, wanted_ids)
    three_way(weights, wanted, oracle.gate(logits, spec, bias)[1], torch.float32)
    grad = torch.randn(weights.shape, generator=generator)
    found = ops.gate_backward(grad, logits, wanted_ids, spec, backend="triton")
    reference = ops.gate_backward(grad, logits, wanted_ids, spec)
    exact = ops.gate_backward(grad.double(), logits.double(), wanted_ids, spec)
    three_way(found, reference, exact, torch.float32)


def test_the_gate_of_no_number_stays_inside():
    logits = torch.full((2, 5), float("nan"))
    logits[1] = float("-inf")
    ids, _ = ops.gate(logits, GateSpec(top_k=5), backend="triton")
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gate_takes_narrow_logits(dtype):
    logits = torch.randn(9, 7, generator=torch.Generator().manual_seed(2)).to(dtype)
    ids, weights = ops.gate(logits, GateSpec(top_k=3), backend="triton")
    wanted_ids, wanted = ops.gate(logits, GateSpec(top_k=3))
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights, wanted, rtol=1e-5, atol=1e-6)
