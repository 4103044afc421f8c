#include "cpu/resample.h"

#include <tuple>

#include "common.h"

namespace fastdiff {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> resample(const at::Tensor& logw, const at::Tensor& u,
                                                        double least) {
  const char* op = "resample";
  check_runs(op, "logw", logw);
  check_dim(op, "logw", logw, 2);
  const auto type = logw.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble, op, ": logw is ", type,
              ", need Float or Double");
  check_device(op, "u", u, logw);
  check_dtype(op, "u", u, at::kDouble);
  check_sizes(op, "u", u, {logw.size(0)});
  const int64_t particles = logw.size(1);
  TORCH_CHECK(particles > 0, op, ": logw has shape ", logw.sizes(),
              ", need at least one particle in a group");
  TORCH_CHECK(!on_gpu(logw) || particles <= kMaxGpuParticles, op, ": logw has ", particles,
              " particles in a group, need at most ", kMaxGpuParticles, " on a GPU");
  const at::Tensor l = logw.contiguous(), v = u.contiguous();
  at::Tensor parents = at::empty(l.sizes(), l.options().dtype(at::kLong));
  at::Tensor after = at::empty(l.sizes(), l.options());
  at::Tensor did = at::empty({l.size(0)}, l.options().dtype(at::kBool));
  ResampleArgs args{};
  args.logw = l.const_data_ptr(), args.u = v.const_data_ptr<double>();
  args.parents = parents.mutable_data_ptr<int64_t>(), args.after = after.mutable_data_ptr();
  args.did = did.mutable_data_ptr<bool>();
  args.G = l.size(0), args.K = particles, args.least = least, args.wide = type == at::kDouble;
  if (args.G) FASTDIFF_RUN(resample, args, logw);
  return {parents, after, did};
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("resample", &fastdiff::resample); }

TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("resample", &fastdiff::resample); }
