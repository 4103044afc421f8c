// The page of schemas: one m.def per op, and the pybind11 module fastdiff._C.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <string>

#include "cpu/level.h"
#include "gpu_library.h"

TORCH_LIBRARY(fastdiff, m) {
  // q [B,H,S,D]; k, v [B,H,T,D]; exactly one bias form: full/per-key `bias`, or groups + table. ->
  // out [B,H,A,D], lse [B,H,A]; with q_starts [B+1] q, out and lse have the rows of all samples one
  // after another, in a batch of 1
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? bias, Tensor? query_group, "
      "Tensor? key_group, Tensor? table, Tensor? key_lengths, Tensor? q_index, Tensor? q_starts) "
      "-> (Tensor, Tensor)");
  // q [B,H,S,D]; k [B,H,T,D]; v [B,H,T,Dv]; smooth: the mean over keys comes off k -> [B,H,S,Dv]
  m.def("quant_attention(Tensor q, Tensor k, Tensor v, float scale, bool smooth) -> Tensor");
  // x [B,N,D]; shift, scale [B,D] or [B,N,D]; weight, bias [D]
  m.def(
      "layer_norm_modulate(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, "
      "float eps, bool rms) -> Tensor");
  m.def("gate_residual(Tensor x, Tensor y, Tensor gate) -> Tensor");
  // -> (x + gate * y, modulate(norm(x + gate * y)))
  m.def(
      "gate_residual_norm_modulate(Tensor x, Tensor y, Tensor gate, Tensor? shift, Tensor? scale, "
      "Tensor? weight, Tensor? bias, float eps, bool rms) -> (Tensor, Tensor)");
  // the same with the second over smooth [D] as int8 -> (x + gate * y, int8 [B,N,D], scales [B,N])
  m.def(
      "gate_residual_norm_quantize(Tensor x, Tensor y, Tensor gate, Tensor? shift, Tensor? scale, "
      "Tensor? weight, Tensor? bias, Tensor? smooth, float eps, bool rms) "
      "-> (Tensor, Tensor, Tensor)");
  // of those without integers, modulations [B,D] -> grad_x, grad_y ([0] without y), float32
  // [B,3,D]: sums over tokens of grad_modulated, grad_modulated * norm(r), grad_x * y
  m.def(
      "layer_norm_modulate_backward(Tensor? grad_residual, Tensor? grad_modulated, Tensor x, "
      "Tensor? y, Tensor? gate, Tensor? scale, Tensor? weight, float eps, bool rms) "
      "-> (Tensor, Tensor, Tensor)");
  // x [B,C,...], contiguous or channels_last; shift, scale [B,C]
  m.def(
      "group_norm_silu(Tensor x, int num_groups, Tensor? weight, Tensor? bias, Tensor? shift, "
      "Tensor? scale, float eps, bool silu) -> Tensor");
  // -> grad_x, float32 [B,2,C]: sums over positions of grad_u and grad_u * norm(x); u: silu's input
  m.def(
      "group_norm_silu_backward(Tensor grad, Tensor x, int num_groups, Tensor? weight, "
      "Tensor? bias, Tensor? shift, Tensor? scale, float eps, bool silu) -> (Tensor, Tensor)");
  // x [B,...]; m [K,B,...]; w [B,K]; coef [n,14]; step, noise_step [1|B]; rescale, seed, slot,
  // select [B]; mask [B|1,C|1,...]; h1, h2, ref, stored like x. -> (next state, history entry or
  // [0])
  m.def(
      "fused_step(Tensor x, Tensor m, Tensor? w, Tensor coef, Tensor? step, Tensor? h1, Tensor? "
      "h2, "
      "Tensor? rescale, Tensor? seed, Tensor? slot, Tensor? noise_step, int stream, Tensor? mask, "
      "Tensor? ref, Tensor? select, Tensor? stored, bool keep) -> (Tensor, Tensor)");
  // seed, slot [B]; step [1|B] -> float32 [B, numel]
  m.def("philox_normal(Tensor seed, Tensor slot, Tensor step, int stream, SymInt numel) -> Tensor");
  // x [B,C,H,W]; weight [N,C,3,3]; bias [N] or [B,N]; add like the result -> [B,N,H,W]
  // channels-last, H and W twice those of x where upsample
  m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? add, bool upsample) -> Tensor");
  m.def("geglu(Tensor x, Tensor? bias, bool tanh) -> Tensor");
  m.def("gelu_tanh(Tensor x, Tensor? bias) -> Tensor");
  // x [...,K]; weight [N,K]; bias [N]; activation gelu_tanh or silu: for few rows of x
  m.def("linear_few_rows(Tensor x, Tensor weight, Tensor? bias, str? activation) -> Tensor");
  // x [...,K], of geglu [...,2K]; smooth [K] float32; activation gelu_tanh, silu or geglu ->
  // [...,K] of dtype: int8 (None), on a GPU float8_e4m3fn too; float32 [...]
  m.def(
      "quantize(Tensor x, Tensor? smooth, str? activation, ScalarType? dtype=None) "
      "-> (Tensor, Tensor)");
  // x [B,C,H,W] -> int8 [B,H',W',size size C], float32 [B,H',W']
  m.def(
      "quantize_patches(Tensor x, int size, int stride, int padding, bool upsample) -> (Tensor, "
      "Tensor)");
  // q [...,K], values [N,K] int8, on a GPU float8_e4m3fn too; s [...], scale [N,G] float32; bias
  // [N] of dtype -> [...,N]
  m.def(
      "quant_linear(Tensor q, Tensor s, Tensor values, Tensor scale, Tensor? bias, str? "
      "activation, ScalarType dtype) -> Tensor");
  // y [B,...,N]; x [B,...,K]; down [A,r,K]; up [A,N,r]; scale [A] float32; index [B] of 0 to A -> y
  // + scale[a] x down[a]^T up[a]^T, and with `keep` x down[a]^T, else [0]
  m.def(
      "lora_add(Tensor y, Tensor x, Tensor down, Tensor up, Tensor scale, Tensor? index, bool "
      "keep) -> (Tensor, Tensor)");
  // logits [T,E]; sample [B,E] -> weights, experts [T,k], order [T k], position [T,k], offsets
  // [E+1], counts [E]
  m.def(
      "moe_route(Tensor logits, Tensor? sample, int k, bool sigmoid, bool renormalise, int "
      "capacity) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // y [R,C]; weights, position [T,k] -> [T,C]
  m.def("moe_combine(Tensor y, Tensor weights, Tensor position) -> Tensor");
  // x [T,K]; weight [E,N,K]; offsets [E+1]; bias [E,N]; index [R] -> [R,N], [R,N/2] with a gate
  m.def(
      "grouped_linear(Tensor x, Tensor weight, Tensor offsets, Tensor? bias, Tensor? index, str? "
      "activation) -> Tensor");
  // q [T,K], values [E,N,K] int8; s [T], scale [E,N,G] float32; offsets [E+1]; bias [E,N] of dtype;
  // index [R] -> [R,N], [R,N/2] with a gate
  m.def(
      "grouped_quant_linear(Tensor q, Tensor s, Tensor values, Tensor scale, Tensor offsets, "
      "Tensor? bias, Tensor? index, str? activation, ScalarType dtype) -> Tensor");
  // grad [R,N]; x [T,K] -> [E,N,K]
  m.def("grouped_weight_grad(Tensor grad, Tensor x, Tensor offsets, Tensor? index) -> Tensor");
  // grad [T,O]; x [T,I]; crow [O/block_rows+1]; col [nnz] -> float32 [nnz], or [nnz, block_rows,
  // block_cols]: grad^T x at these entries
  m.def(
      "sparse_weight_grad(Tensor grad, Tensor x, Tensor crow, Tensor col, int block_rows, int "
      "block_cols) -> Tensor");
  // grad [B,O,Ho,Wo]; x [B,C,H,W]; crow [O+1]; col [nnz] of C*kh*kw -> float32 [nnz]
  m.def(
      "sparse_conv2d_weight_grad(Tensor grad, Tensor x, Tensor crow, Tensor col, int[] kernel, "
      "int[] stride, int[] padding, int[] dilation) -> Tensor");
  // values, grad, exp_avg, exp_avg_sq float32 [n]; index [n] int32 or int64: positions in weight;
  // step_size, root: of the host's step, where no step [1] float32 is given
  m.def(
      "sparse_adamw_(Tensor(a!) values, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
      "Tensor(d!) weight, Tensor index, Tensor? step, float lr, float beta1, float beta2, float "
      "eps, float weight_decay, float step_size, float root) -> ()");
  // x [B,...,C] with dim -1, [B,C,...] with dim 1; scale, shift [C], or [A,C] with index [B]; of
  // x's dtype or float32
  m.def("scale_shift(Tensor x, Tensor scale, Tensor? shift, Tensor? index, int dim) -> Tensor");
  // -> grad_x, and float32 [A|1,C]: grad_scale, grad_shift
  m.def(
      "scale_shift_backward(Tensor grad, Tensor x, Tensor scale, Tensor? index, int dim) "
      "-> (Tensor, Tensor, Tensor)");
  // x [K,B,C,...]; logits [K,B,1|C,...] of x's dtype or float32 -> [B,C,...]
  m.def("aggregate_features(Tensor x, Tensor logits) -> Tensor");
  // grad [B,C,...] -> grad_x, grad_logits
  m.def("aggregate_features_backward(Tensor grad, Tensor x, Tensor logits) -> (Tensor, Tensor)");
  // q, k [B,H,S,D]; cos, sin [P, R/2] with R <= D; position [B|1,S] int64
  m.def(
      "qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? "
      "sin, "
      "Tensor? position, float eps, bool interleaved) -> (Tensor, Tensor)");
  // x [B,N,D]; index [B,A] int64 -> [B,A,D]
  m.def("gather_tokens(Tensor x, Tensor index) -> Tensor");
  // y [B,A,D]; gate [B,D] or [B,A,D] -> x with rows `index` replaced by y, or gate * y added
  m.def("scatter_tokens(Tensor x, Tensor index, Tensor y, Tensor? gate) -> Tensor");
  // cache [B,N,D] or [B,H,N,D]; y [B,A,D] or [B,H,A,D]: cache[b, .., index[b, a]] = y[b, .., a]
  m.def("update_tokens_(Tensor(a!) cache, Tensor index, Tensor y) -> ()");
  // score, drops [B,N] float32, int32; forced [B,N]; factors [2,K] float32 -> index [B,count]
  // int64, drops
  m.def(
      "select_tokens(Tensor score, Tensor drops, Tensor? forced, Tensor factors, int count, int "
      "low, int most, bool reset) -> (Tensor, Tensor)");
  // x [B,...]; y [B|1,...] -> float32 [B]: sums of x^2, x y or (x - y)^2
  m.def("sample_sums(Tensor x, Tensor? y, bool difference) -> Tensor");
  // logw [G,K] float32 or float64; u [G] float64 -> parents [G,K] int64, logw after, did [G] bool
  m.def("resample(Tensor logw, Tensor u, float least) -> (Tensor, Tensor, Tensor)");
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native library of fastdiff: registers torch.ops.fastdiff.* and selects the CPU level.";
  m.def("cpu_level", [] { return std::string(fastdiff::level_name(fastdiff::current_level())); });
  m.def("cpu_levels", [] {
    pybind11::list levels;
    for (int i = 1; i <= int(fastdiff::detected_level()); ++i)
      if (fastdiff::has_level(fastdiff::Level(i)))
        levels.append(fastdiff::level_name(fastdiff::Level(i)));
    return levels;
  });
#ifdef FASTDIFF_EMULATE
  const bool emulated = true;
#else
  const bool emulated = false;
#endif
  m.attr("emulated") = emulated;
  m.def("load_gpu_library", &fastdiff::load_gpu_library);
  m.def("why_not_gpu", &fastdiff::why_not_gpu);
  m.def("set_emulating", &fastdiff::set_emulating);
  m.def("emulating", &fastdiff::emulating);
  m.def("set_cpu_level", [](const std::string& name) {
    for (int i = 1; i <= int(fastdiff::detected_level()); ++i) {
      const auto level = fastdiff::Level(i);
      if (name == fastdiff::level_name(level) && fastdiff::has_level(level))
        return fastdiff::set_level(level);
    }
    throw pybind11::value_error("set_cpu_level: '" + name + "' is not a level of this processor");
  });
}
