#pragma once
#include "level.h"

namespace fastdiff {
// As fastdiff/ops/grouped_linear.py defines them; strides in elements.
struct GroupedLinearArgs {
  const void* x;           // [T, K], row stride x_stride
  const void* weight;      // [E, N, K], strides weight_e, weight_n, weight_k: one of the last two 1
  const void* bias;        // [E, N] contiguous, or null
  const int64_t* offsets;  // [E + 1]
  const int64_t* index;    // [R], or null: row r is x[r]
  void* y;                 // [R, N], or [R, N / 2] with a gate; contiguous
  int64_t R, T, E, N, K, x_stride, weight_e, weight_n, weight_k;
  int activation;  // kGrouped...
  Dtype dtype;
};

enum GroupedActivation : int {
  kGroupedNone = 0,
  kGroupedGelu = 1,
  kGroupedGeluTanh = 2,
  kGroupedSilu = 3,
  kGroupedGeglu = 4,    // h GELU(g), u = [h, g]
  kGroupedSwiglu = 5,   // SiLU(g) h, u = [g, h]
  kGroupedSwishglu = 6  // h SiLU(g), u = [h, g]
};

// out[e] = sum over the rows r of e of grad[r]^T x[index[r]].
struct GroupedWeightGradArgs {
  const void* grad;        // [R, N] contiguous
  const void* x;           // [T, K], row stride x_stride
  const int64_t* offsets;  // [E + 1]
  const int64_t* index;    // [R], or null
  void* out;               // [E, N, K] contiguous
  int64_t R, T, E, N, K, x_stride;
  Dtype dtype;
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(grouped_linear, GroupedLinearArgs)
FASTDIFF_DECLARE_KERNEL(grouped_weight_grad, GroupedWeightGradArgs)
