#include "cpu/scale_shift.h"

#include <ATen/ops/zeros.h>

#include <tuple>

#include "common.h"

namespace fastdiff {
namespace {

using Optional = std::optional<at::Tensor>;

// The stride between positions where all dimensions but the first and last are one in memory, else
// -1.
int64_t position_stride(const at::Tensor& t) {
  int64_t stride = 0, run = 0;
  for (int64_t i = t.dim() - 2; i >= 1; --i) {
    if (t.size(i) == 1) continue;
    if (run && t.stride(i) != run) return -1;
    if (!run) stride = t.stride(i);
    run = t.stride(i) * t.size(i);
  }
  return stride;
}

// Checks of both entries.
template <class Args>
struct Call : Kept {
  const char* op;
  Args args{};
  bool last = true, inner = false;  // channels are the last dimension; only in memory

  explicit Call(const char* op) : op(op) {}

  at::Tensor ordered(const at::Tensor& t) const { return inner ? t.movedim(1, -1) : t; }

  // `t` of x's shape, placed as args.planes says.
  Positions place(const at::Tensor& t) {
    if (args.planes) {
      const at::Tensor& dense = kept[count++] = t.contiguous();
      return {dense.const_data_ptr(), args.C * args.P, 1};
    }
    at::Tensor rows = ordered(t);
    const bool walks = last || inner;
    if (!walks || !unit_last(rows) || position_stride(rows) < 0) rows = rows.contiguous();
    const at::Tensor& r = kept[count++] = rows;
    return {r.const_data_ptr(), r.stride(0), walks ? position_stride(r) : args.C};
  }

  void input(const at::Tensor& x, int64_t dim) {
    check_runs(op, "x", x);
    args.dtype = dtype_of(op, "x", x);
    TORCH_CHECK(x.dim() >= 2, op, ": x has shape ", x.sizes(), ", need at least 2 dimensions");
    TORCH_CHECK(dim == -1 || dim == 1, op, ": dim is ", dim, ", need -1 or 1");
    last = dim == -1 || x.dim() == 2;
    inner = !last && !x.is_contiguous() && x.movedim(1, -1).is_contiguous();
    args.B = x.size(0), args.C = x.size(last ? -1 : 1);
    args.P = x.numel() ? x.numel() / (args.B * args.C) : 0;
    args.planes = !last && !inner && args.P > 1;
    args.x = place(x);
  }

  at::Tensor output(const at::Tensor& x, void*& to) {
    at::Tensor t = at::empty(ordered(x).sizes(), x.options());
    to = t.mutable_data_ptr();
    return inner ? t.movedim(-1, 1) : t;
  }

  ChannelRows rows(const char* name, const at::Tensor& t, const at::Tensor& x) {
    check_device(op, name, t, x);
    TORCH_CHECK(t.scalar_type() == x.scalar_type() || t.scalar_type() == at::kFloat, op, ": ", name,
                " is ", t.scalar_type(), ", need ", x.scalar_type(), " or Float");
    const at::Tensor& r = keep(t);
    return {r.const_data_ptr(), r.dim() == 2 ? r.stride(0) : 0};
  }

  void parameters(const at::Tensor& x, const at::Tensor& scale, const Optional& index) {
    args.scale = rows("scale", scale, x);
    args.wide = scale.scalar_type() == at::kFloat;
    args.A = 1;
    if (!index) {
      check_sizes(op, "scale", scale, {args.C});
      return;
    }
    TORCH_CHECK(scale.dim() == 2 && scale.size(1) == args.C, op, ": scale has shape ",
                scale.sizes(), ", need [any number, ", args.C, "] with an index");
    args.A = scale.size(0);
    check_device(op, "index", *index, x);
    check_dtype(op, "index", *index, at::kLong);
    check_sizes(op, "index", *index, {args.B});
    args.index = index->const_data_ptr<int64_t>();
    args.index_stride = index->stride(0);
    if (on_gpu(x)) return;
    for (int64_t b = 0; b < args.B; ++b) {
      const int64_t row = args.index[b * args.index_stride];
      TORCH_CHECK_VALUE(row >= 0 && row < args.A, op, ": index has value ", row, ", need 0 to ",
                        args.A - 1);
    }
  }
};

at::Tensor scale_shift(const at::Tensor& x, const at::Tensor& scale, const Optional& shift,
                       const Optional& index, int64_t dim) {
  Call<ScaleShiftArgs> call{"scale_shift"};
  ScaleShiftArgs& args = call.args;
  call.input(x, dim);
  call.parameters(x, scale, index);
  if (shift) {
    check_dtype(call.op, "shift", *shift, scale.scalar_type());
    check_sizes(call.op, "shift", *shift, scale.sizes());
    args.shift = call.rows("shift", *shift, x);
  }
  at::Tensor out = call.output(x, args.out);
  if (x.numel()) FASTDIFF_RUN(scale_shift, args, x);
  return out;
}

// Positions whose sums are taken before they are added to others: fixes the order of additions.
constexpr int64_t kPiece = 64, kPlanePiece = 1024;

std::tuple<at::Tensor, at::Tensor, at::Tensor> scale_shift_backward(const at::Tensor& grad,
                                                                    const at::Tensor& x,
                                                                    const at::Tensor& scale,
                                                                    const Optional& index,
                                                                    int64_t dim) {
  Call<ScaleShiftBackwardArgs> call{"scale_shift_backward"};
  ScaleShiftBackwardArgs& args = call.args;
  call.input(x, dim);
  call.parameters(x, scale, index);
  check_device(call.op, "grad", grad, x);
  check_dtype(call.op, "grad", grad, x.scalar_type());
  check_sizes(call.op, "grad", grad, x.sizes());
  args.grad = call.place(grad);
  at::Tensor grad_x = call.output(x, args.grad_x);
  const auto floats = x.options().dtype(at::kFloat);
  if (!x.numel())  // sums over no positions are 0
    return {grad_x, at::zeros({args.A, args.C}, floats), at::zeros({args.A, args.C}, floats)};
  at::Tensor grad_scale = at::empty({args.A, args.C}, floats);
  at::Tensor grad_shift = at::empty({args.A, args.C}, floats);
  args.piece = args.planes ? kPlanePiece : kPiece;
  args.pieces = (args.P + args.piece - 1) / args.piece;
  at::Tensor parts = at::empty({args.B, args.pieces, 2, args.C}, floats);
  args.parts = parts.mutable_data_ptr<float>();
  args.grad_scale = grad_scale.mutable_data_ptr<float>();
  args.grad_shift = grad_shift.mutable_data_ptr<float>();
  FASTDIFF_RUN(scale_shift_backward, args, x);
  return {grad_x, grad_scale, grad_shift};
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("scale_shift", &fastdiff::scale_shift);
  m.impl("scale_shift_backward", &fastdiff::scale_shift_backward);
}

TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) {
  m.impl("scale_shift", &fastdiff::scale_shift);
  m.impl("scale_shift_backward", &fastdiff::scale_shift_backward);
}
