// Weighted sums of each token's rows, and their gradients. One CTA a token at a time; C of the K rows are loaded
// before the first product; sums are in float, over k in order, so results do not depend on the schedule.
#include "kernels.h"
#include "vectors.cuh"

namespace moe_locality {
namespace {

constexpr int kThreads = 256;

template <typename T, int V, int C>
__global__ void __launch_bounds__(kThreads) combine_kernel(CombineArgs a) {
  const T* rows = static_cast<const T*>(a.rows);
  T* out = static_cast<T*>(a.out);
  for (int64_t token = blockIdx.x; token < a.num_tokens; token += gridDim.x) {
    const int32_t* position = a.positions + token * a.top_k;
    const float* weight = a.weights == nullptr ? nullptr : a.weights + token * a.top_k;
    for (int64_t col = static_cast<int64_t>(threadIdx.x) * V; col < a.width; col += kThreads * V) {
      float sum[V] = {};
      for (int32_t first = 0; first < a.top_k; first += C) {
        Pack<T, V> held[C];
        int32_t row[C];
#pragma unroll
        for (int j = 0; j < C; ++j) {
          row[j] = first + j < a.top_k ? position[first + j] : -1;
          if (row[j] >= 0) held[j] = load_pack<T, V>(rows + static_cast<int64_t>(row[j]) * a.width + col);
        }
#pragma unroll
        for (int j = 0; j < C; ++j) {
          if (row[j] < 0) continue;
          const float w = weight == nullptr ? 1.f : weight[first + j];
#pragma unroll
          for (int i = 0; i < V; ++i) sum[i] += w * to_float(held[j].item[i]);
        }
      }
      Pack<T, V> made;
#pragma unroll
      for (int i = 0; i < V; ++i) made.item[i] = from_float<T>(sum[i]);
      store_pack<T, V>(out + token * a.width + col, made);
    }
  }
}

// Sum of v over the CTA, in a fixed order; the result is in thread 0.
__device__ __forceinline__ float block_sum(float v, float* shared) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_down_sync(0xffffffffu, v, step);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0.f;
  if (threadIdx.x == 0)
    for (int w = 0; w < kThreads / 32; ++w) total += shared[w];
  __syncthreads();
  return total;
}

template <typename T, int V, int C>
__global__ void __launch_bounds__(kThreads) combine_backward_kernel(CombineBackwardArgs a) {
  __shared__ float shared[kThreads / 32];
  const T* grad = static_cast<const T*>(a.grad);
  const T* rows = static_cast<const T*>(a.rows);
  T* grad_rows = static_cast<T*>(a.grad_rows);
  for (int64_t token = blockIdx.x; token < a.num_tokens; token += gridDim.x) {
    const int32_t* position = a.positions + token * a.top_k;
    for (int32_t first = 0; first < a.top_k; first += C) {
      int32_t row[C];
      float weight[C], product[C];
#pragma unroll
      for (int j = 0; j < C; ++j) {
        row[j] = first + j < a.top_k ? position[first + j] : -1;
        weight[j] = row[j] < 0 ? 0.f : a.weights[token * a.top_k + first + j];
        product[j] = 0.f;
      }
      for (int64_t col = static_cast<int64_t>(threadIdx.x) * V; col < a.width; col += kThreads * V) {
        const Pack<T, V> g = load_pack<T, V>(grad + token * a.width + col);
        Pack<T, V> held[C];
        if (rows != nullptr) {
#pragma unroll
          for (int j = 0; j < C; ++j)
            if (row[j] >= 0) held[j] = load_pack<T, V>(rows + static_cast<int64_t>(row[j]) * a.width + col);
        }
#pragma unroll
        for (int j = 0; j < C; ++j) {
          if (row[j] < 0) continue;
          Pack<T, V> made;
#pragma unroll
          for (int i = 0; i < V; ++i) {
            const float value = to_float(g.item[i]);
            if (rows != nullptr) product[j] += value * to_float(held[j].item[i]);
            made.item[i] = from_float<T>(weight[j] * value);
          }
          if (grad_rows != nullptr) store_pack<T, V>(grad_rows + static_cast<int64_t>(row[j]) * a.width + col, made);
        }
      }
      if (a.grad_weights == nullptr) continue;  // rows are null too where there are none at all
#pragma unroll
      for (int j = 0; j < C; ++j) {
        const float total = block_sum(product[j], shared);
        if (threadIdx.x == 0 && first + j < a.top_k) a.grad_weights[token * a.top_k + first + j] = total;
      }
    }
  }
  if (grad_rows != nullptr && a.slot_offsets != nullptr)
    zero_padding(reinterpret_cast<Pack<T, V>*>(grad_rows), a.row_token, a.slot_offsets[a.num_slots], a.width / V);
}

template <typename T, int V, int C>
struct Forward {
  static void launch(const CombineArgs& a, cudaStream_t s) {
    combine_kernel<T, V, C><<<grid_for(a.num_tokens), kThreads, 0, s>>>(a);
  }
};

template <typename T, int V, int C>
struct Backward {
  static void launch(const CombineBackwardArgs& a, cudaStream_t s) {
    combine_backward_kernel<T, V, C><<<grid_for(a.num_tokens), kThreads, 0, s>>>(a);
  }
};

template <template <typename, int, int> class Kernel, typename T, int V, typename Args>
void by_top_k(const Args& a, cudaStream_t s) {
  if (a.top_k <= 1) return Kernel<T, V, 1>::launch(a, s);
  if (a.top_k == 2) return Kernel<T, V, 2>::launch(a, s);
  if (a.top_k <= 4) return Kernel<T, V, 4>::launch(a, s);
  return Kernel<T, V, 8>::launch(a, s);
}

template <template <typename, int, int> class Kernel, typename T, typename Args>
void by_width(const Args& a, bool aligned, cudaStream_t s) {
  constexpr int kWide = 16 / sizeof(T);
  if (aligned && a.width % kWide == 0) return by_top_k<Kernel, T, kWide>(a, s);
  return Kernel<T, 1, 4>::launch(a, s);  // odd widths are not worth four kernels
}

template <template <typename, int, int> class Kernel, typename Args>
int by_dtype(const Args& a, bool aligned, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  if (a.dtype == kFloat32)
    by_width<Kernel, float>(a, aligned, s);
  else if (a.dtype == kFloat16)
    by_width<Kernel, __half>(a, aligned, s);
  else if (a.dtype == kBFloat16)
    by_width<Kernel, __nv_bfloat16>(a, aligned, s);
  else
    return cudaErrorInvalidValue;
  return cudaGetLastError();
}

}  // namespace

int combine(const CombineArgs& a, void* stream) {
  if (a.num_tokens == 0 || a.width == 0) return cudaSuccess;
  return by_dtype<Forward>(a, aligned_16(a.rows) && aligned_16(a.out), stream);
}

int combine_backward(const CombineBackwardArgs& a, void* stream) {
  if (a.width == 0) return cudaSuccess;
  return by_dtype<Backward>(a, aligned_16(a.grad) && aligned_16(a.rows) && aligned_16(a.grad_rows), stream);
}

}  // namespace moe_locality
