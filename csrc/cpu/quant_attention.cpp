#include "cpu/quant_attention.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "common.h"

namespace fastdiff {

namespace {
constexpr const char* kOp = "quant_attention";
constexpr int64_t kMostDim = ((int64_t(1) << 31) - 1) / (127 * 127);  // int32 sums hold it
}  // namespace

at::Tensor quant_attention(const at::Tensor& q_in, const at::Tensor& k_in, const at::Tensor& v_in,
                           double scale, bool smooth) {
  QuantAttentionArgs a{};
  check_runs(kOp, "q", q_in);
  a.dtype = dtype_of(kOp, "q", q_in);
  for (auto [name, t] : {std::pair{"q", &q_in}, {"k", &k_in}, {"v", &v_in}}) {
    check_device(kOp, name, *t, q_in);
    check_dtype(kOp, name, *t, q_in.scalar_type());
    check_dim(kOp, name, *t, 4);
  }
  a.batch = q_in.size(0), a.heads = q_in.size(1), a.rows = q_in.size(2), a.dim = q_in.size(3);
  a.keys = k_in.size(2), a.value_dim = v_in.size(3);
  TORCH_CHECK(a.dim > 0 && a.dim <= kMostDim, kOp, ": q has shape ", q_in.sizes(),
              ", need a head dimension of 1 to ", kMostDim);
  check_sizes(kOp, "k", k_in, {a.batch, a.heads, a.keys, a.dim});
  check_sizes(kOp, "v", v_in, {a.batch, a.heads, a.keys, a.value_dim});
  Kept kept;
  const at::Tensor &q = kept.keep(q_in), &k = kept.keep(k_in), &v = kept.keep(v_in);
  for (int i = 0; i < 3; ++i)
    a.q_stride[i] = q.stride(i), a.k_stride[i] = k.stride(i), a.v_stride[i] = v.stride(i);
  a.q = q.const_data_ptr(), a.k = k.const_data_ptr(), a.v = v.const_data_ptr();
  a.scale = float(scale), a.smooth = smooth;

  at::Tensor out = at::empty({a.batch, a.rows, a.heads, a.value_dim}, q.options());
  if (out.numel()) {
    a.out = out.mutable_data_ptr();
    a.threads = std::min<int64_t>(at::get_num_threads(), a.batch * a.heads * ((a.rows + 7) / 8));
    // The one allocation besides the output.
    const int64_t floats =
        on_gpu(q) ? QuantAttentionGpuScratch(a).total : QuantAttentionScratch(a).total;
    at::Tensor scratch = at::empty({floats + 16}, q.options().dtype(at::kFloat));
    auto address = reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr<float>());
    a.scratch = reinterpret_cast<float*>((address + 63) / 64 * 64);
    FASTDIFF_RUN_INT8(quant_attention, a, q);
  }
  return out.transpose(1, 2);
}

}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("quant_attention", &fastdiff::quant_attention); }
TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("quant_attention", &fastdiff::quant_attention); }
