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
  const float* smooth;  // [D] or null, of what follows
  int8_t* q;            // [B, N, D] contiguous: m / smooth as int8 in place of `modulated`, or null
  float* s;             // [B, N]
};

// Gradients of the above for modulations per sample. Each gradient that comes in may be absent.
struct LayerNormModulateBackwardArgs {
  Modulation x, y;                           // [B, N, D]; y absent: no residual
  Modulation gate, scale;                    // [B, D]
  const void* weight;                        // [D] or null
  Modulation grad_residual, grad_modulated;  // [B, N, D]; no norm where grad_modulated is absent
  void *grad_x, *grad_y;                     // [B, N, D] contiguous; grad_y null where y is absent
  float* sums;  // [B, pieces, 3, D]: over a piece's tokens, the sums of grad_modulated,
                // grad_modulated * normalised and grad_x * y
  int64_t B, N, D;
  int64_t piece, pieces;  // tokens of a piece, pieces of a sample
  float eps;
  bool rms;
  Dtype dtype;
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(layer_norm_modulate, LayerNormModulateArgs)
FASTDIFF_DECLARE_KERNEL(layer_norm_modulate_backward, LayerNormModulateBackwardArgs)
