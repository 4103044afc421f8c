#pragma once
#include "level.h"

namespace fastdiff {
struct QkNormRopeTensor {
  const void* x;       // [batch, heads, length, dim], unit last stride
  void* y;             // the same shape, unit last stride
  const void* weight;  // [dim] or null: no normalisation
  int64_t heads;
  int64_t x_b, x_h, x_s, y_b, y_h, y_s;  // strides in elements
};
struct QkNormRopeArgs {
  QkNormRopeTensor tensors[2];  // q and k
  const float* cos;             // [positions, half] or null: no rotation
  const float* sin;
  const int64_t* position;  // [batch|1, length], in range, or null: the token's index
  int64_t batch, length, dim, half;
  int64_t position_b;  // 0 where one row serves all samples
  float eps;
  bool interleaved;
  Dtype dtype;
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(qk_norm_rope, QkNormRopeArgs)
