#pragma once
#include "level.h"

namespace fastdiff {
struct QuantAttentionArgs {
  const void *q, *k, *v;  // [B,H,S,D], [B,H,T,D], [B,H,T,Dv]; unit last stride
  int64_t q_stride[3], k_stride[3], v_stride[3];  // in elements
  void* out;                                      // [B,S,H,Dv] contiguous
  int64_t batch, heads, rows, keys, dim, value_dim;
  float scale;
  bool smooth;  // the mean over keys comes off k
  Dtype dtype;
  float* scratch;  // quant_attention_scratch(args) floats, 64-byte aligned
  int64_t threads;
};
}  // namespace fastdiff
FASTDIFF_DECLARE_KERNEL(quant_attention, QuantAttentionArgs)

namespace fastdiff {
constexpr int64_t kQuantKeys = 128;  // keys per block of the online softmax
constexpr int64_t kQuantLanes = 48;  // most query rows per tile of any level

// Offsets of the parts of the scratch in words of 32 bits, each a multiple of 16 (64 bytes): the
// integers of all keys first, then each thread's own. Linear in T.
struct QuantAttentionScratch {
  int64_t keys, words;  // of a head: padded; of a row: four channels each
  int64_t k, k_scale, k_sum, own;
  // of a thread's own
  int64_t v, q, q_rows, score, out, row, mean, sum, each;
  int64_t total;

  explicit QuantAttentionScratch(const QuantAttentionArgs& a) {
    auto up = [](int64_t n) { return (n + 15) / 16 * 16; };
    const int64_t all = a.batch * a.heads, dim = up(a.dim), value_dim = up(a.value_dim);
    keys = up(a.keys), words = (a.dim + 3) / 4;
    k = 0;
    k_scale = k + all * keys * words;
    k_sum = k_scale + all * keys;
    own = k_sum + all * keys;
    v = 0;
    q = v + keys * value_dim;
    q_rows = q + up(words) * kQuantLanes;
    score = q_rows + up(words) * kQuantLanes;
    out = score + kQuantKeys * kQuantLanes;
    row = out + value_dim * kQuantLanes;
    mean = row + dim;
    sum = mean + dim;
    each = sum + 2 * dim;
    total = own + a.threads * each;
  }
};
}  // namespace fastdiff
