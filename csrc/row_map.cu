// The row map: histogram of each block, then one pass that places every route. Routes keep their order inside a slot:
// a warp ranks 32 routes at a time by matching slots, warps and blocks by prefix sums. Shared-memory atomics only
// count, so no result depends on the schedule.
#include <cuda_runtime.h>

#include "kernels.h"

namespace moe_locality {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kRoutes = 1024;     // of a block, where there are several
constexpr int64_t kOneBlock = 2048;   // routes up to which one block does everything
constexpr unsigned kAll = 0xffffffffu;

__host__ __device__ inline int64_t tokens_of_block(int64_t num_tokens, int32_t top_k) {
  if (num_tokens * top_k <= kOneBlock) return num_tokens > 0 ? num_tokens : 1;
  return top_k >= kRoutes ? 1 : kRoutes / top_k;
}

__device__ __forceinline__ int32_t slot_of(const RowMapArgs& a, int64_t route) {
  const int64_t at = route / a.top_k * a.stride_token + route % a.top_k * a.stride_k;
  const int64_t id = a.id_type == kInt32 ? static_cast<const int32_t*>(a.slot_ids)[at]
                                   : static_cast<const int64_t*>(a.slot_ids)[at];
  return id >= 0 && id < a.num_slots ? static_cast<int32_t>(id) : -1;
}

__global__ void __launch_bounds__(kThreads) count_kernel(RowMapArgs a, int64_t tokens_per_block) {
  extern __shared__ int32_t count[];
  for (int32_t p = threadIdx.x; p < a.num_slots; p += kThreads) count[p] = 0;
  __syncthreads();
  const int64_t first = blockIdx.x * tokens_per_block * a.top_k;
  const int64_t end = min(first + tokens_per_block * a.top_k, a.num_tokens * a.top_k);
  for (int64_t route = first + threadIdx.x; route < end; route += kThreads) {
    const int32_t slot = slot_of(a, route);
    if (slot >= 0) atomicAdd(&count[slot], 1);
  }
  __syncthreads();
  for (int32_t p = threadIdx.x; p < a.num_slots; p += kThreads)
    a.counts[static_cast<int64_t>(blockIdx.x) * a.num_slots + p] = count[p];
}

// start[p] = sum of room[q] over q < p, for p = 0..P; start holds room on entry.
__device__ void exclusive_scan(int32_t* start, int32_t num_slots) {
  __shared__ int32_t warp_sum[kWarps];
  const int32_t chunk = (num_slots + kThreads - 1) / kThreads;
  const int32_t first = threadIdx.x * chunk;
  int32_t own = 0;
  for (int32_t p = first; p < min(first + chunk, num_slots); ++p) own += start[p];
  int32_t scan = own;
  for (int step = 1; step < 32; step *= 2) {
    const int32_t below = __shfl_up_sync(kAll, scan, step);
    if (static_cast<int>(threadIdx.x % 32) >= step) scan += below;
  }
  if (threadIdx.x % 32 == 31) warp_sum[threadIdx.x / 32] = scan;
  __syncthreads();
  int32_t before = scan - own;
  for (unsigned w = 0; w < threadIdx.x / 32; ++w) before += warp_sum[w];
  for (int32_t p = first; p < min(first + chunk, num_slots); ++p) {
    const int32_t room = start[p];
    start[p] = before;
    before += room;
  }
  if (threadIdx.x == kThreads - 1) start[num_slots] = before;
  __syncthreads();
}

// What concerns the slots, from block 0.
__device__ void write_slots(const RowMapArgs& a, const int32_t* start, const int32_t* kept, const int32_t* routed) {
  __shared__ int32_t lost;
  if (threadIdx.x == 0) lost = 0;
  __syncthreads();
  const int32_t rows = static_cast<int32_t>(a.num_rows);
  for (int32_t p = threadIdx.x; p <= a.num_slots; p += kThreads) {
    a.slot_offsets[p] = min(start[p], rows);
    if (p == a.num_slots) continue;
    const int32_t found = max(min(start[p] + kept[p], rows) - start[p], 0);
    a.tokens_per_slot[p] = found;
    a.routed_per_slot[p] = routed[p];
    if (kept[p] > found) atomicAdd(&lost, kept[p] - found);
  }
  __syncthreads();
  if (threadIdx.x == 0) *a.overflow = lost;
}

// Shared memory: start [P + 1], kept [P], routed [P], next [warps, P].
__global__ void __launch_bounds__(kThreads) place_kernel(RowMapArgs a, int64_t tokens_per_block) {
  extern __shared__ int32_t shared[];
  const int32_t slots = a.num_slots;
  int32_t *start = shared, *kept = start + slots + 1, *routed = kept + slots, *next = routed + slots;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_token = blockIdx.x * tokens_per_block;
  const int64_t end_token = min(first_token + tokens_per_block, a.num_tokens);
  const int64_t first = first_token * a.top_k, end = end_token * a.top_k;
  const int64_t slice = ((end - first + kWarps - 1) / kWarps + 31) / 32 * 32;
  const int64_t mine = min(first + warp * slice, end), mine_end = min(mine + slice, end);
  for (int32_t i = threadIdx.x; i < kWarps * slots; i += kThreads) next[i] = 0;
  __syncthreads();
  for (int64_t route = mine + lane; route < mine_end; route += 32) {
    const int32_t slot = slot_of(a, route);
    if (slot >= 0) atomicAdd(&next[warp * slots + slot], 1);
  }
  __syncthreads();
  for (int32_t p = threadIdx.x; p < slots; p += kThreads) {
    int32_t total = 0, before = 0;
    for (unsigned b = 0; b < gridDim.x && gridDim.x > 1; ++b) {
      const int32_t part = a.counts[static_cast<int64_t>(b) * slots + p];
      total += part;
      if (b < blockIdx.x) before += part;
    }
    int32_t own = 0;
    for (int w = 0; w < kWarps; ++w) {
      const int32_t part = next[w * slots + p];
      next[w * slots + p] = before + own;
      own += part;
    }
    routed[p] = gridDim.x > 1 ? total : own;
    kept[p] = min(routed[p], a.capacity);
    start[p] = kept[p];
  }
  __syncthreads();
  exclusive_scan(start, slots);
  for (int64_t base = mine; base < mine_end; base += 32) {
    const int64_t route = base + lane;
    const int32_t slot = route < mine_end ? slot_of(a, route) : -1;
    const unsigned same = __match_any_sync(kAll, slot);
    const int32_t before = slot < 0 ? 0 : next[warp * slots + slot];
    __syncwarp();
    if (slot >= 0 && lane == __ffs(static_cast<int>(same)) - 1) next[warp * slots + slot] = before + __popc(same);
    __syncwarp();
    if (route >= mine_end) continue;
    int32_t row = -1;
    if (slot >= 0) {
      const int32_t rank = before + __popc(same & ((1u << lane) - 1));
      if (rank < kept[slot] && start[slot] + rank < a.num_rows) row = start[slot] + rank;
    }
    a.positions[route] = row;
    if (row < 0) continue;
    a.row_route[row] = static_cast<int32_t>(route);
    a.row_token[row] = static_cast<int32_t>(route / a.top_k);
  }
  if (blockIdx.x == 0) write_slots(a, start, kept, routed);
}

}  // namespace

