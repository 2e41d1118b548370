"""Low-bit block formats in plain torch: the numerics that every other implementation is held to.

Definitions with their sources are in ``formats`` and here. All arithmetic is float32, element by
element, so a row's result depends on nothing but the row (NVFP4: on the tensor's largest magnitude
too) and is the same on every device.

Not-a-number and infinity: OCP MX v1.0 says that a block whose scale is NaN holds NaN throughout
(5.2) and leaves open how a converter treats NaN and infinity (6.3). Here any of them makes the
scale of its block NaN: 4-bit elements have no code for either, and a silent largest number would
hide an overflow. The block's neighbors are not touched. Formats with E8M0 scales hold magnitudes
down to half of 2^-127; what is smaller becomes zero. What decodes past the largest finite number of
the result's dtype becomes that number.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_locality.errors import ConfigError
from moe_locality.quantization.formats import (
    E4M3_NAN,
    E8M0_BIAS,
    E8M0_NAN,
    ELEMENT_EMAX,
    ELEMENT_MAX,
    MACRO_BLOCK,
    SMALLEST_NORMAL,
    Format,
    Role,
    decode_elements,
    encode_elements,
    exponent_and_mantissa,
    get_format,
    pack_pairs,
    resolve_factor_rule,
    round_e2m1,
    scale_of_e8m0,
    times_power_of_two,
    unpack_pairs,
)

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SLOTS = 16
_SEARCHED_AT_ONCE = 4096  # macro blocks: 2 MiB, so that the passes of MBS-D stay in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTensor:
    """A tensor in a low-bit format, W its last dimension.

    ``codes`` uint8 ``[..., W]`` (8-bit elements) or ``[..., ceil(W/2)]`` (two E2M1 codes per byte,
    the first in the low half). ``scales`` ``[..., ceil(W/block)]``: uint8 bits of E8M0 or E4M3, or
    float32. ``factors`` uint8 ``[..., ceil(W/128)]``: m8 of the MBS factor ``1 + m8/256``, None
    without MBS. ``tensor_scale`` float32 []: NVFP4 only. ``dtype`` is what decoding returns.
    """

    codes: Tensor
    scales: Tensor
    factors: Tensor | None
    tensor_scale: Tensor | None
    shape: torch.Size
    format: str
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of all parts."""
        parts = (self.codes, self.scales, self.factors, self.tensor_scale)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


