#include "cpu/moe.h"

#include "common.h"

namespace fastdiff {
namespace {

using Optional = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> moe_route(
    const at::Tensor& logits_in, const Optional& sample_in, int64_t k, bool sigmoid,
    bool renormalise, int64_t capacity) {
  const char* op = "moe_route";
  check_runs(op, "logits", logits_in);
  check_dim(op, "logits", logits_in, 2);
  MoeRouteArgs args{};
  args.dtype = dtype_of(op, "logits", logits_in);
  args.T = logits_in.size(0), args.E = logits_in.size(1), args.K = k, args.B = 1;
  TORCH_CHECK(args.E >= 1 && args.E <= kMoeMaxExperts, op, ": logits has shape ", logits_in.sizes(),
              ", need 1 to ", kMoeMaxExperts, " experts");
  TORCH_CHECK(k >= 1 && k <= args.E, op, ": k is ", k, ", need 1 to ", args.E);
  TORCH_CHECK(args.T < (int64_t(1) << 31) / k, op, ": logits has shape ", logits_in.sizes(),
              ", need less than 2**31 slots");
  const at::Tensor logits = logits_in.contiguous();
  at::Tensor sample;
  if (sample_in) {
    check_device(op, "sample_logits", *sample_in, logits);
    check_dim(op, "sample_logits", *sample_in, 2);
    args.sample_dtype = dtype_of(op, "sample_logits", *sample_in);
    args.B = sample_in->size(0);
    TORCH_CHECK(sample_in->size(1) == args.E && args.B > 0 && args.T % args.B == 0, op,
                ": sample_logits has shape ", sample_in->sizes(), ", need [B, ", args.E, "] with ",
                args.T, " tokens a multiple of B");
    sample = sample_in->contiguous();
    args.sample = sample.const_data_ptr();
  }
  const auto index = logits.options().dtype(at::kLong);
  at::Tensor weights = at::empty({args.T, k}, logits.options().dtype(at::kFloat));
  at::Tensor experts = at::empty({args.T, k}, index), position = at::empty({args.T, k}, index);
  at::Tensor order = at::empty({args.T * k}, index), offsets = at::empty({args.E + 1}, index);
  at::Tensor counts = at::empty({args.E}, index), work;
  args.logits = logits.const_data_ptr();
  args.weights = weights.mutable_data_ptr<float>();
  args.experts = experts.mutable_data_ptr<int64_t>();
  args.order = order.mutable_data_ptr<int64_t>();
  args.position = position.mutable_data_ptr<int64_t>();
  args.offsets = offsets.mutable_data_ptr<int64_t>();
  args.counts = counts.mutable_data_ptr<int64_t>();
  args.capacity = capacity, args.sigmoid = sigmoid, args.renormalise = renormalise;
  if (on_gpu(logits)) {
    const int64_t blocks = (args.T * k + kMoeSlots - 1) / kMoeSlots;
    work = at::empty({blocks > 0 ? blocks : 1, args.E}, logits.options().dtype(at::kInt));
    args.work = work.mutable_data_ptr<int32_t>();
  }
  FASTDIFF_RUN(moe_route, args, logits);
  return {weights, experts, order, position, offsets, counts};
}

at::Tensor moe_combine(const at::Tensor& y_in, const at::Tensor& weights_in,
                       const at::Tensor& position_in) {
  const char* op = "moe_combine";
  check_runs(op, "y", y_in);
  check_dim(op, "y", y_in, 2);
  MoeCombineArgs args{};
  args.dtype = dtype_of(op, "y", y_in);
  check_device(op, "weights", weights_in, y_in);
  check_dim(op, "weights", weights_in, 2);
  check_dtype(op, "weights", weights_in, at::kFloat);
  check_device(op, "position", position_in, y_in);
  check_dtype(op, "position", position_in, at::kLong);
  check_sizes(op, "position", position_in, weights_in.sizes());
  const at::Tensor y = y_in.contiguous(), weights = weights_in.contiguous(),
                   position = position_in.contiguous();
  args.T = weights.size(0), args.K = weights.size(1), args.R = y.size(0), args.C = y.size(1);
  args.y = y.const_data_ptr();
  args.weights = weights.const_data_ptr<float>();
  args.position = position.const_data_ptr<int64_t>();
  if (!on_gpu(y))
    for (int64_t i = 0; i < args.T * args.K; ++i)
      TORCH_CHECK_VALUE(args.position[i] >= -1 && args.position[i] < args.R, op,
                        ": position has value ", args.position[i], ", need -1 to ", args.R - 1);
  at::Tensor out = at::empty({args.T, args.C}, y.options());
  args.out = out.mutable_data_ptr();
  if (out.numel()) FASTDIFF_RUN(moe_combine, args, y);
  return out;
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("moe_route", &fastdiff::moe_route);
  m.impl("moe_combine", &fastdiff::moe_combine);
}

TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) {
  m.impl("moe_route", &fastdiff::moe_route);
  m.impl("moe_combine", &fastdiff::moe_combine);
}