int32_t row_map_blocks(int64_t num_tokens, int32_t top_k) {
  const int64_t tokens = tokens_of_block(num_tokens, top_k);
  const int64_t blocks = (num_tokens + tokens - 1) / tokens;
  return static_cast<int32_t>(blocks < 1 ? 1 : blocks);
}

int row_map(const RowMapArgs& a, void* stream) {
  auto s = static_cast<cudaStream_t>(stream);
  const auto blocks = static_cast<unsigned>(row_map_blocks(a.num_tokens, a.top_k));
  const int64_t tokens = tokens_of_block(a.num_tokens, a.top_k);
  if (a.fill != 0 && a.num_rows > 0) {
    const size_t bytes = static_cast<size_t>(a.num_rows) * sizeof(int32_t);
    if (cudaMemsetAsync(a.row_route, 0xff, bytes, s) != cudaSuccess) return cudaGetLastError();
    if (cudaMemsetAsync(a.row_token, 0xff, bytes, s) != cudaSuccess) return cudaGetLastError();
  }
  const int bytes = static_cast<int>(((3 + kWarps) * a.num_slots + 1) * sizeof(int32_t));
  if (bytes > 47 * 1024) {  // of the 48 KiB that every block may have, a little is static
    const cudaError_t rc = cudaFuncSetAttribute(place_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (rc != cudaSuccess) return cudaGetLastError();
  }
  if (blocks > 1) {
    count_kernel<<<blocks, kThreads, a.num_slots * sizeof(int32_t), s>>>(a, tokens);
    const cudaError_t rc = cudaGetLastError();
    if (rc != cudaSuccess) return rc;
  }
  place_kernel<<<blocks, kThreads, static_cast<size_t>(bytes), s>>>(a, tokens);
  return cudaGetLastError();
}

}  // namespace moe_locality
