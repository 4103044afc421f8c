#pragma once
#include "level.h"

namespace fastdiff {
// Routing as fastdiff/ops/moe.py defines it. All contiguous.
struct MoeRouteArgs {
  const void* logits;  // [T, E]
  const void* sample;  // [B, E], or null
  float* weights;      // [T, K]
  int64_t* experts;    // [T, K]
  int64_t* order;      // [T K]
  int64_t* position;   // [T, K]
  int64_t* offsets;    // [E + 1]
  int64_t* counts;     // [E]
  int32_t* work;       // GPU: [ceil(T K / kMoeSlots), E] slots of a block by expert, then starts
  int64_t T, E, K, B, capacity;  // capacity < 0: none
  bool sigmoid, renormalise;
  Dtype dtype, sample_dtype;
};

constexpr int kMoeMaxExperts = 256;
constexpr int kMoeSlots = 1024;  // of a block of the GPU kernel

// out[t] = sum_j weights[t, j] y[position[t, j]], in the order of j.
struct MoeCombineArgs {
  const void* y;            // [R, C]
  const float* weights;     // [T, K]
  const int64_t* position;  // [T, K], -1: none
  void* out;                // [T, C]
  int64_t T, K, R, C;
  Dtype dtype;
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(moe_route, MoeRouteArgs)
FASTDIFF_DECLARE_KERNEL(moe_combine, MoeCombineArgs)