def quantize(x: Tensor, format: str, *, role: Role | None = None) -> QuantizedTensor:
    """Quantize ``x [..., W]`` (float32, bfloat16 or float16) along its last dimension.

    ``role`` (``"weight"`` or ``"activation"``) is needed by ``mxfp4-mbs-h`` alone. A last block
    that is not full is a block of its own: only the real elements count.

    Raises:
        ConfigError: unknown format, a dtype that is not a float of 16 or 32 bits, no dimension, or
            MBS-H without a role.
    """
    fmt = get_format(format)
    factor_rule = resolve_factor_rule(fmt, role)
    if x.dtype not in FLOAT_DTYPES or x.dim() == 0:
        raise ConfigError(
            f"found a {x.dtype} tensor of {x.dim()} dimensions, expected float32, bfloat16 or "
            "float16 of at least one: cast or reshape it"
        )
    width, lead = x.shape[-1], x.shape[:-1]
    rows = x.detach().reshape(math.prod(lead), width).to(torch.float32)
    padded = F.pad(rows, (0, -width % fmt.block)).unflatten(1, (-1, fmt.block))
    finite = padded.isfinite()
    blocks, bad = torch.where(finite, padded, 0.0), ~finite.all(dim=2)  # [N, n, block], [N, n]
    factors = tensor_scale = None
    if fmt.scale_rule == "fp32":
        codes, scales = _quantize_fp32_scale(blocks, bad, fmt)
    elif fmt.scale_rule == "e4m3":
        codes, scales, tensor_scale = _quantize_e4m3_scale(blocks, bad)
    else:
        if factor_rule is not None:
            factors = choose_factors(blocks, fmt, factor_rule)
        codes, scales = _quantize_e8m0(blocks, bad, fmt, factors)
    codes = codes.flatten(1)[:, :width]
    if fmt.codes_per_byte == 2:
        codes = pack_pairs(codes)
    return QuantizedTensor(
        codes=codes.reshape(*lead, codes.shape[1]),
        scales=scales.view(*lead, scales.shape[1]),
        factors=None if factors is None else factors.view(*lead, factors.shape[1]),
        tensor_scale=tensor_scale,
        shape=x.shape,
        format=format,
        dtype=x.dtype,
    )


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the floats of ``q``, of its shape, in ``dtype`` (default: that of the original).

    ``element * scale``; with MBS ``(element / (1 + m8/256)) * scale``, the division first, so that
    nothing overflows on the way. Rounded once more where ``dtype`` is narrower than float32.
    """
    fmt = get_format(q.format)
    dtype = dtype or q.dtype
    width = q.shape[-1]
    codes = unpack_pairs(q.codes, width) if fmt.codes_per_byte == 2 else q.codes
    values = decode_elements(codes, fmt.element)
    if q.factors is not None:
        values = values / _spread(_factor_values(q.factors), MACRO_BLOCK, width)
    if fmt.scale_rule == "fp32":
        scales = q.scales
    elif fmt.scale_rule == "e4m3":
        assert q.tensor_scale is not None
        scales = q.scales.view(torch.float8_e4m3fn).to(torch.float32) * q.tensor_scale
    else:
        scales = scale_of_e8m0(q.scales)
    values = values * _spread(scales, fmt.block, width)
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)  # NaN stays


def fake_quantize(x: Tensor, format: str, *, role: Role | None = None) -> Tensor:
    """Return what is left of ``x`` after a round trip through the format, same shape and dtype."""
    return dequantize(quantize(x, format, role=role))


def choose_factors(blocks: Tensor, fmt: Format, rule: str) -> Tensor:
    """Return m8 ``[N, ceil(n / 8)]`` uint8 of the MBS factors ``1 + m8/256`` of blocks [N, n, 16].

    arXiv 2603.08713, section 4.3. Static (MBS-S, Eq. 1 and 3): the eight leading mantissa bits of
    the ideal scale, ``m8 = (bits(6 * (1 / a)) & 0x007F8000) >> 15`` with a the largest magnitude of
    the macro block, so that it lands on about 6 * 2^j. Dynamic (MBS-D, Eq. 4-6): of the 16 slots
    ``1 + j/16`` the one with the least sum of squared errors, the first of equals; j = 0 is no
    factor, so MBS-D is never worse than OAS alone.
    """
    per_macro = MACRO_BLOCK // fmt.block
    padded = F.pad(blocks, (0, 0, 0, -blocks.shape[1] % per_macro))  # zero blocks after the end
    macro = padded.unflatten(1, (-1, per_macro))
    if rule == "static":
        a = macro.abs().amax(dim=(2, 3))
        return ((a.reciprocal() * 6.0).view(torch.int32) >> 15 & 0xFF).to(torch.uint8)
    parts = [_best_slots(part, fmt) for part in macro.flatten(0, 1).split(_SEARCHED_AT_ONCE)]
    return torch.cat(parts).view(macro.shape[:2])


def _best_slots(macro: Tensor, fmt: Format) -> Tensor:
    best = torch.zeros(macro.shape[0], dtype=torch.uint8, device=macro.device)
    least = torch.full((macro.shape[0],), math.inf, dtype=torch.float64, device=macro.device)
    for slot in range(_SLOTS):
        m8 = torch.full_like(best, slot * 256 // _SLOTS)
        error = squared_error(macro, m8, fmt)
        better = error < least
        best, least = torch.where(better, m8, best), torch.where(better, error, least)
    return best


def squared_error(macro: Tensor, m8: Tensor, fmt: Format) -> Tensor:
    """Return the sum of squared errors ``[N]`` float64 of macro blocks ``[N, 8, 16]`` under factors
    ``m8 [N]``; the order of the sum does not depend on N.
    """
    factor = _factor_values(m8)[:, None, None]
    exponent = _exponents(macro, fmt, factor)
    scale = scale_of_e8m0((exponent + E8M0_BIAS).to(torch.uint8))
    decoded = round_e2m1(_scaled(macro, exponent, factor)) / factor * scale
    error = (decoded.double() - macro.double()).square().flatten(1)
    while error.shape[1] > 1:
        error = error[:, 0::2] + error[:, 1::2]
    return error[:, 0]


def _quantize_e8m0(
    blocks: Tensor, bad: Tensor, fmt: Format, factors: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Codes [N, n, block] and E8M0 scales [N, n] of blocks with power-of-two scales."""
    factor = None
    if factors is not None:
        spread = _spread(_factor_values(factors), MACRO_BLOCK // fmt.block, blocks.shape[1])
        factor = spread[:, :, None]
    exponent = _exponents(blocks, fmt, factor)
    codes = encode_elements(_scaled(blocks, exponent, factor), fmt.element)
    scales = torch.where(bad, E8M0_NAN, exponent[:, :, 0] + E8M0_BIAS)
    return codes, scales.to(torch.uint8)


def _exponents(blocks: Tensor, fmt: Format, factor: Tensor | None) -> Tensor:
    """Return the exponents [N, n, 1] int32 of the scales that decoding multiplies by.

    ``floor`` (OCP MX v1.0, 6.3): the largest power of two not above a, over that of the element
    type: ``floor(log2 a) - emax``, so E2M1 sees a in [4, 8) and saturates above 6.
    ``oas`` (arXiv 2603.08713, 4.2): the scale that takes a into (3, 6], doubled in resolution where
    that gives 3.5 or less: a lands in (3.5, 7]. With a = m * 2^E, 1 <= m < 2, it is E - 2 up to
    m = 1.75 and E - 1 above.
    """
    a = blocks.abs().amax(dim=2, keepdim=True)
    shift = 0
    if factor is not None:
        huge = a >= 2.0**125  # a * factor must not overflow
        shift = 2 * huge.to(torch.int32)
        a = torch.where(huge, a * 0.25, a) * factor
    exponent, mantissa = exponent_and_mantissa(a)
    exponent = exponent + shift - ELEMENT_EMAX[fmt.element]
    if fmt.scale_rule == "oas":
        exponent = exponent + (mantissa > 0x600000).to(torch.int32)
    return exponent.clamp(-E8M0_BIAS, E8M0_BIAS)


def _scaled(blocks: Tensor, exponent: Tensor, factor: Tensor | None) -> Tensor:
    y = times_power_of_two(blocks, -exponent)
    return y if factor is None else y * factor


def _quantize_fp32_scale(blocks: Tensor, bad: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """E4M3 with ``scale = a / 448`` in float32, never below its smallest normal number."""
    a = blocks.abs().amax(dim=2)
    scales = _divided(a, ELEMENT_MAX[fmt.element]).clamp(min=SMALLEST_NORMAL)
    codes = encode_elements(blocks / scales[:, :, None], fmt.element)
    return codes, torch.where(bad, math.nan, scales)


def _quantize_e4m3_scale(blocks: Tensor, bad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """NVFP4: the tensor's scale is ``a_tensor / (448 * 6)``, a block's is ``a / 6`` over that,
    rounded to E4M3. A block whose scale rounds to zero becomes zero.
    """
    a = blocks.abs().amax(dim=2)
    largest = a.amax() if a.numel() else a.new_zeros(())
    tensor_scale = _divided(largest, 448.0 * 6.0).clamp(min=SMALLEST_NORMAL)
    wanted = (_divided(a, 6.0) / tensor_scale).clamp(max=448.0)
    scales = wanted.to(torch.float8_e4m3fn)
    total = scales.to(torch.float32) * tensor_scale
    y = blocks / torch.where(total > 0, total, math.inf)[:, :, None]
    bits = torch.where(bad, E4M3_NAN, scales.view(torch.uint8))
    return encode_elements(y, "e2m1"), bits, tensor_scale


def _divided(a: Tensor, by: float) -> Tensor:
    return a / a.new_full((), by)  # by a plain number, a GPU multiplies by its rounded reciprocal


def _factor_values(m8: Tensor) -> Tensor:
    return 1.0 + m8.to(torch.float32) / 256.0


def _spread(values: Tensor, times: int, width: int) -> Tensor:
    """Repeat each value along the last dimension, cut to ``width``."""
    return values.repeat_interleave(times, dim=-1)[..., :width]
