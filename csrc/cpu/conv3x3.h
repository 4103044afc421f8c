#pragma once
#include "level.h"

namespace fastdiff {

// Pixels last: x [batch, height, width, in] (halves of height and width where upsample), add and y
// [batch, height, width, out].
struct Conv3x3Args {
  const float* x;
  const float* weight;  // [out, in, 3, 3] with the strides below
  const float* bias;    // [out] with bias_stride 0, or [batch, out]; or null
  const float* add;     // or null
  float* y;
  int64_t weight_out, weight_in, weight_row, weight_column;
  int64_t batch, height, width, in, out, bias_stride, threads;
  bool upsample;
};

}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(conv3x3, Conv3x3Args)
