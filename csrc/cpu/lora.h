#pragma once
#include "level.h"

namespace fastdiff {
// As fastdiff/ops/lora.py defines them; strides in elements.
struct LoraAddArgs {
  const void* y;         // [B, T, N], strides y_b, y_t
  const void* x;         // [B, T, K], strides x_b, x_t
  const void* down;      // [A, rank, K] contiguous
  const void* up;        // [A, N, rank] contiguous
  const float* scale;    // [A]
  const int64_t* index;  // [B], 0 for no adapter; or null: all have the first
  void* out;             // [B, T, N] contiguous
  void* low;             // [B, T, rank] contiguous, x down^T without the scale; or null
  int64_t B, T, A, N, K, rank, y_b, y_t, x_b, x_t;
  Dtype dtype;
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(lora_add, LoraAddArgs)
