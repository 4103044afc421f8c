#include "cpu/geglu.h"

#include "common.h"

namespace fastdiff {

at::Tensor geglu_cpu(const at::Tensor& x_in, const std::optional<at::Tensor>& bias_in, bool tanh) {
  check_cpu("geglu", "x", x_in);
  TORCH_CHECK(x_in.dim() >= 1 && x_in.size(-1) % 2 == 0, "geglu: x has shape ", x_in.sizes(),
              ", need an even last dimension");
  at::Tensor x = x_in.contiguous(), bias;
  GegluArgs args{};
  args.dtype = dtype_of("geglu", "x", x);
  args.dim = x.size(-1) / 2;
  args.rows = args.dim ? x.numel() / (2 * args.dim) : 0;
  args.tanh = tanh;
  if (bias_in) {
    check_cpu("geglu", "bias", *bias_in);
    check_dtype("geglu", "bias", *bias_in, x.scalar_type());
    check_sizes("geglu", "bias", *bias_in, {2 * args.dim});
    bias = bias_in->contiguous();
    args.bias = bias.const_data_ptr();
  }
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = args.dim;
  at::Tensor y = at::empty(sizes, x.options());
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  if (y.numel()) FASTDIFF_CALL_KERNEL(geglu, args);
  return y;
}

}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("geglu", &fastdiff::geglu_cpu); }
