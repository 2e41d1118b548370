#include "permute.cuh"

namespace {

constexpr int kThreads = 256;

// One CTA moves one row with 16-byte accesses; int64 offsets, since rows * width passes 2^31.
__global__ void permute_kernel(const uint4* __restrict__ x, const int32_t* __restrict__ source,
                               uint4* __restrict__ rows, int64_t vectors) {
  const int64_t row = blockIdx.x;
  const uint4* from = x + static_cast<int64_t>(source[row]) * vectors;
  uint4* to = rows + row * vectors;
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) to[i] = from[i];
}

// One CTA makes one token; the order of the sum over k is fixed, so the result is deterministic.
__global__ void combine_kernel(const __nv_bfloat16* __restrict__ rows, const int32_t* __restrict__ position,
                               const float* __restrict__ weight, __nv_bfloat16* __restrict__ out, int64_t width,
                               int32_t top_k) {
  const int64_t token = blockIdx.x;
  for (int64_t i = threadIdx.x; i < width; i += kThreads) {
    float sum = 0.f;
    for (int32_t k = 0; k < top_k; ++k) {
      const int32_t row = position[token * top_k + k];
      if (row >= 0) sum += weight[token * top_k + k] * __bfloat162float(rows[static_cast<int64_t>(row) * width + i]);
    }
    out[token * width + i] = __float2bfloat16(sum);
  }
}

}  // namespace

extern "C" int moe_locality_permute(const void* x, const int32_t* source, void* rows, int64_t num_rows,
                                    int64_t row_bytes, cudaStream_t stream) {
  if (row_bytes % sizeof(uint4) != 0) return cudaErrorInvalidValue;
  if (num_rows == 0) return cudaSuccess;
  permute_kernel<<<static_cast<unsigned>(num_rows), kThreads, 0, stream>>>(
      static_cast<const uint4*>(x), source, static_cast<uint4*>(rows), row_bytes / static_cast<int64_t>(sizeof(uint4)));
  return cudaGetLastError();
}

extern "C" int moe_locality_combine_bf16(const __nv_bfloat16* rows, const int32_t* position, const float* weight,
                                         __nv_bfloat16* out, int64_t num_tokens, int64_t width, int32_t top_k,
                                         cudaStream_t stream) {
  if (num_tokens == 0) return cudaSuccess;
  combine_kernel<<<static_cast<unsigned>(num_tokens), kThreads, 0, stream>>>(rows, position, weight, out, width,
                                                                           top_k);
  return cudaGetLastError();
}
