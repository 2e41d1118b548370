// Sixteen bytes at a time, in float: loads, stores and the choice of what a row allows.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace moe_locality {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// V neighbouring elements that are loaded and stored as one.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T item[V];
};

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <typename T, int V>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, V>& pack) {
  *reinterpret_cast<Pack<T, V>*>(to) = pack;
}

inline bool aligned_16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// CTAs for a grid-stride loop over `items`: enough waves to hide latency, few enough to start quickly.
inline unsigned grid_for(int64_t items) {
  constexpr int64_t kMost = 132 * 16;
  return static_cast<unsigned>(items < 1 ? 1 : (items < kMost ? items : kMost));
}

// Zero the rows inside the slots that have no token: each warp looks at 32 rows at a time.
template <typename V>
__device__ void zero_padding(V* rows, const int32_t* row_token, int64_t used, int64_t vectors) {
  const int lane = threadIdx.x % 32;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * blockDim.x / 32;
  for (int64_t first = warp * 32; first < used; first += warps * 32) {
    const int64_t row = first + lane;
    unsigned empty = __ballot_sync(0xffffffffu, row < used && row_token[row] < 0);
    while (empty) {
      const int64_t target = first + __ffs(static_cast<int>(empty)) - 1;
      for (int64_t i = lane; i < vectors; i += 32) rows[target * vectors + i] = V{};
      empty &= empty - 1;
    }
  }
}

}  // namespace moe_locality
