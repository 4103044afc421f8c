#include "cpu/grouped_quant_linear.h"

#include "groups.h"

namespace fastdiff {
namespace {

at::Tensor grouped_quant_linear(const at::Tensor& q_in, const at::Tensor& s_in,
                                const at::Tensor& values_in, const at::Tensor& scale_in,
                                const at::Tensor& offsets_in, const Optional& bias_in,
                                const Optional& index_in, std::optional<std::string> activation,
                                at::ScalarType dtype) {
  const char* op = "grouped_quant_linear";
  check_runs(op, "q", q_in);
  check_dtype(op, "q", q_in, at::kChar);
  check_dim(op, "q", q_in, 2);
  check_device(op, "s", s_in, q_in);
  check_dtype(op, "s", s_in, at::kFloat);
  check_sizes(op, "s", s_in, {q_in.size(0)});
  check_device(op, "values", values_in, q_in);
  check_dtype(op, "values", values_in, at::kChar);
  check_dim(op, "values", values_in, 3);
  GroupedQuantLinearArgs args{};
  QuantLinearArgs& all = args.all;
  all.K = q_in.size(1), args.E = values_in.size(0), all.N = values_in.size(1);
  TORCH_CHECK(args.E > 0 && values_in.size(2) == all.K, op, ": values has shape ",
              values_in.sizes(), ", need [at least 1, N, ", all.K, "]");
  check_device(op, "scale", scale_in, q_in);
  check_dtype(op, "scale", scale_in, at::kFloat);
  check_dim(op, "scale", scale_in, 3);
  all.G = all.K ? scale_in.size(2) : 0;
  TORCH_CHECK(scale_in.size(0) == args.E && scale_in.size(1) == all.N &&
                  (!all.K || (all.G && all.K % all.G == 0)),
              op, ": scale has shape ", scale_in.sizes(), ", need [", args.E, ", ", all.N,
              ", G] with G a divisor of K ", all.K);
  TORCH_CHECK(!all.K || all.K / all.G <= kMostColumns, op, ": scale has shape ", scale_in.sizes(),
              ", need groups of at most ", kMostColumns, " columns, or int32 sums overflow");
  all.activation = activation_of(op, activation);
  const bool gated = all.activation >= kGroupedGeglu;
  TORCH_CHECK(!gated || all.N % 2 == 0, op, ": values has shape ", values_in.sizes(),
              ", need an even number of rows for a gate");
  const at::Tensor q = q_in.contiguous(), s = s_in.contiguous();
  const at::Tensor values = values_in.contiguous(), scale = scale_in.contiguous();
  const at::Tensor offsets = offsets_in.contiguous();
  at::Tensor index, bias;
  if (index_in) {
    check_dim(op, "index", *index_in, 1);
    index = index_in->contiguous();
  }
  groups(op, args, q, offsets, index_in ? Optional(index) : Optional(),
         index_in ? index_in->size(0) : q.size(0));
  at::Tensor y = at::empty({args.R, gated ? all.N / 2 : all.N}, q.options().dtype(dtype));
  all.dtype = dtype_of(op, "dtype", y);
  if (bias_in) {
    check_device(op, "bias", *bias_in, q);
    check_dtype(op, "bias", *bias_in, dtype);
    check_sizes(op, "bias", *bias_in, {args.E, all.N});
    bias = bias_in->contiguous();
    all.bias = bias.const_data_ptr();
  }
  all.M = args.R, all.index = args.index;
  all.q = q.const_data_ptr<int8_t>(), all.s = s.const_data_ptr<float>();
  all.values = values.const_data_ptr<int8_t>(), all.scale = scale.const_data_ptr<float>();
  all.y = y.mutable_data_ptr();
  if (y.numel()) FASTDIFF_RUN_INT8(grouped_quant_linear, args, q);
  return y;
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("grouped_quant_linear", &fastdiff::grouped_quant_linear);
}
TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) {
  m.impl("grouped_quant_linear", &fastdiff::grouped_quant_linear);
}
