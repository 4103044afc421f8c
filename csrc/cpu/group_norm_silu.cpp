#include "cpu/group_norm_silu.h"

#include "common.h"

namespace fastdiff {
namespace {

using Optional = std::optional<at::Tensor>;
constexpr const char* kOp = "group_norm_silu";

void check_parameter(const char* name, const at::Tensor& t, const at::Tensor& x,
                     at::IntArrayRef need) {
  check_cpu(kOp, name, t);
  check_dtype(kOp, name, t, x.scalar_type());
  check_sizes(kOp, name, t, need);
}

at::Tensor channels_to_end(const at::Tensor& x) { return x.movedim(1, -1); }

at::Tensor group_norm_silu_cpu(const at::Tensor& x_in, int64_t num_groups,
                               const Optional& weight_in, const Optional& bias_in,
                               const Optional& shift_in, const Optional& scale_in, double eps,
                               bool silu) {
  check_cpu(kOp, "x", x_in);
  TORCH_CHECK(x_in.dim() >= 2, kOp, ": x has shape ", x_in.sizes(), ", need at least 2 dimensions");
  GroupNormSiluArgs args{};
  args.dtype = dtype_of(kOp, "x", x_in);
  args.B = x_in.size(0), args.C = x_in.size(1), args.groups = num_groups;
  TORCH_CHECK(num_groups >= 1 && args.C % num_groups == 0, kOp, ": num_groups is ", num_groups,
              ", need a divisor of C = ", args.C);
  args.channels_last =
      x_in.dim() > 2 && !x_in.is_contiguous() && channels_to_end(x_in).is_contiguous();
  at::Tensor x = args.channels_last ? channels_to_end(x_in) : x_in.contiguous();
  at::Tensor y = at::empty_like(x, at::MemoryFormat::Contiguous);
  at::Tensor weight, bias, shift, scale;
  if (weight_in) {
    check_parameter("weight", *weight_in, x, {args.C});
    weight = weight_in->contiguous();
    args.weight = weight.const_data_ptr();
  }
  if (bias_in) {
    check_parameter("bias", *bias_in, x, {args.C});
    bias = bias_in->contiguous();
    args.bias = bias.const_data_ptr();
  }
  if (shift_in) {
    check_parameter("shift", *shift_in, x, {args.B, args.C});
    shift = unit_last(*shift_in) ? *shift_in : shift_in->contiguous();
    args.shift = shift.const_data_ptr();
    args.shift_stride = shift.stride(0);
  }
  if (scale_in) {
    check_parameter("scale", *scale_in, x, {args.B, args.C});
    scale = unit_last(*scale_in) ? *scale_in : scale_in->contiguous();
    args.scale = scale.const_data_ptr();
    args.scale_stride = scale.stride(0);
  }
  args.x = x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.eps = float(eps);
  args.silu = silu;
  if (x.numel()) {
    args.P = x.numel() / (args.B * args.C);
    FASTDIFF_CALL_KERNEL(group_norm_silu, args);
  }
  return args.channels_last ? y.movedim(-1, 1) : y;
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("group_norm_silu", &fastdiff::group_norm_silu_cpu); }
