#pragma once
#include "grouped_linear.h"

namespace fastdiff {
constexpr int64_t kMostColumns = 2147483647 / (127 * 127);  // of a group: int32 holds its sums

// As fastdiff/ops/quant_linear.py defines them; all contiguous.
struct QuantLinearArgs {
  const int8_t* q;       // [M, K], or any rows with index: int8, or the bits of float8_e4m3fn
  const float* s;        // a scale for each of them
  const int8_t* values;  // [N, K], what q is
  const float* scale;    // [N, G]
  const void* bias;      // [N], or null
  void* y;               // [M, N], or [M, N / 2] with a gate
  int64_t M, N, K, G;    // G divides K; 0 where K is 0
  int activation;        // kGrouped...
  Dtype dtype;           // of bias and y
  const int64_t* index;  // [M], or null: row i is q[i]
  bool float8;           // what q is; true on a GPU alone
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(quant_linear, QuantLinearArgs)
