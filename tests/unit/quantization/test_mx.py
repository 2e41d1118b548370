"""The low-bit formats against their definitions, against torch's and against ml_dtypes' numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_locality.errors import ConfigError
from moe_locality.quantization import formats as el
from moe_locality.quantization import mx
from moe_locality.quantization.formats import FORMATS, bytes_per_row, get_format


@pytest.fixture
def ml_dtypes():
    return pytest.importorskip("ml_dtypes", reason="the independent oracle is not installed")


E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
POWER_OF_TWO = ["mxfp4", "mxfp4-16", "mxfp4-16-oas", "mxfp8", "mxfp8-e5m2"]
MBS = ["mxfp4-mbs-s", "mxfp4-mbs-d", "mxfp4-mbs-h"]
MX4 = ["mxfp4", "mxfp4-16", "mxfp4-16-oas", *MBS]


def quantize(x, name):
    return mx.quantize(x, name, role="weight")


def round_trip(x, name):
    return mx.fake_quantize(x, name, role="weight")


def values(seed, *shape, scale=1.0):
    """Numbers over many magnitudes, with zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * torch.exp2(torch.randint(-6, 7, shape, generator=generator).float())
    x[torch.rand(shape, generator=generator) < 0.05] = 0
    return x * scale


# ---- elements and scales --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("element", "dtype"),
    [("e2m1", "float4_e2m1fn"), ("e4m3", "float8_e4m3fn"), ("e5m2", "float8_e5m2")],
)
def test_encode_elements_equal_an_independent_implementation(ml_dtypes, element, dtype):
    dtype = getattr(ml_dtypes, dtype)
    largest = el.ELEMENT_MAX[element]
    grid = np.arange(256 if element != "e2m1" else 16, dtype=np.uint8).view(dtype)
    finite = np.unique(np.abs(grid[np.isfinite(grid.astype(np.float32))].astype(np.float32)))
    between = (finite[1:] + finite[:-1]) / 2  # every tie, and its neighbors
    y = np.concatenate([finite, between, np.nextafter(between, 0), np.nextafter(between, 1e9)])
    y = np.concatenate([y, -y, values(1, 4000).numpy() * largest / 64]).astype(np.float32)
    codes = el.encode_elements(torch.from_numpy(y), element)
    expected = np.clip(y, -largest, largest).astype(dtype)
    assert np.array_equal(codes.numpy(), expected.view(np.uint8))
    back = el.decode_elements(codes, element).numpy()
    assert np.array_equal(back.view(np.int32), expected.astype(np.float32).view(np.int32))


def test_round_e2m1_equals_encoding():
    y = values(2, 5000)
    both = el.round_e2m1(y), el.decode_elements(el.encode_elements(y, "e2m1"), "e2m1")
    assert torch.equal(both[0].view(torch.int32), both[1].view(torch.int32))


def test_scale_of_e8m0_equals_an_independent_implementation(ml_dtypes):
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    found = el.scale_of_e8m0(torch.from_numpy(codes)).numpy()
    assert np.array_equal(found, expected, equal_nan=True)
    assert math.isnan(found[255])


@pytest.mark.parametrize("exponent", [-252, -200, -127, -1, 0, 1, 127, 200])
def test_power_of_two_is_exact(exponent):
    x = torch.tensor([1.5, -3.0, 2.0**-120, 2.0**-149, 2.0**100])
    found = el.times_power_of_two(x, torch.tensor(exponent, dtype=torch.int32)).double()
    exact = x.double() * 2.0**exponent
    inside = (exact.abs() >= 2.0**-126) & (exact.abs() < 2.0**128)
    assert torch.equal(found[inside], exact[inside])


