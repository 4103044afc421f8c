#pragma once
#include "level.h"

namespace fastdiff {
// Whether an index ascends, each value above the one before it.
struct SparseAdamwOrderArgs {
  const void* index;  // [n] int32, or int64 where wide
  int64_t n;
  bool wide;
  bool* ascends;
};

// One step on n packed values, which are then written to weight[index]. Numbers are those of
// torch.optim.AdamW, rounded once from double.
struct SparseAdamwArgs {
  float *values, *exp_avg, *exp_avg_sq;  // [n]
  const float* grad;                     // [n]
  void* weight;                          // [size]
  const void* index;                     // [n] int32, or int64 where wide
  int64_t n, size;
  float decay, weight1, beta2, weight2, eps;  // 1 - lr weight_decay, 1 - beta1, ., 1 - beta2, .
  float step_size, root;  // -lr / (1 - beta1^t), sqrt(1 - beta2^t); of the host's t
  bool wide;
  Dtype dtype;                        // of weight
  void (*sqrt)(float* x, int64_t n);  // the CPU's: torch's own, in place; its last bit is no
                                      // rounded square root's
  const float* step;  // the GPU's: null, or t itself in its memory, which the two below go with
  double lr, log_beta1, log_beta2;
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(sparse_adamw_order, SparseAdamwOrderArgs)
FASTDIFF_DECLARE_KERNEL(sparse_adamw, SparseAdamwArgs)
