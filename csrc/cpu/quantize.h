#pragma once
#include "level.h"

namespace fastdiff {
// As fastdiff/ops/quantize.py defines them; strides in elements.
struct QuantizeArgs {
  const void* x;        // [rows, dim], row stride x_stride, unit last stride
  const float* smooth;  // [dim], or null
  int8_t* q;            // [rows, dim] contiguous; int8, or on a GPU the bits of float8_e4m3fn
  float* s;             // [rows]
  int64_t rows, dim, x_stride;
  int activation;  // 0 none, 1 GELU (tanh form), 2 SiLU, 3 GEGLU: x is [rows, 2 dim]
  Dtype dtype;     // of x
  bool float8;     // what q is
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(quantize, QuantizeArgs)
