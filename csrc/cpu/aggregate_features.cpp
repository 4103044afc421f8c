#include "cpu/aggregate_features.h"

#include <ATen/ops/zeros.h>

#include <tuple>

#include "common.h"

namespace fastdiff {
namespace {

// Checks of both entries.
template <class Args>
struct Call : Kept {
  const char* op;
  Args args{};
  bool inner = false;  // channels are innermost in the memory of x, and of what comes out

  explicit Call(const char* op) : op(op) {}

  // `t` with its channels in dimension `at`, in the order of memory that the kernels walk.
  at::Tensor ordered(const at::Tensor& t, int64_t at) const {
    return inner ? t.movedim(at, -1) : t;
  }

  // [K, B, ...] with samples that are contiguous.
  Models place(const at::Tensor& t) {
    const bool dense = t.select(0, 0).select(0, 0).is_contiguous();
    const at::Tensor& r = kept[count++] = dense ? t : t.contiguous();
    return {r.const_data_ptr(), r.stride(0), r.stride(1)};
  }

  void input(const at::Tensor& x, const at::Tensor& logits) {
    check_runs(op, "x", x);
    args.dtype = dtype_of(op, "x", x);
    TORCH_CHECK(x.dim() >= 3, op, ": x has shape ", x.sizes(), ", need at least 3 dimensions");
    args.K = x.size(0), args.B = x.size(1), args.C = x.size(2);
    TORCH_CHECK(args.K >= 1 && args.K <= kMaxModels, op, ": x has shape ", x.sizes(),
                ", need 1 to ", kMaxModels, " models");
    check_device(op, "logits", logits, x);
    TORCH_CHECK(logits.scalar_type() == x.scalar_type() || logits.scalar_type() == at::kFloat, op,
                ": logits is ", logits.scalar_type(), ", need ", x.scalar_type(), " or Float");
    args.wide = logits.scalar_type() == at::kFloat;
    auto sizes = x.sizes().vec();
    const bool shared = logits.dim() > 2 && logits.size(2) == 1 && args.C != 1;
    if (shared) sizes[2] = 1;
    check_sizes(op, "logits", logits, sizes);
    if (!x.numel()) return;
    args.P = x.numel() / (args.K * args.B * args.C);
    const at::Tensor sample = x.select(0, 0).select(0, 0);
    inner = x.dim() > 3 && !sample.is_contiguous() && sample.movedim(0, -1).is_contiguous();
    args.maps = !shared ? Maps::kEach : inner ? Maps::kRows : Maps::kPlanes;
    args.x = place(ordered(x, 2));
    args.logits = place(ordered(logits, 2));
  }

  // Like `t`, in the order that the kernels walk, its channels in dimension `at`.
  at::Tensor output(const at::Tensor& t, int64_t at, void*& to) {
    at::Tensor out = at::empty(ordered(t, at).sizes(), t.options());
    to = out.mutable_data_ptr();
    return inner ? out.movedim(-1, at) : out;
  }
};

at::Tensor aggregate_features(const at::Tensor& x, const at::Tensor& logits) {
  Call<AggregateFeaturesArgs> call{"aggregate_features"};
  call.input(x, logits);
  if (!x.numel()) return at::empty(x.sizes().slice(1), x.options());
  at::Tensor out = call.output(x.select(0, 0), 1, call.args.out);
  FASTDIFF_RUN(aggregate_features, call.args, x);
  return out;
}

std::tuple<at::Tensor, at::Tensor> aggregate_features_backward(const at::Tensor& grad,
                                                               const at::Tensor& x,
                                                               const at::Tensor& logits) {
  Call<AggregateFeaturesBackwardArgs> call{"aggregate_features_backward"};
  AggregateFeaturesBackwardArgs& args = call.args;
  call.input(x, logits);
  check_device(call.op, "grad", grad, x);
  check_dtype(call.op, "grad", grad, x.scalar_type());
  check_sizes(call.op, "grad", grad, x.sizes().slice(1));
  if (!x.numel())  // a softmax over no channels has no slope
    return {at::empty(x.sizes(), x.options()), at::zeros(logits.sizes(), logits.options())};
  const at::Tensor placed = call.ordered(grad, 1).contiguous();
  args.grad = placed.const_data_ptr();
  at::Tensor grad_x = call.output(x, 2, args.grad_x);
  at::Tensor grad_logits = call.output(logits, 2, args.grad_logits);
  FASTDIFF_RUN(aggregate_features_backward, args, x);
  return {grad_x, grad_logits};
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("aggregate_features", &fastdiff::aggregate_features);
  m.impl("aggregate_features_backward", &fastdiff::aggregate_features_backward);
}

TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) {
  m.impl("aggregate_features", &fastdiff::aggregate_features);
  m.impl("aggregate_features_backward", &fastdiff::aggregate_features_backward);
}
