"""Encoded rows by Triton: called by ``rows``, which checks and allocates. Needs Triton installed.

One program encodes one token: it reads the row once, quantizes it once and writes its K encoded
rows. Every operation is one that the torch reference does, in the same order and correctly rounded:
divisions are ``div_rn``, elements are rounded on their bits (so that GPUs without FP8 conversions
give the same), and the launches switch contraction into fused multiply-adds off.
"""
# kernels are Triton, not Python: constexpr is a number there, static_range a loop
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAssignmentType=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_locality.quantization.formats import (
    ELEMENT_EMAX,
    ELEMENT_MAX,
    EXPONENT_BIAS,
    MACRO_BLOCK,
    MANTISSA_BITS,
    Format,
    row_layout,
)

_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CHUNK = 1024
_PADDING_ROWS = 32


def encode(
    x: Tensor, positions: Tensor | None, row_token: Tensor | None, rows: Tensor, fmt: Format
) -> None:
    """Write the encoded rows of ``x [T, D]`` (unit column stride) into ``rows [R, row_bytes]``."""
    is_bf16 = x.dtype == torch.bfloat16
    if positions is None or positions.numel():
        _launch(
            encode_kernel,
            x.shape[0],
            x.view(torch.int16) if is_bf16 else x,
            x if positions is None else positions.contiguous(),
            rows,
            x.stride(0),
            K=1 if positions is None else positions.shape[1],
            PERMUTE=positions is not None,
            BF16=is_bf16,
            **_constants(fmt, x.shape[1], encodes=True),
            enable_fp_fusion=False,
        )
    if row_token is not None:
        count, size = rows.shape
        blocks = -(-count // _PADDING_ROWS)
        _launch(
            zero_padding_kernel, blocks, row_token, rows, count, ROW_BYTES=size, ROWS=_PADDING_ROWS
        )


def decode(buffer: Tensor, index: Tensor | None, out: Tensor, fmt: Format) -> None:
    """Write the decoded rows of ``buffer``, in the order of ``index``, into ``out``."""
    _launch(
        decode_kernel,
        out.shape[0],
        buffer,
        buffer if index is None else index.contiguous(),
        out.view(torch.int16) if out.dtype == torch.bfloat16 else out,
        IN_ORDER=index is not None,
        OUT=_FLOATS[out.dtype],
        LARGEST=torch.finfo(out.dtype).max,
        **_constants(fmt, out.shape[1], encodes=False),
        enable_fp_fusion=False,
    )


def _launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device
        kernel[(programs,)](*args, **constants)  # beyond type checkers


def _constants(fmt: Format, width: int, encodes: bool) -> dict[str, Any]:
    """The compile-time constants of the kernels; the one that encodes takes some more."""
    layout = row_layout(fmt, width)
    more = {
        "EMAX": ELEMENT_EMAX[fmt.element],
        "MAX": ELEMENT_MAX[fmt.element],
        "OAS": fmt.scale_rule == "oas",
        "FACTOR_END": layout.factors_end,
        "SCALE_END": layout.scales_end,
    }
    return {
        "WIDTH": width,
        "CHUNK": min(_CHUNK, max(MACRO_BLOCK, 1 << (width - 1).bit_length())),
        "BLOCK": fmt.block,
        "MBITS": MANTISSA_BITS[fmt.element],
        "EBIAS": EXPONENT_BIAS[fmt.element],
        "MBS": fmt.factor_rule is not None,
        "FP32_SCALE": fmt.scale_rule == "fp32",
        "CODE_BYTES": layout.codes_end,
        "SCALE_START": layout.scales_start,
        "ROW_BYTES": layout.row_bytes,
        **(more if encodes else {}),
    }


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _times_power_of_two(x, exponent):
    half = exponent >> 1
    return x * _power_of_two(half) * _power_of_two(exponent - half)


@triton.jit
def _scale_exponents(a, factor, EMAX: tl.constexpr, OAS: tl.constexpr, MBS: tl.constexpr):
    """Exponents of E8M0 scales for largest magnitudes a (see mx._exponents)."""
    shift = tl.zeros_like(a).to(tl.int32)
    if MBS:
        huge = a >= 4.253529586511731e37  # 2^125: a * factor must not overflow
        shift = tl.where(huge, 2, 0)
        a = tl.where(huge, a * 0.25, a) * factor
    tiny = a < 1.1754943508222875e-38  # 2^-126: subnormal
    bits = tl.where(tiny, a * 16777216.0, a).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - 127 - tl.where(tiny, 24, 0) + shift - EMAX
    if OAS:
        exponent += tl.where((bits & 0x7FFFFF) > 0x600000, 1, 0)
    return tl.minimum(tl.maximum(exponent, -127), 127)


@triton.jit
def _encode_elements(y, MBITS: tl.constexpr, EBIAS: tl.constexpr, MAX: tl.constexpr):
    """Codes, as int32, of scaled values: nearest, ties to even, saturating."""
    SHIFT: tl.constexpr = 23 - MBITS
    MAGIC_BITS: tl.constexpr = (23 + 1 - EBIAS - MBITS + 127) << 23
    SMALLEST_BITS: tl.constexpr = (1 - EBIAS + 127) << 23
    raw = y.to(tl.int32, bitcast=True)
    a = tl.minimum(tl.abs(y), MAX)
    bits = a.to(tl.int32, bitcast=True)
    odd = (bits >> SHIFT) & 1
    normal = ((bits + ((1 << (SHIFT - 1)) - 1) + odd) >> SHIFT) - ((127 - EBIAS) << MBITS)
    # below the smallest normal number: adding this one leaves multiples of the smallest step
    magic = (tl.zeros_like(bits) + MAGIC_BITS).to(tl.float32, bitcast=True)
    subnormal = (a + magic).to(tl.int32, bitcast=True) - MAGIC_BITS
    code = tl.where(bits >= SMALLEST_BITS, normal, subnormal)
    sign = (raw >> 31) & 1
    return code | (sign << 3 if MBITS == 1 else sign << 7)


@triton.jit
def _encode_chunk(
    x,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, MBITS: tl.constexpr, EBIAS: tl.constexpr,
    EMAX: tl.constexpr, MAX: tl.constexpr, OAS: tl.constexpr, MBS: tl.constexpr,
    FP32_SCALE: tl.constexpr,
):  # fmt: skip
    """Codes [CHUNK], scales [CHUNK / BLOCK] and factors [CHUNK / 128] of values [CHUNK]."""
    MACROS: tl.constexpr = CHUNK // 128
    LOCALS: tl.constexpr = 128 // BLOCK
    finite = tl.abs(x) < float("inf")
    x = tl.reshape(tl.where(finite, x, 0.0), [MACROS, LOCALS, BLOCK])
    spoiled = tl.reshape(tl.where(finite, 0, 1), [MACROS, LOCALS, BLOCK])
    bad = tl.max(spoiled, axis=2) > 0
    a = tl.max(tl.abs(x), axis=2)
    m8 = tl.zeros([MACROS], tl.int32)
    if FP32_SCALE:
        scale = tl.maximum(tl.div_rn(a, tl.zeros_like(a) + MAX), 1.1754943508222875e-38)
        y = tl.div_rn(x, tl.zeros_like(x) + scale[:, :, None])
        bits = scale.to(tl.int32, bitcast=True)
        scales = tl.where(bad, 0x7FC00000, bits)
    else:
        factor = tl.zeros([MACROS], tl.float32) + 1.0
        if MBS:
            a_macro = tl.max(a, axis=1)
            ideal = tl.div_rn(tl.zeros_like(a_macro) + 1.0, a_macro) * 6.0  # as torch divides
            m8 = (ideal.to(tl.int32, bitcast=True) >> 15) & 0xFF
            factor = 1.0 + m8.to(tl.float32) * 0.00390625
        exponent = _scale_exponents(a, factor[:, None], EMAX, OAS, MBS)
        y = _times_power_of_two(x, -exponent[:, :, None])
        if MBS:
            y = y * factor[:, None, None]
        scales = tl.where(bad, 255, exponent + 127)
    codes = _encode_elements(y, MBITS, EBIAS, MAX)
    return tl.reshape(codes, [CHUNK]), tl.reshape(scales, [CHUNK // BLOCK]), m8


@triton.jit
def _store_row(
    base, there, start, codes, scales, m8,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, MBITS: tl.constexpr, MBS: tl.constexpr,
    FP32_SCALE: tl.constexpr, CODE_BYTES: tl.constexpr, FACTOR_END: tl.constexpr,
    SCALE_START: tl.constexpr, SCALE_END: tl.constexpr,
):  # fmt: skip
    """Store one chunk of one encoded row, which begins at ``base``."""
    PER_BYTE: tl.constexpr = 2 if MBITS == 1 else 1
    code_cols = start // PER_BYTE + tl.arange(0, CHUNK // PER_BYTE)
    tl.store(base + code_cols, codes.to(tl.uint8), mask=there & (code_cols < CODE_BYTES))
    if MBS:
        factor_cols = CODE_BYTES + start // 128 + tl.arange(0, CHUNK // 128)
        tl.store(base + factor_cols, m8.to(tl.uint8), mask=there & (factor_cols < FACTOR_END))
    scale_cols = start // BLOCK + tl.arange(0, CHUNK // BLOCK)
    if FP32_SCALE:
        words = (base + SCALE_START).to(tl.pointer_type(tl.int32))
        end = (SCALE_END - SCALE_START) // 4
        tl.store(words + scale_cols, scales, mask=there & (scale_cols < end))
    else:
        scale_cols += SCALE_START
        tl.store(base + scale_cols, scales.to(tl.uint8), mask=there & (scale_cols < SCALE_END))


@triton.jit
def encode_kernel(
    x_ptr, positions_ptr, out_ptr, x_stride,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, K: tl.constexpr, PERMUTE: tl.constexpr,
    BF16: tl.constexpr, BLOCK: tl.constexpr, MBITS: tl.constexpr, EBIAS: tl.constexpr,
    EMAX: tl.constexpr, MAX: tl.constexpr, OAS: tl.constexpr, MBS: tl.constexpr,
    FP32_SCALE: tl.constexpr, CODE_BYTES: tl.constexpr, FACTOR_END: tl.constexpr,
    SCALE_START: tl.constexpr, SCALE_END: tl.constexpr, ROW_BYTES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, WIDTH, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        x = tl.load(x_ptr + token * x_stride + cols, mask=cols < WIDTH, other=0)
        if BF16:  # by its bits: the interpreter's conversion loses subnormals
            x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        codes, scales, m8 = _encode_chunk(
            x.to(tl.float32), CHUNK, BLOCK, MBITS, EBIAS, EMAX, MAX, OAS, MBS, FP32_SCALE
        )
        if MBITS == 1:
            low, high = tl.split(tl.reshape(codes, [CHUNK // 2, 2]))
            codes = low | (high << 4)
        for k in tl.static_range(K):
            row = token
            if PERMUTE:
                row = tl.load(positions_ptr + token * K + k).to(tl.int64)
            _store_row(
                out_ptr + row * ROW_BYTES, row >= 0, start, codes, scales, m8,
                CHUNK, BLOCK, MBITS, MBS, FP32_SCALE,
                CODE_BYTES, FACTOR_END, SCALE_START, SCALE_END,
            )  # fmt: skip
    lane = tl.arange(0, 16)  # the gap before fp32 scales and the end of the row are zeros
    nothing = tl.zeros([16], tl.uint8)
    for k in tl.static_range(K):
        row = token
        if PERMUTE:
            row = tl.load(positions_ptr + token * K + k).to(tl.int64)
        base = out_ptr + row * ROW_BYTES + lane
        there = row >= 0
        tl.store(base + FACTOR_END, nothing, mask=there & (lane < SCALE_START - FACTOR_END))
        tl.store(base + SCALE_END, nothing, mask=there & (lane < ROW_BYTES - SCALE_END))


@triton.jit
def zero_padding_kernel(
    row_token_ptr, out_ptr, num_rows, ROW_BYTES: tl.constexpr, ROWS: tl.constexpr
):
    """Zero the rows that have no token, looking at ROWS rows per program."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    unowned = tl.load(row_token_ptr + rows, mask=rows < num_rows, other=0) < 0
    for start in range(0, ROW_BYTES, 128):
        cols = start + tl.arange(0, 128)
        tl.store(
            out_ptr + rows[:, None] * ROW_BYTES + cols[None, :],
            tl.zeros([ROWS, 128], tl.uint8),
            mask=unowned[:, None] & (cols < ROW_BYTES)[None, :],
        )


@triton.jit
def _decode_elements(codes, MBITS: tl.constexpr, EBIAS: tl.constexpr):
    """Values of int32 codes."""
    SIGN: tl.constexpr = 3 if MBITS == 1 else 7
    exponent = (codes >> MBITS) & ((1 << (SIGN - MBITS)) - 1)
    magnitude = codes & ((1 << SIGN) - 1)
    bits = (magnitude << (23 - MBITS)) + ((127 - EBIAS) << 23)
    if MBITS == 3:
        bits = tl.where(magnitude == 127, 0x7FC00000, bits)
    if MBITS == 2:
        bits = tl.where(exponent == 31, bits + ((255 - 31 - 127 + EBIAS) << 23), bits)
    normal = bits.to(tl.float32, bitcast=True)
    step = _power_of_two(tl.zeros_like(codes) + (1 - EBIAS - MBITS))
    value = tl.where(exponent == 0, magnitude.to(tl.float32) * step, normal)
    signed = value.to(tl.int32, bitcast=True) | ((codes >> SIGN) << 31)  # 0 - x would lose -0.0
    return signed.to(tl.float32, bitcast=True)


@triton.jit
def decode_kernel(
    in_ptr, index_ptr, out_ptr,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, MBITS: tl.constexpr,
    EBIAS: tl.constexpr, MBS: tl.constexpr, FP32_SCALE: tl.constexpr, CODE_BYTES: tl.constexpr,
    SCALE_START: tl.constexpr, ROW_BYTES: tl.constexpr, LARGEST: tl.constexpr, OUT: tl.constexpr,
    IN_ORDER: tl.constexpr,
):  # fmt: skip
    """Row n is the decoded row index[n]; of index -1 it is zeros, and nothing is read for it."""
    row = tl.program_id(0).to(tl.int64)
    source = row
    if IN_ORDER:
        source = tl.load(index_ptr + row).to(tl.int64)
    base = in_ptr + source * ROW_BYTES
    for start in range(0, WIDTH, CHUNK):
        cols = start + tl.arange(0, CHUNK)
        inside = cols < WIDTH
        known = inside & (source >= 0)
        if MBITS == 1:
            byte = tl.load(base + cols // 2, mask=known, other=0).to(tl.int32)
            codes = (byte >> ((cols % 2) * 4)) & 15
        else:
            codes = tl.load(base + cols, mask=known, other=0).to(tl.int32)
        values = _decode_elements(codes, MBITS, EBIAS)
        if MBS:
            m8 = tl.load(base + CODE_BYTES + cols // 128, mask=known, other=0)
            values = tl.div_rn(values, 1.0 + m8.to(tl.float32) * 0.00390625)
        if FP32_SCALE:
            words = (base + SCALE_START).to(tl.pointer_type(tl.float32))
            scale = tl.load(words + cols // BLOCK, mask=known, other=0.0)
        else:
            e8m0 = tl.load(base + SCALE_START + cols // BLOCK, mask=known, other=0).to(tl.int32)
            bits = tl.where(e8m0 == 0, 0x00400000, e8m0 << 23)
            bits = tl.where(e8m0 == 255, 0x7FC00000, bits)
            scale = bits.to(tl.float32, bitcast=True)
        values = values * scale
        values = tl.where(values > LARGEST, LARGEST, values)  # NaN stays
        values = tl.where(values < -LARGEST, -LARGEST, values)
        if OUT == 1:  # bfloat16 on the bits: nearest, ties to even
            bits = values.to(tl.int32, bitcast=True)
            values = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
        elif OUT == 2:
            values = values.to(tl.float16)
        tl.store(out_ptr + row * WIDTH + cols, values, mask=inside)
