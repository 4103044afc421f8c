#pragma once
#include "level.h"

namespace fastdiff {
// As fastdiff/ops/quantize_patches.py defines them; strides in elements.
struct QuantizePatchesArgs {
  const void* x;  // [batch, channels, height, width] with the strides below, that of channels 1
  int8_t* q;      // [batch, rows, columns, size, size, channels] contiguous
  float* s;       // [batch, rows, columns]
  int64_t x_batch, x_row, x_column;
  int64_t batch, channels, height, width, rows, columns, size, stride, padding;
  bool upsample;
  Dtype dtype;  // of x
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(quantize_patches, QuantizePatchesArgs)