@pytest.mark.parametrize("width", [0, 1, 2, 7, 32])
def test_pack_pairs(width):
    codes = torch.randint(0, 16, (3, width), dtype=torch.uint8)
    packed = el.pack_pairs(codes)
    assert packed.shape == (3, -(-width // 2))
    assert torch.equal(el.unpack_pairs(packed, width), codes)
    if width == 2:
        assert torch.equal(packed[:, 0], codes[:, 0] + 16 * codes[:, 1])


# ---- scales of blocks: straight from the definitions ------------------------------------------


def defined_exponent(a, name):
    """log2 of the scale by the definition, in exact arithmetic, for a > 0."""
    if name in ("mxfp8", "mxfp8-e5m2", "mxfp4", "mxfp4-16"):  # OCP MX v1.0, 6.3
        return math.frexp(a)[1] - 1 - el.ELEMENT_EMAX[get_format(name).element]
    exponent = next(e for e in range(-200, 200) if 3 < a / 2.0**e <= 6)  # into (3, 6] ...
    return exponent - 1 if a / 2.0**exponent <= 3.5 else exponent  # ... doubled up to 3.5


@pytest.mark.parametrize("name", POWER_OF_TWO)
@pytest.mark.parametrize("mantissa", [1.0, 1.25, 1.5, 1.5000001, 1.75, 1.7500002, 1.9999999])
@pytest.mark.parametrize("power", [-100, -3, 0, 60])
def test_quantize_scale_of_a_block_is_the_defined_one(name, mantissa, power):
    a = float(np.float32(mantissa * 2.0**power))
    x = torch.zeros(get_format(name).block)
    x[3] = -a
    assert int(quantize(x, name).scales[0]) == defined_exponent(a, name) + 127


def test_quantize_mbs_s_factor_is_the_defined_one():
    for a in (6.0, 5.0, 1.0, 3.99, 1e-3, 7e20, 3.4e38):
        x = torch.zeros(128)
        x[100] = a
        wanted = (np.float32(6) / np.float32(a)).view(np.int32) & 0x007F8000
        q = quantize(x, "mxfp4-mbs-s")
        assert int(q.factors[0]) == wanted >> 15
        largest = float(mx.dequantize(q).max())
        assert largest == pytest.approx(a, rel=0.004)  # it lands on 6, but for the cut mantissa


@given(seed=st.integers(0, 10**6), rows=st.integers(1, 3))
@settings(max_examples=8, deadline=None)
def test_quantize_mbs_d_is_the_best_slot_and_never_worse(seed, rows):
    x = values(seed, rows, 256)
    fmt = get_format("mxfp4-mbs-d")
    chosen = quantize(x, "mxfp4-mbs-d").factors.flatten()
    macro = x.view(-1, 8, 16)
    errors = torch.stack(
        [mx.squared_error(macro, torch.full_like(chosen, 16 * j), fmt) for j in range(16)]
    )
    assert torch.equal(chosen.long(), 16 * errors.argmin(dim=0))
    plain = (round_trip(x, "mxfp4-16-oas") - x).double().view(-1, 128).square().sum(1)
    ours = (round_trip(x, "mxfp4-mbs-d") - x).double().view(-1, 128).square().sum(1)
    assert (ours <= plain * (1 + 1e-12)).all()


def test_quantize_mbs_h_is_d_for_weights_and_s_for_activations():
    x = values(3, 4, 256)
    for role, name in (("weight", "mxfp4-mbs-d"), ("activation", "mxfp4-mbs-s")):
        mixed, pure = mx.quantize(x, "mxfp4-mbs-h", role=role), mx.quantize(x, name)
        assert torch.equal(mixed.codes, pure.codes)
        assert torch.equal(mixed.factors, pure.factors)
    with pytest.raises(ConfigError, match="role='weight'"):
        mx.quantize(x, "mxfp4-mbs-h")


def test_quantize_nvfp4_by_hand():
    x = torch.zeros(32)
    x[0], x[1], x[16], x[17] = 2688.0, 1000.0, 3.0, 1.0
    q = quantize(x, "nvfp4")
    assert float(q.tensor_scale) == 1.0  # 2688 = 448 * 6
    scales = q.scales.view(torch.float8_e4m3fn).float()
    assert scales.tolist() == [448.0, 0.5]
    assert mx.dequantize(q)[[0, 1, 16, 17]].tolist() == [2688.0, 896.0, 3.0, 1.0]


def test_quantize_fp8_by_hand():
    x = torch.zeros(130)
    x[0], x[1], x[128] = 448 * 4.0, 5.0, 2.0**-140
    q = quantize(x, "fp8")
    assert q.scales.tolist() == [4.0, 2.0**-126]
    assert q.codes.view(torch.float8_e4m3fn).float()[[0, 1]].tolist() == [448.0, 1.25]
    assert mx.dequantize(q)[128] == 0


# ---- properties -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MX4)
def test_quantize_what_the_format_holds_comes_back(name):
    """Grid numbers times powers of two, the largest of each macro block 6 times one."""
    generator = torch.Generator().manual_seed(5)
    grid = torch.tensor(E2M1)
    codes = torch.randint(0, 8, (64, 8, 16), generator=generator)
    codes[:, :, 0] = 7
    sign = torch.randint(0, 2, codes.shape, generator=generator) * 2.0 - 1
    power = torch.randint(-100, 100, (64, 1, 1), generator=generator)
    block_power = power - torch.randint(0, 5, (64, 8, 1), generator=generator)
    if name == "mxfp4":  # blocks of 32
        block_power[:, 1::2] = block_power[:, 0::2]
    block_power[:, :2] = power
    x = (sign * grid[codes] * torch.exp2(block_power.float())).view(64, 128)
    assert torch.equal(round_trip(x, name), x)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp8-e5m2", "fp8"])
@pytest.mark.parametrize("power", [-90, -1, 0, 70])
def test_quantize_every_8_bit_number_comes_back(name, power):
    fmt = get_format(name)
    codes = torch.arange(256, dtype=torch.uint8)
    held = el.decode_elements(codes, fmt.element)
    held = held[held.isfinite()]
    held = held[torch.randperm(len(held), generator=torch.Generator().manual_seed(power % 97))]
    rows = torch.nn.functional.pad(held, (0, -len(held) % (fmt.block - 1))).view(-1, fmt.block - 1)
    largest = torch.full((len(rows), 1), el.ELEMENT_MAX[fmt.element])
    x = torch.cat([rows, largest], dim=1) * 2.0**power
    q = quantize(x, name)
    assert torch.equal(mx.dequantize(q).view(torch.int32), x.view(torch.int32))
    assert len(q.codes.unique()) == len(held)  # the two zeros as well


def test_quantize_what_nvfp4_holds_comes_back():
    """Grid numbers times every scale that a block may have; each block has a 6."""
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    generator = torch.Generator().manual_seed(13)
    codes = torch.randint(0, 16, (len(scales), 16), generator=generator).to(torch.uint8)
    codes[:, 5] = 15
    for tensor_scale in (1.0, 2.0**-20, 2.0**90):
        x = el.decode_elements(codes, "e2m1") * scales[:, None] * tensor_scale
        q = quantize(x.flatten(), "nvfp4")
        assert float(q.tensor_scale) == tensor_scale
        assert torch.equal(mx.dequantize(q).view_as(x), x)


@pytest.mark.parametrize("name", POWER_OF_TWO)
def test_quantize_a_second_round_trip_changes_nothing(name):
    once = round_trip(values(6, 20, 128), name)
    assert torch.equal(round_trip(once, name), once)


@pytest.mark.parametrize("name", FORMATS)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 200))
@settings(max_examples=6, deadline=None)
def test_quantize_sign_symmetric(name, seed, width):
    x = values(seed, 3, width)
    assert torch.equal(round_trip(-x, name), -round_trip(x, name))


