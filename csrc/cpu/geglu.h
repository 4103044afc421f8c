#pragma once
#include "level.h"

namespace fastdiff {
struct GegluArgs {
  const void* x;     // [rows, 2 dim] contiguous
  const void* bias;  // [2 dim] or null
  void* y;           // [rows, dim] contiguous
  int64_t rows, dim;
  bool tanh;
  Dtype dtype;
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(geglu, GegluArgs)
