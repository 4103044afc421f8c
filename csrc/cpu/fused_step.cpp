#include "cpu/fused_step.h"

#include <vector>

#include "common.h"

namespace fastdiff {
namespace {

constexpr int64_t kMaxElements = int64_t(1) << 34;  // 32-bit counters of 4 words

// int64 tensor of one element or of one a sample; it has to outlive the call.
Counter counter(const char* op, const char* name, const at::Tensor& t, const at::Tensor& x,
                int64_t batch) {
  check_device(op, name, t, x);
  check_dtype(op, name, t, at::kLong);
  check_dim(op, name, t, 1);
  TORCH_CHECK(t.size(0) == 1 || t.size(0) == batch, op, ": ", name, " has ", t.size(0),
              " elements, need 1 or ", batch);
  return {t.const_data_ptr<int64_t>(), t.size(0) == 1 ? 0 : t.stride(0)};
}

NoiseCounters noise_counters(const char* op, const at::Tensor& x, const at::Tensor& seed,
                             const at::Tensor& slot, const at::Tensor& step, int64_t batch,
                             int64_t stream, int64_t numel) {
  TORCH_CHECK(stream >= 0 && stream < int64_t(0xffffffff), op, ": stream is ", stream,
              ", need [0, 2**32 - 1)");
  TORCH_CHECK(numel <= kMaxElements, op, ": ", numel, " elements a sample, need at most 2**34");
  return {counter(op, "seed", seed, x, batch), counter(op, "slot", slot, x, batch),
          counter(op, "step", step, x, batch), uint32_t(stream)};
}

// Row of `coef` for each sample. Rows of the CPU are checked; a GPU's are not read here, as that
// would wait for it: the kernel clamps them.
Counter row_counter(const at::Tensor& coef, const std::optional<at::Tensor>& step,
                    const at::Tensor& x, int64_t batch) {
  const int64_t n = coef.size(0);
  if (!step) {
    TORCH_CHECK(n == 1 || n == batch, "fused_step: coef has ", n, " rows, need 1 or ", batch);
    return {nullptr, n == 1 ? 0 : 1};
  }
  TORCH_CHECK(n >= 1, "fused_step: coef has 0 rows, need at least 1");
  const Counter row = counter("fused_step", "step", *step, x, batch);
  for (int64_t b = 0; b < batch && !on_gpu(x); ++b) {
    const int64_t at = row.data[b * row.stride];
    TORCH_CHECK(at >= 0 && at < n, "fused_step: step is ", at, ", need [0, ", n, ")");
  }
  return row;
}

std::tuple<at::Tensor, at::Tensor> fused_step(
    const at::Tensor& x_in, const at::Tensor& m_in, const std::optional<at::Tensor>& w_in,
    const at::Tensor& coef_in, const std::optional<at::Tensor>& step,
    const std::optional<at::Tensor>& h1_in, const std::optional<at::Tensor>& h2_in,
    const std::optional<at::Tensor>& rescale, const std::optional<at::Tensor>& seed,
    const std::optional<at::Tensor>& slot, const std::optional<at::Tensor>& noise_step,
    int64_t stream, const std::optional<at::Tensor>& mask_in,
    const std::optional<at::Tensor>& ref_in, const std::optional<at::Tensor>& select_in,
    const std::optional<at::Tensor>& stored_in, bool keep) {
  const char* op = "fused_step";
  check_runs(op, "x", x_in);
  TORCH_CHECK(x_in.dim() >= 2, op, ": x has shape ", x_in.sizes(), ", need at least 2 dimensions");
  FusedStepArgs args{};
  args.dtype = dtype_of(op, "x", x_in);
  args.batch = x_in.size(0);
  args.numel = args.batch ? x_in.numel() / args.batch : 0;
  std::vector<at::Tensor> alive;  // contiguous copies live as long as their pointers
  auto hold = [&](const at::Tensor& t) {
    alive.push_back(t.contiguous());
    return alive.back().const_data_ptr();
  };
  auto like_x = [&](const char* name, const std::optional<at::Tensor>& t) -> const void* {
    if (!t) return nullptr;
    check_device(op, name, *t, x_in);
    check_dtype(op, name, *t, x_in.scalar_type());
    check_sizes(op, name, *t, x_in.sizes());
    return hold(*t);
  };
  auto per_sample = [&](const char* name, const at::Tensor& t, at::ScalarType dtype) {
    check_device(op, name, t, x_in);
    check_dtype(op, name, t, dtype);
    check_sizes(op, name, t, {args.batch});
    return hold(t);
  };

  at::Tensor y = at::empty_like(x_in, at::MemoryFormat::Contiguous);
  at::Tensor kept = keep ? at::empty_like(y) : at::empty({0}, x_in.options());
  args.x = hold(x_in);
  args.h1 = like_x("h1", h1_in);
  args.h2 = like_x("h2", h2_in);
  args.ref = like_x("ref", ref_in);
  args.stored = like_x("stored", stored_in);

  check_device(op, "m", m_in, x_in);
  args.m_dtype = dtype_of(op, "m", m_in);
  check_dim(op, "m", m_in, x_in.dim() + 1);
  TORCH_CHECK(m_in.size(0) >= 1 && m_in.sizes().slice(1) == x_in.sizes(), op, ": m has shape ",
              m_in.sizes(), ", need [K, *", x_in.sizes(), "]");
  args.branches = m_in.size(0);
  at::Tensor m =
      args.batch && m_in.select(0, 0).select(0, 0).is_contiguous() ? m_in : m_in.contiguous();
  args.m = m.const_data_ptr();
  args.m_branch = args.branches > 1 ? m.stride(0) : 0;
  args.m_sample = args.batch > 1 ? m.stride(1) : 0;
  TORCH_CHECK(w_in || args.branches == 1, op, ": w is absent and m has ", args.branches,
              " branches");
  if (w_in) {
    check_device(op, "w", *w_in, x_in);
    check_dtype(op, "w", *w_in, at::kFloat);
    check_sizes(op, "w", *w_in, {args.batch, args.branches});
    args.w = static_cast<const float*>(hold(*w_in));
  }

  check_device(op, "coef", coef_in, x_in);
  check_dtype(op, "coef", coef_in, at::kFloat);
  check_dim(op, "coef", coef_in, 2);
  TORCH_CHECK(coef_in.size(1) == kStepColumns, op, ": coef has ", coef_in.size(1),
              " columns, need ", int(kStepColumns));
  args.coef = static_cast<const float*>(hold(coef_in));
  args.rows = coef_in.size(0);
  args.row = row_counter(coef_in, step, x_in, args.batch);

  TORCH_CHECK(bool(seed) == bool(slot) && bool(seed) == bool(noise_step), op,
              ": seed, slot and noise_step go together");
  if (seed)
    args.noise =
        noise_counters(op, x_in, *seed, *slot, *noise_step, args.batch, stream, args.numel);

  TORCH_CHECK(bool(mask_in) == bool(ref_in), op, ": mask and ref go together");
  if (mask_in) {
    const at::Tensor& mask = *mask_in;
    check_device(op, "mask", mask, x_in);
    check_dtype(op, "mask", mask, at::kFloat);
    check_dim(op, "mask", mask, x_in.dim());
    TORCH_CHECK((mask.size(0) == args.batch || mask.size(0) == 1) &&
                    (mask.size(1) == x_in.size(1) || mask.size(1) == 1) &&
                    mask.sizes().slice(2) == x_in.sizes().slice(2),
                op, ": mask has shape ", mask.sizes(), ", need [B|1, C|1, ...] of ", x_in.sizes());
    args.mask = static_cast<const float*>(hold(mask));
    args.mask_sample = mask.size(0) == 1 ? 0 : alive.back().stride(0);
    bool plane = mask.size(1) == 1 && x_in.size(1) != 1;
    args.mask_plane = plane && args.numel ? args.numel / x_in.size(1) : 0;
  }
  TORCH_CHECK(bool(select_in) == bool(stored_in), op, ": select and stored go together");
  if (select_in)
    args.select = static_cast<const bool*>(per_sample("select", *select_in, at::kBool));

  args.chunks = (args.numel + kStepChunk - 1) / kStepChunk;
  at::Tensor factor, moments;
  if (rescale) {
    args.phi = static_cast<const float*>(per_sample("rescale", *rescale, at::kFloat));
    factor = at::empty({args.batch}, rescale->options());
    moments = at::empty({args.batch, args.chunks, 4}, rescale->options().dtype(at::kDouble));
    args.factor = factor.mutable_data_ptr<float>();
    args.moments = moments.mutable_data_ptr<double>();
  }
  args.y = y.mutable_data_ptr();
  args.kept = keep ? kept.mutable_data_ptr() : nullptr;
  if (y.numel()) FASTDIFF_RUN(fused_step, args, x_in);
  return {y, kept};
}

at::Tensor philox_normal(const at::Tensor& seed, const at::Tensor& slot, const at::Tensor& step,
                         int64_t stream, int64_t numel) {
  const char* op = "philox_normal";
  TORCH_CHECK(numel >= 0, op, ": numel is ", numel, ", need 0 or more");
  check_runs(op, "seed", seed);
  check_dim(op, "seed", seed, 1);
  PhiloxNormalArgs args{};
  args.batch = seed.size(0), args.numel = numel;
  args.noise = noise_counters(op, seed, seed, slot, step, args.batch, stream, numel);
  at::Tensor z = at::empty({args.batch, numel}, seed.options().dtype(at::kFloat));
  args.z = z.mutable_data_ptr<float>();
  if (z.numel()) FASTDIFF_RUN(philox_normal, args, seed);
  return z;
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("fused_step", &fastdiff::fused_step);
  m.impl("philox_normal", &fastdiff::philox_normal);
}

TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) {
  m.impl("fused_step", &fastdiff::fused_step);
  m.impl("philox_normal", &fastdiff::philox_normal);
}
