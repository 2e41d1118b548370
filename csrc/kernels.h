// Launchers of the CUDA kernels: plain pointers, sizes and a stream. No CUDA and no torch header in here, so the
// kernels compile for every architecture without a GPU and the binding compiles with a C++ compiler alone.
// Shapes: T tokens, K routes of a token, P slots, N rows, D width.
// Every launcher returns a cudaError_t as int (0 = success) and never waits for the device.
#pragma once
#include <cstdint>

namespace moe_locality {

enum Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum IdType : int32_t { kInt32 = 0, kInt64 = 1 };

struct RowMapArgs {
  const void* slot_ids;  // [T, K] of id_type with the strides below, -1 = dropped
  int32_t id_type;
  int64_t stride_token, stride_k;
  int32_t* counts;           // scratch [blocks, P]
  int32_t* row_route;        // [N]
  int32_t* row_token;        // [N]
  int32_t* positions;        // [T, K]
  int64_t* tokens_per_slot;  // [P]
  int32_t* slot_offsets;     // [P + 1]
  int32_t* routed_per_slot;  // [P]
  int32_t* overflow;         // [1]
  int64_t num_tokens, num_rows;
  int32_t top_k, num_slots, capacity, fill;
};

// Blocks that the map of T tokens with K routes uses: what counts is made for.
int32_t row_map_blocks(int64_t num_tokens, int32_t top_k);
int row_map(const RowMapArgs& args, void* stream);

struct ServeArgs {
  const void* ids;  // [T, K] of id_type with the strides below, -1 = dropped
  int32_t id_type;
  int64_t stride_token, stride_k;
  const int32_t* slots;  // [E, X], the preferred one first, -1 where there are fewer
  const int64_t* nodes;  // [E, X], the node of each slot, below 63
  void* found;           // [T, K] of id_type
  int64_t num_tokens, num_experts;
  int32_t top_k, width, home_node;
};

// found[t, k]: the slot that serves each pick of tokens at home on one rank, by the token's other picks.
int serve_visited(const ServeArgs& args, void* stream);

struct PermuteArgs {
  const void* x;                // [T, D], row_bytes a row
  const int32_t* positions;     // [T, K]
  const int32_t* row_token;     // [N], used where slot_offsets is
  const int32_t* slot_offsets;  // [P + 1], null = no padding rows to zero
  void* rows;                   // [N, D]
  int64_t num_tokens, row_bytes;
  int32_t top_k, num_slots;
};

int permute(const PermuteArgs& args, void* stream);

// rows[n] = x[index[n]]
int gather(const void* x, const void* index, int32_t id_type, void* rows, int64_t num_rows, int64_t row_bytes,
           void* stream);

struct CombineArgs {
  const void* rows;          // [N, D] of dtype
  const int32_t* positions;  // [T, K]
  const float* weights;      // [T, K], null = plain sum
  void* out;                 // [T, D]
  int64_t num_tokens, width;
  int32_t top_k, dtype;
};

int combine(const CombineArgs& args, void* stream);

struct CombineBackwardArgs {
  const void* grad;             // [T, D] of dtype
  const void* rows;             // [N, D], read where there is a gradient of the weights
  const int32_t* positions;     // [T, K]
  const int32_t* row_token;     // [N], used where slot_offsets is
  const int32_t* slot_offsets;  // [P + 1], null = no padding rows to zero
  const float* weights;         // [T, K]
  void* grad_rows;              // [N, D], null = no gradient of the rows
  float* grad_weights;          // [T, K], null = no gradient of the weights
  int64_t num_tokens, width;
  int32_t top_k, num_slots, dtype;
};

int combine_backward(const CombineBackwardArgs& args, void* stream);

enum ScaleRule : int32_t { kFloorScale = 0, kOasScale = 1, kFloat32Scale = 2 };

// An encoded row is [codes | factors | gap | scales | zeros]: see moe_locality/quantization/formats.py.
struct RowFormat {
  int32_t mantissa_bits;  // 1: E2M1, two codes a byte; 3: E4M3; 2: E5M2
  int32_t block;          // elements of a scale: 16, 32 or 128
  int32_t scale_rule;     // ScaleRule
  int32_t mbs;            // one factor for 128 elements
  int32_t code_bytes, scale_start, row_bytes;
};

struct EncodeArgs {
  const void* x;             // [T, D] of dtype, x_stride elements between tokens
  const int32_t* positions;  // [T, K], null = a token is its row
  const int32_t* row_token;  // [N], its rows without a token become zeros; null = there are none
  uint8_t* rows;             // [N, row_bytes]
  int64_t x_stride, num_tokens, num_rows, width;
  int32_t top_k, dtype;
  RowFormat format;
};

// rows[positions[t, k]] = encoded x[t]: each token is read and quantized once.
int encode(const EncodeArgs& args, void* stream);

struct DecodeArgs {
  const uint8_t* rows;   // [R, row_bytes]
  const int32_t* index;  // [N], null = row n; -1 gives zeros
  void* out;             // [N, D] of dtype
  int64_t num_rows, width;
  int32_t dtype;
  RowFormat format;
};

// out[n] = decoded rows[index[n]]
int decode(const DecodeArgs& args, void* stream);

}  // namespace moe_locality
