// The gate: one warp a token, its scores in registers. Experts are compared by one 64-bit number: the bits of the key,
// made to sort like the number, above the reversed id. So ties go to the lower id and nothing is picked twice.
#include "kernels.h"
#include "vectors.cuh"

namespace moe_locality {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr long long kLowest = -0x7fffffffffffffffll - 1;

__device__ __forceinline__ long long sortable(float key, int32_t reversed_id) {
  int32_t bits = __float_as_int(key + 0.f);  // -0 and 0 are equal
  if (key != key) bits = 0x7fc00000;
  if (bits < 0) bits ^= 0x7fffffff;
  return static_cast<long long>(bits) * (1ll << 32) | reversed_id;
}

__device__ __forceinline__ long long warp_max(long long v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v = max(v, __shfl_xor_sync(kAll, v, step));
  return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(kAll, v, step));
  return v;
}

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(kAll, v, step);
  return v;
}

// The dtype is looked up at run time: a template for each would only make the build longer.
__device__ __forceinline__ float read(const void* from, int64_t at, int32_t dtype) {
  if (dtype == kFloat32) return static_cast<const float*>(from)[at];
  if (dtype == kFloat16) return to_float(static_cast<const __half*>(from)[at]);
  return to_float(static_cast<const __nv_bfloat16*>(from)[at]);
}

__device__ __forceinline__ void write(void* to, int64_t at, int32_t dtype, float value) {
  if (dtype == kFloat32)
    static_cast<float*>(to)[at] = value;
  else if (dtype == kFloat16)
    static_cast<__half*>(to)[at] = from_float<__half>(value);
  else
    static_cast<__nv_bfloat16*>(to)[at] = from_float<__nv_bfloat16>(value);
}

// Expert lane + 32 i is item i of a lane; x is left as the logits, score is what they become.
template <int N>
__device__ __forceinline__ void scores_of(const GateArgs& a, int64_t token, int lane, float (&x)[N], float (&score)[N]) {
  float top = -INFINITY;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int32_t e = lane + 32 * i;
    x[i] = e < a.num_experts ? read(a.logits, token * a.stride + e, a.dtype) : -INFINITY;
    top = fmaxf(top, x[i]);
  }
  if (a.sigmoid) {
#pragma unroll
    for (int i = 0; i < N; ++i) score[i] = 1.f / (1.f + expf(-x[i]));
    return;
  }
  top = warp_max(top);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    score[i] = expf(x[i] - top);
    if (lane + 32 * i < a.num_experts) sum += score[i];
  }
  sum = warp_sum(sum);
#pragma unroll
  for (int i = 0; i < N; ++i) score[i] /= sum;
}

template <int N>
__device__ void keep_best_groups(const GateArgs& a, int lane, const float (&key)[N], long long (&packed)[N]) {
  const int32_t size = a.num_experts / a.num_groups;
  long long order = kLowest;  // of group `lane`
  for (int32_t g = 0; g < a.num_groups; ++g) {
    float best = 0.f;
    long long below = 0x7fffffffffffffffll;
    for (int32_t round = 0; round < (a.sum_two && size > 1 ? 2 : 1); ++round) {
      long long largest = kLowest;
#pragma unroll
      for (int i = 0; i < N; ++i)
        if ((lane + 32 * i) / size == g && packed[i] < below) largest = max(largest, packed[i]);
      below = warp_max(largest);
      float value = 0.f;
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (packed[i] == below) value = key[i];
      best += __shfl_sync(kAll, value, static_cast<int>((a.num_experts - 1 - (below & 0x7fffffff)) % 32));
    }
    if (lane == g) order = sortable(best, a.num_groups - 1 - g);
  }
  unsigned allowed = 0;
  for (int32_t round = 0; round < a.top_groups; ++round) {
    const bool chosen = order == warp_max(order);
    allowed |= __ballot_sync(kAll, chosen);
    if (chosen) order = kLowest;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int32_t e = lane + 32 * i;
    if (e < a.num_experts && !(allowed >> (e / size) & 1u)) packed[i] = kLowest;
  }
}

