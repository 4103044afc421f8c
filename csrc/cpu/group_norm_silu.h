#pragma once
#include "level.h"

namespace fastdiff {
// x, y: [B, C, P] contiguous, or [B, P, C] contiguous with channels_last; P positions.
struct GroupNormSiluArgs {
  const void* x;
  void* y;
  const void *weight, *bias;  // [C] or null
  const void *shift, *scale;  // [B, C], strides in elements, last stride 1; or null
  int64_t shift_stride, scale_stride;
  int64_t B, C, P, groups;
  float eps;
  bool silu, channels_last;
  Dtype dtype;
};

struct GroupNormSiluBackwardArgs {
  GroupNormSiluArgs forward;  // y is the gradient of x
  const void* grad;           // of y, in the layout of x
  float* sums;  // [B, 2, C]: over positions, of grad_u and of grad_u * normalised x, u before silu
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(group_norm_silu, GroupNormSiluArgs)
FASTDIFF_DECLARE_KERNEL(group_norm_silu_backward, GroupNormSiluBackwardArgs)
