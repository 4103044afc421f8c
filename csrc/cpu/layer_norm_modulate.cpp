#include "cpu/layer_norm_modulate.h"

#include <tuple>

#include "common.h"

namespace fastdiff {
namespace {

using Optional = std::optional<at::Tensor>;

// Checks of all entries.
template <class Args>
struct Call : Kept {
  const char* op;
  Args args{};

  explicit Call(const char* op) : op(op) {}

  void input(const at::Tensor& x) {
    check_runs(op, "x", x);
    check_dim(op, "x", x, 3);
    args.dtype = dtype_of(op, "x", x);
    args.B = x.size(0), args.N = x.size(1), args.D = x.size(2);
    const at::Tensor& t = keep(x);
    args.x = {t.const_data_ptr(), t.stride(0), t.stride(1)};
  }

  void modulation(const char* name, const Optional& m, const at::Tensor& x, Modulation& to) {
    if (!m) return;
    check_device(op, name, *m, x);
    check_dtype(op, name, *m, x.scalar_type());
    const bool per_token = m->dim() == 3;
    if (per_token) {
      check_sizes(op, name, *m, {args.B, args.N, args.D});
    } else {
      check_sizes(op, name, *m, {args.B, args.D});
    }
    const at::Tensor& t = keep(*m);
    to = {t.const_data_ptr(), t.stride(0), per_token ? t.stride(1) : 0};
  }

  void tokens(const char* name, const Optional& t, const at::Tensor& x, Modulation& to) {
    if (t) check_dim(op, name, *t, 3);
    modulation(name, t, x, to);
  }

  void residual(const at::Tensor& x, const at::Tensor& y, const at::Tensor& gate) {
    tokens("y", y, x, args.y);
    modulation("gate", gate, x, args.gate);
  }

  void vector(const char* name, const Optional& w, const at::Tensor& x, const void*& to) {
    if (!w) return;
    check_device(op, name, *w, x);
    check_dtype(op, name, *w, x.scalar_type());
    check_sizes(op, name, *w, {args.D});
    to = keep(*w).const_data_ptr();
  }

  at::Tensor output(const at::Tensor& x, void*& to) {
    at::Tensor t = at::empty_like(x, at::MemoryFormat::Contiguous);
    to = t.mutable_data_ptr();
    return t;
  }
};

struct Forward : Call<LayerNormModulateArgs> {
  using Call::Call;

  void norm(const at::Tensor& x, const Optional& shift, const Optional& scale,
            const Optional& weight, const Optional& bias, double eps, bool rms) {
    modulation("shift", shift, x, args.shift);
    modulation("scale", scale, x, args.scale);
    vector("weight", weight, x, args.weight);
    vector("bias", bias, x, args.bias);
    args.eps = float(eps);
    args.rms = rms;
  }

