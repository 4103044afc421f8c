#include "cpu/grouped_linear.h"

#include <string>

#include "groups.h"

namespace fastdiff {
namespace {

at::Tensor grouped_linear(const at::Tensor& x_in, const at::Tensor& weight_in,
                          const at::Tensor& offsets_in, const Optional& bias_in,
                          const Optional& index_in, std::optional<std::string> activation) {
  const char* op = "grouped_linear";
  check_runs(op, "x", x_in);
  check_dim(op, "x", x_in, 2);
  GroupedLinearArgs args{};
  args.dtype = dtype_of(op, "x", x_in);
  check_device(op, "weight", weight_in, x_in);
  check_dtype(op, "weight", weight_in, x_in.scalar_type());
  check_dim(op, "weight", weight_in, 3);
  TORCH_CHECK(weight_in.size(2) == x_in.size(1) && weight_in.size(0) > 0, op, ": weight has shape ",
              weight_in.sizes(), ", need [at least 1, N, ", x_in.size(1), "]");
  const at::Tensor x = unit_last(x_in) ? x_in : x_in.contiguous();
  const bool as_is = unit_last(weight_in) || weight_in.stride(1) == 1;
  const at::Tensor weight = as_is ? weight_in : weight_in.contiguous();
  const at::Tensor offsets = offsets_in.contiguous();
  at::Tensor index, bias;
  if (index_in) {
    check_dim(op, "index", *index_in, 1);
    index = index_in->contiguous();
  }
  args.E = weight.size(0), args.N = weight.size(1);
  args.K = x.size(1), args.x_stride = x.stride(0);
  groups(op, args, x, offsets, index_in ? Optional(index) : Optional(),
         index_in ? index_in->size(0) : x.size(0));
  args.weight_e = weight.stride(0);
  args.weight_n = weight.stride(1);
  args.weight_k = unit_last(weight) ? 1 : weight.stride(2);
  if (bias_in) {
    check_device(op, "bias", *bias_in, x);
    check_dtype(op, "bias", *bias_in, x.scalar_type());
    check_sizes(op, "bias", *bias_in, {args.E, args.N});
    bias = bias_in->contiguous();
    args.bias = bias.const_data_ptr();
  }
  args.activation = activation_of(op, activation);
  const bool gated = args.activation >= kGroupedGeglu;
  TORCH_CHECK(!gated || args.N % 2 == 0, op, ": weight has shape ", weight.sizes(),
              ", need an even number of rows for a gate");
  at::Tensor y = at::empty({args.R, gated ? args.N / 2 : args.N}, x.options());
  args.x = x.const_data_ptr(), args.weight = weight.const_data_ptr();
  args.y = y.mutable_data_ptr();
  if (y.numel()) FASTDIFF_RUN(grouped_linear, args, x);
  return y;
}

at::Tensor grouped_weight_grad(const at::Tensor& grad_in, const at::Tensor& x_in,
                               const at::Tensor& offsets_in, const Optional& index_in) {
  const char* op = "grouped_weight_grad";
  check_runs(op, "x", x_in);
  check_dim(op, "x", x_in, 2);
  GroupedWeightGradArgs args{};
  args.dtype = dtype_of(op, "x", x_in);
  check_device(op, "grad", grad_in, x_in);
  check_dtype(op, "grad", grad_in, x_in.scalar_type());
  check_dim(op, "grad", grad_in, 2);
  check_dim(op, "offsets", offsets_in, 1);
  TORCH_CHECK(offsets_in.size(0) > 1, op, ": offsets has shape ", offsets_in.sizes(),
              ", need [groups + 1]");
  const at::Tensor x = unit_last(x_in) ? x_in : x_in.contiguous();
  const at::Tensor grad = grad_in.contiguous(), offsets = offsets_in.contiguous();
  at::Tensor index;
  if (index_in) index = index_in->contiguous();
  args.E = offsets.size(0) - 1, args.N = grad.size(1);
  args.K = x.size(1), args.x_stride = x.stride(0);
  groups(op, args, x, offsets, index_in ? Optional(index) : Optional(), grad.size(0));
  at::Tensor out = at::empty({args.E, args.N, args.K}, x.options());
  args.grad = grad.const_data_ptr(), args.x = x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  if (out.numel()) FASTDIFF_RUN(grouped_weight_grad, args, x);
  return out;
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("grouped_linear", &fastdiff::grouped_linear);
  m.impl("grouped_weight_grad", &fastdiff::grouped_weight_grad);
}

TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) {
  m.impl("grouped_linear", &fastdiff::grouped_linear);
  m.impl("grouped_weight_grad", &fastdiff::grouped_weight_grad);
}
