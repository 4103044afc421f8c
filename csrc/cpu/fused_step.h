#pragma once
#include "level.h"

namespace fastdiff {

// Columns of a coefficient row, in the order of fastdiff/ops/fused_step.py.
enum StepColumn : int {
  kAx,
  kAm,
  kCx,
  kC0,
  kCm,
  kCh1,
  kCh2,
  kSigma,
  kKx,
  kK0,
  kKm,
  kClip,
  kRa,
  kRb,
  kStepColumns
};

constexpr int64_t kNoiseGroup = 64;   // elements that share 16 Philox counters
constexpr int64_t kStepChunk = 4096;  // elements of a task; fixed: sums do not depend on threads

// An integer for each sample (stride in elements), or one for all (stride 0). Kernels read it where
// it lies: a GPU's is never waited for.
struct Counter {
  const int64_t* data;
  int64_t stride;
};

// Philox keys, and the counter words that do not depend on the element.
struct NoiseCounters {
  Counter seed, slot, step;  // seed.data null: no noise
  uint32_t stream;
};

// Samples are contiguous runs of `numel` elements; x, h1, h2, ref, stored, y, kept share a dtype.
struct FusedStepArgs {
  const void *x, *h1, *h2, *ref, *stored;  // [batch, numel]; all but x may be null
  const void* m;                           // branch k of sample b at k * m_branch + b * m_sample
  const float* w;                          // [batch, branches] or null (one branch of weight 1)
  const float* coef;                       // [rows, kStepColumns]
  Counter row;                             // of coef; data null: row b * stride
  const float* phi;                        // [batch] or null
  NoiseCounters noise;
  const float* mask;   // sample stride mask_sample; one channel where mask_plane
  const bool* select;  // [batch] or null
  void *y, *kept;      // kept may be null
  float* factor;       // [batch] scratch where phi: guidance rescale
  double* moments;     // [batch, chunks, 4] scratch where phi
  int64_t batch, branches, numel, chunks, rows, m_branch, m_sample;
  int64_t mask_sample, mask_plane;  // plane: 0, or elements of a [*, 1, ...] mask
  Dtype dtype, m_dtype;
};

struct PhiloxNormalArgs {
  NoiseCounters noise;
  float* z;  // [batch, numel]
  int64_t batch, numel;
};

}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(fused_step, FusedStepArgs)
FASTDIFF_DECLARE_KERNEL(philox_normal, PhiloxNormalArgs)
