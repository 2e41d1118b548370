// Ids of experts to slots under the rule "visited": a thread decides a token, whose picks lie in shared memory. Ids are
// read and slots written by neighbouring threads side by side.
#include <cuda_runtime.h>

#include "kernels.h"
#include "serve_token.h"

namespace moe_locality {
namespace {

constexpr int kThreads = 128;
constexpr int kSharedBytes = 48 * 1024;  // what every block may have

__global__ void __launch_bounds__(kThreads) serve_kernel(ServeArgs a, ServeTable table, int32_t tokens, int32_t pitch) {
  extern __shared__ int64_t picks[];  // [tokens, pitch]
  const int64_t first = static_cast<int64_t>(blockIdx.x) * tokens;
  const auto here = static_cast<int32_t>(min(static_cast<int64_t>(tokens), a.num_tokens - first));
  for (int32_t i = threadIdx.x; i < here * a.top_k; i += kThreads) {
    const int32_t token = i / a.top_k, k = i % a.top_k;
    const int64_t at = (first + token) * a.stride_token + k * a.stride_k;
    picks[token * pitch + k] =
        a.id_type == kInt32 ? static_cast<const int32_t*>(a.ids)[at] : static_cast<const int64_t*>(a.ids)[at];
  }
  __syncthreads();
  if (static_cast<int32_t>(threadIdx.x) < here) serve_token(table, picks + threadIdx.x * pitch, a.top_k);
  __syncthreads();
  for (int32_t i = threadIdx.x; i < here * a.top_k; i += kThreads) {
    const int64_t slot = picks[i / a.top_k * pitch + i % a.top_k], at = first * a.top_k + i;
    if (a.id_type == kInt32)
      static_cast<int32_t*>(a.found)[at] = static_cast<int32_t>(slot);
    else
      static_cast<int64_t*>(a.found)[at] = slot;
  }
}

}  // namespace

int serve_visited(const ServeArgs& a, void* stream) {
  if (a.num_tokens == 0 || a.top_k == 0) return cudaSuccess;
  const int32_t pitch = a.top_k | 1;  // odd: threads of a warp read different banks
  const auto row = static_cast<int32_t>(sizeof(int64_t)) * pitch;
  if (row > kSharedBytes) return cudaErrorInvalidValue;
  const int32_t tokens = min(kThreads, kSharedBytes / row);
  const auto blocks = static_cast<unsigned>((a.num_tokens + tokens - 1) / tokens);
  const ServeTable table{a.slots, a.nodes, a.num_experts, a.width, a.home_node};
  const size_t bytes = static_cast<size_t>(tokens) * row;
  serve_kernel<<<blocks, kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(a, table, tokens, pitch);
  return cudaGetLastError();
}

}  // namespace moe_locality
