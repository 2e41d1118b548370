// Rows into slot order. Each token is read once and written to its K rows.
#include "kernels.h"
#include "vectors.cuh"

namespace moe_locality {
namespace {

constexpr int kThreads = 128;
constexpr int kInFlight = 4;  // loads of a thread before its first store

template <typename V>
__global__ void __launch_bounds__(kThreads) permute_kernel(PermuteArgs a, int64_t vectors) {
  const V* x = static_cast<const V*>(a.x);
  V* rows = static_cast<V*>(a.rows);
  for (int64_t token = blockIdx.x; token < a.num_tokens; token += gridDim.x) {
    const int32_t* position = a.positions + token * a.top_k;
    const V* from = x + token * vectors;
    for (int64_t first = threadIdx.x; first < vectors; first += kThreads * kInFlight) {
      V held[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j)
        if (first + j * kThreads < vectors) held[j] = from[first + j * kThreads];
      for (int32_t k = 0; k < a.top_k; ++k) {
        const int32_t row = position[k];
        if (row < 0) continue;
        V* to = rows + static_cast<int64_t>(row) * vectors;
#pragma unroll
        for (int j = 0; j < kInFlight; ++j)
          if (first + j * kThreads < vectors) to[first + j * kThreads] = held[j];
      }
    }
  }
  if (a.slot_offsets != nullptr)
    zero_padding(rows, a.row_token, a.slot_offsets[a.num_slots], vectors);
}

template <typename V, typename Index>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const V* x, const Index* index, V* rows, int64_t num_rows, int64_t vectors) {
  for (int64_t row = blockIdx.x; row < num_rows; row += gridDim.x) {
    const V* from = x + static_cast<int64_t>(index[row]) * vectors;
    for (int64_t i = threadIdx.x; i < vectors; i += kThreads) rows[row * vectors + i] = from[i];
  }
}

template <typename V>
int launch_permute(const PermuteArgs& a, cudaStream_t stream) {
  permute_kernel<V><<<grid_for(a.num_tokens), kThreads, 0, stream>>>(a, a.row_bytes / static_cast<int64_t>(sizeof(V)));
  return cudaGetLastError();
}

template <typename V>
int launch_gather(const void* x, const void* index, int32_t id_type, void* rows, int64_t num_rows, int64_t row_bytes,
                  cudaStream_t stream) {
  const int64_t vectors = row_bytes / static_cast<int64_t>(sizeof(V));
  const V* from = static_cast<const V*>(x);
  V* to = static_cast<V*>(rows);
  if (id_type == kInt32)
    gather_kernel<<<grid_for(num_rows), kThreads, 0, stream>>>(from, static_cast<const int32_t*>(index), to, num_rows,
                                                               vectors);
  else
    gather_kernel<<<grid_for(num_rows), kThreads, 0, stream>>>(from, static_cast<const int64_t*>(index), to, num_rows,
                                                               vectors);
  return cudaGetLastError();
}

}  // namespace

int permute(const PermuteArgs& a, void* stream) {
  if (a.row_bytes == 0) return cudaSuccess;
  auto s = static_cast<cudaStream_t>(stream);
  if (a.row_bytes % 16 == 0 && aligned_16(a.x) && aligned_16(a.rows)) return launch_permute<uint4>(a, s);
  return a.row_bytes % 2 == 0 ? launch_permute<uint16_t>(a, s) : launch_permute<uint8_t>(a, s);
}

int gather(const void* x, const void* index, int32_t id_type, void* rows, int64_t num_rows, int64_t row_bytes,
           void* stream) {
  if (num_rows == 0 || row_bytes == 0) return cudaSuccess;
  auto s = static_cast<cudaStream_t>(stream);
  if (row_bytes % 16 == 0 && aligned_16(x) && aligned_16(rows))
    return launch_gather<uint4>(x, index, id_type, rows, num_rows, row_bytes, s);
  if (row_bytes % 2 == 0) return launch_gather<uint16_t>(x, index, id_type, rows, num_rows, row_bytes, s);
  return launch_gather<uint8_t>(x, index, id_type, rows, num_rows, row_bytes, s);
}

}  // namespace moe_locality
