// Local half of the dispatch: rows into expert order, and back with the gate weights.
// No torch header in here: plain pointers, sizes and a stream, so every architecture compiles without a GPU.
// Shapes: x [T, D] tokens, rows [N, D] routed copies, source [N] token of each row, position [T, K] row of each
// pick (-1 = no pick), weight [T, K] float.
#pragma once
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

extern "C" {

// rows[n] = x[source[n]], row_bytes bytes a row (a multiple of 16, both pointers 16-byte aligned).
// Returns a cudaError_t as int.
int moe_locality_permute(const void* x, const int32_t* source, void* rows, int64_t num_rows, int64_t row_bytes,
                         cudaStream_t stream);

// out[t] = sum over k of weight[t, k] * rows[position[t, k]], fp32 sums in the order of k. width = D.
int moe_locality_combine_bf16(const __nv_bfloat16* rows, const int32_t* position, const float* weight,
                              __nv_bfloat16* out, int64_t num_tokens, int64_t width, int32_t top_k,
                              cudaStream_t stream);
}
