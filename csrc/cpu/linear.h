#pragma once
#include "level.h"

namespace fastdiff {
struct LinearArgs {
  const void* x;       // [rows, in], row stride x_stride (elements)
  const void* weight;  // [out, in], row stride weight_stride
  const void* bias;    // [out] or null
  void* y;             // [rows, out] contiguous
  int64_t rows, in, out, x_stride, weight_stride;
  int activation;  // 0 none, 1 GELU (tanh form), 2 SiLU
  Dtype dtype;
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(linear_few_rows, LinearArgs)
