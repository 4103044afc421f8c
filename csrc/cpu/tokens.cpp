#include "cpu/tokens.h"

#include <ATen/ops/full.h>

#include <limits>

#include "common.h"

namespace fastdiff {
namespace {

using Optional = std::optional<at::Tensor>;

// Checks of both entries.
template <class Args>
struct Call : Kept {
  const char* op;
  const at::Tensor& x;
  Args args{};

  Call(const char* op, const at::Tensor& x) : op(op), x(x) {}

  TokenRows rows(const at::Tensor& t) {
    const at::Tensor& k = keep(t);
    return {k.const_data_ptr(), k.stride(0), k.dim() == 3 ? k.stride(1) : 0};
  }

  void input(const at::Tensor& index) {
    check_runs(op, "x", x);
    check_dim(op, "x", x, 3);
    args.dtype = dtype_of(op, "x", x);
    args.B = x.size(0), args.N = x.size(1), args.D = x.size(2);
    args.x = rows(x);
    check_device(op, "index", index, x);
    check_dtype(op, "index", index, at::kLong);
    TORCH_CHECK(index.dim() == 2 && index.size(0) == args.B, op, ": index has shape ",
                index.sizes(), ", need [", args.B, ", any number]");
    args.A = index.size(1);
    TORCH_CHECK(args.A <= std::numeric_limits<int32_t>::max(), op, ": index has shape ",
                index.sizes(), ", need less than 2**31 columns");
    const at::Tensor& t = keep(index);
    args.index = t.const_data_ptr<int64_t>();
    args.index_stride = t.stride(0);
  }

  // Of sample b, in host memory. GPU kernels skip what is out of range: nothing waits for them.
  int64_t token(int64_t b, int64_t a) const {
    const int64_t n = args.index[b * args.index_stride + a];
    TORCH_CHECK_VALUE(n >= 0 && n < args.N, op, ": index has value ", n, ", need 0 to ",
                      args.N - 1);
    return n;
  }

  void tensor(const char* name, const at::Tensor& t) {
    check_device(op, name, t, x);
    check_dtype(op, name, t, x.scalar_type());
  }
};

at::Tensor gather_tokens(const at::Tensor& x, const at::Tensor& index) {
  Call<GatherTokensArgs> call{"gather_tokens", x};
  call.input(index);
  GatherTokensArgs& args = call.args;
  if (!on_gpu(x))
    for (int64_t i = 0; i < args.B * args.A; ++i) call.token(i / args.A, i % args.A);
  at::Tensor out = at::empty({args.B, args.A, args.D}, x.options());
  args.out = out.mutable_data_ptr();
  if (out.numel()) FASTDIFF_RUN(gather_tokens, args, x);
  return out;
}

at::Tensor scatter_tokens(const at::Tensor& x, const at::Tensor& index, const at::Tensor& y,
                          const Optional& gate) {
  Call<ScatterTokensArgs> call{"scatter_tokens", x};
  call.input(index);
  ScatterTokensArgs& args = call.args;
  call.tensor("y", y);
  check_sizes(call.op, "y", y, {args.B, args.A, args.D});
  args.y = call.rows(y);
  if (gate) {
    call.tensor("gate", *gate);
    if (gate->dim() == 3) {
      check_sizes(call.op, "gate", *gate, {args.B, args.A, args.D});
    } else {
      check_sizes(call.op, "gate", *gate, {args.B, args.D});
    }
    args.gate = call.rows(*gate);
  }
  at::Tensor last;
  if (!on_gpu(x)) {
    last = at::full({args.B, args.N}, -1, x.options().dtype(at::kInt));
    int32_t* p = last.mutable_data_ptr<int32_t>();
    for (int64_t i = 0; i < args.B * args.A; ++i)
      p[i / args.A * args.N + call.token(i / args.A, i % args.A)] = int32_t(i % args.A);
    args.last = p;
  }
  at::Tensor out = at::empty_like(x, at::MemoryFormat::Contiguous);
  args.out = out.mutable_data_ptr();
  if (out.numel()) FASTDIFF_RUN(scatter_tokens, args, x);
  return out;
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("gather_tokens", &fastdiff::gather_tokens);
  m.impl("scatter_tokens", &fastdiff::scatter_tokens);
}

TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) {
  m.impl("gather_tokens", &fastdiff::gather_tokens);
  m.impl("scatter_tokens", &fastdiff::scatter_tokens);
}
