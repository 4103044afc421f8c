#include "cpu/sample_sums.h"

#include <ATen/ops/zeros.h>

#include "common.h"

namespace fastdiff {
namespace {

using Optional = std::optional<at::Tensor>;

// `t`, or a copy of it, whose samples are contiguous; any stride between them.
at::Tensor dense_samples(const at::Tensor& t) {
  int64_t run = 1;
  for (int64_t i = t.dim() - 1; i >= 1; --i) {
    if (t.size(i) != 1 && t.stride(i) != run) return t.contiguous();
    run *= t.size(i);
  }
  return t;
}

at::Tensor sample_sums(const at::Tensor& x, const Optional& y, bool difference) {
  const char* op = "sample_sums";
  check_runs(op, "x", x);
  SampleSumsArgs args{};
  args.dtype = dtype_of(op, "x", x);
  TORCH_CHECK(x.dim() >= 1, op, ": x has shape ", x.sizes(), ", need at least 1 dimension");
  TORCH_CHECK(y || !difference, op, ": y is None, need a tensor for differences");
  const auto floats = x.options().dtype(at::kFloat);
  if (y) {
    check_device(op, "y", *y, x);
    check_dtype(op, "y", *y, x.scalar_type());
    at::DimVector one(x.sizes());
    one[0] = 1;
    TORCH_CHECK(y->sizes() == x.sizes() || y->sizes() == one, op, ": y has shape ", y->sizes(),
                ", need ", x.sizes(), " or ", at::IntArrayRef(one));
  }
  args.B = x.size(0);
  if (!x.numel()) return at::zeros({args.B}, floats);  // sums over nothing
  args.N = x.numel() / args.B;
  args.pieces = (args.N + kSumsPiece - 1) / kSumsPiece;
  args.difference = difference;
  const at::Tensor first = dense_samples(x);
  args.x = first.const_data_ptr(), args.x_stride = first.stride(0);
  at::Tensor second, parts;
  if (y) {
    second = dense_samples(*y);
    args.y = second.const_data_ptr();
    args.y_stride = y->size(0) == args.B ? second.stride(0) : 0;
  }
  at::Tensor out = at::empty({args.B}, floats);
  args.out = out.mutable_data_ptr<float>();
  if (args.pieces > 1) {
    parts = at::empty({args.B, args.pieces}, x.options().dtype(at::kDouble));
    args.parts = parts.mutable_data_ptr<double>();
  }
  FASTDIFF_RUN(sample_sums, args, x);
  return out;
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("sample_sums", &fastdiff::sample_sums); }

TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("sample_sums", &fastdiff::sample_sums); }
