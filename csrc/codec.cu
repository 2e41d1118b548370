// Rows in a low-bit format: permute and quantize in one pass, and the way back in any order. A CTA takes a token at a
// time and a thread 16 neighboring elements, so a scale belongs to 1, 2 or 8 threads. What follows the codes of a row
// (factors, scales, zeros) is put together in shared memory and then written to the K rows like the codes.
#include "codec_math.cuh"
#include "kernels.h"
#include "vectors.cuh"

namespace moe_locality {
namespace {

constexpr int kThreads = 128;
constexpr int kItems = 16;  // of a thread
constexpr int kMacro = 128 / kItems;
constexpr unsigned kAll = 0xffffffffu;

template <typename T>
__device__ __forceinline__ void load_items(const T* from, int64_t left, bool vectors, float (&value)[kItems]) {
  constexpr int kWide = 16 / sizeof(T);
  if (vectors && left >= kItems) {
#pragma unroll
    for (int i = 0; i < kItems; i += kWide) {
      const Pack<T, kWide> held = load_pack<T, kWide>(from + i);
#pragma unroll
      for (int j = 0; j < kWide; ++j) value[i + j] = to_float(held.item[j]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) value[i] = i < left ? to_float(from[i]) : 0.f;
}

// The largest a and whether any is bad, over `threads` neighboring threads (a power of two).
__device__ __forceinline__ void reduce_block(int threads, float& a, bool& bad) {
  for (int step = 1; step < threads; step *= 2) {
    a = fmaxf(a, __shfl_xor_sync(kAll, a, step));
    bad = __shfl_xor_sync(kAll, static_cast<int>(bad), step) != 0 || bad;
  }
}

// Codes of 16 elements, one or two a byte.
template <int M>
struct alignas(M == 1 ? 8 : 16) Codes {
  uint8_t byte[M == 1 ? kItems / 2 : kItems];
};

template <int M>
__device__ __forceinline__ Codes<M> pack_codes(const uint32_t (&code)[kItems]) {
  Codes<M> made;
  if constexpr (M == 1) {
#pragma unroll
    for (int i = 0; i < kItems / 2; ++i) made.byte[i] = static_cast<uint8_t>(code[2 * i] | code[2 * i + 1] << 4);
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) made.byte[i] = static_cast<uint8_t>(code[i]);
  }
  return made;
}

// Scale and codes of the elements of a thread; the first thread of a block writes the scale to `tail`.
template <int M>
__device__ __forceinline__ Codes<M> quantize_items(const RowFormat& f, int64_t col, int64_t width,
                                                   float (&value)[kItems], uint8_t* tail) {
  float a = 0.f;
  bool bad = false;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const bool finite = fabsf(value[i]) < INFINITY;
    if (!finite) value[i] = 0.f;
    bad = bad || !finite;
    a = fmaxf(a, fabsf(value[i]));
  }
  const int threads = f.block / kItems;
  reduce_block(threads, a, bad);
  const bool first = threadIdx.x % threads == 0 && col < width;
  uint8_t* scales = tail + f.scale_start - f.code_bytes;
  uint32_t code[kItems];
  if (f.scale_rule == kFloat32Scale) {
    const float scale = fmaxf(__fdiv_rn(a, Element<M>::kLargest), kSmallestNormal);
#pragma unroll
    for (int i = 0; i < kItems; ++i) code[i] = encode_element<M>(__fdiv_rn(value[i], scale));
    const int32_t bits = bad ? kNanBits : __float_as_int(scale);
    if (first)
      for (int i = 0; i < 4; ++i) scales[col / f.block * 4 + i] = static_cast<uint8_t>(bits >> (8 * i));
    return pack_codes<M>(code);
  }
  float factor = 1.f;
  if (f.mbs != 0) {
    float largest = a;
    bool unused = false;
    reduce_block(kMacro, largest, unused);
    const int32_t m8 = static_factor(largest);
    factor = factor_value(m8);
    if (threadIdx.x % kMacro == 0 && col < width) tail[col / 128] = static_cast<uint8_t>(m8);
  }
  const int32_t exponent = scale_exponent<M>(a, factor, f.scale_rule == kOasScale, f.mbs != 0);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const float y = times_power_of_two(value[i], -exponent);
    code[i] = encode_element<M>(f.mbs != 0 ? __fmul_rn(y, factor) : y);
  }
  if (first) scales[col / f.block] = static_cast<uint8_t>(bad ? 255 : exponent + 127);
  return pack_codes<M>(code);
}

template <int M>
__device__ __forceinline__ void store_codes(uint8_t* row, int64_t col, int64_t left, const Codes<M>& codes) {
  constexpr int kPerByte = M == 1 ? 2 : 1;
  if (left >= kItems) {
    *reinterpret_cast<Codes<M>*>(row + col / kPerByte) = codes;
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems / kPerByte; ++i)
    if (i * kPerByte < left) row[col / kPerByte + i] = codes.byte[i];
}

template <typename T, int M>
__global__ void __launch_bounds__(kThreads) encode_kernel(EncodeArgs a, bool vectors) {
  extern __shared__ __align__(16) uint8_t tail[];
  const RowFormat f = a.format;
  const int32_t tail_bytes = f.row_bytes - f.code_bytes;
  const int32_t copies = a.positions == nullptr ? 1 : a.top_k;
  for (int32_t i = threadIdx.x; i < tail_bytes; i += kThreads) tail[i] = 0;
  __syncthreads();
  for (int64_t token = blockIdx.x; token < a.num_tokens; token += gridDim.x) {
    const T* x = static_cast<const T*>(a.x) + token * a.x_stride;
    const int32_t* position = a.positions == nullptr ? nullptr : a.positions + token * a.top_k;
    for (int64_t first = 0; first < a.width; first += kThreads * kItems) {  // all threads stay for the shuffles
      const int64_t col = first + static_cast<int64_t>(threadIdx.x) * kItems;
      float value[kItems];
      load_items<T>(x + col, a.width - col, vectors, value);
      const Codes<M> codes = quantize_items<M>(f, col, a.width, value, tail);
      for (int32_t k = 0; k < copies; ++k) {
        const int64_t row = position == nullptr ? token : position[k];
        if (row >= 0) store_codes<M>(a.rows + row * f.row_bytes, col, a.width - col, codes);
      }
    }
    __syncthreads();
    for (int32_t k = 0; k < copies; ++k) {
      const int64_t row = position == nullptr ? token : position[k];
      if (row < 0) continue;
      uint8_t* to = a.rows + row * f.row_bytes + f.code_bytes;
      if (f.code_bytes % 16 == 0) {
        for (int32_t i = threadIdx.x; i < tail_bytes / 16; i += kThreads)
          reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(tail)[i];
      } else {
        for (int32_t i = threadIdx.x; i < tail_bytes; i += kThreads) to[i] = tail[i];
      }
    }
    __syncthreads();  // the next token writes over the tail
  }
  if (a.row_token != nullptr)
    zero_padding(reinterpret_cast<uint4*>(a.rows), a.row_token, a.num_rows, f.row_bytes / 16);
}

template <typename T>
__device__ __forceinline__ void store_items(T* to, int64_t left, bool vectors, const float (&value)[kItems]) {
  constexpr int kWide = 16 / sizeof(T);
  if (vectors && left >= kItems) {
#pragma unroll
    for (int i = 0; i < kItems; i += kWide) {
      Pack<T, kWide> made;
#pragma unroll
      for (int j = 0; j < kWide; ++j) made.item[j] = from_float<T>(value[i + j]);
      store_pack<T, kWide>(to + i, made);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    if (i < left) to[i] = from_float<T>(value[i]);
}

template <typename T>
__device__ __forceinline__ float largest_of();
template <>
__device__ __forceinline__ float largest_of<float>() {
  return 3.4028234663852886e38f;
}
template <>
__device__ __forceinline__ float largest_of<__half>() {
  return 65504.f;
}
template <>
__device__ __forceinline__ float largest_of<__nv_bfloat16>() {
  return 3.3895313892515355e38f;
}

template <typename T, int M>
__device__ __forceinline__ void decode_items(const RowFormat& f, const uint8_t* row, int64_t col, int64_t left,
                                             float (&value)[kItems]) {
  constexpr int kPerByte = M == 1 ? 2 : 1;
  Codes<M> codes{};
  if (left >= kItems) {
    codes = *reinterpret_cast<const Codes<M>*>(row + col / kPerByte);
  } else {
#pragma unroll
    for (int i = 0; i < kItems / kPerByte; ++i)
      if (i * kPerByte < left) codes.byte[i] = row[col / kPerByte + i];
  }
  const uint8_t* scales = row + f.scale_start;
  const float scale = f.scale_rule == kFloat32Scale ? reinterpret_cast<const float*>(scales)[col / f.block]
                                                    : e8m0_value(scales[col / f.block]);
  const float factor = f.mbs != 0 ? factor_value(row[f.code_bytes + col / 128]) : 1.f;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const uint32_t byte = codes.byte[i / kPerByte];
    float v = decode_element<M>(M == 1 ? byte >> (i % 2 * 4) & 15u : byte);
    if (f.mbs != 0) v = __fdiv_rn(v, factor);
    v = __fmul_rn(v, scale);
    if (v > largest_of<T>()) v = largest_of<T>();  // NaN stays
    if (v < -largest_of<T>()) v = -largest_of<T>();
    value[i] = v;
  }
}

template <typename T, int M>
__global__ void __launch_bounds__(kThreads) decode_kernel(DecodeArgs a, bool vectors) {
  for (int64_t n = blockIdx.x; n < a.num_rows; n += gridDim.x) {
    const int64_t source = a.index == nullptr ? n : a.index[n];
    const uint8_t* row = a.rows + source * a.format.row_bytes;
    T* out = static_cast<T*>(a.out) + n * a.width;
    for (int64_t col = static_cast<int64_t>(threadIdx.x) * kItems; col < a.width; col += kThreads * kItems) {
      float value[kItems] = {};
      if (source >= 0) decode_items<T, M>(a.format, row, col, a.width - col, value);
      store_items<T>(out + col, a.width - col, vectors, value);
    }
  }
}

template <typename T, int M>
struct Encode {
  static void launch(const EncodeArgs& a, cudaStream_t s) {
    const bool vectors = aligned_16(a.x) && a.x_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    const auto tail = static_cast<size_t>(a.format.row_bytes - a.format.code_bytes);
    const int64_t items = a.num_tokens > a.num_rows ? a.num_tokens : a.num_rows;
    encode_kernel<T, M><<<grid_for(items), kThreads, tail, s>>>(a, vectors);
  }
};

template <typename T, int M>
struct Decode {
  static void launch(const DecodeArgs& a, cudaStream_t s) {
    const bool vectors = aligned_16(a.out) && a.width * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    decode_kernel<T, M><<<grid_for(a.num_rows), kThreads, 0, s>>>(a, vectors);
  }
};

template <template <typename, int> class Kernel, typename T, typename Args>
int by_element(const Args& a, cudaStream_t s) {
  switch (a.format.mantissa_bits) {
    case 1:
      Kernel<T, 1>::launch(a, s);
      break;
    case 2:
      Kernel<T, 2>::launch(a, s);
      break;
    case 3:
      Kernel<T, 3>::launch(a, s);
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

template <template <typename, int> class Kernel, typename Args>
int by_type(const Args& a, void* stream) {
  const RowFormat& f = a.format;
  const bool known = f.block == 16 || f.block == 32 || f.block == 128;
  // the tail of a row is in shared memory, without asking for more than is always there
  if (!known || f.row_bytes % 16 != 0 || f.row_bytes - f.code_bytes > 48 * 1024 || !aligned_16(a.rows))
    return cudaErrorInvalidValue;
  auto s = static_cast<cudaStream_t>(stream);
  if (a.dtype == kFloat32) return by_element<Kernel, float>(a, s);
  if (a.dtype == kFloat16) return by_element<Kernel, __half>(a, s);
  if (a.dtype == kBFloat16) return by_element<Kernel, __nv_bfloat16>(a, s);
  return cudaErrorInvalidValue;
}

}  // namespace

int encode(const EncodeArgs& a, void* stream) {
  if (a.num_rows == 0 || a.width == 0) return cudaSuccess;
  return by_type<Encode>(a, stream);
}

int decode(const DecodeArgs& a, void* stream) {
  if (a.num_rows == 0 || a.width == 0) return cudaSuccess;
  return by_type<Decode>(a, stream);
}

}  // namespace moe_locality
