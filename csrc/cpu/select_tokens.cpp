#include "cpu/select_tokens.h"

#include "common.h"

namespace fastdiff {
namespace {

using Optional = std::optional<at::Tensor>;

std::tuple<at::Tensor, at::Tensor> select_tokens(const at::Tensor& score, const at::Tensor& drops,
                                                 const Optional& forced, const at::Tensor& factors,
                                                 int64_t count, int64_t low, int64_t most,
                                                 bool reset) {
  const char* op = "select_tokens";
  check_runs(op, "score", score);
  check_dim(op, "score", score, 2);
  check_dtype(op, "score", score, at::kFloat);
  check_device(op, "drops", drops, score);
  check_dtype(op, "drops", drops, at::kInt);
  check_sizes(op, "drops", drops, score.sizes());
  check_device(op, "factors", factors, score);
  check_dtype(op, "factors", factors, at::kFloat);
  check_dim(op, "factors", factors, 2);
  const int64_t tokens = score.size(1);
  TORCH_CHECK(factors.size(0) == 2 && factors.size(1) > 0, op, ": factors has shape ",
              factors.sizes(), ", need [2, at least 1]");
  TORCH_CHECK(count >= 0 && count <= tokens, op, ": count is ", count, ", need 0 to ", tokens);
  TORCH_CHECK(low >= 0 && low <= tokens - count, op, ": low is ", low, ", need 0 to ",
              tokens - count);
  TORCH_CHECK(tokens < int64_t(1) << 31, op, ": score has ", tokens,
              " tokens, need less than 2**31");
  const at::Tensor s = score.contiguous(), d = drops.contiguous(), f = factors.contiguous();
  at::Tensor region;
  SelectTokensArgs args{};
  if (forced) {
    check_device(op, "forced", *forced, score);
    check_dtype(op, "forced", *forced, at::kBool);
    check_sizes(op, "forced", *forced, score.sizes());
    region = forced->contiguous();
    args.forced = region.const_data_ptr<bool>();
  }
  at::Tensor index = at::empty({score.size(0), count}, score.options().dtype(at::kLong));
  at::Tensor counts = at::empty(score.sizes(), drops.options());
  args.score = s.const_data_ptr<float>();
  args.drops = d.const_data_ptr<int32_t>();
  args.factors = f.const_data_ptr<float>();
  args.index = index.mutable_data_ptr<int64_t>();
  args.new_drops = counts.mutable_data_ptr<int32_t>();
  args.B = score.size(0), args.N = tokens, args.steps = factors.size(1);
  args.count = count, args.low = low, args.most = most, args.reset = reset;
  if (score.numel()) FASTDIFF_RUN(select_tokens, args, score);
  return {index, counts};
}

}  // namespace
}  // namespace fastdiff

TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("select_tokens", &fastdiff::select_tokens); }

TORCH_LIBRARY_IMPL(fastdiff, CUDA, m) { m.impl("select_tokens", &fastdiff::select_tokens); }
