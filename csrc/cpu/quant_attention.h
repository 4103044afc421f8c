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
  float* scratch;  // its struct below has the total of floats; 64-byte aligned
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

// What the GPU's kernels leave one another: offsets in words of 32 bits, each a multiple of 4.
struct QuantAttentionGpuScratch {
  int64_t dim = 0;     // channels that tiles have, of the head and of v; 0: too many
  int64_t width;       // bytes of a row of integers
  int64_t keys;        // of a head: padded to whole tiles
  int64_t k_scale, k;  // float[B,H,keys], int8[B,H,keys,width]
  int64_t mean;        // float[B,H,width]
  int64_t v, total;    // of float32: bfloat16[B,H,T,3,dim], three that sum to it

  explicit QuantAttentionGpuScratch(const QuantAttentionArgs& a) {
    const int64_t sizes[] = {48, 64, 80, 128, 160, 256}, all = a.batch * a.heads;
    const bool wide = a.dtype == Dtype::kF32;
    const int64_t widest = a.dim > a.value_dim ? a.dim : a.value_dim;
    for (int64_t size : sizes)
      if (!dim && widest <= size && !(wide && size > 128)) dim = size;
    width = (dim + 31) / 32 * 32, keys = (a.keys + 63) / 64 * 64;
    k_scale = 0;
    k = k_scale + all * keys;
    mean = k + all * keys * width / 4;
    v = mean + all * width;
    total = v + (wide ? all * a.keys * dim * 3 / 2 : 0);
  }
};
}  // namespace fastdiff
