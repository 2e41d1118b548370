// Which slot serves each pick of one token under the rule "visited" (moe_locality/placement/serving.py): integers
// alone, and no CUDA header, so that a C++ compiler builds the same function for the host, where the tests run it.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define MOE_LOCALITY_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MOE_LOCALITY_HOST_DEVICE inline
#endif

namespace moe_locality {

// Slots and nodes that may serve each expert [E, X], the preferred ones first, -1 where there are fewer.
struct ServeTable {
  const int32_t* slots;
  const int64_t* nodes;
  int64_t num_experts;
  int32_t width;
  int32_t home_node;
};

// Turns picks [K] into slots, -1 for no pick and for an id that is no expert. A pick that is decided stands as
// -2 - slot until the end: what is left to decide is what is not negative.
MOE_LOCALITY_HOST_DEVICE void serve_token(const ServeTable& table, int64_t* picks, int32_t top_k) {
  uint64_t visited = uint64_t{1} << table.home_node;
  for (int32_t k = 0; k < top_k; ++k) {
    const int64_t expert = picks[k];
    const int64_t at = expert * table.width;
    if (expert < 0 || expert >= table.num_experts) {
      picks[k] = -1;
    } else if (table.width == 1 || table.nodes[at + 1] < 0) {
      picks[k] = -2 - static_cast<int64_t>(table.slots[at]);
      visited |= uint64_t{1} << table.nodes[at];
    }
  }
  for (;;) {  // the others in rising order of their ids; like ids are served alike
    int64_t expert = table.num_experts;
    for (int32_t k = 0; k < top_k; ++k)
      if (picks[k] >= 0 && picks[k] < expert) expert = picks[k];
    if (expert == table.num_experts) break;
    const int64_t first = expert * table.width;
    int64_t at = first;  // the preferred one, where none is visited
    for (int32_t x = table.width - 1; x >= 0; --x) {
      const int64_t node = table.nodes[first + x];
      if (node >= 0 && (visited >> node & 1) != 0) at = first + x;
    }
    visited |= uint64_t{1} << table.nodes[at];
    for (int32_t k = 0; k < top_k; ++k)
      if (picks[k] == expert) picks[k] = -2 - static_cast<int64_t>(table.slots[at]);
  }
  for (int32_t k = 0; k < top_k; ++k)
    if (picks[k] < -1) picks[k] = -2 - picks[k];
}

}  // namespace moe_locality
