#include "cpu/group_norm_silu.h"

#include <ATen/ops/zeros.h>

#include <tuple>

#include "common.h"

namespace fastdiff {
namespace {

using Optional = std::optional<at::Tensor>;

// Checks of both entries.
struct Call : Kept {
  const char* op;
  GroupNormSiluArgs args{};

  explicit Call(const char* op) : op(op) {}

  at::Tensor channels_to_end(const at::Tensor& x) const {
    return args.channels_last ? x.movedim(1, -1).contiguous() : x.contiguous();
  }
  at::Tensor channels_back(const at::Tensor& y) const {
    return args.channels_last ? y.movedim(-1, 1) : y;
  }

  const void* parameter(const char* name, const Optional& t, const at::Tensor& x,
                        at::IntArrayRef need) {
    if (!t) return nullptr;
    check_device(op, name, *t, x);
    check_dtype(op, name, *t, x.scalar_type());
    check_sizes(op, name, *t, need);
    return keep(*t).const_data_ptr();
  }

  // Gives the output's buffer, in the memory order of x.
  at::Tensor input(const at::Tensor& x_in, int64_t num_groups, const Optional& weight,
                   const Optional& bias, const Optional& shift, const Optional& scale, double eps,
                   bool silu) {
    check_runs(op, "x", x_in);
    TORCH_CHECK(x_in.dim() >= 2, op, ": x has shape ", x_in.sizes(),
                ", need at least 2 dimensions");
    args.dtype = dtype_of(op, "x", x_in);
    args.B = x_in.size(0), args.C = x_in.size(1), args.groups = num_groups;
    TORCH_CHECK(num_groups >= 1 && args.C % num_groups == 0, op, ": num_groups is ", num_groups,
                ", need a divisor of C = ", args.C);
    args.channels_last =
        x_in.dim() > 2 && !x_in.is_contiguous() && x_in.movedim(1, -1).is_contiguous();
    const at::Tensor& x = kept[count++] = channels_to_end(x_in);
    args.P = x.numel() ? x.numel() / (args.B * args.C) : 0;
    args.x = x.const_data_ptr();
    args.weight = parameter("weight", weight, x, {args.C});
    args.bias = parameter("bias", bias, x, {args.C});
    args.shift = parameter("shift", shift, x, {args.B, args.C});
    args.shift_stride = shift ? kept[count - 1].stride(0) : 0;
    args.scale = parameter("scale", scale, x, {args.B, args.C});
    args.scale_stride = scale ? kept[count - 1].stride(0) : 0;
    args.eps = float(eps);
    args.silu = silu;
    at::Tensor y = at::empty_like(x, at::MemoryFormat::Contiguous);
    args.y = y.mutable_data_ptr();
    return y;
  }
};

at::Tensor group_norm_silu(const at::Tensor& x, int64_t num_groups, const Optional& weight,
                           const Optional& bias, const Optional& shift, const Optional& scale,
                           double eps, bool silu) {
  Call call("group_norm_silu");
  at::Tensor y = call.input(x, num_groups, weight, bias, shift, scale, eps, silu);
  if (call.args.P) FASTDIFF_RUN(group_norm_silu, call.args, x);
  return call.channels_back(y);
}

std::tuple<at::Tensor, at::Tensor> group_norm_silu_backward_cpu(
    const at::Tensor& grad, const at::Tensor& x, int64_t num_groups, const Optional& weight,
    const Optional& bias, const Optional& shift, const Optional& scale, double eps, bool silu) {
  Call call("group_norm_silu_backward");
  at::Tensor grad_x = call.input(x, num_groups, weight, bias, shift, scale, eps, silu);
  check_cpu(call.op, "grad", grad);
  check_dtype(call.op, "grad", grad, x.scalar_type());
  check_sizes(call.op, "grad", grad, x.sizes());
  at::Tensor placed = call.channels_to_end(grad);
  const bool empty = call.args.P == 0;  // sums over no positions are 0
  const auto floats = x.options().dtype(at::kFloat);
  at::Tensor sums = empty ? at::zeros({x.size(0), 2, x.size(1)}, floats)
                          : at::empty({x.size(0), 2, x.size(1)}, floats);
  GroupNormSiluBackwardArgs args{call.args, placed.const_data_ptr(),
                                 sums.mutable_data_ptr<float>()};
  if (!empty) FASTDIFF_CALL_KERNEL(group_norm_silu_backward, args);
  return {call.channels_back(grad_x), sums};
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("group_norm_silu", &fastdiff::group_norm_silu);
  m.impl("group_norm_silu_backward", &fastdiff::group_norm_silu_backward_cpu);
}

TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("group_norm_silu", &fastdiff::group_norm_silu); }
