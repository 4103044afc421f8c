#include "cpu/gelu_tanh.h"

#include "common.h"

namespace fastdiff {

at::Tensor gelu_tanh_cpu(const at::Tensor& x_in, const std::optional<at::Tensor>& bias_in) {
  check_cpu("gelu_tanh", "x", x_in);
  TORCH_CHECK(x_in.dim() >= 1, "gelu_tanh: x has shape ", x_in.sizes(),
              ", need at least 1 dimension");
  at::Tensor x = x_in.contiguous(), bias;
  GeluTanhArgs args{};
  args.dtype = dtype_of("gelu_tanh", "x", x);
  args.dim = x.size(-1);
  args.rows = args.dim ? x.numel() / args.dim : 0;
  args.x_stride = args.dim;
  if (bias_in) {
    check_cpu("gelu_tanh", "bias", *bias_in);
    check_dtype("gelu_tanh", "bias", *bias_in, x.scalar_type());
    check_sizes("gelu_tanh", "bias", *bias_in, {args.dim});
    bias = bias_in->contiguous();
    args.bias = bias.const_data_ptr();
  }
  at::Tensor y = at::empty_like(x, at::MemoryFormat::Contiguous);
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  if (y.numel()) FASTDIFF_CALL_KERNEL(gelu_tanh, args);
  return y;
}

}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("gelu_tanh", &fastdiff::gelu_tanh_cpu); }
