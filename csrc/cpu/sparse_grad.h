#pragma once
#include "level.h"

namespace fastdiff {
// As fastdiff/ops/sparse_grad.py defines them; strides in elements. Rows of entries begin at crow,
// columns of a row ascend in col.
struct SparseWeightGradArgs {
  const void* grad;     // [T, O], row stride grad_stride
  const void* x;        // [T, I], row stride x_stride
  const int32_t* crow;  // [O / block_rows + 1]
  const int32_t* col;   // [nnz], in blocks
  float* out;           // [nnz, block_rows, block_cols] contiguous
  int64_t T, O, I, nnz, grad_stride, x_stride;
  int block_rows, block_cols;
  Dtype dtype;
};

struct SparseConvWeightGradArgs {
  const void* grad;  // [B, O, Ho, Wo] and x [B, C, H, W]: NCHW or channels-last
  const void* x;
  const int32_t* crow;  // [O + 1]
  const int32_t* col;   // [nnz], of C * kh * kw
  float* out;           // [nnz]
  int64_t B, O, Ho, Wo, C, H, W, nnz;
  int64_t kernel[2], stride[2], padding[2], dilation[2];  // rows, columns
  bool grad_last, x_last;                                 // channels-last
  Dtype dtype;
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(sparse_weight_grad, SparseWeightGradArgs)
FASTDIFF_DECLARE_KERNEL(sparse_conv2d_weight_grad, SparseConvWeightGradArgs)
