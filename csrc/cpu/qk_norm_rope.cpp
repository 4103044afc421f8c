#include "cpu/qk_norm_rope.h"

#include "common.h"

namespace fastdiff {

namespace {
constexpr const char* kOp = "qk_norm_rope";

at::Tensor table(const char* name, const at::Tensor& t) {
  check_cpu(kOp, name, t);
  check_dim(kOp, name, t, 2);
  check_dtype(kOp, name, t, at::kFloat);
  return t.contiguous();
}

// Memory as [B, S, H, D] where the input has it so, else contiguous.
at::Tensor output_like(const at::Tensor& x) {
  if (x.stride(1) >= x.stride(2)) return at::empty(x.sizes(), x.options());
  return at::empty({x.size(0), x.size(2), x.size(1), x.size(3)}, x.options()).transpose(1, 2);
}
}  // namespace

std::tuple<at::Tensor, at::Tensor> qk_norm_rope_cpu(const at::Tensor& q_in, const at::Tensor& k_in,
                                                    const std::optional<at::Tensor>& q_weight,
                                                    const std::optional<at::Tensor>& k_weight,
                                                    const std::optional<at::Tensor>& cos_in,
                                                    const std::optional<at::Tensor>& sin_in,
                                                    const std::optional<at::Tensor>& position_in,
                                                    double eps, bool interleaved) {
  check_cpu(kOp, "q", q_in);
  check_cpu(kOp, "k", k_in);
  check_dim(kOp, "q", q_in, 4);
  check_dim(kOp, "k", k_in, 4);
  check_dtype(kOp, "k", k_in, q_in.scalar_type());
  check_sizes(kOp, "k", k_in, {q_in.size(0), k_in.size(1), q_in.size(2), q_in.size(3)});
  QkNormRopeArgs args{};
  args.dtype = dtype_of(kOp, "q", q_in);
  args.batch = q_in.size(0), args.length = q_in.size(2), args.dim = q_in.size(3);
  args.eps = float(eps);
  args.interleaved = interleaved;

  at::Tensor cos, sin, position;
  TORCH_CHECK(cos_in.has_value() == sin_in.has_value(), kOp, ": need both cos and sin, or neither");
  TORCH_CHECK(cos_in || !position_in, kOp, ": position is given, need cos and sin as well");
  if (cos_in) {
    cos = table("cos", *cos_in), sin = table("sin", *sin_in);
    check_sizes(kOp, "sin", sin, cos.sizes());
    args.half = cos.size(1);
    TORCH_CHECK(2 * args.half <= args.dim, kOp, ": cos has shape ", cos.sizes(), ", need at most ",
                args.dim / 2, " columns");
    args.cos = cos.const_data_ptr<float>();
    args.sin = sin.const_data_ptr<float>();
    if (!position_in)
      TORCH_CHECK(cos.size(0) >= args.length, kOp, ": cos has shape ", cos.sizes(),
                  ", need at least ", args.length, " rows or a position");
  }
  if (position_in) {
    check_cpu(kOp, "position", *position_in);
    check_dtype(kOp, "position", *position_in, at::kLong);
    check_dim(kOp, "position", *position_in, 2);
    const int64_t rows = position_in->size(0);
    TORCH_CHECK(rows == 1 || rows == args.batch, kOp, ": position has shape ", position_in->sizes(),
                ", need [", args.batch, " or 1, ", args.length, "]");
    check_sizes(kOp, "position", *position_in, {rows, args.length});
    position = position_in->contiguous();
    args.position = position.const_data_ptr<int64_t>();
    args.position_b = rows == 1 ? 0 : args.length;
    for (int64_t i = 0; i < position.numel(); ++i)
      TORCH_CHECK_VALUE(args.position[i] >= 0 && args.position[i] < cos.size(0), kOp,
                        ": position has value ", args.position[i], ", need 0 to ", cos.size(0) - 1);
  }

  at::Tensor x[2] = {unit_last(q_in) ? q_in : q_in.contiguous(),
                     unit_last(k_in) ? k_in : k_in.contiguous()};
  const std::optional<at::Tensor>* weight_in[2] = {&q_weight, &k_weight};
  const char* names[2] = {"q_weight", "k_weight"};
  at::Tensor y[2] = {output_like(q_in), output_like(k_in)}, weight[2];
  for (int i = 0; i < 2; ++i) {
    QkNormRopeTensor& t = args.tensors[i];
    t.x = x[i].const_data_ptr();
    t.y = y[i].mutable_data_ptr();
    t.heads = x[i].size(1);
    t.x_b = x[i].stride(0), t.x_h = x[i].stride(1), t.x_s = x[i].stride(2);
    t.y_b = y[i].stride(0), t.y_h = y[i].stride(1), t.y_s = y[i].stride(2);
    if (!*weight_in[i]) continue;
    check_cpu(kOp, names[i], **weight_in[i]);
    check_dtype(kOp, names[i], **weight_in[i], q_in.scalar_type());
    check_sizes(kOp, names[i], **weight_in[i], {args.dim});
    weight[i] = (*weight_in[i])->contiguous();
    t.weight = weight[i].const_data_ptr();
  }
  if (y[0].numel() || y[1].numel()) FASTDIFF_CALL_KERNEL(qk_norm_rope, args);
  return {y[0], y[1]};
}

}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("qk_norm_rope", &fastdiff::qk_norm_rope_cpu); }
