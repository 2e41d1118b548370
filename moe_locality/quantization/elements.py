"""Elements and scales as bits: E2M1, E4M3, E5M2, E8M0, and powers of two that never misround.

Everything works on float32 and int32/uint8 tensors of any shape, on any device.
"""

import torch
from torch import Tensor

E8M0_NAN = 255
E8M0_BIAS = 127
E4M3_NAN = 0x7F

EMAX = {"e2m1": 2, "e4m3": 8, "e5m2": 15}
"""Exponent of the largest normal number (OCP MX v1.0, table 1: emax_elem)."""

MAX = {"e2m1": 6.0, "e4m3": 448.0, "e5m2": 57344.0}
"""The largest finite number."""

MANTISSA_BITS = {"e2m1": 1, "e4m3": 3, "e5m2": 2}
EXPONENT_BIAS = {"e2m1": 1, "e4m3": 7, "e5m2": 15}

_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_TINY_SHIFT = 24
_SMALLEST_NORMAL = 2.0**-126


def exponent_and_mantissa(a: Tensor) -> tuple[Tensor, Tensor]:
    """Split finite ``a >= 0`` into ``floor(log2 a)`` and the 23 mantissa bits, both int32.

    Subnormals are normalized first. Zero gives an exponent below that of every other number.
    """
    tiny = a < _SMALLEST_NORMAL
    bits = torch.where(tiny, a * 2.0**_TINY_SHIFT, a).view(torch.int32)
    exponent = (bits >> 23) - 127 - _TINY_SHIFT * tiny.to(torch.int32)
    return exponent, bits & 0x7FFFFF


def power_of_two(exponent: Tensor) -> Tensor:
    """Return ``2 ** exponent`` for int32 exponents in the normal range, -126 to 127."""
    return ((exponent + 127) << 23).view(torch.float32)


def times_power_of_two(x: Tensor, exponent: Tensor) -> Tensor:
    """Return ``x * 2 ** exponent`` for exponents in -252 to 252.

    Two factors, each a normal number: exact as long as the result is normal.
    """
    half = exponent >> 1
    return x * power_of_two(half) * power_of_two(exponent - half)


def scale_of_e8m0(scales: Tensor) -> Tensor:
    """Return the float32 value of E8M0 scales (OCP MX v1.0, 5.4.1): ``2 ** (s - 127)``, 255 is
    NaN.
    """
    wide = scales.to(torch.int32)
    bits = torch.where(wide == 0, 0x00400000, wide << 23)  # 2^-127 is subnormal in float32
    return torch.where(wide == E8M0_NAN, 0x7FC00000, bits).view(torch.float32)


def encode_elements(y: Tensor, element: str) -> Tensor:
    """Round scaled values to the grid of the element, uint8 codes of the same shape.

    Round to nearest, ties to even; what exceeds the largest number becomes it, with its sign (OCP
    MX v1.0, 6.3). E2M1 codes are 0 to 15: sign, two bits of exponent, one of mantissa.
    """
    largest = MAX[element]
    if element != "e2m1":
        clamped = y.clamp(-largest, largest)  # the conversion alone gives NaN beyond it
        return clamped.to(_DTYPES[element]).view(torch.uint8)
    a = y.abs().clamp(max=largest)
    # steps of the grid: 0.5 below 2, 1 below 4, 2 up to 6; torch.round takes ties to even
    inverse = torch.where(a < 2, 2.0, torch.where(a < 4, 1.0, 0.5))
    steps = torch.round(a * inverse)
    first = torch.where(a < 2, 0.0, torch.where(a < 4, 2.0, 4.0))
    return (steps + first).to(torch.uint8) | (torch.signbit(y).to(torch.uint8) << 3)


def round_e2m1(y: Tensor) -> Tensor:
    """Return the E2M1 numbers that scaled values are rounded to: ``decode(encode(y))``, quicker."""
    a = y.abs().clamp_(max=6.0)
    step = torch.where(a < 2, 0.5, torch.where(a < 4, 1.0, 2.0))
    return torch.copysign(torch.round(a / step).mul_(step), y)


def decode_elements(codes: Tensor, element: str) -> Tensor:
    """Return the float32 values of uint8 codes."""
    if element != "e2m1":
        return codes.view(_DTYPES[element]).to(torch.float32)
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=codes.device)
    return torch.cat([grid, -grid])[codes.to(torch.int32)]


def pack_pairs(codes: Tensor) -> Tensor:
    """Pack 4-bit codes [..., W] into bytes [..., ceil(W / 2)], the first of a pair in the low half.

    An odd last code is paired with zero.
    """
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_pairs(packed: Tensor, width: int) -> Tensor:
    """Return the 4-bit codes [..., width] of bytes [..., ceil(width / 2)]."""
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)[..., :width]
