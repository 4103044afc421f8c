#pragma once
#include "level.h"

namespace fastdiff {
// As fastdiff/ops/quant_linear.py defines them; all contiguous.
struct QuantLinearArgs {
  const int8_t* q;       // [M, K]
  const float* s;        // [M]
  const int8_t* values;  // [N, K]
  const float* scale;    // [N, G]
  const void* bias;      // [N], or null
  void* y;               // [M, N]
  int64_t M, N, K, G;    // G divides K; 0 where K is 0
  int activation;        // 0 none, 1 GELU (tanh form), 2 SiLU
  Dtype dtype;           // of bias and y
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(quant_linear, QuantLinearArgs)
