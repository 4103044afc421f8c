#pragma once
#include "level.h"

namespace fastdiff {
// out[b] = the sum over sample b of x^2 (y null), x y, or (x - y)^2. Every sample is contiguous.
struct SampleSumsArgs {
  const void *x, *y;                 // sample b starts at x + b * x_stride
  float* out;                        // [B]
  double* parts;                     // [B, pieces]; null where a sample is one piece
  int64_t B, N, x_stride, y_stride;  // y_stride 0: one y for all
  int64_t pieces;
  bool difference;
  Dtype dtype;
};

// Elements that are added in float32; pieces are added in float64, in their order.
constexpr int64_t kSumsPiece = 4096;
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(sample_sums, SampleSumsArgs)
