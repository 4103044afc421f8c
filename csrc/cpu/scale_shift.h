#pragma once
#include "level.h"

namespace fastdiff {
// Channels innermost: position (b, p) starts at data[b * b_stride + p * p_stride], its C channels
// are contiguous. Planes: [B, C, P] contiguous.
struct Positions {
  const void* data;
  int64_t b_stride, p_stride;
};

// [A, C]: a channel's neighbours are contiguous, rows `stride` elements apart; data null: absent.
struct ChannelRows {
  const void* data;
  int64_t stride;
};

// out = x scale + shift, sample b with row index[b] of scale and shift (row 0 where index is null).
struct ScaleShiftArgs {
  Positions x;
  ChannelRows scale, shift;
  const int64_t* index;  // [B], index_stride apart
  int64_t index_stride;
  void* out;  // contiguous, in the order of x
  int64_t B, C, P, A;
  bool planes;
  bool wide;  // scale and shift are float32, else of the dtype of x
  Dtype dtype;
};

// grad_x = grad scale; grad_scale = sum of grad x and grad_shift = sum of grad over the positions
// of all samples with that row.
struct ScaleShiftBackwardArgs {
  Positions grad, x;
  ChannelRows scale;
  const int64_t* index;
  int64_t index_stride;
  void* grad_x;                    // contiguous, in the order of x
  float* parts;                    // [B, pieces, 2, C]: sums over a piece of grad x and of grad
  float *grad_scale, *grad_shift;  // [A, C]
  int64_t B, C, P, A;
  int64_t piece, pieces;  // positions of a piece, pieces of a sample
  bool planes, wide;
  Dtype dtype;
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(scale_shift, ScaleShiftArgs)
FASTDIFF_DECLARE_KERNEL(scale_shift_backward, ScaleShiftBackwardArgs)
