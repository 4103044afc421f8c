#include "cpu/linear.h"

#include <string>

#include "common.h"

namespace fastdiff {

at::Tensor linear_few_rows_cpu(const at::Tensor& x_in, const at::Tensor& weight_in,
                               const std::optional<at::Tensor>& bias_in,
                               std::optional<std::string> activation) {
  const char* op = "linear";
  check_cpu(op, "x", x_in);
  check_cpu(op, "weight", weight_in);
  check_dim(op, "weight", weight_in, 2);
  TORCH_CHECK(x_in.dim() >= 1, op, ": x has shape ", x_in.sizes(), ", need at least 1 dimension");
  LinearArgs args{};
  args.dtype = dtype_of(op, "x", x_in);
  check_dtype(op, "weight", weight_in, x_in.scalar_type());
  args.out = weight_in.size(0), args.in = weight_in.size(1);
  TORCH_CHECK(x_in.size(-1) == args.in, op, ": weight has shape ", weight_in.sizes(), ", need [",
              args.out, ", ", x_in.size(-1), "]");
  at::Tensor x = x_in.contiguous(), bias;
  at::Tensor weight = unit_last(weight_in) ? weight_in : weight_in.contiguous();
  args.rows = args.in ? x.numel() / args.in : 0;
  args.x_stride = args.in, args.weight_stride = weight.stride(0);
  if (bias_in) {
    check_cpu(op, "bias", *bias_in);
    check_dtype(op, "bias", *bias_in, x.scalar_type());
    check_sizes(op, "bias", *bias_in, {args.out});
    bias = bias_in->contiguous();
    args.bias = bias.const_data_ptr();
  }
  if (activation) {
    TORCH_CHECK(*activation == "gelu_tanh" || *activation == "silu", op, ": activation is ",
                *activation, ", need gelu_tanh or silu");
    args.activation = *activation == "silu" ? 2 : 1;
  }
  auto shape = x.sizes().vec();
  shape.back() = args.out;
  at::Tensor y = at::empty(shape, x.options());
  TORCH_CHECK(args.in > 0 || !y.numel(), op, ": x has shape ", x_in.sizes(), ", need columns");
  args.x = x.const_data_ptr();
  args.weight = weight.const_data_ptr();
  args.y = y.mutable_data_ptr();
  if (y.numel()) FASTDIFF_CALL_KERNEL(linear_few_rows, args);
  return y;
}

}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("linear_few_rows", &fastdiff::linear_few_rows_cpu); }
