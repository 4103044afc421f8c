#pragma once
#include "level.h"

namespace fastdiff {
constexpr int kMaxModels = 16;

// How the logits of a model lie: one for each element of x, in its order; or one for each position,
// which all channels share, with channels innermost in x or positions.
enum class Maps : int { kEach = 0, kRows = 1, kPlanes = 2 };

// Model k, sample b starts at data[k * k_stride + b * b_stride], and is contiguous.
struct Models {
  const void* data;
  int64_t k_stride, b_stride;
};

// out = sum over k of w_k x_k with w = softmax over k of the logits.
struct AggregateFeaturesArgs {
  Models x;       // [C, P], or [P, C] with kRows
  Models logits;  // [P], or C P elements with kEach
  void* out;      // [B] samples like x's
  int64_t K, B, C, P;
  Maps maps;
  bool wide;  // logits are float32, else of the dtype of x
  Dtype dtype;
};

// grad_x_k = w_k grad;  grad_logits_k = w_k (d_k - sum_j w_j d_j) with d_k the sum of grad x_k over
// the channels that share a logit.
struct AggregateFeaturesBackwardArgs {
  Models x, logits;
  const void* grad;            // [B] samples like x's, contiguous
  void *grad_x, *grad_logits;  // [K, B] like x and the logits, contiguous
  int64_t K, B, C, P;
  Maps maps;
  bool wide;
  Dtype dtype;
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(aggregate_features, AggregateFeaturesArgs)
FASTDIFF_DECLARE_KERNEL(aggregate_features_backward, AggregateFeaturesBackwardArgs)
