#include "cpu/quantize.h"

#include <string>

#include "common.h"

namespace fastdiff {
namespace {

std::tuple<at::Tensor, at::Tensor> quantize(const at::Tensor& x_in,
                                            const std::optional<at::Tensor>& smooth_in,
                                            std::optional<std::string> activation,
                                            std::optional<at::ScalarType> dtype) {
  const char* op = "quantize";
  check_runs(op, "x", x_in);
  QuantizeArgs args{};
  args.dtype = dtype_of(op, "x", x_in);
  TORCH_CHECK(x_in.dim() >= 1, op, ": x has shape ", x_in.sizes(), ", need at least 1 dimension");
  if (activation) {
    args.activation = *activation == "gelu_tanh" ? 1
                      : *activation == "silu"    ? 2
                      : *activation == "geglu"   ? 3
                                                 : 0;
    TORCH_CHECK(args.activation, op, ": activation is ", *activation,
                ", need gelu_tanh, silu or geglu");
  }
  const int64_t width = x_in.size(-1);
  TORCH_CHECK(args.activation != 3 || width % 2 == 0, op, ": x has shape ", x_in.sizes(),
              ", need an even last dimension");
  args.dim = args.activation == 3 ? width / 2 : width;
  args.rows = 1;
  for (int64_t i = 0; i + 1 < x_in.dim(); ++i) args.rows *= x_in.size(i);
  at::Tensor x = x_in.reshape({args.rows, width}), smooth;
  if (!unit_last(x)) x = x.contiguous();
  args.x_stride = x.stride(0);
  if (smooth_in) {
    check_device(op, "smooth", *smooth_in, x);
    check_dtype(op, "smooth", *smooth_in, at::kFloat);
    check_sizes(op, "smooth", *smooth_in, {args.dim});
    smooth = smooth_in->contiguous();
    args.smooth = smooth.const_data_ptr<float>();
  }
  const at::ScalarType of_q = dtype.value_or(at::kChar);
  args.float8 = of_q == at::kFloat8_e4m3fn;
  TORCH_CHECK(args.float8 || of_q == at::kChar, op, ": dtype is ", of_q, ", need ", at::kChar,
              " or ", at::kFloat8_e4m3fn);
  TORCH_CHECK(!args.float8 || on_gpu(x), op, ": dtype is ", of_q, ", need ", at::kChar, " on cpu");
  std::vector<int64_t> shape = x_in.sizes().vec();
  shape.back() = args.dim;
  at::Tensor q = at::empty(shape, x.options().dtype(of_q));
  at::Tensor s = at::empty(x_in.sizes().slice(0, x_in.dim() - 1), x.options().dtype(at::kFloat));
  args.x = x.const_data_ptr();
  args.q = static_cast<int8_t*>(q.mutable_data_ptr());
  args.s = s.mutable_data_ptr<float>();
  if (s.numel()) FASTDIFF_RUN(quantize, args, x);  // rows without columns have a scale too: 0
  return {q, s};
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("quantize", &fastdiff::quantize); }
TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("quantize", &fastdiff::quantize); }