@pytest.mark.parametrize("name", FORMATS)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=6, deadline=None)
def test_quantize_monotone_within_what_shares_a_scale(name, seed):
    x = values(seed, 4, 16).sort(dim=1).values
    assert (round_trip(x, name).diff(dim=1) >= 0).all()


@pytest.mark.parametrize("name", MX4)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 300))
@settings(max_examples=6, deadline=None)
def test_quantize_error_of_every_element_is_bounded(name, seed, width):
    """Half a step of the grid; above 6, the distance to 6: at most 1 with OAS, 2 without."""
    x = values(seed, 2, width)
    q = quantize(x, name)
    fmt = get_format(name)
    scale = el.scale_of_e8m0(q.scales).repeat_interleave(fmt.block, dim=1)[:, :width].double()
    if q.factors is not None:
        factor = 1 + q.factors.double() / 256
        scale = scale / factor.repeat_interleave(128, dim=1)[:, :width]
    y = (x.double() / scale).abs()
    assert float(y.max()) <= (8.0 if fmt.scale_rule == "floor" else 7.0) * (1 + 1e-6)
    step = torch.where(y < 2, 0.5, torch.where(y < 4, 1.0, 2.0))
    bound = torch.where(y <= 6, step / 2, y - 6) * (1 + 1e-5) + 1e-6 * y
    error = (mx.dequantize(q, torch.float32).double() - x.double()).abs() / scale
    assert (error <= bound).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantize_equal_numbers_in_another_dtype_give_equal_codes(name, dtype):
    x = values(7, 5, 130, scale=0.25).to(dtype)
    narrow, wide = quantize(x, name), quantize(x.float(), name)
    assert torch.equal(narrow.codes, wide.codes)
    assert torch.equal(narrow.scales, wide.scales)
    assert mx.dequantize(narrow).dtype == dtype
    assert torch.equal(mx.dequantize(narrow), mx.dequantize(wide, dtype))


