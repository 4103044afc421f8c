#include "cpu/sparse_adamw.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/sqrt_cpu_dispatch.h>

#include <cmath>

#include "common.h"

namespace fastdiff {
namespace {

constexpr const char* kOp = "sparse_adamw_";
using Optional = std::optional<at::Tensor>;

void check_vector(const char* name, const at::Tensor& t, const at::Tensor& values) {
  check_device(kOp, name, t, values);
  check_dtype(kOp, name, t, at::kFloat);
  check_sizes(kOp, name, t, values.sizes());
}

float* written(const char* name, const at::Tensor& t) {
  TORCH_CHECK(t.is_contiguous(), kOp, ": ", name, " has strides ", t.strides(),
              ", need a contiguous tensor");
  return t.mutable_data_ptr<float>();
}

void torch_sqrt(float* x, int64_t n) {
  at::Tensor t = at::from_blob(x, {n}, at::kFloat);
  at::cpu::sqrt_(t);
}

// In host memory, before anything is written.
template <class I>
void check_index(const SparseAdamwArgs& a) {
  const I* index = static_cast<const I*>(a.index);
  bool ascends = true;
  const SparseAdamwOrderArgs order{a.index, a.n, a.wide, &ascends};
  FASTDIFF_CALL_KERNEL(sparse_adamw_order, order);
  const auto inside = [&](int64_t i) {
    TORCH_CHECK_VALUE(index[i] >= 0 && int64_t(index[i]) < a.size, kOp, ": index has value ",
                      index[i], ", need 0 to ", a.size - 1);
  };
  if (ascends) {
    inside(0), inside(a.n - 1);
    return;
  }
  for (int64_t i = 0; i < a.n; ++i) inside(i);
  for (int64_t i = 1; i < a.n; ++i)
    TORCH_CHECK_VALUE(index[i - 1] < index[i], kOp, ": index has value ", index[i], " after ",
                      index[i - 1], ", need ascending values");
}

void sparse_adamw(const at::Tensor& values, const at::Tensor& grad, const at::Tensor& exp_avg,
                  const at::Tensor& exp_avg_sq, const at::Tensor& weight, const at::Tensor& index,
                  const Optional& step, double lr, double beta1, double beta2, double eps,
                  double weight_decay, double step_size, double root) {
  SparseAdamwArgs a{};
  Kept kept;
  check_runs(kOp, "values", values);
  check_dim(kOp, "values", values, 1);
  check_vector("values", values, values);
  check_vector("grad", grad, values);
  check_vector("exp_avg", exp_avg, values);
  check_vector("exp_avg_sq", exp_avg_sq, values);
  a.values = written("values", values);
  a.exp_avg = written("exp_avg", exp_avg);
  a.exp_avg_sq = written("exp_avg_sq", exp_avg_sq);
  a.grad = kept.keep(grad).const_data_ptr<float>();
  a.n = values.numel();
  check_device(kOp, "weight", weight, values);
  a.dtype = dtype_of(kOp, "weight", weight);
  TORCH_CHECK(weight.is_contiguous(), kOp, ": weight has strides ", weight.strides(),
              ", need a contiguous tensor");
  a.weight = weight.mutable_data_ptr();
  a.size = weight.numel();
  check_device(kOp, "index", index, values);
  TORCH_CHECK(index.scalar_type() == at::kInt || index.scalar_type() == at::kLong, kOp,
              ": index is ", index.scalar_type(), ", need Int or Long");
  check_sizes(kOp, "index", index, values.sizes());
  a.wide = index.scalar_type() == at::kLong;
  a.index = kept.keep(index).const_data_ptr();
  const bool gpu = on_gpu(values);
  if (step) {
    check_device(kOp, "step", *step, values);
    check_dtype(kOp, "step", *step, at::kFloat);
    check_sizes(kOp, "step", *step, {1});
    if (gpu) {
      a.step = step->const_data_ptr<float>();
      a.lr = lr, a.log_beta1 = std::log(beta1), a.log_beta2 = std::log(beta2);
    } else {
      const double t = *step->const_data_ptr<float>();
      step_size = lr / (1 - std::pow(beta1, t));
      root = std::pow(1 - std::pow(beta2, t), 0.5);  // as Python's ** has it, not sqrt
    }
  }
  a.decay = float(1 - lr * weight_decay);
  a.weight1 = float(1 - beta1), a.beta2 = float(beta2), a.weight2 = float(1 - beta2);
  a.eps = float(eps), a.step_size = float(-step_size), a.root = float(root);
  a.sqrt = torch_sqrt;
  if (!a.n) return;
  if (!gpu) {
    if (a.wide)
      check_index<int64_t>(a);
    else
      check_index<int32_t>(a);
  }
  FASTDIFF_RUN(sparse_adamw, a, values);
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("sparse_adamw_", &fastdiff::sparse_adamw); }

TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("sparse_adamw_", &fastdiff::sparse_adamw); }
