#pragma once
#include "level.h"

namespace fastdiff {
// Element (b, n, d) at data[b * b_stride + n * n_stride + d]: n_stride 0 for one row per sample;
// data null: absent.
struct Modulation {
  const void* data;
  int64_t b_stride, n_stride;
};

// r = x + gate y (x itself where y.data is null); m = modulate(norm(r)). Strides in elements, last
// stride 1.
struct LayerNormModulateArgs {
  Modulation x, y;                // [B, N, D]
  Modulation gate, shift, scale;  // [B, D] or [B, N, D]
  const void *weight, *bias;      // [D] or null
  void *residual, *modulated;     // [B, N, D] contiguous; null: not asked for
  int64_t B, N, D;
  float eps;
  bool rms;
  Dtype dtype;
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(layer_norm_modulate, LayerNormModulateArgs)
