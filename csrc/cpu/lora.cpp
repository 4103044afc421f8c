#include "cpu/lora.h"

#include "common.h"

namespace fastdiff {
namespace {

using Optional = std::optional<at::Tensor>;

int64_t between(const at::Tensor& t) {  // what stands between the first and the last dimension
  int64_t count = 1;
  for (int64_t i = 1; i + 1 < t.dim(); ++i) count *= t.size(i);
  return count;
}

// [B, T, D], whose rows are contiguous; no copy where its strides allow that.
at::Tensor rows_of(const at::Tensor& t) {
  at::Tensor rows = t.reshape({t.size(0), between(t), t.size(-1)});
  return unit_last(rows) ? rows : rows.contiguous();
}

// The row stride of all samples as one, or -1.
int64_t joined(const at::Tensor& t) {
  if (t.size(1) == 1) return t.stride(0);
  return t.size(0) == 1 || t.stride(0) == t.size(1) * t.stride(1) ? t.stride(1) : -1;
}

std::tuple<at::Tensor, at::Tensor> lora_add(const at::Tensor& y_in, const at::Tensor& x_in,
                                            const at::Tensor& down_in, const at::Tensor& up_in,
                                            const at::Tensor& scale_in, const Optional& index_in,
                                            bool keep) {
  const char* op = "lora_add";
  check_runs(op, "y", y_in);
  LoraAddArgs args{};
  args.dtype = dtype_of(op, "y", y_in);
  TORCH_CHECK(y_in.dim() > 1, op, ": y has shape ", y_in.sizes(), ", need at least 2 dimensions");
  check_dim(op, "x", x_in, y_in.dim());
  TORCH_CHECK(x_in.sizes().slice(0, x_in.dim() - 1) == y_in.sizes().slice(0, y_in.dim() - 1), op,
              ": x has shape ", x_in.sizes(), ", need that of y, ", y_in.sizes(),
              ", but for the last dimension");
  check_dim(op, "down", down_in, 3);
  args.B = y_in.size(0), args.T = between(y_in);
  args.A = down_in.size(0), args.rank = down_in.size(1);
  args.N = y_in.size(-1), args.K = x_in.size(-1);
  TORCH_CHECK(args.A > 0 && (index_in || args.A == 1) && args.rank <= 256, op, ": down has shape ",
              down_in.sizes(), ", need ", index_in ? "at least 1 adapter" : "1 adapter",
              " and a rank of at most 256");
  check_sizes(op, "down", down_in, {args.A, args.rank, args.K});
  check_sizes(op, "up", up_in, {args.A, args.N, args.rank});
  check_dtype(op, "scale", scale_in, at::kFloat);
  check_sizes(op, "scale", scale_in, {args.A});
  check_device(op, "scale", scale_in, y_in);
  const at::Tensor* like[] = {&x_in, &down_in, &up_in};
  const char* names[] = {"x", "down", "up"};
  for (int i = 0; i < 3; ++i) {
    check_device(op, names[i], *like[i], y_in);
    check_dtype(op, names[i], *like[i], y_in.scalar_type());
  }
  const at::Tensor y = rows_of(y_in), x = rows_of(x_in), down = down_in.contiguous();
  const at::Tensor up = up_in.contiguous(), scale = scale_in.contiguous();
  at::Tensor index;
  if (index_in) {
    check_device(op, "index", *index_in, y);
    check_dtype(op, "index", *index_in, at::kLong);
    check_sizes(op, "index", *index_in, {args.B});
    index = index_in->contiguous();
    args.index = index.const_data_ptr<int64_t>();
    if (!on_gpu(y))
      for (int64_t b = 0; b < args.B; ++b)
        TORCH_CHECK_VALUE(args.index[b] >= 0 && args.index[b] <= args.A, op, ": index has value ",
                          args.index[b], ", need 0 to ", args.A);
  }
  at::Tensor out = at::empty(y_in.sizes(), y.options());
  std::vector<int64_t> of_low = y_in.sizes().vec();
  of_low.back() = args.rank;
  at::Tensor low = at::empty(keep ? at::IntArrayRef(of_low) : at::IntArrayRef{0}, y.options());
  args.y_b = y.stride(0), args.y_t = y.stride(1), args.x_b = x.stride(0), args.x_t = x.stride(1);
  if (!index_in && joined(y) >= 0 && joined(x) >= 0) {
    args.y_t = joined(y), args.x_t = joined(x);
    args.T *= args.B;
    args.B = args.B ? 1 : 0;
  }
  args.y = y.const_data_ptr(), args.x = x.const_data_ptr();
  args.down = down.const_data_ptr(), args.up = up.const_data_ptr();
  args.scale = scale.const_data_ptr<float>();
  args.out = out.mutable_data_ptr();
  if (keep) args.low = low.mutable_data_ptr();
  if (out.numel() || low.numel()) FASTDIFF_RUN(lora_add, args, y);
  return {out, low};
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("lora_add", &fastdiff::lora_add); }
TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("lora_add", &fastdiff::lora_add); }
