#include "cpu/sparse_grad.h"

#include <ATen/ops/zeros.h>

#include "common.h"

namespace fastdiff {
namespace {

// Rows begin and columns lie where they may. A GPU's kernels clamp the former and skip the latter.
void check_entries(const char* op, const at::Tensor& crow, const at::Tensor& col,
                   const at::Tensor& x, int64_t rows, int64_t columns) {
  check_device(op, "crow", crow, x);
  check_dtype(op, "crow", crow, at::kInt);
  check_sizes(op, "crow", crow, {rows + 1});
  check_device(op, "col", col, x);
  check_dtype(op, "col", col, at::kInt);
  check_dim(op, "col", col, 1);
  if (on_gpu(x)) return;
  const int32_t *row = crow.const_data_ptr<int32_t>(), *at = col.const_data_ptr<int32_t>();
  const int64_t nnz = col.size(0);
  for (int64_t o = 0; o <= rows; ++o) {
    const int64_t last = o ? row[o - 1] : 0;
    TORCH_CHECK_VALUE(
        row[o] >= last && row[o] <= nnz && (o || !row[o]) && (o < rows || row[o] == nnz), op,
        ": crow has value ", row[o], " at ", o, ", need ascending values from 0 to ", nnz);
  }
  for (int64_t e = 0; e < nnz; ++e)
    TORCH_CHECK_VALUE(at[e] >= 0 && at[e] < columns, op, ": col has value ", at[e], ", need 0 to ",
                      columns - 1);
}

at::Tensor sparse_weight_grad(const at::Tensor& grad_in, const at::Tensor& x_in,
                              const at::Tensor& crow_in, const at::Tensor& col_in,
                              int64_t block_rows, int64_t block_cols) {
  const char* op = "sparse_weight_grad";
  check_runs(op, "x", x_in);
  check_dim(op, "x", x_in, 2);
  check_device(op, "grad", grad_in, x_in);
  check_dtype(op, "grad", grad_in, x_in.scalar_type());
  check_dim(op, "grad", grad_in, 2);
  TORCH_CHECK(grad_in.size(0) == x_in.size(0), op, ": grad has shape ", grad_in.sizes(), ", need ",
              x_in.size(0), " rows");
  SparseWeightGradArgs args{};
  args.dtype = dtype_of(op, "x", x_in);
  args.T = x_in.size(0), args.O = grad_in.size(1), args.I = x_in.size(1);
  TORCH_CHECK(block_rows > 0 && block_cols > 0 && block_rows < 4096 && block_cols < 4096 &&
                  args.O % block_rows == 0 && args.I % block_cols == 0,
              op, ": a block is ", block_rows, " x ", block_cols, ", need divisors of ", args.O,
              " and ", args.I);
  const at::Tensor crow = crow_in.contiguous(), col = col_in.contiguous();
  check_entries(op, crow, col, x_in, args.O / block_rows, args.I / block_cols);
  const at::Tensor grad = unit_last(grad_in) ? grad_in : grad_in.contiguous();
  const at::Tensor x = unit_last(x_in) ? x_in : x_in.contiguous();
  args.nnz = col.size(0), args.block_rows = int(block_rows), args.block_cols = int(block_cols);
  args.grad_stride = grad.stride(0), args.x_stride = x.stride(0);
  const auto options = x.options().dtype(at::kFloat);
  const bool single = block_rows == 1 && block_cols == 1;
  const std::vector<int64_t> shape = single
                                         ? std::vector<int64_t>{args.nnz}
                                         : std::vector<int64_t>{args.nnz, block_rows, block_cols};
  if (!args.T) return at::zeros(shape, options);
  at::Tensor out = at::empty(shape, options);
  args.grad = grad.const_data_ptr(), args.x = x.const_data_ptr();
  args.crow = crow.const_data_ptr<int32_t>(), args.col = col.const_data_ptr<int32_t>();
  args.out = out.mutable_data_ptr<float>();
  if (args.nnz) FASTDIFF_RUN(sparse_weight_grad, args, x);
  return out;
}

bool channels_last(const at::Tensor& t) {
  return !t.is_contiguous() && t.is_contiguous(at::MemoryFormat::ChannelsLast);
}

at::Tensor sparse_conv2d_weight_grad(const at::Tensor& grad_in, const at::Tensor& x_in,
                                     const at::Tensor& crow_in, const at::Tensor& col_in,
                                     at::IntArrayRef kernel, at::IntArrayRef stride,
                                     at::IntArrayRef padding, at::IntArrayRef dilation) {
  const char* op = "sparse_conv2d_weight_grad";
  check_runs(op, "x", x_in);
  check_dim(op, "x", x_in, 4);
  check_device(op, "grad", grad_in, x_in);
  check_dtype(op, "grad", grad_in, x_in.scalar_type());
  check_dim(op, "grad", grad_in, 4);
  SparseConvWeightGradArgs args{};
  args.dtype = dtype_of(op, "x", x_in);
  args.B = x_in.size(0), args.C = x_in.size(1), args.H = x_in.size(2), args.W = x_in.size(3);
  args.O = grad_in.size(1);
  TORCH_CHECK(
      kernel.size() == 2 && stride.size() == 2 && padding.size() == 2 && dilation.size() == 2, op,
      ": kernel, stride, padding and dilation need 2 values each");
  int64_t need[2];
  for (int d = 0; d < 2; ++d) {
    TORCH_CHECK(kernel[d] > 0 && stride[d] > 0 && padding[d] >= 0 && dilation[d] > 0, op,
                ": kernel ", kernel, ", stride ", stride, ", padding ", padding, ", dilation ",
                dilation, "; need positive values, padding from 0");
    args.kernel[d] = kernel[d], args.stride[d] = stride[d];
    args.padding[d] = padding[d], args.dilation[d] = dilation[d];
    const int64_t over = x_in.size(2 + d) + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1;
    need[d] = over < 0 ? 0 : over / stride[d] + 1;
  }
  args.Ho = need[0], args.Wo = need[1];
  check_sizes(op, "grad", grad_in, {args.B, args.O, args.Ho, args.Wo});
  const at::Tensor crow = crow_in.contiguous(), col = col_in.contiguous();
  check_entries(op, crow, col, x_in, args.O, args.C * kernel[0] * kernel[1]);
  const at::Tensor grad = channels_last(grad_in) ? grad_in : grad_in.contiguous();
  const at::Tensor x = channels_last(x_in) ? x_in : x_in.contiguous();
  args.grad_last = channels_last(grad), args.x_last = channels_last(x);
  args.nnz = col.size(0);
  const auto options = x.options().dtype(at::kFloat);
  if (!grad.numel()) return at::zeros({args.nnz}, options);
  at::Tensor out = at::empty({args.nnz}, options);
  args.grad = grad.const_data_ptr(), args.x = x.const_data_ptr();
  args.crow = crow.const_data_ptr<int32_t>(), args.col = col.const_data_ptr<int32_t>();
  args.out = out.mutable_data_ptr<float>();
  if (args.nnz) FASTDIFF_RUN(sparse_conv2d_weight_grad, args, x);
  return out;
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("sparse_weight_grad", &fastdiff::sparse_weight_grad);
  m.impl("sparse_conv2d_weight_grad", &fastdiff::sparse_conv2d_weight_grad);
}

TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) {
  m.impl("sparse_weight_grad", &fastdiff::sparse_weight_grad);
  m.impl("sparse_conv2d_weight_grad", &fastdiff::sparse_conv2d_weight_grad);
}
