#include "cpu/layer_norm_modulate.h"

#include <tuple>

#include "common.h"

namespace fastdiff {
namespace {

using Optional = std::optional<at::Tensor>;

// Checks of the three entries, and the tensors that the pointers of `args` need alive.
struct Call {
  const char* op;
  LayerNormModulateArgs args{};
  at::Tensor kept[7];
  int count = 0;

  const at::Tensor& keep(const at::Tensor& t) {
    return kept[count++] = unit_last(t) ? t : t.contiguous();
  }

  void input(const at::Tensor& x) {
    check_cpu(op, "x", x);
    check_dim(op, "x", x, 3);
    args.dtype = dtype_of(op, "x", x);
    args.B = x.size(0), args.N = x.size(1), args.D = x.size(2);
    const at::Tensor& t = keep(x);
    args.x = {t.const_data_ptr(), t.stride(0), t.stride(1)};
  }

  void modulation(const char* name, const Optional& m, const at::Tensor& x, Modulation& to) {
    if (!m) return;
    check_cpu(op, name, *m);
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

  void residual(const at::Tensor& x, const at::Tensor& y, const at::Tensor& gate) {
    check_dim(op, "y", y, 3);
    modulation("y", y, x, args.y);
    modulation("gate", gate, x, args.gate);
  }

  void vector(const char* name, const Optional& w, const at::Tensor& x, const void*& to) {
    if (!w) return;
    check_cpu(op, name, *w);
    check_dtype(op, name, *w, x.scalar_type());
    check_sizes(op, name, *w, {args.D});
    to = keep(*w).const_data_ptr();
  }

  void norm(const at::Tensor& x, const Optional& shift, const Optional& scale,
            const Optional& weight, const Optional& bias, double eps, bool rms) {
    modulation("shift", shift, x, args.shift);
    modulation("scale", scale, x, args.scale);
    vector("weight", weight, x, args.weight);
    vector("bias", bias, x, args.bias);
    args.eps = float(eps);
    args.rms = rms;
  }

  at::Tensor output(const at::Tensor& x, void*& to) {
    at::Tensor t = at::empty_like(x, at::MemoryFormat::Contiguous);
    to = t.mutable_data_ptr();
    return t;
  }

  void run() {
    if (args.B && args.N && args.D) FASTDIFF_CALL_KERNEL(layer_norm_modulate, args);
  }
};

at::Tensor layer_norm_modulate_cpu(const at::Tensor& x, const Optional& shift,
                                   const Optional& scale, const Optional& weight,
                                   const Optional& bias, double eps, bool rms) {
  Call call{"layer_norm_modulate"};
  call.input(x);
  call.norm(x, shift, scale, weight, bias, eps, rms);
  at::Tensor m = call.output(x, call.args.modulated);
  call.run();
  return m;
}

at::Tensor gate_residual_cpu(const at::Tensor& x, const at::Tensor& y, const at::Tensor& gate) {
  Call call{"gate_residual"};
  call.input(x);
  call.residual(x, y, gate);
  at::Tensor r = call.output(x, call.args.residual);
  call.run();
  return r;
}

std::tuple<at::Tensor, at::Tensor> gate_residual_norm_modulate_cpu(
    const at::Tensor& x, const at::Tensor& y, const at::Tensor& gate, const Optional& shift,
    const Optional& scale, const Optional& weight, const Optional& bias, double eps, bool rms) {
  Call call{"gate_residual_norm_modulate"};
  call.input(x);
  call.residual(x, y, gate);
  call.norm(x, shift, scale, weight, bias, eps, rms);
  at::Tensor r = call.output(x, call.args.residual), m = call.output(x, call.args.modulated);
  call.run();
  return {r, m};
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("layer_norm_modulate", &fastdiff::layer_norm_modulate_cpu);
  m.impl("gate_residual", &fastdiff::gate_residual_cpu);
  m.impl("gate_residual_norm_modulate", &fastdiff::gate_residual_norm_modulate_cpu);
}