  void run(const at::Tensor& x) {
    if (x.numel()) FASTDIFF_RUN(layer_norm_modulate, args, x);
  }
};

at::Tensor layer_norm_modulate(const at::Tensor& x, const Optional& shift, const Optional& scale,
                               const Optional& weight, const Optional& bias, double eps, bool rms) {
  Forward call("layer_norm_modulate");
  call.input(x);
  call.norm(x, shift, scale, weight, bias, eps, rms);
  at::Tensor m = call.output(x, call.args.modulated);
  call.run(x);
  return m;
}

at::Tensor gate_residual(const at::Tensor& x, const at::Tensor& y, const at::Tensor& gate) {
  Forward call("gate_residual");
  call.input(x);
  call.residual(x, y, gate);
  at::Tensor r = call.output(x, call.args.residual);
  call.run(x);
  return r;
}

std::tuple<at::Tensor, at::Tensor> gate_residual_norm_modulate(
    const at::Tensor& x, const at::Tensor& y, const at::Tensor& gate, const Optional& shift,
    const Optional& scale, const Optional& weight, const Optional& bias, double eps, bool rms) {
  Forward call("gate_residual_norm_modulate");
  call.input(x);
  call.residual(x, y, gate);
  call.norm(x, shift, scale, weight, bias, eps, rms);
  at::Tensor r = call.output(x, call.args.residual), m = call.output(x, call.args.modulated);
  call.run(x);
  return {r, m};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> gate_residual_norm_quantize(
    const at::Tensor& x, const at::Tensor& y, const at::Tensor& gate, const Optional& shift,
    const Optional& scale, const Optional& weight, const Optional& bias, const Optional& smooth,
    double eps, bool rms) {
  Forward call("gate_residual_norm_quantize");
  call.input(x);
  call.residual(x, y, gate);
  call.norm(x, shift, scale, weight, bias, eps, rms);
  if (smooth) {
    check_device(call.op, "smooth", *smooth, x);
    check_dtype(call.op, "smooth", *smooth, at::kFloat);
    check_sizes(call.op, "smooth", *smooth, {call.args.D});
    call.args.smooth = call.keep(*smooth).const_data_ptr<float>();
  }
  at::Tensor r = call.output(x, call.args.residual);
  at::Tensor q = at::empty(x.sizes(), x.options().dtype(at::kChar));
  at::Tensor s = at::empty({x.size(0), x.size(1)}, x.options().dtype(at::kFloat));
  call.args.q = q.mutable_data_ptr<int8_t>(), call.args.s = s.mutable_data_ptr<float>();
  call.run(x);
  if (!x.numel()) s.zero_();  // rows without columns have a scale too
  return {r, q, s};
}

// Tokens that one thread sums over before their sums are added up: fixes the order of additions.
constexpr int64_t kPiece = 64;

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_modulate_backward_cpu(
    const Optional& grad_residual, const Optional& grad_modulated, const at::Tensor& x,
    const Optional& y, const Optional& gate, const Optional& scale, const Optional& weight,
    double eps, bool rms) {
  Call<LayerNormModulateBackwardArgs> call{"layer_norm_modulate_backward"};
  LayerNormModulateBackwardArgs& args = call.args;
  call.input(x);
  TORCH_CHECK(y.has_value() == gate.has_value(), call.op, ": need y and gate, or neither");
  if (y) check_dim(call.op, "gate", *gate, 2), call.residual(x, *y, *gate);
  if (scale) check_dim(call.op, "scale", *scale, 2);
  call.modulation("scale", scale, x, args.scale);
  call.vector("weight", weight, x, args.weight);
  call.tokens("grad_residual", grad_residual, x, args.grad_residual);
  call.tokens("grad_modulated", grad_modulated, x, args.grad_modulated);
  args.eps = float(eps);
  args.rms = rms;
  at::Tensor grad_x = call.output(x, args.grad_x);
  at::Tensor grad_y = y ? call.output(x, args.grad_y) : at::empty({0}, x.options());
  args.piece = kPiece;
  args.pieces = (args.N + kPiece - 1) / kPiece;
  at::Tensor sums = at::empty({args.B, args.pieces, 3, args.D}, x.options().dtype(at::kFloat));
  args.sums = sums.mutable_data_ptr<float>();
  if (x.numel()) FASTDIFF_CALL_KERNEL(layer_norm_modulate_backward, args);
  return {grad_x, grad_y, sums.sum(1)};
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("layer_norm_modulate", &fastdiff::layer_norm_modulate);
  m.impl("gate_residual", &fastdiff::gate_residual);
  m.impl("gate_residual_norm_modulate", &fastdiff::gate_residual_norm_modulate);
  m.impl("gate_residual_norm_quantize", &fastdiff::gate_residual_norm_quantize);
  m.impl("layer_norm_modulate_backward", &fastdiff::layer_norm_modulate_backward_cpu);
}

TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) {
  m.impl("layer_norm_modulate", &fastdiff::layer_norm_modulate);
  m.impl("gate_residual", &fastdiff::gate_residual);
  m.impl("gate_residual_norm_modulate", &fastdiff::gate_residual_norm_modulate);
  m.impl("gate_residual_norm_quantize", &fastdiff::gate_residual_norm_quantize);
}
