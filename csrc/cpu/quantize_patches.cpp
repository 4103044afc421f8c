#include "cpu/quantize_patches.h"

#include "common.h"

namespace fastdiff {
namespace {

std::tuple<at::Tensor, at::Tensor> quantize_patches(const at::Tensor& x_in, int64_t size,
                                                    int64_t stride, int64_t padding,
                                                    bool upsample) {
  const char* op = "quantize_patches";
  check_runs(op, "x", x_in);
  check_dim(op, "x", x_in, 4);
  QuantizePatchesArgs args{};
  args.dtype = dtype_of(op, "x", x_in);
  constexpr int64_t kMost = 1 << 15;  // no product of sizes overflows
  TORCH_CHECK(size >= 1 && size <= kMost, op, ": size is ", size, ", need 1 to ", kMost);
  TORCH_CHECK(stride >= 1 && stride <= kMost, op, ": stride is ", stride, ", need 1 to ", kMost);
  TORCH_CHECK(padding >= 0 && padding <= kMost, op, ": padding is ", padding, ", need 0 to ",
              kMost);
  at::Tensor x = x_in.stride(1) == 1 ? x_in : x_in.contiguous(at::MemoryFormat::ChannelsLast);
  args.batch = x.size(0), args.channels = x.size(1), args.height = x.size(2),
  args.width = x.size(3);
  args.x_batch = x.stride(0), args.x_row = x.stride(2), args.x_column = x.stride(3);
  args.size = size, args.stride = stride, args.padding = padding, args.upsample = upsample;
  const auto of = [&](int64_t n) {
    const int64_t room = (upsample ? 2 * n : n) + 2 * padding - size;
    TORCH_CHECK(room >= 0, op, ": x has shape ", x_in.sizes(), ", need ", size,
                " pixels or more in both directions with padding ", padding);
    return room / stride + 1;
  };
  args.rows = of(args.height), args.columns = of(args.width);
  const int64_t count = args.rows * args.columns;
  at::Tensor q = at::empty({args.batch, args.rows, args.columns, size * size * args.channels},
                           x.options().dtype(at::kChar));
  at::Tensor s = at::empty({args.batch, args.rows, args.columns}, x.options().dtype(at::kFloat));
  args.x = x.const_data_ptr();
  args.q = q.mutable_data_ptr<int8_t>();
  args.s = s.mutable_data_ptr<float>();
  if (args.batch && count) FASTDIFF_RUN(quantize_patches, args, x);
  return {q, s};
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("quantize_patches", &fastdiff::quantize_patches); }
TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("quantize_patches", &fastdiff::quantize_patches); }
