#include "cpu/quant_linear.h"

#include <string>

#include "common.h"

namespace fastdiff {
namespace {

at::Tensor quant_linear(const at::Tensor& q_in, const at::Tensor& s_in, const at::Tensor& values_in,
                        const at::Tensor& scale_in, const std::optional<at::Tensor>& bias_in,
                        std::optional<std::string> activation, at::ScalarType dtype) {
  const char* op = "quant_linear";
  check_runs(op, "q", q_in);
  const bool float8 = q_in.scalar_type() == at::kFloat8_e4m3fn;
  if (!float8 || !on_gpu(q_in)) check_dtype(op, "q", q_in, at::kChar);
  TORCH_CHECK(q_in.dim() >= 1, op, ": q has shape ", q_in.sizes(), ", need at least 1 dimension");
  QuantLinearArgs args{};
  args.float8 = float8;
  args.K = q_in.size(-1);
  const at::IntArrayRef lead = q_in.sizes().slice(0, q_in.dim() - 1);
  check_device(op, "s", s_in, q_in);
  check_dtype(op, "s", s_in, at::kFloat);
  check_sizes(op, "s", s_in, lead);
  check_device(op, "values", values_in, q_in);
  check_dtype(op, "values", values_in, q_in.scalar_type());
  check_dim(op, "values", values_in, 2);
  args.M = s_in.numel(), args.N = values_in.size(0);
  check_sizes(op, "values", values_in, {args.N, args.K});
  check_device(op, "scale", scale_in, q_in);
  check_dtype(op, "scale", scale_in, at::kFloat);
  check_dim(op, "scale", scale_in, 2);
  args.G = args.K ? scale_in.size(1) : 0;
  TORCH_CHECK(scale_in.size(0) == args.N && (!args.K || (args.G && args.K % args.G == 0)), op,
              ": scale has shape ", scale_in.sizes(), ", need [", args.N,
              ", G] with G a divisor of K ", args.K);
  TORCH_CHECK(float8 || !args.K || args.K / args.G <= kMostColumns, op, ": scale has shape ",
              scale_in.sizes(), ", need groups of at most ", kMostColumns,
              " columns, or int32 sums overflow");
  std::vector<int64_t> shape = lead.vec();
  shape.push_back(args.N);
  at::Tensor y = at::empty(shape, q_in.options().dtype(dtype)), bias;
  args.dtype = dtype_of(op, "dtype", y);
  if (bias_in) {
    check_device(op, "bias", *bias_in, q_in);
    check_dtype(op, "bias", *bias_in, dtype);
    check_sizes(op, "bias", *bias_in, {args.N});
    bias = bias_in->contiguous();
    args.bias = bias.const_data_ptr();
  }
  if (activation) {
    TORCH_CHECK(*activation == "gelu_tanh" || *activation == "silu", op, ": activation is ",
                *activation, ", need gelu_tanh or silu");
    args.activation = *activation == "silu" ? kGroupedSilu : kGroupedGeluTanh;
  }
  const at::Tensor q = q_in.contiguous(), s = s_in.contiguous();
  const at::Tensor values = values_in.contiguous(), scale = scale_in.contiguous();
  args.q = static_cast<const int8_t*>(q.const_data_ptr());
  args.values = static_cast<const int8_t*>(values.const_data_ptr());
  args.s = s.const_data_ptr<float>(), args.scale = scale.const_data_ptr<float>();
  args.y = y.mutable_data_ptr();
  if (y.numel()) FASTDIFF_RUN_INT8(quant_linear, args, q);
  return y;
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("quant_linear", &fastdiff::quant_linear); }
TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("quant_linear", &fastdiff::quant_linear); }