template <int N>
__global__ void __launch_bounds__(kThreads) gate_kernel(GateArgs a) {
  const int lane = threadIdx.x % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (token >= a.num_tokens) return;
  float key[N], score[N];
  long long packed[N];
  scores_of<N>(a, token, lane, key, score);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int32_t e = lane + 32 * i;
    if (!a.by_logit) key[i] = score[i];
    if (a.bias != nullptr && e < a.num_experts) key[i] += a.bias[e];
    packed[i] = e < a.num_experts ? sortable(key[i], a.num_experts - 1 - e) : kLowest;
  }
  if (a.top_groups < a.num_groups) keep_best_groups<N>(a, lane, key, packed);
  float sum = 0.f;
  for (int32_t k = 0; k < a.top_k; ++k) {
    long long largest = kLowest;
#pragma unroll
    for (int i = 0; i < N; ++i) largest = max(largest, packed[i]);
    largest = warp_max(largest);
    const auto e = static_cast<int32_t>(a.num_experts - 1 - (largest & 0x7fffffff));
    float weight = 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (packed[i] == largest) {
        weight = score[i];
        packed[i] = kLowest;
      }
    weight = __shfl_sync(kAll, weight, e % 32);
    sum += weight;
    if (lane == 0) {
      a.ids[token * a.top_k + k] = e;
      a.weights[token * a.top_k + k] = weight;
    }
  }
  const float factor = a.scale / (a.renormalize ? fmaxf(sum, a.tiny) : 1.f);
  __syncwarp();
  for (int32_t k = lane; k < a.top_k; k += 32) a.weights[token * a.top_k + k] *= factor;
}

template <int N>
__global__ void __launch_bounds__(kThreads) gate_backward_kernel(GateArgs a) {
  const int lane = threadIdx.x % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (token >= a.num_tokens) return;
  float x[N], score[N], grad[N];
  unsigned picked = 0;  // bit i: item i was picked
  scores_of<N>(a, token, lane, x, score);
#pragma unroll
  for (int i = 0; i < N; ++i) grad[i] = 0.f;
  for (int32_t k = 0; k < a.top_k; ++k) {
    const int32_t e = a.ids[token * a.top_k + k];
    const float value = a.grad_weights[token * a.top_k + k] * a.scale;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (lane + 32 * i == e) {
        grad[i] = value;
        picked |= 1u << i;
      }
  }
  float total = 0.f, inner = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (picked >> i & 1u) total += score[i];
    if (picked >> i & 1u) inner += grad[i] * score[i];
  }
  total = warp_sum(total);
  inner = warp_sum(inner);
  if (a.renormalize) {
    const bool large = total > a.tiny;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (picked >> i & 1u) grad[i] = large ? (grad[i] - inner / total) / total : grad[i] / a.tiny;
    float again = 0.f;
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (picked >> i & 1u) again += grad[i] * score[i];
    inner = warp_sum(again);
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (lane + 32 * i >= a.num_experts) continue;
    const float value = a.sigmoid ? grad[i] * score[i] * (1.f - score[i]) : (grad[i] - inner) * score[i];
    write(a.grad_logits, token * a.num_experts + lane + 32 * i, a.dtype, value);
  }
}

template <int N>
void launch(const GateArgs& a, bool backward, cudaStream_t s) {
  const auto grid = static_cast<unsigned>((a.num_tokens + kWarps - 1) / kWarps);
  if (backward)
    gate_backward_kernel<N><<<grid, kThreads, 0, s>>>(a);
  else
    gate_kernel<N><<<grid, kThreads, 0, s>>>(a);
}

int run(const GateArgs& a, bool backward, void* stream) {
  if (a.num_experts > 1024 || a.num_groups > 32 || a.dtype < kFloat32 || a.dtype > kBFloat16)
    return cudaErrorInvalidValue;
  if (a.num_tokens == 0) return cudaSuccess;
  auto s = static_cast<cudaStream_t>(stream);
  if (a.num_experts <= 32)
    launch<1>(a, backward, s);
  else if (a.num_experts <= 64)
    launch<2>(a, backward, s);
  else if (a.num_experts <= 128)
    launch<4>(a, backward, s);
  else if (a.num_experts <= 256)
    launch<8>(a, backward, s);
  else if (a.num_experts <= 512)
    launch<16>(a, backward, s);
  else
    launch<32>(a, backward, s);
  return cudaGetLastError();
}

}  // namespace

int gate(const GateArgs& a, void* stream) { return run(a, false, stream); }
int gate_backward(const GateArgs& a, void* stream) { return run(a, true, stream); }

}  // namespace moe_locality
