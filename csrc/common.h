// Host checks with messages, shared by the C++ entries of all ops. Torch headers allowed here,
// never in kernels.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "cpu/level.h"
#include "gpu_library.h"

namespace fastdiff {

inline Dtype dtype_of(const char* op, const char* name, const at::Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat: return Dtype::kF32;
    case at::kBFloat16: return Dtype::kBf16;
    case at::kHalf: return Dtype::kF16;
    default:
      TORCH_CHECK(false, op, ": ", name, " is ", t.scalar_type(),
                  ", need float32, bfloat16 or float16");
  }
}

inline void check_cpu(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK(t.device().is_cpu(), op, ": ", name, " is on ", t.device(), ", need cpu");
}

// An op whose kernels are also the GPU's: x is where the call runs, all else is there too.
inline void check_runs(const char* op, const char* name, const at::Tensor& x) {
  TORCH_CHECK(x.is_cpu() || x.is_cuda(), op, ": ", name, " is on ", x.device(),
              ", need cpu or cuda");
}

inline void check_device(const char* op, const char* name, const at::Tensor& t,
                         const at::Tensor& x) {
  TORCH_CHECK(t.device() == x.device(), op, ": ", name, " is on ", t.device(), ", need ",
              x.device());
}

inline void check_dim(const char* op, const char* name, const at::Tensor& t, int64_t dim) {
  TORCH_CHECK(t.dim() == dim, op, ": ", name, " has shape ", t.sizes(), ", need ", dim,
              " dimensions");
}

inline void check_dtype(const char* op, const char* name, const at::Tensor& t,
                        at::ScalarType need) {
  TORCH_CHECK(t.scalar_type() == need, op, ": ", name, " is ", t.scalar_type(), ", need ", need);
}

inline void check_sizes(const char* op, const char* name, const at::Tensor& t,
                        at::IntArrayRef need) {
  TORCH_CHECK(t.sizes() == need, op, ": ", name, " has shape ", t.sizes(), ", need ", need);
}

// Last dimension contiguous: what every kernel that walks rows needs.
inline bool unit_last(const at::Tensor& t) {
  return t.dim() == 0 || t.size(-1) <= 1 || t.stride(-1) == 1;
}

// Tensors that the pointers of a kernel's arguments need alive.
struct Kept {
  at::Tensor kept[8];
  int count = 0;

  // `t`, or a copy of it whose last dimension is contiguous.
  const at::Tensor& keep(const at::Tensor& t) {
    return kept[count++] = unit_last(t) ? t : t.contiguous();
  }
};

}  // namespace fastdiff
