// Elements and scales of the low-bit formats, bit for bit as moe_locality/quantization/{formats,mx}.py computes them:
// the same operations in the same order, none of them fused.
#pragma once
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace moe_locality {

// Elements by their mantissa bits: 1 is E2M1, 3 is E4M3, 2 is E5M2.
template <int M>
struct Element {
  static constexpr int kBias = M == 1 ? 1 : (M == 3 ? 7 : 15);
  static constexpr int kSign = M == 1 ? 3 : 7;  // the bit of the sign
  static constexpr int kLargestExponent = M == 1 ? 2 : (M == 3 ? 8 : 15);
  static constexpr float kLargest = M == 1 ? 6.f : (M == 3 ? 448.f : 57344.f);
};

constexpr float kSmallestNormal = 1.1754943508222875e-38f;  // 2^-126
constexpr int32_t kNanBits = 0x7fc00000;

__device__ __forceinline__ float power_of_two(int32_t exponent) { return __int_as_float((exponent + 127) << 23); }

__device__ __forceinline__ float times_power_of_two(float x, int32_t exponent) {
  const int32_t half = exponent >> 1;
  return __fmul_rn(__fmul_rn(x, power_of_two(half)), power_of_two(exponent - half));
}

// Exponent of the E8M0 scale of a block with largest magnitude a (mx.py: _exponents).
template <int M>
__device__ __forceinline__ int32_t scale_exponent(float a, float factor, bool oas, bool mbs) {
  int32_t shift = 0;
  if (mbs) {
    if (a >= 4.253529586511731e37f) {  // 2^125: a * factor must not overflow
      shift = 2;
      a = __fmul_rn(a, 0.25f);
    }
    a = __fmul_rn(a, factor);
  }
  const bool tiny = a < kSmallestNormal;
  const int32_t bits = __float_as_int(tiny ? __fmul_rn(a, 16777216.f) : a);
  int32_t exponent = (bits >> 23) - 127 - (tiny ? 24 : 0) + shift - Element<M>::kLargestExponent;
  if (oas && (bits & 0x7fffff) > 0x600000) ++exponent;
  return max(-127, min(127, exponent));
}

// The eight leading mantissa bits of 6 / a, by its reciprocal as torch divides: the static MBS factor is 1 + m8 / 256.
__device__ __forceinline__ int32_t static_factor(float a) {
  return __float_as_int(__fmul_rn(__fdiv_rn(1.f, a), 6.f)) >> 15 & 0xff;
}

__device__ __forceinline__ float factor_value(int32_t m8) {
  return __fadd_rn(1.f, __fmul_rn(static_cast<float>(m8), 0.00390625f));
}

// The code of a scaled value: nearest, ties to even, saturating.
template <int M>
__device__ __forceinline__ uint32_t encode_element(float y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  if constexpr (M != 1) return __nv_cvt_float_to_fp8(y, __NV_SATFINITE, M == 3 ? __NV_E4M3 : __NV_E5M2);
#endif
  constexpr int kShift = 23 - M;
  constexpr int32_t kMagic = (23 + 1 - Element<M>::kBias - M + 127) << 23;
  constexpr int32_t kSmallest = (1 - Element<M>::kBias + 127) << 23;
  const uint32_t sign = static_cast<uint32_t>(__float_as_int(y)) >> 31 << Element<M>::kSign;
  const float a = fminf(fabsf(y), Element<M>::kLargest);
  const int32_t bits = __float_as_int(a);
  const int32_t odd = bits >> kShift & 1;
  const int32_t normal = ((bits + (1 << (kShift - 1)) - 1 + odd) >> kShift) - ((127 - Element<M>::kBias) << M);
  // below the smallest normal number: adding this one leaves multiples of the smallest step
  const int32_t subnormal = __float_as_int(__fadd_rn(a, __int_as_float(kMagic))) - kMagic;
  return sign | static_cast<uint32_t>(bits >= kSmallest ? normal : subnormal);
}

template <int M>
__device__ __forceinline__ float decode_element(uint32_t code) {
  constexpr int kSign = Element<M>::kSign;
  const auto magnitude = static_cast<int32_t>(code & ((1u << kSign) - 1));
  const int32_t exponent = magnitude >> M;
  int32_t bits = (magnitude << (23 - M)) + ((127 - Element<M>::kBias) << 23);
  if (M == 3 && magnitude == 127) bits = kNanBits;
  if (M == 2 && exponent == 31) bits += (255 - 31 - 127 + Element<M>::kBias) << 23;
  const float small = __fmul_rn(static_cast<float>(magnitude), power_of_two(1 - Element<M>::kBias - M));
  const int32_t value = exponent == 0 ? __float_as_int(small) : bits;
  return __int_as_float(value | static_cast<int32_t>((code >> kSign & 1u) << 31));
}

// The value of an E8M0 scale (OCP MX v1.0, 5.4.1): 2^(s - 127), 255 is NaN.
__device__ __forceinline__ float e8m0_value(uint8_t scale) {
  if (scale == 255) return __int_as_float(kNanBits);
  return __int_as_float(scale == 0 ? 0x00400000 : static_cast<int32_t>(scale) << 23);
}

}  // namespace moe_locality
