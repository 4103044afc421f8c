#include "cpu/conv3x3.h"

#include <ATen/Parallel.h>

#include "common.h"

namespace fastdiff {

at::Tensor conv3x3_cpu(const at::Tensor& x_in, const at::Tensor& weight,
                       const std::optional<at::Tensor>& bias_in,
                       const std::optional<at::Tensor>& add_in, bool upsample) {
  auto check = [](const char* name, const at::Tensor& t) {
    check_cpu("conv3x3", name, t);
    check_dtype("conv3x3", name, t, at::kFloat);
  };
  // Strides of channels-last even where a size is 1: torch calls both layouts contiguous then.
  auto rows = [](const at::Tensor& t) { return t.permute({0, 2, 3, 1}).contiguous(); };
  check("x", x_in);
  check_dim("conv3x3", "x", x_in, 4);
  check("weight", weight);
  check_dim("conv3x3", "weight", weight, 4);
  check_sizes("conv3x3", "weight", weight, {weight.size(0), x_in.size(1), 3, 3});
  at::Tensor x = rows(x_in), bias, add;
  Conv3x3Args args{};
  args.batch = x.size(0), args.in = x.size(3), args.out = weight.size(0), args.upsample = upsample;
  args.height = x.size(1) << int(upsample), args.width = x.size(2) << int(upsample);
  args.weight_out = weight.stride(0), args.weight_in = weight.stride(1);
  args.weight_row = weight.stride(2), args.weight_column = weight.stride(3);
  at::Tensor y = at::empty({args.batch, args.out, args.height, args.width},
                           x_in.options().memory_format(at::MemoryFormat::ChannelsLast));
  if (bias_in) {
    check("bias", *bias_in);
    if (bias_in->dim() == 2) {
      check_sizes("conv3x3", "bias", *bias_in, {args.batch, args.out});
      args.bias_stride = args.out;
    } else {
      check_sizes("conv3x3", "bias", *bias_in, {args.out});
    }
    bias = bias_in->contiguous();
    args.bias = bias.const_data_ptr<float>();
  }
  if (add_in) {
    check("add", *add_in);
    check_sizes("conv3x3", "add", *add_in, y.sizes());
    add = rows(*add_in);
    args.add = add.const_data_ptr<float>();
  }
  args.threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  args.x = x.const_data_ptr<float>();
  args.weight = weight.const_data_ptr<float>();
  args.y = y.mutable_data_ptr<float>();
  if (y.numel()) FASTDIFF_CALL_KERNEL(conv3x3, args);
  return y;
}

}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("conv3x3", &fastdiff::conv3x3_cpu); }