@pytest.mark.parametrize("name", FORMATS)
def test_quantize_what_cannot_be_held_is_never_infinite(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        largest = torch.finfo(dtype).max
        x = torch.linspace(-1, 1, 256).mul(largest).to(dtype)
        back = round_trip(x, name)
        assert back.isfinite().all()
        assert float((back.double() - x.double()).abs().max() / largest) < 0.26


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_quantize_nan_and_infinity_spoil_their_block_and_nothing_else(name, bad):
    block = get_format(name).block
    x = values(8, 2, 384)
    clean = quantize(x, name)
    x[1, block + 3] = bad
    q = quantize(x, name)
    back = mx.dequantize(q)
    assert back[1, block : 2 * block].isnan().all()
    assert int(back.isnan().sum()) == block
    assert torch.equal(q.scales[0], clean.scales[0])
    if get_format(name).scale_rule in ("floor", "oas"):
        assert int(q.scales[1, 1]) == 255


@pytest.mark.parametrize("name", FORMATS)
def test_quantize_zeros(name):
    x = torch.zeros(3, 200)
    x[:, 5] = -0.0
    assert torch.equal(round_trip(x, name).view(torch.int32), x.view(torch.int32))
    if name in MBS:
        assert not quantize(x, name).factors.any()  # all slots are equally good: the first


@pytest.mark.parametrize("name", [*POWER_OF_TWO, *MBS])
@pytest.mark.parametrize("power", [-60, 1, 115, 122])
def test_quantize_powers_of_two_move_the_scales_and_nothing_else(name, power):
    x = values(12, 4, 256).clamp(-31.9, 31.9)  # below 2^5: up to the largest float32
    near, far = quantize(x, name), quantize(x * 2.0**power, name)
    assert torch.equal(near.codes, far.codes)
    held = near.scales != 0  # a block of zeros has the smallest scale
    assert torch.equal(far.scales[held].int(), near.scales[held].int() + power)


@pytest.mark.parametrize("name", [*POWER_OF_TWO, *MBS])
def test_quantize_subnormal_inputs(name):
    """Below the smallest E8M0 scale the grid stays where it is: error at most half its step."""
    x = values(9, 4, 128, scale=1e-40)
    step = {"e2m1": 0.5, "e4m3": 2.0**-9, "e5m2": 2.0**-16}[get_format(name).element]
    error = (round_trip(x, name).double() - x.double()).abs()
    floor = step / 2 * 2.0**-127
    assert (error <= torch.maximum(x.double().abs() / 4, torch.tensor(floor).double())).all()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(0,), (1,), (33,), (3, 0), (0, 64), (2, 3, 129), (4, 17)])
def test_quantize_shapes_and_sizes(name, shape):
    x = values(10, *shape)
    q = quantize(x, name)
    back = mx.dequantize(q)
    assert back.shape == x.shape
    assert back.dtype == x.dtype
    rows = math.prod(shape[:-1])
    assert q.num_bytes == rows * bytes_per_row(name, shape[-1]) + (4 if name == "nvfp4" else 0)
    fmt = get_format(name)
    assert q.codes.shape == (*shape[:-1], -(-shape[-1] // fmt.codes_per_byte))
    if math.prod(shape) and name != "nvfp4":  # what follows a short last block changes nothing
        longer = round_trip(torch.nn.functional.pad(x, (0, 128)), name)
        assert torch.equal(longer[..., : shape[-1]], back)


def test_quantize_bits_per_element():
    bits = {name: 8 * bytes_per_row(name, 4096) / 4096 for name in FORMATS}
    assert bits["mxfp4"] == 4.25
    assert bits["mxfp4-16"] == bits["mxfp4-16-oas"] == bits["nvfp4"] == 4.5
    assert {bits[name] for name in MBS} == {4.5625}
    assert bits["mxfp8"] == bits["mxfp8-e5m2"] == bits["fp8"] == 8.25


def test_quantize_order_of_quality_on_laplace_numbers():
    """The steps of arXiv 2603.08713, sections 4.2 and 4.3, in signal to noise."""
    x = torch.distributions.Laplace(0.0, 1.0)
    torch.manual_seed(11)
    x = x.sample((128, 1024))
    order = ["mxfp4", "mxfp4-16", "mxfp4-16-oas", "mxfp4-mbs-s", "mxfp4-mbs-d", "nvfp4", "mxfp8"]
    db = {}
    for name in order:
        error = (round_trip(x, name) - x).double().square().sum()
        db[name] = float(10 * torch.log10(x.double().square().sum() / error))
    assert sorted(order, key=db.get) == order
    assert db["mxfp4-16-oas"] - db["mxfp4-16"] == pytest.approx(0.57, abs=0.1)


@pytest.mark.parametrize(
    ("x", "name", "message"),
    [
        (torch.zeros(4), "mxfp5", "expected one of mxfp4, mxfp4-16"),
        (torch.zeros(4, dtype=torch.int32), "mxfp4", "int32"),
        (torch.zeros(4, dtype=torch.float64), "mxfp4", "float64"),
        (torch.zeros(()), "mxfp4", "at least one"),
    ],
)
def test_quantize_refusals(x, name, message):
    with pytest.raises(ConfigError, match=message):
        mx.quantize(x, name)
