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

// Of [B, N, C] as of one head, and of heads that lie one after another inside tokens too.
HeadRows head_rows(const at::Tensor& t) {
  const bool heads = t.dim() == 4;
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), heads ? t.stride(1) : 0,
          t.stride(-2)};
}

void update_tokens(const at::Tensor& cache, const at::Tensor& index, const at::Tensor& y) {
  const char* op = "update_tokens_";
  UpdateTokensArgs args{};
  Kept kept;
  check_runs(op, "cache", cache);
  args.dtype = dtype_of(op, "cache", cache);
  TORCH_CHECK(cache.dim() == 3 || cache.dim() == 4, op, ": cache has shape ", cache.sizes(),
              ", need 3 or 4 dimensions");
  TORCH_CHECK(unit_last(cache), op, ": cache has strides ", cache.strides(),
              ", need a last dimension that is contiguous");
  const bool heads = cache.dim() == 4;
  args.B = cache.size(0), args.H = heads ? cache.size(1) : 1;
  args.N = cache.size(-2), args.D = cache.size(-1);
  check_device(op, "index", index, cache);
  check_dtype(op, "index", index, at::kLong);
  TORCH_CHECK(index.dim() == 2 && index.size(0) == args.B, op, ": index has shape ", index.sizes(),
              ", need [", args.B, ", any number]");
  args.A = index.size(1);
  TORCH_CHECK(args.A <= std::numeric_limits<int32_t>::max(), op, ": index has shape ",
              index.sizes(), ", need less than 2**31 columns");
  check_device(op, "y", y, cache);
  check_dtype(op, "y", y, cache.scalar_type());
  if (heads) {
    check_sizes(op, "y", y, {args.B, args.H, args.A, args.D});
  } else {
    check_sizes(op, "y", y, {args.B, args.A, args.D});
  }
  const at::Tensor& places = kept.keep(index);
  args.index = places.const_data_ptr<int64_t>();
  args.index_stride = places.stride(0);
  args.cache = head_rows(cache);
  args.y = head_rows(kept.keep(y));
  if (args.cache.h_stride == args.D && args.y.h_stride == args.D) {  // heads inside tokens
    args.D *= args.H;
    args.H = 1;
  }
  if (!on_gpu(cache))
    for (int64_t i = 0; i < args.B * args.A; ++i) {
      const int64_t n = args.index[i / args.A * args.index_stride + i % args.A];
      TORCH_CHECK_VALUE(n >= 0 && n < args.N, op, ": index has value ", n, ", need 0 to ",
                        args.N - 1);
    }
  if (y.numel()) FASTDIFF_RUN(update_tokens, args, cache);
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("gather_tokens", &fastdiff::gather_tokens);
  m.impl("scatter_tokens", &fastdiff::scatter_tokens);
  m.impl("update_tokens_", &fastdiff::update_tokens);
}

TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) {
  m.impl("gather_tokens", &fastdiff::gather_tokens);
  m.impl("scatter_tokens", &fastdiff::scatter_tokens);
  m.impl("update_tokens_", &fastdiff::update_tokens);
}
