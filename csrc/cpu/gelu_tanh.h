#pragma once
#include "level.h"

namespace fastdiff {
struct GeluTanhArgs {
  const void* x;     // [rows, dim], row stride x_stride (elements), unit last stride
  const void* bias;  // [dim] or null
  void* y;           // [rows, dim] contiguous
  int64_t rows, dim, x_stride;
  Dtype dtype;
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(gelu_tanh, GeluTanhArgs)
